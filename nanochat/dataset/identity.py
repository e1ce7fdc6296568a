"""What data a run depends on, as digests, so that a run that resumes is told by name which of it has changed.

    origin = with_identity(origin, lambda: task.identity(), lambda: val.identity(), ranks)

Every checkpoint holds them as "identity": {"training": {name: digest}, "evaluation": {name: digest}}. A digest depends
on the contents alone, so that it is the same on every machine. One rule for all stages: a run whose training data
changed does not resume; that data for evaluation changed is told. What is large is sampled: of a shard its size and
three pieces, the last of which holds the sizes of all its parts; of a task its length and some of its conversations.
"""

import hashlib
import mmap
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from nanochat.distributed import Ranks, on_main
from nanochat.errors import UserError
from nanochat.files import to_json

SAMPLE_BYTES = 1 << 12
DIGITS = 12      # hex digits of a digest
TEXT = "text/"   # begins the names of shards, which may still arrive when a run begins
NAMED = 5        # changes that a message names

O = TypeVar("O")


def digest_of(value: Any) -> str:
    """Return the digest of bytes, or of what has a JSON form."""
    data = value if isinstance(value, bytes | mmap.mmap) else to_json(value).encode("utf-8", "backslashreplace")
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def digest_of_file(path: Path) -> str:
    """Return the digest of a file's size and of its beginning, middle and end."""
    size = path.stat().st_size
    parts = [str(size).encode()]
    with open(path, "rb") as file:
        for start in (0, max(0, size // 2 - SAMPLE_BYTES // 2), max(0, size - SAMPLE_BYTES)):
            file.seek(start)
            parts.append(file.read(SAMPLE_BYTES))
    return digest_of(b"|".join(parts))


def identity_of_shards(paths: Iterable[Path]) -> dict[str, str]:
    """Return the digest of each shard that is there."""
    return {f"{TEXT}{path.name}": digest_of_file(path) for path in paths if path.exists()}


def identity_of_bundle(bundle: Any) -> dict[str, str]:
    """Return the digest of each file of a CORE bundle; {} where there is none."""
    if bundle is None:
        return {}
    files = [bundle.folder / "core.yaml", bundle.folder / "eval_meta_data.csv",
             *(file for task in bundle.tasks if (file := task.file()) is not None)]
    return {f"CORE/{path.name}": digest_of_file(path) for path in files if path.exists()}


def changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return in words how data differs. Text that has arrived since is no change."""
    found = [f"{name} has changed ({before[name]} then, {now[name]} now)" for name in before
             if name in now and now[name] != before[name]]
    found += [f"{name} is gone" for name in before if name not in now]
    found += [f"{name} is new" for name in now if name not in before and not name.startswith(TEXT)]
    return found[:NAMED] + ([f"{len(found) - NAMED} more"] if len(found) > NAMED else [])


def with_identity(origin: O, training: Callable[[], dict[str, str]], evaluation: Callable[[], dict[str, str]],
                  ranks: Ranks) -> O:
    """Compare the data with that of the checkpoint a run resumes from, and return an origin that stores it. Collective.

    Args:
        origin: a nanochat.run.Origin. A checkpoint from before digests were stored has none to compare with.
        training, evaluation: return the digest of each thing the run is trained on or validated on, by name; called on
            rank 0.

    Raises:
        UserError: on all ranks, where training data has changed.
    """
    def look() -> dict[str, dict[str, str]]:
        tokenizer = origin.tokenizer.fingerprint()[:DIGITS]
        now = {"training": {"tokenizer": tokenizer, **training()}, "evaluation": evaluation()}
        before = (origin.meta.get("identity") or {}) if origin.step else {}
        if "training" in before and (found := changes(before["training"], now["training"])):
            raise UserError(f"the data that {origin.folder} was trained on is not what it was: {', '.join(found)}. Put "
                            "it back as it was to resume; --fresh moves the run aside and trains anew; another "
                            "--model-tag trains beside it.")
        if found := changes(before.get("evaluation") or now["evaluation"], now["evaluation"]):
            print(f"note: the data that {origin.folder} is validated on is not what it was: {', '.join(found)}. The "
                  "numbers from here on do not compare with those before.")
        return now

    identity = on_main("comparing the data with that of the checkpoint", look, ranks)
    return replace(origin, provenance={**origin.provenance, "identity": identity})
