"""Write the report of a model to disk, whole or not at all, and move an old one aside.

A report is made in a new folder beside the old one, which takes its place when it is complete: after an error, a kill
or on a full disk, the old report is still there, and whole. What cannot be drawn, read or copied is left out, and the
report says so.
"""

import ctypes
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from nanochat.errors import UserError
from nanochat.files import aside_of, base_dir, free_name, lock, sync_folder
from nanochat.report import plots
from nanochat.report.runs import TITLES, StageLog, logs_of_model, read_logs
from nanochat.report.sections import HEADING, overview_section, stage_section, summary_section

OURS = re.compile(r"\d\d-.*\.(md|png)|report\.md")
PICTURE = re.compile(r"\d\d-.*\.png")
ASIDE = re.compile(r"\.(report|report_files)\.[0-9a-f]{8}\.(new|old)")
EXCHANGE, HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


@dataclass(frozen=True)
class Written:
    """Where a report is.

    report: under base_dir(); None where it could not be written there.
    copy: in the working folder, or the folder that was named; None where it could not be written.
    notes: what is left out of the report, or was not written, and why; a sentence each.
    """

    report: Path | None
    copy: Path | None
    notes: list[str]


def generate(tag: str | None = None, hourly_price: float | None = None, folder: str | Path | None = None) -> Path:
    """Write the report of a model, as `write` does.

    Returns:
        The path of the copy; where there is none, that of the report under base_dir().
    """
    written = write(tag, hourly_price, folder)
    return written.copy or written.report


def write(tag: str | None = None, hourly_price: float | None = None, folder: str | Path | None = None) -> Written:
    """Write the report of a model into base_dir(), and a copy of it.

    Args:
        tag: name of the model; None takes the one that was trained or evaluated last.
        hourly_price: dollars an hour for the whole machine.
        folder: where the copy goes; None is the working folder.

    Raises:
        UserError: there is no log, or none of that model; another process writes this report; or it can be written
            neither there nor here.
    """
    base, notes = base_dir(), []
    logs_folder, report = base / "logs", base / "report"
    tag, logs = logs_of_model(read_logs(logs_folder, notes.append), tag, logs_folder)
    folder = Path(folder or ".")
    with _only_writer(base):
        pictures = plots.draw(logs, notes.append)
        sections = _sections(tag, logs, hourly_price, pictures, notes)
        whole = "\n".join(sections.values())
        files = {f"{number:02d}-{name}.md": _bytes(text) for number, (name, text) in enumerate(sections.items())}
        files["report.md"] = _bytes(whole)
        images = {name: data for drawn in pictures.values() for name, data in drawn.items()}
        place, copy, problems = report / "report.md", folder / "report.md", []
        try:
            _put_folder(report, files | images, OURS)
        except OSError as error:
            problems.append(f"there is no new report in {report}: {_reason(error)}.")
            place = None
        try:
            _copy(whole, images, folder)
        except OSError as error:
            problems.append(f"there is no copy in {_absolute(copy)}: {_reason(error)}.")
            copy = None
    if place is None and copy is None:
        raise UserError(f"the report cannot be written: {' '.join(problems)} Free some space or correct the rights; "
                        "or call it from another folder, where a copy can be written.")
    return Written(place, copy, notes + problems)


def _sections(tag: str, logs: dict[str, StageLog], hourly_price: float | None, pictures: dict[str, dict[str, bytes]],
              notes: list[str]) -> dict[str, str]:
    """Return the text of each section by name. One that cannot be made says why."""
    def made(title: str, make: Callable[[], str]) -> str:
        try:
            return make()
        except Exception as error:  # a log may hold anything; the other sections are worth reading
            why = " ".join(str(error).split())[:200]
            notes.append(f"The section {title!r} could not be made ({type(error).__name__}: {why}).")
            return f"{HEADING if title == 'Overview' else f'## {title}'}\n\n{notes[-1]}\n"

    stages = {stage: made(TITLES[stage], lambda stage=stage: stage_section(logs[stage], list(pictures.get(stage, ()))))
              for stage in logs}
    summary = made("Summary", lambda: summary_section(logs))
    summary += "".join(f"\n![Scores]({name})\n" for name in pictures.get("summary", ()))
    overview = made("Overview", lambda: overview_section(tag, logs, hourly_price))
    overview += "".join(f"\n{note}\n" for note in notes)
    return {"overview": overview, **stages, "summary": summary}


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")  # half a surrogate pair, in a sample, has no UTF-8


