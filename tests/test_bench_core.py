"""The benchmark of CORE runs at a tiny size and says what it promises. No speed is asserted."""

import json

import pytest

from bench import core
from nanochat.errors import UserError
from nanochat.tokenizer import RustBPETokenizer
from tests.test_bench import run, table_of
from tests.test_core_eval import WORDS, random_rows, task_of


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "eval_data").mkdir()
    for kind in ("multiple_choice", "language_modeling"):
        task_of(tmp_path / "eval_data", kind, random_rows(kind, 5), label=kind)
    tasks = [{"label": label, "dataset_uri": f"{label}.jsonl", "num_fewshot": [1], "icl_task_type": kind}
             for label, kind in (("multiple_choice",) * 2, ("language_modeling",) * 2, ("lost", "schema"))]
    (tmp_path / "core.yaml").write_text(json.dumps({"icl_tasks": tasks}))
    baselines = "multiple_choice,25\nlanguage_modeling,0\nlost,50\n"
    (tmp_path / "eval_meta_data.csv").write_text(f"Eval Task,Random baseline\n{baselines}")
    RustBPETokenizer.train_from_iterator([" ".join(WORDS)] * 3, 300).save(tmp_path / "tokenizer")
    return [f"--bundle={tmp_path}", f"--tokenizer={tmp_path / 'tokenizer'}", "--depth=1", "--sequence-len=64",
            "--device=cpu"]


def test_both_ways_are_tabled_with_how_many_answers_agree(capsys, tmp_path, flags):
    text, found = run(core.main, capsys, tmp_path, *flags, "--max-per-task=4", "--vocab-size=400")
    header, *rows = table_of(text)
    assert header == ["CORE task", "kind", "shots", "s", "s one at a time", "ratio", "same answers"]
    assert [row[0] for row in rows] == ["multiple_choice", "language_modeling", "all"]
    assert [row[-1] for row in rows] == ["4 of 4"] * 2 + ["8 of 8"]
    assert "V 400" in text and found["ratio"] == found["total"]["plain_seconds"] / found["total"]["seconds"] > 0


def test_different_answers_and_wrong_flags_are_told(monkeypatch, flags):
    for wrong, told in (("--vocab-size=9", "--vocab-size is 9"), ("--tasks=lost", "--tasks names 'lost'"),
                        ("--rounds=0", "at least 1")):
        with pytest.raises(UserError, match=told):
            core.main([*flags, wrong])
    monkeypatch.setattr(core, "same", lambda a, b: 0)
    with pytest.raises(UserError, match="came to different answers"):
        core.main([*flags, "--max-per-task=3", "--tasks=language_modeling"])
