"""The loader against a plain definition of its packing; stopped anywhere, it resumes with the very next row."""

import gc
import itertools
import json
import os
import random
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataloader
from nanochat.dataloader import PackedLoader, Packer, TextSource, merged
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


def load(folder, rank=0, world_size=1, batch_size=3, sequence_len=24, tokenizer=None, seed=0, **options):
    source = TextSource(tokenizer or ByteTokenizer(), "train", folder, seed=seed)
    return PackedLoader(source, batch_size, sequence_len, ranks=one_of(rank, world_size), **options)


def plain_packing(documents, row_tokens, buffer_documents, cut=True, order=2):
    """The definition: a list, searched from end to end for each choice. Yields rows; −1 is padding."""
    documents = iter(documents)
    buffer = []  # oldest first
    while True:
        row = []
        while len(row) < row_tokens:
            while len(buffer) < buffer_documents and (document := next(documents, None)) is not None:
                if len(document):
                    buffer.append(list(document))
            room = row_tokens - len(row)
            sizes = [min(len(document) + 1, row_tokens) for document in buffer]
            fitting = [size for size in sizes if size <= room]
            if row and not fitting and not cut:
                row += [-1] * room
                break
            if not buffer:
                return
            document = buffer.pop(0 if not row and order == 2 else sizes.index(max(fitting or sizes)))
            row += [BOS, *document[:room - 1]]
            if document[room - 1:]:
                buffer.append(document[room - 1:])
        yield row


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("longest", [8, 60, 400])
def test_packing_is_the_plain_definition(small, longest, order):
    dice = random.Random(longest)
    documents = [[dice.randrange(256) for _ in range(1 + dice.randrange(longest))] for _ in range(250)]
    for row_tokens, cut in ((2, True), (7, True), (25, False), (64, True)):
        packer = Packer(((i, np.array(d)) for i, d in enumerate(documents)), BOS, row_tokens, cut, order)
        row, rows = np.empty(row_tokens, dtype=np.int64), []
        while packer.fill(row):
            rows.append(row.tolist())
        assert rows == list(plain_packing(documents, row_tokens, 9, cut, order))
        assert packer.counts["rows"] == len(rows)
        kept = sum(token not in (BOS, -1) for row in rows for token in row)
        assert packer.counts["tokens"] == sum(map(len, documents))
        assert 0 <= packer.counts["tokens"] - kept < row_tokens  # only the last, incomplete row is lost


class ListSource:
    """Documents in a list, pass after pass in the same order."""

    split, folder, shards, planned, bos, tokenizer_fingerprint = "train", "a list", 1, 1, BOS, "bytes"

    def __init__(self, documents):
        self.made, self.count = documents, len(documents)

    def walk(self, start, stop):
        while stop is None or start < stop:
            numbers = list(range(start, start + 3 if stop is None else min(start + 3, stop)))
            yield numbers, [self.made[number % self.count] for number in numbers]
            start += 3

    def pick(self, numbers):
        return {number: self.made[number % self.count] for number in numbers}

    def encode(self, documents):
        return [np.array(document, dtype=np.uint32) for document in documents]

    def fingerprint(self, shards=None):
        return "the list"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_steps_are_the_same_rows_on_any_number_of_ranks_which_may_change(data):
    """Documents longer than a row, empty ones, fewer than ranks; other ranks and sizes after each resume."""
    lengths = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any), "lengths")
    documents = [[(7 * i + j) % 256 for j in range(length)] for i, length in enumerate(lengths)]
    T, cut = data.draw(st.integers(1, 12), "T"), data.draw(st.booleans(), "cut")
    plain = plain_packing(itertools.cycle(documents), T + 1, 5, cut)
    state, done = None, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataloader, "BUFFER_DOCUMENTS", 5)
        for _ in range(3):
            world_size, B = data.draw(st.integers(1, 4), "ranks"), data.draw(st.integers(1, 3), "B")
            micro_batches = data.draw(st.integers(world_size, 6), "micro-batches")
            steps = data.draw(st.integers(1, 3), "steps")
            made, states = {}, []
            for rank in range(world_size):
                with PackedLoader(ListSource(documents), B, T, ranks=one_of(rank, world_size), cut=cut, state=state,
                                  rows_per_step=B * micro_batches) as loader:
                    for step in range(steps):
                        for number in range(rank, micro_batches, world_size):
                            inputs, targets = next(loader)
                            real = torch.cat([inputs[:, :1], targets], 1)
                            assert torch.equal(inputs, torch.where(real < 0, BOS, real)[:, :-1])
                            made[step, number] = real.tolist()
                    states.append(json.loads(json.dumps(loader.state_dict())))
            rows = [row for _, batch in sorted(made.items()) for row in batch]
            assert rows == list(itertools.islice(plain, B * micro_batches * steps))
            assert all(found == states[0] for found in states)
            state, done = states[0], done + len(rows)
            assert state["rows"] == done


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
        assert packer._buffered_tokens == sum(len(tokens) for _, _, tokens in packer._documents.values())
        assert len(packer._sizes) == len(packer._documents)
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
def test_ranks_are_disjoint_and_cover_everything(text, world_size):
    folder, texts = text
    tokens = []
    for rank in range(world_size):
        loader = load(folder, rank, world_size, batch_size=1, sequence_len=7, loop=False)
        tokens += [token for inputs, targets in loader for token in [*inputs[0].tolist(), targets[0, -1].item()]]
    assert all_but(7, texts, tokens)


