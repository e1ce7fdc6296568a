"""The ranks of a run: which one this process is, its device, the precision of its matrix products, its peak FLOP/s.

    python -m scripts.launch --ranks=8 scripts.base_train               # sets RANK, LOCAL_RANK, WORLD_SIZE; all we read
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train      # so does this
    NANOCHAT_DTYPE=float32 python -m scripts.base_train                 # float32 instead of the device's best precision

A single process makes no process group; the collectives here then return their argument.

Where rank 0 works alone for longer than moments, the others wait in `barrier` or `on_main`, which name what they wait
for and have a generous time limit of their own. In a collective of NCCL they would spin on their GPUs and give up after
COLLECTIVE_MINUTES.
"""

import ctypes
import functools
import os
import pickle
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.errors import Unreachable, UserError
from nanochat.files import release_locks
from nanochat.launcher import MASTER, has_owner, obey_owner, tell_owner, told
from nanochat.logs import print_line
from nanochat.watch import HUNG, Watch, busy, count_meeting

JOIN_MINUTES = 10        # for all ranks to start
COLLECTIVE_MINUTES = 20  # between the first and the last rank to come to a collective; the first step compiles
MAIN_MINUTES = 120       # for rank 0 to finish what the others wait for, unless the call says otherwise
LEAVE_SECONDS = 60.0     # for the last rank to come to the end of the run
WAIT_SAID_AFTER = 60.0   # seconds, and again after each so many

