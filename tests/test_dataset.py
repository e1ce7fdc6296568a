"""Shards made of the user's own files and of the small world keep every document; bad input is named.

Covers nanochat/dataset: documents.py, importing.py, readers.py, shards.py, and the commands of __main__.py.
test_download.py covers download.py.
"""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc

import pytest

from nanochat.cli import run_main
from nanochat.dataset import Documents, importing, iter_documents, shard_paths, shards
from nanochat.dataset.__main__ import main
from nanochat.dataset.importing import cut, import_files, make_small_world
from nanochat.dataset.shards import data_dir, read_source, shard_name, write_source
from nanochat.errors import UserError

BOOK = "\n\n".join(f"Paragraph {i}: " + "words and words, " * 20 + "and an end." for i in range(60))


def quiet(*_):
    pass


def imported(paths, folder, **options):
    """Import; return the documents (train, val)."""
    import_files(paths, folder, say=quiet, **options)
    return list(iter_documents("train", folder)), list(iter_documents("val", folder))


def everything(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def parquet(path, columns):
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.table(columns), path)


@pytest.fixture
def notes(tmp_path):
    """A folder of every format; the documents in it are 'document 0' to 'document 19', each with its own body."""
    folder = tmp_path / "notes"
    (folder / "deeper" / "yet").mkdir(parents=True)
    texts = [f"document {i}\n\nwith ünïcode, 日本語 and a body of {i * i}" for i in range(20)]
    (folder / "a.txt").write_text(texts[0] + "\n", encoding="utf-8")
    (folder / "b.md").write_bytes(b"\xef\xbb\xbf" + texts[1].replace("\n", "\r\n").encode())  # from Windows
    (folder / "deeper" / "c.txt.gz").write_bytes(gzip.compress(texts[2].encode()))
    (folder / "deeper" / "d.jsonl").write_text("".join(json.dumps({"text": t, "id": 1}) + "\n" for t in texts[3:7])
                                               + "\n")
    (folder / "deeper" / "e.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps({"text": t}, ensure_ascii=False)
                                                                           for t in texts[7:11]).encode()))
    (folder / "deeper" / "yet" / "f.json").write_text(json.dumps([{"text": t} for t in texts[11:13]] + texts[13:15]))
    (folder / "g.json.gz").write_bytes(gzip.compress(json.dumps([texts[15]]).encode()))
    parquet(folder / "h.parquet", {"id": [1, 2, 3, 4, 5], "text": [*texts[16:], None]})
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.txt").write_text("not this")
    (folder / ".git").mkdir()
    (folder / ".git" / "x.txt").write_text("nor this")
    (folder / "empty.txt").write_text(" \n")
    return folder, texts


def test_every_format_comes_out_as_it_went_in(notes, tmp_path):
    folder, texts = notes
    train, val = imported([folder], tmp_path / "out")
    assert sorted(train + val) == sorted(texts) and len(val) >= 1
    assert train != sorted(train, key=texts.index)  # shuffled
    assert {path.name for path in (tmp_path / "out").iterdir()} == {shard_name(0), shard_name(1), "source.json"}


def test_import_says_what_it_left_out_and_what_it_made(notes, tmp_path):
    said = []
    import_files([notes[0]], tmp_path / "out", say=said.append)
    assert "picture.png" in said[0] and "2 empty documents" in said[1] and "for validation" in said[-1]


def test_same_document_stays_on_its_side_of_the_split(tmp_path):
    texts = [f"text number {i}" for i in range(500)]
    for name, order in (("one", texts), ("two", texts[::-1] + [f"more {i}" for i in range(300)])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in order))
    train, val = imported([tmp_path / "one.jsonl"], tmp_path / "a", val_fraction=0.1)
    train_too, val_too = imported([tmp_path / "two.jsonl"], tmp_path / "b", val_fraction=0.1)
    assert 25 < len(val) < 75 and set(val) == set(val_too) & set(texts)
    assert sorted(train + val) == sorted(texts) and not set(train) & set(val)


