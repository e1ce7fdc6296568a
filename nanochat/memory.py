"""How much memory a training step needs, and the rows and activation checkpointing that fit a device.

    need = memory_of_step(config, rows=8, T=2048, dtype=torch.bfloat16)      # bytes of one GPU
    batch = choose_batch(config, 2048, [32, 16, 8, 4, 2, 1], ranks=1, dtype=torch.bfloat16, memory=25.4e9)
    batch.rows, batch.recompute                                              # 8, False

The need is counted: weights, gradients, this rank's part of the optimizer state, what each layer keeps for backward,
the logits of a chunk, and the buffers of the optimizer step. The factors are measured, and tests/test_cards.py and
tests/test_nullgpu_step.py compare the sum with what the caching allocator gives out for real steps on a GPU that
computes nothing.
"""

import functools
import gc
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanochat.buckets import second_moment_shape
from nanochat.distributed import Ranks, gather_objects
from nanochat.errors import UserError
from nanochat.gpt import GPT, MIXERS, GPTConfig, meta_model
from nanochat.kernels.cross_entropy import chunk_tokens
from nanochat.kernels.dispatch import has_triton
from nanochat.optim import parameter_groups

# In tensors as large as a layer's input, (B, T, E). What each layer keeps is its mixer's `kept`, and with lambdas the
# stream before and after the scaling.
KEPT_BY_LAMBDAS, KEPT_BY_BACKOUT, KEPT_BY_SMEAR = 2, 3, 2
KEPT_BESIDE_LAYERS = 4.2  # embedding, last norm, the gradient of the head's input
TEMPORARY = 7.3           # of a layer's backward, at its peak: not kept, beside what is kept
TEMPORARY_AGAIN = 5.2     # of that of a layer that is computed again
PIECE = 1.5e9             # float32 temporaries of the cross-entropy in plain PyTorch, where Triton's kernel does not
CONTEXT, FRAGMENTATION = 0.7e9, 0.06  # what CUDA and its libraries take; what the allocator cannot use
COMMUNICATION = 1e9       # NCCL's buffers, with several GPUs
RECOMPUTE_HELP = ("activation checkpointing: blocks computes each block a second time, which saves memory; auto does "
                  "so where hardly a row fits otherwise; none never")
FEW_TOKENS = 1024         # a micro-batch below this is slower than a larger one whose blocks are computed twice


@dataclass(frozen=True)
class _Sizes:
    """Numbers of weights: all; those that Muon trains; those of the head, V·E. And of the optimizer's state, NorMuon's
    second moments included: they are a thousandth of it, and counted where they are not used, too."""

    all: int
    muon: int
    head: int
    state: int


@functools.lru_cache
def _sizes(shape: tuple) -> _Sizes:
    model = meta_model(GPTConfig(**dict(shape)))
    matrices = [p for group in parameter_groups(model) if group["kind"] == "muon" for p in group["params"]]
    every, muon = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in matrices)
    return _Sizes(every, muon, model.lm_head.weight.numel(),
                  2 * every - muon + sum(math.prod(second_moment_shape(p.shape)) for p in matrices))


def memory_of_step(config: GPTConfig, rows: int, T: int, *, ranks: int = 1, recompute: bool = False,
                   accumulate: bool = True, dtype: torch.dtype = torch.bfloat16, triton: bool = True) -> float:
    """Return the bytes that a training step allocates on one device at its peak, the optimizer state included.

    Args:
        config: of the model.
        rows: of a micro-batch. T: tokens of a row.
        ranks: that share the optimizer state.
        recompute: whether blocks are computed again in backward (GPT.recompute).
        accumulate: whether a step has several micro-batches: then the gradients of those before are there, too.
        dtype: of the matrix products.
        triton: whether Triton's kernels run on the device.
    """
    n, tokens, width = _sizes(tuple(config.to_dict().items())), rows * T, dtype.itemsize
    unit = tokens * config.n_embd * width
    layers = [MIXERS[letter].kept(config, letter in config.value_embeds) + config.mlp_ratio - 4
              + KEPT_BY_LAMBDAS * config.lambdas for letter in config.pattern()]
    beside = KEPT_BESIDE_LAYERS + KEPT_BY_BACKOUT * config.backout + KEPT_BY_SMEAR * config.smear
    state = 4 * n.all + 4 * n.state / ranks
    cast = width if width < 4 else 0  # a weight is kept for backward in the products' dtype
    gradients = 4 * n.all if accumulate else 0

    x = torch.empty(tokens, config.n_embd, dtype=dtype, device="meta")
    logits = width * config.vocab_size * min(tokens, chunk_tokens(x, config.vocab_size))
    piece = 0 if triton else min(PIECE, 5 * 4 * config.vocab_size * tokens)
    head = 4 * n.head + logits + cast * n.head + piece
    if recompute:
        kept = unit * (len(layers) + beside)
        again = unit * (max(layers) + TEMPORARY_AGAIN) + cast * n.muon / len(layers)
    else:
        kept = unit * (sum(layers) + beside) + cast * n.muon
        again = unit * TEMPORARY
    backward = gradients + kept + max(head, 4 * n.head + again)
    # gradients; Muon's and the head's temporaries, and with several ranks what is sent and received
    if ranks == 1:
        step = 4 * (n.all + 1.69 * n.muon + 1.13 * n.head)
    elif accumulate or ranks > 8:
        step = 4 * (n.all + 0.51 * n.muon + 2.47 * n.head)
    else:  # gradients are sent and let go while backward goes on; with more ranks the buckets are too large for that
        step = 4 * (n.all + n.muon / ranks + n.head)
    return state + max(backward, step)


