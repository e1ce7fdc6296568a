"""Which implementation an operation runs: measured and chosen, asked for by hand, or by default; and how Triton kernels
are launched."""

import ast
import importlib
import os
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nanochat.distributed import Ranks
from nanochat.errors import UserError
from nanochat.kernels import choose, measure, relu2
from nanochat.kernels.attention import path
from nanochat.kernels.choose import Choice, Wish, operations, parse_wish
from nanochat.kernels.dispatch import (
    Backend,
    TrainingShape,
    backend,
    chosen_backend,
    chosen_for,
    default_backend,
    launch,
    set_choice,
)
from nanochat.loading import load_model
from nanochat.logs import read_log
from nanochat.report.runs import read_logs
from nanochat.report.sections import stage_section
from nanochat.run import flags
from scripts import base_train, chat_rl, chat_sft, mid_train
from tests import toy_operation
from tests.conftest import ROOT
from tests.helpers import small_model
from tests.test_training import TINY

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
    assert {"_cross_entropy", "_slc2", "_slc2_gradient", "_slc2_step", "_split", "_combine", "_fused_matvec"} <= kernels
    found = {f"{path.relative_to(ROOT)}:{line}" for path, text in texts.items()
             for line in bare_launches(text, kernels)}
    assert not found, "use nanochat.kernels.dispatch.launch"


@pytest.mark.parametrize("call", ["_row[(N,)](z)", "_row[grid](z, num_warps=4)", "triton_file._row[1](z)",
                                    "_row.run(z, grid=(1,))", "_row.warmup(z, grid=(1,))"])
def test_a_bare_launch_is_found(call):
    assert bare_launches(f"def run(z, N, grid):\n    {call}", {"_row"}) == [2]
    assert not bare_launches("launch(_row, (N,), z); values[0](z); subprocess.run(z)", {"_row"})


def test_a_launch_states_fp_fusion_and_the_device():
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append((grid, args, options))
    x = torch.ones(2)
    launch(Kernel(), (3,), 1, x, WIDE=True, num_warps=4)
    assert seen == [((3,), (1, x), {"enable_fp_fusion": True, "WIDE": True, "num_warps": 4})]


def test_what_torch_compiles_states_fp_fusion_too(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "")
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION")
    small_model().compile_blocks(2, 8)
    assert os.environ["TRITON_DEFAULT_FP_FUSION"] == "1"


# ---- what runs

@pytest.fixture(autouse=True)
def no_choice():
    """Tests begin and end with the fixed rules."""
    set_choice({})
    yield
    set_choice({})


def one(name, ready=True, default="always"):
    return Backend(lambda *args: name, lambda *args: ready, default)


def test_the_first_that_is_ready_runs_where_nobody_chose_and_the_last_takes_what_is_left():
    backends = {"a": one("a", ready=False), "b": one("b", default="never"), "c": one("c", default="eager"),
                "d": one("d"), "e": one("e", ready=False)}
    assert backend("toy", backends)() == "c"
    assert default_backend("toy", backends, compiled=True) == "d"
    set_choice({}, {("toy", "c"): "it crashed"})
    assert backend("toy", backends)() == "d"
    set_choice({}, {("toy", "c"): "it crashed", ("toy", "d"): "it crashed"})
    assert backend("toy", backends)() == "e", "something has to run"


def test_a_choice_counts_where_it_is_ready_and_for_its_own_operation():
    backends = {"a": one("a"), "b": one("b", default="never"), "c": one("c", ready=False)}
    set_choice({"toy": "b"})
    assert backend("toy", backends)() == "b" and backend("other", backends)() == "a"
    set_choice({"toy": "c"})
    assert backend("toy", backends)() == "a", "not ready for these arguments"


def test_a_choice_measured_at_one_shape_may_count_there_alone():
    assert chosen_for("toy", 2, 8)
    set_choice({"toy": "b"}, measured_rows={"toy": (2, 8)})
    assert chosen_for("toy", 2, 8) and not chosen_for("toy", 2, 9) and chosen_for("other", 1, 1)


def test_attention_takes_the_measured_choice_at_the_rows_of_training_alone():
    q = torch.randn(2, 8, 2, 8)
    usual = path(q)
    Choice(chosen={"attention": "torch"}, rows=(2, 8)).apply()
    assert path(q) == "torch" and path(q[:1]) == usual == path(q[:, :7])
    Choice(asked={"attention": "torch"}, rows=(2, 8)).apply()
    assert path(q) == path(q[:1]) == "torch", "what the user asks for counts everywhere"


