"""The loader against a plain definition of its packing; stopped anywhere, it resumes with the very next row."""

import gc
import json
import os
import random
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from nanochat import dataloader
from nanochat.dataloader import PackedLoader, Packer, TextSource, reshard
from nanochat.dataset import Documents, shard_paths
from nanochat.dataset.shards import ShardWriter, shard_name, staged, write_source, writing
from nanochat.distributed import Ranks
from nanochat.errors import UserError

BOS = 256


class ByteTokenizer:
    """A token is a byte."""

    def __init__(self, name="bytes"):
        self.name = name

    def encode(self, texts, prepend=None):
        return [list(text.encode()) for text in texts]

    def get_bos_token_id(self):
        return BOS

    def fingerprint(self):
        return self.name


class FlatTokenizer(ByteTokenizer):
    def encode_flat(self, texts):
        rows = self.encode(texts)
        offsets = np.cumsum([0] + [len(row) for row in rows]).astype(np.int64)
        return np.array(sum(rows, []), dtype=np.uint32), offsets


def one_of(rank=0, world_size=1):
    return Ranks(rank, rank, world_size, torch.device("cpu"))


def make_text(folder, count, seed=0, longest=60):
    """Shards of `count` documents whose text says their number; returns the training texts."""
    dice = random.Random(seed)
    texts = ["" if dice.random() < 0.05 else f"{i}:" + chr(97 + i % 26) * dice.randrange(longest) for i in range(count)]
    with writing(folder), staged(folder) as new:
        writer = ShardWriter(new)
        for text in texts:
            writer.add(text)
        for i in range(5):
            writer.add_validation(f"val {i} " + "y" * 40)
        write_source(new, {"source": "import", "shards": writer.close()})
    return texts


@pytest.fixture
def small(monkeypatch):
    """Row groups, shards and buffer so small that many of each come into play."""
    monkeypatch.setattr("nanochat.dataset.shards.GROUP_CHARS", 700)
    monkeypatch.setattr("nanochat.dataset.shards.SHARD_CHARS", 4000)
    monkeypatch.setattr("nanochat.dataset.documents.PIECE_DOCUMENTS", 6)
    monkeypatch.setattr(dataloader, "BUFFER_DOCUMENTS", 9)


@pytest.fixture
def text(tmp_path, small):
    folder = tmp_path / "text"
    return folder, make_text(folder, 400)


def rows_of(loader, batches):
    """(rows, T+1), put together from inputs and targets."""
    rows = []
    for _ in range(batches):
        inputs, targets = next(loader)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        rows += torch.cat([inputs, targets[:, -1:]], 1).tolist()
    return rows


def load(folder, rank=0, world_size=1, batch_size=3, sequence_len=24, tokenizer=None, **options):
    source = TextSource(tokenizer or ByteTokenizer(), "train", folder)
    return PackedLoader(source, batch_size, sequence_len, ranks=one_of(rank, world_size), **options)


def plain_packing(documents, row_tokens, buffer_documents):
    """The definition: a list, searched from end to end for each choice. Yields rows."""
    documents = iter(documents)
    buffer = []  # oldest first
    while True:
        row = []
        while len(row) < row_tokens:
            while len(buffer) < buffer_documents and (document := next(documents, None)) is not None:
                if document:
                    buffer.append(document)
            if not buffer:
                return
            room = row_tokens - len(row)
            sizes = [min(len(document) + 1, row_tokens) for document in buffer]
            fitting = [size for size in sizes if size <= room]
            document = buffer.pop(sizes.index(max(fitting or sizes)))
            row += [BOS, *document[:room - 1]]
            if document[room - 1:]:
                buffer.append(document[room - 1:])
        yield row


@pytest.mark.parametrize("longest", [8, 60, 400])
def test_packing_is_the_plain_definition(small, longest):
    dice = random.Random(longest)
    documents = [[dice.randrange(256) for _ in range(1 + dice.randrange(longest))] for _ in range(250)]
    for row_tokens in (2, 7, 25, 64):
        packer = Packer(((i, np.array(d)) for i, d in enumerate(documents)), BOS, row_tokens)
        row, rows = np.empty(row_tokens, dtype=np.int64), []
        while packer.fill(row):
            rows.append(row.tolist())
        assert rows == list(plain_packing(documents, row_tokens, 9))
        assert packer.counts["rows"] == len(rows)
        kept = sum(token != BOS for row in rows for token in row)
        assert packer.counts["tokens"] == sum(map(len, documents))
        assert 0 <= packer.counts["tokens"] - kept < row_tokens  # only the last, incomplete row is lost


def test_loader_hands_out_the_packed_documents(text):
    folder, texts = text
    rows = []
    with load(folder, loop=False) as loader:
        for inputs, targets in loader:
            rows += torch.cat([inputs, targets[:, -1:]], 1).tolist()
    expected = list(plain_packing([list(t.encode()) for t in texts], 25, 9))
    assert len(rows) == len(expected) // 3 * 3 and rows == expected[:len(rows)]
    assert all(row[0] == BOS for row in rows)


