"""The null GPU: a C library that stands in for CUDA, to see what PyTorch and Triton would do on a GPU without one.

    def test_something(nullgpu):                                      # the fixture of conftest.py builds it once
        result = nullgpu.run(program, depth=20)                       # program(depth=20) in a process with an H100
        result = nullgpu.run(program, face="RTX 4090", count=2)       # with two cards of another kind

`program` is a function at the top of a module, its arguments and result are JSON. It runs PyTorch's real host code:
dispatch, argument checks, caching allocator, torch.compile, Triton's compilation, CUDA graph capture. So memory,
launches, waits, shapes and refusals are seen. Nothing is computed: what a kernel would write is whatever was in memory,
zeros mostly. No time that is measured there means anything. cuDNN is left out: SDPA takes its next choice.

Inside such a process `tests.nullgpu.inside.recorded` gives the events of a piece of code. src/nullgpu.h says how the
library works. From the command line, a program or a script of the project under it:

    python -m tests.nullgpu --face "RTX 3090" --count 2 -- -m scripts.base_train --depth=4 ...
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parent / "src"
ROOT = SOURCES.parent.parent.parent
TIME_LIMIT = 1800  # seconds of one process: against hangs


@dataclass(frozen=True)
class Face:
    """What a card says of itself.

    Attributes:
        name: as the driver gives it
        capability: compute capability, "9.0"
        memory: GiB that PyTorch sees
        multiprocessors: how many
        l2: MiB of L2 cache
    """

    name: str
    capability: str
    memory: float
    multiprocessors: int
    l2: int

    @property
    def shared_block(self) -> int:
        """Bytes of shared memory that a block can have."""
        return PER_BLOCK[self.capability][0] * 1024

    def environment(self) -> dict[str, str]:
        """Return the settings of the library."""
        block, whole, threads, blocks = PER_BLOCK[self.capability]
        values = {"NAME": self.name, "CAPABILITY": self.capability, "MEMORY": int(self.memory * 2**30),
                  "SHARED_BLOCK": block * 1024, "SHARED_SM": whole * 1024, "THREADS_SM": threads, "BLOCKS_SM": blocks,
                  "MULTIPROCESSORS": self.multiprocessors, "L2": self.l2 << 20}
        return {f"NULLGPU_{name}": str(value) for name, value in values.items()}


# By compute capability: KiB of shared memory of a block and of a multiprocessor, threads and blocks of a multiprocessor
# (CUDA C++ Programming Guide, technical specifications).
PER_BLOCK = {"7.5": (64, 64, 1024, 16), "8.0": (163, 164, 2048, 32), "8.6": (99, 100, 1536, 16),
             "8.9": (99, 100, 1536, 24), "9.0": (227, 228, 2048, 32), "10.0": (227, 228, 2048, 32),
             "12.0": (99, 100, 1536, 24)}

# Memory as PyTorch's out-of-memory messages give it.
FACES = {
    "T4": Face("Tesla T4", "7.5", 14.56, 40, 4),
    "A100-40": Face("NVIDIA A100-SXM4-40GB", "8.0", 39.39, 108, 40),
    "A100-80": Face("NVIDIA A100-SXM4-80GB", "8.0", 79.15, 108, 40),
    "RTX 3090": Face("NVIDIA GeForce RTX 3090", "8.6", 23.57, 82, 6),
    "RTX 4090": Face("NVIDIA GeForce RTX 4090", "8.9", 23.53, 128, 72),
    "L4": Face("NVIDIA L4", "8.9", 21.96, 58, 48),
    "H100": Face("NVIDIA H100 80GB HBM3", "9.0", 79.10, 132, 50),
    "H200": Face("NVIDIA H200", "9.0", 139.80, 132, 50),
    "B200": Face("NVIDIA B200", "10.0", 178.35, 148, 126),
    "RTX 5090": Face("NVIDIA GeForce RTX 5090", "12.0", 31.36, 170, 96),
    "RTX PRO 6000": Face("NVIDIA RTX PRO 6000 Blackwell Server Edition", "12.0", 94.97, 188, 128),
}


def missing() -> str:
    """Return why the null GPU cannot be built here, or "" where it can."""
    if sys.platform != "linux":
        return "the null GPU needs Linux, whose loader takes LD_PRELOAD"
    if shutil.which("cc") is None:
        return "the null GPU needs a C compiler, cc"
    import torch
    if torch.version.cuda is None:
        return f"the null GPU needs a torch with CUDA, and this one is {torch.__version__}"
    if not {"cuda.h", "driver_types.h"} <= {file.name for folder in _headers() for file in folder.iterdir()}:
        return "the null GPU needs the CUDA headers that torch's wheels bring (nvidia-cuda-runtime)"
    return ""


@cache
def _headers() -> list[Path]:
    """Return the folders of CUDA's headers, those of torch's own CUDA before Triton's copy."""
    site = Path(sysconfig.get_path("purelib"))
    return sorted({file.parent for name in ("driver_types.h", "cuda.h") for file in [
        *site.glob(f"nvidia/*/include/{name}"), *site.glob(f"triton/backends/nvidia/include/{name}")]})


