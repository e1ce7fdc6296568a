"""Documents out of the files people have: .txt and .md, .jsonl, .json, .parquet; each but parquet also gzipped (.gz).

    for text in read_documents(path, Format(doc_separator="<|doc|>")): ...

Files are streamed: memory holds one document (at most 1 GB), not a file; a .json array alone is read whole. What cannot be read
raises UserError with the file, the place in it, and what to do.
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
class Format:
    """How to read: the flags of the import."""

    doc_separator: str = ""
    text_column: str = "text"
    encoding: str = "utf-8"


def suffix_of(path: Path) -> str:
    """The suffix that says the format, `.gz` left out; "" for one that is not known."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES and not name.endswith(".parquet.gz") else ""


def find_files(paths: Iterable[str | Path]) -> tuple[list[tuple[str, Path]], list[Path]]:
    """Return ((name, path) of the files to read, in order, files in folders that are of no known format).

    Folders are walked in sorted order, hidden files and folders left out. Raises UserError for a path that is missing, a file
    named outright that is of no known format, or where there is nothing to read.
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
            raise UserError(f"{given} is of no known format: {', '.join(SUFFIXES)} can be read, plain or .gz (parquet plain). "
                            "Rename it if it is one of these.")
        else:
            found.append((given.name, given))
    if not found:
        raise UserError(f"nothing to read in {', '.join(map(str, paths))}: no file ends with {', '.join(SUFFIXES)} (or .gz)"
                        f"{f', among {len(skipped)} others' if skipped else ''}.")
    return found, skipped


def read_documents(path: Path, form: Format) -> Iterator[str]:
    """Yield the documents of a file as they stand there, empty ones too (a null text is an empty one)."""
    suffix = suffix_of(path)
    with _reading(path):
        if suffix in PARQUET:
            yield from _parquet(path, form.text_column)
            return
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb") as file:
            chunks = _decoded(path, file, form.encoding)
            if suffix in TEXT:
                yield from _texts(path, chunks, form.doc_separator)
            elif suffix in LINES:
                yield from _json_lines(path, chunks, form.text_column)
            else:
                yield from _json_array(path, chunks, form.text_column)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is no whole gzip file ({error}): copy or download it again.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def _decoded(path: Path, file: IO[bytes], encoding: str) -> Iterator[str]:
    """Yield the text in pieces, with every line end as one newline and without a byte order mark."""
    try:
        "".encode(encoding)  # knows text encodings from others, such as hex
        decoder = codecs.getincrementaldecoder("utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding)()
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"the encoding {encoding!r} is unknown: name one such as utf-8, cp1252, shift_jis or utf-16.") from error
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    done, last = 0, False
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
                            f"Name its encoding, such as {_guess(error)}.") from error
        if text:
            yield text


def _guess(error: UnicodeError) -> str:
    """Encodings worth a try, where the bytes around the error decode."""
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
    """Yield lines without their newline. Splits at newlines alone: text may hold other characters that str.splitlines knows."""
    begun: list[str] = []
    for chunk in chunks:
        first, *others = chunk.split("\n")
        begun.append(first)
        if others:
            yield "".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    if any(begun):
        yield "".join(begun)


def _limited(path: Path, pieces: Iterable[str], where: str, way_out: str) -> Iterator[str]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > DOCUMENT_BYTES:
            raise UserError(f"{path} holds a document of more than {in_words(DOCUMENT_BYTES)}{where}: {way_out}.")
        yield piece


def _texts(path: Path, chunks: Iterable[str], separator: str) -> Iterator[str]:
    if not separator:
        way_out = "name the line that ends a document with --doc-separator, or cut it into files"
        yield "".join(_limited(path, chunks, "", way_out)).strip("\n")
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
            raise UserError(f"{path} holds a document of more than {in_words(DOCUMENT_BYTES)}: no line holds only {separator!r}. "
                            "Name the line that ends a document with --doc-separator.")
    yield "\n".join(document).strip("\n")


def _text_in(entry: Any, column: str, where: str, bare: bool = False) -> str:
    if bare and isinstance(entry, str):
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
            raise UserError(f"{path}, line {number} is not JSON ({error}): mend or remove that line.") from error
        yield _text_in(entry, column, f"{path}, line {number}")


def _json_array(path: Path, chunks: Iterable[str], column: str) -> Iterator[str]:
    whole = "".join(_limited(path, chunks, " or an array", "write it as .jsonl, one object a line"))
    try:
        entries = json.loads(whole)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); if each line is an object by itself, name it .jsonl.") from error
    if not isinstance(entries, list):
        raise UserError(f"{path} holds {type(entries).__name__}, not an array of objects or texts.")
    for number, entry in enumerate(entries, 1):
        yield _text_in(entry, column, f"{path}, entry {number}", bare=True)


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise UserError(f"{path} has no column {column!r}, only {', '.join(map(repr, schema.names)) or 'none'}: "
                                "name the text with --text-column.")
            kind = schema.field(column).type
            inner = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(inner) or pa.types.is_large_string(inner)):
                raise UserError(f"{path}: column {column!r} holds {kind}, not text. Name the text with --text-column.")
            for batch in file.iter_batches(batch_size=256, columns=[column], use_threads=False):
                for text in batch.column(0).to_pylist():
                    yield text or ""
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no whole parquet file ({str(error).splitlines()[0]}): copy or download it again.") from error
