"""Read documents from .txt, .md, .jsonl, .json and .parquet files; all but .parquet may be gzipped (.gz).

    for text in read_documents(path, TextFormat(doc_separator="<|doc|>")): ...

Files are streamed: memory holds one document (at most 1 GB), not a whole file. Only a .json array is read at once.
Input that cannot be read raises UserError with the file, the place in it, and what to do.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nanochat.dataset.shards import DOCUMENT_BYTES
from nanochat.errors import UserError
from nanochat.files import in_words

TEXT, LINES, ARRAY, PARQUET = (".txt", ".md"), (".jsonl", ".ndjson"), (".json",), (".parquet",)
SUFFIXES = TEXT + LINES + ARRAY + PARQUET
CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class TextFormat:
    """How to find the documents in a file; the fields are the flags of `python -m nanochat.dataset import`."""

    doc_separator: str = ""
    text_column: str = "text"
    encoding: str = "utf-8"


def suffix_of(path: Path) -> str:
    """Return the suffix that names the format, without `.gz`; "" for an unknown format."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES and not name.endswith(".parquet.gz") else ""


def is_compressed(path: Path) -> bool:
    """Return whether the text of a file is larger than the file."""
    return suffix_of(path) in PARQUET or path.name.lower().endswith(".gz")


def find_files(paths: Iterable[str | Path]) -> tuple[list[tuple[str, Path]], list[Path]]:
    """Find the files to read. Folders are searched in sorted order, without hidden files and folders.

    Args:
        paths: files and folders.

    Returns:
        [(name relative to its folder, path), ...] of the files to read, and the files of unknown format in the folders.

    Raises:
        UserError: a path does not exist, a file given by name has an unknown format, or there is no file to read.
    """
    found, skipped = [], []
    for given in map(Path, paths):
        given = given.expanduser()
        if given.is_dir():
            inside = [path for path in sorted(given.rglob("*")) if path.is_file()
                      and not any(part.startswith(".") for part in path.relative_to(given).parts)]
            found += [(path.relative_to(given).as_posix(), path) for path in inside if suffix_of(path)]
            skipped += [path for path in inside if not suffix_of(path)]
        elif not given.exists():
            raise UserError(f"{given} does not exist.")
        elif not suffix_of(given):
            raise UserError(f"{given} is of no known format: {', '.join(SUFFIXES)} can be read, plain or .gz "
                            "(parquet only plain). Rename it if it is one of these.")
        else:
            found.append((given.name, given))
    if not found:
        raise UserError(f"nothing to read in {', '.join(map(str, paths))}: no file ends with {', '.join(SUFFIXES)} "
                        f"(or .gz){f', among {len(skipped)} others' if skipped else ''}.")
    return found, skipped


def read_documents(path: Path, text_format: TextFormat) -> Iterator[str]:
    """Yield the documents of a file in order. Empty documents are included; a null text is an empty document."""
    suffix = suffix_of(path)
    with _reading(path):
        if suffix in PARQUET:
            yield from _parquet(path, text_format.text_column)
            return
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb") as file:
            chunks = _decoded(path, file, text_format.encoding)
            if suffix in TEXT:
                yield from _texts(path, chunks, text_format.doc_separator)
            elif suffix in LINES:
                yield from _json_lines(path, chunks, text_format.text_column)
            else:
                yield from _json_array(path, chunks, text_format.text_column)


def look_at_files(paths: Iterable[str | Path], text_format: TextFormat) -> list[Path]:
    """Find the files as `find_files` does and read the first document of each, of plain text its first part.

    Returns the files. Raises UserError for one that cannot be read.
    """
    files = [path for _, path in find_files(paths)[0]]
    for path in files:
        if suffix_of(path) not in TEXT:
            next(read_documents(path, text_format), None)
            continue
        with _reading(path), gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as file:
            next(_decoded(path, file, text_format.encoding), None)
    return files


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a complete gzip file ({error}): copy or download it again.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def _decoded(path: Path, file: IO[bytes], encoding: str) -> Iterator[str]:
    """Yield the text in chunks, with every line end as one newline and without a byte order mark."""
    try:
        "".encode(encoding)  # fails for a codec that is not a text encoding, such as hex
        decoder = codecs.getincrementaldecoder("utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding)()
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"the encoding {encoding!r} is unknown: "
                        "name one such as utf-8, cp1252, shift_jis or utf-16.") from error
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    done, last = 0, False  # done: bytes read so far
    while not last:
        chunk = file.read(CHUNK)
        last = not chunk
        done += len(chunk)
        try:
            text = lines.decode(chunk, final=last)
        except UnicodeError as error:
            at = done - len(error.object) + error.start if isinstance(error, UnicodeDecodeError) else done
            unpacked = " of the unpacked text" if path.name.lower().endswith(".gz") else ""
            raise UserError(f"{path} is not {encoding}: byte {at}{unpacked} cannot be decoded. "
                            f"Name its encoding, such as {_guess_encodings(error)}.") from error
        if text:
            yield text


