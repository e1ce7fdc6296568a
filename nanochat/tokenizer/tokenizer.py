"""Text and conversations to token ids and back: byte-level BPE with nine special tokens behind the merges.

    tokenizer = get_tokenizer()                                   # of $NANOCHAT_BASE_DIR; python -m scripts.tok_train makes it
    tokenizer.decode(tokenizer.encode("Hello", prepend="<|bos|>"))

A tokenizer's folder holds tokenizer.json, tokenizer.pkl and token_bytes.pt: nanochat/tokenizer/files.py reads and writes them.
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
SMALLEST = 256 + len(SPECIAL_TOKENS)  # a vocabulary without a single merge


class RustBPETokenizer:
    """A byte-level BPE vocabulary. `.enc` is its tiktoken Encoding; encoding goes through rustbpe where that is installed."""

    def __init__(self, enc: tiktoken.Encoding, bos_token: str = "<|bos|>"):
        self.enc = enc
        self._specials: dict[str, int] = dict(enc._special_tokens)
        self.bos_token_id = self.encode_special(bos_token)

    # ---- making, loading, saving

    @classmethod
    def train_from_iterator(cls, texts: Iterable[str], vocab_size: int,
                            progress: Callable[[str, int, int], object] | None = None) -> "RustBPETokenizer":
        """Train merges on `texts` until there are `vocab_size` tokens, the specials among them.

        A text with too few distinct pairs gives a smaller vocabulary, with a warning; the specials are the last ids all the same.
        `progress(stage, done, total)` is called about every second: "count" with bytes of text and 0, then "merge" with merges.
        Raises UserError for a vocabulary below 265 (256 bytes and 9 specials), or where rustbpe is not built.
        """
        if type(vocab_size) is not int or not SMALLEST <= vocab_size <= 1 << 24:
            raise UserError(f"vocab_size is {vocab_size!r}; it must be a whole number from {SMALLEST} (256 bytes and "
                            f"{len(SPECIAL_TOKENS)} special tokens) to {1 << 24}.")
        if isinstance(texts, str):
            raise UserError("train_from_iterator takes an iterable of texts, and was given one text; put it in a list.")
        Tokenizer = _rustbpe()
        if Tokenizer is None:
            raise UserError("training a tokenizer needs the rustbpe of this repository, which is not built; run: bash dev/setup.sh")
        trainer = Tokenizer()
        trainer.train_from_iterator(_checked(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN, progress=progress)
        pairs = [(bytes(token), rank) for token, rank in trainer.get_mergeable_ranks()]
        specials = {name: len(pairs) + i for i, name in enumerate(SPECIAL_TOKENS)}
        tokenizer = cls(build_encoding("rustbpe", SPLIT_PATTERN, dict(pairs), specials, "the trained tokenizer"))
        if tokenizer.get_vocab_size() < vocab_size:
            warnings.warn(f"the text has too few different pairs for {vocab_size} tokens: the vocabulary has "
                          f"{tokenizer.get_vocab_size()}", stacklevel=2)
        return tokenizer

    @classmethod
    def from_directory(cls, folder: str | Path) -> "RustBPETokenizer":
        """Load tokenizer.json, or the published tokenizer.pkl, of `folder`. Raises UserError where there is no sound one."""
        return cls(load_encoding(folder))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer.pkl and token_bytes.pt into `folder`, all or (on an error) none of them."""
        save_encoding(self.enc, self.token_bytes(), folder)

    # ---- the vocabulary

    @cached_property
    def _tokens(self) -> list[bytes]:
        return tokens_of(self.enc)

    def get_vocab_size(self) -> int:
        """Return V: ordinary and special tokens; ids are 0 to V-1."""
        return self.enc.n_vocab

    def get_bos_token_id(self) -> int:
        """Return the id that every document and conversation begins with."""
        return self.bos_token_id

    def get_special_tokens(self) -> set[str]:
        """Return the names of the special tokens."""
        return set(self._specials)

    def encode_special(self, name: str) -> int:
        """Return the id of a special token. Raises UserError for a name there is none of."""
        if name not in self._specials:
            raise UserError(f"this tokenizer has no special token {name!r}; it has {' '.join(self._specials)}")
        return self._specials[name]

    def id_to_token(self, id: int) -> str:
        """Return one token as text; bytes that are not whole UTF-8 show as U+FFFD."""
        return self.decode([id])

    def token_bytes(self) -> "torch.Tensor":
        """Return an int32 tensor (V,): the bytes each token stands for, 0 for specials. Counted in bytes, never in text."""
        import torch
        sizes = torch.zeros(self.get_vocab_size(), dtype=torch.int32)
        sizes[:len(self._tokens)] = torch.tensor([len(token) for token in self._tokens], dtype=torch.int32)
        return sizes

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) of split pattern, tokens and specials: equal for tokenizers that give the same ids."""
        return fingerprint_of(self.enc)

    # ---- text

    @cached_property
    def _rust(self) -> Any | None:
        """rustbpe's encoder of the same vocabulary, several times as fast as tiktoken with the same ids; None without rustbpe."""
        Tokenizer = _rustbpe()
        try:
            return Tokenizer and Tokenizer.from_ranks(self.enc._mergeable_ranks, self.enc._pat_str)
        except ValueError as error:
            warnings.warn(f"rustbpe cannot use this vocabulary ({error}): encoding goes through tiktoken and is slower", stacklevel=3)
            return None

    def encode(self, text: str | Sequence[str], prepend: str | int | None = None, append: str | int | None = None,
               num_threads: int = 8) -> list[int] | list[list[int]]:
        """Return the ids of a text, or a list of them for a list of texts.

        `prepend` and `append` are special tokens, by name or id, put around each text. The text itself never gives a special
        token, whatever it spells. Lone surrogates count as U+FFFD. `num_threads` holds for tiktoken; rustbpe uses all cores.
        """
        before, after = ([] if token is None else [self._id_of(token)] for token in (prepend, append))
        if isinstance(text, str):
            ids = self._encode(text)
            return before + ids + after if before or after else ids
        rows = self._encode_batch(_texts(text), num_threads)
        return [before + row + after for row in rows] if before or after else rows

    __call__ = encode

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts in one uint32 array, and int64 offsets (N+1,): text i is ids[offsets[i]:offsets[i + 1]]."""
        texts = _texts(texts)
        if self._rust is not None:
            ids, offsets = _well_formed(self._rust.batch_encode_flat, texts)
            return np.frombuffer(ids, dtype=np.uint32), np.frombuffer(offsets, dtype=np.uint64).astype(np.int64)
        rows = self._encode_batch(texts, num_threads=8)
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return np.fromiter(itertools.chain.from_iterable(rows), dtype=np.uint32, count=int(offsets[-1])), offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; specials show as their names, bytes that are not whole UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of ids. Raises UserError for an id outside the vocabulary."""
        try:
            return self.enc.decode_bytes(ids)
        except (KeyError, OverflowError):
            wrong = next(id for id in ids if not 0 <= id < self.get_vocab_size())
            raise UserError(f"id {wrong} is not in this tokenizer's vocabulary of {self.get_vocab_size()}") from None

    def check_round_trip(self, texts: Sequence[str]) -> None:
        """Raise UserError unless every text comes back from its ids unchanged, and all ids are those of `.enc`."""
        texts = [PROBE, *texts]
        for text, ids, reference in zip(texts, self.encode(texts), _without_panic(self.enc.encode_ordinary_batch, texts)):
            if self.decode(ids) != text or ids != reference:
                what = "does not come back from its ids" if self.decode(ids) != text else "has other ids in tiktoken"
                raise UserError(f"this tokenizer is broken: {text[:60]!r} {what}. Train one again: python -m scripts.tok_train")

    def _id_of(self, token: str | int) -> int:
        if isinstance(token, str):
            return self.encode_special(token)
        if not 0 <= token < self.get_vocab_size():
            raise UserError(f"id {token} is not in this tokenizer's vocabulary of {self.get_vocab_size()}")
        return int(token)

    def _encode(self, text: str) -> list[int]:
        if self._rust is not None:
            return _well_formed(self._rust.encode, text)
        return _without_panic(self.enc.encode_ordinary, text)

    def _encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        if self._rust is not None:
            return _well_formed(self._rust.batch_encode, texts)
        return _without_panic(self.enc.encode_ordinary_batch, texts, num_threads=num_threads)

    # ---- conversations

    def render_conversation(self, conversation: dict, max_tokens: int = 2048) -> tuple[list[int], list[int]]:
        """Return (ids, mask), both cut at `max_tokens`; mask is 1 for tokens the assistant writes and is trained on, else 0.

        bos, then each turn between its start and end token. A leading system message becomes the head of the first user text.
        Raises UserError, naming the message, for a conversation that is not well-formed (nanochat/tokenizer/conversation.py).
        """
        if max_tokens < 1:
            raise UserError(f"max_tokens is {max_tokens}; it must be 1 or more")
        ids, mask = self._render(turns_of(conversation))
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: dict) -> list[int]:
        """Return the ids the assistant goes on from: the conversation without a last assistant message, then its start token.

        Not cut: whoever generates knows how much of a long prompt fits.
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
        """Return the tokens divided by bars and coloured for a terminal: green is trained on, red is not."""
        return "|".join(f"\033[{32 if trained else 31}m{self.decode([id])}\033[0m" for id, trained in zip(ids, mask))


def tokenizer_dir() -> Path:
    """Return where the tokenizer of this base directory lives."""
    return base_dir() / "tokenizer"


def get_tokenizer() -> RustBPETokenizer:
    """Load the tokenizer of the base directory. Raises UserError, saying how to train one, where there is none."""
    return RustBPETokenizer.from_directory(tokenizer_dir())


def get_token_bytes(device: "torch.device | str" = "cpu") -> "torch.Tensor":
    """Return the int32 tensor (V,) of bytes per token, 0 for specials, of the base directory's tokenizer.

    Counted from the tokens; token_bytes.pt is read where it stands alone. (Published code counted tokens that are not whole
    UTF-8 wrong, so a file that disagrees with its tokenizer is not believed.)
    """
    import torch
    folder, path = tokenizer_dir(), tokenizer_dir() / "token_bytes.pt"
    if (folder / "tokenizer.json").is_file() or (folder / "tokenizer.pkl").is_file() or not path.is_file():
        return get_tokenizer().token_bytes().to(device)
    try:
        sizes = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a torn or foreign file
        raise UserError(f"{path} cannot be read ({type(error).__name__}); remove it and fetch the tokenizer again") from None
    whole = isinstance(sizes, torch.Tensor) and sizes.dtype in (torch.int32, torch.int64)
    if not whole or sizes.ndim != 1 or bool((sizes < 0).any()):
        raise UserError(f"{path} does not hold one whole number of bytes a token; remove it and fetch the tokenizer again")
    return sizes.to(device=device, dtype=torch.int32)


def _rustbpe() -> Any | None:
    """This repository's rustbpe.Tokenizer; None where it is not built, or where the package of that name elsewhere is installed."""
    try:
        from rustbpe import Tokenizer
    except ImportError:
        return None
    return Tokenizer if hasattr(Tokenizer, "from_ranks") else None


