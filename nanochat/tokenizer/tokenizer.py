"""Text and conversations to token ids and back: byte-level BPE, with nine special tokens as the last ids.

    tokenizer = get_tokenizer()                  # of $NANOCHAT_BASE_DIR; python -m scripts.tok_train trains it
    tokenizer.decode(tokenizer.encode("Hello", prepend="<|bos|>"))

files.py reads and writes the files of a tokenizer: tokenizer.json, tokenizer.pkl and token_bytes.pt.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tiktoken

from nanochat.errors import UserError
from nanochat.files import base_dir
from nanochat.tokenizer.conversation import Turn, turns_of
from nanochat.tokenizer.files import (
    PROBE,
    SPECIAL_TOKENS,
    build_encoding,
    fingerprint_of,
    load_encoding,
    save_encoding,
    tokens_of,
)

if TYPE_CHECKING:
    import torch

SPLIT_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
                 r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
SMALLEST = 256 + len(SPECIAL_TOKENS)  # a vocabulary without any merge


class RustBPETokenizer:
    """A byte-level BPE tokenizer. Encodes with rustbpe if it is installed, else with tiktoken; both give the same ids.

    Attributes:
        enc: the tiktoken Encoding.
        bos_token_id: id that every document and conversation begins with; may be set.
    """

    def __init__(self, enc: tiktoken.Encoding, bos_token: str = "<|bos|>"):
        self.enc = enc
        self._specials: dict[str, int] = dict(enc._special_tokens)
        self.bos_token_id = self.encode_special(bos_token)

    # ---- training, loading, saving

    @classmethod
    def train_from_iterator(cls, texts: Iterable[str], vocab_size: int,
                            progress: Callable[[str, int, int], object] | None = None) -> "RustBPETokenizer":
        """Train a tokenizer on `texts`.

        Args:
            texts: any iterable of documents.
            vocab_size: tokens in all: 256 bytes, the merges, and 9 special tokens as the last ids. If the text has too
                few different pairs, the vocabulary is smaller and a warning says so.
            progress: called as progress(stage, done, total) about every second: "count" with bytes of text and 0, then
                "merge" with merges.

        Raises:
            UserError: `vocab_size` is below 265, a document is not a string, or rustbpe is not built.
        """
        if type(vocab_size) is not int or not SMALLEST <= vocab_size <= 1 << 24:
            raise UserError(f"vocab_size is {vocab_size!r}; it must be a whole number from {SMALLEST} (256 bytes and "
                            f"{len(SPECIAL_TOKENS)} special tokens) to {1 << 24}.")
        if isinstance(texts, str):
            raise UserError("train_from_iterator takes an iterable of texts, and was given one text; put it in a list.")
        Tokenizer = _rustbpe()
        if Tokenizer is None:
            raise UserError("training a tokenizer needs the rustbpe of this repository, which is not built; "
                            "run: bash dev/setup.sh")
        trainer = Tokenizer()
        trainer.train_from_iterator(_checked(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN,
                                    progress=progress)
        pairs = [(bytes(token), rank) for token, rank in trainer.get_mergeable_ranks()]
        specials = {name: len(pairs) + i for i, name in enumerate(SPECIAL_TOKENS)}
        tokenizer = cls(build_encoding("rustbpe", SPLIT_PATTERN, dict(pairs), specials, "the trained tokenizer"))
        if tokenizer.get_vocab_size() < vocab_size:
            warnings.warn(f"the text has too few different pairs for {vocab_size} tokens: the vocabulary has "
                          f"{tokenizer.get_vocab_size()}", stacklevel=2)
        return tokenizer

    @classmethod
    def from_directory(cls, folder: str | Path) -> "RustBPETokenizer":
        """Load tokenizer.json, or the published tokenizer.pkl, of `folder`. Raises UserError if neither is valid."""
        return cls(load_encoding(folder))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer.pkl and token_bytes.pt into `folder`; on an error, none of them."""
        save_encoding(self.enc, self.token_bytes(), folder)

    # ---- the vocabulary

    @cached_property
    def _tokens(self) -> list[bytes]:
        return tokens_of(self.enc)

    def get_vocab_size(self) -> int:
        """Return V, the number of ordinary and special tokens. Ids are 0 to V-1."""
        return self.enc.n_vocab

    def get_bos_token_id(self) -> int:
        """Return the id that every document and conversation begins with."""
        return self.bos_token_id

    def get_special_tokens(self) -> set[str]:
        """Return the names of the special tokens."""
        return set(self._specials)

    def encode_special(self, name: str) -> int:
        """Return the id of a special token. Raises UserError for an unknown name."""
        if name not in self._specials:
            raise UserError(f"this tokenizer has no special token {name!r}; it has {' '.join(self._specials)}")
        return self._specials[name]

    def id_to_token(self, id: int) -> str:
        """Return one token as text; invalid UTF-8 becomes U+FFFD."""
        return self.decode([id])

    def token_bytes(self) -> "torch.Tensor":
        """Return int32 (V,): the number of bytes of each token, 0 for special tokens."""
        import torch
        sizes = torch.zeros(self.get_vocab_size(), dtype=torch.int32)
        sizes[:len(self._tokens)] = torch.tensor([len(token) for token in self._tokens], dtype=torch.int32)
        return sizes

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of split pattern, tokens and special tokens. Equal fingerprints mean equal ids."""
        return fingerprint_of(self.enc)

    # ---- text

    @cached_property
    def _rust(self) -> Any | None:
        """The rustbpe encoder of this vocabulary, several times as fast as tiktoken; None if rustbpe is not built."""
        Tokenizer = _rustbpe()
        try:
            return Tokenizer and Tokenizer.from_ranks(self.enc._mergeable_ranks, self.enc._pat_str)
        except ValueError as error:
            warnings.warn(f"rustbpe cannot use this vocabulary ({error}): encoding goes through tiktoken and is slower",
                          stacklevel=3)
            return None

    def encode(self, text: str | Sequence[str], prepend: str | int | None = None, append: str | int | None = None,
               num_threads: int = 8) -> list[int] | list[list[int]]:
        """Return the ids of a text, or a list of ids for each of a list of texts.

        Args:
            text: one or several texts. The text itself never becomes a special token, even if it contains the name of
                one. Lone surrogates are encoded as U+FFFD.
            prepend, append: special tokens, by name or id, put before and after each text.
            num_threads: for tiktoken; rustbpe uses all cores.

        Raises:
            UserError: an argument is not a text, or there is no such token.
        """
        before, after = ([] if token is None else [self._id_of(token)] for token in (prepend, append))
        if isinstance(text, str):
            ids = self._encode(text)
            return before + ids + after if before or after else ids
        rows = self._encode_batch(_texts(text), num_threads)
        return [before + row + after for row in rows] if before or after else rows

    __call__ = encode

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids (uint32) and offsets (int64, (N+1,)) of N texts: text i is ids[offsets[i]:offsets[i + 1]]."""
        texts = _texts(texts)
        if self._rust is not None:
            ids, offsets = _with_rustbpe(self._rust.batch_encode_flat, texts)
            return np.frombuffer(ids, dtype=np.uint32), np.frombuffer(offsets, dtype=np.uint64).astype(np.int64)
        rows = self._encode_batch(texts, num_threads=8)
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return np.fromiter(itertools.chain.from_iterable(rows), dtype=np.uint32, count=int(offsets[-1])), offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids. Special tokens become their names, invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of ids. Raises UserError for an id outside the vocabulary."""
        try:
            return self.enc.decode_bytes(ids)
        except (KeyError, OverflowError):
            wrong = next(id for id in ids if not 0 <= id < self.get_vocab_size())
            raise UserError(f"id {wrong} is not in this tokenizer's vocabulary of {self.get_vocab_size()}") from None

    def check_round_trip(self, texts: Sequence[str]) -> None:
        """Raise UserError unless decoding restores every text, and the ids are those of tiktoken."""
        texts = [PROBE, *texts]
        references = _with_tiktoken(self.enc.encode_ordinary_batch, texts)
        for text, ids, reference in zip(texts, self.encode(texts), references):
            decoded = self.decode(ids)
            if decoded != text or ids != reference:
                what = "is not restored by decoding its ids" if decoded != text else "has other ids in tiktoken"
                raise UserError(f"this tokenizer is broken: {text[:60]!r} {what}. "
                                "Train one again: python -m scripts.tok_train")

    def _id_of(self, token: str | int) -> int:
        if isinstance(token, str):
            return self.encode_special(token)
        if not 0 <= token < self.get_vocab_size():
            raise UserError(f"id {token} is not in this tokenizer's vocabulary of {self.get_vocab_size()}")
        return int(token)

    def _encode(self, text: str) -> list[int]:
        if self._rust is not None:
            return _with_rustbpe(self._rust.encode, text)
        return _with_tiktoken(self.enc.encode_ordinary, text)

    def _encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        if self._rust is not None:
            return _with_rustbpe(self._rust.batch_encode, texts)
        return _with_tiktoken(self.enc.encode_ordinary_batch, texts, num_threads=num_threads)

    # ---- conversations

    def render_conversation(self, conversation: dict, max_tokens: int = 2048) -> tuple[list[int], list[int]]:
        """Return (ids, mask) of a conversation, to train on: bos, then each turn between its start and end token.

        Args:
            conversation: see conversation.py. A leading system message becomes the start of the first user text.
            max_tokens: both lists are cut at this length.

        Returns:
            The ids, and for each 1 if the assistant writes it and is trained on it, else 0.

        Raises:
            UserError: the conversation is not well-formed; names the message.
        """
        if max_tokens < 1:
            raise UserError(f"max_tokens is {max_tokens}; it must be 1 or more")
        ids, mask = self._render(turns_of(conversation))
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: dict) -> list[int]:
        """Return the prompt for the assistant's next turn: the conversation and the token <|assistant_start|>.

        A last message of the assistant is left out. The prompt is not cut to a length; the caller decides what fits.
        """
        turns = turns_of(conversation)
        if turns[-1][0] == "assistant":
            turns = turns[:-1]
        return self._render(turns)[0] + [self.encode_special("<|assistant_start|>")]

    def _render(self, turns: list[Turn]) -> tuple[list[int], list[int]]:
        ids, mask = [self.bos_token_id], [0]

        def add(tokens: list[int], trained: int) -> None:
            ids.extend(tokens)
            mask.extend([trained] * len(tokens))

        def between(kind: str, tokens: list[int], trained: int) -> None:
            add([self.encode_special(f"<|{kind}_start|>"), *tokens, self.encode_special(f"<|{kind}_end|>")], trained)

        for role, parts in turns:
            trained = int(role == "assistant")
            add([self.encode_special(f"<|{role}_start|>")], 0)
            for kind, text in parts:
                tokens = self._encode(text)
                if kind == "python":
                    between("python", tokens, trained)
                elif kind == "python_output":
                    between("output", tokens, 0)
                else:
                    add(tokens, trained)
            add([self.encode_special(f"<|{role}_end|>")], trained)
        return ids, mask

    def visualize(self, ids: Sequence[int], mask: Sequence[int]) -> str:
        """Return the tokens separated by bars and coloured for a terminal: green is trained on, red is not."""
        return "|".join(f"\033[{32 if trained else 31}m{self.decode([id])}\033[0m" for id, trained in zip(ids, mask))


def tokenizer_dir() -> Path:
    """Return the folder of the tokenizer in the base directory."""
    return base_dir() / "tokenizer"


def get_tokenizer() -> RustBPETokenizer:
    """Load the tokenizer of the base directory. Raises UserError, with how to train one, if there is none."""
    return RustBPETokenizer.from_directory(tokenizer_dir())


def get_token_bytes(device: "torch.device | str" = "cpu") -> "torch.Tensor":
    """Return int32 (V,): bytes of each token of the base directory's tokenizer, 0 for special tokens.

    They are counted from the tokens, because published code counted tokens of incomplete UTF-8 wrong. token_bytes.pt is
    read only if there is no tokenizer beside it.
    """
    import torch
    folder, path = tokenizer_dir(), tokenizer_dir() / "token_bytes.pt"
    if (folder / "tokenizer.json").is_file() or (folder / "tokenizer.pkl").is_file() or not path.is_file():
        return get_tokenizer().token_bytes().to(device)
    try:
        sizes = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a cut or foreign file
        raise UserError(f"{path} cannot be read ({type(error).__name__}); "
                        "remove it and fetch the tokenizer again") from None
    integers = isinstance(sizes, torch.Tensor) and sizes.dtype in (torch.int32, torch.int64)
    if not integers or sizes.ndim != 1 or bool((sizes < 0).any()):
        raise UserError(f"{path} does not hold one whole number of bytes per token; "
                        "remove it and fetch the tokenizer again")
    return sizes.to(device=device, dtype=torch.int32)


def _rustbpe() -> Any | None:
    """Return this repository's rustbpe.Tokenizer; None if it is not built or another package has that name."""
    try:
        from rustbpe import Tokenizer
    except ImportError:
        return None
    return Tokenizer if hasattr(Tokenizer, "from_ranks") else None