def _guess_encodings(error: UnicodeError) -> str:
    """Suggest encodings that can decode the bytes around the error."""
    around = error.object[max(0, error.start - 64):error.start + 64] if isinstance(error, UnicodeDecodeError) else b""
    if around.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "--encoding utf-16"
    fitting = []
    for name in ("cp932", "euc_jp", "cp1252"):
        try:
            around[len(around) % 2:].decode(name)
            fitting.append(f"--encoding {name}")
        except UnicodeDecodeError:
            continue
    return " or ".join(fitting or ["--encoding latin-1"])


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    """Yield lines without their newline. str.splitlines would split at other characters too."""
    partial: list[str] = []
    for chunk in chunks:
        first, *others = chunk.split("\n")
        partial.append(first)
        if others:
            yield "".join(partial)
            yield from others[:-1]
            partial = [others[-1]]
    if any(partial):
        yield "".join(partial)


def _limited(path: Path, chunks: Iterable[str], where: str, hint: str) -> Iterator[str]:
    """Yield the chunks of one document, and raise UserError beyond DOCUMENT_BYTES."""
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > DOCUMENT_BYTES:
            raise UserError(f"{path} holds a document of more than {in_words(DOCUMENT_BYTES)}{where}: {hint}.")
        yield chunk


def _texts(path: Path, chunks: Iterable[str], separator: str) -> Iterator[str]:
    if not separator:
        hint = "name the line that ends a document with --doc-separator, or cut it into files"
        yield "".join(_limited(path, chunks, "", hint)).strip("\n")
        return
    document: list[str] = []
    size = 0
    for line in _lines(chunks):
        if line.strip() == separator:
            yield "\n".join(document).strip("\n")
            document, size = [], 0
            continue
        document.append(line)
        size += len(line) + 1
        if size > DOCUMENT_BYTES:
            raise UserError(f"{path} holds a document of more than {in_words(DOCUMENT_BYTES)}: "
                            f"no line holds only {separator!r}. "
                            "Name the line that ends a document with --doc-separator.")
    yield "\n".join(document).strip("\n")


def _text_in(entry: Any, column: str, where: str, or_string: bool = False) -> str:
    """Return the text of a JSON object, or with `or_string` of a JSON string."""
    if or_string and isinstance(entry, str):
        return entry
    if not isinstance(entry, dict):
        raise UserError(f"{where} holds {type(entry).__name__}, not an object with {column!r}.")
    if column not in entry:
        raise UserError(f"{where} has no {column!r}, only {', '.join(map(repr, entry)) or 'an empty object'}: "
                        "name the text with --text-column.")
    text = entry[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {column!r} holds {type(text).__name__}, not text. Name the text with --text-column.")
    return text or ""


def _json_lines(path: Path, chunks: Iterable[str], column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(chunks), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}): correct or remove that line.") from error
        yield _text_in(entry, column, f"{path}, line {number}")


def _json_array(path: Path, chunks: Iterable[str], column: str) -> Iterator[str]:
    whole = "".join(_limited(path, chunks, " or an array", "write it as .jsonl, one object a line"))
    try:
        entries = json.loads(whole)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); if each line is one object, name it .jsonl.") from error
    if not isinstance(entries, list):
        raise UserError(f"{path} holds {type(entries).__name__}, not an array of objects or strings.")
    for number, entry in enumerate(entries, 1):
        yield _text_in(entry, column, f"{path}, entry {number}", or_string=True)


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                names = ", ".join(map(repr, schema.names)) or "none"
                raise UserError(f"{path} has no column {column!r}, only {names}: name the text with --text-column.")
            kind = schema.field(column).type
            values = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(values) or pa.types.is_large_string(values)):
                raise UserError(f"{path}: column {column!r} holds {kind}, not text. Name the text with --text-column.")
            for batch in file.iter_batches(batch_size=256, columns=[column], use_threads=False):
                for text in batch.column(0).to_pylist():
                    yield text or ""
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a complete parquet file ({str(error).splitlines()[0]}): "
                        "copy or download it again.") from error