def usable_memory(memory: float, ranks: int = 1) -> float:
    """Return what training can allocate of a GPU's `memory` bytes."""
    return (memory - CONTEXT - (COMMUNICATION if ranks > 1 else 0)) * (1 - FRAGMENTATION)


def memory_of_device(ranks: Ranks) -> float | None:
    """Return the bytes of memory for this run on one device, the least of all ranks. None: unknown. Collective.

    cuda: what other processes leave. mps: what the system recommends at most. cpu: what is available, shared among the
    ranks.
    """
    device, memory = ranks.device, None
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) + CONTEXT
        memory = min(memory, torch.cuda.get_device_properties(device).total_memory)
    elif device.type == "mps":
        recommended = getattr(torch.mps, "recommended_max_memory", None)
        memory = recommended() if recommended else None
    else:
        try:
            found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
            memory = 1024 * int(found[1]) if found else None
        except OSError:  # macOS
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
        memory = memory and memory / ranks.world_size
    known = [number for number in gather_objects(memory, ranks) if number]
    return min(known, default=None)


@dataclass(frozen=True)
class MicroBatch:
    """rows: of a micro-batch. recompute: whether blocks are computed again in backward. need: bytes, computed."""

    rows: int
    recompute: bool
    need: float


def rows_that_divide(total_rows: int | None, ranks: int, most: int) -> list[int]:
    """Return the rows that a micro-batch may have, from many to few.

    Args:
        total_rows: of an optimizer step; a micro-batch divides them, if possible so that all ranks have equally many.
            None: any number.
        ranks: that share them; each must have at least one micro-batch.
        most: rows at most.
    """
    if total_rows is None:
        return [rows for rows in range(most, 0, -1) if rows == most or rows & (rows - 1) == 0]
    share = total_rows // ranks
    fair = [rows for rows in range(min(most, share), 0, -1) if total_rows % (rows * ranks) == 0]
    return fair or [rows for rows in range(min(most, share), 0, -1) if total_rows % rows == 0]


def choose_batch(config: GPTConfig, T: int, candidates: list[int], ranks: int, *, dtype: torch.dtype,
                 memory: float | None, total_rows: int | None = None, recompute: str = "auto",
                 triton: bool = True) -> MicroBatch:
    """Return the largest micro-batch that fits the memory.

    Blocks are computed again only where fewer than FEW_TOKENS fit otherwise: that takes a third more time. What a
    larger micro-batch saves is reading and writing weights and gradients, some 16 bytes a weight, beside 6 FLOPs a
    weight and token; at 400 TFLOP/s and 2.7 TB/s that is a third of the whole at 1,200 tokens, on smaller cards at
    fewer.

    Args:
        config, T, dtype, triton: as in `memory_of_step`.
        candidates: rows that a micro-batch may have, from many to few.
        ranks: devices.
        memory: bytes of a device; None takes the most rows.
        total_rows: of an optimizer step on all ranks; None is more than one micro-batch.
        recompute: "none", "blocks", or "auto" to choose.

    Returns:
        The fewest rows, with the blocks computed again if that is allowed, where nothing fits.
    """
    limit = float("inf") if memory is None else usable_memory(memory, ranks)
    enough = min(FEW_TOKENS, candidates[0] * T)
    for again in {"none": [False], "blocks": [True], "auto": [False, True]}[recompute]:
        for rows in candidates:
            accumulate = total_rows is None or total_rows > rows * ranks
            need = memory_of_step(config, rows, T, ranks=ranks, recompute=again, accumulate=accumulate, dtype=dtype,
                                  triton=triton)
            batch = MicroBatch(rows, again, need)
            if need <= limit and (rows * T >= enough or again or recompute == "none"):
                return batch
    return batch


