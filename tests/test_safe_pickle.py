"""A tokenizer.pkl from elsewhere is read as data: it runs no code, and anything but an Encoding is refused."""

import os
import pickle
import struct

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer
from nanochat.tokenizer.files import MAX_FILE
from nanochat.tokenizer.safe_pickle import encoding_state

TOKENS = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b"in", b"\xff\xfe", b"\x00\x00"]
STATE = {"name": "rustbpe", "pat_str": SPLIT_PATTERN,
         "mergeable_ranks": {token: rank for rank, token in enumerate(TOKENS)},
         "special_tokens": {name: len(TOKENS) + i for i, name in enumerate(SPECIAL_TOKENS)}}
ENCODING = b"ctiktoken.core\nEncoding\n"
GOOD = pickle.dumps(tiktoken.Encoding(**STATE), protocol=4)


def with_state(state) -> bytes:
    """The pickle of an Encoding with any state at all."""
    return b"\x80\x04" + ENCODING + b")\x81" + pickle.dumps(state, protocol=4)[2:-1] + b"b."


def load(blob: bytes, folder) -> RustBPETokenizer:
    (folder / "tokenizer.pkl").write_bytes(blob)
    return RustBPETokenizer.from_directory(folder)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("fix_imports", [True, False])
def test_an_encoding_of_every_protocol_is_read(protocol, fix_imports):
    blob = pickle.dumps(tiktoken.Encoding(**STATE), protocol=protocol, fix_imports=fix_imports)
    assert encoding_state(blob, "here") == STATE


def test_our_way_of_writing_any_state_gives_the_same_as_pickle(tmp_path):
    assert load(with_state(STATE), tmp_path).fingerprint() == load(GOOD, tmp_path).fingerprint()


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(flag: str) -> dict[str, bytes]:
    """Pickles that make the file `flag` when they are unpickled, or would make trouble in another way."""
    touch = f"open({flag!r}, 'w')"
    encode = b"c_codecs\nencode\n"
    nested = b"K\x00" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    return {
        "system": pickle.dumps(Calls(os.system, f"touch {flag}")),
        "eval": pickle.dumps(Calls(eval, touch)),
        "eval of protocol 0": pickle.dumps(Calls(eval, touch), protocol=0),
        "getattr": pickle.dumps(Calls(getattr, 1, "real")),
        "in the state": with_state({**STATE, "name": Calls(eval, touch)}),
        "as a token": with_state({**STATE, "mergeable_ranks": {b"a": Calls(eval, touch)}}),
        "as the state": with_state(Calls(eval, touch)),
        "before the Encoding": pickle.dumps(Calls(eval, touch))[:-1] + b"0" + GOOD[2:],
        "behind the end": GOOD + pickle.dumps(Calls(eval, touch)),
        "dotted name": b"\x80\x04\x8c\x0dtiktoken.core\x8c\x11Encoding.__init__\x93)R.",
        "functions of the module": b"ctiktoken.core\nfunctools.os.system\n(S'true'\ntR.",
        "other class of the module": b"ctiktoken.core\nThreadPoolExecutor\n)R.",
        "Encoding called": ENCODING + b"(S'x'\ntR.",
        "Encoding made with arguments": b"\x80\x02" + ENCODING + b"(S'x'\nt\x81.",
        "Encoding alone": ENCODING + b".",
        "Encoding without state": b"\x80\x02" + ENCODING + b")\x81.",
        "class filled": ENCODING + b"}S'encode'\nK\x01sb.",
        "filled twice": with_state(STATE)[:-1] + pickle.dumps(STATE, protocol=4)[2:-1] + b"b.",
        "item of an Encoding": b"\x80\x02" + ENCODING + b")\x81K\x01K\x01s.",
        "item of a name": ENCODING + b"S'a'\nK\x01s.",
        "reconstructor of another class": b"ccopy_reg\n_reconstructor\n(c__builtin__\nobject\n"
                                          b"c__builtin__\nobject\nNtR}b.",
        "reconstructor with text for names": b"ccopy_reg\n_reconstructor\n(V<Encoding>\nV<object>\nNtR}b.",
        "another codec": encode + b"(Va\nVrot13\ntR.",
        "object made": b"c__builtin__\nobject\n)R.",
        "inst": b"(S'true'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'true'\no.",
        "newobj_ex": b"\x80\x04" + ENCODING + b")}\x92.",
        "extension registry": b"\x80\x02\x82\x01.",
        "persistent id": b"Pname\n.",
        "persistent id, binary": b"\x80\x02K\x01Q.",
        "out of band buffer": b"\x80\x05\x97.",
        "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b"x.",
        "bytes longer than the file": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
        "text longer than the file": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.",
        "frame longer than the file": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b".",
        "memo far away": b"\x80\x04K\x01r\xff\xff\xff\xff" + b".",
        "memo missing": b"\x80\x04h\x07.",
        "mark missing": b"\x80\x04t.",
        "mark as a value": b"(.",
        "mark as a state": b"\x80\x02" + ENCODING + b")\x81(b.",
        "stack empty": b"0.",
        "tuples within tuples as a name": b"\x80\x04" + nested + b"\x8c\x01a\x93.",
        "very deep": b"\x80\x04)" + b"\x85" * 200_000 + b".",
        "dict in itself": b"\x80\x02" + ENCODING + b")\x81}q\x00X\x0f\x00\x00\x00mergeable_ranksh\x00sb.",
        "a list": pickle.dumps([1, 2]),
        "a number": pickle.dumps(1),
        "long digits": b"L" + b"9" * 10_000 + b"L\n.",
        "registered by name": with_state("gpt2"),
        "state a list": with_state([1]),
        "state none": with_state(None),
        "not a pickle": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "text": b"hello\n",
        "empty": b"",
        "no end": GOOD[:-1],
    }


