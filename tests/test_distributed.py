"""Ranks, devices, precision and peak speed."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
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
    gather_objects,
    init_ranks,
    peak_flops,
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
    close_ranks()


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
        join = torch.distributed.init_process_group
        monkeypatch.setattr(torch.distributed, "init_process_group",
                            lambda *args, **kwargs: join(*args, **kwargs, timeout=timedelta(seconds=1)))
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


def test_two_ranks_sum_and_hear_rank_0():
    start_ranks(2, _talk)


def test_dtype_follows_the_variable_and_nonsense_is_refused(monkeypatch):
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        monkeypatch.setenv("NANOCHAT_DTYPE", name)
        assert compute_dtype("cpu") == compute_dtype(torch.device("mps")) == dtype
    monkeypatch.setenv("NANOCHAT_DTYPE", "fp8")
    with pytest.raises(UserError, match="'fp8': use float32 or bfloat16"):
        compute_dtype("cpu")


def test_dtype_is_bfloat16_where_the_gpu_has_it(monkeypatch):
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert compute_dtype("cuda") == dtype
    assert compute_dtype("mps") == torch.float32


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
