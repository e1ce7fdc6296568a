"""The CORE bundle: the folder with the tasks of CORE. It is downloaded once, and every row is checked when it is read.

    bundle = open_bundle()                 # base_dir()/eval_bundle, downloaded where it is missing
    for task in bundle.tasks:
        rows = task.rows()                 # dicts in the order of the file

The folder holds core.yaml (the tasks, and how many few-shot examples each has), eval_meta_data.csv (the accuracy of
guessing) and eval_data/ (one JSON object a line; `.jsonl.gz` is read too). The published bundle is 162 MB unpacked. The
environment variable NANOCHAT_EVAL_BUNDLE_URL overrides where it is downloaded from.
"""

import csv
import gzip
import json
import math
import os
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nanochat.errors import UserError
from nanochat.files import TROUBLES, base_dir, in_words, need_disk, not_written
from nanochat.transfer import Listed, NotFetched, fetch_file

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
MIN_FREE = 300 << 20  # bytes that the published bundle takes, packed and unpacked
MAX_UNPACKED = 8 << 30  # bytes; far above the published bundle, so that a zip bomb is not unpacked

# icl_task_type → the keys of a row and their types
KINDS = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}


class BundleUnavailable(UserError):
    """There is no bundle, and it could not be downloaded."""


@dataclass(frozen=True)
class CoreTask:
    """One task of core.yaml.

    kind: a key of KINDS.
    shots: number of examples before the question (few-shot).
    delimiter: text between a context and its continuation.
    baseline: accuracy of guessing, as a fraction.
    path: the file of rows. It may be missing, or have .gz after its name.
    """

    label: str
    kind: str
    shots: int
    delimiter: str
    baseline: float
    path: Path

    def file(self) -> Path | None:
        """The file that exists, compressed or not; None where there is none."""
        return next((path for path in (self.path, self.path.with_name(self.path.name + ".gz")) if path.is_file()), None)

    def rows(self) -> list[dict[str, Any]]:
        """Read all rows. Raises UserError for a missing or broken file; the message names the line."""
        path = self.file()
        if path is None:
            raise UserError(f"the CORE task {self.label} has no file: {self.path} (or .gz) is missing. {FIX_HINT}")
        rows = []
        try:
            with (gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")) as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        rows.append(self._row(line, f"{path}, line {number}"))
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"cannot read {path} of the CORE task {self.label}: {error}. {FIX_HINT}") from error
        if not rows:
            raise UserError(f"{path} of the CORE task {self.label} holds no rows. {FIX_HINT}")
        return rows

    def _row(self, line: bytes, where: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:  # bad UTF-8 is a ValueError too
            raise UserError(f"{where}: this is not JSON ({error}). {FIX_HINT}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row is a JSON object, not {type(row).__name__}. {FIX_HINT}")
        for key, kind in KINDS[self.kind].items():
            if type(row.get(key)) is not kind:
                found = f"is {type(row[key]).__name__}" if key in row else "is missing"
                problem = f"a row of {self.kind} needs {key!r} ({kind.__name__}); it {found}"
                raise UserError(f"{where}: {problem}. {FIX_HINT}")
        options = row.get("choices", row.get("context_options"))
        if self.kind != "language_modeling":
            if len(options) < 2 or not all(type(option) is str for option in options):
                raise UserError(f"{where}: the options must be two texts or more. {FIX_HINT}")
            if not 0 <= row["gold"] < len(options):
                raise UserError(f"{where}: gold is {row['gold']}, but there are {len(options)} options, "
                                f"counted from 0. {FIX_HINT}")
        return row


@dataclass(frozen=True)
class Bundle:
    """A folder of tasks, in the order of core.yaml."""

    folder: Path
    tasks: list[CoreTask]

    def missing(self) -> list[str]:
        """Labels of the tasks whose file is missing."""
        return [task.label for task in self.tasks if task.file() is None]

    def check(self) -> None:
        """Raise UserError if the file of a task is missing."""
        if missing := self.missing():
            paths = {task.label: task.path for task in self.tasks}
            raise UserError(f"{len(missing)} of {len(self.tasks)} CORE tasks have no file in {self.folder}: "
                            f"{', '.join(missing)} ({paths[missing[0]]}). {FIX_HINT}")

    def present(self) -> "Bundle":
        """The bundle with only those tasks whose file exists."""
        return Bundle(self.folder, [task for task in self.tasks if task.file() is not None])


def bundle_dir() -> Path:
    """The default folder of the bundle."""
    return base_dir() / "eval_bundle"


FIX_HINT = "Correct it, remove the task from core.yaml, or move the folder away: the bundle is then downloaded again."


def open_bundle(folder: str | Path | None = None, *, fetch: bool = True, say: Callable[[str], None] = print) -> Bundle:
    """Open a bundle.

    Args:
        folder: of the bundle; None is bundle_dir().
        fetch: download the bundle to bundle_dir() where it is missing there.
        say: gets lines of progress.

    Raises:
        BundleUnavailable: where there is no bundle.
        UserError: where it is broken.
    """
    folder = Path(folder).expanduser() if folder else None
    if folder is not None and not folder.is_dir():
        raise BundleUnavailable(f"there is no folder {folder}: --bundle names the folder that holds core.yaml.")
    if folder is None:
        folder = bundle_dir()
        if not folder.exists():
            if not fetch:
                raise BundleUnavailable(f"there is no CORE bundle at {folder}.")
            fetch_bundle(folder, say)
    return read_bundle(folder)


def read_bundle(folder: Path) -> Bundle:
    """Read core.yaml and eval_meta_data.csv. Raises UserError where they are missing, broken or do not match."""
    import yaml  # not at the top: only CORE needs it

    path = folder / "core.yaml"
    try:
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no core.yaml, the list of its tasks. Add it, or move the folder away: "
                        "the bundle is then downloaded again.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}. {FIX_HINT}") from error
    entries = listed.get("icl_tasks") if isinstance(listed, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} has no list icl_tasks. {FIX_HINT}")
    baselines = _baselines(folder / "eval_meta_data.csv")
    tasks = [_task(entry, f"{path}, task {number}", baselines, folder) for number, entry in enumerate(entries, 1)]
    labels = [task.label for task in tasks]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(f"{path} lists the label {twice[0]!r} twice. {FIX_HINT}")
    return Bundle(folder, tasks)


