"""Files of JSON lines. All lines are checked when a file is opened; a value is parsed each time it is read."""

import gzip
import json
import mmap
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.errors import UserError


class JsonLines:
    """The values of a .jsonl or .jsonl.gz file, by number. A plain file is memory-mapped, so ranks share one copy."""

    def __init__(self, path: str | Path, check: Callable[[Any], object] = lambda value: None):
        """Read the file once and check every line. Blank lines are skipped.

        Args:
            path: the file.
            check: called with each value; may raise UserError.

        Raises:
            UserError: a line is not JSON or fails `check` (with file and line), or the file is missing, unreadable or
                empty.
        """
        self.path = Path(path)
        self.data = self._data()
        spans, start, number = [], 0, 0
        while start < len(self.data):
            end = self.data.find(b"\n", start) + 1 or len(self.data)
            number += 1
            line = self.data[start:end]
            if line.strip():
                self._checked(line, number, check)
                spans.append((start, end))
            start = end
        if not spans:
            raise UserError(f"{self.path} holds nothing. Make it again, or remove it.")
        self.spans = np.array(spans, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, i: int) -> Any:
        start, end = self.spans[i].tolist()
        return json.loads(self.data[start:end])

    def _data(self) -> bytes | mmap.mmap:
        try:
            if self.path.name.endswith(".gz"):
                with gzip.open(self.path) as packed:
                    return packed.read()
            with open(self.path, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise UserError(f"there is no file {self.path}") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{self.path} is not a complete gzip file ({error}). Fetch or make it again.") from error
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from error
        except ValueError:  # an empty file cannot be mapped
            return b""

    def _checked(self, line: bytes, number: int, check: Callable[[Any], object]) -> None:
        where = f"{self.path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({error}): {line.strip()[:60]!r}") from error
        try:
            check(value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