@pytest.mark.parametrize("name", [name for name in operations() if name not in ("newton_schulz",)])
def test_every_operation_runs_what_is_asked_for_with_the_same_result(name):
    """All implementations that are ready here, against the twin in a wider precision."""
    module = importlib.import_module(operations()[name])
    for dtype in (torch.float32, torch.bfloat16):
        draw = measure.draw_with(torch.device("cpu"), dtype, 1)
        trial = module.trial(SHAPE, draw)
        ready = [n for n, b in module.BACKENDS.items() if b.ready(*(trial.asked or trial.args))]
        assert "torch" in ready and list(module.BACKENDS)[-1] == "torch"
        for chosen in ready:
            set_choice({name: chosen})
            assert chosen_backend(name, module.BACKENDS, *(trial.asked or trial.args)) == chosen
            measure.check_small(measure.references(module, task(dtype), torch.device("cpu"), dtype), dtype)


def test_the_compiler_sees_a_choice_as_a_constant():
    torch._dynamo.reset()
    x, ran = torch.randn(3), []
    backends = {"a": Backend(lambda x: x + 1), "b": Backend(lambda x: x + 2, default="never")}

    def count(graph, inputs):
        ran.append(graph)
        return graph.forward
    compiled = torch.compile(lambda x: backend("toy", backends, x)(x), backend=count, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(x), x + 1)
    assert len(ran) == 1
    set_choice({"toy": "b"})
    for _ in range(3):
        assert torch.equal(compiled(x), x + 2)
    assert len(ran) == 2, "another choice is compiled anew, once"


# ---- measuring

SHAPE = TrainingShape(B=2, T=70, E=32, H=2, G=1, D=16, K=3, V=97)


def task(dtype=torch.float32, **given):
    given = {"operations": {"toy": "tests.toy_operation"}, "done": [], "seconds": 100.0, "compiled": False} | given
    return measure.Task(shape=SHAPE, device="cpu", dtype=str(dtype).removeprefix("torch."), threads=1, **given)


def test_what_is_wrong_raises_hangs_or_kills_its_process_is_left_out_and_the_rest_is_measured():
    """The whole path, in processes of their own. A second operation comes after the one that misbehaves."""
    found = choose.choose(parse_wish("measure"), SHAPE, torch.device("cpu"), torch.float32, False,
                          {"toy": "tests.toy_operation", "relu2": "nanochat.kernels.relu2"}, 200, 10)
    assert not found.problem and found.source == "measured"
    why = {both.removeprefix("toy:"): reason for both, reason in found.left_out.items()}
    assert why.keys() == {"ragged", "wrong_backward", "nan", "raises", "hangs", "aborts"}
    assert why["ragged"].startswith("the result is off by") and why["wrong_backward"].startswith("gradient 1 is off by")
    assert why["nan"] == "the result is not finite" and why["hangs"] == "it took more than 10 s"
    assert why["raises"] == "NotImplementedError: this card is unknown"
    assert why["aborts"].startswith("its process ended: SIGABRT")
    assert found.milliseconds["toy"].keys() == {"slow", "fast", "torch"}
    assert found.chosen["toy"] in ("fast", "torch") and found.chosen["relu2"] in ("cpu", "torch")
    assert found.milliseconds["toy"]["slow"] > found.milliseconds["toy"][found.chosen["toy"]] > 0
    assert len([line for line in found.lines() if line.startswith("kernel left out: toy:")]) == 6
    found.apply()
    assert chosen_backend("toy", toy_operation.BACKENDS, torch.ones(1)) == found.chosen["toy"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, wrong", [("ragged", "the result is off"), ("wrong_backward", "gradient 1 is off"),
                                         ("nan", "not finite"), ("slow", ""), ("fast", ""), ("torch", "")])
def test_the_check_tells_wrong_from_rounding(name, wrong, dtype):
    twin = measure.references(toy_operation, task(dtype), torch.device("cpu"), dtype)
    set_choice({"toy": name})
    with pytest.raises(measure.Wrong, match=wrong) if wrong else nullcontext():
        measure.check_small(twin, dtype)


