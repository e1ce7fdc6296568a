"""Rows decoded together, which come and go between steps."""

from typing import TYPE_CHECKING

import torch

from nanochat.cache import State
from nanochat.engine.cuda_graphs import SHORTEST, Steps, bucket
from nanochat.engine.row import Row, scored
from nanochat.gpt import padded
from nanochat.sampling import Sampler

if TYPE_CHECKING:
    from nanochat.engine.engine import Engine

PREFILL_TOKENS = 1 << 14  # of prompts taken in by one call of the model, padding included
ROWS_TOGETHER = 8  # products of a multiple of this many rows give a row the same to the last bit (tests hold it), those of fewer do not


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
