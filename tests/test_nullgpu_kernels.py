"""Our Triton kernels as ptxas compiles them for each kind of card: they fit its shared memory, and their registers and
spills are as recorded."""

import ast

import pytest
import torch

from nanochat.distributed import compute_dtype
from nanochat.kernels import dispatch
from nanochat.kernels.decode_attention import append_and_attend
from nanochat.kernels.mlp import mlp
from nanochat.positions import rope_table
from tests.conftest import ROOT
from tests.nullgpu import FACES
from tests.nullgpu.inside import recorded
from tests.nullgpu.programs import decoding, training

SOURCES = sorted(ROOT.glob("nanochat/kernels/*/triton.py"))

# Registers of a thread and bytes of its stack, at most, for compute capability 9.0 and bfloat16 at the shapes of d20,
# d26 and d32. A stack is where registers are spilled to. What exceeds a limit is slower: look at it before raising one.
# `_mlp_with_pointers` runs there for unaligned matrices alone, which no model of ours has.
LIMITS = {"_slc2": (112, 0), "_slc2_gradient": (255, 96), "_slc2_step": (32, 0), "_cross_entropy": (40, 0),
          "_split": (112, 0), "_combine": (56, 0), "_fused_matvec": (104, 8), "_add_norm": (32, 0),
          "_add_norm_gradient": (48, 0), "_relu2": (24, 0), "_relu2_gradient": (40, 0), "_rope_norm": (40, 0),
          "_rope_norm_gradient": (56, 0), "_mlp_with_descriptors": (232, 0), "_mlp_with_pointers": (255, 1984)}
OWN = {"add_norm": "triton", "relu2": "triton", "rope_norm": "triton", "slc2": "triton", "cross_entropy": "triton"}
SINCE_AMPERE = {"_slc2", "_slc2_gradient", "_slc2_step", "_mlp_with_pointers", "_mlp_with_descriptors"}
SINCE_HOPPER = {"_mlp_with_descriptors"}


def entries() -> set[str]:
    """Return the names of the kernels that are launched: all `launch(NAME, ...)` of our Triton sources."""
    names = [node.args[0].id for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "launch"]
    defined = [node.name for path in SOURCES for node in ast.parse(path.read_text(encoding="utf-8")).body
               if isinstance(node, ast.FunctionDef) and node.name in names]
    assert sorted(defined) == sorted(set(names)), "two kernels of one name"
    return set(names)


def compile_all(depths: list[int]) -> dict:
    """Train and decode with two layers of each depth's width; return our kernels and what was refused.

    Training is a step of a few long rows, with both mixers, for each way to run the MLP. Decoding is one row and many,
    with graphs, at few and at many positions, and with shared key heads.
    """
    names, found = entries(), {}
    with recorded() as seen:
        for depth in depths:
            shape = {"n_layer": 2, "layer_pattern": "SA"}
            for products in ("torch", "triton", "triton_small"):
                dispatch.set_choice({**OWN, "mlp": products})
                training(depth, 2, compiled=False, steps=1, **shape)
            dispatch.set_choice({})
            decoding(depth, [1, 3], 2, **shape)
        unaligned()
        with torch.inference_mode():
            grouped()
    for event in seen.of("kernel", "launch"):
        if event["name"] in names:
            most = found.setdefault(event["name"], {"registers": 0, "local": 0, "shared": 0})
            for key in most:
                most[key] = max(most[key], event.get(key, 0))
    return {"kernels": found, "refused": [event["why"] for event in seen.of("refused")]}


def compile_all_and_blocks(depths: list[int]) -> dict:
    """Do what `compile_all` does, and train with the MLP's own products in compiled blocks of the first depth."""
    found = compile_all(depths)
    dispatch.set_choice({**OWN, "mlp": "triton"})
    with recorded() as seen:
        step = training(depths[0], 2, compiled=True, steps=2, n_layer=2, layer_pattern="SA")
    names = [event["name"] for event in seen.of("launch")]
    return {**found, "step": step, "products": names.count("_mlp_with_descriptors")}


def unaligned() -> None:
    """Run the MLP on rows that are no multiples of 16 bytes, which no tensor map describes."""
    for products in ("triton", "triton_small"):
        dispatch.set_choice({"mlp": products})
        x, w1, w2 = (torch.zeros(*sizes, dtype=compute_dtype("cuda"), device="cuda", requires_grad=True)
                     for sizes in ((300, 500), (2002, 500), (500, 2002)))
        mlp(x, w1, w2).sum().backward()
    dispatch.set_choice({})


def grouped() -> None:
    """Attend with query heads that share a key head, over many positions: the products of a decode step."""
    dtypes = (torch.float16,) if torch.cuda.get_device_capability() < (8, 0) else (torch.bfloat16, torch.float16)
    for dtype in (torch.float32, *dtypes):
        B, S, H, G, D = 2, 4096, 8, 2, 128
        q, k, v = (torch.zeros(B, 1, heads, D, dtype=dtype, device="cuda") for heads in (H, G, G))
        keys, values = (torch.zeros(B, S, G, D, dtype=dtype, device="cuda") for _ in range(2))
        rope = tuple(table[:B].unsqueeze(1) for table in rope_table(S, D, "cuda"))
        append_and_attend(q, k, v, rope, keys, values, torch.zeros(B, dtype=torch.long, device="cuda"))


def check(found: dict, face: str) -> None:
    assert found["refused"] == []
    for name, kernel in found["kernels"].items():
        assert 0 < kernel["registers"] <= 255 and kernel["shared"] <= FACES[face].shared_block, (name, kernel)


@pytest.mark.long
@pytest.mark.parametrize("depths", [[20], pytest.param([26, 32], marks=pytest.mark.slow)])
def test_on_an_h100_registers_and_spills_are_as_recorded(nullgpu, depths):
    found = nullgpu.run(compile_all_and_blocks, face="H100", depths=depths)
    step = found["step"]
    assert step["refused"] == step["syncs"] == [] and (step["graphs"], step["breaks"], step["recompiled"]) == (4, 0, 0)
    assert found["products"] == 2 * 4 + 2, "two layers, forward and backward, twice; and a validation"
    check(found, "H100")
    assert found["kernels"].keys() == entries() == LIMITS.keys(), "a kernel has no limit here, or nothing launches it"
    for name, kernel in found["kernels"].items():
        registers, local = LIMITS[name]
        assert kernel["registers"] <= registers and kernel["local"] <= local, (name, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("face", ["T4", "A100-40", "RTX 3090", "L4", "B200", "RTX 5090"])
def test_every_kernel_compiles_for_other_cards_and_fits_their_shared_memory(nullgpu, face):
    found = nullgpu.run(compile_all, face=face, depths=[20])
    check(found, face)
    since = float(FACES[face].capability)
    assert found["kernels"].keys() == entries() - (SINCE_AMPERE if since < 8 else SINCE_HOPPER if since < 9 else set())
