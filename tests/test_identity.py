"""nanochat/dataset/identity.py and Task.identity: what a run was trained on is known again, and a change is named."""

import json
import os
import shutil

import pytest

from nanochat.dataset import data_dir, shard_paths
from nanochat.dataset.identity import changes, digest_of_file, identity_of_shards
from nanochat.errors import UserError
from scripts import base_train, chat_sft
from tasks import recipes
from tasks.base import Mixture, TaskSequence
from tasks.custom_json import CustomJSON
from tasks.small_world import WorldQuestions, WorldSums
from tasks.spelling import SpellingBee
from tasks.words import WORDS_FILE
from tests.test_stages import SFT, base, trained  # noqa: F401 (fixtures)
from tests.test_training import TINY

LINE = json.dumps([{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Iberis."}]) + "\n"


def test_a_digest_is_of_the_contents_alone(tmp_path):
    data = bytes(range(256)) * 100
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(data)
    os.utime(tmp_path / "b", (1, 1))
    assert digest_of_file(tmp_path / "a") == digest_of_file(tmp_path / "b")
    for at in (0, len(data) // 2, len(data) - 1):
        (tmp_path / "b").write_bytes(data[:at] + b"\xaa" + data[at + 1:])
        assert digest_of_file(tmp_path / "a") != digest_of_file(tmp_path / "b") or data[at] == 0xaa
    (tmp_path / "b").write_bytes(data + data[-256:])
    assert digest_of_file(tmp_path / "a") != digest_of_file(tmp_path / "b")
    (tmp_path / "empty").touch()
    assert len(digest_of_file(tmp_path / "empty")) == 12


def test_every_part_of_a_mixture_has_a_digest_that_its_seed_size_or_file_changes(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(LINE * 300)
    whole = Mixture([WorldQuestions("train", 0, 500), CustomJSON(path), CustomJSON(path), WorldSums("train", 0, 90)])
    names = whole.identity()
    assert list(names) == ["World-Questions", "mine.jsonl", "mine.jsonl 2", "World-Sums"]
    assert names == Mixture([WorldQuestions("train", 0, 500), CustomJSON(path), CustomJSON(path),
                             WorldSums("train", 0, 90)]).identity()
    assert WorldQuestions("train", 1, 500).identity() != WorldQuestions("train", 0, 500).identity()
    assert WorldQuestions("train", 0, 501).identity() != WorldQuestions("train", 0, 500).identity()
    assert WorldQuestions("train", 0, 500)[10:].identity() != WorldQuestions("train", 0, 500).identity()
    text = path.read_text()
    path.write_text(text[:7001] + text[7001:].replace("Iberis", "Iberiz", 1))  # one letter of one line of 300
    assert changes(names, TaskSequence([CustomJSON(path), CustomJSON(path)]).identity())[0].startswith(
        "mine.jsonl has changed (")


def test_a_list_of_words_counts_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    letters = "abcdefghijklmnop"
    words = [a + b + c for a in letters for b in letters for c in letters]
    (tmp_path / WORDS_FILE).write_text("\n".join(words))
    before = SpellingBee("train", 20, source="words_alpha").identity()
    (tmp_path / WORDS_FILE).write_text("\n".join([*words[:-1], "zebra"]))
    found = changes(before, SpellingBee("train", 20, source="words_alpha").identity())
    assert "SpellingBee, words of words_alpha has changed" in " ".join(found)


def test_what_changed_is_named_and_shards_may_arrive():
    before = {"a": "1", "b": "2", "text/shard_00000.parquet": "3"}
    assert changes(before, {**before, "text/shard_00001.parquet": "4"}) == []
    assert changes(before, {"a": "9", "text/shard_00000.parquet": "3", "c": "5"}) == [
        "a has changed (1 then, 9 now)", "b is gone", "c is new"]
    assert changes({str(i): "x" for i in range(9)}, {})[-1] == "4 more"


def cut_back(own, folder, step):
    for path in (own / folder / "d2").glob(f"*_{step:06d}*"):
        path.unlink()


def test_a_stage_does_not_resume_on_other_conversations_and_names_them(base, capsys):  # noqa: F811
    mine = base / "mine.jsonl"
    mine.write_text(LINE * 30)
    flags = [*SFT, "--fresh", f"--conversations={mine}", "--eval-metrics-every=-1"]
    chat_sft.main(flags)
    meta = json.loads((base / "chatsft_checkpoints" / "d2" / "meta_000003.json").read_text())
    assert meta["identity"]["training"].keys() >= {"tokenizer", "mine.jsonl", "World-Questions", "SpellingBee"}
    assert meta["identity"]["evaluation"].keys() >= {"World-Sums", "World-Choice"}
    cut_back(base, "chatsft_checkpoints", 6)
    flags.remove("--fresh")
    mine.write_text(LINE * 29 + LINE.replace("Iberis", "Iberiz"))
    with pytest.raises(UserError, match=r"d2 was trained on is not what it was: mine.jsonl has changed \(.*--fresh"):
        chat_sft.main(flags)
    assert not (base / "chatsft_checkpoints" / "d2" / "meta_000006.json").exists()
    (base / recipes.IDENTITY).write_text(LINE)
    mine.write_text(LINE * 30)
    with pytest.raises(UserError, match=f"{recipes.IDENTITY} is new"):
        chat_sft.main(flags)
    (base / recipes.IDENTITY).unlink()
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        sft = recipes.sft
        patch.setattr(recipes, "sft", lambda *args, **more: (sft(*args, **more)[0],
                                                             Mixture([WorldQuestions("test", 0, 9)])))
        chat_sft.main(flags)
    out = capsys.readouterr().out
    assert "is validated on is not what it was: World-Questions has changed" in out and "resuming from step 3" in out


def test_a_base_run_does_not_resume_on_another_shard(base):  # noqa: F811
    shards = shard_paths("train") + shard_paths("val")
    before = identity_of_shards(shards)
    meta = json.loads((base / "base_checkpoints" / "d2" / "meta_000002.json").read_text())
    assert meta["identity"]["training"].items() >= identity_of_shards(shard_paths("train")).items()
    assert meta["identity"]["evaluation"] == identity_of_shards(shard_paths("val"))
    shared = data_dir().resolve()
    data_dir().unlink()
    shutil.copytree(shared, data_dir(), copy_function=shutil.copyfile)
    assert identity_of_shards(shard_paths("train") + shard_paths("val")) == before       # a copy is the same
    path = shard_paths("train")[0]
    data = bytearray(path.read_bytes())
    data[10] ^= 1                                                                      # of the same size
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"is not what it was: text/{path.name} has changed"):
        base_train.main([*TINY, "--num-iterations=3", "--max-seq-len=128", "--total-batch-size=256"])
