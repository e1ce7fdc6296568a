"""Bits per byte, likelihoods of choices, the rows of a validation, against their definitions written out."""

import math
import os

import pytest
import torch

from nanochat.chat_data import ConversationSource
from nanochat.dataloader import PackedBatch, PackedLoader, TextSource
from nanochat.dataset.__main__ import main as dataset
from nanochat.distributed import Ranks
from nanochat.errors import UserError
from nanochat.evaluation import loss
from nanochat.evaluation.loss import EvalRows, evaluate_bpb, log_likelihoods
from nanochat.files import base_dir
from nanochat.tokenizer import RustBPETokenizer
from tasks.small_world import WorldQuestions
from tests.helpers import small_model
from tests.test_distributed import start_ranks

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


class DigraphTokenizer:
    """One token a letter, but "th" is one; 0 is bos."""

    def get_bos_token_id(self):
        return 0

    def encode(self, text, prepend=None):
        if isinstance(text, list):
            return [self.encode(part, prepend) for part in text]
        return [prepend] + [1 if letter == "\1" else ord(letter) - 30 for letter in text.replace("th", "\1")]


def test_bits_per_byte_is_nats_over_bytes_of_the_targets_that_count():
    model = small_model()
    token_bytes = torch.randint(1, 5, (97,))
    token_bytes[90:] = 0  # specials
    batches = [(torch.randint(97, (2, 9)), torch.randint(-1, 97, (2, 9))) for _ in range(3)]
    nats, size = 0.0, 0
    with torch.no_grad():
        for inputs, targets in batches:
            logp = model(inputs).double().log_softmax(-1)
            for row in range(2):
                for t in range(9):
                    target = int(targets[row, t])
                    if target >= 0 and token_bytes[target] > 0:
                        nats -= float(logp[row, t, target])
                        size += int(token_bytes[target])
    alone = Ranks(0, 0, 1, torch.device("cpu"))
    assert evaluate_bpb(model, batches, token_bytes, alone) == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    with pytest.raises(UserError, match="no text to evaluate"):
        evaluate_bpb(model, [(batches[0][0], torch.full((2, 9), 95))], token_bytes)


@pytest.mark.parametrize("logits_per_batch", [1, 3000, 1 << 24])
def test_likelihoods_are_those_of_one_choice_at_a_time(logits_per_batch):
    model, letters = small_model(), DigraphTokenizer()
    prompts = ["a cat", "t", "the end of it"]
    # "t" + "h" is one token: the choice reaches back
    choices = [["s", "nip", "ch", "sup"], ["h", "o", "hus"], [" all", " al", "!"]]
    got = log_likelihoods(model, letters, prompts, choices, logits_per_batch)
    for prompt, options, row in zip(prompts, choices, got):
        head = letters.encode(prompt, 0)
        for option, value in zip(options, row):
            ids = letters.encode(prompt + option, 0)
            start = next((i for i, (a, b) in enumerate(zip(head, ids)) if a != b), len(head))
            with torch.no_grad():
                logp = model(torch.tensor([ids])).log_softmax(-1)[0]
            assert value == pytest.approx(sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids))), abs=1e-3)


# ---- the rows of a validation

class Told(TextSource):
    """Writes down each call of `encode`."""

    def encode(self, texts):
        with open(base_dir() / "encoded", "a") as file:
            file.write(f"{os.getpid()}\n")
        return super().encode(texts)


def encoded():
    path = base_dir() / "encoded"
    processes = set(path.read_text().split()) if path.exists() else set()
    path.unlink(missing_ok=True)
    return len(processes)


def files():
    return sorted((base_dir() / "eval_rows").glob("*"))


@pytest.fixture
def tokenizer():
    dataset(["small-world", "--docs=200"])
    return RustBPETokenizer.train_from_iterator(["the house of the family is in the town by the river"] * 3, 290)


