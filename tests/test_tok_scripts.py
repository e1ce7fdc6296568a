"""scripts/tok_train.py and scripts/tok_eval.py, run on a tiny folder of text."""

import json

import pyarrow
import pyarrow.parquet as parquet
import pytest
import tiktoken

from nanochat.cli import run_main
from nanochat.dataset import documents as dataset
from nanochat.errors import UserError
from nanochat.files import base_dir
from nanochat.tokenizer import RustBPETokenizer, get_token_bytes, get_tokenizer, tokenizer, tokenizer_dir
from scripts import tok_eval, tok_train

if tokenizer._rustbpe() is None:
    pytestmark = pytest.mark.skip(reason="rustbpe is not built; bash dev/setup.sh builds it")


@pytest.fixture
def some_text():
    """Two shards in the base directory, 30 documents to train on and 10 for validation."""
    documents = [f"Note {i}: the cat sat on mat {i * 37}, and 日本 was far away.\n" * 20 for i in range(40)]
    dataset.data_dir().mkdir(parents=True)
    for i, part in enumerate((documents[:30], documents[30:])):
        parquet.write_table(pyarrow.table({"text": part}), dataset.data_dir() / f"shard_{i:05}.parquet")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_tokenizer_is_trained_saved_and_described(some_text, capsys, monkeypatch):
    monkeypatch.setattr(tok_train, "read_source", lambda folder: {"source": "notes", "folder": str(folder)})
    tok_train.main(["--vocab-size=330"])
    trained = get_tokenizer()
    assert trained.get_vocab_size() == 330 and len(get_token_bytes()) == 330
    documents = list(dataset.iter_documents("train"))
    assert trained.fingerprint() == RustBPETokenizer.train_from_iterator(documents, 330).fingerprint()
    meta = json.loads((tokenizer_dir() / "meta.json").read_text())
    assert meta["chars"] == sum(map(len, documents)) and meta["docs"] == len(documents)
    assert meta["fingerprint"] == trained.fingerprint() and meta["vocab_size"] == 330 and meta["seconds"] >= 0
    assert meta["source"] == {"source": "notes", "folder": str(dataset.data_dir())}
    shown = capsys.readouterr().out
    assert "330 tokens" in shown and str(tokenizer_dir()) in shown
    assert sorted(path.name for path in base_dir().iterdir() if path.name.startswith("tokenizer")) == ["tokenizer"]


def test_documents_and_characters_are_cut_and_it_is_said(some_text, capsys):
    tok_train.main(["--vocab_size=300", "--doc_cap=50", "--max_chars=175"])
    meta = json.loads((tokenizer_dir() / "meta.json").read_text())
    assert (meta["chars"], meta["docs"]) == (175, 4)
    cut = [document[:50] for document in dataset.iter_documents("train")][:3]
    assert meta["chars_uncut"] > 2 * meta["chars"] and "--doc_cap=0 uses all of it" in capsys.readouterr().out
    cut.append(list(dataset.iter_documents("train"))[3][:25])
    assert get_tokenizer().fingerprint() == RustBPETokenizer.train_from_iterator(cut, 300).fingerprint()


def test_a_vocabulary_the_text_cannot_fill_is_said(some_text, capsys, recwarn):
    tok_train.main(["--vocab_size=5000", "--doc_cap=0"])
    size = get_tokenizer().get_vocab_size()
    assert 265 < size < 5000
    assert "smaller than the 5,000 asked for" in capsys.readouterr().out and not recwarn.list
    assert json.loads((tokenizer_dir() / "meta.json").read_text())["vocab_size"] == size


@pytest.mark.parametrize("argv, message",
                         [(["--vocab_size=264"], "--vocab-size is 264"), (["--max_chars=0"], "--max-chars is 0"),
                          (["--doc_cap=-1"], "--doc-cap is -1")])
def test_wrong_flags_are_refused_and_nothing_is_written(some_text, argv, message):
    with pytest.raises(UserError, match=message):
        tok_train.main(argv)
    assert not tokenizer_dir().exists()


def test_no_text_is_one_clear_line(capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: tok_train.main([]))
    assert stop.value.code == 1
    shown = capsys.readouterr().err.strip()
    assert shown.startswith("error: ") and "\n" not in shown and "base_data" in shown


def test_empty_documents_are_no_text(monkeypatch):
    monkeypatch.setattr(tok_train, "iter_documents", lambda split: iter(["", ""]))
    with pytest.raises(UserError, match="no text"):
        tok_train.main(["--vocab_size=300"])
    assert not tokenizer_dir().exists()