def test_it_is_remembered_and_another_shape_is_not(tiny_base, monkeypatch):
    """On a GPU alone a run measures by itself; here that is pretended, and measuring counted."""
    calls = []

    def measured(task, trial_seconds):
        calls.append(task)
        return {"toy": {"fast": {"ms": 1.0, "kept": None}, "slow": {"ms": 2.0, "kept": None}}}, {"toy": "slow"}, problem
    problem = ""
    monkeypatch.setattr(choose, "measure", measured)
    monkeypatch.setattr(choose, "measures_on", lambda device: True)

    def once(wish="auto", shape=SHAPE, dtype=torch.float32, compiled=False):
        return choose.choose(parse_wish(wish), shape, torch.device("cpu"), dtype, compiled, {"toy": "x", "relu2": "y"})
    first, second = once(), once()
    assert len(calls) == 1 and (first.source, second.source) == ("measured", "remembered")
    assert first.chosen == second.chosen == {"toy": "fast"} and second.rows == (SHAPE.B, SHAPE.T)
    once(shape=replace(SHAPE, T=9)), once(dtype=torch.bfloat16), once(compiled=True), once("relu2:torch")
    assert len(calls) == 5
    assert once("measure").source == "measured" and len(calls) == 6
    (tiny_base / "kernels.json").write_text("{ half a")
    problem = "not all could be measured"
    assert once().problem and once().problem and len(calls) == 8, "what is not whole is not remembered"
    problem = ""
    assert once().source == "measured" and once().source == "remembered"


def test_on_a_cpu_nothing_is_measured_unless_asked(monkeypatch):
    monkeypatch.setattr(choose, "measure", None)
    for wish in ("", "auto", "default"):
        found = choose.choose(parse_wish(wish), SHAPE, torch.device("cpu"), torch.float32, False)
        assert found == Choice() and found.lines() == []


def result(ms, kept=None):
    return {"ms": ms, "kept": kept}


@pytest.mark.parametrize("results, default, wanted", [
    ({"a": result(2.0), "b": result(1.0)}, "a", "b"),
    ({"a": result(1.01), "b": result(1.0)}, "a", "a"),  # not worth a change
    ({"a": result(2.0), "b": {"wrong": "off"}}, "a", "a"),
    ({"a": {"wrong": "it took more than 25 s"}, "b": result(9.0)}, "a", "b"),
    ({"b": result(1.0)}, "a", None),  # time was up before the default was measured
    ({}, "a", None),
    ({"a": result(2.0, 100 << 20), "b": result(1.0, 300 << 20)}, "a", "a"),  # the batch would not fit any more
    ({"a": result(2.0, 100 << 20), "b": result(1.0, 20 << 20)}, "a", "b"),
])
def test_the_fastest_right_one_is_chosen_that_keeps_no_more_memory(results, default, wanted):
    found = choose.decide({"toy": results}, {"toy": default}, "")
    assert found["chosen"].get("toy") == wanted
    assert found["left_out"].keys() == {f"toy:{name}" for name, r in results.items()
                                        if "wrong" in r or (r["kept"] or 0) > 200 << 20}


def test_when_time_is_up_the_rest_runs_by_default():
    results, defaults, problem = choose.measure(task(seconds=0.01))
    assert results == {} and "0 s" in problem
    found = choose.decide(results, defaults, problem)
    assert found["chosen"] == {} and Choice(**found).lines() == [f"kernels: {problem}"]


def test_where_measuring_does_not_work_at_all_the_run_goes_on(monkeypatch):
    results, _, problem = choose.measure(task(operations={"toy": "tests.nowhere"}))
    assert results == {} and "measuring does not work here" in problem and "nowhere" in problem
    monkeypatch.setattr(choose.sys, "executable", "/nowhere/python")
    assert "No such file" in choose.measure(task())[2]


# ---- the flag

@pytest.mark.parametrize("text, wanted", [
    ("", Wish()), ("auto", Wish()), ("measure", Wish("measure")), ("default", Wish("default")),
    ("relu2:torch", Wish("auto", {"relu2": "torch"})),
    (" relu2:cpu , measure, attention:flash3", Wish("measure", {"relu2": "cpu", "attention": "flash3"})),
])
def test_the_flag_is_read(text, wanted):
    assert parse_wish(text) == wanted


