"""Read and write the files of a tokenizer. Every file is checked completely before an Encoding is made of it.

tokenizer.json    our own format, read first: split pattern, tokens in rank order, special tokens, fingerprint
tokenizer.pkl     a pickled tiktoken Encoding, as published code reads it; safe_pickle.py reads it without unpickling
token_bytes.pt    int32 (V,), bytes of each token, 0 for special tokens
"""

import base64
import hashlib
import io
import json
import os
import pickle
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tiktoken

from nanochat.errors import UserError
from nanochat.files import atomic_write, sha256_of
from nanochat.tokenizer.safe_pickle import encoding_state

if TYPE_CHECKING:
    import torch

SPECIAL_TOKENS = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
                  "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]
FORMAT, VERSION = "liquid-time-nanochat tokenizer", 1
# Limits far above any real tokenizer (65,536 tokens take 0.8 MB), so that a wrong file cannot exhaust time or memory.
MAX_FILE, MAX_PATTERN, MAX_SPECIALS, MAX_NAME = 1 << 26, 1000, 1000, 100
PROBE = "The 12 quick foxes' naïve café: x += 3.14;\r\n\n\t  日本語とПривет 🦊\x00 \u00a0!?  end \n"
AGAIN = "Fetch it again, or train a tokenizer with: python -m scripts.tok_train"


def load_encoding(folder: str | Path) -> tiktoken.Encoding:
    """Load tokenizer.json of `folder`, or tokenizer.pkl if there is none.

    Raises:
        UserError: there is no valid tokenizer, or the two files hold different ones; the user has to choose.
    """
    plain, pickled = Path(folder) / "tokenizer.json", Path(folder) / "tokenizer.pkl"
    ours = _load_plain(plain, pickled.is_file()) if plain.is_file() else None
    if ours is None:
        if not pickled.is_file():
            raise UserError(f"there is no tokenizer in {folder}: neither tokenizer.json nor tokenizer.pkl. "
                            "Train one with: python -m scripts.tok_train")
        return _load_pickled(pickled)
    enc, pickle_sha256 = ours
    if pickled.is_file() and sha256_of(pickled) != pickle_sha256:  # replaced, or written by another tiktoken version
        if fingerprint_of(_load_pickled(pickled)) != fingerprint_of(enc):
            raise UserError(f"tokenizer.json and tokenizer.pkl in {folder} are two different tokenizers. "
                            "Move the one you do not want out of the folder.")
    return enc


def save_encoding(enc: tiktoken.Encoding, token_bytes: "torch.Tensor", folder: str | Path) -> None:
    """Write the three files into `folder`; on an error, none of them.

    Args:
        enc: the tiktoken Encoding.
        token_bytes: int32 (V,), bytes of each token, 0 for special tokens.
        folder: created if missing.
    """
    import torch
    pickled, sizes = pickle.dumps(enc, protocol=4), io.BytesIO()
    torch.save(token_bytes, sizes)
    plain = {"format": FORMAT, "version": VERSION, "vocab_size": enc.n_vocab, "fingerprint": fingerprint_of(enc),
             "pickle_sha256": hashlib.sha256(pickled).hexdigest(), "pattern": enc._pat_str,
             "special_tokens": enc._special_tokens,
             "mergeable_ranks_base64": [base64.b64encode(token).decode() for token in tokens_of(enc)]}
    contents = {"tokenizer.json": json.dumps(plain, indent=0).encode(), "tokenizer.pkl": pickled,
                "token_bytes.pt": sizes.getvalue()}
    with ExitStack() as stack:  # all three temporary files are on disk before the first is renamed
        files = [stack.enter_context(atomic_write(Path(folder) / name)) for name in contents]
        for file, content in zip(files, contents.values()):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def tokens_of(enc: tiktoken.Encoding) -> list[bytes]:
    """Return the bytes of every ordinary token, in the order of their ids."""
    return sorted(enc._mergeable_ranks, key=enc._mergeable_ranks.__getitem__)


def fingerprint_of(enc: tiktoken.Encoding) -> str:
    """Return the SHA-256 (hex) of split pattern, tokens and special tokens. Equal fingerprints mean equal ids."""
    digest = hashlib.sha256(enc._pat_str.encode() + b"\0")
    for token in tokens_of(enc):
        digest.update(len(token).to_bytes(4, "little") + token)
    for name, id in sorted(enc._special_tokens.items(), key=lambda item: item[1]):
        digest.update(f"{id} {name}\0".encode())
    return digest.hexdigest()