def test_buffer_stays_small_where_documents_are_books(small, monkeypatch):
    monkeypatch.setattr(dataloader, "BUFFER_TOKENS", 100)
    books = [np.full(90, i) for i in range(50)]
    packer = Packer(enumerate(books), BOS, 11)
    row, seen = np.empty(11, dtype=np.int64), []
    while packer.fill(row):
        assert packer._buffered_tokens <= 200
        assert packer._buffered_tokens == sum(len(item[4]) for item in packer._buffer)
        seen.append(int(row[1]))
    assert seen[:4] == [0, 1, 0, 1]  # long documents take turns


def test_flat_and_listed_ids_give_the_same_batches(text):
    folder, _ = text
    assert rows_of(load(folder), 30) == rows_of(load(folder, tokenizer=FlatTokenizer()), 30)


def test_prefetch_changes_nothing(text):
    folder, _ = text
    made = []
    for prefetch in (1, 2, 16):
        loader = load(folder, prefetch=prefetch)
        made.append((rows_of(loader, 25), loader.state_dict()))
        loader.close()
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("world_size", [1, 3])
def test_stopped_at_any_step_the_next_row_is_the_same(text, world_size):
    folder, _ = text
    rank = world_size - 1
    loader = load(folder, rank, world_size)
    steps = 400 // world_size  # more than three passes
    states, batches = [loader.state_dict()], []
    for _ in range(steps):
        batches.append(rows_of(loader, 1))
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert loader.passes >= 2
    for step in [*range(9), *range(9, steps - 3, 23)]:
        again = load(folder, rank, world_size, state=states[step])
        assert [rows_of(again, 1) for _ in range(3)] == batches[step:step + 3], step
        assert again.state_dict() == states[step + 3]
        again.close()


def test_state_counts_what_was_handed_out_not_what_was_made_ahead(text):
    folder, _ = text
    loader = load(folder, prefetch=8)
    next(loader)
    time.sleep(0.2)
    state = loader.state_dict()
    following = rows_of(loader, 1)
    assert rows_of(load(folder, state=state), 1) == following


def test_state_goes_on_with_another_batch_size(text):
    folder, _ = text
    loader = load(folder, batch_size=4)
    first = rows_of(loader, 5)
    rest = rows_of(load(folder, batch_size=2, state=loader.state_dict()), 10)
    assert first + rest == rows_of(load(folder, batch_size=4), 10)


def test_state_is_small(tmp_path):
    make_text(tmp_path / "t", 3000, longest=300)
    loader = load(tmp_path / "t", sequence_len=256)
    rows_of(loader, 20)
    assert len(json.dumps(loader.state_dict())) < 10_000


def all_but(lost, texts, tokens):
    """True if `tokens`, bos aside, are the bytes of `texts`, each as often, but for at most `lost` that are missing."""
    wanted = Counter(b"".join(text.encode() for text in texts))
    found = Counter(token for token in tokens if token != BOS)
    return not found - wanted and (wanted - found).total() <= lost


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_are_disjoint_and_cover_everything(text, monkeypatch, world_size):
    folder, texts = text
    monkeypatch.setattr(dataloader, "BUFFER_DOCUMENTS", 500)
    for rank in range(world_size):
        loader = load(folder, rank, world_size, batch_size=1, sequence_len=7, loop=False)
        tokens = [token for inputs, targets in loader for token in [*inputs[0].tolist(), targets[0, -1].item()]]
        assert all_but(7, texts[rank::world_size], tokens)


@pytest.mark.parametrize("before, after", [(3, 2), (2, 5), (4, 1), (1, 3)])
def test_another_number_of_ranks_loses_and_repeats_nothing(text, before, after):
    folder, texts = text
    states, tokens = [], []
    for rank in range(before):
        loader = load(folder, rank, before, batch_size=1)
        tokens += [token for row in rows_of(loader, 2 + 3 * rank) for token in row]  # ranks at different places
        states.append(json.loads(json.dumps(loader.state_dict())))
        loader.close()
    for rank, state in enumerate(reshard(states, after)):
        loader = load(folder, rank, after, batch_size=1, sequence_len=1, state=state, loop=False)
        tokens += [token for batch in loader for token in (batch.inputs[0, 0].item(), batch.targets[0, 0].item())]
        loader.close()
    assert all_but(after, texts, tokens)  # rows of two tokens: at most one token is left at each end


def test_reshard_needs_every_rank(text):
    folder, _ = text
    states = [load(folder, rank, 3).state_dict() for rank in range(2)]
    with pytest.raises(UserError, match="all 3 ranks"):
        reshard(states, 2)


def test_later_passes_come_in_another_order_with_the_same_documents(text):
    folder, texts = text
    documents = Documents(shard_paths("train", folder))
    passes = [[t for _, piece in documents.walk(400 * turn, 1, 400 * (turn + 1)) for t in piece] for turn in range(3)]
    assert passes[0] == texts
    assert passes[1] != texts != passes[2] != passes[1]
    assert sorted(passes[1]) == sorted(passes[2]) == sorted(texts)


