"""The rows and the activation checkpointing that fit a device, and what happens where memory does not suffice."""

from dataclasses import dataclass

import pytest
import torch

from nanochat import memory
from nanochat.distributed import Ranks
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.memory import (
    MicroBatch,
    choose_batch,
    explained_out_of_memory,
    fit_batch,
    memory_of_device,
    memory_of_step,
    rows_that_divide,
    settle_batch,
    usable_memory,
)
from tests.helpers import small_model

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
D20 = GPTConfig.from_depth(20, vocab_size=65536, sequence_len=2048)


@dataclass
class Flags:
    device_batch_size: int | str = "auto"
    recompute: str = "auto"


def test_a_step_needs_at_least_its_weights_and_state_and_more_with_more_rows():
    parameters = 560_972_800  # of d20
    one = memory_of_step(D20, 1, 2048)
    assert 16 * parameters < one < 20 * parameters
    needs = [memory_of_step(D20, rows, 2048) for rows in (1, 2, 4, 8, 16, 32)]
    assert needs == sorted(needs) and needs[-1] > 40e9
    assert memory_of_step(D20, 8, 2048, ranks=8) < memory_of_step(D20, 8, 2048) - 2e9  # the state is shared
    assert memory_of_step(D20, 8, 2048, dtype=torch.float32) > memory_of_step(D20, 8, 2048) + 8e9
    assert memory_of_step(D20, 8, 2048, accumulate=False) < memory_of_step(D20, 8, 2048) - 2e9
    assert memory_of_step(D20, 32, 2048, recompute=True) < 20e9
    assert memory_of_step(D20, 8, 1024) < memory_of_step(D20, 8, 2048)


@pytest.mark.parametrize("total, ranks, most, rows", [
    (256, 1, 32, [32, 16, 8, 4, 2, 1]), (256, 8, 32, [32, 16, 8, 4, 2, 1]), (256, 16, 32, [16, 8, 4, 2, 1]),
    (24, 2, 32, [12, 6, 4, 3, 2, 1]), (5, 2, 4, [1]), (6, 4, 32, [1]), (None, 3, 8, [8, 4, 2, 1]),
    (None, 1, 6, [6, 4, 2, 1])])
def test_rows_divide_the_batch_among_the_ranks(total, ranks, most, rows):
    assert rows_that_divide(total, ranks, most) == rows


def test_the_largest_micro_batch_that_fits_is_taken():
    rows = rows_that_divide(256, 1, 32)
    how = {"ranks": 1, "dtype": torch.bfloat16}
    for size in (13e9, 16e9, 25.4e9, 42e9, 85e9, 150e9):
        batch = choose_batch(D20, 2048, rows, memory=size, **how)
        assert batch.need <= usable_memory(size) and not batch.recompute
        if batch.rows < 32:
            assert memory_of_step(D20, 2 * batch.rows, 2048) > usable_memory(size)
    assert choose_batch(D20, 2048, rows, memory=None, **how).rows == 32
    blocks = choose_batch(D20, 2048, rows, memory=25.4e9, recompute="blocks", **how)
    assert blocks.recompute and blocks.rows == 32


def test_blocks_are_computed_twice_only_where_hardly_a_row_fits():
    """Where one row of 16,384 tokens does not fit, activation checkpointing is what makes it fit."""
    how = {"ranks": 1, "dtype": torch.bfloat16, "memory": 19e9}
    long = GPTConfig.from_depth(20, vocab_size=65536, sequence_len=16384)
    need = memory_of_step(long, 4, 16384, recompute=True)
    assert choose_batch(long, 16384, [4, 2, 1], **how) == MicroBatch(4, True, need) and need < 17e9
    assert not choose_batch(long, 16384, [4, 2, 1], recompute="none", **how).recompute  # as told, if it fits or not
    assert choose_batch(long, 16384, [4, 2, 1], recompute="none", **how).rows == 1
    short = choose_batch(D20, 128, [16, 8, 4, 2, 1], ranks=1, dtype=torch.bfloat16, memory=10.2e9)
    assert short.rows * 128 >= 1024 or short.recompute


