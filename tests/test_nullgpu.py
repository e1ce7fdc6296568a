"""The null GPU itself: the card it shows, what it writes down, what it refuses."""

import ctypes

import pytest
import torch

from tests.nullgpu import FACES
from tests.nullgpu.inside import recorded

BFLOAT16, SWIZZLE_128B = 9, 3  # of CUtensorMapDataType and CUtensorMapSwizzle


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
    found["captured"] = sum(event["capture"] == begin["capture"] for event in seen.launches())
    found["nodes"] = [end["nodes"], replay["nodes"]]

    def waits_in_capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            (x + 1).sum().item()
    found["wait in a capture"] = error_of(waits_in_capture)
    (x + 1).sum().item()  # works again
    found["memory"] = error_of(lambda: torch.empty(100 << 30, dtype=torch.uint8, device="cuda"))
    found["device"] = error_of(lambda: torch.ones(4, device="cuda:5"))
    return found


def all_refusals() -> dict:
    return {**refusals(), "triton": triton_refusals(), "maps": refused_maps()}


def test_events_are_written_down_and_what_cuda_refuses_is_refused(nullgpu):
    found = nullgpu.run(all_refusals, count=2)
    assert found["launches"] >= 2 and found["syncs"] == 2
    assert found["captured"] == 2 and found["nodes"] == [2, 2]
    assert "during capture" in found["wait in a capture"] and "out of memory" in found["memory"]
    assert "invalid device ordinal" in found["device"]
    fine, grid, device = found["triton"]
    assert fine == ""
    assert "invalid configuration" in grid and "illegal memory access" in device
    written, fine, *wrong = found["maps"]
    assert not written and fine == [0, []]  # the description is empty
    for (error, refused), why in zip(wrong, ("address that is no multiple of 16", "stride that is no multiple of 16",
                                             "size of the box that is not 1 to 256", "no multiple of 16 bytes",
                                             "longer than the swizzle"), strict=True):
        assert error == 1 and len(refused) == 1 and why in refused[0], refused


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


def refused_maps() -> list:
    """Describe a tensor of bfloat16 in a right way, then in five wrong ones; return each error and its reasons."""
    driver, room = ctypes.CDLL("libcuda.so.1"), (ctypes.c_uint8 * 192)(*[1] * 192)
    place = -(-ctypes.addressof(room) // 64) * 64
    described = (ctypes.c_uint8 * 128).from_address(place)
    sizes, steps = (ctypes.c_uint64 * 2)(128, 100), (ctypes.c_uint32 * 2)(1, 1)
    at, found = torch.zeros(1 << 16, dtype=torch.bfloat16, device="cuda:0").data_ptr(), []
    for address, stride, box, swizzle in ((at, 256, (64, 64), SWIZZLE_128B), (at + 8, 256, (64, 64), SWIZZLE_128B),
                                          (at, 200, (64, 64), SWIZZLE_128B), (at, 256, (64, 512), SWIZZLE_128B),
                                          (at, 256, (4, 64), 0), (at, 256, (128, 64), SWIZZLE_128B)):
        with recorded() as seen:
            error = driver.cuTensorMapEncodeTiled(
                ctypes.c_void_p(place), BFLOAT16, 2, ctypes.c_void_p(address), sizes, (ctypes.c_uint64 * 1)(stride),
                (ctypes.c_uint32 * 2)(*box), steps, 0, swizzle, 0, 0)
        found.append([error, [event["why"] for event in seen.of("refused")]])
    return [any(described), *found]