def _task(entry: Any, where: str, baselines: dict[str, float], folder: Path) -> CoreTask:
    if not isinstance(entry, dict) or not isinstance(entry.get("label"), str):
        raise UserError(f"{where}: it has no label. {FIX_HINT}")
    label, kind, uri = entry["label"], entry.get("icl_task_type"), entry.get("dataset_uri")
    where += f" ({label})"
    if kind not in KINDS:
        raise UserError(f"{where}: icl_task_type is {kind!r}, not one of {', '.join(KINDS)}. {FIX_HINT}")
    if not isinstance(uri, str) or _escapes(uri):
        raise UserError(f"{where}: dataset_uri is {uri!r}, not the path of a file below eval_data. {FIX_HINT}")
    shots, delimiter = entry.get("num_fewshot", [0]), entry.get("continuation_delimiter", " ")
    shots = shots[0] if isinstance(shots, list) and shots else shots
    if type(shots) is not int or shots < 0:
        raise UserError(f"{where}: num_fewshot is {entry.get('num_fewshot')!r}, "
                        f"not a list with one number of 0 or more. {FIX_HINT}")
    if not isinstance(delimiter, str):
        raise UserError(f"{where}: continuation_delimiter is {delimiter!r}, not a string. {FIX_HINT}")
    if label not in baselines:
        raise UserError(f"{where}: eval_meta_data.csv has no row for it, so its random baseline is unknown. {FIX_HINT}")
    return CoreTask(label, kind, shots, delimiter, baselines[label], folder / "eval_data" / uri)


