"""dev/gpu_check.py: it sees what is wrong, each section is a process that ends alone, and it fits its time."""

import json
import sys

import pytest
import torch

from bench import measure
from dev import gpu_check
from dev import gpu_correctness as right
from dev import gpu_kernels as single
from dev import gpu_parts as parts
from nanochat.errors import UserError
from nanochat.kernels import attention, cpu, decode_attention
from nanochat.kernels.cross_entropy.cpu import softcapped_cross_entropy_
from nanochat.kernels.fp8 import ACTIVATION, GRADIENT
from nanochat.kernels.newton_schulz import newton_schulz
from nanochat.kernels.slc2 import cpu as slc2_cpu
from nanochat.optim import MuonAdamW
from nanochat.positions import Positions
from tests.conftest import ROOT
from tests.test_bench import table_of

CPU = torch.device("cpu")

ACCIDENTS = '''
import os, sys, time
sys.path.insert(0, {root!r})
from dev import gpu_check

def fine(run, out):
    out.expect("one", 1, at_most=1)

def aborts(run, out):
    out.numbers["before"] = 7
    run.save()
    print("last words", flush=True)
    os.abort()

def hangs(run, out):
    time.sleep(600)

parts = [gpu_check.Part(work.__name__, work) for work in (fine, aborts, fine)]
gpu_check.SECTIONS = (gpu_check.Section("crash", tuple(parts), 1),
                      gpu_check.Section("hang", (gpu_check.Part("hangs", hangs),), 4),
                      gpu_check.Section("fine", (gpu_check.Part("fine", fine),), 1))
gpu_check.PROGRAM = [sys.executable, __file__]
if __name__ == "__main__":
    raise SystemExit(gpu_check.main())
'''


def test_a_section_that_crashes_or_hangs_ends_alone_and_what_it_found_is_kept(tmp_path, capsys, monkeypatch):
    program = tmp_path / "accidents.py"
    program.write_text(ACCIDENTS.format(root=str(ROOT)))
    monkeypatch.setattr(gpu_check, "PROGRAM", [sys.executable, str(program)])
    part, sections = gpu_check.Part, []
    for name, names, seconds in (("crash", ("fine", "aborts", "fine"), 1), ("hang", ("hangs",), 4),
                                 ("fine", ("fine",), 1)):
        sections.append(gpu_check.Section(name, tuple(part(each, None) for each in names), seconds))
    monkeypatch.setattr(gpu_check, "SECTIONS", tuple(sections))
    assert gpu_check.main(["--tiny", "--device=cpu", f"--out={tmp_path / 'out'}"]) == 1
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["parts"]
    assert [(each["section"], each["name"], each["status"]) for each in found] == [
        ("crash", "fine", "passed"), ("crash", "aborts", "broken"), ("crash", "fine", "no time"),
        ("hang", "hangs", "broken"), ("fine", "fine", "passed")]
    crashed, hung = found[1], found[3]
    assert crashed["numbers"] == {"before": 7} and "SIGABRT" in crashed["why"] and "last words" in crashed["trace"]
    assert "in hangs" in hung["trace"], "it says where it hangs"
    assert "last words" in (tmp_path / "out" / "gpu_check.md").read_text()


def test_the_sections_fit_the_eight_minutes_and_begin_with_what_a_first_minute_must_tell():
    usual = gpu_check.wanted_sections(gpu_check.Config())
    assert sum(section.seconds for section in usual) <= 8 * 60
    assert [section.name for section in usual][:4] == ["machine", "step", "collectives", "kernels"]
    assert [part.name for part in usual[0].parts][:2] == ["environment", "toolchain"]


@pytest.mark.parametrize("flags, says", [(["--only=gold"], "model"), (["--golden=nowhere"], "nowhere"),
                                         (["--compile=maybe"], "--compile")])
def test_flags_that_make_no_sense_are_refused_in_words(flags, says):
    with pytest.raises(UserError, match=says):
        gpu_check.main(flags)