@contextmanager
def explained_out_of_memory(rows: int, recompute: bool) -> Iterator[None]:
    """Within the block, turn torch's out-of-memory error into a UserError that names the flags to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        ways = [f"--device-batch-size={rows // 2} instead of {rows}"] if rows > 1 else []
        ways += [] if recompute else ["--recompute=blocks"]
        ways += [] if ways else ["a smaller --max-seq-len or --depth, or more GPUs"]
        raise UserError(f"the GPU's memory does not suffice: use {', or '.join(ways)}. The run resumes from its last "
                        f"checkpoint. ({str(error).split('.')[0]})") from error


def fit_batch(config: Any, model: GPT, T: int, total_rows: int | None, most: int, ranks: Ranks, *,
              meta: dict[str, Any], compiled: bool = False, ready: Callable[[int], object] = lambda rows: None) -> Any:
    """Return a stage's flags with device_batch_size and recompute decided, and prepare the model for them. Collective.

    A run that resumes keeps what its checkpoint says. Else what is "auto" follows the device's memory: it is computed,
    and on a GPU a micro-batch is tried. Where the memory does not suffice, fewer rows are tried.

    Args:
        config: the flags. They are not changed.
        model: on its device, in the precision of the run.
        T: tokens of a row at most.
        total_rows: of an optimizer step of all ranks; None where there is no such number.
        most: rows of a micro-batch at most, if this function chooses them.
        meta: of the checkpoint to resume from; empty for a new run.
        compiled: compile the blocks for the micro-batch.
        ready: called with the rows, before anything is compiled and tried.

    Raises:
        UserError: not even one row fits.
    """
    rows, recompute = config.device_batch_size, config.recompute
    candidates = rows_that_divide(total_rows, ranks.world_size, most) if rows == "auto" else [rows]
    kept = meta.get("device_batch_size") if meta.get("world_size") == ranks.world_size else None
    if rows == "auto" and kept in candidates:
        rows, recompute = kept, meta.get("recompute", "none") if recompute == "auto" else recompute
    if recompute == "auto" or rows == "auto":
        memory, tried = memory_of_device(ranks), candidates if rows == "auto" else [rows]
        batch = choose_batch(model.config, T, tried, ranks.world_size, dtype=model.dtype, memory=memory,
                             total_rows=total_rows, recompute=recompute, triton=has_triton(ranks.device))
        if ranks.is_main and memory is not None and (config.device_batch_size == "auto" or batch.recompute):
            print(f"{batch.rows} row{'s' * (batch.rows > 1)} of {T} tokens at a time on each device, activation "
                  f"checkpointing {'on' if batch.recompute else 'off'}: {batch.need / 1e9:.1f} of "
                  f"{memory / 1e9:.1f} GB by our count")
    else:
        batch = MicroBatch(rows, recompute == "blocks", 0.0)

    ready(batch.rows)

    def trial(batch: MicroBatch) -> None:
        model.recompute = batch.recompute
        if compiled:
            model.compile_blocks(batch.rows, T)
        n = _sizes(tuple(model.config.to_dict().items()))
        # the optimizer's, which is not there yet
        state = torch.empty(math.ceil(n.state / ranks.world_size), device=ranks.device)
        ids = torch.zeros(batch.rows, T, dtype=torch.long, device=ranks.device)
        try:
            for _ in range(2):  # the second one finds the gradients of the first
                model(ids, ids, "sum").backward()
            torch.cuda.synchronize(ranks.device)
        finally:
            del state
            for p in model.parameters():
                p.grad = None

    if ranks.device.type == "cuda" and "auto" in (config.device_batch_size, config.recompute):
        batch = settle_batch(batch, candidates, trial, ranks)
    model.recompute = batch.recompute
    if compiled:
        model.compile_blocks(batch.rows, T)
    return replace(config, device_batch_size=batch.rows, recompute="blocks" if batch.recompute else "none")


def settle_batch(batch: MicroBatch, candidates: list[int], trial: Callable[[MicroBatch], None],
                 ranks: Ranks) -> MicroBatch:
    """Return the first of `batch` and smaller ones whose trial has enough memory on every rank. Collective.

    A trial changes no weight, so nothing is lost by one that fails.

    Args:
        batch: what is tried first.
        candidates: rows that a micro-batch may have.
        trial: does forward and backward of one micro-batch; raises torch.OutOfMemoryError.

    Raises:
        UserError: not even one row fits, with its blocks computed again.
    """
    while True:
        error = None
        try:
            trial(batch)
        except torch.OutOfMemoryError as found:
            error = str(found)
        if ranks.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        if not any(gather_objects(error is not None, ranks)):
            return batch
        smaller = [rows for rows in candidates if rows <= batch.rows / 2] or [r for r in candidates if r < batch.rows]
        if not smaller and batch.recompute:
            raise UserError(f"the GPU's memory does not suffice for {batch.rows} row{'s' * (batch.rows > 1)} with "
                            "activation checkpointing: use a smaller --max-seq-len or --depth, or more GPUs"
                            + (f". ({error.split('.')[0]})" if error else ""))
        if ranks.is_main:
            print(f"note: {batch.rows} rows do not fit the GPU's memory, trying "
                  + (f"{smaller[0]}" if smaller else "activation checkpointing"))
        batch = replace(batch, rows=smaller[0]) if smaller else replace(batch, rows=candidates[0], recompute=True)
