"""Train the tokenizer on the pretraining text and save it in $NANOCHAT_BASE_DIR/tokenizer.

    python -m scripts.tok_train                                   # 65,536 tokens from 2 billion characters
    python -m scripts.tok_train --vocab_size=8192 --max_chars=5e7

A different tokenizer that was there before is copied to another folder first: models trained with it still need it.
"""

import json
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.checks import NOTHING_CHANGED, dry_run_flag, need_writable
from nanochat.cli import COUNT, FROM_ZERO, Range, flag, parse, run_main
from nanochat.dataset import iter_documents
from nanochat.dataset.shards import data_dir, read_source
from nanochat.errors import UserError
from nanochat.files import atomic_write, base_dir, lock
from nanochat.recipe import published
from nanochat.tokenizer import RustBPETokenizer, tokenizer_dir

LEAST_COMPRESSION = 1.1  # bytes per token; a vocabulary of bytes has 1
SAMPLE_DOCUMENTS, SAMPLE_CHARS = 200, 10_000  # of the training text, for the round-trip check


@dataclass
class Config:
    max_chars: int = flag(published.tokenizer.max_chars, "characters to train on at most", within=COUNT)
    doc_cap: int = flag(published.tokenizer.doc_cap, "characters to use of each document, 0 for all of it",
                        within=FROM_ZERO)
    vocab_size: int = flag(published.tokenizer.vocab_size, "tokens, including the 9 special ones; at least 265",
                           within=Range(265, 1 << 24))
    dry_run: bool = dry_run_flag()


def main(argv: Sequence[str] | None = None) -> None:
    """Train, check and save a tokenizer. Raises UserError for wrong flags, or if there is no text."""
    config = parse(Config, argv, __doc__)
    folder = tokenizer_dir()
    need_writable(folder)
    if config.dry_run:
        return _say_what_would_be_done(config, folder)
    way_out = ("Wait until it ends, or stop it with {kill}; with another NANOCHAT_BASE_DIR two can be trained side by "
               "side.")
    what = f"a tokenizer is already being trained into {folder}"
    with lock(base_dir() / "locks" / "tokenizer.lock", what, way_out) or nullcontext():
        _train(config, folder)


def _say_what_would_be_done(config: Config, folder: Path) -> None:
    next(iter_documents("train"), None)  # raises where there is no text
    kept = " The tokenizer that is there would be kept beside it, if it is another." if folder.exists() else ""
    print(f"a tokenizer of {config.vocab_size:,} tokens would be trained on at most {config.max_chars:,} characters of "
          f"{data_dir()}, and go to {folder}.{kept} {NOTHING_CHANGED.capitalize()}.")


def _train(config: Config, folder: Path) -> None:
    """Train the tokenizer and put it in its place. Only one process at a time may do this."""
    seen: dict[str, Any] = {"chars": 0, "uncut": 0, "docs": 0, "sample": []}
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the text has too few")  # _summary reports it
            tokenizer = RustBPETokenizer.train_from_iterator(_documents(config, seen), config.vocab_size,
                                                             _progress(config, seen))
    finally:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # ends the progress line
    seconds = time.perf_counter() - start
    if not seen["chars"]:
        raise UserError(f"there is no text in {data_dir()}: nothing to train a tokenizer on")

    trial = folder.with_name("tokenizer.trial")  # check the files that were written, before they replace anything
    try:
        tokenizer.save(trial)
        saved = RustBPETokenizer.from_directory(trial)
        saved.check_round_trip(seen["sample"])
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    kept = _keep_previous(folder, tokenizer.fingerprint())
    tokenizer.save(folder)

    meta = {"vocab_size": tokenizer.get_vocab_size(), "vocab_size_asked": config.vocab_size, "chars": seen["chars"],
            "chars_uncut": seen["uncut"], "docs": seen["docs"], "max_chars": config.max_chars,
            "doc_cap": config.doc_cap, "seconds": round(seconds, 2), "fingerprint": tokenizer.fingerprint(),
            "source": read_source(data_dir()) or None}
    with atomic_write(folder / "meta.json", "w") as file:
        json.dump(meta, file, indent=1)
    _summary(tokenizer, meta, seen["sample"], folder, kept)