def test_a_position_within_a_step_is_none(text):
    loader = load(text[0], rows_per_step=6)
    next(loader)
    with pytest.raises(ValueError, match="between steps"):
        loader.state_dict()
    next(loader)
    assert loader.state_dict()["rows"] == 6
    with pytest.raises(UserError, match="7 rows a step do not make a batch of 3 rows"):
        load(text[0], rows_per_step=7)
    with pytest.raises(UserError, match="each of 3 ranks"):
        load(text[0], 0, 3, rows_per_step=6)


def test_no_document_waits_long(small):
    """A document leaves the buffer after as many rows as the buffer holds documents, also one that fits nowhere."""
    dice = random.Random(3)
    documents = [np.full(1 if i % 2 else dice.randrange(10, 40), i % 256) for i in range(2000)]
    packer, row = Packer(enumerate(documents), BOS, 31), np.empty(31, dtype=np.int64)
    while packer.last < 1990 and packer.fill(row):
        assert packer.last - min(number for number, _ in packer.buffered()) < 9 * 12  # rows of up to 12 documents


def old_states(folder, texts, world_size, T, rows):
    """What versions before the one order of rows saved after so many rows of each rank, and the tokens read by then."""
    states, tokens, now = [], [], load(folder).state_dict()
    for rank in range(world_size):
        stream = ((number, np.array(list(texts[number].encode()))) for number in range(rank, len(texts), world_size)
                  if texts[number])
        packer, row = Packer(stream, BOS, T + 1, order=1), np.empty(T + 1, dtype=np.int64)
        packer.last = rank - world_size
        for _ in range(rows[rank]):
            assert packer.fill(row)
            tokens += row.tolist()
        states.append({key: now[key] for key in ("split", "tokenizer", "shards", "documents", "data")} | {
            "rank": rank, "world_size": world_size, "batch_size": 1, "sequence_len": T,
            "next": packer.last + world_size, "waiting": [list(entry) for entry in packer.buffered()]})
    return json.loads(json.dumps(states)), tokens


@pytest.mark.parametrize("before, after", [(3, 2), (4, 1), (1, 3)])
def test_states_of_each_rank_from_before_are_merged_and_nothing_is_lost_or_read_twice(text, before, after):
    folder, texts = text
    states, tokens = old_states(folder, texts, before, 24, [2 + 3 * rank for rank in range(before)])
    state = merged(states[::-1])
    for rank in range(after):
        loader = load(folder, rank, after, batch_size=1, sequence_len=1, state=state, loop=False)
        tokens += [token for batch in loader for token in (batch.inputs[0, 0].item(), batch.targets[0, 0].item())]
        loader.close()
    assert all_but(after, texts, tokens)  # rows of two tokens: at most one token is left at each end


