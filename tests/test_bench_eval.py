"""The benchmark of evaluation, and peers in all benchmarks, at a tiny size. No speed is asserted."""

import json
import sys

import pytest
import torch

from bench import core, decode, kernels, peer
from bench import eval as evaluation
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import tokenizer
from tests.conftest import ROOT
from tests.helpers import small_model
from tests.test_bench import run, table_of

TINY = ["--depth=1", "--vocab-size=700", "--max-seq-len=16", "--device-batch-size=2", "--max-per-task=3",
        "--problems=2", "--max-tokens=3",
        "--rounds=1", "--device=cpu"]

PEER = '''
import torch

import twin


class GPTConfig(__import__("nanochat_config").GPTConfig):
    pass


class GPT(twin.TwinGPT):
    def init_weights(self):
        self.__init__(self.config)

    def generate(self, tokens, max_tokens, temperature=1.0):
        ids = torch.tensor([tokens])
        for _ in range(max_tokens):
            ids = torch.cat([ids, self(ids)[:, -1:].argmax(-1)], dim=1)
            yield int(ids[0, -1])
'''


@pytest.fixture(scope="module")
def little_peer(tmp_path_factory):
    """A checkout that offers nanochat.gpt and nothing else: our twin under the published names."""
    folder = tmp_path_factory.mktemp("checkouts") / "little"
    (folder / "nanochat").mkdir(parents=True)
    (folder / "nanochat" / "__init__.py").write_text("")
    (folder / "twin.py").write_text((ROOT / "bench" / "twin.py").read_text())
    source = (ROOT / "nanochat" / "config.py").read_text()
    config = source[source.index("@dataclass\nclass GPTConfig"):]
    imports = "import math\nfrom dataclasses import asdict, dataclass, fields\nfrom typing import Any\n"
    names = 'ROPE_BASE, MIXERS, GATES, GATE_INITS = 10_000.0, {}, ("rank-one",), ("published",)'
    (folder / "nanochat_config.py").write_text(f"{imports}\n{names}\n\n\n{config}\n")
    (folder / "nanochat" / "gpt.py").write_text(PEER)
    return folder


def needs_rustbpe():
    if tokenizer._rustbpe() is None:
        pytest.skip("rustbpe is not built; bash dev/setup.sh builds it")


@pytest.mark.long
def test_all_evaluations_are_in_one_table_of_ratios(capsys, tmp_path, little_peer):
    needs_rustbpe()
    text, found = run(evaluation.main, capsys, tmp_path, *TINY, f"--peer={little_peer}")
    header, *lines = table_of(text)
    assert header == ["evaluation", "ours", "beside", "its speed", "ratio", "agreement"]
    beside = [line[2] for line in lines]
    assert {"twin, float32 eager", "all-attention, float32", "one prompt at a time",
            "peer little, float32 eager"} <= set(beside)
    for row in found["rows"]:
        assert row["ratio"] == row["ours"] / row["theirs"] > 0
    bits = next(row for row in found["rows"] if row["beside"].startswith("twin"))["agree"].split(" and ")
    assert abs(float(bits[0]) - float(bits[1])) < 2e-3, "the twin and ours measured something else"
    judged = next(row for row in found["rows"] if row["what"].startswith("CORE"))
    assert judged["agree"] == "12 of 12 answers"
    assert {task["kind"] for task in judged["tasks"]} == {"multiple_choice", "schema", "language_modeling"}


def test_a_bundle_takes_the_place_of_random_text_and_different_answers_are_told(capsys, tmp_path, monkeypatch):
    needs_rustbpe()
    (tmp_path / "eval_data").mkdir()
    task = evaluation.random_tasks(tmp_path / "eval_data", 4)[1]
    listed = [{"label": "mine", "dataset_uri": task.path.name, "num_fewshot": [0], "icl_task_type": task.kind}]
    (tmp_path / "core.yaml").write_text(json.dumps({"icl_tasks": listed}))
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nmine,25\n")
    flags = [*TINY, "--only=core", f"--bundle={tmp_path}"]
    _, found = run(evaluation.main, capsys, tmp_path, *flags)
    assert [task["task"] for task in found["rows"][0]["tasks"]] == ["mine"]
    assert found["rows"][0]["agree"] == "3 of 3 answers"
    monkeypatch.setattr(core, "same", lambda a, b: 0)
    with pytest.raises(UserError, match="different answers"):
        evaluation.main(flags)


@pytest.mark.long
def test_decoding_of_a_peer_is_tabled(capsys, tmp_path, little_peer):
    text, found = run(decode.main, capsys, tmp_path, "--depth=1", "--vocab-size=97", "--prompt=6", "--new-tokens=4",
                      "--batches=1",
                      "--naive-points=1", "--prefills=1", "--device=cpu", f"--peer={little_peer}")
    rows = [row for row in found["rows"] if row["case"].startswith("peer little, ")]
    assert [row["how"] for row in rows] == ["float32 eager", "bfloat16 autocast eager"]
    for row in rows:
        assert row["tokens_per_second"] > 0 and row["vs_published"] > 0 and row["prefill_seconds"] > 0
        assert len(row["seconds"]) == 4
    assert sum(line[0].startswith("peer ") for line in table_of(text)) == 2


def test_the_whole_model_of_a_peer_is_timed_beside_ours(monkeypatch):
    asked = []

    def run_peer(path, what, shape, B, T, **more):
        asked.append((path, what, B, T))
        return [{"peer": "p", "how": "good", "seconds": [1.0]},
                {"peer": "p", "how": "bad", "error": "RuntimeError: no"}]
    monkeypatch.setattr(peer, "run_peer", run_peer)
    shape = kernels.Shape(GPTConfig.from_depth(1, vocab_size=97), 2, 5, 1, torch.float32, torch.device("cpu"))
    rows = kernels.model_rows(shape, 1, False, "there")
    assert asked == [("there", "forward", 2, 5), ("there", "pass", 2, 5)]
    assert {(row["pass"], row["how"]) for row in rows if "seconds" in row} == {
        (what, how) for what in ("forward", "pass") for how in ("ours", kernels.TWIN, "peer p, good")}
    assert sum("RuntimeError: no" in line for line in kernels.shown(rows).splitlines()) == 2
    assert kernels.too_far(rows, torch.float32) == []


def test_a_peer_with_an_engine_decodes_many_rows_and_one_without_says_that_it_cannot(monkeypatch):
    model = small_model()
    assert [len(column) for column, _ in peer.columns(model, [1, 2], 3, 4)] == [3] * 4
    monkeypatch.setitem(sys.modules, "nanochat.engine", None)
    assert len(list(peer.columns(model, [1, 2], 1, 4))) == 4
    job = {"what": "generate", "shape": {**model.config.to_dict(), "name": "x"}, "B": 2, "T": 3, "steps": 1,
           "warmup": 0,
           "threads": torch.get_num_threads(), "device": "cpu"}
    assert all("one sequence" in row["error"] for row in peer.main(job))


@pytest.mark.parametrize("main, flags, says", [
    (evaluation.main, ["--only=ppl"], "--only"), (evaluation.main, ["--vocab-size=9"], "--vocab-size"),
    (evaluation.main, ["--problems=0"], "--problems"),
    (evaluation.main, [*TINY, "--only=bpb", "--peer=nowhere"], "nowhere")])
def test_flags_that_make_no_sense_are_refused_in_words(main, flags, says):
    with pytest.raises(UserError, match=says):
        main(flags)
