"""Every benchmark runs at a tiny size and says what it promises. No speed is asserted."""

import importlib
import json
import random
import re
import shlex
from dataclasses import dataclass
from datetime import datetime

import pytest
import torch

from bench import decode, measure, published_engine, real_text, train
from bench.twin import TwinGPT
from nanochat.cli import parser_of
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.logs import read_log
from nanochat.optim import MuonAdamW, parameter_groups
from tests.conftest import ROOT
from tests.helpers import small_model
from tests.test_training import ALONE

CPU = torch.device("cpu")


def run(main, capsys, tmp_path, *flags):
    """Run a benchmark; return what it printed and the JSON it wrote."""
    main([*flags, f"--json={tmp_path / 'out.json'}"])
    found = json.loads((tmp_path / "out.json").read_text())
    check_provenance(found)
    return capsys.readouterr().out, found


def check_provenance(found):
    """Check that the raw numbers name the command, the code, the machine and the versions that gave them."""
    assert {"command", "date", "commit", "threads", "machine", "versions", "config", "rows"} <= found.keys()
    assert found["command"].startswith("python -m bench.") and isinstance(found["rows"], list) and found["rows"]
    assert datetime.fromisoformat(found["date"]).tzinfo is not None
    assert {"system", "cpu", "cores", "memory", "gpus"} <= found["machine"].keys() and found["machine"]["cores"] >= 1
    assert {"python", "torch", "numpy", "nanochat"} <= found["versions"].keys()


