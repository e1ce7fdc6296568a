"""Which implementation an operation runs: measured and chosen, asked for by hand, or by default; and how Triton kernels
are launched."""

import ast

import pytest

from tests.conftest import ROOT

SOURCES = [path for folder in ("nanochat", "bench", "dev", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]


# ---- launches

def jit_functions(tree: ast.Module) -> set[str]:
    """The functions under triton.jit, with or without arguments, or under another decorator around it."""
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
            and any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)}


def bare_launches(source: str, kernels: set[str]) -> list[int]:
    """The lines that launch a kernel other than by dispatch.launch: kernel[grid](...), .run(...), .warmup(...)."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr in ("run", "warmup"):
            called = ast.Subscript(called.value)
        if isinstance(called, ast.Subscript):
            name = called.value.attr if isinstance(called.value, ast.Attribute) else getattr(called.value, "id", None)
            lines += [node.lineno] if name in kernels else []
    return lines


def test_every_triton_kernel_is_launched_where_fp_fusion_is_stated():
    """Triton 3.10 turns the default around: a kernel that does not state it would round differently from then on."""
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCES}
    kernels = set().union(*(jit_functions(ast.parse(text)) for text in texts.values() if "triton" in text))
    assert {"_row", "_forward", "_backward", "_step", "_split", "_combine", "_fused_matvec"} <= kernels
    found = {f"{path.relative_to(ROOT)}:{line}" for path, text in texts.items()
             for line in bare_launches(text, kernels)}
    assert not found, "use nanochat.kernels.dispatch.launch"


@pytest.mark.parametrize("launch", ["_row[(N,)](z)", "_row[grid](z, num_warps=4)", "triton_file._row[1](z)",
                                    "_row.run(z, grid=(1,))", "_row.warmup(z, grid=(1,))"])
def test_a_bare_launch_is_found(launch):
    assert bare_launches(f"def run(z, N, grid):\n    {launch}", {"_row"}) == [2]
    assert not bare_launches("launch(_row, (N,), z); values[0](z); subprocess.run(z)", {"_row"})


def test_a_launch_states_fp_fusion_and_the_device():
    import torch

    from nanochat.kernels.dispatch import launch
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append((grid, args, options))
    x = torch.ones(2)
    launch(Kernel(), (3,), 1, x, WIDE=True, num_warps=4)
    assert seen == [((3,), (1, x), {"enable_fp_fusion": True, "WIDE": True, "num_warps": 4})]
