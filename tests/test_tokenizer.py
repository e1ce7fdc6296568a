"""Text and conversations to ids: the same as in published code, the same through rustbpe and tiktoken, safely stored.

Covers nanochat/tokenizer/tokenizer.py and files.py. test_conversation.py, test_safe_pickle.py and test_llm.py cover
conversation.py, safe_pickle.py and stream.py.
"""

import copy
import errno
import json
import os
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    RustBPETokenizer,
    get_token_bytes,
    get_tokenizer,
    tokenizer_dir,
)
from nanochat.tokenizer import tokenizer as tokenizer_module
from nanochat.tokenizer.files import build_encoding

WORDS = [" the", "ing", " and", "hello", " world", "日本", "\u00e9", "12", "\r\n", "    ", " ==", "'ll", "<|", "bos",
         "|>"]


def handmade(words=WORDS) -> RustBPETokenizer:
    """A vocabulary of the single bytes and all beginnings of some words."""
    tokens = dict.fromkeys(bytes([byte]) for byte in range(256))
    for word in words:
        tokens.update(dict.fromkeys(word.encode()[:end] for end in range(2, len(word.encode()) + 1)))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return RustBPETokenizer(build_encoding("rustbpe", SPLIT_PATTERN, ranks, specials, "handmade"))


@pytest.fixture(scope="module")
def tok() -> RustBPETokenizer:
    return handmade()


def without_rust(tokenizer: RustBPETokenizer) -> RustBPETokenizer:
    plain = RustBPETokenizer(tokenizer.enc)
    plain.__dict__["_rust"] = None
    return plain


def needs_rustbpe():
    if tokenizer_module._rustbpe() is None:
        pytest.skip("rustbpe is not built; bash dev/setup.sh builds it")


# ---- against published code


