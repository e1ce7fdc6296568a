"""Run Python under the null GPU: `python -m tests.nullgpu [--face NAME] [--count N] [--log FILE] -- ARGUMENTS`."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.nullgpu import FACES, SOURCES, NullGPU, build, missing


def main() -> None:
    """Build the library in the temporary folder, where it is not there yet, and become Python with the arguments behind
    `--`."""
    parser = argparse.ArgumentParser(prog="python -m tests.nullgpu", description=__doc__)
    parser.add_argument("--face", default="H100", choices=FACES, help="the card")
    parser.add_argument("--count", type=int, default=1, help="how many cards")
    parser.add_argument("--driver", type=int, help="CUDA version of the driver, 12060 for 12.6")
    parser.add_argument("--log", type=Path, help="file that the events are added to")
    parser.add_argument("arguments", nargs="*", help="of Python: -m MODULE ..., or FILE ...")
    given = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    folder = Path(tempfile.gettempdir()) / f"nullgpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / "libnullgpu.so"
    if not library.exists() or library.stat().st_mtime < max(file.stat().st_mtime for file in SOURCES.iterdir()):
        build(folder)
    environment = NullGPU(folder).environment(given.face, given.count, given.driver, given.log)
    os.execve(sys.executable, [sys.executable, *given.arguments], environment)


if __name__ == "__main__":
    main()
