"""The text of a sweep: shards, tokenizer, and the held-out documents as tokens. Made once, kept in the sweep's folder.

    base_data/      shards; a link where the sweep was given a folder of shards
    tokenizer/      trained on them
    heldout.npz     tokens of the held-out documents
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.dataloader import BUFFER_DOCUMENTS, BUFFER_TOKENS, TextSource
from nanochat.dataset import Documents, shard_paths
from nanochat.dataset.importing import import_files
from nanochat.errors import UserError
from nanochat.files import atomic_write
from nanochat.tokenizer import RustBPETokenizer


def provide_shards(out: Path, data: str, text: Sequence[str], doc_separator: str, val_fraction: float) -> Path:
    """Return the folder of shards of a sweep, made or linked the first time.

    Args:
        out: the sweep's folder.
        data: a folder of shards, "" for none.
        text: files and folders to import otherwise; none where the shards are there already.
        doc_separator, val_fraction: as `import_files` takes them.

    Raises:
        UserError: there is no text, or another one than this folder's.
    """
    folder = out / "base_data"
    if data:
        asked = Path(data).expanduser().resolve()
        shard_paths("train", asked)  # raises where there is none
        with suppress(FileExistsError):
            folder.symlink_to(asked, target_is_directory=True)
        if folder.resolve() != asked:
            raise UserError(f"{out} is a sweep over the text of {folder.resolve()}, not of {asked}: use another --out")
    elif text:
        if folder.is_symlink():
            raise UserError(f"{out} is a sweep over the text of {folder.resolve()}: use another --out")
        import_files([Path(path).expanduser() for path in text], folder, doc_separator=doc_separator,
                     val_fraction=val_fraction)
    elif not folder.exists():
        raise UserError("there is no text yet: name some with --text=PATH, or a folder of shards with --data=FOLDER")
    return folder


def has_tokenizer(out: Path, vocab: int) -> bool:
    """Return whether the sweep has its tokenizer. Raises UserError where it is one of another text or size."""
    try:
        meta = json.loads((out / "tokenizer" / "meta.json").read_text())
    except (OSError, ValueError):
        return False
    if meta["vocab_size_asked"] != vocab:
        raise UserError(f"{out} is a sweep with a tokenizer of {meta['vocab_size_asked']:,} tokens, not {vocab:,}: use "
                        "another --out")
    return True


def count_training_tokens(folder: Path, tokenizer: Any, enough: int, cache: Path) -> dict[str, int]:
    """Return documents and tokens of the training text, and the longest of them; at most until there are `enough`.

    A document has one token more, the bos before it. The counts are kept in the file `cache`.
    """
    source = TextSource(tokenizer, "train", folder)
    about = [source.fingerprint(), tokenizer.fingerprint()]
    with suppress(OSError, ValueError, KeyError):
        found = json.loads(cache.read_text())
        if found["of"] == about and (found["whole"] or found["tokens"] >= enough):
            return found
    found = {"of": about, "documents": 0, "tokens": 0, "longest": 0, "whole": 1}
    for _, texts in source.walk(0, source.count):
        for ids in source.encode(texts):
            found["documents"] += 1
            found["tokens"] += len(ids) + 1
            found["longest"] = max(found["longest"], len(ids) + 1)
        if found["tokens"] >= enough and found["documents"] < source.count:
            found["whole"] = 0
            break
    with atomic_write(cache, "w") as file:
        json.dump(found, file)
    return found


def check_unseen(folder: Path, tokenizer: Any, tokens: int, cache: Path) -> None:
    """Raise UserError where a run of so many tokens would come to documents that it has seen.

    Documents wait in a buffer before they are packed, so that the second pass begins before the first has ended.
    """
    found = count_training_tokens(folder, tokenizer, tokens + 2 * BUFFER_TOKENS, cache)
    waiting = min(BUFFER_TOKENS + found["longest"], BUFFER_DOCUMENTS * found["longest"])
    if found["whole"] and found["tokens"] < tokens + waiting:
        most = max(0, found["tokens"] - waiting)
        raise UserError(f"the training text is too short: {found['tokens']:,} tokens, of which up to {waiting:,} wait "
                        f"in a buffer, and a run trains on {tokens:,}. It would see documents twice, and its loss "
                        f"would not be one on unseen text. Give more text, train at most {most:,} tokens, or allow it "
                        "with --repeat")


def held_out(folder: Path, tokenizer: Any, tokens: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of the held-out documents, one after the other, and where each ends. Kept in the file `path`.

    Of each document its beginning is taken, of all of them up to the same length, so that there are `tokens` in all
    (or all there are): many documents say more than few, since the tokens of one are alike.
    """
    source = TextSource(tokenizer, "val", folder)
    about = json.dumps([source.fingerprint(), tokenizer.fingerprint(), tokens])
    with suppress(OSError, ValueError, KeyError):
        with np.load(path) as kept:
            if str(kept["about"]) == about:
                return kept["ids"], kept["ends"]
    documents = []
    for _, texts in source.walk(0, source.count):
        documents += [ids[:tokens] for ids in source.encode(texts)]
        if len(documents) * 64 >= tokens:  # of so many, even short pieces are enough
            break
    cap = common_length([len(ids) for ids in documents], tokens)
    documents = [ids[:cap] for ids in documents if len(ids)]
    ids, ends = np.concatenate(documents).astype(np.uint32), np.cumsum([len(ids) for ids in documents])
    with atomic_write(path) as file:
        np.savez_compressed(file, about=about, ids=ids, ends=ends)
    return ids, ends


def common_length(lengths: Sequence[int], total: int) -> int:
    """Return the largest length c for which Σ min(length, c) is at most `total`, and at least 1."""
    left, waiting = total, sorted(lengths)
    for index, length in enumerate(waiting):
        share = left // (len(waiting) - index)
        if length > share:
            return max(1, share)
        left -= length
    return max(1, waiting[-1] if waiting else 1)


def tokenizer_of(out: Path) -> RustBPETokenizer:
    """Return the sweep's tokenizer."""
    return RustBPETokenizer.from_directory(out / "tokenizer")


def fingerprint_of(folder: Path) -> str:
    """Return a digest of the training and the held-out shards."""
    return "-".join(Documents(shard_paths(split, folder)).fingerprint() for split in ("train", "val"))