@pytest.mark.parametrize("folder", ["hybrid_a", "orig_mod_b"])
@pytest.mark.parametrize("through", [lambda tokenizer: tokenizer, without_rust], ids=["rustbpe", "tiktoken"])
def test_published_tokenizers_give_the_published_ids(shared, folder, through):
    folder = shared / "golden" / folder
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    tokenizer = through(RustBPETokenizer.from_directory(folder))
    for case in expected["encodings"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["text"]
    for case in expected["conversations"]:
        before = copy.deepcopy(case["conversation"])
        assert tokenizer.render_conversation(case["conversation"]) == (case["ids"], case["mask"])
        assert tokenizer.render_for_completion(case["conversation"]) == case["completion_ids"]
        assert case["conversation"] == before
    assert {name: tokenizer.encode_special(name) for name in SPECIAL_TOKENS} == expected["special_tokens"]
    assert torch.equal(tokenizer.token_bytes(), torch.load(folder / "token_bytes.pt", weights_only=True))


def test_the_nine_specials_are_the_last_ids_in_the_published_order(tok):
    size = tok.get_vocab_size()
    assert [tok.encode_special(name) for name in SPECIAL_TOKENS] == list(range(size - 9, size))
    assert SPECIAL_TOKENS == ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
                              "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]
    assert tok.get_bos_token_id() == tok.bos_token_id == size - 9
    assert tok.get_special_tokens() == set(SPECIAL_TOKENS)


def test_plain_pickle_reads_our_pickle_and_encodes_alike(tok, tmp_path):
    tok.save(tmp_path)
    text = "hello world, the 12 日本 é <|bos|> '\x00' 👩‍👩‍👧"
    code = (f"import json, pickle; enc = pickle.load(open({str(tmp_path / 'tokenizer.pkl')!r}, 'rb'));"
            f"ids, bos = enc.encode_ordinary({text!r}), enc.encode_single_token('<|bos|>');"
            "print(json.dumps([type(enc).__name__, ids, bos]))")
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == ["Encoding", tok.encode(text), tok.bos_token_id]


# ---- text


tricky = st.sampled_from(list("ab 1\n\r\t'é日👩\u200d\u3000\x00!<|>os"))
texts = st.text(st.characters(), max_size=60) | st.text(tricky, max_size=80)


@settings(deadline=None, max_examples=300)
@given(st.lists(texts, max_size=4), st.lists(st.sampled_from([*WORDS, *SPECIAL_TOKENS, "  ", "\n"]), max_size=12))
def test_every_text_comes_back_with_tiktokens_ids(tok, some, words):
    some = [*some, "".join(words)]
    rows = tok.encode(some)
    assert rows == [tok.encode(text) for text in some] == [tok.enc.encode_ordinary(text) for text in some]
    assert [tok.decode(ids) for ids in rows] == [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                                                 for text in some]
    assert all(id < tok.get_vocab_size() - 9 for ids in rows for id in ids)
    for tokenizer in (tok, without_rust(tok)):
        ids, offsets = tokenizer.encode_flat(some)
        assert (ids.dtype, offsets.dtype, len(offsets)) == (np.uint32, np.int64, len(some) + 1)
        assert [ids[a:b].tolist() for a, b in zip(offsets, offsets[1:])] == rows


def test_lone_surrogates_count_as_replacement_characters(tok):
    ids = tok.encode("a\ud800b")
    assert ids == tok.encode("a\ufffdb") == tok.encode(["a\ud800b"])[0] == tok.encode_flat(["a\ud800b"])[0].tolist()


def test_no_texts_give_no_ids(tok):
    assert tok.encode("") == [] and tok.encode([]) == [] and tok.encode([""]) == [[]]
    ids, offsets = tok.encode_flat([])
    assert len(ids) == 0 and offsets.tolist() == [0]


def test_text_that_spells_a_special_token_is_text(tok):
    assert tok.bos_token_id not in tok.encode("<|bos|> is text here")
    assert tok.decode(tok.encode("<|bos|>")) == "<|bos|>" == tok.decode([tok.bos_token_id])


def test_specials_are_put_around_every_text(tok):
    bos, end = tok.bos_token_id, tok.encode_special("<|user_end|>")
    assert tok.encode("hello", prepend="<|bos|>", append=end) == [bos, *tok.encode("hello"), end]
    assert tok.encode(["a", ""], prepend=bos, append="<|user_end|>") == [[bos, *tok.encode("a"), end], [bos, end]]
    assert tok(["a"], prepend=bos, num_threads=2) == [[bos, *tok.encode("a")]]
    for wrong in ("<|nonsense|>", tok.get_vocab_size(), -1):
        with pytest.raises(UserError, match="special token|vocabulary"):
            tok.encode("hello", prepend=wrong)


@pytest.mark.parametrize("wrong", [None, 5, b"bytes", ["a", 5], {"a": 1}])
def test_encoding_anything_but_text_is_refused(tok, wrong):
    with pytest.raises(UserError, match="takes a text or a list of texts"):
        tok.encode(wrong)
    with pytest.raises(UserError, match="takes a text or a list of texts"):
        tok.encode_flat(wrong)


def test_torn_utf8_decodes_to_replacement_characters_and_to_its_bytes(tok):
    ids = tok.encode("é日")
    assert tok.decode_bytes(ids) == "é日".encode()
    assert tok.decode([tok.enc.encode_single_token(b"\xe6")]) == "\ufffd" == tok.id_to_token(0xE6)
    for wrong in ([tok.get_vocab_size()], [-1], [1 << 40]):
        with pytest.raises(UserError, match="not in this tokenizer's vocabulary"):
            tok.decode(wrong)


def test_a_text_tiktoken_gives_up_on_is_an_error_that_says_so(tok):
    with pytest.raises(UserError, match="dev/setup.sh"):
        without_rust(tok).encode(" " * 1_000_000 + "x")


def test_token_bytes_are_counted_in_bytes(tok):
    sizes = tok.token_bytes()
    assert sizes.dtype == torch.int32 and sizes.shape == (tok.get_vocab_size(),)
    assert sizes[:256].tolist() == [1] * 256  # 128 of them are not valid UTF-8, and count as three bytes each as text
    assert sizes[-9:].tolist() == [0] * 9
    text = "hello 日本 world"
    assert sizes[tok.encode(text)].sum() == len(text.encode())


def test_the_round_trip_check_sees_a_broken_tokenizer(tok):
    tok.check_round_trip(["hello", ""])

    class Drops:
        def encode(self, text):
            return tok.enc.encode_ordinary(text)[1:]

        def batch_encode(self, texts):
            return [self.encode(text) for text in texts]

    broken = RustBPETokenizer(tok.enc)
    broken.__dict__["_rust"] = Drops()
    with pytest.raises(UserError, match="broken"):
        broken.check_round_trip(["hello"])


# ---- conversations


CHAT = {"messages": [{"role": "system", "content": "Be brief."},
                     {"role": "user", "content": "2+2? <|assistant_start|>"},
                     {"role": "assistant",
                      "content": [{"type": "text", "text": "It is "}, {"type": "python", "text": "2+2"},
                                  {"type": "python_output", "text": "4"}, {"type": "text", "text": "4."}]},
                     {"role": "user", "content": "thanks"}, {"role": "assistant", "content": "hello world"}]}
SPELLED = ("<|bos|><|user_start|>Be brief.\n\n2+2? <|assistant_start|><|user_end|>"
           "<|assistant_start|>It is <|python_start|>2+2<|python_end|><|output_start|>4<|output_end|>4."
           "<|assistant_end|>"
           "<|user_start|>thanks<|user_end|><|assistant_start|>hello world<|assistant_end|>")


def test_only_what_the_assistant_writes_is_trained_on(tok):
    ids, mask = tok.render_conversation(CHAT)
    assert tok.decode(ids) == SPELLED
    assert tok.decode([id for id, trained in zip(ids, mask) if trained]) == (
        "It is <|python_start|>2+2<|python_end|>4.<|assistant_end|>hello world<|assistant_end|>")
    assert ids.count(tok.encode_special("<|assistant_start|>")) == 2  # the one a user spells is text


def test_a_conversation_is_cut_at_max_tokens(tok):
    ids, mask = tok.render_conversation(CHAT)
    for size in (1, 7, len(ids), len(ids) + 1):
        assert tok.render_conversation(CHAT, max_tokens=size) == (ids[:size], mask[:size])
    with pytest.raises(UserError, match="max_tokens"):
        tok.render_conversation(CHAT, max_tokens=0)


def test_a_completion_prompt_ends_where_the_assistant_goes_on(tok):
    start = tok.encode_special("<|assistant_start|>")
    ids, _ = tok.render_conversation(CHAT)
    prompt = tok.render_for_completion(CHAT)
    assert prompt[-1] == start and ids[:len(prompt)] == prompt
    assert tok.render_for_completion({"messages": CHAT["messages"][:-1]}) == prompt
    with pytest.raises(UserError, match="role 'assistant'"):
        tok.render_for_completion({"messages": [{"role": "assistant", "content": "hi"}]})


def test_a_settable_bos_begins_conversations(tok):
    other = RustBPETokenizer(tok.enc)
    other.bos_token_id = 5
    assert other.render_conversation(CHAT)[0][0] == other.get_bos_token_id() == 5


def test_a_picture_of_the_mask_shows_every_token(tok):
    ids, mask = tok.render_conversation({"messages": [{"role": "user", "content": "a"}]})
    assert tok.visualize(ids, mask).count("\033[31m") == len(ids)


# ---- files


def test_saved_and_loaded_is_the_same_tokenizer(tok, tmp_path):
    tok.save(tmp_path / "new" / "folder")
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == ["token_bytes.pt", "tokenizer.json", "tokenizer.pkl"]
    text = "hello the 日本 12\r\n"
    for drop in (None, "tokenizer.pkl", "tokenizer.json"):
        tok.save(tmp_path)
        if drop:
            (tmp_path / drop).unlink()
        again = RustBPETokenizer.from_directory(tmp_path)
        assert again.fingerprint() == tok.fingerprint() and again.encode(text) == tok.encode(text)
    assert torch.equal(torch.load(tmp_path / "token_bytes.pt", weights_only=True), tok.token_bytes())


def test_fingerprints_differ_with_tokens_pattern_and_specials(tok):
    ranks, specials = tok.enc._mergeable_ranks, tok.enc._special_tokens
    swapped = {**ranks, b" t": ranks[b" th"], b" th": ranks[b" t"]}
    others = [build_encoding("x", SPLIT_PATTERN, swapped, specials, ""),
              build_encoding("x", r"(?s:.)", ranks, specials, ""),
              build_encoding("x", SPLIT_PATTERN, ranks, {**specials, "<|more|>": tok.get_vocab_size()}, "")]
    prints = {RustBPETokenizer(enc).fingerprint() for enc in [*others, tok.enc]}
    assert len(prints) == 4 and all(len(one) == 64 for one in prints)


def test_two_different_tokenizers_in_one_folder_are_an_error(tok, tmp_path):
    tok.save(tmp_path)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(tok.enc, protocol=2))  # the same one, written otherwise
    assert RustBPETokenizer.from_directory(tmp_path).fingerprint() == tok.fingerprint()
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(handmade(["other"]).enc))
    with pytest.raises(UserError, match="two different tokenizers"):
        RustBPETokenizer.from_directory(tmp_path)


