"""Decoding at fixed addresses: the step of one token a row as work that a GPU is told once, and then does again at a word.

    steps = Steps(model)
    steps.lend(batch), steps.reserve(rows, tokens)        # its state and buffers now hold the batch's rows
    if steps.ready(rows, sampler):
        tokens = steps.draw(rows, sampler, ahead=True)    # draws a token for each row, and starts the model on these tokens

A step is two pieces: `_sample` goes from logits to the next tokens, `_forward` from these to the next logits and the moved state. Both read
and write the same memory each time, have shapes that hang on nothing but a bucket (rows, positions), and read nothing on the host. So on
CUDA each is captured once a bucket and replayed; elsewhere the same pieces run as they are. What the host knows (where each row stands,
its settings, its random number, a token forced on it) goes to the device in one copy a step, what it wants (the tokens) comes back in one,
both through pinned memory. The model runs on a step's tokens while the host still reads them: nothing in them changes what it is to run on.

A single row of a model that only decodes goes through it in fewer and larger operations (nanochat/engine/single_row.py).

Rows of a bucket that nobody uses, and rows that have ended, are computed too: they write at their own place, which nobody reads.
Graphs go when the memory they know moves (it grows by doubling), the oldest ones when there are many; they share one pool, as none of them
leaves anything in it.
"""

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nanochat.cache import Fixed, Taps
from nanochat.engine import single_row as one_token
from nanochat.sampling import Sampler, choose, penalised, reorder

log = logging.getLogger(__name__)

SHORTEST = 256  # positions of the smallest bucket
NARROWEST = 64  # likeliest tokens that the smallest bucket of top-k looks at
MOST_GRAPHS = 96

# rows of `inputs`: whole numbers, then real ones
FORCED, AT, TOP_K, LIKELIEST, TEMPERATURE, TOP_P, PENALTY, U = range(8)
CAPTURING = threading.Lock()  # one at a time in a process


def bucket(n: int, least: int = 1) -> int:
    """The smallest power of two that is n and `least` at least."""
    return max(least, 1 << max(n - 1, 0).bit_length())