# ---- texts in


def _checked(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts, lone surrogates (as broken JSON escapes leave them) replaced. UserError for anything but text."""
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"document {i} is not text but {type(text).__name__}")
        yield text if text.isascii() else _mended(text)


def _texts(texts: Any) -> list[str]:
    if not isinstance(texts, (list, tuple)):
        raise UserError(f"encode takes a text or a list of texts, and was given {type(texts).__name__}")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"encode takes a text or a list of texts; number {i} of the list is {type(text).__name__}")
    return list(texts)


def _mended(text: str) -> str:
    """The text as tiktoken reads it: surrogate pairs joined, lone surrogates replaced."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _well_formed(encode: Callable, text: str | list[str]) -> Any:
    """Call rustbpe, which takes UTF-8 only; texts that are not are mended first, and only then, since almost none are."""
    try:
        return encode(text)
    except ValueError as error:
        if not isinstance(error.__cause__, UnicodeEncodeError):
            raise UserError(f"rustbpe cannot encode this text: {error}") from error
        return encode(_mended(text) if isinstance(text, str) else [_mended(part) for part in text])


def _without_panic(encode: Callable, *arguments: Any, **options: Any) -> Any:
    """Call tiktoken, whose regex gives up with a panic (no Exception) on some texts: a million spaces on end, say."""
    try:
        return encode(*arguments, **options)
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise UserError("tiktoken cannot split this text (a very long run of spaces?). "
                            "rustbpe can; build it with: bash dev/setup.sh") from None
        raise
