"""Data sets of the Hugging Face hub, read from the hub, or from a mirror folder on a machine without network.

If NANOCHAT_TASK_DATA names a folder, nothing is downloaded. A split is then read from one of

    <org>/<name>/<subset>/<split>.jsonl    or .jsonl.gz or .parquet, with the hub's columns
    <org>/<name>/<subset>/<split>-00000-of-00001.parquet ...    the hub's files; in data/ too if the subset is "default"

so that an unchanged copy of the hub's files works:

    hf download openai/gsm8k --repo-type dataset --local-dir $NANOCHAT_TASK_DATA/openai/gsm8k

Rows are shuffled with seed 42, in the same order from both sources.
"""

import json
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.errors import UserError
from nanochat.files import TROUBLES
from nanochat.logs import print_line
from nanochat.transfer import WITHOUT_NETWORK, WRONG_FILES, Listed, NotFetched, Retries, may_pass, reason_of, status_of
from tasks.lines import JsonLines

SEED = 42
MIRROR = "NANOCHAT_TASK_DATA"


class Rows:
    """The rows of a split as dicts, shuffled in the same way as the `datasets` package does."""

    def __init__(self, source: Any, nested_in: str | None):
        """Shuffle the rows of `source`, which has len() and source[i] in file order.

        `nested_in` names the column that holds the actual row as a dict, if there is one.
        """
        self.source, self.nested_in = source, nested_in
        self.order = np.random.default_rng(SEED).permutation(len(source))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> dict:
        row = self.source[int(self.order[i])]
        return row.get(self.nested_in, row)


class ParquetRows:
    """The rows of parquet files."""

    def __init__(self, paths: list[Path]):
        import pyarrow as pa
        import pyarrow.parquet as pq
        try:
            self.table = pa.concat_tables([pq.read_table(path) for path in paths])
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{paths[0] if len(paths) == 1 else paths[0].parent} cannot be read as parquet "
                            f"({str(error).splitlines()[0]}). Fetch it again.") from error

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> dict:
        return self.table.slice(i, 1).to_pylist()[0]


def load_rows(name: str, subset: str, split: str, columns: Sequence[str]) -> Rows:
    """Return the rows of a split of a data set.

    Args:
        name: "org/name" on the hub.
        subset, split: as the hub calls them.
        columns: names that each row must have.

    Raises:
        UserError: the split is not in the mirror, the hub cannot be reached, a line is not JSON (with file and line),
            or a column is missing.
    """
    mirror = os.environ.get(MIRROR)
    if not mirror:
        source, where = _from_hub(name, subset, split), f"{name}, {subset}, {split} on the hub"
        found = set(source.column_names)
    else:
        paths = find_in_mirror(Path(mirror).expanduser(), name, subset, split)
        where = str(paths[0])
        if paths[0].suffix == ".parquet":
            source = ParquetRows(paths)
            found = set(source.table.column_names)
        else:
            source = JsonLines(paths[0], lambda row: _check_columns(row, columns))
            found = set(source[0])
    if not len(source):
        raise UserError(f"{where} holds no rows")
    # cais/mmlu nests each row of its auxiliary_train under "train"
    nested_in = "train" if found == {"train"} and "train" not in columns else None
    missing = [column for column in columns if column not in (source[0]["train"] if nested_in else found)]
    if missing:
        raise UserError(f"{where} has no column {', '.join(missing)}; it has {', '.join(sorted(found))}")
    return Rows(source, nested_in)


def _check_columns(row: Any, columns: Sequence[str]) -> None:
    if not isinstance(row, dict):
        raise UserError(f"a row is a JSON object with the columns {', '.join(columns)}, not {type(row).__name__}")
    inner = row["train"] if set(row) == {"train"} and isinstance(row["train"], dict) else row
    missing = [column for column in columns if column not in inner]
    if missing:
        raise UserError(f"this row has no column {', '.join(missing)}; it has {', '.join(inner) or 'none'}")


