"""Data sets of the Hugging Face hub, from the hub or from a mirror folder on a machine that has no network.

With NANOCHAT_TASK_DATA set to a folder, nothing is fetched, and a split is looked for there as one of

    <org>/<name>/<subset>/<split>.jsonl    or .jsonl.gz or .parquet, in the hub's own columns
    <org>/<name>/<subset>/<split>-00000-of-00001.parquet ...    the hub's own files (also in data/ where the subset is "default")

so that a copy of the hub's files serves as it is:

    hf download openai/gsm8k --repo-type dataset --local-dir $NANOCHAT_TASK_DATA/openai/gsm8k

Rows come shuffled with seed 42, in the same order from either place."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.errors import UserError
from tasks.lines import JsonLines

SEED = 42
MIRROR = "NANOCHAT_TASK_DATA"


class Rows:
    """Rows of a split as dicts, shuffled as the `datasets` package shuffles."""

    def __init__(self, source: Any, inside: str | None):
        """`source`: len() and source[i] in the order of the file. `inside`: the column that the row proper is nested in, if any."""
        self.source, self.inside = source, inside
        self.order = np.random.default_rng(SEED).permutation(len(source))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> dict:
        row = self.source[int(self.order[i])]
        return row.get(self.inside, row)


class Table:
    """Rows of parquet files."""

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
    """Return the rows of a split of `name` ("org/name"), each with at least these columns.

    Raises UserError where the mirror lacks the split, the hub cannot be reached, a line is not JSON (file and line), or a column is
    missing."""
    mirror = os.environ.get(MIRROR)
    if not mirror:
        source, where = _from_hub(name, subset, split), f"{name}, {subset}, {split} on the hub"
        found = set(source.column_names)
    else:
        paths = _in_mirror(Path(mirror).expanduser(), name, subset, split)
        where = str(paths[0])
        if paths[0].suffix == ".parquet":
            source = Table(paths)
            found = set(source.table.column_names)
        else:
            source = JsonLines(paths[0], lambda row: _check_columns(row, columns))
            found = set(source[0])
    if not len(source):
        raise UserError(f"{where} holds no rows")
    # cais/mmlu nests each row of its auxiliary_train under "train"
    inside = "train" if found == {"train"} and "train" not in columns else None
    missing = [column for column in columns if column not in (source[0]["train"] if inside else found)]
    if missing:
        raise UserError(f"{where} has no column {', '.join(missing)}; it has {', '.join(sorted(found))}")
    return Rows(source, inside)


def _check_columns(row: Any, columns: Sequence[str]) -> None:
    if not isinstance(row, dict):
        raise UserError(f"a row is a JSON object with the columns {', '.join(columns)}, and this is {type(row).__name__}")
    inner = row["train"] if set(row) == {"train"} and isinstance(row["train"], dict) else row
    missing = [column for column in columns if column not in inner]
    if missing:
        raise UserError(f"this row has no column {', '.join(missing)}; it has {', '.join(inner) or 'none'}")


def _in_mirror(mirror: Path, name: str, subset: str, split: str) -> list[Path]:
    folders = [mirror / name / subset, *([mirror / name / "data"] if subset == "default" else [])]
    for folder in folders:
        for ending in (".jsonl", ".jsonl.gz", ".parquet"):
            if (folder / (split + ending)).is_file():
                return [folder / (split + ending)]
        parts = sorted(folder.glob(f"{split}-*-of-*.parquet"))
        if parts:
            total = re.search(r"-of-0*(\d+)\.parquet$", parts[0].name)
            if total is None or int(total[1]) != len(parts):
                raise UserError(f"{folder} holds {len(parts)} of the parts of {split}, whose names say how many there are "
                                f"({parts[0].name}). Fetch the others, and leave none of another version there.")
            return parts
    raise UserError(f"the mirror has no {name}, {subset}, {split}: looked for {folders[0] / split}.jsonl, .jsonl.gz, .parquet and "
                    f"{folders[-1] / split}-00000-of-*.parquet. Put it there in the hub's columns, or unset {MIRROR} to fetch it.")


def _from_hub(name: str, subset: str, split: str) -> Any:
    import datasets
    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # of a dozen classes: no network, no such set, no access, a full disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name}, {subset}, {split} cannot be loaded from the Hugging Face hub ({type(error).__name__}: {reason[:200]}). "
                        f"On a machine without network, set {MIRROR} to a folder with {name}/{subset}/{split}.jsonl or .parquet "
                        "in the hub's columns; tasks/hub.py says more.") from error