def build_encoding(name: Any, pattern: Any, ranks: Any, specials: Any, where: str) -> tiktoken.Encoding:
    """Make a tiktoken Encoding of values that may come from anywhere.

    Args:
        name: of the Encoding, a short string.
        pattern: the split pattern. It must compile and lose nothing of the text PROBE.
        ranks: {bytes: rank} with the ranks 0 to N-1 and all single bytes.
        specials: {name: id} with the ids N to V-1 and all of SPECIAL_TOKENS.
        where: what the values come from, for messages.

    Raises:
        UserError: a value is not as described.
    """
    def need(valid: bool, what: str) -> None:
        if not valid:
            raise UserError(f"{where} is not a tokenizer for this code: {what}")

    need(type(name) is str and len(name) <= MAX_NAME, "its name is not a short text")
    need(type(pattern) is str and 0 < len(pattern) <= MAX_PATTERN,
         f"its split pattern is not 1 to {MAX_PATTERN} characters")
    need(type(ranks) is dict and all(type(token) is bytes and token and type(rank) is int
                                     for token, rank in ranks.items()),
         "its tokens are not bytes with whole numbers")
    need(type(specials) is dict and len(specials) <= MAX_SPECIALS and all(
        type(token) is str and 0 < len(token) <= MAX_NAME and type(id) is int for token, id in specials.items()),
        "its special tokens are not names with whole numbers")
    need(all(bytes([byte]) in ranks for byte in range(256)), "some single bytes are not among its tokens")
    need(set(ranks.values()) == set(range(len(ranks))), "the ranks of its tokens are not 0, 1, 2, … without gaps")
    need(set(specials.values()) == set(range(len(ranks), len(ranks) + len(specials))),
         "its special tokens are not the last ids, without gaps")
    missing = [token for token in SPECIAL_TOKENS if token not in specials]
    need(not missing, f"it has no special token {' '.join(missing)}")
    try:
        enc = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        lossless = enc.decode_bytes(enc.encode_ordinary(PROBE)) == PROBE.encode()
    except BaseException as error:  # a Rust panic in tiktoken is not an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise UserError(f"{where} is not a tokenizer for this code: "
                        f"its split pattern fails ({str(error)[:200]})") from None
    need(lossless, "its split pattern loses parts of the text")
    return enc


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE:
            raise UserError(f"{path} has {path.stat().st_size} bytes; no tokenizer has more than {MAX_FILE}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _load_pickled(path: Path) -> tiktoken.Encoding:
    state = encoding_state(_read(path), str(path))
    expected = {"name", "pat_str", "mergeable_ranks", "special_tokens"}
    if set(state) != expected:
        raise UserError(f"{path} is refused: its Encoding does not hold exactly {', '.join(sorted(expected))}")
    return build_encoding(state["name"], state["pat_str"], state["mergeable_ranks"], state["special_tokens"], str(path))


def _load_plain(path: Path, has_pickle: bool) -> tuple[tiktoken.Encoding, str] | None:
    """Load tokenizer.json. Return (Encoding, SHA-256 of the pickle written with it).

    With `has_pickle`, return None if the file has another format.
    """
    try:
        data = json.loads(_read(path).decode())
    except UserError:
        raise
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON, or is damaged. {AGAIN}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        if has_pickle:
            return None  # Hugging Face's tokenizers use the same file name
        raise UserError(f"{path} is not a tokenizer of this project's format. {AGAIN}")
    if data.get("version") != VERSION:
        raise UserError(f"{path} has format version {str(data.get('version'))[:20]}; this code reads {VERSION}. "
                        "Update the code.")
    damaged = UserError(f"{path} is damaged: its fields do not agree. {AGAIN}")
    try:
        tokens = [base64.b64decode(token, validate=True) for token in data["mergeable_ranks_base64"]]
        pattern, specials, size = data["pattern"], data["special_tokens"], data["vocab_size"]
        pickle_sha256 = data["pickle_sha256"]
    except (KeyError, TypeError, ValueError):
        raise damaged from None
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) != len(tokens):
        raise damaged
    enc = build_encoding("rustbpe", pattern, ranks, specials, str(path))
    if enc.n_vocab != size or fingerprint_of(enc) != data.get("fingerprint"):
        raise damaged
    return enc, pickle_sha256