def test_copies_of_a_document_are_on_one_side(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": f"text {i % 50}"}) for i in range(500)))
    train, val = imported([tmp_path / "x.jsonl"], tmp_path / "out", val_fraction=0.2)
    assert len(train) + len(val) == 500 and not set(train) & set(val)


def test_one_validation_document_at_least_and_one_to_train_on(tmp_path):
    for fraction in (1e-9, 1 - 1e-9):
        for i in range(3):
            (tmp_path / f"{i}.txt").write_text(f"number {i}")
        train, val = imported([tmp_path / f"{i}.txt" for i in range(3)], tmp_path / f"out{fraction}",
                              val_fraction=fraction)
        assert min(len(train), len(val)) == 1 and len(train) + len(val) == 3


def test_separator_ends_documents_and_long_ones_stay_whole(tmp_path):
    texts = ["one\n\ntwo <|doc|> inside a line", "x" * 3_000_000 + "\nend", "three"]
    (tmp_path / "books.txt").write_text("<|doc|>\n" + "\n<|doc|>\r\n".join(texts) + "\n  <|doc|>\n")
    train, val = imported([tmp_path / "books.txt"], tmp_path / "out", doc_separator="<|doc|>")
    assert sorted(train + val) == sorted(texts)


def test_single_document_is_cut_at_paragraph_ends(tmp_path):
    (tmp_path / "book.txt").write_text(BOOK)
    said = []
    import_files([tmp_path / "book.txt"], tmp_path / "out", say=said.append)
    parts = [*iter_documents("train", tmp_path / "out"), *iter_documents("val", tmp_path / "out")]
    assert any("one document" in line for line in said)
    assert len(parts) > 10 and all(part.startswith("Paragraph ") for part in parts)
    assert sorted("\n\n".join(parts).split("\n\n")) == sorted(BOOK.split("\n\n"))


@pytest.mark.parametrize("text", [BOOK, BOOK.replace("\n\n", "\n"), BOOK.replace("\n\n", " "), "x" * 5000, "short", ""])
def test_cut_loses_only_white_space(text):
    parts = list(cut(text))
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert len(text) < 3000 or len(parts) > 1


def test_many_buckets_and_shards_hold_the_same_documents(tmp_path, monkeypatch):
    texts = [f"document {i} " + "x" * (i % 300) for i in range(3000)]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    monkeypatch.setattr(importing, "BUCKET_BYTES", 20_000)
    monkeypatch.setattr(shards, "SHARD_CHARS", 100_000)
    train, val = imported([tmp_path / "x.jsonl"], tmp_path / "out")
    assert len(shard_paths("train", tmp_path / "out")) > 4
    assert sorted(train + val) == sorted(texts)
    firsts = [int(t.split()[1]) for t in train[:300]]
    assert max(firsts) > 2500 and min(firsts) < 300  # the shuffle reaches over everything


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    dice = random.Random(0)
    with open(tmp_path / "x.jsonl", "w") as file:
        for _ in range(15_000):
            file.write(json.dumps({"text": dice.randbytes(250).hex()}) + "\n")
    monkeypatch.setattr(importing, "BUCKET_BYTES", 1 << 18)
    monkeypatch.setattr(shards, "GROUP_CHARS", 1 << 18)
    monkeypatch.setattr(importing, "_file_digest", str)  # reads in pieces of 4 MiB, whatever the size
    make_small_world(tmp_path / "first", 1, say=quiet)  # what modules take is not the question
    tracemalloc.start()
    try:
        import_files([tmp_path / "x.jsonl"], tmp_path / "out", say=quiet)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "x.jsonl").stat().st_size > 7_500_000 and peak < 6_000_000, peak


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "bad \\ud83d half"}\n{"text": "good \\ud83d\\ude00 pair"}\n')
    train, val = imported([tmp_path / "x.jsonl"], tmp_path / "out")
    assert sorted(train + val) == ["bad \ufffd half", "good 😀 pair"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "shift_jis", "euc_jp"])
def test_other_encodings_are_read_when_named(tmp_path, encoding):
    for i in range(2):
        (tmp_path / f"{i}.txt").write_bytes(f"吾輩は猫である {i}\n名前はまだ無い".encode(encoding))
    train, val = imported([tmp_path / "0.txt", tmp_path / "1.txt"], tmp_path / "out", encoding=encoding)
    assert sorted(train + val) == [f"吾輩は猫である {i}\n名前はまだ無い" for i in range(2)]