def test_what_a_device_offers(monkeypatch):
    assert 1e8 < memory_of_device(ALONE) < 1e14
    two = Ranks(0, 0, 2, torch.device("cpu"))
    monkeypatch.setattr(memory, "gather_objects", lambda value, ranks: [value, 7e7])  # the other rank has less
    assert memory_of_device(two) == 7e7
    monkeypatch.setattr(memory, "gather_objects", lambda value, ranks: [None])
    assert memory_of_device(ALONE) is None


def test_an_error_names_the_flag_to_change():
    for rows, recompute, ways in ((8, False, "--device-batch-size=4 instead of 8, or --recompute=blocks"),
                                  (8, True, "--device-batch-size=4 instead of 8"), (1, False, "use --recompute=blocks"),
                                  (1, True, "smaller --max-seq-len or --depth")):
        with pytest.raises(UserError, match=ways), explained_out_of_memory(rows, recompute):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
    with pytest.raises(KeyError), explained_out_of_memory(8, False):
        raise KeyError("another error is left as it is")


def _trial(fits, seen):
    def trial(batch):
        seen.append((batch.rows, batch.recompute))
        if not fits(batch):
            raise torch.OutOfMemoryError("CUDA out of memory.")
    return trial


def test_fewer_rows_are_tried_and_then_activation_checkpointing(capsys):
    seen = []
    fits = _trial(lambda batch: batch.rows <= 2, seen)
    assert settle_batch(MicroBatch(12, False, 0), [12, 6, 4, 3, 2, 1], fits, ALONE) == MicroBatch(1, False, 0)
    assert seen == [(12, False), (6, False), (3, False), (1, False)]  # a half at a time
    seen.clear()
    only_so = _trial(lambda batch: batch.recompute, seen)
    assert settle_batch(MicroBatch(2, False, 0), [4, 2, 1], only_so, ALONE) == MicroBatch(4, True, 0)
    assert seen == [(2, False), (1, False), (4, True)]
    assert "activation checkpointing" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not suffice for 1 row with activation checkpointing"):
        settle_batch(MicroBatch(2, True, 0), [4, 2, 1], _trial(lambda batch: False, seen), ALONE)


def test_all_ranks_take_what_fits_the_smallest(monkeypatch):
    others = iter([True, False])  # another rank runs out of memory at the first trial
    monkeypatch.setattr(memory, "gather_objects", lambda failed, ranks: [failed, next(others)])
    seen = []
    two = Ranks(0, 0, 2, torch.device("cpu"))
    assert settle_batch(MicroBatch(8, False, 0), [8, 4, 2, 1], _trial(lambda batch: True, seen), two).rows == 4
    assert [rows for rows, _ in seen] == [8, 4]


def test_flags_become_numbers_and_a_resumed_run_keeps_them(monkeypatch, capsys):
    model = small_model()
    monkeypatch.setattr(memory, "memory_of_device", lambda ranks: None)
    assert fit_batch(Flags(), model, 32, 24, 32, ALONE, meta={}) == Flags(24, "none")
    meta = {"device_batch_size": 3, "recompute": "blocks", "world_size": 1}
    assert fit_batch(Flags(), model, 32, 24, 32, ALONE, meta=meta) == Flags(3, "blocks") and model.recompute
    assert fit_batch(Flags(), model, 32, 24, 32, ALONE, meta={**meta, "world_size": 2}) == Flags(24, "none")
    assert fit_batch(Flags(), model, 32, 8, 32, ALONE, meta=meta) == Flags(8, "none")  # 3 does not divide 8
    assert not model.recompute
    assert fit_batch(Flags(2, "blocks"), model, 32, 24, 32, ALONE, meta={}) == Flags(2, "blocks") and model.recompute
    monkeypatch.setattr(memory, "memory_of_device", lambda ranks: 0.72e9)
    assert fit_batch(Flags(), model, 32, 24, 32, ALONE, meta={}).recompute == "none"
    assert "24 rows of 32 tokens" in capsys.readouterr().out