def _baselines(path: Path) -> dict[str, float]:
    """Accuracy of guessing for each task, as fractions; the file has percentages."""
    found = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                label, text = row.get("Eval Task"), row.get("Random baseline")
                if label is None or text is None:
                    raise UserError(f"{path} needs the columns 'Eval Task' and 'Random baseline' in every row. "
                                    f"{FIX_HINT}")
                try:
                    percent = float(text)
                except ValueError:
                    percent = math.nan
                if not 0 <= percent < 100:
                    raise UserError(f"{path}: the random baseline of {label} is {text!r}, "
                                    f"not a percentage of 0 or more and less than 100. {FIX_HINT}")
                found[label.strip()] = percent / 100
    except FileNotFoundError:
        raise UserError(f"{path} is missing: it has the random baseline of each task. {FIX_HINT}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}. {FIX_HINT}") from error
    return found


# ---- download

def fetch_bundle(folder: Path, say: Callable[[str], None] = print) -> None:
    """Download, check and unpack the bundle. `folder` appears complete, or not at all.

    Raises BundleUnavailable where the download fails.
    """
    url = os.environ.get("NANOCHAT_EVAL_BUNDLE_URL") or URL
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        aside.mkdir(parents=True)
        packed = aside / "bundle.zip"
        say(f"downloading the CORE bundle from {url}")
        _download(url, packed, folder.with_name(f".{folder.name}.zip.part"), say)
        inside = _unpack(packed, aside / "unpacked", url)
        read_bundle(inside)
        try:
            inside.rename(folder)
        except OSError:
            if not (folder / "core.yaml").is_file():  # else another process was faster
                raise
    except OSError as error:
        if error.errno in TROUBLES:
            raise not_written(folder, error, "the CORE bundle") from error
        raise UserError(f"the CORE bundle cannot be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    say(f"the CORE bundle is in {folder}")


def _download(url: str, path: Path, part: Path, say: Callable[[str], None]) -> None:
    """Download the zip file to `path`. What came of it stays in `part` where the connection breaks for good.

    A file whose checksums are wrong is fetched once more.
    """
    hint = f"Download {url} elsewhere and unpack it to {bundle_dir()}, or give its folder with --bundle."
    if not url.startswith(("http://", "https://")):
        raise BundleUnavailable(f"the CORE bundle cannot be downloaded: {url!r} is not a URL. {hint}")
    need_disk(part, MIN_FREE, "the CORE bundle")
    try:
        fetch_file(url, path, Listed(), say=say, part=part)
        if _damage(path):
            say(f"the CORE bundle came damaged ({_damage(path)}): fetching it again")
            fetch_file(url, path, Listed(), say=say, part=part)
    except NotFetched as error:
        raise BundleUnavailable(f"the CORE bundle cannot be downloaded from {url}: {error}. {hint}") from error


def _damage(path: Path) -> str:
    """Say what is wrong with a zip file; "" where its checksums are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        return str(error)
    return "" if broken is None else f"the checksum of {broken} is wrong"


def _escapes(name: str) -> bool:
    """Is this relative path outside of the folder that it is joined to?"""
    path = PurePosixPath(name.replace("\\", "/"))
    return not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]


def _unpack(packed: Path, folder: Path, url: str) -> Path:
    """Check the zip file and unpack it; return the folder in it that has core.yaml."""
    try:
        with zipfile.ZipFile(packed) as archive:
            members = archive.infolist()
            for member in members:
                if _escapes(member.filename):
                    raise UserError(f"the file from {url} is not unpacked: its member {member.filename!r} would be "
                                    "written outside of the folder.")
            size = sum(member.file_size for member in members)
            if size > MAX_UNPACKED:
                raise UserError(f"the file from {url} is not unpacked: it would grow to {in_words(size)}.")
            if (broken := archive.testzip()) is not None:
                raise UserError(f"the file from {url} is damaged: the checksum of {broken} is wrong. Try again.")
            archive.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"the file from {url} is not a readable zip file: {error}. Try again.") from error
    found = sorted(folder.rglob("core.yaml"), key=lambda path: len(path.parts))
    if not found:
        raise UserError(f"the file from {url} has no core.yaml: it is not a CORE bundle.")
    return found[0].parent