@contextmanager
def _only_writer(base: Path) -> Iterator[None]:
    """Lock the report of this base folder. Where nothing can be written there, there is nothing to lock."""
    path = base / "locks" / "report.lock"
    try:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    except OSError:
        yield
        return
    with lock(path, f"the report in {base} is being written", "Wait until it ends.") or nullcontext():
        yield


def _put_folder(folder: Path, files: dict[str, bytes], ours: re.Pattern) -> None:
    """Replace a folder by one with these files, at once. What it holds beside earlier files of ours stays.

    Args:
        folder: may be absent, or a link to a folder.
        files: contents by name.
        ours: names of files that are replaced or removed; others of the folder are kept.

    Raises:
        OSError: the folder is what it was.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(20, os.strerror(20), str(folder))
    _tidy(folder)
    number = uuid.uuid4().hex[:8]
    new, old = (folder.with_name(f".{folder.name}.{number}.{state}") for state in ("new", "old"))
    try:
        new.mkdir()
        for name, data in files.items():
            with open(new / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for other in sorted(folder.iterdir()) if folder.exists() else ():
            if other.is_file() and not other.is_symlink() and ours.fullmatch(other.name):
                continue
            to = free_name(new / (f"{other.name}.old" if other.name in files else other.name))
            if other.is_dir() and not other.is_symlink():
                shutil.copytree(other, to, symlinks=True)
            else:
                shutil.copy2(other, to, follow_symlinks=False)
        sync_folder(new)
        if folder.exists():
            if not _exchange(new, folder):
                os.rename(folder, old)
                try:
                    os.rename(new, folder)
                except OSError:
                    os.rename(old, folder)
                    raise
        else:
            os.rename(new, folder)
        with suppress(OSError):
            sync_folder(folder.parent)
    finally:
        for rest in (new, old):
            shutil.rmtree(rest, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders, so that neither is missing for a moment. Return whether this system can."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        done = ctypes.CDLL(None).renameat2(HERE, os.fsencode(first), HERE, os.fsencode(second), EXCHANGE)
    except (OSError, AttributeError):  # another C library
        return False
    return done == 0


def _tidy(folder: Path) -> None:
    """Clear up after a `_put_folder` that was killed: put the folder back if its name is free, remove half ones."""
    rests = [path for path in folder.parent.glob(f".{folder.name}.*") if ASIDE.fullmatch(path.name)]
    if not folder.exists() and (old := [path for path in rests if path.suffix == ".old"]):
        os.rename(old[0], folder)
        rests.remove(old[0])
    for path in rests:
        with suppress(OSError):
            if folder.exists() and time.time() - path.stat().st_mtime > 600:  # else a report may be writing it now
                shutil.rmtree(path)


def _copy(text: str, images: dict[str, bytes], folder: Path) -> None:
    """Copy the report into `folder`, its plots into report_files. A report.md that is not ours is moved aside.

    Raises OSError; the report.md that was there is what it was.
    """
    path, picture_folder = folder / "report.md", folder / "report_files"
    if path.is_dir():
        raise IsADirectoryError(21, os.strerror(21), str(path))
    folder.mkdir(parents=True, exist_ok=True)
    for name in images:
        text = text.replace(f"]({name})", f"]({picture_folder.name}/{name})")
    aside = folder / f".report.md.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(aside, "wb") as file:  # first, so that a full disk is met before anything changes
            file.write(_bytes(text))
            file.flush()
            os.fsync(file.fileno())
        if images:
            _put_folder(picture_folder, images, PICTURE)
        if path.exists():
            with open(path, encoding="utf-8", errors="replace") as file:
                ours = file.readline().startswith(HEADING)
            if not ours:
                path.rename(free_name(folder / "report.md.old"))
        os.replace(aside, path)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def _reason(error: OSError) -> str:
    return f"{error.strerror or error} ({error.filename})" if error.filename else str(error.strerror or error)


def _absolute(path: Path) -> Path:
    try:
        return path.absolute()
    except OSError:  # the working folder was deleted
        return path


def reset() -> Path | None:
    """Move the report under base_dir() aside, to a name with the time.

    Returns the new path, or None where there was no report. Raises UserError where it cannot be moved.
    """
    report = base_dir() / "report"
    with suppress(OSError):
        _tidy(report)
    if not os.path.lexists(report):
        return None
    aside = aside_of(report)
    try:
        report.rename(aside)  # within one folder, so that it is moved and never copied
    except OSError as error:
        raise UserError(f"{report} cannot be moved aside: {_reason(error)}. It is as it was.") from error
    return aside
