"""bench.kernels at a tiny size: it runs, counts bytes and FLOPs, and finds wrong numbers. No speed is asserted."""

import pytest
import torch

from bench import kernels
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.kernels import cpu, slc2
from tests.test_bench import run, table_of

TINY = ["--depth=2", "--device-batch-size=2", "--max-seq-len=9", "--vocab-size=97", "--decode-rows=3", "--rounds=1",
        "--device=cpu"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda *_: 1e9)
    monkeypatch.setattr(kernels, "matmul_flops", lambda *_: 1e9)
    monkeypatch.setattr(kernels, "interleaved_kernels",
                        lambda cases, device, rounds, sets: {how: [fn(0) is None or 1.0] for how, fn in cases.items()})


def test_every_operation_is_tabled_in_all_its_ways_beside_its_twin(capsys, tmp_path):
    text, found = run(kernels.main, capsys, tmp_path, *TINY)
    header, *lines = table_of(text)
    assert header == ["operation", "pass", "how", "ms", "vs twin", "of the copy", "of the product", "error", "memory"]
    assert {line[0] for line in lines} == set(kernels.NAMES)
    assert {(line[0], line[1]) for line in lines} >= {("slc2 core", "forward"), ("slc2 core", "backward"),
                                                      ("slc2 step", "forward"),
                                                      (kernels.HEAD, "training"), (kernels.HEAD, "evaluation")}
    for row in found["rows"]:
        assert row["seconds"] > 0 and row["memory"] > 0 and (row.get("of_the_copy") is None) == (row["bytes"] == 0)
        assert row["error"] < 1e-5, row
    for name in kernels.OPERATIONS:
        hows = [line[2] for line in lines if line[:2] == [name, "forward"]]
        assert kernels.TWIN in hows and any(how.startswith("ours") for how in hows)


def test_the_bytes_that_must_move_are_those_of_the_inputs_and_outputs():
    E, H, K, tokens = 1280, 10, 3, 7
    assert kernels.slc2_bytes(1, E, H, 2) == (7956, 13352)
    x, A, alpha, past, taps = (torch.zeros(*shape)
                               for shape in ((tokens, E), (tokens, E // H), (tokens, H), (tokens, K - 1, E), (E, K)))
    forward = kernels.nbytes([x, x, A, alpha, x])
    assert kernels.slc2_bytes(tokens, E, H, 4) == (forward, kernels.nbytes([x, x, x, A, alpha, x, x, A, alpha]))
    assert kernels.slc2_step_bytes(tokens, E, H, K, 4) == forward + kernels.nbytes([past, past, taps])
    from torch.utils.flop_counter import FlopCounterMode
    w = torch.randn(5, 3)
    with FlopCounterMode(display=False) as count:
        for _ in range(5):
            gram = w.T @ w
            gram = gram @ gram
            w = w @ gram
    assert kernels.newton_schulz_flops(2, 5, 3) == 2 * count.get_total_flops() == kernels.newton_schulz_flops(2, 3, 5)


def test_wrong_numbers_are_told(monkeypatch, capsys):
    mix = slc2.slc2_mix
    monkeypatch.setattr(slc2, "slc2_mix", lambda z, taps, **heads: mix(z, taps, **heads) + z[:, -1:, :128] * 1e-3)
    with pytest.raises(UserError, match="slc2 core forward, ours"):
        kernels.main([*TINY, "--only=core"])
    assert "slc2 core" in capsys.readouterr().out


def test_plain_torch_is_timed_without_our_kernels_forward_and_backward(monkeypatch):
    if cpu.cpukernels is None:
        pytest.skip("cpukernels is not built; bash dev/setup.sh builds it")
    found = []

    def looks(x):
        found.append(cpu.ready(x))
        x = x * 1
        x.register_hook(lambda _: found.append(cpu.ready(torch.zeros(1))))
        return x * 2
    shape = kernels.Shape(GPTConfig.from_depth(2), 1, 2, 1, torch.float32, torch.device("cpu"))
    ways = {**kernels.ours(looks, shape.device), kernels.TWIN: lambda x: x * 2}
    assert list(ways) == ["ours, native", kernels.PLAIN, kernels.TWIN]
    for how in list(ways)[:2]:
        operation = kernels.Operation("x", 1, lambda rows: (torch.randn(2),),
                                      {how: looks, kernels.TWIN: ways[kernels.TWIN]})
        found.clear()
        kernels.errors(operation)
        kernels.timed(operation, shape, 1)
        assert len(found) >= 6 and set(found) == {how != kernels.PLAIN}
    assert cpu.ready(torch.zeros(1)), "the kernels were not put back"


def test_torch_compile_of_a_twin_is_one_of_the_ways(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda fn, dynamic: lambda *inputs: fn(*inputs) * 1)
    model = GPTConfig.from_depth(2)
    shape = kernels.Shape(model, 2, 9, 3, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(cpu, "cpukernels", None)
    rows, _ = kernels.measured(shape, ["relu²"], 1, True)
    assert [row["how"] for row in rows] == [kernels.PLAIN, kernels.TWIN, kernels.COMPILED] * 2
    assert all((row["memory"] is None) == (row["error"] is None) == (row["how"] == kernels.COMPILED) for row in rows)

    def fails(*inputs):
        raise RuntimeError("no compiler")
    monkeypatch.setattr(torch, "compile", lambda fn, dynamic: fails)
    failed, *others = kernels.measured(shape, ["relu²"], 1, True)[0]
    assert failed["failed"] == "RuntimeError" and {row["how"] for row in others} == {kernels.PLAIN, kernels.TWIN}
    assert "RuntimeError" in kernels.shown([failed, *others])


@pytest.mark.parametrize("flags", [["--only=nothing"], ["--dtype=half"], ["--compile=maybe"], ["--rounds=0"]])
def test_flags_that_make_no_sense_are_refused_in_words(flags):
    with pytest.raises(UserError, match=flags[0].split("=")[0]):
        kernels.main([*TINY, *flags])
