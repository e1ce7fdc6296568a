"""The Triton kernels of SLC2 against the twin and float64: on the GPU where there is one, else in Triton's interpreter
on the CPU.

The interpreter must be chosen before triton is imported, so those tests run in a process of their own, which the first
test starts.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from nanochat.kernels.slc2 import slc2_core_twin, slc2_mix, slc2_step, slc2_step_twin, split_columns, uses_triton

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
runs = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED,
                          reason="runs in the interpreter, started by the first test of this file")


def in_process(code_or_file: str | Path, **env: str) -> str:
    pytest_on = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    arguments = ["-c", code_or_file] if isinstance(code_or_file, str) else [*pytest_on, code_or_file]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=environment | env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
@has_triton
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the tests below run here themselves")
def test_the_kernels_are_right_in_the_interpreter(triton_interprets):
    assert "passed" in in_process(Path(__file__), TRITON_INTERPRET="1")


D20_ON_HOPPER = """
import re
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nanochat.kernels.dispatch import LAUNCH_OPTIONS
from nanochat.kernels.slc2 import triton as slc2

x = torch.empty(32, 2048, 1280, dtype=torch.bfloat16, device="meta")
heads = {"H": 10, "D": 128, "K": 3, "PAST": False}
for kernel, constants in ((slc2._slc2, heads | slc2._tile(slc2.FORWARD, x, 128)),
                          (slc2._slc2_gradient, heads | slc2._tile(slc2.BACKWARD, x, 128)),
                          (slc2._slc2_step, {"E": 1280, "D": 128, "K": 3, "BLOCK": slc2.STEP, "num_warps": 4})):
    options = {"num_warps": constants.pop("num_warps"), **LAUNCH_OPTIONS}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        odd = name in ("pad", "chain", "total", "blocks")
        number = odd or re.fullmatch("T|.*_[bt]", name)
        kind = "i32" if number else "*fp32" if name in ("taps", "dtaps", "dpast") else "*bf16"
        signature[name] = "constexpr" if name in constants else kind
        if name not in constants and not odd:
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
    print(kernel.__name__, len(binary))
"""


@has_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
def test_the_kernels_compile_for_hopper_without_a_gpu():
    names = [line.split()[0] for line in in_process(D20_ON_HOPPER).splitlines()]
    assert names == ["_slc2", "_slc2_gradient", "_slc2_step"]


def case(data: st.DataObject, *, T: st.SearchStrategy) -> tuple[dict, torch.Tensor]:
    """Return random inputs, columns of one wider tensor, with a past or None, and dy."""
    B, T, H, D, K, seed = (data.draw(s, label) for s, label in (
        (st.integers(1, 3), "B"), (T, "T"), (st.integers(1, 3), "H"), (st.sampled_from([1, 3, 8, 40]), "D"),
        (st.integers(1, 4), "K"), (st.integers(0, 999), "seed")))
    dtype, other = (data.draw(st.sampled_from([torch.float32, torch.bfloat16])) for _ in range(2))
    torch.manual_seed(seed)
    E = H * D
    z = torch.randn(B, T, 2 * E + D + H + 5).to(dtype).to(DEVICE)
    x, gate, A, alpha, _ = z.split([E, E, D, H, 5], dim=-1)
    if data.draw(st.booleans(), "transposed"):
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    taps = torch.randn(E, K).to(other).to(DEVICE)
    past = torch.randn(B, K - 1, E).to(other).to(DEVICE) if data.draw(st.booleans(), "past") else None
    return {"x": x, "B": gate, "A": A, "alpha": alpha, "taps": taps,
            "past": past}, torch.randn(B, T, E).to(dtype).to(DEVICE)


def close(name: str, got: torch.Tensor, twin: torch.Tensor, exact: torch.Tensor) -> None:
    """No further from float64 than the twin, up to the noise of one rounding to got's dtype and of a sum in float32."""
    if not got.numel():
        return
    largest = exact.abs().max().item()
    noise = 2 * torch.finfo(got.dtype).eps * largest + 16 * torch.finfo(torch.float32).eps * max(1.0, largest)
    ours, its = ((t.double() - exact).abs().max().item() for t in (got, twin))
    assert ours <= 1.5 * its + noise, f"{name}: {ours} from float64, the twin {its}"


