"""A trained model in three lines.

    from nanochat import LLM
    llm = LLM("sft")                        # a stage, a folder in the published format, or a Hugging Face repository
    print(llm.chat("Why is the sky blue?"))

    llm.chat([{"role": "user", "content": "Hello"}], temperature=0)       # a conversation; a list of them is one batch
    llm.generate(["Once upon a time", "The capital of"], max_tokens=32)   # continuations of texts
    for piece in llm.stream("Tell me a story"): print(piece, end="")      # whole characters, as they are decoded
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanochat.distributed import init_ranks
from nanochat.engine import Engine, Row
from nanochat.errors import UserError
from nanochat.loading import from_hub, load_for_decoding
from nanochat.stages import STAGES
from nanochat.tokenizer.stream import TerminalText

Question = str | Sequence[dict[str, Any]]  # a question, or the messages of a conversation


class LLM:
    """A model with its tokenizer.

    All calls take the options of Engine.complete: max_tokens, temperature, top_k, top_p, repetition_penalty, seed.
    Their defaults are ENGINE in nanochat/request.py.
    """

    def __init__(self, source: str | Path = "sft", *, device: str = "", model_tag: str | None = None,
                 step: int | None = None, revision: str | None = None, quantize: str = "none"):
        """Load a model.

        Args:
            source: base, mid, sft or rl (under $NANOCHAT_BASE_DIR), a folder, or "owner/name" on the hub.
            device: cuda, mps or cpu; "" for the best there is.
            model_tag: which of a stage's models; None for the only or the deepest one.
            step: which of its checkpoints; None for the last.
            revision: which revision of a hub repository.
            quantize: "int8" decodes with 8-bit weights (nanochat/engine/quantize.py).

        Raises:
            UserError: there is no such model.
        """
        if source not in STAGES and not Path(source).expanduser().is_dir():
            source = from_hub(str(source), revision)
        self.device = init_ranks(device).device
        self.model, self.tokenizer, self.meta = load_for_decoding(
            source, self.device, model_tag=model_tag, step=step, quantize=quantize)
        self.engine = Engine(self.model, self.tokenizer)

    def chat(self, chats: Question | Sequence[Sequence[dict[str, Any]]], **options: Any) -> str | list[str]:
        """Return the answer to a question or a conversation, or the answers to a list of conversations.

        Tool calls are left out.
        """
        many = not isinstance(chats, str) and len(chats) > 0 and not isinstance(chats[0], dict)
        prompts = [self._prompt(chat) for chat in (chats if many else [chats])]
        answers = [self._text(rows[0], tools=False) for rows in self.engine.generate_many(prompts, **options)]
        return answers if many else answers[0]

    def generate(self, prompts: str | Sequence[str], **options: Any) -> str | list[str]:
        """Return the continuation of a text, or of each of a list of texts."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [self.tokenizer.encode(text, prepend=self.tokenizer.get_bos_token_id()) for text in texts]
        answers = [self._text(rows[0], tools=True) for rows in self.engine.generate_many(ids, **options)]
        return answers[0] if isinstance(prompts, str) else answers

    def stream(self, chat: Question, tools: bool = False, **options: Any) -> Iterator[str]:
        """Yield the answer to a question or a conversation in whole characters, as they are decoded.

        tools: show tool calls and their results, as [2+2 = 4].
        """
        text = TerminalText(self.tokenizer, tools)
        for (token,), _ in self.engine.generate(self._prompt(chat), **options):
            if token not in self.engine.stops and (piece := text.feed(token)):
                yield piece
        if piece := text.finish():
            yield piece

    def _prompt(self, chat: Question) -> list[int]:
        messages = [{"role": "user", "content": chat}] if isinstance(chat, str) else list(chat)
        if messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
            raise UserError("the conversation ends with the assistant's own message: there is nothing to answer")
        return self.tokenizer.render_for_completion({"messages": messages})

    def _text(self, row: Row, tools: bool) -> str:
        text = TerminalText(self.tokenizer, tools)
        tokens = (token for token in row.tokens if token not in self.engine.stops)
        return "".join([*map(text.feed, tokens), text.finish()])