# ---- bad input

def fails(tmp_path, match, path=None, **options):
    """The import of `path` raises one clear line, and what lay in the folder lies there still."""
    out = tmp_path / "out"
    (tmp_path / "good.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    import_files([tmp_path / "good.jsonl"], out, say=quiet)
    before = everything(out)
    with pytest.raises(UserError, match=match) as error:
        import_files([path if path is not None else tmp_path / "bad"], out, replace=True, say=quiet, **options)
    assert "\n" not in str(error.value)
    assert everything(out) == before and list(tmp_path.glob(".out.[no]*")) == []


def test_missing_path_is_named(tmp_path):
    fails(tmp_path, "bad does not exist")


def test_empty_folder_is_named(tmp_path):
    (tmp_path / "bad").mkdir()
    fails(tmp_path, "nothing to read in .*bad.*\\.jsonl")


def test_unknown_suffix_is_named(tmp_path):
    (tmp_path / "x.docx").write_bytes(b"PK")
    fails(tmp_path, "x.docx is of no known format: .txt", tmp_path / "x.docx")


def test_only_empty_documents_is_an_error(tmp_path):
    (tmp_path / "x.txt").write_text("\n \n")
    fails(tmp_path, "no text in .*x.txt", tmp_path / "x.txt")


def test_one_short_document_is_an_error(tmp_path):
    (tmp_path / "x.txt").write_text("just this")
    fails(tmp_path, "one document, too short", tmp_path / "x.txt")


def test_all_documents_the_same_is_an_error(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(["the same"] * 9))
    fails(tmp_path, "all 9 documents are the same", tmp_path / "x.json")


def test_another_encoding_is_named_with_the_byte(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"a" * 2_000_000 + "caf\u00e9 au lait".encode("cp1252"))
    fails(tmp_path, "x.txt is not utf-8: byte 2000003 cannot be decoded.*--encoding cp1252", path)
    path.write_bytes("吾輩は猫である。名前はまだ無い。".encode("shift_jis"))
    fails(tmp_path, "x.txt is not utf-8: byte 0 .*--encoding cp932", path)
    path.write_bytes("plain text".encode("utf-16"))
    fails(tmp_path, "x.txt is not utf-8: byte 0 .*--encoding utf-16", path)
    path.write_bytes("truncated é".encode()[:-1])
    fails(tmp_path, "x.txt is not utf-8: byte 10 ", path)
    zipped = tmp_path / "y.txt.gz"
    zipped.write_bytes(gzip.compress(b"abc\xff"))
    fails(tmp_path, "y.txt.gz is not utf-8: byte 3 of the unpacked text", zipped)


def test_unknown_encoding_is_named(tmp_path):
    (tmp_path / "x.txt").write_text("text")
    fails(tmp_path, "encoding 'klingon' is unknown", tmp_path / "x.txt", encoding="klingon")
    fails(tmp_path, "encoding 'hex' is unknown", tmp_path / "x.txt", encoding="hex")


@pytest.mark.parametrize("harm", ["cut", "flip", "not gzip"])
def test_corrupt_gzip_is_named(tmp_path, harm):
    data = gzip.compress(random.Random(0).randbytes(5000).hex().encode())
    data = {"cut": data[:3000], "flip": data[:2000] + bytes([data[2000] ^ 255]) + data[2001:],
            "not gzip": b"hello"}[harm]
    (tmp_path / "x.txt.gz").write_bytes(data)
    fails(tmp_path, "x.txt.gz is not a complete gzip file", tmp_path / "x.txt.gz")


@pytest.mark.parametrize("harm", ["cut", "flip", "not parquet", "empty"])
def test_corrupt_parquet_is_named(tmp_path, harm):
    path = tmp_path / "x.parquet"
    parquet(path, {"text": [f"{i} some text" for i in range(3000)]})
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-100], "flip": data[:4] + b"\xff" * 60 + data[64:], "not parquet": b"hello" * 9,
                      "empty": b""}[harm])
    fails(tmp_path, "x.parquet is not a complete parquet file", path)


