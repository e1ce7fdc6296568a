"""Text that is still being fetched: base training reads the first shards while the rest arrives.

    paths, arrival = planned_shards(207, data_dir(), print)     # some of these files may not be there yet
    while not arrival.here(paths[8]):                           # one look; raises where the shard will not come
        pass

The plan, a number of shards, is part of the command of the run. So the order of the documents is that of the plan,
whenever each shard came.
"""

import time
from collections.abc import Callable
from pathlib import Path

from nanochat.dataset.documents import shard_paths
from nanochat.dataset.shards import (
    FINEWEB_EDU,
    HUB_TEXTS,
    being_written,
    fetch_command,
    fetched_source,
    read_source,
    shard_name,
)
from nanochat.errors import UserError

POLL_SECONDS = 0.2      # between two looks
START_SECONDS = 15.0    # a download may take this long to start, or to be started again
SHARD_SECONDS = 480.0   # for one shard; less than the ten minutes after which NCCL gives up ranks that wait


class Arrival:
    """Waits for shards that a download in another process brings into a folder. One at a time.

    Args:
        folder: of the shards.
        count: training shards that are planned, for messages.
        say: prints a line to the user, once, when the text is slower than what reads it.
    """

    def __init__(self, folder: Path, count: int, say: Callable[[str], None]):
        self.folder, self.count, self.say = folder, count, say
        self._told = False
        self._began: float | None = None  # of the wait for one shard
        self._seen = 0.0                  # when a download was last seen

    def here(self, path: Path) -> bool:
        """Return whether a shard is there; where it is not, wait a moment first.

        Raises:
            UserError: it will not come: no download runs, or it has brought nothing for SHARD_SECONDS.
        """
        running = being_written(self.folder)  # before the look at the file: a download may end just now
        if path.exists():
            self._began = None
            return True
        now = time.monotonic()
        if self._began is None:
            self._began = self._seen = now
            if not self._told:
                self._told = True
                self.say(f"waiting for {path.name}: the text arrives more slowly than it is read")
        if running:
            self._seen = now
        command = fetch_command(fetched_source(self.folder) or FINEWEB_EDU, self.count)
        way_out = f"`{command}` fetches what is missing (speedrun does so by itself), then the same command resumes."
        if now - self._seen > START_SECONDS:
            raise UserError(f"{path.name} of the {self.count} planned shards is not in {self.folder}, and no download "
                            f"is running. {way_out}")
        if now - self._began > SHARD_SECONDS:
            raise UserError(f"{path.name} has not come into {self.folder} for {SHARD_SECONDS / 60:.0f} minutes, though "
                            f"a download is running: is the network gone? {way_out}")
        time.sleep(POLL_SECONDS)
        return False


def planned_shards(count: int, folder: Path, say: Callable[[str], None]) -> tuple[list[Path], Arrival | None]:
    """Return the training shards of a plan, in order, and what waits for those that are not there yet.

    The validation shard must be there, or arrive now. Imported and generated text is complete: None waits for it.

    Args:
        count: training shards. folder: where they are, or will be. say: prints a line to the user.

    Raises:
        UserError: the folder holds fewer, and it is no text that is fetched; or the validation shard does not come.
    """
    if count < 1:
        raise UserError(f"--shards is {count}: it must be at least 1, or -1 for those that are there.")
    arrival = Arrival(folder, count, say)
    while (source := fetched_source(folder)) is None:  # a download writes source.json before the first shard
        if read_source(folder):  # imported or generated
            found = shard_paths("train", folder)
            if len(found) < count:
                raise UserError(f"--shards is {count}, but {folder} holds {len(found)} training shards, and they are "
                                "all.")
            return found[:count], None
        arrival.here(folder / "source.json")
    text = HUB_TEXTS[source]
    count = arrival.count = min(count, text.last)
    while not arrival.here(folder / text.val):
        pass
    return [folder / shard_name(index) for index in range(count)], arrival