def find_in_mirror(mirror: Path, name: str, subset: str, split: str) -> list[Path]:
    """Return the files of a split in a mirror. Raises UserError where there are none, or not all."""
    folders = [mirror / name / subset, *([mirror / name / "data"] if subset == "default" else [])]
    for folder in folders:
        for ending in (".jsonl", ".jsonl.gz", ".parquet"):
            if (folder / (split + ending)).is_file():
                return [folder / (split + ending)]
        parts = sorted(folder.glob(f"{split}-*-of-*.parquet"))
        if parts:
            total = re.search(r"-of-0*(\d+)\.parquet$", parts[0].name)
            if total is None or int(total[1]) != len(parts):
                raise UserError(f"{folder} holds {len(parts)} of the parts of {split}, but their names say how many "
                                f"there are ({parts[0].name}). Fetch the others, and remove parts of other versions.")
            return parts
    raise UserError(f"the mirror has no {name}, {subset}, {split}: looked for {folders[0] / split}.jsonl, .jsonl.gz, "
                    f".parquet and {folders[-1] / split}-00000-of-*.parquet. Put it there with the hub's columns, "
                    f"or unset {MIRROR} to download it.")


def _from_hub(name: str, subset: str, split: str) -> Any:
    """Load a split with the `datasets` package; try again where the network fails, and verify the files that came."""
    retries, wrong = Retries(f"{name}, {subset}, {split}", print_line), 0
    while True:
        error: Exception | None = None
        began = time.time()
        try:
            loaded = _load_dataset(name, subset, split, again=wrong > 0)
        except Exception as problem:  # of many classes: no network, no such data set, no access, a full disk
            error = problem
        damaged = _remove_damaged(name, began - 2)
        if error is None and not damaged:
            return loaded
        try:
            if damaged:
                wrong += 1
                reason = f"the file {damaged[0]} came damaged (its checksum is wrong)"
                if wrong == WRONG_FILES:
                    raise NotFetched(f"{reason}, twice")
                print_line(f"{name}: {reason}; fetching it again")
                continue
            cause = _cause(error)
            if not may_pass(status_of(cause)) or not _is_of_network(cause):
                words = next(iter(str(error).strip().splitlines()), "")[:200]
                raise NotFetched(reason_of(cause) if status_of(cause) else f"{type(error).__name__}: {words}")
            if status_of(cause) is None and retries.failed >= WITHOUT_NETWORK - 1:
                raise NotFetched(reason_of(cause), network=True)
            retries.wait(cause)
        except NotFetched as told:
            raise UserError(f"{name}, {subset}, {split} cannot be loaded from the Hugging Face hub ({told}). On a "
                            f"machine without network, set {MIRROR} to a folder with {name}/{subset}/{split}.jsonl or "
                            ".parquet and the hub's columns; tasks/hub.py describes it.") from error


def _load_dataset(name: str, subset: str, split: str, again: bool) -> Any:
    import datasets
    return datasets.load_dataset(name, subset, split=split, **({"download_mode": "force_redownload"} if again else {}))


def _cause(error: Exception) -> Exception:
    """Return the error of the network or the disk that another one was raised for; itself where there is none."""
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in seen:
        if status_of(at) is not None or isinstance(at, OSError) and at.errno:
            return at
        seen.append(at)
        at = at.__cause__ or at.__context__
    return next((one for one in seen if _is_of_network(one)), error)


def _is_of_network(error: Exception) -> bool:
    """Return whether this may be an accident of the network, rather than a wrong name or a full disk."""
    from huggingface_hub.errors import HTTPError
    if status_of(error) is not None:
        return True
    if isinstance(error, json.JSONDecodeError):  # a page instead of the hub
        return True
    return isinstance(error, HTTPError | OSError) and not isinstance(error, FileNotFoundError) and (
        getattr(error, "errno", None) not in TROUBLES)


def _remove_damaged(name: str, since: float) -> list[str]:
    """Remove files of a data set from the cache of huggingface_hub that are not what the hub listed; return them.

    Their names there are the SHA-256 that the hub gives, or for small files git's SHA-1. since: only of files written
    after this time.
    """
    from huggingface_hub import constants
    damaged = []
    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    for blob in sorted((folder / "blobs").glob("*")):
        with suppress(OSError):
            if blob.stat().st_mtime < since or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
                continue
            listed = Listed(None, blob.name) if len(blob.name) == 64 else Listed(None, "", blob.name)
            if listed.problem(blob):
                links = [path for path in (folder / "snapshots").rglob("*") if os.path.realpath(path) == str(
                    blob.resolve())]
                damaged.append(links[0].name if links else blob.name)
                for path in (*links, blob):
                    path.unlink()
    return damaged
