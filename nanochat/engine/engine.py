"""Decode many rows at once: one prompt or many, one or several samples of each. A row gets what it would get alone.

    engine = Engine(model, tokenizer)
    for tokens, masks in engine.generate(prompt, num_samples=4, max_tokens=64, temperature=0.8):
        ...                                                      # one token a row
    rows, masks = engine.generate_batch(prompt, num_samples=4)   # whole rows with the prompt, without the closing token
    answers = engine.generate_many([prompt, other], num_samples=2, max_tokens=64)    # answers[prompt][sample].tokens

A row ends at <|assistant_end|> or <|bos|>. What it writes between <|python_start|> and <|python_end|> is a tool call:
it goes to the calculator, and the result, if there is one, is forced on the row between <|output_start|> and
<|output_end|>, with mask 0.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from nanochat.engine.batch import Batch
from nanochat.engine.cuda_graphs import StaticDecoder
from nanochat.engine.row import Row
from nanochat.errors import UserError
from nanochat.request import ENGINE, Settings
from nanochat.tokenizer.stream import PartParser, tool_tokens
from nanochat.tools.calculator import calculate


class Engine:
    """A model and its tokenizer, ready to decode.

    Args:
        model: a GPT.
        tokenizer: the model's RustBPETokenizer.
        calculate: the tool, from an expression to the text of its value, or None where it has no value.
        graphs: whether decode steps are static, captured as CUDA graphs (cuda_graphs.py). None: on CUDA, unless the
            environment has NANOCHAT_GRAPHS=0. On other devices True computes the same, not captured.
    """

    def __init__(self, model, tokenizer, calculate: Callable[[str], str | None] = calculate,
                 graphs: bool | None = None):
        self.model, self.tokenizer, self.calculate = model, tokenizer, calculate
        if graphs is None:
            graphs = model.device.type == "cuda" and os.environ.get("NANOCHAT_GRAPHS") != "0"
        self.static = StaticDecoder(model) if graphs else None
        self.stops = {tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()}
        self._call_tokens = tool_tokens(tokenizer, ("python",))
        self._python_start, self._output_start, self._output_end = (
            tokenizer.encode_special(f"<|{name}|>") for name in ("python_start", "output_start", "output_end"))

    def take(self, row: Row, sampled: int) -> None:
        """Append the next token to a row, the forced one if there is one, else `sampled`; end the row or run a tool
        call."""
        forced = bool(row._forced)
        token = row._forced.popleft() if forced else sampled
        row.tokens.append(token)
        row.mask.append(int(not forced))
        if not forced and token in (self.stops if row.stops is None else row.stops):
            row.ended = "stop"
        elif len(row.tokens) >= row.max_tokens:
            row.ended = "length"
        if row._parser is None:
            if not row.tools or token != self._python_start:
                return
            row._parser = PartParser(self._call_tokens)
        if row._parser.feed(token) == "end" and (call := row._parser.tokens):
            result = self.calculate(self.tokenizer.decode(call))
            if result is not None:
                row._forced.extend([self._output_start, *self.tokenizer.encode(result), self._output_end])

    def generate(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = ENGINE.max_tokens,
                 temperature: float = ENGINE.temperature, top_k: int | None = ENGINE.top_k,
                 seed: int | None = ENGINE.seed, top_p: float | None = ENGINE.top_p,
                 repetition_penalty: float = ENGINE.repetition_penalty
                 ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield the new tokens of all rows, step by step.

        Args:
            tokens: ids of the prompt, the same for all rows. Each row samples on its own from the first token on.
            num_samples: rows.
            max_tokens: new tokens a row at most; None: up to the model's sequence_len.
            temperature, top_k, top_p, repetition_penalty: as in `sampling.Settings`.
            seed: None takes a new one each time.

        Yields:
            (one token a row, one mask a row: 1 sampled, 0 forced). A row that has ended repeats its last token.
        """
        settings = Settings(temperature, top_k, top_p, repetition_penalty, seed)
        max_tokens, rows = self._rows(tokens, num_samples, max_tokens, settings)
        if max_tokens < 1:
            return
        batch = Batch(self)
        batch.add_prompts(rows, num_samples)
        while batch.step():
            yield [row.tokens[-1] for row in rows], [row.mask[-1] for row in rows]

    def generate_batch(self, tokens: list[int], num_samples: int = 1, **options
                       ) -> tuple[list[list[int]], list[list[int]]]:
        """Return (rows, masks): for each sample the prompt and the new tokens, without the closing token. The mask is 0
        over the prompt. options: as for `generate`."""
        rows = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        ended = [False] * num_samples
        for column, mask in self.generate(tokens, num_samples, **options):
            for i, (token, sampled) in enumerate(zip(column, mask)):
                ended[i] = ended[i] or token in self.stops
                if not ended[i]:
                    rows[i].append(token)
                    masks[i].append(sampled)
        return rows, masks

    def generate_many(self, prompts: Sequence[Sequence[int]], num_samples: int = 1, **options) -> list[list[Row]]:
        """Return for each prompt its finished rows, one a sample. `tokens` and `mask` of a row are what follows the
        prompt, the closing token included. options: as for `complete`."""
        answers: list[list[Row]] = [[] for _ in prompts]
        for number, rows in self.complete(prompts, num_samples, **options):
            answers[number] = rows
        return answers

    def complete(self, prompts: Sequence[Sequence[int]], num_samples: int = 1,
                 max_tokens: int | None = ENGINE.max_tokens, temperature: float = ENGINE.temperature,
                 top_k: int | None = ENGINE.top_k, seed: int | Sequence[int] | None = ENGINE.seed,
                 top_p: float | None = ENGINE.top_p, repetition_penalty: float = ENGINE.repetition_penalty,
                 batch_size: int = 64, batch_invariant: bool = False
                 ) -> Iterator[tuple[int, list[Row]]]:
        """Yield (index of the prompt, its finished rows) as they finish, in any order.

        Args:
            prompts: ids of each prompt.
            num_samples: rows of each prompt.
            seed: one for all prompts, or one for each.
            batch_size: rows decoded together at most.
            batch_invariant: as for Batch; prompts are then prefilled one by one.
            others: as for `generate`.
        """
        settings = Settings(temperature, top_k, top_p, repetition_penalty, seed if isinstance(seed, int) else None)
        # longest first, so that the prompts of one prefill have similar lengths
        waiting = deque(sorted(range(len(prompts)), key=lambda number: -len(prompts[number])))
        left, batch = {}, Batch(self, batch_invariant)
        while waiting or batch.rows:
            joining: list[Row] = []
            room = batch_size - len(batch.active)
            while waiting and (room >= num_samples or not (batch.rows or joining)) and (
                    joining or 2 * room >= batch_size):
                number = waiting.popleft()
                own = settings if isinstance(seed, int) or seed is None else replace(settings, seed=seed[number])
                most, rows = self._rows(prompts[number], num_samples, max_tokens, own, number)
                if most < 1:
                    yield number, rows
                    continue
                left[number] = rows
                joining += rows
                room -= num_samples
            if joining:
                batch.add_prompts(joining, num_samples)
            for number in {row.name for row in batch.step() if row.ended}:
                if all(row.ended for row in left[number]):
                    yield number, left.pop(number)

    def _rows(self, prompt: Sequence[int], num_samples: int, max_tokens: int | None, settings: Settings,
              name: Any = None) -> tuple[int, list[Row]]:
        """Return the limit of new tokens, and new rows of a prompt."""
        if num_samples < 1:
            raise UserError(f"num_samples must be at least 1, not {num_samples}")
        most = max(self.model.config.sequence_len - len(prompt), 0) if max_tokens is None else max_tokens
        return most, [Row(prompt, most, replace(settings, sample=i), name=name, ended="" if most > 0 else "length")
                      for i in range(num_samples)]