def _documents(config: Config, seen: dict[str, Any]) -> Iterator[str]:
    """Yield the training documents, cut, up to `max_chars` in all.

    Keeps in `seen`: chars (characters yielded), uncut (characters before cutting), docs (documents) and sample (some
    documents for the round-trip check).
    """
    for document in iter_documents("train"):
        seen["uncut"] += len(document)
        document = document[:min(config.doc_cap or len(document), config.max_chars - seen["chars"])]
        seen["chars"] += len(document)
        seen["docs"] += 1
        if len(seen["sample"]) < SAMPLE_DOCUMENTS:
            seen["sample"].append(document[:SAMPLE_CHARS])
        yield document
        if seen["chars"] >= config.max_chars:
            return


def _progress(config: Config, seen: dict[str, Any]) -> Callable[[str, int, int], None]:
    """Return a function that shows progress: in place on a terminal, else a line every ten seconds."""
    terminal, shown = sys.stderr.isatty(), time.monotonic()

    def show(stage: str, done: int, total: int) -> None:
        nonlocal shown
        line = f"merging: {done:,} of {total:,}" if stage == "merge" else \
            f"reading: {seen['chars']:,} characters of at most {config.max_chars:,}, {seen['docs']:,} documents"
        if terminal:
            print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - shown >= 10:
            print(line, file=sys.stderr, flush=True)
            shown = time.monotonic()
    return show


def _keep_previous(folder: Path, fingerprint: str) -> Path | None:
    """Copy a different tokenizer in `folder` to another folder; return that folder, or None if there was none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.pkl")):
        return None
    try:
        previous = RustBPETokenizer.from_directory(folder).fingerprint()
    except UserError:
        previous = f"unread_{time.strftime('%Y%m%d_%H%M%S')}"
    if previous == fingerprint:
        return None
    aside = folder.with_name(f"tokenizer_{previous[:8] if len(previous) == 64 else previous}")
    if not aside.exists():
        partial = folder.with_name(f"{aside.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            shutil.copytree(folder, partial)
            partial.rename(aside)
        except OSError as error:  # copytree raises one of its own, with a list
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"the tokenizer that is in {folder} cannot be kept as {aside} ({str(error)[:300]}); it "
                            "was not replaced. Free some space, or set NANOCHAT_BASE_DIR to another disk.") from error
    (folder / "eval.json").unlink(missing_ok=True)  # it describes the previous tokenizer
    return aside


def _summary(tokenizer: RustBPETokenizer, meta: dict[str, Any], sample: list[str], folder: Path,
             kept: Path | None) -> None:
    """Print what was trained. `kept`: where the previous tokenizer was copied to, if anywhere."""
    _, offsets = tokenizer.encode_flat(sample)
    size = sum(len(text.encode()) for text in sample)
    rate = size / int(offsets[-1])
    longest = int(tokenizer.token_bytes().argmax())
    print(f"tokenizer: {meta['vocab_size']:,} tokens = 256 bytes + {meta['vocab_size'] - 265:,} merges + 9 special")
    if meta["vocab_size"] < meta["vocab_size_asked"]:
        print(f"    smaller than the {meta['vocab_size_asked']:,} asked for: the text has no more pairs to merge")
    print(f"    trained on {meta['chars']:,} characters of {meta['docs']:,} documents in {meta['seconds']:.1f} s")
    if meta["chars"] < 0.5 * meta["chars_uncut"]:
        print(f"    cutting documents at {meta['doc_cap']:,} characters left "
              f"{meta['chars'] / meta['chars_uncut']:.1%} of their text; --doc_cap=0 uses all of it")
    print(f"    {rate:.2f} bytes per token on {len(sample)} documents, "
          "all of which decode to the same text")
    print(f"    longest token: {tokenizer.id_to_token(longest)!r}")
    print(f"    saved in {folder}, fingerprint {meta['fingerprint'][:8]}")
    if rate < LEAST_COMPRESSION:
        print(f"verdict: no change: 1.00 → {rate:.2f} bytes per token\n"
              "WARNING: this tokenizer hardly compresses: give it a larger --vocab_size, or more text")
    else:
        print(f"verdict: better: 1.00 → {rate:.2f} bytes per token")
    if kept is not None:
        print(f"    the previous tokenizer is kept in {kept}")


if __name__ == "__main__":
    run_main(main)
