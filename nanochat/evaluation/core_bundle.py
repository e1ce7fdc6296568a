"""The folder of tasks that CORE is measured on: found on disk, or fetched once; read, every row checked.

    bundle = open_bundle()                 # base_dir()/eval_bundle, fetched where it is missing
    for task in bundle.tasks:
        rows = task.rows()                 # dicts in the order of the file

The folder holds core.yaml (which tasks, how many examples in the prompt), eval_meta_data.csv (what guessing gives) and eval_data/ (one
JSON object a line; `.jsonl.gz` does as well). The published one is 162 MB unpacked; NANOCHAT_EVAL_BUNDLE_URL names another address.
"""

import csv
import gzip
import http.client
import json
import math
import os
import shutil
import time
import urllib.error
import urllib.request
import uuid
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nanochat.errors import UserError
from nanochat.files import FULL, base_dir, in_words, need_disk

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
TRIES = 3
TIMEOUT = 30.0  # seconds without a byte
LARGEST = 8 << 30  # bytes unpacked; the published bundle is far below, a zip that swells beyond is not one

# icl_task_type → the keys of a row and what they hold
KINDS = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}


class NoBundle(UserError):
    """There is no bundle, and it could not be fetched."""


@dataclass(frozen=True)
class CoreTask:
    """One label of core.yaml.

    kind: a key of KINDS. shots: examples before the question. delimiter: between a context and its continuation. baseline: what guessing
    gives, as a fraction. path: the file of rows; it may lack, or stand there with .gz behind its name.
    """

    label: str
    kind: str
    shots: int
    delimiter: str
    baseline: float
    path: Path

    def file(self) -> Path | None:
        """The file as it stands there, packed or not; None where there is none."""
        return next((path for path in (self.path, self.path.with_name(self.path.name + ".gz")) if path.is_file()), None)

    def rows(self) -> list[dict[str, Any]]:
        """Read all rows. Raises UserError for a file that is missing or broken, naming the line."""
        path = self.file()
        if path is None:
            raise UserError(f"the CORE task {self.label} has no file: {self.path} (or .gz) is missing. {MEND}")
        rows = []
        try:
            with (gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")) as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        rows.append(self._row(line, f"{path}, line {number}"))
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"cannot read {path} of the CORE task {self.label}: {error}. {MEND}") from error
        if not rows:
            raise UserError(f"{path} of the CORE task {self.label} holds no rows. {MEND}")
        return rows

    def _row(self, line: bytes, where: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:  # bad UTF-8 is a ValueError too
            raise UserError(f"{where}: this is no JSON ({error}). {MEND}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row is a JSON object, not {type(row).__name__}. {MEND}")
        for key, kind in KINDS[self.kind].items():
            if type(row.get(key)) is not kind:
                found = f"is {type(row[key]).__name__}" if key in row else "is missing"
                raise UserError(f"{where}: a row of {self.kind} needs {key!r} ({kind.__name__}); it {found}. {MEND}")
        options = row.get("choices", row.get("context_options"))
        if self.kind != "language_modeling":
            if len(options) < 2 or not all(type(option) is str for option in options):
                raise UserError(f"{where}: the options must be two texts or more. {MEND}")
            if not 0 <= row["gold"] < len(options):
                raise UserError(f"{where}: gold is {row['gold']}, but there are {len(options)} options, counted from 0. {MEND}")
        return row


@dataclass(frozen=True)
class Bundle:
    """A folder of tasks, in the order of core.yaml."""

    folder: Path
    tasks: list[CoreTask]

    def missing(self) -> list[str]:
        """Labels whose file is not there."""
        return [task.label for task in self.tasks if task.file() is None]

    def check(self) -> None:
        """Raise UserError if a task's file is missing: better now than after an hour."""
        if lacks := self.missing():
            paths = {task.label: task.path for task in self.tasks}
            raise UserError(f"{len(lacks)} of {len(self.tasks)} CORE tasks have no file in {self.folder}: {', '.join(lacks)} "
                            f"({paths[lacks[0]]}). {MEND}")

    def present(self) -> "Bundle":
        """The bundle of those tasks whose file is there."""
        return Bundle(self.folder, [task for task in self.tasks if task.file() is not None])


def bundle_dir() -> Path:
    """Where the bundle stands if nothing else is said."""
    return base_dir() / "eval_bundle"


MEND = "Mend it, take the task out of core.yaml, or move the folder away: then the published bundle is fetched again."


def open_bundle(folder: str | Path | None = None, *, fetch: bool = True, say: Callable[[str], None] = print) -> Bundle:
    """Return the bundle in `folder` (bundle_dir() where None; that one is fetched if it is not there and `fetch` is set).

    Raises NoBundle where there is none; UserError where it is broken.
    """
    folder = Path(folder).expanduser() if folder else None
    if folder is not None and not folder.is_dir():
        raise NoBundle(f"there is no folder {folder}: --bundle names the folder that holds core.yaml.")
    if folder is None:
        folder = bundle_dir()
        if not folder.exists():
            if not fetch:
                raise NoBundle(f"there is no CORE bundle at {folder}.")
            fetch_bundle(folder, say)
    return read_bundle(folder)


def read_bundle(folder: Path) -> Bundle:
    """Read core.yaml and eval_meta_data.csv. Raises UserError where they are missing or do not fit together."""
    import yaml  # here: CORE alone needs it

    path = folder / "core.yaml"
    try:
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no core.yaml, the list of its tasks. Put the bundle's in, or move the folder away: then the "
                        "published bundle is fetched again.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}. {MEND}") from error
    entries = listed.get("icl_tasks") if isinstance(listed, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} holds no list icl_tasks. {MEND}")
    baselines = _baselines(folder / "eval_meta_data.csv")
    tasks = [_task(entry, f"{path}, task {number}", baselines, folder) for number, entry in enumerate(entries, 1)]
    labels = [task.label for task in tasks]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(f"{path} lists the label {twice[0]!r} twice. {MEND}")
    return Bundle(folder, tasks)