R = TypeVar("R")


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world_size`, `local_rank` on its machine, and its own device.

    collectives: call collectives although there is one rank, to try them out on a machine with one GPU.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    collectives: bool = False

    @property
    def is_main(self) -> bool:
        """True for the one rank that prints and writes files."""
        return self.rank == 0

    @property
    def communicates(self) -> bool:
        """Whether collectives are called, rather than the short cut of a single process taken."""
        return self.world_size > 1 or self.collectives


def _ranks_of_environment() -> tuple[int, int, int]:
    """Return (rank, local rank, world size) as torchrun sets them; (0, 0, 1) where WORLD_SIZE is not set."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 0, 1
    numbers = []
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        text = os.environ.get(name)
        if text is None or not text.isdecimal():
            raise UserError(f"WORLD_SIZE is set but {name} is {text!r}, not a number. "
                            "Start several processes with torchrun, or unset WORLD_SIZE.")
        numbers.append(int(text))
    rank, local_rank, world_size = numbers
    if rank >= world_size:
        raise UserError(f"RANK is {rank} but WORLD_SIZE is {world_size}: ranks count from 0 to WORLD_SIZE - 1.")
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise UserError(f"WORLD_SIZE is {world_size} but {name} is not set, so the ranks cannot find each "
                                "other. Start them with torchrun, or unset WORLD_SIZE to run one process.")
    return rank, local_rank, world_size


def device_of(device_type: str, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """Return the device of a rank; device_type is cuda, mps, cpu, or "" for the best there is. Raises UserError where
    there is none."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and world_size == 1, "cpu": True}
    if device_type == "":
        device_type = next(name for name in ("cuda", "mps", "cpu") if has[name])
    if device_type not in has:
        raise UserError(f"device type {device_type!r} is unknown: use cuda, mps or cpu, or leave it out for the best "
                        "one.")
    if device_type == "mps" and world_size > 1:
        raise UserError(f"mps is one device and cannot serve {world_size} ranks: start one process, or use "
                        "--device_type=cpu.")
    if not has[device_type]:
        raise UserError(f"device type {device_type} was asked for, but torch {torch.__version__} finds none on this "
                        f"machine. Use --device_type={next(name for name in has if has[name])}, or leave it out.")
    if device_type != "cuda":
        return torch.device(device_type)
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"LOCAL_RANK is {local_rank} but this machine shows {torch.cuda.device_count()} GPUs: "
                        f"use --nproc_per_node={torch.cuda.device_count()}, and check CUDA_VISIBLE_DEVICES.")
    return torch.device("cuda", local_rank)


def init_ranks(device_type: str = "") -> Ranks:
    """Find this process's rank and device, and join the process group of several ranks (nccl on cuda, gloo on cpu).

    Reads RANK, LOCAL_RANK and WORLD_SIZE from the environment (and, through torch, MASTER_ADDR and MASTER_PORT). A
    second call in the same process keeps the group.

    Args:
        device_type: "cuda", "mps" or "cpu"; "" takes the first of these that the machine has.

    Raises:
        UserError: the machine has no such device, the variables contradict one another, or the ranks do not connect.
    """
    rank, local_rank, world_size = _ranks_of_environment()
    device = device_of(device_type, local_rank, world_size)
    if device.type == "cuda":
        use_gpu(device)
    elif device.type == "cpu":
        _tune_cpu()
    if world_size > 1 and not dist.is_initialized():
        on_gpu = device.type == "cuda"
        try:
            dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=world_size,
                                    store=_meeting_point(rank, world_size),
                                    timeout=timedelta(minutes=COLLECTIVE_MINUTES),
                                    device_id=device if on_gpu else None)
        except dist.DistError as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise Unreachable(f"rank {rank} of {world_size} could not join the others at {address} ({error}). "
                              "Check that all ranks run and can reach that address.") from error
        _watch_ranks(rank, local_rank, world_size, device)
    return Ranks(rank, local_rank, world_size, device)


_watch: list[Watch] = []  # of this process, where it is one of several ranks


def _watch_ranks(rank: int, local_rank: int, world_size: int, device: torch.device) -> None:
    """Start to watch the ranks; see nanochat/watch.py."""
    group, store = dist.distributed_c10d._get_default_group(), dist.distributed_c10d._get_default_store()
    first, count = rank - local_rank, int(os.environ.get("LOCAL_WORLD_SIZE") or 0)
    _watch[:] = [Watch(rank, world_size, range(first, first + count) if has_owner() else range(0),
                       getattr(store, "clone", lambda: store)(),  # a connection of its own
                       group._get_sequence_number_for_group, told, _give_up, cpu=device.type == "cpu")]
    _watch[0].start()


def _stop_watch() -> None:
    if _watch:
        _watch.pop().stop()


def _give_up(hung: dict[int, str]) -> None:
    """End this process, as other ranks hang."""
    why = "; ".join(f"rank {rank} hangs: {how}" for rank, how in hung.items()) or (
        "no rank gets on: the network between them is gone, or a GPU hangs")
    if not tell_owner(hung={str(rank): how for rank, how in hung.items()}, error=f"error: {why}"):
        print_line(f"error: {why}", sys.stderr)
    release_locks()
    os._exit(HUNG)


def use_gpu(device: torch.device) -> None:
    """Make `device` the current GPU, and let the segments of PyTorch's allocator grow; to be called before any tensor.

    Segments of a fixed size leave gaps that no later tensor fits, where batches differ in size. The allocator reads
    PYTORCH_ALLOC_CONF at a moment that depends on the version (2.9 did not read it at all for this), so it is told by a
    call. A user's own setting stays as it is.
    """
    own = any(os.environ.get(f"PYTORCH_{part}ALLOC_CONF") for part in ("", "CUDA_", "HIP_"))
    if sys.platform == "linux" and torch.version.hip is None and not own:
        apply = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # public under no name yet
        if apply is None:  # before torch 2.10
            apply = torch.cuda.memory._set_allocator_settings
        apply("expandable_segments:True")
    torch.cuda.set_device(device)


def _meeting_point(rank: int, world_size: int) -> dist.Store:
    """Return the store that the ranks share, at MASTER_ADDR and MASTER_PORT."""
    limit = timedelta(minutes=JOIN_MINUTES)
    listening = os.environ.pop(MASTER, "")  # of nanochat.launcher: rank 0 inherits the socket
    if listening:
        return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, True, limit,
                             wait_for_workers=False, master_listen_fd=int(listening))
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=limit))
    return store


def _tune_cpu() -> None:
    """Keep freed memory in the process, and round denormal numbers to zero.

    A training step allocates and frees the same large blocks again and again; glibc would return each to the system and
    get it back page by page, zeroed. Both settings together save a tenth of a step on a CPU (dev/LOG.md).
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl does not
        if mallopt is not None:
            # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX
            for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20), (-8, 1)):
                mallopt(option, value)


def close_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        _stop_watch()
        _leave_store(LEAVE_SECONDS)
        dist.destroy_process_group()


def _leave_store(seconds: float) -> None:
    """Say that this rank needs the store no more. Rank 0, whose process may hold it, waits for the others to say so."""
    store = dist.distributed_c10d._get_default_store()
    with suppress(dist.DistError):
        left, began = store.add("nanochat/left", 1), time.monotonic()
        while dist.get_rank() == 0 and left < dist.get_world_size() and time.monotonic() - began < seconds:
            time.sleep(0.005)
            left = store.add("nanochat/left", 0)


@contextmanager
def joined_ranks(device_type: str = "") -> Iterator[Ranks]:
    """Call init_ranks at the beginning of the block and close_ranks at its end.

    An error on one of several ranks is told at once, with the rank, and ends this process without waiting for the
    others: they may be in a collective that this rank never comes to.
    """
    ranks = None
    obey_owner()
    try:
        ranks = init_ranks(device_type)
        yield ranks
    except BaseException as error:
        if ranks is not None and ranks.world_size > 1:
            _end_rank(ranks, error)
        raise
    try:
        barrier(ranks, "the end of the run")  # rank 0 may be at its last evaluation
    finally:
        close_ranks()


def _end_rank(ranks: Ranks, error: BaseException) -> None:
    """Tell an error of this rank and end the process."""
    code = 1
    if isinstance(error, KeyboardInterrupt):
        code = 130
    elif isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    else:
        text = f"error: {error}" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        mend = isinstance(error, UserError) and error.mend
        if not tell_owner(error=text[-20_000:], mend=mend):  # which prints it; one that all ranks have once
            print_line(f"rank {ranks.rank} of {ranks.world_size}: {text.rstrip()}", sys.stderr)
    _stop_watch()
    if isinstance(error, SystemExit | KeyboardInterrupt):  # the other ranks are asked to stop too
        _leave_store(LEAVE_SECONDS / 10)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    release_locks()
    # No clean-up from here on: closing NCCL may wait for the other ranks until its time limit. The files are closed, as
    # the run's own context managers have ended, and the system frees the GPU with the process.
    os._exit(code)


def all_reduce_sum(x: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum of `x` over all ranks, without changing `x`; in a single process `x` itself."""
    if not ranks.communicates:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total


# ---- waiting for rank 0, through the store: no GPU waits, and a signal is heard meanwhile

def _key() -> tuple[dist.Store, str]:
    return dist.distributed_c10d._get_default_store(), f"nanochat/{count_meeting()}"


def _wait_for(store: dist.Store, key: str, what: str, ranks: Ranks, minutes: float) -> None:
    """Wait until a key is in the store. Rank 1, as one of those that wait, says what for."""
    began = time.monotonic()
    said, pause = began, 0.001
    while not store.check([key]):
        now = time.monotonic()
        if now - began > 60 * minutes:
            raise TimeoutError(f"rank {ranks.rank} has waited {minutes:g} minutes for this to end: {what}")
        if ranks.rank == 1 and now - said > WAIT_SAID_AFTER:
            said = now
            print_line(f"the ranks wait for this to end: {what} ({now - began:.0f} s of at most {60 * minutes:.0f})")
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def barrier(ranks: Ranks, what: str = "work of other ranks", minutes: float = MAIN_MINUTES) -> None:
    """Wait until every rank has called this, with its own time limit. what: the ranks wait for, in words.

    It orders what the processes do on the host, such as writing files; work on the GPU may still be going on.
    """
    if ranks.world_size == 1:
        return
    store, key = _key()
    if store.add(f"{key}/came", 1) == ranks.world_size:
        store.set(f"{key}/all", b"")
    _wait_for(store, f"{key}/all", what, ranks, minutes)


def on_main(what: str, work: Callable[[], R], ranks: Ranks, minutes: float = MAIN_MINUTES) -> R:
    """Call `work` on rank 0 and return its result on all ranks, or raise its UserError on all. Collective.

    Args:
        what: the work in words.
        work: a function whose result can be pickled; the others wait for it without using their device.
        minutes: its time limit.
    """
    if ranks.world_size == 1:
        return work()
    store, key = _key()
    if ranks.is_main:
        try:
            with busy(what):
                result, error = work(), None
        except UserError as problem:
            result, error = None, problem
        store.set(key, pickle.dumps((result, error)))
    else:
        _wait_for(store, key, what, ranks, minutes)
        result, error = pickle.loads(store.get(key))
    if error is not None:
        raise error
    return result


def broadcast_object(obj: Any, ranks: Ranks) -> Any:
    """Return rank 0's `obj` on every rank (pickled between our own processes)."""
    if not ranks.communicates:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0, device=ranks.device)
    return box[0]


def gather_objects(obj: Any, ranks: Ranks) -> list[Any]:
    """Return the list of every rank's `obj`, in the order of ranks, on every rank."""
    if not ranks.communicates:
        return [obj]
    box: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(box, obj)
    return box


def several_machines(ranks: Ranks) -> bool:
    """Return whether the ranks are on more than one machine, by LOCAL_WORLD_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or ranks.world_size) < ranks.world_size


def machine_first(work: Callable[[], R], ranks: Ranks) -> R:
    """Call `work` on all ranks, on the first one of each machine before the others, and return its result. Collective.

    What the first rank downloads or writes, the others find. Its UserError is raised on all ranks.
    """
    if ranks.world_size == 1:
        return work()
    result, error = None, ""
    if ranks.local_rank == 0:
        try:
            with busy("reading or downloading data"):
                result = work()
        except UserError as problem:
            error = str(problem)
    barrier(ranks, "the first rank of a machine, which reads or downloads data")
    if errors := [error for error in gather_objects(error, ranks) if error]:
        raise UserError(errors[0])
    return result if ranks.local_rank == 0 else work()


# ---- precision

@functools.lru_cache(maxsize=1)
def _cpu_has_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 matrices in hardware and torch has the library for it (oneDNN).

    x86: AMX bf16 or AVX512_BF16; ARM: the BF16 extension. torch is asked first; its functions for this are private and
    may disappear, so /proc/cpuinfo is read too. Apple's CPUs keep float32: torch's float32 runs on their matrix units,
    its bfloat16 does not.
    """
    if sys.platform == "darwin" or not torch.backends.mkldnn.is_available():
        return False
    probes = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    if any(probe() for probe in probes if callable(probe)):
        return True
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return False
    return flags is not None and not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(flags[1].split())


@functools.lru_cache
def _cpu_trains_faster_in_bfloat16(threads: int) -> bool:
    """Return whether this CPU's bfloat16 products take less than 0.8 of the time of its float32 ones: 20 ms, once.

    Having the instructions does not say it: with AMX bfloat16 is several times as fast, with AVX512_BF16 alone float32
    trains faster on some CPUs (dev/LOG.md). The rest of a step, casts of the weights above all, is slower in bfloat16,
    hence 0.8; so a tie, or noise around one, gives float32.
    """
    seconds = {}
    pairs = {dtype: torch.ones(2, 512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    for _ in range(6):  # in turns, so that both meet the same noise; the first one warms up
        for dtype, (a, b) in pairs.items():
            start = time.perf_counter()
            a @ b
            seconds.setdefault(dtype, []).append(time.perf_counter() - start)
    return min(seconds[torch.bfloat16][1:]) < 0.8 * min(seconds[torch.float32][1:])


def compute_dtype(device: torch.device | str, training: bool = True) -> torch.dtype:
    """Return the precision of matrix products on `device`.

    NANOCHAT_DTYPE=float32 or bfloat16 overrides (float16 too, for inference on GPUs). Else, on cuda: bfloat16 from
    compute capability 8.0 (Ampere) on; torch emulates it below, slowly. On 7.0 and 7.5 (V100, T4), float32 for training
    and float16 for inference: gradients in float16 need a loss scale and have overflows, and no such card has shown us
    that a run survives them. On cpu: bfloat16 for inference where the hardware multiplies it, since reading the weights
    is what takes time; for training where a measurement finds it faster, too. mps: float32.

    Args:
        device: where the products are done.
        training: whether there are gradients.

    Raises:
        UserError: NANOCHAT_DTYPE is none of these.
    """
    device = torch.device(device)
    wish = os.environ.get("NANOCHAT_DTYPE", "")
    if wish:
        if wish == "float16" and (training or device.type != "cuda"):
            raise UserError("NANOCHAT_DTYPE is 'float16', which is for inference on GPUs alone: use float32 or "
                            "bfloat16 here, or unset it for the device's best.")
        if wish not in ("float32", "bfloat16", "float16"):
            raise UserError(f"NANOCHAT_DTYPE is {wish!r}: use float32 or bfloat16, or unset it for the device's best.")
        return getattr(torch, wish)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return torch.bfloat16
        return torch.float32 if training or capability < (7, 0) else torch.float16
    if device.type != "cpu" or not _cpu_has_bfloat16():
        return torch.float32
    return torch.bfloat16 if not training or _cpu_trains_faster_in_bfloat16(torch.get_num_threads()) else torch.float32


def dtype_of_run(ranks: Ranks, recorded: str | None) -> torch.dtype:
    """Return the precision of a training run, the same on all ranks. Collective.

    Args:
        ranks: this process among all.
        recorded: that of the checkpoint to resume from ("float32"), which is kept where NANOCHAT_DTYPE does not say
            another and the device has it; None for a new run.
    """
    chosen = compute_dtype(ranks.device)
    if not os.environ.get("NANOCHAT_DTYPE"):
        if recorded == "float32":
            chosen = torch.float32
        elif recorded == "bfloat16" and ranks.device.type == "cpu" and _cpu_has_bfloat16():
            chosen = torch.bfloat16  # a GPU that has it has chosen it
    return broadcast_object(chosen, ranks)  # each rank of a CPU has measured for itself


def precision_note(device: torch.device | str, dtype: torch.dtype) -> str:
    """Return a sentence on the precision of training where the GPU has no bfloat16 products; "" elsewhere."""
    device = torch.device(device)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0):
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) has no bfloat16 products"
    if dtype == torch.bfloat16:
        return f"note: {name}: they are emulated, slowly, since NANOCHAT_DTYPE asks for them"
    return f"note: {name}: this trains in float32, because float16 would need loss scaling"


# ---- peak FLOP/s

# Dense TFLOP/s of one device: (bfloat16 matrix product with float32 sums, float32 without TF32), from vendors' data
# sheets and architecture papers; half of the figure where a sheet gives it with 2:4 sparsity. None: no such unit.
# Names are the driver's, without the vendor; the first pattern that matches the whole name counts.
_DATA_CENTRE = (
    (r"GB[23]00.*", 2500, 80), (r"B[23]00.*", 2250, 75),                             # Blackwell (Ultra) data sheets
    (r"GH200.*", 989.4, 67), (r"H200 NVL", 835.5, 60), (r"H200", 989.4, 67),         # Hopper data sheets
    (r"H[18]00 PCIe", 756, 51), (r"H100 NVL", 835.5, 60), (r"H100.*(HBM3|SXM).*|H800", 989.4, 67),
    (r"H20(-3e)?", 148, 44),
    (r"A[18]00[- ].*", 312, 19.5), (r"A30", 165, 10.3), (r"A40", 149.7, 37.4),       # Ampere data sheets
    (r"A10", 125, 31.2), (r"A10G", 70, 35), (r"RTX A6000", 154.8, 38.7),
    (r"L4", 121, 30.3), (r"L40", 181, 90.5), (r"L40S", 362, 91.6),                   # Ada data sheets
    (r"RTX 6000 Ada Generation", 364.2, 91.1),
    (r"RTX PRO 6000 Blackwell Workstation Edition", 503.8, 126), (r"RTX PRO 6000 Blackwell Max-Q.*", 438.9, 110),
    (r"V100-SXM.*", None, 15.7), (r"V100-PCIE.*", None, 14), (r"T4", None, 8.1),     # before Ampere: no bfloat16
    (r"Instinct MI3(00|25)X.*", 1307.4, 163.4),                                      # CDNA 3 data sheets
)
# GeForce cards do bfloat16 with float32 sums at twice their float32 rate (Ampere GA102, Ada and RTX Blackwell papers).
# By exact name: laptop parts and the variants for export share a name's beginning and are slower.
_GEFORCE_FLOAT32 = {
    "RTX 3060": 12.7, "RTX 3060 Ti": 16.2, "RTX 3070": 20.3, "RTX 3070 Ti": 21.7, "RTX 3080": 29.8, "RTX 3080 Ti": 34.1,
    "RTX 3090": 35.6, "RTX 3090 Ti": 40.0, "RTX 4060": 15.1, "RTX 4060 Ti": 22.1, "RTX 4070": 29.1,
    "RTX 4070 SUPER": 35.5, "RTX 4070 Ti": 40.1,
    "RTX 4070 Ti SUPER": 44.1, "RTX 4080": 48.7, "RTX 4080 SUPER": 52.2, "RTX 4090": 82.6,
    "RTX 5060": 19.2, "RTX 5060 Ti": 23.7, "RTX 5070": 30.9, "RTX 5070 Ti": 43.9, "RTX 5080": 56.3, "RTX 5090": 104.8,
}


def gpu_peak(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """Return the dense FLOP/s of the GPU called `name`; None where it is not in the table, or is a slice (MIG)."""
    name = re.sub(r"^(NVIDIA |AMD )?(Tesla )?", "", name.strip())
    if " MIG " in name:
        return None
    if name.startswith("GeForce "):
        single = _GEFORCE_FLOAT32.get(name.removeprefix("GeForce "))
        half = 2 * single if single else None
    else:
        found = (row for row in _DATA_CENTRE if re.fullmatch(row[0], name))
        _, half, single = next(found, (None, None, None))
    if dtype == torch.float32:
        peak = half / 2 if tf32 and half else single  # TF32 runs at half of bfloat16 on all of these
    else:
        peak = half if dtype in (torch.bfloat16, torch.float16) else None
    return None if peak is None else peak * 1e12


@functools.lru_cache
def _measured_peak(dtype: torch.dtype, threads: int) -> float:
    """Return the FLOP/s of a square matrix product on this CPU: best of five, at a size that takes about 20 ms each."""
    size, best = 256, float("inf")
    while True:
        a, b = torch.randn(2, size, size).to(dtype)
        a @ b
        start = time.perf_counter()
        a @ b
        if time.perf_counter() - start > 0.02 or size >= 8192:
            break
        size *= 2
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size ** 3 / best


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """Return the peak dense FLOP/s of `device` in `dtype`, the denominator of the MFU; None where it is not known.

    GPUs by name from the vendor's data sheet (float32: TF32 where torch's float32 matmul precision allows it). A CPU is
    measured once for each dtype and number of threads.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device), dtype, torch.backends.cuda.matmul.fp32_precision == "tf32")
    return _measured_peak(dtype, torch.get_num_threads()) if device.type == "cpu" else None