def test_a_broken_tokenizer_never_takes_the_place_of_a_good_one(some_text, monkeypatch):
    tok_train.main(["--vocab_size=300"])
    before = files_of(tokenizer_dir())

    def broken(self, texts):
        raise UserError("this tokenizer is broken")
    monkeypatch.setattr(RustBPETokenizer, "check_round_trip", broken)
    with pytest.raises(UserError, match="broken"):
        tok_train.main(["--vocab_size=400"])
    assert files_of(tokenizer_dir()) == before
    assert [path.name for path in base_dir().iterdir() if path.name.startswith("tokenizer")] == ["tokenizer"]


def test_an_interrupted_training_leaves_the_tokenizer_that_was_there(some_text, monkeypatch):
    tok_train.main(["--vocab_size=300"])
    before = files_of(tokenizer_dir())

    def interrupted(split):
        yield "some text"
        raise KeyboardInterrupt
    monkeypatch.setattr(tok_train, "iter_documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tok_train.main(["--vocab_size=300"])
    assert files_of(tokenizer_dir()) == before


def test_another_tokenizer_that_stood_there_is_kept(some_text, capsys):
    tok_train.main(["--vocab_size=300"])
    first, files = get_tokenizer().fingerprint(), files_of(tokenizer_dir())
    tok_train.main(["--vocab_size=300"])  # the same again: nothing to keep
    assert not (base_dir() / f"tokenizer_{first[:8]}").exists()
    tok_train.main(["--vocab_size=310"])
    kept = base_dir() / f"tokenizer_{first[:8]}"
    assert RustBPETokenizer.from_directory(kept).fingerprint() == first
    assert {name: files_of(kept)[name] for name in files if name != "meta.json"} == {
        name: files[name] for name in files if name != "meta.json"}
    assert get_tokenizer().get_vocab_size() == 310 and str(kept) in capsys.readouterr().out
    (tokenizer_dir() / "tokenizer.json").write_text("{")  # one that cannot be read is somebody's work too
    tok_train.main(["--vocab_size=320"])
    assert len([path for path in base_dir().iterdir() if path.name.startswith("tokenizer_unread")]) == 1


def test_evaluation_covers_every_text_and_writes_it_down(some_text, capsys, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(base_dir() / "empty"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    tok_train.main(["--vocab_size=400"])
    capsys.readouterr()
    tok_eval.main(["--max_chars=2000"])
    result = json.loads((tokenizer_dir() / "eval.json").read_text(encoding="utf-8"))
    assert set(result["texts"]) == {*tok_eval.TEXTS, "train shards", "val shards"}
    assert result["fingerprint"] == get_tokenizer().fingerprint()
    for name, row in result["texts"].items():
        assert row["bytes_per_token"] == pytest.approx(row["bytes"] / row["tokens"], abs=1e-4), name
    assert result["texts"]["Japanese"]["bytes"] == len(tok_eval.TEXTS["Japanese"].encode())
    assert result["texts"]["train shards"]["bytes_per_token"] > result["texts"]["Korean"]["bytes_per_token"] >= 1
    shown = capsys.readouterr().out
    assert "GPT-2: left out" in shown and "GPT-4: left out" in shown and all(name in shown for name in result["texts"])


def test_evaluation_without_shards_says_what_is_left_out(some_text, capsys, monkeypatch):
    tok_train.main(["--vocab_size=400"])
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir() / "other"))
    with pytest.raises(UserError, match="tok_train"):
        tok_eval.main([])
    RustBPETokenizer.train_from_iterator(["the " * 10], 266).save(tokenizer_dir())
    tok_eval.main([])
    assert "train shards: left out" in capsys.readouterr().out


def test_evaluation_stands_beside_encodings_tiktoken_has(some_text, monkeypatch, capsys):
    tok_train.main(["--vocab_size=400"])
    byte_level = tiktoken.Encoding("gpt2", pat_str=r"(?s:.)", mergeable_ranks={bytes([b]): b for b in range(256)},
                                   special_tokens={})
    monkeypatch.setattr(tok_eval, "_cached_encoding", lambda name: byte_level if name == "gpt2" else None)
    tok_eval.main(["--max_chars=2000"])
    result = json.loads((tokenizer_dir() / "eval.json").read_text(encoding="utf-8"))
    assert {row["bytes_per_token_GPT-2"] for row in result["texts"].values()} == {1.0}
    assert "GPT-4: left out" in capsys.readouterr().out