# ---- checking and repairing texts


def _checked(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts with surrogates repaired. Raises UserError for anything but a text."""
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"document {i} is not text but {type(text).__name__}")
        yield text if text.isascii() else _without_surrogates(text)


def _texts(texts: Any) -> list[str]:
    if not isinstance(texts, (list, tuple)):
        raise UserError(f"encode takes a text or a list of texts, and was given {type(texts).__name__}")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"encode takes a text or a list of texts; number {i} of the list is {type(text).__name__}")
    return list(texts)


def _without_surrogates(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates, as tiktoken does. Broken JSON escapes produce them."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _with_rustbpe(encode: Callable, text: str | list[str]) -> Any:
    """Call rustbpe, which takes only valid UTF-8. Surrogates are rare, so they are repaired only after a failure."""
    try:
        return encode(text)
    except ValueError as error:
        if not isinstance(error.__cause__, UnicodeEncodeError):
            raise UserError(f"rustbpe cannot encode this text: {error}") from error
        return encode(_without_surrogates(text) if isinstance(text, str) else [_without_surrogates(t) for t in text])


def _with_tiktoken(encode: Callable, *arguments: Any, **options: Any) -> Any:
    """Call tiktoken. Its regex panics on some texts, such as a million spaces, and a panic is not an Exception."""
    try:
        return encode(*arguments, **options)
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise UserError("tiktoken cannot split this text (a very long run of spaces?). "
                            "rustbpe can; build it with: bash dev/setup.sh") from None
        raise
