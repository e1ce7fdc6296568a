"""SmolTalk: 460,000 conversations on many topics, written by larger models for small ones. For training only."""

from tasks.base import NONE, Task, one_of
from tasks.hub import load_rows


class SmolTalk(Task):
    """HuggingFaceTB/smol-smoltalk, unchanged."""

    name, kind = "SmolTalk", NONE

    def __init__(self, split: str):
        one_of("split of SmolTalk", split, ("train", "test"))
        self.rows = load_rows("HuggingFaceTB/smol-smoltalk", "default", split, ("messages",))

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, i: int) -> dict:
        return {"messages": self.rows[i]["messages"]}