def table_of(text):
    """Return the cells of the first markdown table, header first."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for i, line in enumerate(lines) if i != 1]


@pytest.mark.long
def test_training_is_tabled_beside_the_twin_all_attention_and_a_peer(capsys, tmp_path):
    text, found = run(train.main, capsys, tmp_path, "--depth=1", "--max-seq-len=8", "--device-batch-size=2",
                      "--vocab-size=256", "--steps=1", "--warmup=1", "--device=cpu", f"--peer={ROOT}")
    header, *rows = table_of(text)
    assert header == ["training", "step tok/s", "vs twin", "fwd+bwd tok/s", "vs twin", "MFU", "memory"]
    cases = [row[0] for row in rows]
    assert any(case.startswith("twin, float32") for case in cases) and any("all-attention" in case for case in cases)
    assert sum(case.startswith("peer ") for case in cases) == 2
    assert any(case.startswith("ours, float32") for case in cases)
    assert "python -m bench.train --depth=1" in text and found["machine"]["cores"] >= 1
    for row in found["rows"]:
        assert "error" not in row and row["pass_tokens_per_second"] > 0 and row["pass_vs_twin"] > 0
        if not row["case"].startswith("peer"):
            assert {"tokens_per_second", "vs_twin", "mfu", "memory", "parameters", "step_seconds",
                    "flops_per_token"} <= row.keys()
            # weights, gradients, and at least half of an AdamW's state
            assert row["memory"] > 4 * 4 * row["parameters"]


def test_the_two_loss_curves_start_together_and_are_compared(capsys, tmp_path):
    text, found = run(train.main, capsys, tmp_path, "--depth=1", "--max-seq-len=32", "--device-batch-size=2",
                      "--vocab-size=256", "--loss-curve=6", "--device=cpu")
    curves = {name: [row[name] for row in found["rows"]] for name in found["rows"][0] if name != "step"}
    assert set(curves) == {"float32", "bfloat16"} and [len(curve) for curve in curves.values()] == [6, 6]
    assert curves["float32"] != curves["bfloat16"], "one of the two was not in its precision"
    assert found["largest_difference"] == max(abs(a - b) for a, b in zip(*curves.values())) < 0.1
    assert "largest difference" in text and table_of(text)[0] == ["step", "float32", "bfloat16", "difference"]


def test_the_plain_optimizers_of_the_twin_do_what_ours_do():
    ours, plain = small_model(n_layer=3), TwinGPT(small_model(n_layer=3).config)
    plain.load_state_dict(ours.state_dict())
    mine, theirs = MuonAdamW(parameter_groups(ours), ALONE), train.PlainOptimizers(plain, torch.float32)
    pairs = [(p, plain.get_parameter(name)) for name, p in ours.named_parameters()]
    before = [p.detach().clone() for p, _ in pairs]
    for _ in range(3):
        for p, q in pairs:
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine.step(clip=train.CLIP)
        theirs.step()
    for (p, q), start in zip(pairs, before):
        assert measure.relative_error(q - start, p - start) < 2e-3


def test_decoding_is_tabled_beside_full_forwards(capsys, tmp_path):
    text, found = run(decode.main, capsys, tmp_path, "--depth=1", "--vocab-size=97", "--prompt=6", "--new-tokens=4",
                      "--batches=1,3", "--naive-points=1", "--prefills=1", "--device=cpu")
    header, *lines = table_of(text)
    assert header == ["greedy decoding", "batch", "tok/s", "vs published", "vs naive", "prefill tok/s", "cache",
                      "of the limit"]
    cases = [line[0] for line in lines[:len(lines) // 2]]
    assert {"ours, int8", "ours, float32", "published engine, float32", "twin, float32, full forwards"} <= set(cases)
    assert found["agreed"] == found["compared"] == 4 and found["copy_bandwidth"] > 0
    assert {row["batch"] for row in found["rows"]} == {1, 3}
    assert all(row["tokens_per_second"] > 0 for row in found["rows"])
    for row in found["rows"]:
        if row["case"].startswith("ours"):
            assert row["cache_bytes"] > 0 and row["prefill_tokens_per_second"] > 0 and row["of_the_limit"] > 0
        assert row["vs_published"] > 0 and (row["vs_published"] == 1) == (row["case"] == "published engine, float32")
    read = {row["case"]: row["step_bytes"] for row in found["rows"] if row["batch"] == 1 and "step_bytes" in row}
    assert read["ours, int8"] < read["ours, float32"] / 2


def plain_engine(model, prompt, B, new):
    columns = list(published_engine.generate(model, prompt, num_samples=B, max_tokens=new, temperature=0))
    return [list(row) for row in zip(*columns)]


def twin_of(model):
    twin = TwinGPT(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def test_the_published_engine_is_right_where_attention_is_all_and_forgets_convolutions():
    prompt = list(range(5))
    for pattern, right_tokens in (("AAA", True), ("SAA", False)):
        model = small_model(vocab_size=97, n_layer=3, n_kv_head=1, layer_pattern=pattern)
        ours = Engine(model, decode.Endless()).generate_batch(prompt, num_samples=2, max_tokens=9, temperature=0)[0]
        theirs = plain_engine(twin_of(model), prompt, 2, 9)
        assert (theirs == [row[5:] for row in ours]) == right_tokens
        assert theirs[0][0] == ours[0][5], "the first token comes from the prompt's full forward"


def test_the_published_engines_cache_is_of_all_layers_and_grows(monkeypatch):
    monkeypatch.setattr(published_engine, "GROWTH", 4)
    model = twin_of(small_model(vocab_size=97, n_layer=4))
    cache = published_engine.PublishedCache(model.config, 1, 3)
    with torch.no_grad():
        whole = published_engine.forward(model, torch.arange(9)[None],
                                         published_engine.PublishedCache(model.config, 1, 9))
        assert torch.equal(whole, model(torch.arange(9)[None]))
        for part in torch.arange(5)[None].split((2, 1, 1, 1), dim=1):
            published_engine.forward(model, part, cache)
    assert cache.all.shape[:2] == (4, 2) and cache.position == 5 and cache.all.shape[4] == 8

    def generate(**options):
        return list(published_engine.generate(model, [1, 2], num_samples=3, max_tokens=5, **options))
    sampled = [generate(top_k=k, seed=1) for k in (None, 5, 1)]
    assert all(len(columns) == 5 and len(columns[0]) == 3 for columns in sampled)
    assert sampled[2] == generate(temperature=0) != sampled[1]


def test_decoding_takes_turns(monkeypatch):
    order = []

    def steps(name, *args):
        for _ in range(5):
            order.append(name)
            yield 1.0
    monkeypatch.setattr(decode, "decoding", steps)
    monkeypatch.setattr(decode, "STEPS_A_TURN", 2)
    assert decode.decode_in_turns({"a": "a", "b": "b"}, 1, 4, 5) == {"a": [1.0] * 5, "b": [1.0] * 5}
    assert "".join(order) == "aabbaabbab"


def test_decoding_that_differs_from_full_forwards_is_called_worthless(monkeypatch):
    model = small_model(vocab_size=97)
    twin = TwinGPT(model.config)
    twin.load_state_dict(model.state_dict())
    assert decode.agreement(model, twin, 6, 5) == 5
    with torch.no_grad():
        twin.transformer.h[0].attn.conv1d.weight.zero_()
    assert decode.agreement(model, twin, 6, 5) < 5
    monkeypatch.setattr(decode, "agreement", lambda *args: 0)
    with pytest.raises(UserError, match="different tokens"):
        decode.main(["--depth=1", "--vocab-size=97", "--prompt=4", "--new-tokens=2", "--batches=1", "--naive-points=1",
                     "--device=cpu"])


@pytest.mark.parametrize("main, flags, says", [
    (train.main, ["--compile=maybe"], "--compile"), (train.main, ["--vocab-size=100"], "--vocab-size"),
    (train.main, ["--depth=1", "--max-seq-len=4", "--device-batch-size=1", "--vocab-size=256", "--steps=1",
                  "--peer=nowhere"], "nowhere"),
    (decode.main, ["--batches=1;2"], "--batches"), (decode.main, ["--prompt=0"], "--prompt"),
    (real_text.main, ["--text", "x", "--minutes=0"], "--minutes")])
def test_flags_that_make_no_sense_are_refused_in_words(main, flags, says):
    with pytest.raises(UserError, match=says):
        main(flags)


@pytest.mark.slow
def test_real_text_trains_both_models_on_the_same_tokens(capfd, tmp_path):
    from nanochat.tokenizer import tokenizer
    if tokenizer._rustbpe() is None:
        pytest.skip("rustbpe is not built; bash dev/setup.sh builds it")
    dice = random.Random(0)
    words = "the river runs under a stone and house of light".split()
    documents = [" ".join(dice.choice(words) for _ in range(60)) for _ in range(200)]
    (tmp_path / "text.txt").write_text("\n<|doc|>\n".join(documents))
    base = tmp_path / "own"
    _, found = run(real_text.main, capfd, tmp_path, "--text", str(tmp_path / "text.txt"), f"--base-dir={base}",
                   "--steps=2", "--depth=1", "--vocab-size=300", "--max-seq-len=16", "--device-batch-size=2",
                   "--total-batch-size=64", "--eval-tokens=200", "--device-type=cpu")
    assert [row["model"] for row in found["rows"]] == ["hybrid", "attention"]
    assert [row["layers"] for row in found["rows"]] == ["A", "A"]  # the last layer is attention, and here the only one
    for row in found["rows"]:
        assert row["steps"] == 2 and row["tokens"] == 128 and 0 < row["bpb"] < 20
        assert row["samples"] and row["tokens_per_second"] > 0
    assert (base / "base_checkpoints" / "hybrid_d1").is_dir() and read_log(base / "logs" / "base_attention_d1.jsonl")
    config = real_text.Config(steps=2)
    text = real_text.block(config, found, found["rows"])
    assert table_of(text)[0] == ["model", "parameters", "steps", "tokens", "time", "tok/s", "train loss", "val bpb"]
    assert "hybrid continues:" in text and "attention continues:" in text


def test_time_sets_the_steps_of_real_text(monkeypatch, tmp_path):
    """Matched in tokens, both models do the hybrid's number of steps; matched in time, each does its own number."""
    seconds, asked = {"hybrid": 2.0, "attention": 3.0}, []
    monkeypatch.setattr(real_text, "run", lambda *args: None)
    monkeypatch.setattr(real_text, "step_seconds", lambda base, name, config: seconds[name])
    monkeypatch.setattr(real_text, "train", lambda base, name, steps, config: asked.append((name, steps)))
    monkeypatch.setattr(real_text, "outcome", lambda *args: {})
    monkeypatch.setattr(real_text, "block", lambda *args: "")
    for match, steps in (("tokens", [30, 30]), ("time", [30, 20])):
        asked.clear()
        real_text.main(["--text", "x", "--minutes=1", f"--match={match}", f"--base-dir={tmp_path}"])
        assert asked == [("hybrid", steps[0]), ("attention", steps[1])]


