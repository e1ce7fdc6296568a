"""Many rows at once through one model: one prompt or many, one sample of each or several, each row as if it were alone.

    engine = Engine(model, tokenizer)
    for tokens, masks in engine.generate(prompt, num_samples=4, max_tokens=64, temperature=0.8):
        ...                                                   # one token a row; rows that ended repeat their closing token
    rows, masks = engine.generate_batch(prompt, num_samples=4)    # whole rows with the prompt, without the closing token
    answers = engine.generate_many([prompt, other, ...], num_samples=2, max_tokens=64)    # answers[prompt][sample].tokens

A row ends at <|assistant_end|> or <|bos|>. What it writes between <|python_start|> and <|python_end|> goes to the calculator, and the
result, if there is one, is put behind it between <|output_start|> and <|output_end|>: forced, mask 0.
"""

import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from nanochat.calculator import calculate
from nanochat.files import UserError
from nanochat.gpt import padded
from nanochat.graphs import SHORTEST, Steps, bucket
from nanochat.sampling import Sampler, Settings
from nanochat.state import State

PREFILL_TOKENS = 1 << 14  # of prompts taken in by one call of the model, padding included
ROWS_TOGETHER = 8  # products of a multiple of this many rows give a row the same to the last bit (tests hold it), those of fewer do not


@dataclass(eq=False)
class Row:
    """One row being decoded: its prompt, its settings, and what came behind the prompt so far.

    tokens and mask (1 sampled, 0 forced) hold the closing token too. ended: "" while it runs, "stop" after a closing token, "length"
    after max_tokens. stops: the tokens that close it, the engine's if None. tools: whether the calculator answers its calls. logprobs:
    if it is a number n, scores gets for each token (log-probability, the n likeliest as (id, log-probability)), of the model's own
    distribution, before temperature and penalties.
    """

    prompt: Sequence[int]
    max_tokens: int
    settings: Settings = Settings()
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    ended: Literal["", "stop", "length"] = ""
    name: Any = None                                              # the caller's own
    stops: Collection[int] | None = None
    tools: bool = True
    logprobs: int | None = None
    scores: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    random: np.random.Generator = None                            # its own stream of random numbers
    _forced: deque[int] = field(default_factory=deque)
    _call: list[int] | None = None                                # the tokens of a tool call being written

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("the prompt is empty: it must hold at least one token, <|bos|> say")
        if self.random is None:
            self.random = self.settings.random()


def scored(logits: torch.Tensor, token: int, n: int) -> tuple[float, list[tuple[int, float]]]:
    """Return the log-probability of a token and the n likeliest as (id, log-probability), likeliest first; logits (V,)."""
    logp = logits.log_softmax(dim=-1)
    if not n:
        return float(logp[token]), []
    least = logp.topk(min(n, len(logp))).values[-1]
    ids = (logp >= least).nonzero().squeeze(1)  # all that are as likely as the last one: which of them topk takes is not said
    values, order = logp[ids].sort(descending=True, stable=True)
    return float(logp[token]), list(zip(ids[order][:n].tolist(), values[:n].tolist()))