def _task(entry: Any, where: str, baselines: dict[str, float], folder: Path) -> CoreTask:
    if not isinstance(entry, dict) or not isinstance(entry.get("label"), str):
        raise UserError(f"{where}: it has no label. {MEND}")
    label, kind, uri = entry["label"], entry.get("icl_task_type"), entry.get("dataset_uri")
    where += f" ({label})"
    if kind not in KINDS:
        raise UserError(f"{where}: icl_task_type is {kind!r}, not one of {', '.join(KINDS)}. {MEND}")
    if not isinstance(uri, str) or _leaves(uri):
        raise UserError(f"{where}: dataset_uri is {uri!r}, not the path of a file below eval_data. {MEND}")
    shots, delimiter = entry.get("num_fewshot", [0]), entry.get("continuation_delimiter", " ")
    shots = shots[0] if isinstance(shots, list) and shots else shots
    if type(shots) is not int or shots < 0:
        raise UserError(f"{where}: num_fewshot is {entry.get('num_fewshot')!r}, not a list with one number from 0 on. {MEND}")
    if not isinstance(delimiter, str):
        raise UserError(f"{where}: continuation_delimiter is {delimiter!r}, not a text. {MEND}")
    if label not in baselines:
        raise UserError(f"{where}: eval_meta_data.csv has no row for it, so what guessing gives is not known. {MEND}")
    return CoreTask(label, kind, shots, delimiter, baselines[label], folder / "eval_data" / uri)