class Steps:
    """The steps of one model: a state and buffers for `room` rows, which one batch at a time may use, and what was captured on them.

    logits (room, V) float32 are for each row's next token; tokens (room,) its last; seen (room, V) bool.
    """

    def __init__(self, model):
        self.model = model
        self.state = None
        self._aside = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None  # to practise and capture on
        self._weights: list[int] = []
        self._captures = True
        self.clear()

    def clear(self) -> None:
        """Let all memory go. A batch that still uses the state keeps it."""
        self.state = self.logits = self.tokens = self.seen = self._inputs = self._host = self._tokens_host = None
        self._user = lambda: None
        self._forget()

    def _forget(self) -> None:
        self._known: OrderedDict[tuple, Callable[[], None]] = OrderedDict()
        self._pool = None

    def lend(self, batch) -> bool:
        """Lend state and buffers to a batch without rows. False if another one has rows in them."""
        other = self._user()
        if other is not None and other is not batch and other.rows:
            return False
        weights = [t.data_ptr() for t in (*self.model.parameters(), *self.model.buffers())]
        if weights != self._weights or (self.state and (self.state.device, self.state.dtype) != (self.model.device, self.model.dtype)):
            self.clear()
            self._weights = weights
        if self.state is not None:
            self.state.resize(0)
        self._user = weakref.ref(batch)
        return True

    def reserve(self, room: int, capacity: int) -> None:
        """Have memory for so many rows and tokens a row. What there was stays, elsewhere if it grows, and graphs go then."""
        V, device = self.model.config.vocab_size, self.model.device
        if self.state is None:
            self.state = self.model.new_state(room, capacity)
            self.state.resize(0)
        elif room > self.state.room or capacity > self.state.capacity:
            self._forget()
            self.state.grow(max(capacity, self.state.capacity), max(room, self.state.room))
        if self.tokens is None or len(self.tokens) < self.state.room:
            room = self.state.room
            old, pin = (self.logits, self.tokens, self.seen), device.type == "cuda"
            self.logits = torch.zeros(room, V, device=device)
            self.tokens = torch.zeros(room, dtype=torch.long, device=device)
            self.seen = torch.zeros(room, V, dtype=torch.bool, device=device)
            for new, before in zip((self.logits, self.tokens, self.seen), old):
                if before is not None:
                    new[:len(before)] = before
            self._inputs = torch.zeros(8, room, dtype=torch.int32, device=device)
            self._host = torch.zeros(8, room, dtype=torch.int32, pin_memory=pin)
            self._host[TOP_K] = 1  # rows that nobody uses are drawn too, and need settings that can be
            self._host[TEMPERATURE:U].view(torch.float32).fill_(1)
            self._tokens_host = torch.zeros(room, dtype=torch.long, pin_memory=pin)
            self._sent, self._drawn = (torch.cuda.Event(), torch.cuda.Event()) if pin else (None, None)

    def fits(self, room: int, capacity: int) -> bool:
        """`reserve`, or False where there is too little memory; then what was captured is gone."""
        try:
            self.reserve(room, capacity)
        except torch.OutOfMemoryError:
            self._short()
            return False
        return True

    def _short(self) -> None:
        self._forget()
        log.warning("decoding: too little memory for steps at fixed addresses; these rows go on without")

    def select(self, order: list[int]) -> None:
        """Let row i be what row order[i] was; the state is the batch's to reorder."""
        reorder(self.logits, order)
        reorder(self.tokens, order)

    # ---- what the host does for a step

    def ready(self, rows: Sequence, sampler: Sampler) -> bool:
        """Get memory, graphs and places ready for one step more of these rows; False as `fits`."""
        need = 1 + max((length for row, length in zip(rows, self.state.lengths, strict=True) if not row.ended), default=0)
        try:
            if need > self.state.capacity:
                self.reserve(self.state.room, bucket(need))
            self._place(rows, need)
            self._piece(self._forward_key)
            self._piece(self._sample_key(sampler))
        except torch.OutOfMemoryError:
            self._short()
            return False
        return True

    def _place(self, rows: Sequence, need: int) -> None:
        """Tell where each row stands; rows that nobody uses, at 0. Those that have ended stay where they are, within the bucket."""
        B, S = min(bucket(len(rows)), self.state.room), min(bucket(need, SHORTEST), self.state.capacity)
        self._forward_key = ("forward", B, S)
        at = self._free()[AT]
        at[:len(rows)] = [min(length, S - 1) for length in self.state.lengths]
        at[len(rows):] = 0

    def _sample_key(self, sampler: Sampler) -> tuple:
        V, B = self.model.config.vocab_size, self._forward_key[1]
        widest, nucleus = (min(bucket(n, NARROWEST), V) if n else 0 for n in (sampler.widest, sampler.nucleus))
        return ("sample", B, sampler.greedy, widest, nucleus, sampler.penalises)

    def _free(self) -> np.ndarray:
        """What is sent to the device next, (8, room), to be written: what was sent last has left."""
        if self._sent:
            self._sent.synchronize()
        return self._host.numpy()

    def _send(self) -> None:
        """Copy what the host knows to the device, sometime before what comes next there."""
        self._inputs.copy_(self._host, non_blocking=True)
        if self._sent:
            self._sent.record()

    def draw(self, rows: Sequence, sampler: Sampler, ahead: bool) -> list[int]:
        """Draw a token for each row, or take the one that is forced on it; return them. `ready` was true.

        ahead: start the model on them, as `advance` does, while they come; what it gives is for the next draw.
        """
        n, host = len(rows), self._free()
        host[FORCED, :n] = [0 if row.ended else row._forced[0] if row._forced else -1 for row in rows]
        host[FORCED, n:] = 0
        host[TOP_K:TEMPERATURE, :n] = sampler.whole
        host[TEMPERATURE:U, :n] = sampler.real.view(np.int32)
        if not sampler.greedy:
            host[U, :n] = sampler.uniform().view(np.int32)
        self._send()
        self._piece(self._sample_key(sampler))()
        self._tokens_host.copy_(self.tokens, non_blocking=True)
        if self._drawn:
            self._drawn.record()
        if ahead:
            self._run(rows)
        if self._drawn:
            self._drawn.synchronize()
        return self._tokens_host[:n].tolist()

    def advance(self, rows: Sequence) -> None:
        """Run the model on the tokens drawn last. `ready` was true."""
        self._send()
        self._run(rows)

    def _run(self, rows: Sequence) -> None:
        self._piece(self._forward_key)()
        self.state.advance(1, [int(not row.ended) for row in rows])

    # ---- what the device does

    def _forward(self, B: int, S: int) -> None:
        """From tokens to logits, for B rows that stand before S."""
        memory = Fixed(self.state, S, self._inputs[AT, :B].long())
        ids, alone = self.tokens[:B].unsqueeze(1), B == 1 and one_token.can(self.model)
        logits = one_token.one_token(self.model, ids, memory) if alone else self.model(ids, state=memory)
        self.logits[:B] = logits[:, -1]

    def _sample(self, B: int, greedy: bool, widest: int, nucleus: int, penalises: bool) -> None:
        """From logits to tokens, for B rows."""
        whole, real = self._inputs[:, :B], self._inputs[:, :B].view(torch.float32)
        logits = self.logits[:B]
        if penalises:
            logits = penalised(logits, self.seen[:B], real[PENALTY])
        if greedy:
            drawn = logits.argmax(dim=-1)
        else:
            drawn = choose(logits, real[U], whole[LIKELIEST] > 0, real[TEMPERATURE], whole[TOP_K].long(), real[TOP_P], widest, nucleus)
        self.tokens[:B] = torch.where(whole[FORCED] < 0, drawn, whole[FORCED])
        if penalises:
            self.seen[:B].scatter_(1, self.tokens[:B].unsqueeze(1), True)

    # ---- captured

    def _piece(self, key: tuple) -> Callable[[], None]:
        """Return what does this piece of work: a graph's replay, or the function itself where there are no graphs."""
        if key not in self._known:
            kind, B, *_ = key
            run = partial(self._forward if kind == "forward" else self._sample, *key[1:])
            # keys and values are written where each row's next ones belong: nobody has read there, and they are written again
            writes = [self.tokens[:B], self.seen[:B]] if kind == "sample" else [
                self.logits[:B], *(layer.all[:B] for layer in self.state.layers if isinstance(layer, Taps))]
            self._known[key] = self._captured(run, writes)
            while len(self._known) > MOST_GRAPHS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def _captured(self, run: Callable[[], None], writes: list[Tensor]) -> Callable[[], None]:
        """Run it for practice, which compiles and allocates what is made once, put back what it wrote, and capture it."""
        self._send()
        kept = [tensor.clone() for tensor in writes]
        here = None if self._aside is None else torch.cuda.current_stream(self.model.device)
        if here is None:
            run()
        else:
            self._aside.wait_stream(here)
            with torch.cuda.stream(self._aside):
                run()
                run()
            here.wait_stream(self._aside)
        for tensor, before in zip(writes, kept):
            tensor.copy_(before)
        if here is None or not self._captures:
            return run
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with CAPTURING, torch.cuda.graph(graph, pool=self._pool, stream=self._aside, capture_error_mode="thread_local"):
                run()
        except RuntimeError as error:
            torch.cuda.set_stream(here)  # where ending the capture failed, some versions of torch leave the other one
            for cause in (error, error.__context__):  # what ends a capture too early says so itself, on top of why
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
            self._captures = False
            log.warning("decoding: steps cannot be captured as CUDA graphs, and run operation by operation: %s", str(error).split("\n")[0])
            return run
        return partial(_replay, graph, self.model.rope(1))


def _replay(graph: torch.cuda.CUDAGraph, reads: object) -> None:
    """Do what was captured. reads: what it reads that nobody else may hold any more."""
    graph.replay()
