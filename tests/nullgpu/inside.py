"""What runs in a process under the null GPU: a program, and what it can ask.

    with recorded() as seen:
        step()
    seen.launches()        # [{"name": "_slc2", "grid": [...], "block": [...], "device": 0, ...}, ...]
    seen.syncs()           # calls that waited for the device

Events: kernel (Triton loads one: registers of a thread, bytes of its stack), launch (of a kernel), product (cuBLAS),
copy, memset, sync, event_record, malloc, create_memory and reserve_addresses (expandable segments), capture_begin,
capture_end, replay (a CUDA graph), refused, out_of_memory.
"""

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.nullgpu import events


class Recorded(list):
    """Events, in order."""

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the events of these kinds."""
        return [event for event in self if event["event"] in kinds]

    def launches(self) -> list[dict[str, Any]]:
        """Return what starts a kernel: launches and products."""
        return self.of("launch", "product")

    def syncs(self) -> list[dict[str, Any]]:
        """Return the calls that wait for the device."""
        return self.of("sync")

    def devices(self) -> list[int]:
        """Return the devices that kernels and graphs were started on, and whose streams events were recorded on."""
        return sorted({event["device"] for event in self.of("launch", "product", "replay", "event_record")})


@contextmanager
def recorded() -> Iterator[Recorded]:
    """Collect the events of a block of code, of all threads."""
    log, seen = Path(os.environ["NULLGPU_LOG"]), Recorded()
    start = log.stat().st_size
    yield seen
    seen += events(log, start)


def main(target: str, given: str) -> None:
    """Call the function "module:name" with these arguments and print its result as the last line."""
    import torch
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN is not stood in for
    module, name = target.split(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(given))
    sys.stdout.flush()
    print("\nresult " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