@pytest.mark.long
def test_the_gpu_check_works_on_a_cpu(capsys, tmp_path):
    assert gpu_check.main(["--tiny", f"--out={tmp_path}", "--device=cpu", "--compile=no", "--more",
                           "--one-process"]) == 0
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    page = (tmp_path / "gpu_check.md").read_text()
    assert found["good"] and found["tiny"] and page in capsys.readouterr().out
    status = {part["name"]: part["status"] for part in found["parts"]}
    assert list(status) == [part.name for section in gpu_check.SECTIONS for part in section.parts]
    for name in ("twin", "head_loss", "state", "optimizer", "learning", "attention", "one_token", "projections",
                 "graphs", "slc2_speed"):
        assert status[name] == "passed", name
    assert status["slc2"] == status["loss_kernel"] == ("skipped" if cpu.cpukernels is None else "passed")
    assert status["compiled"] == status["no_waiting"] == status["kernels"] == "skipped"
    numbers = {part["name"]: part["numbers"] for part in found["parts"]}
    assert numbers["ceilings"]["copy_bandwidth"] > 0 and numbers["environment"]["torch"] == torch.__version__
    rows = numbers["training"]["rows"]
    assert {"model", "batch", "tokens_per_second", "mfu", "pass_seconds", "optimizer_seconds",
            "memory"} <= rows[0].keys()
    assert {"hybrid", "attention"} == {row["model"].split()[1] for row in rows}
    rows = numbers["decoding"]["rows"]
    assert {"tokens_per_second", "prefill_tokens_per_second", "of_the_bandwidth"} <= rows[0].keys()
    assert {row["graphs"] for row in rows} == {True, False}
    for heading in ("goals", "training", "decoding", "ceilings", "checks", "fp8", "kernel_table", "evaluation"):
        assert f"## {heading}" in page
    goals = {goal["goal"]: goal for part in found["parts"] for goal in part["goals"]}
    assert len(goals) >= 12 and goals["training d20: tokens/s"]["wish"] == 190_000
    assert all((goal["measured"] is None) == (goal["held"] is None) for goal in goals.values())


def test_golden_values_are_checked_where_they_are(shared, tmp_path):
    flags = ["--tiny", f"--out={tmp_path}", f"--golden={shared / 'golden'}", "--only=model", "--device=cpu"]
    assert gpu_check.main(flags) == 0
    found = {part["name"]: part for part in json.loads((tmp_path / "gpu_check.json").read_text())["parts"]}
    assert found["golden"]["status"] == "passed" and len(found["golden"]["checks"]) == 18


def small_check(work, counts=True):
    return gpu_check.do(gpu_check.Part("x", work, counts), right.Run(CPU, True, False, None, 1e12))


def test_a_part_that_fails_breaks_or_finds_no_time_is_told_and_fails_the_check():
    def fails(run, out):
        out.expect("small", 0.5, at_most=0.1)
        out.expect("nan", float("nan"), at_most=1)
        out.expect("enough", 3, at_least=3)

    def skips(run, out):
        raise right.Skipped("no such thing here")
    failed, broken, skipped = small_check(fails), small_check(lambda run, out: 1 / 0), small_check(skips)
    assert [check["ok"] for check in failed["checks"]] == [False, False, True] and failed["status"] == "failed"
    assert broken["status"] == "broken" and "ZeroDivisionError" in broken["why"] and "lambda" in broken["trace"]
    [late] = gpu_check.no_time(gpu_check.Section("x", (gpu_check.Part("x", skips),), 5))
    assert not any(gpu_check.good([result]) for result in (failed, broken, late)) and gpu_check.good([skipped])
    measurement = small_check(lambda run, out: 1 / 0, counts=False)
    assert gpu_check.good([measurement]), "a measurement that broke is no wrong result"

    def wishes(run, out):
        out.goal("fast", 1234.5, at_least=2000)
        out.goal("small", 0.5, at_most=1)
        out.goal("unknown", None, at_most=1)
    wished = small_check(wishes, counts=False)
    assert wished["status"] == "measured" and gpu_check.good([wished]), "no goal is a check"
    assert [goal["held"] for goal in wished["goals"]] == [False, True, None]
    goals = gpu_check.markdown(measure.provenance("x"), [wished], False).split("## goals")[1]
    assert [row[1:] for row in table_of(goals)[1:4]] == [
        ["≥ 2,000", "1,234", "no"], ["≤ 1", "0.5", "yes"], ["≤ 1", "-", "-"]]
    page = gpu_check.markdown(measure.provenance("x"), [failed, broken], False)
    assert "small: 0.5 (must be ≤ 0.1)" in page and "x broke:" in page and "division by zero" in page