def test_a_tokenizer_json_of_another_kind_gives_way_to_the_pickle(tok, tmp_path):
    tok.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    assert RustBPETokenizer.from_directory(tmp_path).fingerprint() == tok.fingerprint()
    (tmp_path / "tokenizer.pkl").unlink()
    with pytest.raises(UserError, match="not a tokenizer of this project"):
        RustBPETokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("change", [
    {"vocab_size": 5}, {"fingerprint": "0" * 64}, {"fingerprint": None}, {"pattern": "."}, {"pattern": None},
    {"version": 2},
    {"special_tokens": {}}, {"special_tokens": None}, {"mergeable_ranks_base64": []}, {"mergeable_ranks_base64": None},
    {"mergeable_ranks_base64": ["!!"]}, {"mergeable_ranks_base64": [5]}, {"mergeable_ranks_base64": ["AA==", "AA=="]},
    {"pickle_sha256": ...}, {"vocab_size": ...}, {"special_tokens": ...}, {"mergeable_ranks_base64": ...}], ids=str)
def test_a_damaged_tokenizer_json_is_refused(tok, tmp_path, change):
    tok.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    with pytest.raises(UserError, match="tokenizer.json"):
        RustBPETokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 200_000, b"[1]"])
def test_a_file_that_is_no_tokenizer_json_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.json"):
        RustBPETokenizer.from_directory(tmp_path)