# --- helpers

def test_peak_growth_counts_what_is_alive_at_once():
    def fn():
        a = torch.zeros(1000)
        b = a + 1  # both alive: 8000
        del a
        c = b.view(10, 100)[1:]  # a view takes no memory
        c.add_(1)
        return (b * 2).sum()  # b and b * 2: 8000, and the sum: 4
    assert measure.peak_growth(fn, CPU) == 8004
    assert measure.peak_growth(lambda: [torch.zeros(1000) for _ in range(5)], CPU) == 20_000


def test_raw_numbers_are_written_with_what_gave_them_and_read_back(tmp_path):
    @dataclass
    class Flags:
        depth: int = 4

    rows = [{"case": "ours", "seconds": [0.1, 0.25]}, {"case": "a peer", "error": "RuntimeError: no"}]
    source = measure.provenance(measure.command_line("bench.x", ["--depth=4", "--text", "a b"]))
    measure.write_results(str(tmp_path / "results" / "x.json"), source, Flags(), rows, agreed=3)
    found = json.loads((tmp_path / "results" / "x.json").read_text())
    check_provenance(found)
    assert found["rows"] == rows and found["agreed"] == 3 and found["config"] == {"depth": 4}
    assert found["command"] == "python -m bench.x --depth=4 --text 'a b'"
    assert found["versions"]["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    measure.write_results("", source, Flags(), rows)
    assert [path.name for path in tmp_path.iterdir()] == ["results"], "without --json nothing is written"


def test_the_commands_that_regenerate_the_results_are_ones_the_benchmarks_take():
    text = (ROOT / "bench" / "results" / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    python -m (bench\.\w+) (.*)$", text, re.MULTILINE)
    files = [parser_of(importlib.import_module(module).Config).parse_args(shlex.split(flags)).json
             for module, flags in commands]
    assert len(files) == len(set(files))
    kept = {f"bench/results/{path.name}" for path in (ROOT / "bench" / "results").glob("*.json")}
    assert set(files) == kept, "each file has its command, and each command its file"


def test_the_results_in_the_repository_say_what_gave_them():
    for path in (ROOT / "bench" / "results").glob("*.json"):
        found = json.loads(path.read_text())
        check_provenance(found)
        assert f"--json=bench/results/{path.name}" in found["command"], f"{path.name}: the command writes another file"


def test_cases_take_turns_and_warm_up_first():
    calls = []
    seconds = measure.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, rounds=3,
                                  warmup=2)
    assert "".join(calls) == "aabb" + "ababab" and [len(times) for times in seconds.values()] == [3, 3]


def test_text_batches_are_text_moved_on_by_one_and_lively_models_have_no_zeros():
    (x, y), (x2, _) = (lambda stream: (next(stream), next(stream)))(measure.text_batches(2, 16, CPU))
    assert x.shape == y.shape == (2, 16) and torch.equal(x[:, 1:], y[:, :-1]) and x.max() < 256
    assert not torch.equal(x, x2)
    assert all(p.any() for p in measure.random_model(GPTConfig.from_depth(2, vocab_size=300), CPU).parameters())


@pytest.mark.parametrize("number, text", [(None, "-"), (0.5, "0.5"), (1234, "1.23K"), (541_000, "541K"),
                                          (2.8587e9, "2.86G"), (7.88e14, "788T"), (3e18, "3,000,000T")])
def test_numbers_are_shown_for_people(number, text):
    assert measure.si(number) == text