class Batch:
    """Rows decoded together. They join between any two steps (`add`, `join`), and leave when they have ended, or are made to (`drop`).

    exact: on a CPU, what a row computes is the same to the last bit whoever is beside it, at some cost: products have a multiple of
    ROWS_TOGETHER rows, and each row attends by itself. On a GPU it is the same up to rounding.
    """

    def __init__(self, engine: "Engine", exact: bool = False):
        self.engine, self.model = engine, engine.model
        self.exact = exact and self.model.device.type == "cpu"
        self.rows: list[Row] = []
        self._state: State | None = None
        self._keeps = self.exact                                  # whether the memory stays when the last row leaves
        self._logits: torch.Tensor | None = None                  # (B, V) for the next token of each row
        self._steps: Steps | None = None                          # whose state and logits are used, while there are rows
        self._lent = False                                        # whether the state is that of the engine's steps
        self._ahead = False                                       # whether the model runs on the tokens drawn last already
        self._sampler = Sampler([], self.model.config.vocab_size, self.model.device)

    @property
    def live(self) -> list[Row]:
        """The rows that have not ended."""
        return [row for row in self.rows if not row.ended]

    @torch.inference_mode()
    def add(self, rows: list[Row], samples: int = 1) -> None:
        """Let rows join. Their prompts are taken in together, padded on the right where no token sees it.

        samples: each `samples` rows on end have the same prompt, which is taken in once.
        """
        self.drop([row for row in self.rows if row.ended])
        heads = rows[::samples]
        while heads:
            count, longest = 0, 0
            while count < len(heads) and (not count or max(longest, len(heads[count].prompt)) * (count + 1) <= PREFILL_TOKENS):
                longest = max(longest, len(heads[count].prompt))
                count += 1
            self._prefill(heads[:count], rows[:count * samples], samples)
            heads, rows = heads[count:], rows[count * samples:]

    def _prefill(self, heads: list[Row], rows: list[Row], samples: int) -> None:
        ids, counts = padded([row.prompt for row in heads], self.model.device)
        state = self.model.new_state(len(heads), max(counts) + min(max(row.max_tokens for row in rows), 128))
        ragged = counts if min(counts) < max(counts) else None
        logits = self.model(ids, state=state, counts=ragged, last_only=True)[:, -1]
        if samples > 1:
            state, logits = state.fork(samples), logits.repeat_interleave(samples, dim=0)
        self.join(rows, state, logits)

    @torch.inference_mode()
    def join(self, rows: list[Row], state: State, logits: torch.Tensor, capacity: int = 0, room: int = 0) -> None:
        """Let rows join whose prompts (and tokens so far) the state holds, in their order; logits (B, V) are for their next tokens.

        The state is taken over where the batch has none, unless capacity (tokens a row) and room (rows) say how much memory to make.
        """
        before, count, self._keeps = len(self.rows), len(self.rows) + len(rows), self._keeps or room > 0
        if not before and self.engine.steps is not None and not self.exact and self.engine.steps.lend(self):
            self._steps = self.engine.steps
        if self._steps is not None:
            soon = max(length + min(row.max_tokens - len(row.tokens), 128) for row, length in zip(rows, state.lengths))
            if self._steps.fits(room or bucket(count), capacity or bucket(soon, SHORTEST)):
                self._state, self._sampler.seen, self._lent = self._steps.state, self._steps.seen, True
            else:
                self._leave_steps()
        if self._state is None and not self._keeps:
            self._state = state
        else:
            if self._state is None:
                self._state = self.model.new_state(max(room, len(rows)), max(capacity, state.capacity))
                self._state.by_row = self.exact
            self._state.resize(count)
            for i in range(len(rows)):
                self._state.put(before + i, state, i)
        if self._steps is not None:
            self._steps.logits[before:count] = logits
            self._logits = self._steps.logits[:count]
        else:
            self._logits = logits if not before else torch.cat([self._logits, logits])
        self._sampler.extend([row.settings for row in rows], [row.random for row in rows])
        self.rows = self.rows + rows
        for i, row in enumerate(rows, before):
            self._sampler.saw(i, [*row.prompt, *row.tokens])

    def step(self) -> list[Row]:
        """Give every live row its next token; returns those rows. What each got is the last of its tokens and mask."""
        live = self.draw()
        self.advance()
        return live

    @torch.inference_mode()
    def draw(self) -> list[Row]:
        """The first half of a step: draw the tokens, let rows that ended go."""
        live = self.live
        if not live:
            return []
        drawn = self._drawn()
        for i, (row, token) in enumerate(zip(self.rows, drawn)):
            if not row.ended:
                self.engine.take(row, token)
                if row.logprobs is not None:
                    row.scores.append(scored(self._logits[i], row.tokens[-1], row.logprobs))
                if self._steps is None:
                    self._sampler.saw(i, row.tokens[-1:])
        ended = [row for row in self.rows if row.ended]
        if self.exact or 4 * len(ended) >= len(self.rows):  # moving rows costs as much as a few steps of the dead
            self.drop(ended)
        return live

    def _drawn(self) -> list[int]:
        """The next token of each row. With steps at fixed addresses, the model may be running on them already: where there is a token
        after these, and nobody wants to see the logits that they came from."""
        if not self._on_steps():
            return self._sampler(self._logits).tolist()
        self._ahead = (any(not row.ended and len(row.tokens) + 1 < row.max_tokens for row in self.rows)
                       and all(row.logprobs is None for row in self.rows))
        return self._steps.draw(self.rows, self._sampler, self._ahead)

    def _on_steps(self) -> bool:
        """Is the next half of a step one at fixed addresses?"""
        if self._steps is not None and not self._steps.ready(self.rows, self._sampler):
            self._leave_steps()
        return self._steps is not None

    def _leave_steps(self) -> None:
        """Go on without, until the last row has left."""
        self._logits, self._steps = self._logits.clone() if self.rows else None, None

    @torch.inference_mode()
    def advance(self) -> None:
        """The second half of a step: run the model on the last token of each row."""
        if not self.rows or self._ahead:
            self._ahead = False
            return
        if self._on_steps():
            self._steps.advance(self.rows)
            return
        B, ids = len(self.rows), [row.tokens[-1:] for row in self.rows]
        padding = -B % ROWS_TOGETHER if self.exact else 0
        self._state.resize(B + padding)
        logits = self.model(torch.tensor(ids + [[0]] * padding, device=self.model.device), state=self._state)
        self._state.resize(B)
        self._logits = logits[:B, -1]

    @torch.inference_mode()
    def drop(self, rows: list[Row]) -> None:
        """Let rows leave; the last ones take their places."""
        going = {id(row) for row in rows}
        order = list(range(len(self.rows)))
        for i in reversed(order):
            if id(self.rows[order[i]]) in going:
                last = order.pop()
                if i < len(order):
                    order[i] = last
        if len(order) == len(self.rows):
            return
        for i, source in enumerate(order):
            if i != source:
                self._state.put(i, self._state, source)
        if self._state is not None:
            self._state.resize(len(order))
        self.rows = [self.rows[i] for i in order]
        self._sampler.select(order)
        if self._steps is not None:
            self._steps.select(order)
            self._logits = self._steps.logits[:len(order)]
        else:
            self._logits = self._logits[order]
        if not order and (self._lent or not self._keeps):
            self._state = self._logits = self._steps = self._sampler.seen = None
            self._lent = self._ahead = False


