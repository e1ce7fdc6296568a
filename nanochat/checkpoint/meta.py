"""The meta file of a checkpoint, and the names and sizes of the files that it lists. nanochat/checkpoint/__init__.py
describes them."""

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from nanochat.errors import UserError
from nanochat.files import to_json

STEP = r"(\d{6}|[1-9]\d{6,})"  # as %06d writes it
META = re.compile(rf"meta_{STEP}\.json(\.new)?")
# Also the optimizer state of published checkpoints (optim_000500_rank0.pt), and metas of an unfinished deletion. A save
# that was killed before it was committed leaves model_000500.pt.new and the like, which are no checkpoint's.
OF_CHECKPOINTS = re.compile(rf"meta_{STEP}\.json(\.new|\.gone)?|(model|optim)_{STEP}(_\w+)?\.pt")
FORMAT = 2  # what "format" says in a meta file whose bytes "meta_sha256" covers
SEAL = '"meta_sha256": "{}"'


class Corrupt(UserError):
    """This checkpoint cannot be used; an older one may be whole."""


def steps_in(folder: Path) -> list[int]:
    """Return the steps that have a meta file in `folder`, newest first."""
    names = (META.fullmatch(path.name) for path in folder.glob("meta_*"))
    return sorted({int(match[1]) for match in names if match}, reverse=True)


def holds_checkpoints(folder: Path) -> list[str]:
    """Return the names of the files in `folder` that are of a checkpoint, usable or not, sorted."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if OF_CHECKPOINTS.fullmatch(entry.name))


def sealed(meta: dict[str, Any]) -> str:
    """Return the text of a meta file, with the SHA-256 of its own bytes in it: of the text with "" in its place."""
    meta = {name: value for name, value in meta.items() if name not in ("format", "meta_sha256")}
    text = to_json({**meta, "format": FORMAT, "meta_sha256": ""}, indent=2)
    head, _, tail = text.rpartition(SEAL.format(""))
    return head + SEAL.format(hashlib.sha256(text.encode()).hexdigest()) + tail


def _seal_holds(text: str, meta: dict[str, Any]) -> bool:
    """Return whether a meta file is as `sealed` wrote it."""
    digest = meta.get("meta_sha256")
    head, found, tail = text.rpartition(SEAL.format(digest))
    return bool(found) and hashlib.sha256((head + SEAL.format("") + tail).encode()).hexdigest() == digest


def read_meta(folder: Path, step: int) -> dict[str, Any]:
    """Return the meta of a step, the committed new one before the old one. Raises Corrupt."""
    path = folder / f"meta_{step:06d}.json"
    for candidate in (path.with_suffix(".json.new"), path):
        with suppress(FileNotFoundError):
            return parse_meta(candidate)
    raise Corrupt(f"{path} is missing.")


def parse_meta(path: Path) -> dict[str, Any]:
    """Read and check a meta file. Raises FileNotFoundError, or Corrupt if it is not one or was changed."""
    step = path.name.split(".")[0].removeprefix("meta_")
    try:
        text = path.read_bytes().decode("utf-8")
        meta = json.loads(text)
        config, files = meta["model_config"], meta.get("files", {f"model_{step}.pt": {"size": 0, "sha256": ""}})
        sound = isinstance(config, dict) and f"model_{step}.pt" in files and all(
            name in (f"model_{step}.pt", f"optim_{step}.pt")  # a meta file cannot have others opened or deleted
            and isinstance(entry["size"], int) and isinstance(entry["sha256"], str) for name, entry in files.items())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Corrupt(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise Corrupt(f"{path} is not the meta file of a checkpoint: it must be a JSON object with model_config, and "
                      "list no files but its own.")
    since_format_2 = "format" in meta or "meta_sha256" in meta  # both, so that neither can be lost
    if since_format_2 and not _seal_holds(text, meta) or "periodical" in meta and "files" not in meta:
        raise Corrupt(f"{path} is damaged, or was changed after it was written: its sha256 is not the one in it.")
    if meta.get("format", FORMAT) != FORMAT:
        raise Corrupt(f"{path} is of format {meta['format']}, which this version does not know: it is of a newer one.")
    return {**meta, "step": int(step)}


def files_of(meta: dict[str, Any]) -> list[str]:
    """Return the names of a checkpoint's other files, the model first."""
    return sorted(meta.get("files") or [f"model_{meta['step']:06d}.pt"])


def open_file(folder: Path, name: str, meta: dict[str, Any]) -> IO[bytes]:
    """Open a file of a checkpoint and check its size. While its save is not finished, its name may end in .new.

    Raises Corrupt if it is missing, cannot be read or has another size.
    """
    size = meta["files"][name]["size"] if "files" in meta else None
    unfinished = (folder / f"meta_{meta['step']:06d}.json.new").exists()
    for path in (folder / f"{name}.new", folder / name) if unfinished else (folder / name,):
        try:
            file = open(path, "rb")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Corrupt(f"{path} cannot be read: {error.strerror}.") from error
        found = os.fstat(file.fileno()).st_size
        if found == size or (size is None and found):
            return file
        file.close()
    problem = f"is not {size} bytes long, as its meta file says" if size is not None else "is empty"
    raise Corrupt(f"{folder / name} {problem if (folder / name).exists() else 'is missing'}.")