def twin_of(inputs: dict, dy: torch.Tensor | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return y and all gradients by the twin, computed in dtype."""
    given = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items() if t is not None}
    y = slc2_core_twin(**given)
    if not y.numel():
        return {}
    return {"y": y.detach()} | dict(zip(given, torch.autograd.grad(y, list(given.values()), dy.to(dtype))))


@has_triton
@runs
@settings(max_examples=10, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_forward_and_backward_are_as_near_to_float64_as_the_twin(data):
    from nanochat.kernels.slc2 import triton as slc2
    inputs, dy = case(data, T=st.sampled_from([1, 2, 3, 5, 17, 29]))
    x, past = inputs["x"], inputs["past"]
    twin, exact = (twin_of(inputs, dy, dtype) for dtype in (x.dtype, torch.float64))
    close("y", slc2.forward(**inputs), twin["y"], exact["y"])

    widths = [t.shape[-1] for t in list(inputs.values())[:4]]
    dz = torch.full((*x.shape[:2], sum(widths) + 7), float("nan"), dtype=x.dtype, device=DEVICE)
    gradients = dict(zip(("x", "B", "A", "alpha"), dz.split([*widths, 7], dim=-1)))
    gradients["taps"], gradients["past"] = slc2.backward(dy, *inputs.values(), *gradients.values(), pad=3)
    assert gradients["taps"].dtype == torch.float32 and (gradients["past"] is None) == (past is None)
    for name, wanted in exact.items():
        if name != "y":
            close(name, gradients[name], twin[name], wanted)
    padding = dz[..., sum(widths):]
    assert (padding[..., :3] == 0).all() and padding[..., 3:].isnan().all()


@has_triton
@runs
@settings(max_examples=10, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_the_step_is_as_near_to_float64_as_the_twin_and_moves_its_past_on(data):
    from nanochat.kernels.slc2 import triton as slc2
    inputs, _ = case(data, T=st.just(1))
    if inputs["past"] is None:
        inputs["past"] = torch.zeros(inputs["x"].shape[0], inputs["taps"].shape[1] - 1, inputs["x"].shape[2],
                                     device=DEVICE)
    room = torch.cat([inputs["past"], torch.full_like(inputs["past"][:1], float("nan"))])
    past = inputs["past"] = room[:-1]
    results = {}
    for dtype in (inputs["x"].dtype, torch.float64):
        given = {name: t.to(dtype, copy=True) for name, t in inputs.items()}
        results[dtype] = slc2_step_twin(**given), given["past"]
    y = slc2.step(**inputs)
    (twin, twin_past), (exact, exact_past) = results.values()
    close("y", y, twin, exact)
    close("past", past, twin_past, exact_past)
    assert room[-1].isnan().all()


@has_triton
@runs
def test_chunks_that_continue_each_others_past_are_one_sequence():
    from nanochat.kernels.slc2 import triton as slc2
    torch.manual_seed(0)
    x, B, A, alpha, taps = (torch.randn(*shape, device=DEVICE)
                            for shape in ((2, 9, 24), (2, 9, 24), (2, 9, 8), (2, 9, 3), (24, 3)))
    whole, past, parts = slc2.forward(x, B, A, alpha, taps), torch.zeros(2, 2, 24, device=DEVICE), []
    for t in range(9):
        parts.append(slc2.step(*(s[:, t:t + 1] for s in (x, B, A, alpha)), taps, past))
        if t == 4:
            later = slc2.forward(*(s[:, 5:] for s in (x, B, A, alpha)), taps, past.clone())
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(later, whole[:, 5:])


@has_triton
@runs
def test_many_programs_add_up_the_gradient_of_the_taps(monkeypatch):
    from nanochat.kernels.slc2 import triton as slc2
    monkeypatch.setattr(slc2, "SUMS", 2)  # each program goes through several ranges of time
    torch.manual_seed(0)
    inputs = dict(zip(("x", "B", "A", "alpha", "taps"),
                      (torch.randn(*shape, device=DEVICE)
                       for shape in ((3, 90, 128), (3, 90, 128), (3, 90, 64), (3, 90, 2), (128, 3)))))
    dy, gradients = torch.randn(3, 90, 128,
                                device=DEVICE), [torch.full_like(t, float("nan")) for t in list(inputs.values())[:4]]
    exact = twin_of(inputs, dy, torch.float64)
    dtaps, _ = slc2.backward(dy, *inputs.values(), None, *gradients)
    torch.testing.assert_close(dtaps.double(), exact["taps"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradients[2].double(), exact["A"], rtol=1e-4, atol=1e-5)


def d20(B: int, T: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random z, taps and dy of the sizes of a d20 on the GPU, z and dy in bfloat16."""
    torch.manual_seed(0)
    return (torch.randn(B, T, 2704, device="cuda", dtype=torch.bfloat16, requires_grad=True),
            torch.randn(1280, 3, device="cuda", requires_grad=True),
            torch.randn(B, T, 1280, device="cuda", dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_the_operator_is_near_float64_and_the_same_in_every_run(compiled):
    z, taps, dy = d20(3, 517)
    assert uses_triton(z)
    mix = torch.compile(slc2_mix, fullgraph=True) if compiled else slc2_mix
    exact_inputs = [t.detach().double().requires_grad_() for t in (z, taps)]
    exact = slc2_core_twin(*split_columns(exact_inputs[0], 10, 128)[:4], exact_inputs[1])
    wanted = exact, *torch.autograd.grad(exact, exact_inputs, dy.double())
    runs = []
    for _ in range(2):
        y = mix(z, taps, n_head=10, head_width=128)
        runs.append((y, *torch.autograd.grad(y, (z, taps), dy)))
    for got, again, like in zip(*runs, wanted):
        assert torch.equal(got, again) and (got.double() - like).norm() < 0.005 * like.norm()


@pytest.mark.gpu
def test_on_a_gpu_the_step_can_be_captured_in_a_graph():
    z, taps, _ = d20(4, 1)
    parts, taps = split_columns(z.detach(), 10, 128)[:4], taps.detach()
    past, its = (torch.zeros(4, 2, 1280, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    slc2_step(*parts, taps, past)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = slc2_step(*parts, taps, past)
    past.zero_()
    for _ in range(3):
        graph.replay()
        wanted = slc2_step_twin(*parts, taps, its)
        torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(past, its, rtol=2e-2, atol=2e-2)