def test_a_full_disk_leaves_the_tokenizer_that_was_there(tok, tmp_path, monkeypatch):
    tok.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        handmade(["other"]).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_missing_tokenizer_says_how_to_train_one(tmp_path):
    for attempt in (get_tokenizer, get_token_bytes, lambda: RustBPETokenizer.from_directory(tmp_path / "nowhere")):
        with pytest.raises(UserError, match="python -m scripts.tok_train"):
            attempt()


def test_token_bytes_of_the_base_directory_are_those_of_its_tokens(tok):
    tok.save(tokenizer_dir())
    torch.save(torch.full((3,), 7), tokenizer_dir() / "token_bytes.pt")  # as wrong as published code may have left it
    assert torch.equal(get_token_bytes(), get_tokenizer().token_bytes())


def test_token_bytes_alone_are_read_as_data(tok):
    path = tokenizer_dir() / "token_bytes.pt"
    path.parent.mkdir(parents=True)
    torch.save(tok.token_bytes().long(), path)
    assert torch.equal(get_token_bytes("cpu"), tok.token_bytes())
    for wrong in (torch.zeros(3), torch.zeros(3, 3, dtype=torch.int32), torch.tensor([-1]), [1, 2]):
        torch.save(wrong, path)
        with pytest.raises(UserError, match="does not hold"):
            get_token_bytes()

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "owned"),)
    torch.save({"x": Runs()}, path)
    with pytest.raises(UserError, match="cannot be read"):
        get_token_bytes()
    assert not (path.parent / "owned").exists()


# ---- training