def test_the_state_of_one_rank_from_before_goes_on_with_the_very_next_row(text):
    folder, texts = text
    expected = list(plain_packing([list(t.encode()) for t in texts], 25, 9, order=1))
    for rows in (0, 1, 40):
        states, _ = old_states(folder, texts, 1, 24, [rows])
        loader = load(folder, state=merged(states))
        assert rows_of(loader, 3) == expected[rows:rows + 9]
        again = load(folder, state=json.loads(json.dumps(loader.state_dict())))
        assert rows_of(again, 3) == rows_of(loader, 3) == expected[rows + 9:rows + 18]


def test_states_from_before_are_needed_of_every_rank_and_of_one_run(text):
    states, _ = old_states(*text, 3, 24, [1, 1, 1])
    with pytest.raises(UserError, match="all 3 ranks"):
        merged(states[:2])
    with pytest.raises(UserError, match="not of one run"):
        merged([*states[:2], states[2] | {"data": "0" * 16}])
    for nothing in ([{}], [3]):
        with pytest.raises(UserError, match="no states"):
            merged(nothing)


def test_later_passes_come_in_another_order_with_the_same_documents(text):
    folder, texts = text
    documents = Documents(shard_paths("train", folder))
    passes = [[t for _, piece in documents.walk(400 * turn, 400 * (turn + 1)) for t in piece] for turn in range(3)]
    assert passes[0] == texts
    assert passes[1] != texts != passes[2] != passes[1]
    assert sorted(passes[1]) == sorted(passes[2]) == sorted(texts)


def test_a_seed_gives_another_order_of_the_same_documents(text):
    folder, texts = text
    orders = {}
    for seed in (0, 1, 2):
        source = Documents(shard_paths("train", folder), seed=seed)
        orders[seed] = [each for _, piece in source.walk(0, 2 * source.count) for each in piece]
        again = Documents(shard_paths("train", folder), seed=seed)
        picked = again.pick(range(0, 2 * source.count, 7))  # in another order than they are read here
        assert all(orders[seed][number] == each for number, each in picked.items())
        for epoch in (orders[seed][:400], orders[seed][400:]):
            assert Counter(epoch) == Counter(texts)
    assert orders[0][:400] == texts
    for a, b in itertools.combinations(orders.values(), 2):
        assert a[:400] != b[:400]
    named = [int(each.partition(":")[0]) for each in orders[1][:400] if each]
    assert sum(after == before + 1 for before, after in itertools.pairwise(named)) < 40  # within row groups, too


def test_an_order_of_a_seed_holds_on_any_number_of_ranks_and_after_a_resume(text):
    folder, _ = text
    alone = rows_of(load(folder, seed=5, rows_per_step=6), 20)
    assert alone != rows_of(load(folder, seed=0, rows_per_step=6), 20)
    turns = [rows_of(load(folder, rank, 2, seed=5, rows_per_step=6), 10) for rank in range(2)]
    assert [row for turn in range(0, 30, 3) for rank in turns for row in rank[turn:turn + 3]] == alone
    before = load(folder, seed=5, rows_per_step=6)
    rows = rows_of(before, 8)
    state = json.loads(json.dumps(before.state_dict()))
    assert rows + rows_of(load(folder, seed=5, rows_per_step=6, state=state), 12) == alone
    for other in (0, 6):
        with pytest.raises(UserError, match="is not what it was"):
            load(folder, seed=other, rows_per_step=6, state=state)
    with pytest.raises(UserError, match="--data-seed needs the whole text"):
        TextSource(ByteTokenizer(), "train", folder, expected=2, seed=1)


def test_picked_documents_are_those_walked_past(text):
    documents = Documents(shard_paths("train", text[0]))
    walked = dict(pair for numbers, texts in documents.walk(5, 1500) for pair in zip(numbers, texts))
    assert list(walked) == list(range(5, 1500))
    some = list(walked)[::7][::-1]
    assert documents.pick(some) == {number: walked[number] for number in some}


@pytest.mark.parametrize("change, message", [
    ({"order": 3}, "newer version"),
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