def _baselines(path: Path) -> dict[str, float]:
    """What guessing gives for each task, as fractions; the file has percents."""
    found = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                label, text = row.get("Eval Task"), row.get("Random baseline")
                if label is None or text is None:
                    raise UserError(f"{path} needs the columns 'Eval Task' and 'Random baseline' in every row. {MEND}")
                try:
                    percent = float(text)
                except ValueError:
                    percent = math.nan
                if not 0 <= percent < 100:
                    raise UserError(f"{path}: the random baseline of {label} is {text!r}, not a percentage from 0 to below 100. {MEND}")
                found[label.strip()] = percent / 100
    except FileNotFoundError:
        raise UserError(f"{path} is missing: it says what guessing gives in each task. {MEND}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}. {MEND}") from error
    return found


# ---- fetching

def fetch_bundle(folder: Path, say: Callable[[str], None] = print) -> None:
    """Download and unpack the bundle to `folder`, checked; it appears there whole or not at all. Raises NoBundle where it cannot be had."""
    url = os.environ.get("NANOCHAT_EVAL_BUNDLE_URL") or URL
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        aside.mkdir(parents=True)
        packed = aside / "bundle.zip"
        say(f"fetching the CORE bundle from {url}")
        _download(url, packed)
        inside = _unpack(packed, aside / "unpacked", url)
        read_bundle(inside)
        try:
            inside.rename(folder)
        except OSError:
            if not (folder / "core.yaml").is_file():  # else: another process was faster
                raise
    except OSError as error:
        if error.errno in FULL:
            raise UserError(f"the disk is full: the CORE bundle was not unpacked. Free some space on {folder.parent} or set "
                            "NANOCHAT_BASE_DIR to another disk.") from error
        raise UserError(f"the CORE bundle cannot be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    say(f"the CORE bundle is in {folder}")


def _download(url: str, path: Path) -> None:
    """Fetch url to path; its size must be what the server says. Tried again where the connection breaks."""
    hint = f"Fetch {url} elsewhere and unpack it to {bundle_dir()}, or name its folder with --bundle."
    for attempt in range(TRIES):
        if attempt:
            time.sleep(2.0 ** (attempt - 1))
        try:
            request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, open(path, "wb") as file:
                size = answer.headers.get("Content-Length")
                if size is not None:
                    need_disk(path, 3 * int(size), "the CORE bundle")
                shutil.copyfileobj(answer, file, 1 << 20)
                if size is not None and file.tell() != int(size):
                    raise http.client.IncompleteRead(b"", int(size) - file.tell())
            return
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise NoBundle(f"the CORE bundle cannot be fetched: {url} answers {error.code}. {hint}") from error
            last: Exception = error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            last = error
            if isinstance(error, urllib.error.URLError):  # not even a connection: most likely there is no network
                break
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise NoBundle(f"the CORE bundle cannot be fetched: {url!r} is no address ({error}). {hint}") from error
    reason = getattr(last, "reason", None) or last
    raise NoBundle(f"the CORE bundle cannot be fetched from {url}: {reason}. {hint}") from last


def _leaves(name: str) -> bool:
    """Does a path with slashes lead out of the folder it is put in?"""
    path = PurePosixPath(name.replace("\\", "/"))
    return not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]


def _unpack(packed: Path, folder: Path, url: str) -> Path:
    """Unpack a zip whose checksums hold; return the folder in it that has core.yaml."""
    try:
        with zipfile.ZipFile(packed) as archive:
            members = archive.infolist()
            for member in members:
                if _leaves(member.filename):
                    raise UserError(f"what {url} gave is not unpacked: its member {member.filename!r} would leave the folder.")
            size = sum(member.file_size for member in members)
            if size > LARGEST:
                raise UserError(f"what {url} gave is not unpacked: it swells to {in_words(size)}.")
            if (broken := archive.testzip()) is not None:
                raise UserError(f"what {url} gave is damaged: the checksum of {broken} is wrong. Try again.")
            archive.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"what {url} gave is no zip file that can be read: {error}. Try again.") from error
    found = sorted(folder.rglob("core.yaml"), key=lambda path: len(path.parts))
    if not found:
        raise UserError(f"what {url} gave holds no core.yaml: it is no CORE bundle.")
    return found[0].parent