class Engine:
    """Decodes with a model and its tokenizer. `calculate`: the tool, from an expression to the text of its value, None for no value.

    graphs: whether a step runs at fixed addresses, captured as CUDA graphs (nanochat/graphs.py); None: on CUDA, unless the environment
    has NANOCHAT_GRAPHS=0. On other devices True computes the same, uncaptured.
    """

    def __init__(self, model, tokenizer, calculate: Callable[[str], str | None] = calculate, graphs: bool | None = None):
        self.model, self.tokenizer, self.calculate = model, tokenizer, calculate
        if graphs is None:
            graphs = model.device.type == "cuda" and os.environ.get("NANOCHAT_GRAPHS") != "0"
        self.steps = Steps(model) if graphs else None
        self.stops = {tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()}
        self._python_start, self._python_end, self._output_start, self._output_end = (
            tokenizer.encode_special(f"<|{name}|>") for name in ("python_start", "python_end", "output_start", "output_end"))

    def take(self, row: Row, drawn: int) -> None:
        """Give a row its next token: the one that is forced on it, else `drawn`; and do what that token asks for."""
        sampled = not row._forced
        token = drawn if sampled else row._forced.popleft()
        row.tokens.append(token)
        row.mask.append(int(sampled))
        if sampled and token in (self.stops if row.stops is None else row.stops):
            row.ended = "stop"
        elif len(row.tokens) >= row.max_tokens:
            row.ended = "length"
        if not row.tools:
            return
        if token == self._python_start:
            row._call = []
        elif token == self._python_end:
            if row._call:
                result = self.calculate(self.tokenizer.decode(row._call))
                if result is not None:
                    row._forced.extend([self._output_start, *self.tokenizer.encode(result), self._output_end])
            row._call = None
        elif row._call is not None:
            row._call.append(token)

    def generate(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None, temperature: float = 1.0,
                 top_k: int | None = None, seed: int | None = 42, top_p: float | None = None,
                 repetition_penalty: float = 1.0) -> Iterator[tuple[list[int], list[int]]]:
        """Yield, step by step, (one token per row, one mask per row: 1 sampled, 0 forced).

        tokens: the prompt's ids, the same for all rows; each row draws on its own from the first token on. max_tokens: new tokens a row at
        most; None means up to the model's sequence_len. seed None draws anew each time. A row that has ended repeats its closing token.
        """
        max_tokens, rows = self._rows(tokens, num_samples, max_tokens, Settings(temperature, top_k, top_p, repetition_penalty, seed))
        if max_tokens < 1:
            return
        batch = Batch(self)
        batch.add(rows, num_samples)
        while batch.step():
            yield [row.tokens[-1] for row in rows], [row.mask[-1] for row in rows]

    def generate_batch(self, tokens: list[int], num_samples: int = 1, **options) -> tuple[list[list[int]], list[list[int]]]:
        """Return (rows, masks): for each sample the prompt and what was generated, without the closing token; mask 0 over the prompt.

        options as for `generate`.
        """
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
        """Return, for each prompt, its finished rows, one a sample: `.tokens` and `.mask` behind the prompt, closing token included.

        options as for `complete`. Every row is what it would be if its prompt were decoded alone.
        """
        answers: list[list[Row]] = [[] for _ in prompts]
        for number, rows in self.complete(prompts, num_samples, **options):
            answers[number] = rows
        return answers

    def complete(self, prompts: Sequence[Sequence[int]], num_samples: int = 1, max_tokens: int | None = None, temperature: float = 1.0,
                 top_k: int | None = None, seed: int | Sequence[int] | None = 42, top_p: float | None = None,
                 repetition_penalty: float = 1.0, batch_size: int = 64) -> Iterator[tuple[int, list[Row]]]:
        """Yield (number of the prompt, its finished rows) as they get done, in any order. At most batch_size rows are decoded together.

        seed: one for all prompts, or one for each. max_tokens None: up to the model's sequence_len.
        """
        settings = Settings(temperature, top_k, top_p, repetition_penalty, seed if isinstance(seed, int) else None)
        waiting = deque(sorted(range(len(prompts)), key=lambda number: -len(prompts[number])))  # longest first: alike ones together
        left, batch = {}, Batch(self)
        while waiting or batch.rows:
            joining: list[Row] = []
            room = batch_size - len(batch.live)
            while waiting and (room >= num_samples or not (batch.rows or joining)) and (joining or 2 * room >= batch_size):
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
                batch.add(joining, num_samples)
            for number in {row.name for row in batch.step() if row.ended}:
                if all(row.ended for row in left[number]):
                    yield number, left.pop(number)

    def _rows(self, prompt: Sequence[int], num_samples: int, max_tokens: int | None, settings: Settings, name: Any = None
              ) -> tuple[int, list[Row]]:
        """Return (new tokens at most, the rows of a prompt)."""
        if num_samples < 1:
            raise UserError(f"num_samples must be at least 1, not {num_samples}")
        most = max(self.model.config.sequence_len - len(prompt), 0) if max_tokens is None else max_tokens
        return most, [Row(prompt, most, replace(settings, sample=i), name=name, ended="" if most > 0 else "length")
                      for i in range(num_samples)]
