"""The rules of the code's layout, checked by reading it: imports point one way, files are small, names have one
meaning."""

import ast
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

LIBRARY = ROOT / "nanochat"
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for path in sorted(LIBRARY.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
LONGEST_FILE, LONGEST_LINE, MOST_FILES = 600, 120, 34

# Modules without a test file of their name, and the file that covers them.
COVERED_BY = {
    "nanochat": "test_house",
    "nanochat.attention": "test_kernel_attention",
    "nanochat.cache": "test_new_mixer",
    "nanochat.config": "test_gpt",
    "nanochat.checkpoint.meta": "test_checkpoint",
    "nanochat.checkpoint.reading": "test_checkpoint",
    "nanochat.checkpoint.tensors": "test_checkpoint",
    "nanochat.checkpoint.writing": "test_checkpoint",
    "nanochat.dataset.arrival": "test_download",
    "nanochat.dataset.documents": "test_dataset",
    "nanochat.dataset.importing": "test_dataset",
    "nanochat.dataset.readers": "test_dataset",
    "nanochat.dataset.shards": "test_dataset",
    "nanochat.engine.batch": "test_engine",
    "nanochat.engine.row": "test_engine",
    "nanochat.errors": "test_cli",
    "nanochat.evaluation": "test_core_eval",
    "nanochat.evaluation.chat": "test_chat_eval",
    "nanochat.evaluation.core": "test_core_eval",
    "nanochat.evaluation.loss": "test_loss_eval",
    "nanochat.kernels": "test_kernels_cpu",
    "nanochat.kernels.adamw": "test_kernel_adamw",
    "nanochat.kernels.adamw.cpu": "test_kernel_adamw",
    "nanochat.kernels.add_norm": "test_kernel_add_norm",
    "nanochat.kernels.add_norm.triton": "test_kernel_add_norm",
    "nanochat.kernels.attention": "test_kernel_attention",
    "nanochat.kernels.attention.cpu": "test_kernel_attention_cpu",
    "nanochat.kernels.cross_entropy": "test_kernel_cross_entropy",
    "nanochat.kernels.cross_entropy.cpu": "test_kernels_cpu",
    "nanochat.kernels.cross_entropy.triton": "test_kernel_cross_entropy",
    "nanochat.kernels.decode_attention": "test_kernel_decode_attention",
    "nanochat.kernels.decode_attention.cpu": "test_kernel_decode_attention",
    "nanochat.kernels.decode_attention.triton": "test_kernel_decode_attention",
    "nanochat.kernels.choose": "test_kernel_choice",
    "nanochat.kernels.measure": "test_kernel_choice",
    "nanochat.kernels.dispatch": "test_kernel_choice",
    "nanochat.kernels.fp8": "test_kernel_fp8",
    "nanochat.kernels.fused_matvec": "test_kernel_fused_matvec",
    "nanochat.kernels.sdpa": "test_kernel_attention",
    "nanochat.kernels.fused_matvec.triton": "test_kernel_fused_matvec",
    "nanochat.kernels.mlp": "test_kernel_mlp",
    "nanochat.kernels.mlp.triton": "test_kernel_mlp",
    "nanochat.kernels.newton_schulz": "test_optim",
    "nanochat.kernels.relu2": "test_kernel_relu2",
    "nanochat.kernels.relu2.cpu": "test_kernels_cpu",
    "nanochat.kernels.relu2.triton": "test_kernel_relu2",
    "nanochat.kernels.rms_norm": "test_kernels_cpu",
    "nanochat.kernels.rms_norm.cpu": "test_kernels_cpu",
    "nanochat.kernels.rope_norm": "test_kernel_rope_norm",
    "nanochat.kernels.rope_norm.cpu": "test_kernels_cpu",
    "nanochat.kernels.rope_norm.triton": "test_kernel_rope_norm",
    "nanochat.kernels.slc2": "test_kernel_slc2",
    "nanochat.kernels.slc2.cpu": "test_kernels_cpu",
    "nanochat.kernels.slc2.triton": "test_kernel_slc2_triton",
    "nanochat.mixer": "test_new_mixer",
    "nanochat.positions": "test_new_mixer",
    "nanochat.recipe.modern": "test_recipe",
    "nanochat.recipe.parts": "test_recipe",
    "nanochat.recipe.published": "test_recipe",
    "nanochat.recipe.small": "test_recipe",
    "nanochat.report.plots": "test_report",
    "nanochat.report.runs": "test_report",
    "nanochat.report.sections": "test_report",
    "nanochat.report.writing": "test_report",
    "nanochat.run.flags": "test_stages",
    "nanochat.run.horizon": "test_run",
    "nanochat.run.origin": "test_run",
    "nanochat.run.stage_run": "test_run",
    "nanochat.server": "test_server_api",
    "nanochat.server.app": "test_server_api",
    "nanochat.server.chat": "test_server_api",
    "nanochat.server.completions": "test_server_api",
    "nanochat.server.docs": "test_server_fuzz",
    "nanochat.server.gate": "test_server_life",
    "nanochat.server.generation": "test_server_api",
    "nanochat.server.messages": "test_server_pool",
    "nanochat.server.metrics": "test_server_life",
    "nanochat.server.models": "test_server_pool",
    "nanochat.server.prefix_cache": "test_server_scheduler",
    "nanochat.server.protocol": "test_server_api",
    "nanochat.server.serving": "test_server_life",
    "nanochat.server.stream": "test_server_api",
    "nanochat.server.worker": "test_server_pool",
    "nanochat.slc2": "test_kernel_slc2",
    "nanochat.small_world.grading": "test_small_world",
    "nanochat.small_world.phrasings": "test_small_world",
    "nanochat.small_world.stories": "test_small_world",
    "nanochat.small_world.words": "test_small_world",
    "nanochat.small_world.world": "test_small_world",
    "nanochat.tokenizer.files": "test_tokenizer",
    "nanochat.tools": "test_sandbox",
    "nanochat.tools.sandbox_launcher": "test_sandbox",
}

# From the lowest floor to the highest: a module imports nothing of a higher floor than its own. Others serve all
# floors.
FLOORS = [
    ["kernels"],
    ["layers", "positions", "cache", "ragged", "mixer", "slc2", "attention", "sampling"],
    ["config", "gpt"],
    ["optim", "memory", "guard", "training", "engine", "evaluation", "checkpoint", "loading", "saving", "rl"],
    ["run", "llm", "server"],
]
OUTSIDE = {"scripts", "tasks", "tests", "bench", "dev"}  # what the library never imports
MIXERS = {"Attention", "SLC2"}  # classes that no code asks a layer for


def imports_in(name: str, node: ast.AST, lazy: bool) -> Iterator[str]:
    """Yield the modules of this project, by full name, that the code imports. lazy: inside functions, too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"{name} has a relative import; this project writes names in full"
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                yield whole if whole in MODULES else child.module
        else:
            yield from imports_in(name, child, lazy)


def classes_of(tree: ast.AST) -> list[str]:
    return [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def test_every_module_has_a_test_of_its_name_or_a_line_that_says_which_covers_it():
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}

    def own(name: str) -> bool:
        above, _, last = name.rpartition(".")
        room = above.rpartition(".")[2]
        names = {f"test_{room}_{last}", f"test_{last}_{room}"}
        if above in ("nanochat", f"nanochat.{last}") or f"nanochat.{last}" not in MODULES:  # no other one has this name
            names.add(f"test_{last}")
        return not names.isdisjoint(tests)

    named = {name for name in MODULES if own(name)}
    missing = [name for name in MODULES if not name.endswith(".__main__") and name not in named | COVERED_BY.keys()]
    assert not missing, f"name the tests that cover these in COVERED_BY: {missing}"
    assert not COVERED_BY.keys() - MODULES.keys(), "there is no such module"
    assert not COVERED_BY.keys() & named, f"these have a test file of their name: {COVERED_BY.keys() & named}"
    assert not set(COVERED_BY.values()) - tests, "there is no such test file"


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: {other for other in imports_in(name, tree, lazy=False) if other in MODULES}
             for name, tree in TREES.items()}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, f"a circle of imports: {' → '.join([*path[path.index(name):], name])}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_imports_point_one_way():
    floors = {f"nanochat.{room}": height for height, rooms in enumerate(FLOORS) for room in rooms}

    def floor(name: str) -> int | None:
        return floors.get(".".join(name.split(".")[:2]))

    wrong = []
    for name, tree in TREES.items():
        for other in imports_in(name, tree, lazy=True):
            up = floor(name) is not None and floor(other) is not None and floor(other) > floor(name)
            if up or other.split(".")[0] in OUTSIDE:
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_no_file_of_the_library_is_long():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE}


def test_the_library_can_be_seen_at_a_glance():
    files = [path.name for path in LIBRARY.iterdir() if path.is_file()]
    assert len(files) <= MOST_FILES, sorted(files)


def test_no_line_is_wide():
    wide = []
    for folder in ("nanochat", *sorted(OUTSIDE)):
        for path in sorted((ROOT / folder).rglob("*.py")):
            lines = path.read_text(encoding="utf-8").splitlines()
            wide += [f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(lines, 1) if len(line) > LONGEST_LINE]
    assert not wide, f"{len(wide)} lines"


def test_no_two_classes_share_a_name():
    where = defaultdict(list)
    for name, tree in TREES.items():
        for found in classes_of(tree):
            where[found].append(name)
    assert not {name: modules for name, modules in where.items() if len(modules) > 1}


def test_nothing_asks_what_kind_a_layer_is():
    """The letters of the pattern are in gpt.py alone, and no code asks for the class of a mixer."""
    asked = Counter()
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            parts = list(ast.walk(node))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                asked[name] += any(isinstance(part, ast.Name) and part.id in MIXERS for part in parts)
            elif isinstance(node, ast.Compare) and name != "nanochat.gpt":
                asked[name] += any(isinstance(part, ast.Constant) and part.value in ("A", "S") for part in parts)
            elif isinstance(node, ast.MatchClass):
                asked[name] += ast.unparse(node.cls) in MIXERS
    assert not +asked


def test_importing_the_library_does_no_work(tmp_path):
    """No module prints, starts a thread or writes a file when it is imported."""
    code = """if True:
        import importlib, sys, threading
        for name in sys.argv[1:]:
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name.split(".")[0] == "nanochat":
                    raise
        assert threading.active_count() == 1, threading.enumerate()
    """
    names = [name for name in MODULES if not name.endswith(("__main__", "_launcher"))]  # these are programs
    base = tmp_path / "base"
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "NANOCHAT_BASE_DIR": str(base)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(Path(tmp_path).iterdir())


def test_the_help_of_a_command_comes_without_the_compiler():
    code = """if True:
        import runpy, sys
        sys.argv = ["chat_cli", "--help"]
        try:
            runpy.run_module("scripts.chat_cli", run_name="__main__")
        except SystemExit:
            slow = "torch._dynamo", "torch._inductor", "triton", "datasets"
            print("loaded:", [name for name in slow if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage:" in done.stdout and done.stdout.splitlines()[-1] == "loaded: []"


def test_copies_are_asynchronous_on_cuda_alone():
    """On mps, asynchronous copies from the host read memory that may be freed, and those to it are read before
    they are done (pytorch issues 139550 and 189690): other numbers, no error."""
    for name, path in MODULES.items():
        lines = path.read_text(encoding="utf-8").split("\n")
        for i, line in enumerate(lines):
            if "non_blocking=True" in line:
                assert any('"cuda"' in before for before in lines[max(0, i - 6):i]), f"{name}, line {i + 1}"
