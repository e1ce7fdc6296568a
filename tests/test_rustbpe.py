"""rustbpe trains the merges of the definition and gives tiktoken's ids, with streams, threads and clear errors.

Covers bench/tokenizer.py and bench/tokenizer_peer.py too.
"""

import collections
import gzip
import inspect
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.tokenizer import SPLIT_PATTERN

rustbpe = pytest.importorskip("rustbpe", reason="rustbpe is not built: bash dev/setup.sh")

DEFAULT_PATTERN = SPLIT_PATTERN.replace("{1,2}", "{1,3}")
PATTERNS = [SPLIT_PATTERN, DEFAULT_PATTERN, SPLIT_PATTERN.replace("{1,2}", "{1,4}"), r"\w+|\s+", r"(?s).+"]
TRICKY = "'sSdtTlLvVeErRmſK aé日ß٣½Ⅷ09 \t\r\n\v\u00a0\u3000\u2028\u0085\u0301.-!\"€😀\0\u200d"


def trained(texts, vocab_size, pattern=SPLIT_PATTERN, **more):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, pattern=pattern, **more)
    return tokenizer


def as_tiktoken(tokenizer):
    ranks = dict(tokenizer.get_mergeable_ranks())
    return tiktoken.Encoding("test", pat_str=tokenizer.get_pattern(), mergeable_ranks=ranks, special_tokens={})


