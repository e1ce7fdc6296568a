"""What is chosen on each kind of GPU, and that a d20 step fits where it should: precision, rows, checkpointing, paths.

The real steps run on the null GPU, whose memory is that of the card. What the memory function promises for the others
is compared with such steps.
"""

import gc
from dataclasses import dataclass

import pytest
import torch

from nanochat import memory
from nanochat.distributed import Ranks, compute_dtype, precision_note
from nanochat.gpt import GPT, MIXERS, GPTConfig
from nanochat.kernels import attention
from nanochat.kernels.dispatch import has_triton
from nanochat.kernels.slc2 import uses_triton
from nanochat.memory import choose_batch, fit_batch, memory_of_step, rows_that_divide
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.recipe import MOST_ROWS, published
from nanochat.run import compile_wanted
from nanochat.training import train_step
from tests.nullgpu import FACES, Face
from tests.nullgpu.record import ALLOCATOR

V, T = published.tokenizer.vocab_size, published.base.shape.max_seq_len
TOTAL_ROWS = published.base.total_batch_size // T
RTX_3060 = Face("NVIDIA GeForce RTX 3060", "8.6", 11.63, 28, 3)


def shape(depth: int, T: int = T) -> GPTConfig:
    return GPTConfig.from_depth(depth, vocab_size=V, sequence_len=T)


# Face: precision in training and in inference; rows of 2048 tokens and whether blocks are computed twice, at d20, d26
# and d32 on one card, None where it cannot be trained on one; and at d20 on each of eight.
CARDS = {
    "T4": ("float32", "float16", (2, False), None, None, (2, False)),
    "A100-40": ("bfloat16", "bfloat16", (16, False), (8, False), (4, False), (16, False)),
    "A100-80": ("bfloat16", "bfloat16", (32, False), (32, False), (16, False), (32, False)),
    "RTX 3090": ("bfloat16", "bfloat16", (8, False), (2, False), None, (8, False)),
    "RTX 4090": ("bfloat16", "bfloat16", (8, False), (2, False), None, (8, False)),
    "L4": ("bfloat16", "bfloat16", (8, False), (2, False), None, (8, False)),
    "H100": ("bfloat16", "bfloat16", (32, False), (32, False), (16, False), (32, False)),
    "H200": ("bfloat16", "bfloat16", (32, False), (32, False), (32, False), (32, False)),
    "B200": ("bfloat16", "bfloat16", (32, False), (32, False), (32, False), (32, False)),
    "RTX 5090": ("bfloat16", "bfloat16", (16, False), (8, False), None, (16, False)),
    "RTX PRO 6000": ("bfloat16", "bfloat16", (32, False), (32, False), (16, False), (32, False)),
}


@pytest.mark.parametrize("face", FACES)
def test_precision_and_batch_of_each_card(monkeypatch, face):
    card = FACES[face]
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(map(int, card.capability.split("."))))
    dtype = compute_dtype("cuda")
    found = [str(dtype).removeprefix("torch."), str(compute_dtype("cuda", training=False)).removeprefix("torch.")]
    for depth, gpus in ((20, 1), (26, 1), (32, 1), (20, 8)):
        batch = choose_batch(shape(depth), T, rows_that_divide(TOTAL_ROWS, gpus, MOST_ROWS["base"]), gpus, dtype=dtype,
                             memory=card.memory * 2**30, total_rows=TOTAL_ROWS, triton=card.capability != "7.5")
        fits = batch.need <= memory.usable_memory(card.memory * 2**30, gpus)
        found.append((batch.rows, batch.recompute) if fits else None)
    assert tuple(found) == CARDS[face]


@dataclass
class Flags:
    device_batch_size: int | str = "auto"
    recompute: str = "auto"


def kept_by_a_layer(letter: str, rows: int = 4, E: int = 1280) -> float:
    """Return what a layer keeps for backward on the GPU, in tensors of (rows, T, E), its weights' casts aside."""
    held = []
    for layers in (1, 3):
        with torch.device("cuda"):
            model = GPT(GPTConfig(sequence_len=T, vocab_size=256, n_layer=layers, n_head=E // 128, n_kv_head=E // 128,
                                  n_embd=E, layer_pattern=letter * layers))
        model.compute_dtype = torch.bfloat16
        ids = torch.zeros(rows, T, dtype=torch.long, device="cuda")
        before = torch.cuda.memory_allocated()
        loss = model(ids, ids, "sum")
        held.append(torch.cuda.memory_allocated() - before)
        casts = 2 * sum(p.numel() for p in model.transformer.h[0].parameters())
        del loss, model
    return ((held[1] - held[0]) / 2 - casts) / (rows * T * E * 2)


