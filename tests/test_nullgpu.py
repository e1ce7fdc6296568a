"""The null GPU itself: the card it shows, what it writes down, what it refuses."""

import pytest
import torch

from tests.nullgpu import FACES
from tests.nullgpu.inside import recorded


def the_card() -> dict:
    properties = torch.cuda.get_device_properties(torch.cuda.device_count() - 1)
    return {"count": torch.cuda.device_count(), "name": properties.name, "memory": properties.total_memory / 2**30,
            "capability": f"{properties.major}.{properties.minor}", "sms": properties.multi_processor_count,
            "shared": properties.shared_memory_per_block_optin, "bf16": torch.cuda.is_bf16_supported(False)}


def test_a_card_shows_its_face(nullgpu):
    card, of = nullgpu.run(the_card, face="T4", count=3), FACES["T4"]
    assert card == {"count": 3, "name": of.name, "memory": pytest.approx(of.memory, abs=0.01),
                    "sms": of.multiprocessors, "capability": of.capability, "shared": of.shared_block,
                    "bf16": False}


def available() -> bool:
    return torch.cuda.is_available()


def test_a_driver_older_than_torch_s_cuda_shows_no_card(nullgpu):
    assert not nullgpu.run(available, driver=11080)


def refusals() -> dict:
    """What a driver refuses, and how torch says it."""
    def error_of(call) -> str:
        try:
            call()
            return ""
        except RuntimeError as error:
            return str(error).split("\n")[0]

    x, found = torch.zeros(8, 8, device="cuda"), {}
    with recorded() as seen:
        x.sum().item()
        (x @ x).cpu()
        x.to("cuda:1", non_blocking=True)
    found["launches"], found["syncs"] = len(seen.launches()), len(seen.syncs())
    graph = torch.cuda.CUDAGraph()
    with recorded() as seen:
        with torch.cuda.graph(graph):
            y = x + 1
            y = y * 2
        graph.replay()
    [begin], [end], [replay] = seen.of("capture_begin"), seen.of("capture_end"), seen.of("replay")
    found["captured"] = [event["capture"] == begin["capture"] for event in seen.launches()]
    found["nodes"] = [end["nodes"], replay["nodes"]]

    def waits_in_capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            (x + 1).sum().item()
    found["wait in a capture"] = error_of(waits_in_capture)
    (x + 1).sum().item()  # works again
    found["memory"] = error_of(lambda: torch.empty(100 << 30, dtype=torch.uint8, device="cuda"))
    found["device"] = error_of(lambda: torch.ones(4, device="cuda:5"))
    return found


def test_events_are_written_down_and_what_cuda_refuses_is_refused(nullgpu):
    found = nullgpu.run(refusals, count=2)
    assert found["launches"] >= 2 and found["syncs"] == 2
    assert found["captured"] == [True, True] and found["nodes"] == [2, 2]
    assert "during capture" in found["wait in a capture"] and "out of memory" in found["memory"]
    assert "invalid device ordinal" in found["device"]


def triton_refusals() -> list[str]:
    """Launch a Triton kernel in three ways and return the errors."""
    import triton
    import triton.language as tl

    @triton.jit
    def increment(x, N: tl.constexpr):
        at = tl.program_id(0) * N + tl.arange(0, N)
        tl.store(x + at, tl.load(x + at) + 1)

    errors = []
    for grid, device in ((1, 1, 1), 0), ((1, 70_000, 1), 0), ((1,), 1):
        try:
            increment[grid](torch.zeros(64, device=f"cuda:{device}"), N=64)  # Triton launches on the current device, 0
            errors.append("")
        except RuntimeError as error:
            errors.append(str(error))
    return errors


def test_triton_s_launches_are_checked(nullgpu):
    fine, grid, device = nullgpu.run(triton_refusals, count=2)
    assert fine == ""
    assert "invalid configuration" in grid and "illegal memory access" in device
