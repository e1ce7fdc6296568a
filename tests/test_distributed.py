"""Ranks, devices, precision and peak speed."""

import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp

from nanochat import distributed
from nanochat.distributed import (
    Ranks,
    all_reduce_sum,
    barrier,
    broadcast_object,
    close_ranks,
    compute_dtype,
    dtype_of_run,
    gather_objects,
    init_ranks,
    joined_ranks,
    machine_first,
    on_main,
    peak_flops,
    precision_note,
)
from nanochat.errors import UserError
from tests.helpers import free_port

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NANOCHAT_DTYPE")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def set_ranks(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_one_process_makes_no_group_and_hands_everything_back():
    ranks = init_ranks("cpu")
    assert ranks == Ranks(0, 0, 1, torch.device("cpu")) and ranks.is_main
    assert not torch.distributed.is_initialized()
    x = torch.ones(3)
    assert all_reduce_sum(x, ranks) is x
    assert broadcast_object("as it is", ranks) == "as it is"
    assert gather_objects("as it is", ranks) == ["as it is"]
    barrier(ranks)
    assert on_main("work", lambda: 3, ranks) == 3
    close_ranks()
    with pytest.raises(ZeroDivisionError), joined_ranks("cpu"):
        1 / 0  # noqa: B018


def test_torchrun_with_one_process_makes_no_group(monkeypatch):
    set_ranks(monkeypatch, RANK=0, LOCAL_RANK=0, WORLD_SIZE=1)
    assert init_ranks("cpu").world_size == 1
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("variables, told", [
    ({"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0}, "MASTER_ADDR"),
    ({"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT"),
    ({"WORLD_SIZE": 2, "LOCAL_RANK": 0}, "RANK"),
    ({"WORLD_SIZE": 2, "RANK": 0}, "LOCAL_RANK"),
    ({"WORLD_SIZE": "two", "RANK": 0, "LOCAL_RANK": 0}, "'two'"),
    ({"WORLD_SIZE": 2, "RANK": 2, "LOCAL_RANK": 0}, "count from 0"),
])
def test_variables_that_do_not_fit_together_are_named(monkeypatch, variables, told):
    set_ranks(monkeypatch, **variables)
    with pytest.raises(UserError, match=told):
        init_ranks("cpu")


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"{name} was asked for.*--device_type=cpu"):
            init_ranks(name)
    with pytest.raises(UserError, match="'tpu' is unknown"):
        init_ranks("tpu")
    assert init_ranks().device == torch.device("cpu")


def test_more_local_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    set_ranks(monkeypatch, RANK=2, LOCAL_RANK=2, WORLD_SIZE=3, MASTER_ADDR="127.0.0.1", MASTER_PORT=1)
    with pytest.raises(UserError, match="LOCAL_RANK is 2 but this machine shows 2 GPUs"):
        init_ranks()


def test_mps_serves_one_rank_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert init_ranks().device.type == "mps"
    set_ranks(monkeypatch, RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=1)
    with pytest.raises(UserError, match="mps is one device"):
        init_ranks("mps")


def test_ranks_that_never_come_are_reported(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, never listening: rank 1 finds no rank 0 there
        set_ranks(monkeypatch, RANK=1, LOCAL_RANK=1, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=taken.getsockname()[1])
        monkeypatch.setattr(distributed, "JOIN_MINUTES", 1 / 60)
        with pytest.raises(UserError, match="rank 1 of 2 could not join"):
            init_ranks("cpu")


def _run_rank(rank: int, world_size: int, port: int, work: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    work(init_ranks("cpu"), *args)
    close_ranks()
    assert not torch.distributed.is_initialized()


def start_ranks(world_size: int, work: Callable, *args) -> None:
    """Run work(ranks, *args) as `world_size` real processes over gloo; raise what one of them raises."""
    port = free_port()
    server = "forkserver" in mp.get_all_start_methods()  # imports torch once for all processes: seconds for each
    if server:
        mp.set_forkserver_preload([__name__, "nanochat.optim"])
    mp.start_processes(_run_rank, (world_size, port, work, args), world_size,
                       start_method="forkserver" if server else "spawn")


def told_by_ranks(scenario: Callable, folder: str, alone: Ranks, *world_sizes: int) -> dict[int, list[dict]]:
    """Return what each rank of 1 and of each of the world sizes told: scenario(ranks, folder) saves it as
    <world size>-<rank>.pt."""
    for world_size in world_sizes:
        start_ranks(world_size, scenario, folder)
    scenario(alone, folder)
    return {n: [torch.load(f"{folder}/{n}-{rank}.pt") for rank in range(n)] for n in (1, *world_sizes)}


def _talk(ranks: Ranks) -> None:
    rank = ranks.rank
    assert init_ranks("cpu") == ranks  # a second stage in the same process keeps the group
    assert ranks.is_main == (rank == 0)
    x = torch.tensor([1.0, rank])
    assert all_reduce_sum(x, ranks).tolist() == [2.0, 1.0]
    assert x.tolist() == [1.0, rank]
    assert broadcast_object({"from": rank}, ranks) == {"from": 0}
    assert gather_objects({"from": rank}, ranks) == [{"from": 0}, {"from": 1}]
    barrier(ranks)


def _fetch(ranks: Ranks, path) -> None:
    def work():
        found = path.exists()
        path.touch()
        return found

    assert machine_first(work, ranks) == (ranks.rank == 1)

    def fails():
        raise UserError(f"rank {ranks.rank} cannot reach the hub")

    with pytest.raises(UserError, match="rank 0 cannot reach"):
        machine_first(fails, ranks)


def test_the_first_rank_of_a_machine_fetches_what_the_others_find(tmp_path):
    start_ranks(2, _fetch, tmp_path / "fetched")
    assert machine_first(lambda: 5, Ranks(0, 0, 1, torch.device("cpu"))) == 5


def test_two_ranks_sum_and_hear_rank_0():
    start_ranks(2, _talk)


def _wait_for_main(ranks: Ranks) -> None:
    threads = []

    def work() -> dict:
        threads.append(ranks.rank)
        time.sleep(1)
        return {"from": ranks.rank}

    assert on_main("some work", work, ranks) == {"from": 0} and threads == [0] * ranks.is_main
    with pytest.raises(UserError, match="^a mistake$"):
        on_main("a mistake", _mistake, ranks)
    began = time.monotonic()
    barrier(ranks, "the end")  # the next one has its own key, also where one of the ranks is late
    if ranks.rank == 1:
        with pytest.raises(TimeoutError, match="rank 1 has waited 0.005 minutes for this to end: nothing"):
            on_main("nothing", list, ranks, minutes=0.005)
        assert time.monotonic() - began < 60
    else:
        time.sleep(2)
        assert on_main("nothing", list, ranks) == []
    barrier(ranks, "the end")


def _mistake() -> None:
    raise UserError("a mistake")


def test_ranks_wait_for_rank_0_with_a_name_and_a_time_limit():
    start_ranks(3, _wait_for_main)


class _Ended(Exception):
    pass


def _end_by(ranks: Ranks, error: BaseException, capture) -> None:
    def end(code: int) -> None:
        raise _Ended(code)

    distributed.os._exit, real = end, distributed.os._exit
    distributed.dist.destroy_process_group, destroy = None, distributed.dist.destroy_process_group  # may wait
    try:
        with pytest.raises(_Ended) as ended, joined_ranks("cpu"):
            raise error
    finally:
        distributed.os._exit, distributed.dist.destroy_process_group = real, destroy
    capture.append(ended.value.args[0])


def _fail_alone(ranks: Ranks, folder) -> None:
    codes: list[int] = []
    if ranks.rank == 1:
        with open(folder / "err.txt", "w") as file, redirect_stderr(file):
            for error in (UserError("no text"), RuntimeError("far from here"), SystemExit(143), KeyboardInterrupt()):
                _end_by(ranks, error, codes)
        (folder / "codes.txt").write_text(str(codes))


def test_a_rank_that_fails_says_so_and_ends_without_waiting_for_the_others(tmp_path):
    start_ranks(2, _fail_alone, tmp_path)
    lines = (tmp_path / "err.txt").read_text().splitlines()
    assert lines[:2] == ["rank 1 of 2: error: no text", "rank 1 of 2: Traceback (most recent call last):"]
    assert lines[-1] == "RuntimeError: far from here"
    assert (tmp_path / "codes.txt").read_text() == "[1, 1, 143, 130]"


def test_dtype_follows_the_variable_and_nonsense_is_refused(monkeypatch):
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        monkeypatch.setenv("NANOCHAT_DTYPE", name)
        assert compute_dtype("cpu") == compute_dtype(torch.device("mps")) == dtype
    monkeypatch.setenv("NANOCHAT_DTYPE", "fp8")
    with pytest.raises(UserError, match="'fp8': use float32 or bfloat16"):
        compute_dtype("cpu")


def test_float16_is_for_inference_on_gpus_alone(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    assert compute_dtype("cuda", training=False) == torch.float16
    for device, training in (("cuda", True), ("cpu", False), ("mps", False)):
        with pytest.raises(UserError, match="inference on GPUs alone: use float32 or bfloat16"):
            compute_dtype(device, training)


@pytest.mark.parametrize("capability, training, inference, said", [
    ((6, 1), torch.float32, torch.float32, "trains in float32"), ((7, 0), torch.float32, torch.float16, "in float32"),
    ((7, 5), torch.float32, torch.float16, r"\(compute capability 7.5\) has no bfloat16 products: .* float32"),
    ((8, 0), torch.bfloat16, torch.bfloat16, ""), ((8, 9), torch.bfloat16, torch.bfloat16, ""),
    ((12, 0), torch.bfloat16, torch.bfloat16, ""),
])
def test_dtype_is_what_the_gpu_multiplies(monkeypatch, capability, training, inference, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert (compute_dtype("cuda"), compute_dtype("cuda", training=False)) == (training, inference)
    note = precision_note("cuda", training)
    assert re.search(said, note) if said else note == ""
    assert precision_note("cpu", torch.float32) == precision_note("mps", torch.float32) == ""
    if capability < (8, 0):
        assert "emulated" in precision_note("cuda", torch.bfloat16)


def test_mps_keeps_float32(monkeypatch):
    assert compute_dtype("mps") == compute_dtype("mps", training=False) == torch.float32


@pytest.mark.parametrize("native, faster, training, inference", [
    (False, None, torch.float32, torch.float32), (True, False, torch.float32, torch.bfloat16),
    (True, True, torch.bfloat16, torch.bfloat16),
])
def test_a_cpu_trains_in_bfloat16_only_where_it_is_found_faster(monkeypatch, native, faster, training, inference):
    monkeypatch.setattr(distributed, "_cpu_has_bfloat16", lambda: native)
    monkeypatch.setattr(distributed, "_cpu_trains_faster_in_bfloat16", lambda threads: faster)
    assert (compute_dtype("cpu"), compute_dtype("cpu", training=False)) == (training, inference)


@pytest.mark.parametrize("slower, faster", [({torch.float32}, True), ({torch.bfloat16}, False), (set(), False)])
def test_the_measurement_of_a_cpu_compares_its_products(monkeypatch, slower, faster):
    clock, product = [0.0], torch.Tensor.__matmul__

    def timed(a, b):
        clock[0] += 2 if a.dtype in slower else 1
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", timed)
    monkeypatch.setattr(distributed.time, "perf_counter", lambda: clock[0])
    assert distributed._cpu_trains_faster_in_bfloat16.__wrapped__(1) == faster


def test_a_resumed_run_keeps_its_precision(monkeypatch):
    monkeypatch.setattr(distributed, "_cpu_has_bfloat16", lambda: True)
    cpu = Ranks(0, 0, 1, torch.device("cpu"))
    for measured in (False, True):
        monkeypatch.setattr(distributed, "_cpu_trains_faster_in_bfloat16", lambda threads, measured=measured: measured)
        assert dtype_of_run(cpu, "float32") == torch.float32 and dtype_of_run(cpu, "bfloat16") == torch.bfloat16
        assert dtype_of_run(cpu, None) == (torch.bfloat16 if measured else torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))  # moved to a card that has none
    assert dtype_of_run(Ranks(0, 0, 1, torch.device("cuda")), "bfloat16") == torch.float32
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    assert dtype_of_run(cpu, "bfloat16") == torch.float32


@pytest.mark.parametrize("cpuinfo, native", [
    ("flags\t\t: fpu avx512f avx512_bf16\n", True), ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
    ("Features\t: fp asimd bf16\n", True), ("flags\t\t: fpu avx512f avx512_vnni\n", False), ("", False),
])
def test_cpu_flags_say_whether_bfloat16_is_native(monkeypatch, cpuinfo, native):
    monkeypatch.setattr(torch, "cpu", SimpleNamespace())  # a torch without the private functions
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(distributed.sys, "platform", "linux")
    monkeypatch.setattr(distributed.Path, "read_text", lambda path: cpuinfo)
    assert distributed._cpu_has_bfloat16.__wrapped__() == native


@pytest.mark.parametrize("name, bf16, fp32", [
    ("NVIDIA H100 80GB HBM3", 989.4, 67), ("NVIDIA H100 PCIe", 756, 51), ("NVIDIA H100 NVL", 835.5, 60),
    ("NVIDIA H200", 989.4, 67), ("NVIDIA B200", 2250, 75), ("NVIDIA A100-SXM4-80GB", 312, 19.5),
    ("NVIDIA A100 80GB PCIe", 312, 19.5), ("NVIDIA A10G", 70, 35),
    ("NVIDIA L4", 121, 30.3), ("NVIDIA L40S", 362, 91.6), ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ("NVIDIA GeForce RTX 3090", 71.2, 35.6), ("NVIDIA GeForce RTX 5090", 209.6, 104.8), ("Tesla T4", None, 8.1),
    ("Tesla V100-SXM2-32GB", None, 15.7), ("AMD Instinct MI300X", 1307.4, 163.4),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None), ("NVIDIA GeForce RTX 5090 D", None, None),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8, 126),
    ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 438.9, 110),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None), ("NVIDIA Thing 9000", None, None),
])
def test_peak_of_a_gpu_is_its_dense_data_sheet_figure(name, bf16, fp32):
    for dtype, expected in ((torch.bfloat16, bf16), (torch.float16, bf16), (torch.float32, fp32),
                            (torch.float64, None)):
        peak = distributed.gpu_peak(name, dtype, tf32=False)
        assert peak == (None if expected is None else pytest.approx(expected * 1e12)), dtype


def test_tf32_runs_at_half_of_bfloat16():
    assert distributed.gpu_peak("NVIDIA H100 80GB HBM3", torch.float32, tf32=True) == pytest.approx(494.7e12)
    assert distributed.gpu_peak("Tesla T4", torch.float32, tf32=True) == pytest.approx(8.1e12)


def test_peak_of_a_cpu_is_measured_once_and_of_other_devices_unknown():
    first = peak_flops("cpu", torch.float32)
    assert first > 1e8 and peak_flops("cpu", torch.float32) == first
    assert peak_flops("mps", torch.float32) is None


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_own_settings_of_the_allocator_stay(monkeypatch, own):
    told = []
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv(own, "max_split_size_mb:512")
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append, raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    monkeypatch.setattr(distributed.sys, "platform", "linux")
    distributed.use_gpu(torch.device("cuda", 1))
    assert told == ([] if own else ["expandable_segments:True"]) + [torch.device("cuda", 1)]