def test_picked_documents_are_those_walked_past(text):
    documents = Documents(shard_paths("train", text[0]))
    walked = dict(pair for numbers, texts in documents.walk(5, 3, 1500) for pair in zip(numbers, texts))
    assert list(walked) == list(range(5, 1500, 3))
    some = list(walked)[::7][::-1]
    assert documents.pick(some) == {number: walked[number] for number in some}


@pytest.mark.parametrize("change, message", [
    ({"rank": 1}, "rank 1"),
    ({"world_size": 2}, "reshard"),
    ({"split": "val"}, "split"),
    ({"tokenizer": "other"}, "another tokenizer"),
    ({"data": "0" * 16}, "not what it was"),
    ({"waiting": 7}, "no state"),
])
def test_state_of_something_else_is_refused(text, change, message):
    state = load(text[0]).state_dict() | change
    with pytest.raises(UserError, match=message):
        load(text[0], state=state)
    with pytest.raises(UserError, match="no state"):
        load(text[0], state={"next": 3})


def test_more_shards_may_come_during_the_first_pass(text):
    folder, _ = text
    paths = shard_paths("train", folder)
    (folder / "source.json").unlink()  # as an unfinished download: the last shard is still validation
    last = paths.pop()
    hidden = last.with_suffix(".later")
    last.rename(hidden)
    loader = load(folder)
    early, first = loader.state_dict(), rows_of(loader, 10)
    middle = loader.state_dict()
    rows_of(loader, 200)
    late = loader.state_dict()
    assert late["next"] > late["documents"]
    hidden.rename(last)
    assert rows_of(load(folder, state=early), 10) == first
    rows_of(load(folder, state=middle), 3)
    with pytest.raises(UserError, match="first pass only"):
        load(folder, state=late)


def test_one_pass_ends_and_stays_ended(text):
    loader = load(text[0], loop=False)
    assert len(list(loader)) > 10
    with pytest.raises(StopIteration):
        next(loader)


def test_text_shorter_than_a_row_goes_round(tmp_path):
    folder = tmp_path / "tiny"
    make_text(folder, 2, seed=1, longest=5)
    rows = rows_of(load(folder, batch_size=2, sequence_len=50), 3)
    assert all(len(row) == 51 and row[0] == BOS for row in rows)
    assert list(load(folder, batch_size=1, sequence_len=50, loop=False)) == []


def test_text_of_empty_documents_is_an_error(tmp_path):
    with writing(tmp_path / "e"), staged(tmp_path / "e") as new:
        writer = ShardWriter(new)
        for _ in range(5):
            writer.add("")
        writer.add_validation("x")
        write_source(new, {"source": "import", "shards": writer.close()})
    with pytest.raises(UserError, match="empty"):
        next(load(tmp_path / "e"))


def test_error_in_the_thread_is_raised_by_next(text):
    class Broken(ByteTokenizer):
        def encode(self, texts, prepend=None):
            if any(t.startswith("200:") for t in texts):
                raise RuntimeError("no such token")
            return super().encode(texts)
    loader = load(text[0], tokenizer=Broken())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such token"):
            for _ in range(1000):
                next(loader)


def test_corrupt_shard_is_named(text):
    folder, _ = text
    path = folder / shard_name(1)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=shard_name(1)):
        rows_of(load(folder), 300)


def test_bad_sizes_are_refused(text):
    for name in ("batch_size", "sequence_len", "prefetch"):
        with pytest.raises(UserError, match=name):
            load(text[0], **{name: 0})


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_closing_and_losing_a_loader_end_its_thread(text):
    before = len(loader_threads())
    loader = load(text[0])
    next(loader)
    assert len(loader_threads()) == before + 1
    loader.close()
    loader.close()
    assert len(loader_threads()) == before
    with pytest.raises(ValueError, match="closed"):
        next(loader)
    other = load(text[0])
    next(other)
    del other
    gc.collect()
    assert len(loader_threads()) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_loader_goes_on_from_the_last_batch(text):
    loader = load(text[0])
    next(loader)
    expected = rows_of(load(text[0], state=loader.state_dict()), 2)
    gets, puts = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(puts, json.dumps(rows_of(loader, 2)).encode())
        os._exit(0)
    os.close(puts)
    with os.fdopen(gets) as pipe:
        assert json.loads(pipe.read()) == expected
    os.waitpid(child, 0)
    assert rows_of(loader, 2) == expected


@pytest.mark.gpu
def test_batches_on_the_gpu_are_those_on_the_cpu(text):
    device = torch.device("cuda", 0)
    loader = PackedLoader(TextSource(ByteTokenizer(), "train", text[0]), 3, 24, ranks=Ranks(0, 0, 1, device))
    expected = rows_of(load(text[0]), 50)
    got = []
    for _ in range(50):
        inputs, targets = next(loader)
        assert inputs.device == targets.device == device and inputs.is_contiguous()
        got.append(torch.cat([inputs, targets[:, -1:]], 1))
    assert torch.cat(got).cpu().tolist() == expected
