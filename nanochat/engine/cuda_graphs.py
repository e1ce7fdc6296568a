"""Decode steps with static shapes and addresses, captured as CUDA graphs and replayed.

    static = StaticDecoder(model)
    static.acquire(batch), static.reserve(max_rows, max_len)      # its cache and buffers now hold the batch's rows
    if static.prepare(rows, sampler):
        tokens = static.sample(rows, sampler, run_ahead=True)     # one token a row; the model starts on them

A decode step has two parts: `_sample` goes from logits to the next tokens, `_forward` from these to the next logits and
the updated cache. Both read and write the same memory in each step, have shapes that depend on nothing but a bucket
(rows, length), and read nothing on the host. So on CUDA each part is captured once a bucket and replayed. On other
devices the same parts run as they are. What the host knows (positions, sampling settings, random numbers, forced
tokens) goes to the device in one copy a step. The sampled tokens come back in one copy. Both go through pinned memory.
The model may run on a step's tokens while the host still reads them, because nothing that the host decides changes what
the model does next.

Unused rows of a bucket, and rows that have ended, are computed too: they write at their own positions, which are
not read. Graphs are dropped when the memory they refer to moves (it grows by doubling), and the least recently used
ones when there are many. They share one memory pool, since no graph leaves anything in it.
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

from nanochat.sampling import Sampler, penalize, reorder, sample_or_argmax

log = logging.getLogger(__name__)

MIN_LENGTH = 256  # positions of the smallest bucket
MIN_TOP_K = 64  # most likely tokens that the smallest bucket of top-k looks at
MAX_GRAPHS = 96

# rows of `_inputs` (8, max_rows): integers, then floats
FORCED, INDEX, TOP_K, GREEDY, TEMPERATURE, TOP_P, PENALTY, UNIFORM = range(8)
CAPTURE_LOCK = threading.Lock()  # one capture at a time in a process


def bucket(n: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least n and at least `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


class StaticDecoder:
    """The static decode steps of one model: a cache and buffers that one batch at a time may use, and the captured
    graphs.

    Attributes:
        cache: with memory for max_rows rows; None before the first use.
        logits: (max_rows, V) float32, for the next token of each row.
        tokens: (max_rows,) int64, the last token of each row.
        seen: (max_rows, V) bool, which tokens are in each row, for the repetition penalty.
    """

    def __init__(self, model):
        self.model = model
        self.cache = None
        # warm-up and capture run on a stream of their own
        self._capture_stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self._weights: list[int] = []
        self._can_capture = True
        self.clear()

    def clear(self) -> None:
        """Free all memory. A batch that still uses the cache keeps it."""
        self.cache = self.logits = self.tokens = self.seen = self._inputs = self._host = self._tokens_host = None
        self._user = lambda: None
        self._drop_graphs()

    def _drop_graphs(self) -> None:
        self._runners: OrderedDict[tuple, Callable[[], None]] = OrderedDict()
        self._pool = None

    def acquire(self, batch) -> bool:
        """Give cache and buffers to a batch without rows. Return False if another batch has rows in them."""
        other = self._user()
        if other is not None and other is not batch and other.rows:
            return False
        weights = [t.data_ptr() for t in (*self.model.parameters(), *self.model.buffers())]
        moved = self.cache and (self.cache.device, self.cache.dtype) != (self.model.device, self.model.dtype)
        if weights != self._weights or moved:
            self.clear()
            self._weights = weights
        if self.cache is not None:
            self.cache.resize(0)
        self._user = weakref.ref(batch)
        return True

    def reserve(self, max_rows: int, max_len: int) -> None:
        """Have memory for so many rows and tokens a row. Contents are kept; if memory grows, it moves and graphs are
        dropped."""
        V, device = self.model.config.vocab_size, self.model.device
        if self.cache is None:
            self.cache = self.model.new_cache(max_rows, max_len)
            self.cache.resize(0)
        elif max_rows > self.cache.max_rows or max_len > self.cache.max_len:
            self._drop_graphs()
            self.cache.grow(max(max_rows, self.cache.max_rows), max(max_len, self.cache.max_len))
        if self.tokens is None or len(self.tokens) < self.cache.max_rows:
            max_rows = self.cache.max_rows
            old, pin = (self.logits, self.tokens, self.seen), device.type == "cuda"
            self.logits = torch.zeros(max_rows, V, device=device)
            self.tokens = torch.zeros(max_rows, dtype=torch.long, device=device)
            self.seen = torch.zeros(max_rows, V, dtype=torch.bool, device=device)
            for new, before in zip((self.logits, self.tokens, self.seen), old):
                if before is not None:
                    new[:len(before)] = before
            self._inputs = torch.zeros(8, max_rows, dtype=torch.int32, device=device)
            self._host = torch.zeros(8, max_rows, dtype=torch.int32, pin_memory=pin)
            self._host[TOP_K] = 1  # unused rows are sampled too, and need valid settings
            self._host[TEMPERATURE:UNIFORM].view(torch.float32).fill_(1)
            self._tokens_host = torch.zeros(max_rows, dtype=torch.long, pin_memory=pin)
            self._inputs_sent, self._tokens_copied = (torch.cuda.Event(), torch.cuda.Event()) if pin else (None, None)

    def try_reserve(self, max_rows: int, max_len: int) -> bool:
        """Do `reserve`. Return False where memory is too short; all graphs are dropped then."""
        try:
            self.reserve(max_rows, max_len)
        except torch.OutOfMemoryError:
            self._out_of_memory()
            return False
        return True

    def _out_of_memory(self) -> None:
        self._drop_graphs()
        log.warning("decoding: too little memory for CUDA graphs; these rows are decoded without")

    def select(self, order: list[int]) -> None:
        """Reorder the buffers: row i becomes what row order[i] was. The batch reorders the cache."""
        reorder(self.logits, order)
        reorder(self.tokens, order)

    # ---- the host's part of a step

    def prepare(self, rows: Sequence, sampler: Sampler) -> bool:
        """Prepare memory, graphs and positions for one more step of these rows. Return False as `try_reserve` does."""
        lengths = zip(rows, self.cache.lengths, strict=True)
        need = 1 + max((length for row, length in lengths if not row.ended), default=0)
        try:
            if need > self.cache.max_len:
                self.reserve(self.cache.max_rows, bucket(need))
            self._set_index(rows, need)
            self._runner(self._forward_key)
            self._runner(self._sample_key(sampler))
        except torch.OutOfMemoryError:
            self._out_of_memory()
            return False
        return True

    def _set_index(self, rows: Sequence, need: int) -> None:
        """Choose the bucket and set each row's position: unused rows are at 0, ended ones stay, within the bucket."""
        B, S = min(bucket(len(rows)), self.cache.max_rows), min(bucket(need, MIN_LENGTH), self.cache.max_len)
        self._forward_key = ("forward", B, S)
        index = self._writable_inputs()[INDEX]
        index[:len(rows)] = [min(length, S - 1) for length in self.cache.lengths]
        index[len(rows):] = 0

    def _sample_key(self, sampler: Sampler) -> tuple:
        V, B = self.model.config.vocab_size, self._forward_key[1]
        max_top_k, max_nucleus = (
            min(bucket(n, MIN_TOP_K), V) if n else 0 for n in (sampler.max_top_k, sampler.max_nucleus))
        return ("sample", B, sampler.greedy, max_top_k, max_nucleus, sampler.has_penalty)

    def _writable_inputs(self) -> np.ndarray:
        """Return the host's inputs (8, max_rows) for the next copy, once the last copy has left."""
        if self._inputs_sent:
            self._inputs_sent.synchronize()
        return self._host.numpy()

    def _send_inputs(self) -> None:
        """Start the copy of the inputs to the device; what is launched after it sees them."""
        self._inputs.copy_(self._host, non_blocking=self._inputs_sent is not None)
        self._record(self._inputs_sent)

    def _record(self, event: torch.cuda.Event | None) -> None:
        """Mark with an event what was launched for the model's device so far. None: there is no GPU."""
        if event:
            event.record(torch.cuda.current_stream(self.model.device))  # by itself it would take the current device's

    def sample(self, rows: Sequence, sampler: Sampler, run_ahead: bool) -> list[int]:
        """Return the next token of each row: sampled, or the one that is forced on it. `prepare` returned True.

        run_ahead: start the model on these tokens, as `decode` does, while they are copied to the host.
        """
        n, host = len(rows), self._writable_inputs()
        host[FORCED, :n] = [0 if row.ended else row._forced[0] if row._forced else -1 for row in rows]
        host[FORCED, n:] = 0
        host[TOP_K:TEMPERATURE, :n] = sampler.int_settings
        host[TEMPERATURE:UNIFORM, :n] = sampler.float_settings.view(np.int32)
        if not sampler.greedy:
            host[UNIFORM, :n] = sampler.uniform().view(np.int32)
        self._send_inputs()
        self._runner(self._sample_key(sampler))()
        self._tokens_host.copy_(self.tokens, non_blocking=self._tokens_copied is not None)
        self._record(self._tokens_copied)
        if run_ahead:
            self._run_model(rows)
        if self._tokens_copied:
            self._tokens_copied.synchronize()
        return self._tokens_host[:n].tolist()

    def decode(self, rows: Sequence) -> None:
        """Run the model on the tokens sampled last. `prepare` returned True."""
        self._send_inputs()
        self._run_model(rows)

    def _run_model(self, rows: Sequence) -> None:
        self._runner(self._forward_key)()
        self.cache.advance(1, [int(not row.ended) for row in rows])

    # ---- the device's part of a step

    def _forward(self, B: int, S: int) -> None:
        """Go from tokens to logits, for B rows at positions below S."""
        index = self._inputs[INDEX, :B].long()
        self.logits[:B] = self.model.static_step(self.tokens[:B].unsqueeze(1), index, self.cache, S)

    def _sample(self, B: int, greedy: bool, max_top_k: int, max_nucleus: int, has_penalty: bool) -> None:
        """Go from logits to tokens, for B rows."""
        ints, floats = self._inputs[:, :B], self._inputs[:, :B].view(torch.float32)
        logits = self.logits[:B]
        if has_penalty:
            logits = penalize(logits, self.seen[:B], floats[PENALTY])
        if greedy:
            sampled = logits.argmax(dim=-1)
        else:
            sampled = sample_or_argmax(logits, floats[UNIFORM], ints[GREEDY] > 0, floats[TEMPERATURE],
                                       ints[TOP_K].long(), floats[TOP_P], max_top_k, max_nucleus)
        self.tokens[:B] = torch.where(ints[FORCED] < 0, sampled, ints[FORCED])
        if has_penalty:
            self.seen[:B].scatter_(1, self.tokens[:B].unsqueeze(1), True)

    # ---- capture

    def _runner(self, key: tuple) -> Callable[[], None]:
        """Return the function that runs a part of a step: a graph's replay, or the part itself where there are no
        graphs."""
        if key not in self._runners:
            kind, B, *_ = key
            run = partial(self._forward if kind == "forward" else self._sample, *key[1:])
            # per-token cache tensors are only written at each row's next position, which is written again in the real
            # step
            writes = [self.tokens[:B], self.seen[:B]] if kind == "sample" else [
                self.logits[:B], *(tensor[:B] for layer in self.cache.layers for tensor in layer.per_row.values())]
            self._runners[key] = self._captured(run, writes)
            while len(self._runners) > MAX_GRAPHS:
                self._runners.popitem(last=False)
        self._runners.move_to_end(key)
        return self._runners[key]

    def _captured(self, run: Callable[[], None], writes: list[Tensor]) -> Callable[[], None]:
        """Run a part to warm up (that compiles kernels and allocates), restore what it wrote, and capture it."""
        self._send_inputs()
        kept = [tensor.clone() for tensor in writes]
        current = None if self._capture_stream is None else torch.cuda.current_stream(self.model.device)
        if current is None:
            run()
        else:
            self._capture_stream.wait_stream(current)
            with torch.cuda.stream(self._capture_stream):
                run()
                run()
            current.wait_stream(self._capture_stream)
        for tensor, before in zip(writes, kept):
            tensor.copy_(before)
        if current is None or not self._can_capture:
            return run
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with CAPTURE_LOCK, torch.cuda.graph(graph, pool=self._pool, stream=self._capture_stream,
                                                capture_error_mode="thread_local"):
                run()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # after a failed capture some versions of torch stay on the other stream
            for cause in (error, error.__context__):  # the error that ended the capture may hide the one that caused it
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
            self._can_capture = False
            log.warning("decoding: steps cannot be captured as CUDA graphs, and run operation by operation: %s",
                        str(error).split("\n")[0])
            return run
        return partial(_replay, graph, self.model.rope(1))


def _replay(graph: torch.cuda.CUDAGraph, kept_alive: object) -> None:
    """Replay a graph. kept_alive: memory that it reads, which must not be freed before the graph."""
    graph.replay()