def build(folder: Path) -> None:
    """Compile the library into this folder."""
    library = folder / "libnullgpu.so"
    includes = [f"-I{path}" for path in [*_headers(), SOURCES / "include"]]
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", *includes, *map(str, sorted(SOURCES.glob("*.c"))),
                    "-o", str(library), "-lpthread", "-ldl"], check=True)
    for name in ("libnvidia-ml.so.1", "libcuda.so.1"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(library.name)


class NullGPU:
    """The built library, and processes under it."""

    def __init__(self, folder: Path):
        """folder: where `build` has put it; compiled kernels are kept there too, for all processes."""
        self.folder = folder

    def environment(self, face: str | Face = "H100", count: int = 1, driver: int | None = None,
                    log: Path | None = None) -> dict[str, str]:
        """Return the environment of a process that sees `count` cards of this kind.

        Args:
            face: a name of FACES, or a face
            count: number of cards
            driver: CUDA version of the driver, 12060 for 12.6; None is one that suits this torch
            log: file of the events; None keeps none
        """
        card = FACES[face] if isinstance(face, str) else face
        own = {"LD_PRELOAD": str(self.folder / "libnullgpu.so"), "TRITON_LIBCUDA_PATH": str(self.folder),
               "LD_LIBRARY_PATH": ":".join([str(self.folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]),
               "TRITON_CACHE_DIR": str(self.folder / "triton"), "CUDA_MODULE_LOADING": "LAZY",
               "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"), "TORCHINDUCTOR_COMPILE_THREADS": "1",
               "NULLGPU_COUNT": str(count), **card.environment()}
        if driver is not None:
            own["NULLGPU_DRIVER"] = str(driver)
        if log is not None:
            own["NULLGPU_LOG"] = str(log)
        kept = {name: value for name, value in os.environ.items()
                if not name.startswith(("NULLGPU_", "CUDA_VISIBLE")) and name != "NANOCHAT_DTYPE"}
        return {**kept, **own}

    def run(self, program: Callable[..., Any], *, face: str | Face = "H100", count: int = 1, driver: int | None = None,
            env: dict[str, str] | None = None, **given: Any) -> Any:
        """Return what program(**given) returns in a new process under the null GPU.

        Args:
            program: a function at the top of a module; `given` and its result go through JSON
            face, count, driver: as `environment` takes them
            env: more environment variables

        Raises:
            AssertionError: the process failed; its output is the message
        """
        module = program.__module__
        if module == "__main__":  # of python -m
            module = sys.modules["__main__"].__spec__.name
        log = self.folder / f"{os.getpid()}-{threading.get_ident()}.log"
        log.write_text("")
        done = subprocess.run(
            [sys.executable, "-m", "tests.nullgpu.inside", f"{module}:{program.__qualname__}",
             json.dumps(given)], cwd=ROOT, env={**self.environment(face, count, driver, log), **(env or {})},
            capture_output=True, text=True, timeout=TIME_LIMIT)
        *output, last = done.stdout.rstrip("\n").split("\n")
        if done.returncode or not last.startswith("result "):
            raise AssertionError(f"{program.__qualname__}({given}) ended with {done.returncode}:\n{done.stdout[-4000:]}"
                                 f"\n{done.stderr[-8000:]}")
        log.unlink()
        return json.loads(last.removeprefix("result "))


def events(log: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the events of a log from a byte on."""
    with open(log) as file:
        file.seek(start)
        for line in file:
            yield json.loads(line)