@pytest.mark.parametrize("text", ["relu3:torch", "relu2:cuda", "relu2", "relu2:", ":torch", "all"])
def test_what_does_not_exist_is_refused_with_what_does(text):
    with pytest.raises(UserError) as caught:
        parse_wish(text)
    assert all(part in str(caught.value) for part in (text, "relu2:cpu|", "attention:flash3|", "slc2:triton|cpu|torch"))


@pytest.mark.parametrize("script", [base_train, mid_train, chat_sft, chat_rl])
def test_every_training_script_refuses_a_wrong_name_before_it_loads_anything(script, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "none"))
    with pytest.raises(UserError, match="there is no 'relu2:warp'"):
        script.main(["--kernels=relu2:warp", "--device-type=cpu"])
    assert not (tmp_path / "none").exists()


def kernel_record(base):
    return next(row for row in reversed(read_log(base / "logs" / "base_d2.jsonl")) if row["kind"] == "kernels")


def test_a_run_takes_what_is_asked_for_and_the_report_says_so(tiny_base, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(relu2, "_pytorch", lambda x: ran.append("torch") or relu2.relu_squared_twin(x))
    monkeypatch.setitem(relu2.BACKENDS, "torch", Backend(lambda x: relu2._pytorch(x)))
    base_train.main([*TINY, "--num-iterations=1", "--kernels=relu2:torch,rms_norm:torch"])
    assert ran and "kernels asked for: relu2 torch, rms_norm torch" in capsys.readouterr().out
    record = kernel_record(tiny_base)
    assert record["asked"] == {"relu2": "torch", "rms_norm": "torch"} and record["chosen"] == {}
    logs = read_logs(tiny_base / "logs")
    assert "| relu2 | torch (asked for) | - | - |" in stage_section(logs["base", "d2"], [])
    ran.clear()
    base_train.main([*TINY, "--num-iterations=1", "--fresh"])
    assert bool(ran) == (relu2.BACKENDS["cpu"].ready(torch.ones(1)) is False), "the choice ended with its run"


def test_a_run_on_a_cpu_measures_where_asked_and_its_log_and_report_say_what(tiny_base, capsys):
    asked = "relu2:torch,add_norm:cpu,rms_norm:torch,rope_norm:torch,newton_schulz:torch,cross_entropy:torch"
    base_train.main([*TINY, "--num-iterations=1", f"--kernels=measure,{asked}"])
    record = kernel_record(tiny_base)
    assert record["source"] == "measured" and record["seconds"] > 0 and not record["problem"], record
    assert not record["left_out"] and record["rows"] == [2, 32], record
    if relu2.BACKENDS["cpu"].ready(torch.ones(1)):  # else each has one implementation here
        assert record["chosen"].keys() == {"adamw", "attention", "slc2", "decode_attention"}
        assert set(record["milliseconds"]["slc2"]) == {"cpu", "torch"}
        section = stage_section(read_logs(tiny_base / "logs")["base", "d2"], [])
        assert f"| slc2 | {record['chosen']['slc2']} |" in section and "| relu2 | torch (asked for) |" in section
        assert f"slc2 {record['chosen']['slc2']}" in capsys.readouterr().out


def test_rank_0_measures_and_the_others_do_what_it_found(monkeypatch):
    found, model = Choice(chosen={"relu2": "torch"}, rows=(2, 8)), small_model()
    monkeypatch.setattr(flags, "choose", lambda wish, shape, device, dtype, compiled: found)
    for rank in (0, 1):
        set_choice({})
        monkeypatch.setattr(flags, "on_main", lambda what, work, ranks: work() if ranks.is_main else found)
        if rank:
            monkeypatch.setattr(flags, "choose", None)
        ranks = Ranks(rank, rank, 2, torch.device("cpu"))
        assert flags.choose_kernels(SimpleNamespace(kernels="auto"), model, 2, 8, False, ranks) == found
        assert chosen_backend("relu2", relu2.BACKENDS, torch.ones(1)) == "torch"


def test_loading_a_model_reads_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_KERNELS", "relu2:torch")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="no .*checkpoint|nothing|no model"):
        load_model("base", "cpu")
    assert chosen_backend("relu2", relu2.BACKENDS, torch.ones(1)) == "torch"
    monkeypatch.setenv("NANOCHAT_KERNELS", "relu2:warp")
    with pytest.raises(UserError, match="there is no 'relu2:warp'"):
        load_model("base", "cpu")