def test_training_reaches_the_vocabulary_and_compresses():
    needs_rustbpe()
    text = "the cat sat on the mat and the dog sat on the log. " * 20
    trained = RustBPETokenizer.train_from_iterator(iter([text, "hello world"] * 3), 290)
    assert trained.get_vocab_size() == 290 and trained.encode_special("<|output_end|>") == 289
    assert trained.enc.name == "rustbpe" and trained.enc._pat_str == SPLIT_PATTERN
    assert len(trained.encode(text)) < len(text) / 2
    trained.check_round_trip([text, "日本 never seen"])


def test_a_text_with_too_few_pairs_gives_a_smaller_vocabulary_and_says_so():
    needs_rustbpe()
    with pytest.warns(UserWarning, match="too few different pairs for 1000 tokens: the vocabulary has 267"):
        trained = RustBPETokenizer.train_from_iterator(["abc"], 1000)
    assert trained.get_vocab_size() == 267 and trained.encode_special("<|output_end|>") == 266
    with pytest.warns(UserWarning, match="has 265"):
        assert RustBPETokenizer.train_from_iterator([], 300).get_vocab_size() == 265


def test_the_smallest_vocabulary_is_bytes_and_specials():
    needs_rustbpe()
    smallest = RustBPETokenizer.train_from_iterator(["hello world"], 265)
    assert smallest.encode("hé") == list("hé".encode())
    for size in (264, 0, -1, 300.0, True, None, 1 << 40):
        with pytest.raises(UserError, match="vocab_size"):
            RustBPETokenizer.train_from_iterator(["hello world"], size)


def test_training_refuses_what_is_not_text():
    needs_rustbpe()
    with pytest.raises(UserError, match="was given one text"):
        RustBPETokenizer.train_from_iterator("hello", 300)
    with pytest.raises(UserError, match="document 1 is not text but int"):
        RustBPETokenizer.train_from_iterator(["hello", 5], 300)


def test_training_without_rustbpe_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    with pytest.raises(UserError, match="bash dev/setup.sh"):
        RustBPETokenizer.train_from_iterator(["hello"], 300)
    assert handmade().encode("hello world") == handmade().enc.encode_ordinary("hello world")


def test_another_package_named_rustbpe_is_not_used(monkeypatch, tok):
    monkeypatch.setitem(sys.modules, "rustbpe", types.SimpleNamespace(Tokenizer=object))
    with pytest.raises(UserError, match="of this repository"):
        RustBPETokenizer.train_from_iterator(["hello"], 300)
    assert RustBPETokenizer(tok.enc).encode("hello world") == tok.enc.encode_ordinary("hello world")


def test_a_vocabulary_rustbpe_cannot_use_is_said_and_goes_through_tiktoken(monkeypatch, tok):
    class Refuses:
        @staticmethod
        def from_ranks(ranks, pattern):
            raise ValueError("no")
    monkeypatch.setitem(sys.modules, "rustbpe", types.SimpleNamespace(Tokenizer=Refuses))
    with pytest.warns(UserWarning, match=r"cannot use this vocabulary \(no\)"):
        assert RustBPETokenizer(tok.enc).encode("hello world") == tok.enc.encode_ordinary("hello world")


def test_training_tells_how_far_it_is():
    needs_rustbpe()
    seen = []
    RustBPETokenizer.train_from_iterator(["the cat sat on the mat"], 270, progress=lambda *told: seen.append(told))
    assert seen[-1] == ("merge", 5, 5) and seen[0][0] == "count"


def test_an_error_of_the_texts_comes_through():
    needs_rustbpe()

    def torn():
        yield "hello"
        raise UserError("shard_00003.parquet cannot be read")
    with pytest.raises(UserError, match="shard_00003"):
        RustBPETokenizer.train_from_iterator(torn(), 300)


def test_training_takes_lone_surrogates():
    needs_rustbpe()
    trained = RustBPETokenizer.train_from_iterator(["a\ud800b a\ud800b"] * 3, 268)
    assert trained.decode(trained.encode("a\ud800b")) == "a\ufffdb"