def plain(source, B, T, tokens, cut):
    """Batches of the first rows of a loader; −1 in the rows that fill up the last batch."""
    with PackedLoader(source, 1, T, ranks=ALONE, loop=False, cut=cut) as loader:
        rows = [row for _, row in zip(range(tokens // T), loader)]
    bos, batches = torch.full((1, T), source.bos), []
    for first in range(0, len(rows), B):
        part = rows[first:first + B]
        filling = [torch.full((1, T), -1)] * (B - len(part))
        batches.append(PackedBatch(torch.cat([*(row.inputs for row in part), *[bos] * len(filling)]),
                                   torch.cat([*(row.targets for row in part), *filling])))
    return batches


def same(rows, batches):
    rows = list(rows)
    assert len(rows) == len(batches)
    for (inputs, targets), wanted in zip(rows, batches):
        assert torch.equal(inputs, wanted.inputs) and torch.equal(targets, wanted.targets)
        assert inputs.dtype == torch.int64 and targets.is_contiguous()


@pytest.mark.parametrize("kind", ["text", "conversations"])
def test_eval_rows_are_those_of_a_loader(tokenizer, kind):
    source, cut = TextSource(tokenizer, "val"), True
    if kind == "conversations":
        source, cut = ConversationSource(tokenizer, WorldQuestions("test", size=9)), False
    batches = plain(source, 3, 40, 40 * 13 + 7, cut)
    assert (batches[-1].targets[-1] == -1).all()  # the last batch is filled up
    rows = EvalRows(source, 3, 40, 40 * 13 + 7, ranks=ALONE, cut=cut)
    for _ in range(2):
        same(rows, batches)
    assert len(files()) == (kind == "text")


def test_text_is_tokenised_again_only_for_other_rows(tokenizer):
    def made(B=2, T=30, tokens=600, tokenizer=tokenizer):
        same(EvalRows(Told(tokenizer, "val"), B, T, tokens, ranks=ALONE),
             plain(TextSource(tokenizer, "val"), B, T, tokens, True))
        return encoded()

    assert [made(), made()] == [1, 0]
    assert [made(B=3), made(T=20), made(tokens=300), made()] == [0, 1, 1, 0]
    other = RustBPETokenizer.train_from_iterator(["other words"] * 3, 270)
    assert [made(tokenizer=other), made(), made(tokenizer=other)] == [1, 0, 0]
    files()[0].write_bytes(files()[0].read_bytes()[:1000])
    files()[1].write_bytes(b"")
    assert sum([made(), made(T=20), made(tokens=300), made(tokenizer=other)]) == 2
    shard = Told(tokenizer, "val").paths[-1]
    os.utime(shard, ns=(1, 1))  # as if it were another file of the same size
    assert [made(), made()] == [1, 0]


def test_old_rows_are_removed(tokenizer, monkeypatch):
    monkeypatch.setattr(loss, "KEPT_EVAL_ROWS", 2)
    for T in (20, 21, 22, 23):
        EvalRows(TextSource(tokenizer, "val"), 1, T, 100, ranks=ALONE)
        os.utime(max(files(), key=lambda path: path.stat().st_mtime_ns), ns=(T, T))
    assert sorted(path.stat().st_mtime_ns for path in files()) == [22, 23]


def test_a_source_that_is_too_short_makes_no_rows(tokenizer):
    source = ConversationSource(tokenizer, WorldQuestions("test", size=1))
    assert list(EvalRows(source, 50, 500, 50 * 500, ranks=ALONE, cut=True)) == []
    T = 1 << 20
    rows = EvalRows(TextSource(tokenizer, "val"), 2, T, 1, ranks=ALONE)
    assert list(rows) == list(EvalRows(TextSource(tokenizer, "val"), 2, T, 1, ranks=ALONE)) == []


def _share(ranks, tokenizer, base):
    os.environ["NANOCHAT_BASE_DIR"] = str(base)  # the processes come from a server with the environment of its start
    rows = EvalRows(Told(tokenizer, "val"), 2, 30, 7 * 60 + 30, ranks=ranks)
    same(rows, plain(TextSource(tokenizer, "val"), 2, 30, 7 * 60 + 30, True)[ranks.rank::ranks.world_size])
    source = ConversationSource(tokenizer, WorldQuestions("test", size=30))
    rows = EvalRows(source, 2, 60, 5 * 120, ranks=ranks, cut=False)
    same(rows, plain(source, 2, 60, 5 * 120, False)[ranks.rank::ranks.world_size])

    class Broken(Told):
        def encode(self, texts):
            raise UserError("this text is broken")

    with pytest.raises(UserError, match="this text is broken"):
        EvalRows(Broken(tokenizer, "val"), 3, 30, 700, ranks=ranks)


def test_two_ranks_tokenise_once_and_share(tokenizer):
    start_ranks(2, _share, tokenizer, base_dir())
    assert encoded() == 1 and len(files()) == 1