def blocks_twice(model: GPT, optimizer: MuonAdamW, ranks: Ranks, rows: int = 32) -> dict:
    """Run a step of two micro-batches with the blocks computed twice; return its memory in GB, and what is counted."""
    ids = torch.zeros(rows, T, dtype=torch.long, device=ranks.device)
    peak, model.recompute = torch.cuda.max_memory_allocated(), True
    torch.cuda.reset_peak_memory_stats()
    train_step(model, optimizer, [(ids, ids)] * 2, ranks, clip=1.0)
    need = memory_of_step(model.config, rows, T, recompute=True, dtype=model.dtype)
    return {"peak of twice": torch.cuda.max_memory_allocated() / 1e9, "need of twice": need / 1e9, "peak": peak / 1e9}


def what_a_card_does(depth: int, T: int, wrong_count: bool) -> dict:
    """Choose the batch as base training does, and run two real steps of two micro-batches."""
    ranks = Ranks(0, 0, 1, torch.device("cuda", 0))
    device, config = ranks.device, shape(depth, T)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    model.compute_dtype = compute_dtype(device)
    q = torch.zeros(1, 64, 10, 128, device=device, dtype=model.dtype)
    found = {"dtype": str(model.dtype), "note": precision_note(device, model.dtype), "attention": attention.path(q),
             "slc2": uses_triton(q), "triton": has_triton(device), "compile": compile_wanted("auto", ranks)}
    if wrong_count:  # what is computed is far too little: the trials find it out
        honest, memory.memory_of_step = memory_of_step, lambda *_, **__: 1e9
        found["after trials"] = fit_batch(Flags(), model, T, TOTAL_ROWS, 32, ranks, meta={}).device_batch_size
        memory.memory_of_step = honest
        found["kept"] = {letter: kept_by_a_layer(letter) for letter in MIXERS}
    flags = fit_batch(Flags(), model, T, TOTAL_ROWS * 2048 // T, 32, ranks, meta={})
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    optimizer = MuonAdamW(parameter_groups(model), ranks, model.dtype)
    ids = torch.zeros(flags.device_batch_size, T, dtype=torch.long, device=device)
    for _ in range(2):
        train_step(model, optimizer, [(ids, ids)] * 2, ranks, clip=1.0)
    need = memory_of_step(config, flags.device_batch_size, T, recompute=model.recompute, dtype=model.dtype,
                          triton=has_triton(device))
    if wrong_count:
        found |= blocks_twice(model, optimizer, ranks)
    return {"peak": torch.cuda.max_memory_allocated() / 1e9, **found, "rows": flags.device_batch_size,
            "recompute": flags.recompute, "need": need / 1e9}


def test_d20_trains_on_one_card_of_24_gb_and_a_wrong_count_costs_a_trial_alone(nullgpu):
    found = nullgpu.run(what_a_card_does, face="RTX 3090", env=ALLOCATOR, depth=20, T=T, wrong_count=True)
    assert (found["dtype"], found["rows"], found["recompute"]) == ("torch.bfloat16", 8, "none")
    assert found["slc2"] and found["triton"] and found["compile"] and found["note"] == ""
    assert found["attention"] == attention.PYTORCH  # FlashAttention 3 is for Hopper
    assert found["peak"] < 24 and found["need"] == pytest.approx(found["peak"], abs=1)
    assert found["need of twice"] == pytest.approx(found["peak of twice"], abs=0.5), "32 rows, blocks computed twice"
    assert found["after trials"] in (8, 16), "32 rows do not fit"
    assert found["kept"] == pytest.approx({letter: mixer.kept_for_backward for letter, mixer in MIXERS.items()},
                                          abs=0.5), "write these into the mixers"


def test_d20_trains_in_float32_on_a_card_without_bfloat16(nullgpu):
    found = nullgpu.run(what_a_card_does, face="T4", env=ALLOCATOR, depth=20, T=T, wrong_count=False)
    assert (found["dtype"], found["rows"], found["recompute"]) == ("torch.float32", 2, "none")
    assert "no bfloat16 products: this trains in float32" in found["note"]
    assert not found["slc2"] and found["peak"] < 15 and found["peak"] - 0.5 < found["need"] < found["peak"] + 2


@pytest.mark.slow
def test_activation_checkpointing_lets_long_rows_fit_a_card_of_12_gb(nullgpu, monkeypatch):
    monkeypatch.setitem(FACES, "RTX 3060", RTX_3060)
    found = nullgpu.run(what_a_card_does, face="RTX 3060", env=ALLOCATOR, depth=20, T=8192, wrong_count=False)
    assert (found["rows"], found["recompute"]) == (4, "blocks")
    assert found["peak"] < 11.6 and found["need"] == pytest.approx(found["peak"], abs=1)
