"""Words to spell, English or invented, split into training and test words.

The split of a word depends on the word alone, so no seed, order or size changes it.
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from nanochat.errors import UserError
from nanochat.files import base_dir
from nanochat.logs import print_line
from nanochat.small_world.world import pick
from nanochat.transfer import Listed, NotFetched, fetch_file
from tasks.base import in_test, one_of, rng_for

WORDS_FILE = "words_alpha.txt"
URL = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
SOURCES = ("auto", "words_alpha", "invented")
INVENTED = 20_000
FEWEST = 100           # words that a list must have

ONSETS = "b br c cl d dr f fl g gl gr h j k kl l m n p pl pr r s sk sl sp st t tr v w z".split()
VOWELS = "a e i o u a e i o u ai ea oo ou".split()
CODAS = ["", "", "", *"b ck d k l ll m n n nd nt p r r rk s ss st t x".split()]


class WordList(NamedTuple):
    """The words of one split in a fixed order, and their source: "words_alpha" or "invented"."""

    words: tuple[str, ...]
    source: str


def load_words(split: str, source: str = "auto", fetch: bool = False) -> WordList:
    """Return the words of a split.

    Args:
        split: "train" for nine words in ten, "test" for the rest.
        source: "words_alpha" for the file words_alpha.txt of the base directory (370,000 English words), "invented" for
            words that need no file, "auto" for the file if it is there and invented words if not.
        fetch: whether to download the file if it is missing.

    Raises:
        UserError: the file is wanted but missing, cannot be downloaded, or holds anything but lower-case words.
    """
    one_of("split of the words", split, ("train", "test"))
    one_of("source of words", source, SOURCES)
    path = base_dir() / WORDS_FILE
    if fetch and source != "invented" and not path.exists():
        _fetch(path)
    if source == "invented" or source == "auto" and not path.exists():
        return WordList(_split(invented_words(), split == "test"), "invented")
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"there is no list of words at {path}. Put a file there, one lower-case word per line, from "
                        f'{URL}, or choose source="invented".') from error
    return WordList(_of_file(path, stat.st_mtime_ns, stat.st_size, split == "test"), "words_alpha")


@lru_cache(maxsize=1)
def invented_words() -> tuple[str, ...]:
    """Return 20,000 different pronounceable words of 4 to 9 lower-case ASCII letters, the same on every machine."""
    rng, found = rng_for("invented words"), {}
    while len(found) < INVENTED:
        syllables = 2 + int(rng.random() * 2)
        word = "".join(pick(rng, ONSETS) + pick(rng, VOWELS) + pick(rng, CODAS) for _ in range(syllables))
        if 4 <= len(word) <= 9:
            found[word] = None
    return tuple(found)


@lru_cache(maxsize=4)
def _split(words: tuple[str, ...], test: bool) -> tuple[str, ...]:
    return tuple(word for word in words if in_test(word) == test)


@lru_cache(maxsize=4)
def _of_file(path: Path, changed: int, size: int, test: bool) -> tuple[str, ...]:
    """Return the words of a file. `changed` and `size` are part of the cache key: a changed file is read again."""
    return _split(_read(path, changed, size), test)


@lru_cache(maxsize=1)
def _read(path: Path, changed: int, size: int) -> tuple[str, ...]:
    return checked(path.read_bytes(), str(path))


def checked(data: bytes, where: str) -> tuple[str, ...]:
    """Return the words of a list with one word per line, without duplicates.

    Raises UserError, with `where` and the line, for anything but lower-case ASCII letters.
    """
    words = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        word = line.strip()
        if not word:
            continue
        if not (word.isalpha() and word.islower()):   # bytes methods: ASCII letters only
            raise UserError(f"{where}, line {number} is not one lower-case word: {line[:40]!r}. "
                            "Remove the file, or correct the line.")
        words[word.decode("ascii")] = None
    if len(words) < FEWEST:
        raise UserError(f"{where} holds {len(words)} words; at least {FEWEST} are needed. "
                        f"Remove the file and fetch it again from {URL}.")
    return tuple(words)


def _fetch(path: Path) -> None:
    """Download and check the list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    came = path.with_name(f".{path.name}.unchecked")
    try:
        fetch_file(URL, came, Listed(), say=print_line)
        checked(came.read_bytes(), URL)
        os.replace(came, path)
    except NotFetched as error:
        raise UserError(f"the list of words cannot be fetched from {URL} ({error}). "
                        f'Put it at {path} by hand, or use invented words (source="invented").') from error
    finally:
        came.unlink(missing_ok=True)