@pytest.mark.parametrize("part, where, broken", [
    (right.twin, "nanochat.slc2.slc2_mix",
     lambda z, taps, past=None, *, n_head, head_width: z[..., :n_head * head_width] * taps.sum()),
    (right.state, "nanochat.positions.Positions.last", lambda self, entries, n: entries[:, :n]),
    (right.optimizer, "nanochat.optim.newton_schulz",
     lambda x, dtype, steps=5, whole=newton_schulz: whole(x, dtype, 4 if dtype == torch.bfloat16 else 5)),
    (right.learning, "nanochat.optim.MuonAdamW.step",
     lambda self, *, lr_scale=1.0, whole=MuonAdamW.step, **more: whole(self, lr_scale=0.0, **more)),
    (single.slc2, "nanochat.kernels.slc2.cpu.forward", lambda *given, whole=slc2_cpu.forward: whole(*given) * 1.02),
    (single.slc2, "nanochat.kernels.slc2.cpu.backward",
     lambda *given, whole=slc2_cpu.backward: whole(*given[:7], *map(torch.empty_like, given[7:]))),
    (single.slc2, "nanochat.kernels.slc2.cpu.step",
     lambda *given, whole=slc2_cpu.step: whole(*given[:5], given[5].clone())),
    (single.loss_kernel, "nanochat.kernels.cross_entropy.cpu.softcapped_cross_entropy_",
     lambda z, *more, whole=softcapped_cross_entropy_: whole(z.clone(), *more)),
    (single.attention, "nanochat.kernels.attention.attend",
     lambda *given, window=None, whole=attention.attend, **more: whole(*given, **more)),
    (single.one_token, "nanochat.kernels.decode_attention.append_and_attend",
     lambda *given, whole=decode_attention.append_and_attend: whole(*given[:7])),
    (single.projections, "dev.gpu_kernels.project",
     lambda h, *layers: tuple(layer(h.detach()) for layer in layers)),
    (single.graphs, "nanochat.positions.Positions.static",
     lambda table, index, end, whole=Positions.static: whole(table, torch.zeros_like(index), end)),
])
def test_a_part_sees_what_it_is_there_to_see(monkeypatch, part, where, broken):
    if ".cpu." in where and cpu.cpukernels is None:
        pytest.skip("cpukernels is not built; bash dev/setup.sh builds it")
    monkeypatch.setattr(where, broken)
    assert small_check(part)["status"] in ("failed", "broken")
    monkeypatch.undo()
    assert small_check(part)["status"] == "passed"


def test_products_of_8_bits_are_those_of_the_numbers_up_to_their_rounding():
    torch.manual_seed(0)
    x, w, dy = torch.randn(48, 32).bfloat16(), torch.randn(64, 32).bfloat16(), torch.randn(48, 64).bfloat16()
    eight = [parts.quantised(t, dtype) for t, dtype in ((x, ACTIVATION), (w, ACTIVATION), (dy, GRADIENT))]
    y, dx, dw = parts.linear_in_8_bits(*eight)
    x, w, dy = x.double(), w.double(), dy.double()
    for got, exact in ((y, x @ w.T), (dx, dy @ w), (dw, dy.T @ x)):
        assert 1e-3 < right.relative_error(got, exact) < 0.1


def test_unwritten_memory_is_noticed(monkeypatch):
    from nanochat.kernels import cross_entropy
    whole = cross_entropy._chunks
    assert small_check(right.head_loss)["status"] == "passed"
    # the last tokens are left out
    monkeypatch.setattr(cross_entropy, "_chunks", lambda N, V: whole(N, V)[:-1] or whole(N, V))
    result = small_check(right.head_loss)
    assert [check["value"] == check["value"] for check in result["checks"]] == [False, False, True, False, False, True]