def test_line_that_is_not_json_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n\n{"text": "cut\n')
    fails(tmp_path, "x.jsonl, line 3 is not JSON", tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n["text"]\n')
    fails(tmp_path, "x.jsonl, line 2 holds list", tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text('{"text": {"a": 1}}\n')
    fails(tmp_path, "x.jsonl, line 1: 'text' holds dict", tmp_path / "x.jsonl")


def test_json_that_is_no_array_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"text": "a"}\n{"text": "b"}')
    fails(tmp_path, "x.json is not JSON .*name it .jsonl", tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"text": "a"}')
    fails(tmp_path, "x.json holds dict, not an array", tmp_path / "x.json")


def test_missing_column_is_named_with_those_there(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"title": "a", "body": "b"}\n')
    fails(tmp_path, "x.jsonl, line 1 has no 'text', only 'title', 'body': .*--text-column", tmp_path / "x.jsonl")
    parquet(tmp_path / "x.parquet", {"title": ["a"], "body": ["b"], "n": [1]})
    fails(tmp_path, "x.parquet has no column 'text', only 'title', 'body', 'n'", tmp_path / "x.parquet")
    fails(tmp_path, "column 'n' holds int64, not text", tmp_path / "x.parquet", text_column="n")
    parquet(tmp_path / "y.parquet", {"title": ["a", "b"], "body": ["1", "2"]})
    train, val = imported([tmp_path / "y.parquet"], tmp_path / "other", text_column="title")
    assert sorted(train + val) == ["a", "b"]


@pytest.mark.parametrize("fraction", [0, 1, -1, 2, float("nan")])
def test_bad_fraction_is_refused(tmp_path, fraction):
    fails(tmp_path, "val_fraction", tmp_path / "good.jsonl", val_fraction=fraction)


def test_document_beyond_the_limit_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat.dataset.readers.DOCUMENT_BYTES", 1 << 21)
    (tmp_path / "x.txt").write_text("line\n" * 500_000)
    fails(tmp_path, "x.txt holds a document of more than 2.1 MB: name the line .*--doc-separator", tmp_path / "x.txt")
    fails(tmp_path, "no line holds only '<|doc|>'".replace("|", r"\|"), tmp_path / "x.txt", doc_separator="<|doc|>")


# ---- what is there stays

def test_same_import_again_is_already_done(notes, tmp_path):
    out = tmp_path / "out"
    imported([notes[0]], out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    said = []
    import_files([notes[0]], out, say=said.append)
    assert "already done" in said[-1] and before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


def test_other_import_needs_replace(notes, tmp_path):
    out = tmp_path / "out"
    imported([notes[0]], out)
    before = everything(out)
    (notes[0] / "a.txt").write_text("changed")
    with pytest.raises(UserError, match="already holds other text.*--to FOLDER.*--replace"):
        imported([notes[0]], out)
    with pytest.raises(UserError, match="already holds other text"):
        make_small_world(out, 10, say=quiet)
    assert everything(out) == before
    train, val = imported([notes[0]], out, replace=True)
    assert "changed" in train + val and len(train + val) == 20
    assert [path.name for path in tmp_path.glob(".out*")] == [".out.lock"]


def test_damaged_import_can_be_made_again(notes, tmp_path):
    out = tmp_path / "out"
    expected = imported([notes[0]], out)
    os.truncate(out / shard_name(0), 100)
    with pytest.raises(UserError, match=r"shard_00000.*another size.*dataset import .*--replace"):
        shard_paths("train", out)
    assert imported([notes[0]], out) == expected


def test_made_shards_never_mix_with_fetched_ones_or_other_files(notes, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for source, title in (("fineweb-edu", "FineWeb-Edu"), ("climbmix", "ClimbMix")):
        write_source(out, {"source": source})
        with pytest.raises(UserError, match=title):
            imported([notes[0]], out, replace=True)
    (out / "source.json").unlink()
    (out / shard_name(0)).write_bytes(b"")
    with pytest.raises(UserError, match="unknown origin"):
        imported([notes[0]], out, replace=True)
    (out / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="other things than shards .letter.txt"):
        imported([notes[0]], out, replace=True)
    for place in (out / "letter.txt", out / "letter.txt" / "below"):
        with pytest.raises(UserError, match="letter.txt.* cannot be written"):
            imported([notes[0]], place)


def test_source_that_cannot_be_read_is_an_error(notes, tmp_path):
    imported([notes[0]], tmp_path / "out")
    for content in ("{", "[]", "{}"):
        (tmp_path / "out" / "source.json").write_text(content)
        with pytest.raises(UserError, match="source.json cannot be read"):
            shard_paths("train", tmp_path / "out")


def test_kill_between_the_two_renames_is_mended(notes, tmp_path):
    out = tmp_path / "out"
    imported([notes[0]], out)
    old = list(iter_documents("train", out))
    for new_is_complete in (False, True):
        out.rename(tmp_path / ".out.old")
        (tmp_path / ".out.new").mkdir(exist_ok=True)
        if new_is_complete:
            imported([notes[0] / "deeper"], tmp_path / "x")
            (tmp_path / ".out.new").rmdir()
            (tmp_path / "x").rename(tmp_path / ".out.new")
        assert (list(iter_documents("train", out)) == old) is not new_is_complete
    imported([notes[0]], out, replace=True)
    assert [path.name for path in tmp_path.glob(".out*")] == [".out.lock"]


def run(code, tmp_path, **options):
    return subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE,
                            env=os.environ | {"PYTHONPATH": os.getcwd()}, **options)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_import_leaves_what_was_there(notes, tmp_path):
    out = tmp_path / "out"
    imported([notes[0]], out)
    before = everything(out)
    code = ("from nanochat.dataset.importing import make_small_world; from pathlib import Path; print(1, flush=True)\n"
            "make_small_world(Path('out'), 10_000_000, replace=True)")
    process = run(code, tmp_path)
    process.stdout.readline()
    while not list(tmp_path.glob(".out.new/shard_00000.parquet")):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert everything(out) == before
    make_small_world(out, 50, replace=True, say=quiet)
    assert len(list(iter_documents("train", out))) == 50
    assert [path.name for path in tmp_path.glob(".out*")] == [".out.lock"]


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits on Windows")
def test_full_disk_leaves_what_was_there(notes, tmp_path):
    out = tmp_path / "out"
    imported([notes[0]], out)
    before = everything(out)
    code = ("import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "from nanochat.dataset.importing import *; from nanochat.cli import run_main; from pathlib import Path\n"
            "run_main(lambda: make_small_world(Path('out'), 100_000, replace=True))")
    output, errors = (process := run(code, tmp_path)).communicate()
    assert process.returncode == 1 and "the disk is full" in errors and "Traceback" not in errors, errors
    assert everything(out) == before and [path.name for path in tmp_path.glob(".out*")] == [".out.lock"]
    big = tmp_path / "big.jsonl"
    big.write_text("\n".join(json.dumps({"text": f"{i} " * 50}) for i in range(2000)))
    code = code.replace("make_small_world(Path('out'), 100_000", "import_files(['big.jsonl'], Path('out')")
    output, errors = (process := run(code, tmp_path)).communicate()
    assert process.returncode == 1 and "the disk is full" in errors and "Traceback" not in errors, errors
    assert everything(out) == before and [path.name for path in tmp_path.glob(".out*")] == [".out.lock"]


# ---- the small world, reading, the command line

def test_small_world_validation_is_the_same_for_any_size(tmp_path):
    for docs in (30, 60):
        make_small_world(tmp_path / str(docs), docs, say=quiet)
    few, more = (list(iter_documents("train", tmp_path / name)) for name in ("30", "60"))
    assert len(few) == 30 and more[:30] == few
    val = list(iter_documents("val", tmp_path / "30"))
    assert val == list(iter_documents("val", tmp_path / "60")) and len(val) == 1000 and not set(val) & set(more)
    said = []
    make_small_world(tmp_path / "30", 30, say=said.append)
    assert "already done" in said[0]
    with pytest.raises(UserError, match="already holds"):
        make_small_world(tmp_path / "30", 30, seed=1, say=quiet)
    with pytest.raises(UserError, match="docs is 0"):
        make_small_world(tmp_path / "x", 0, say=quiet)


def test_no_text_names_the_three_ways_to_get_it(tmp_path):
    for folder in (None, tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="dataset -n 8.*dataset import PATH.*dataset small-world"):
            shard_paths("train", folder)


def test_folder_of_unknown_origin_is_read_with_its_last_shard_as_validation(tmp_path):
    for i in range(3):
        parquet(tmp_path / shard_name(i), {"text": [f"text {i}"]})
    assert list(iter_documents("train", tmp_path)) == ["text 0", "text 1"]
    assert list(iter_documents("val", tmp_path)) == ["text 2"]


@pytest.mark.parametrize("source, last, again", [("fineweb-edu", 1822, "-n 8`"),
                                                 ("climbmix", 6542, "-n 8 --source=climbmix`")])
def test_validation_shard_alone_is_no_training_text(tmp_path, source, last, again):
    parquet(tmp_path / shard_name(last), {"text": ["val"]})
    write_source(tmp_path, {"source": source})
    assert list(iter_documents("val", tmp_path)) == ["val"]
    with pytest.raises(UserError, match=f"no shard to train on.*{again}"):
        shard_paths("train", tmp_path)


@pytest.mark.parametrize("harm", ["footer", "page"])
def test_corrupt_shard_says_how_to_get_it_again(tmp_path, harm):
    make_small_world(tmp_path / "a", 500, say=quiet)
    path = tmp_path / "a" / shard_name(0)
    data = bytearray(path.read_bytes())
    data[-6 if harm == "footer" else len(data) // 2] ^= 1
    path.write_bytes(data)
    again = "dataset small-world --docs=500 --seed=0 --to=.*--replace"
    with pytest.raises(UserError, match=f"shard_00000.parquet is corrupt.*{again}"):
        list(iter_documents("train", tmp_path / "a"))


def test_shard_without_text_column_names_those_it_has(tmp_path):
    for i in range(2):
        parquet(tmp_path / shard_name(i), {"body": ["text"]})
    with pytest.raises(UserError, match="no column `text`, only body"):
        list(iter_documents("train", tmp_path))


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_ranks_share_the_documents_one_by_one(tmp_path, monkeypatch, world_size):
    monkeypatch.setattr(shards, "GROUP_ROWS", 16)
    make_small_world(tmp_path / "a", 101, say=quiet)
    documents = list(iter_documents("train", tmp_path / "a"))
    assert Documents(shard_paths("train", tmp_path / "a")).count == len(documents) == 101
    for rank in range(world_size):
        assert list(iter_documents("train", tmp_path / "a", rank, world_size)) == documents[rank::world_size]
    with pytest.raises(ValueError, match="rank"):
        next(iter_documents("train", tmp_path / "a", world_size, world_size))


def test_command_line_imports_and_makes_the_small_world(notes, tmp_path, capsys):
    main(["import", str(notes[0]), "--to", str(tmp_path / "out"), "--val_fraction=0.2", "--text-column", "text"])
    assert "for validation" in capsys.readouterr().out
    main(["small-world", "--docs", "20"])
    assert len(list(iter_documents("train"))) == 20 and read_source(data_dir())["source"] == "small-world"
    with pytest.raises(SystemExit) as end:
        run_main(lambda: main(["import", "nowhere"]))
    assert end.value.code == 1 and capsys.readouterr().err == "error: nowhere does not exist.\n"


@pytest.mark.parametrize("argv, words",
                         [(["--help"], ["-n", "import", "small-world"]),
                          (["import", "--help"], ["--doc-separator", "PATH"]),
                                         (["small-world", "--help"], ["--docs", "--seed"])])
def test_help_names_flags_and_commands(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(argv)
    out = capsys.readouterr().out
    assert end.value.code == 0 and all(word in out for word in words)


def test_nothing_is_fetched_unless_a_number_is_given(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2 and "--num-files" in capsys.readouterr().err