@pytest.mark.parametrize("name", attacks("x"))
def test_a_hostile_pickle_is_refused_and_runs_nothing(name, tmp_path):
    flag = tmp_path / "owned"
    with pytest.raises(UserError, match="tokenizer.pkl"):
        load(attacks(str(flag))[name], tmp_path)
    assert not flag.exists()


def test_the_attacks_do_work_on_pickle_itself(tmp_path):
    flag = tmp_path / "owned"
    for name in ("system", "eval", "in the state", "before the Encoding"):
        pickle.loads(attacks(str(flag))[name])
        assert flag.exists(), name
        flag.unlink()


def test_a_text_named_again_and_again_does_not_unfold_into_gigabytes():
    once = b"c_codecs\nencode\n" + b"X" + struct.pack("<I", 100_000) + b"a" * 100_000 + b"q\x00Vlatin1\nq\x01\x86R"
    blob = b"\x80\x02" + once + b"c_codecs\nencode\nh\x00h\x01\x86R" * 100_000 + b"."
    with pytest.raises(UserError, match="more bytes than it has"):
        encoding_state(blob, "here")


def test_a_file_too_large_for_a_tokenizer_is_not_read(tmp_path):
    with open(tmp_path / "tokenizer.pkl", "wb") as file:
        file.truncate(MAX_FILE + 1)
    with pytest.raises(UserError, match="no tokenizer has more"):
        RustBPETokenizer.from_directory(tmp_path)


def test_every_truncation_is_refused():
    for end in [*range(0, 300), *range(300, len(GOOD), 37)]:
        with pytest.raises(UserError):
            encoding_state(GOOD[:end], "here")


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning",
                            "ignore:invalid escape sequence:SyntaxWarning")
@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_pickle_is_refused_or_is_a_whole_tokenizer(tmp_path_factory, changes):
    blob = bytearray(GOOD)
    for at, byte in changes:
        blob[at] = byte
    try:
        tokenizer = load(bytes(blob), tmp_path_factory.mktemp("damaged"))
    except UserError:
        return
    assert tokenizer.decode(tokenizer.encode("the thing")) == "the thing"


RANKS, SPECIALS = STATE["mergeable_ranks"], STATE["special_tokens"]


@pytest.mark.parametrize("change, message", [
    ({"name": 5}, "name"), ({"name": "x" * 1000}, "name"),
    ({"pat_str": b"."}, "pattern"), ({"pat_str": ""}, "pattern"), ({"pat_str": "a" * 1001}, "pattern"),
    ({"pat_str": "("}, "pattern fails"), ({"pat_str": "(?:a{1,1000}){1,1000}{1,1000}"}, "pattern fails"),
    ({"pat_str": "(" * 400 + ")" * 400}, "pattern fails"), ({"pat_str": "\ud800"}, "pattern fails"),
    ({"pat_str": "(?:(?=(?s:.))(?:x?){0,99}){0,99999}{0,99999}\\1(a)"}, "pattern"), ({"pat_str": r"\p{L}+"}, "loses"),
    ({"mergeable_ranks": "x"}, "tokens"), ({"mergeable_ranks": {}}, "single bytes"),
    ({"mergeable_ranks": {**RANKS, b"a": None}}, "tokens"),
    ({"mergeable_ranks": {**RANKS, "text": 261}}, "tokens"), ({"mergeable_ranks": {**RANKS, b"": 261}}, "tokens"),
    ({"mergeable_ranks": {**RANKS, b"a": True}}, "NEWTRUE"), ({"mergeable_ranks": {**RANKS, b"a": 1.0}}, "BINFLOAT"),
    ({"mergeable_ranks": {**RANKS, b"new": 10**5000}}, "gaps"), ({"mergeable_ranks": {**RANKS, b"new": 262}}, "gaps"),
    ({"mergeable_ranks": {**RANKS, b"new": 5}}, "gaps"), ({"mergeable_ranks": {**RANKS, b"a": -1}}, "gaps"),
    ({"special_tokens": None}, "special"), ({"special_tokens": {**SPECIALS, b"x": 270}}, "special"),
    ({"special_tokens": {**SPECIALS, "": 270}}, "special"), ({"special_tokens": {**SPECIALS, "x": "y"}}, "special"),
    ({"special_tokens": {**SPECIALS, "\ud800": 270}}, "pattern"),
    ({"special_tokens": {f"{i}": 261 + i for i in range(2000)}}, "special"),
    ({"special_tokens": {**SPECIALS, "<|bos|>": 5}}, "last ids"),
    ({"special_tokens": {**SPECIALS, "<|bos|>": 262}}, "last ids"),
    ({"special_tokens": {"<|bos|>": 261}}, "has no special token"), ({"explicit_n_vocab": 5}, "exactly"),
])
def test_an_encoding_with_an_unsound_state_is_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load(with_state({**STATE, **change}), tmp_path)


@pytest.mark.parametrize("missing", STATE)
def test_an_encoding_with_a_part_missing_is_refused(missing, tmp_path):
    with pytest.raises(UserError, match="exactly"):
        load(with_state({key: value for key, value in STATE.items() if key != missing}), tmp_path)