def prose(n, seed=0):
    """n words, frequent and rare ones, in lines."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlué", k=rng.randint(1, 9))) for _ in range(3000)]
    return "".join(words[int(3000 * rng.random() ** 3)] + rng.choice([" ", " ", " ", ", ", "\n", "'s 12 "])
                   for _ in range(n))


def elsewhere(script, **environment):
    """What a script prints in a Python of its own, where `trained` and `prose` are at hand."""
    script = "\n".join([f"import random, rustbpe\nSPLIT_PATTERN = {SPLIT_PATTERN!r}", inspect.getsource(trained),
                        inspect.getsource(prose),
                        textwrap.dedent(script)])
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def naive_ranks(texts, vocab_size, pattern):
    """The definition: count all pairs, merge the most frequent one (the smallest among equals), begin again."""
    words = [list(piece.encode()) for text in texts for piece in regex.findall(pattern, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size:
        counts = collections.Counter(pair for word in words for pair in itertools.pairwise(word))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [len(tokens)]
                i += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return [(token, rank) for rank, token in enumerate(tokens)]


@pytest.fixture(scope="module")
def crossing():
    """Ranks whose merges cross every boundary between the tricky characters: a piece cut elsewhere gives other ids."""
    rng = random.Random(1)
    texts = ["".join(rng.choices(TRICKY, k=4000)) for _ in range(5)]
    return trained(texts, 4000, pattern=r"(?s).+").get_mergeable_ranks()


# ---- merges


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(st.sampled_from("aab cé1'\n"), max_size=40)
                      | st.text(st.sampled_from(TRICKY), max_size=10), max_size=5),
       pattern=st.sampled_from(PATTERNS))
def test_merges_are_those_of_the_definition(texts, pattern):
    assert trained(texts, 300, pattern).get_mergeable_ranks() == naive_ranks(texts, 300, pattern)


def test_merges_and_ids_equal_those_recorded_from_the_published_trainer(shared):
    for case in json.load(gzip.open(shared / "golden/bpe/merges.json.gz", "rt", encoding="utf-8")):
        texts = []
        for name in case["files"]:
            text = gzip.open(shared / "data" / name, "rt", encoding="utf-8-sig", newline="").read()
            texts += text.split("\n") if "each line" in case["read"] else [text]
        tokenizer = trained(texts, case["vocab_size"], case["pattern"])
        assert {token.hex(): rank for token, rank in tokenizer.get_mergeable_ranks()} == dict(case["mergeable_ranks"])
        for sample in case["encodings"]:
            assert tokenizer.encode(sample["text"]) == sample["ids"]
            assert tokenizer.decode(sample["ids"]) == sample["text"]


def test_number_of_threads_and_buffer_size_change_no_merge():
    script = """
        import hashlib
        texts = prose(60_000).splitlines()
        for buffer_size in (1, 100, 8192):
            ranks = trained(texts, 1500, buffer_size=buffer_size).get_mergeable_ranks()
            print(len(ranks), hashlib.sha256(repr(ranks).encode()).hexdigest())"""
    lines = [line for threads in ("1", "3") for line in elsewhere(script, RAYON_NUM_THREADS=threads).splitlines()]
    assert len(lines) == 6 and len(set(lines)) == 1 and lines[0].startswith("1500 ")


def test_one_long_text_gives_the_merges_of_its_lines():
    text = prose(150_000)  # over 262,144 bytes, so that threads share it
    assert len(text) > 600_000
    assert trained([text], 800).get_mergeable_ranks() == trained(text.splitlines(keepends=True),
                                                                 800).get_mergeable_ranks()


def test_training_ends_early_where_no_pair_is_left_and_again_replaces_all():
    tokenizer = trained(["ab ab"], 300)
    assert tokenizer.get_mergeable_ranks()[256:] == [(b"ab", 256), (b" ab", 257)] and tokenizer.vocab_size == 258
    tokenizer.train_from_iterator([], 300)
    assert tokenizer.vocab_size == 256 and tokenizer.get_pattern() == DEFAULT_PATTERN
    assert tokenizer.encode("hi") == [104, 105]
    tokenizer.train_from_iterator(["xyxy"], 256)
    assert tokenizer.vocab_size == 256


# ---- encoding


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from(TRICKY), max_size=60) | st.text(max_size=60), pattern=st.sampled_from(PATTERNS))
def test_ids_equal_tiktokens_on_any_text(crossing, text, pattern):
    tokenizer = rustbpe.Tokenizer.from_ranks(crossing, pattern)
    assert tokenizer.encode(text) == as_tiktoken(tokenizer).encode_ordinary(text)


@pytest.mark.parametrize("pattern", [SPLIT_PATTERN, DEFAULT_PATTERN])
def test_every_character_is_cut_as_tiktoken_cuts_it(pattern):
    # whole 'a' + character + 'a' and the like would merge, were it not for the pattern
    ranks = trained(["aa 11 !!\n\n 'a 'l  '\n1!a1a!1 a!"] * 3, 400, pattern=r"(?s).+").get_mergeable_ranks()
    tokenizer = rustbpe.Tokenizer.from_ranks(ranks, pattern)
    characters = [chr(c) for c in range(0x110000) if not 0xd800 <= c < 0xe000]
    texts = ["".join(f"a{c}a 1{c}1 !{c}! {c}{c}a\n{c}\n'{c}1'{c}l" for c in characters[i:i + 500])
             for i in range(0, 0x20000, 500)]
    assert tokenizer.batch_encode(texts) == as_tiktoken(tokenizer).encode_ordinary_batch(texts, num_threads=2)


def test_ids_equal_tiktokens_on_prose_with_any_order_of_bytes():
    text = prose(20_000)
    ranks = dict(trained([text], 3000).get_mergeable_ranks())
    for seed in range(3):
        other = [bytes([b]) for b in range(256)]
        random.Random(seed).shuffle(other)
        shuffled = {**ranks, **{token: rank for rank, token in enumerate(other)}}
        tokenizer = rustbpe.Tokenizer.from_ranks(shuffled, SPLIT_PATTERN)
        assert dict(tokenizer.get_mergeable_ranks()) == shuffled and tokenizer.vocab_size == 3000
        assert tokenizer.encode(text) == as_tiktoken(tokenizer).encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_equal_tiktokens_where_ranks_come_from_no_training():
    rng = random.Random(3)
    tokens = {bytes(rng.choices(b"abc", k=rng.randint(2, 6))) for _ in range(300)}
    ranks = {**{bytes([b]): b for b in range(256)},
             **{token: 256 + i for i, token in enumerate(sorted(tokens, key=hash))}}
    tokenizer = rustbpe.Tokenizer.from_ranks(ranks, SPLIT_PATTERN)
    texts = ["".join(rng.choices("abc ", k=rng.randint(1, 300))) for _ in range(500)]
    assert tokenizer.batch_encode(texts) == as_tiktoken(tokenizer).encode_ordinary_batch(texts)


def test_flat_batch_holds_the_ids_of_the_lists():
    tokenizer = trained([prose(5000)], 1000)
    texts = ["", *prose(200_000, seed=2).splitlines(), "", "\0a\0", prose(120_000, seed=3), ""]
    lists = tokenizer.batch_encode(texts)
    ids, offsets = (np.frombuffer(part, kind) for part, kind in zip(tokenizer.batch_encode_flat(texts), ("<u4", "<u8")))
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())] == lists == [tokenizer.encode(text)
                                                                                             for text in texts]
    assert tokenizer.batch_encode([]) == [] and tokenizer.batch_encode_flat([]) == (b"", bytes(8))
    assert tokenizer.batch_encode([""]) == [[]] and tokenizer.batch_encode_flat([""]) == (b"", bytes(16))
    assert tokenizer.batch_encode(text for text in ("a", "b")) == [[97], [98]]


@pytest.mark.parametrize("unit", ["a", "ab", " ", "\n", ".", "1", "日"])
def test_a_million_characters_on_end_are_encoded_at_once(unit):
    tokenizer = trained([unit * 1000], 270, pattern=r"(?s).+")
    tokenizer = rustbpe.Tokenizer.from_ranks(tokenizer.get_mergeable_ranks(), SPLIT_PATTERN)
    text = unit * (1_000_000 // len(unit))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < len(text.encode()) // 2 + 1


def test_decode_says_which_id_or_byte_is_wrong():
    tokenizer = trained(["abab"], 257)
    assert tokenizer.decode_bytes([0, 255, 256]) == b"\0\xffab" and tokenizer.decode(np.array([256, 97])) == "aba"
    for ids in ([257], [-1], [1 << 40]):
        with pytest.raises(ValueError, match=f"unknown token id {ids[0]}: ids go from 0 to 256"):
            tokenizer.decode(ids)
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode([255])
    assert tokenizer.decode([255], errors="replace") == "\ufffd"
    with pytest.raises(TypeError):
        tokenizer.decode(["a"])


# ---- errors


def test_untrained_tokenizer_has_the_bytes_and_says_what_to_do():
    tokenizer = rustbpe.Tokenizer()
    assert tokenizer.vocab_size == 256 and tokenizer.get_pattern() == ""
    assert tokenizer.get_mergeable_ranks() == [(bytes([b]), b) for b in range(256)]
    for call in (lambda: tokenizer.encode("a"), lambda: tokenizer.batch_encode(["a"]), lambda: tokenizer.decode([1])):
        with pytest.raises(ValueError, match="train_from_iterator"):
            call()


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"vocab_size": 255}, ValueError, "at least 256.*got 255"),
    ({"vocab_size": -1}, ValueError, "at least 256.*got -1"),
    ({"vocab_size": 1 << 40}, ValueError, "16777216 at most"),
    ({"buffer_size": 0}, ValueError, "buffer_size must be at least 1"),
    ({"pattern": "("}, ValueError, "invalid split pattern"),
    ({"pattern": ""}, ValueError, "split pattern is empty"),
    ({"iterator": ["a", 3]}, TypeError, "text 1 of the iterator is no str but int"),
    ({"iterator": [b"a"]}, TypeError, "text 0 of the iterator is no str but bytes"),
    ({"iterator": "a text"}, TypeError, r"pass \[text\]"),
    ({"iterator": 3}, TypeError, "not iterable"),
    ({"iterator": ["a", "b\ud800"]}, ValueError, "text 1 of the iterator is not valid Unicode.*surrogates not allowed"),
])
def test_bad_training_input_is_named_and_leaves_the_tokenizer_as_it_was(change, error, message):
    tokenizer = trained(["abab"], 257)
    with pytest.raises(error, match=message):
        tokenizer.train_from_iterator(**{"iterator": ["cdcd"], "vocab_size": 300, **change})
    assert tokenizer.get_mergeable_ranks()[256:] == [(b"ab", 256)] and tokenizer.get_pattern() == SPLIT_PATTERN


@pytest.mark.parametrize(("texts", "error", "message"), [
    (["a", None], TypeError, r"texts\[1\] is no str but NoneType"),
    ("text", TypeError, "texts is a str"),
    (["\udc00"], ValueError, r"texts\[0\] is not valid Unicode"),
])
def test_bad_texts_to_encode_are_named(texts, error, message):
    tokenizer = trained(["abab"], 257)
    for encode in (tokenizer.batch_encode, tokenizer.batch_encode_flat):
        with pytest.raises(error, match=message):
            encode(texts)
    with pytest.raises(TypeError, match="text is no str but int"):
        tokenizer.encode(3)
    with pytest.raises(ValueError, match="text is not valid Unicode") as caught:
        tokenizer.encode("\ud800")
    assert isinstance(caught.value.__cause__, UnicodeEncodeError)


@pytest.mark.parametrize(("extra", "message"), [
    ({b"ab": 97}, "two tokens have the rank 97"), ({b"": 256}, "empty"), ({b"ab": 1 << 24}, "largest possible"),
    ({b"\x05": 300, b"ab": 5}, None),
])
def test_ranks_that_are_no_vocabulary_are_refused(extra, message):
    ranks = {**{bytes([b]): b for b in range(256)}, **extra}
    if message is None:
        assert rustbpe.Tokenizer.from_ranks(ranks, SPLIT_PATTERN).encode("ab\x05") == [5, 300]
        return
    with pytest.raises(ValueError, match=message):
        rustbpe.Tokenizer.from_ranks(ranks, SPLIT_PATTERN)
    with pytest.raises(ValueError, match="single byte 0"):
        rustbpe.Tokenizer.from_ranks([(b"a", 0)], SPLIT_PATTERN)


def test_an_exception_of_the_iterator_or_of_progress_passes_through():
    class Broken(Exception):
        pass

    def texts():
        yield "abab"
        raise Broken
    with pytest.raises(Broken):
        trained(texts(), 300)

    def progress(stage, done, total):
        raise Broken(stage)
    with pytest.raises(Broken, match="count"):
        trained(["abab"], 300, progress=progress)


def test_a_regular_expression_that_gives_up_is_an_error():
    tokenizer = trained(["ab"], 257, pattern=r"(a*)*\1b|.")
    with pytest.raises(ValueError, match="gave up"):
        tokenizer.encode("a" * 5000)
    with pytest.raises(ValueError, match="gave up"):
        trained(["a" * 5000], 300, pattern=r"(a*)*\1b|.")


# ---- long work


def test_progress_tells_both_stages_to_their_end():
    said = []
    trained(["abab", "éé"], 258, progress=lambda *what: said.append(what))
    assert said[-1] == ("merge", 2, 2) and ("count", 8, 0) in said


def test_other_python_threads_run_meanwhile():
    turns, stop = [0], threading.Event()

    def count():
        while not stop.wait(0.001):
            turns[0] += 1
    other = threading.Thread(target=count)
    other.start()
    try:
        tokenizer = trained(["abab"], 257, pattern=r"\w+|\W+")
        text = prose(500_000)
        before = turns[0]
        tokenizer.batch_encode_flat([text] * 4)
        assert turns[0] > before
        before = turns[0]
        tokenizer.train_from_iterator([text] * 4, 5000, pattern=r"\w+|\W+")
        assert turns[0] > before
    finally:
        stop.set()
        other.join()


def test_many_python_threads_may_encode_with_one_tokenizer():
    tokenizer = trained([prose(5000)], 1000)
    texts = [prose(300, seed) for seed in range(40)]
    expected, results = [tokenizer.encode(text) for text in texts], {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: tokenizer.batch_encode(texts)}))
               for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[i] == expected for i in range(8))


@pytest.mark.parametrize("stage", ["count", "merge"])
def test_interrupt_ends_training_and_leaves_the_tokenizer_as_it_was(stage):
    tokenizer = trained(["abab"], 257)
    reached = threading.Event()

    def interrupt():
        reached.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
    other = threading.Thread(target=interrupt)
    other.start()
    rng = random.Random(0)
    endless = itertools.repeat("some text that never ends")
    one_word = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=3_000_000))]  # takes many seconds to merge
    with pytest.raises(KeyboardInterrupt):
        if stage == "count":
            reached.set()
            tokenizer.train_from_iterator(endless, 300)
        tokenizer.train_from_iterator(one_word, 1_000_000, progress=lambda *what: reached.set())
    other.join()
    assert tokenizer.get_mergeable_ranks()[256:] == [(b"ab", 256)]


def test_texts_are_streamed_not_held():
    pytest.importorskip("resource")
    script = """
        import resource, sys
        text = prose(150_000)
        trained([text], 2000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        trained((text + str(i) for i in range(200)), 2000)
        unit = 1 if sys.platform == "darwin" else 1024
        print(len(text) * 200, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)"""
    read, grown = map(int, elsewhere(script).split())
    assert read > 120e6 and grown < 70e6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_encodes_too():
    elsewhere("""
        import os
        tokenizer, texts = trained([prose(5000)], 1000), [prose(200_000)] * 2
        expected = tokenizer.batch_encode(texts)
        child = os.fork()
        if not child:
            os._exit(0 if tokenizer.batch_encode(texts) == expected and trained(texts, 300).vocab_size == 300 else 3)
        assert os.waitpid(child, 0)[1] == 0""")


def test_the_benchmark_tables_training_and_encoding_of_equal_results(tmp_path, capsys):
    from bench import tokenizer as bench
    (tmp_path / "a.txt").write_text(prose(3000) + "\n<|doc|>\n" + prose(3000, seed=1))
    bench.main(["--text", str(tmp_path / "a.txt"), "--vocab-size=400", "--rounds=1", "--threads=1",
                f"--json={tmp_path / 'out.json'}"])
    text = capsys.readouterr().out
    assert "400 tokens, 1 threads" in text and "python -m bench.tokenizer --text" in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
            if line.startswith("|")][2:]
    assert [row[:2] for row in rows] == [["train", "ours"], ["encode", "ours, batch_encode"],
                                         ["encode", "ours, batch_encode_flat"],
                                         ["encode", "tiktoken"]]
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert next(row for row in rows if row["work"] == "encode" and row["engine"] == "tiktoken")["size"] > 0
