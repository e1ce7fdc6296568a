"""Files over HTTP: tried again with growing waits, resumed, verified, and never half under their name.

    fetch_file(url, folder / "model_000500.pt", Listed(size, sha256), say=print)      # folder/.model_000500.pt.part
    info = ask_hub(lambda: api.model_info(name), name, say=print)                     # an answer of the hub's API

Everything that is downloaded comes through here but for the data sets of tasks/hub.py. A network fails in many ways: it
breaks off, stalls, sends an error page with status 200, or bytes that are not those asked for. What a next attempt may
mend is tried again: up to RETRIES attempts in a row that gain no byte. What came stays in the .part file, where the
next attempt, or the next start of the program, goes on. The last step is a rename of a file that was verified.

The session is huggingface_hub's, with its proxies and certificates. Its own download deletes an interrupted file.
"""

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from nanochat.errors import UserError
from nanochat.files import OF_OPEN_FILES, TROUBLES, in_words, not_written, sha256_of, sync_folder

RETRIES = 6              # attempts in a row that gain no byte
WITHOUT_NETWORK = 3      # of them, where none could connect: that is seldom mended in half a minute
BACK_OFF = 1.0           # seconds before the second attempt; each next wait is twice as long, up to LONGEST_BACK_OFF
LONGEST_BACK_OFF = 60.0
LONGEST_WAIT = 900.0     # seconds that a server may ask for (Retry-After); it is not waited for longer
TIMEOUT = 30.0           # seconds without a byte
BUSY = (408, 425, 429)   # besides 5xx: statuses that a later attempt may mend
NOT_CONNECTED = ("ConnectError", "ConnectTimeout", "ConnectionError")  # of huggingface_hub's session and `datasets`
WRONG_FILES = 2          # that are taken from a server before it is given up
RESTARTS = 10            # of one file from its beginning, before it is given up

R = TypeVar("R")


class NotFetched(UserError):
    """Something could not be downloaded.

    status: of the last answer, None where none came. network: whether other downloads will fail in the same way.
    """

    def __init__(self, message: str, status: int | None = None, network: bool = False):
        super().__init__(message)
        self.status, self.network = status, network


@dataclass(frozen=True)
class Listed:
    """What is known about a file before it comes. size: in bytes. git_sha1: of the file as git stores it (a blob)."""

    size: int | None = None
    sha256: str = ""
    git_sha1: str = ""

    def problem(self, path: Path) -> str:
        """Say what is wrong with a file; "" where it is the one that is listed."""
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return f"has {size} bytes, not {self.size}"
        if self.sha256:
            return "" if sha256_of(path) == self.sha256 else "is corrupt (its SHA-256 is wrong)"
        return "" if not self.git_sha1 or git_sha1_of(path) == self.git_sha1 else "is corrupt (its SHA-1 is wrong)"


def git_sha1_of(path: Path) -> str:
    """Return the SHA-1 of a small file as git stores it, in hex: the hub's name for files outside of LFS."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Broken(OSError):
    """An answer that ended early, or is not the file; a next attempt may bring it."""


class _Refused(OSError):
    """An answer with the status of an error."""

    def __init__(self, response: Any):
        super().__init__(f"status {response.status_code}")
        self.response = response


class Retries:
    """Counts the attempts at one thing, prints a line before each next one, and waits.

    Args:
        what: the thing in words.
        say: prints a line.
        stop: ends the waiting when it is set.
    """

    def __init__(self, what: str, say: Callable[[str], None], stop: threading.Event | None = None):
        self.what, self.say, self.stop = what, say, stop or threading.Event()
        self.failed, self.connected = 0, False

    def gained(self) -> None:
        """Count from the beginning again, as this attempt brought something."""
        self.failed, self.connected = 0, True

    def wait(self, error: Exception) -> None:
        """Wait before the next attempt, as long as the server asks for. Raises NotFetched where it was the last."""
        self.failed += 1
        status, reason, asked = status_of(error), reason_of(error), retry_after(error)
        self.connected |= status is not None or type(error).__name__ not in NOT_CONNECTED
        most = RETRIES if self.connected else WITHOUT_NETWORK
        if self.failed >= most:
            raise NotFetched(f"{reason}, {most} times in a row", status, network=status is None) from error
        if asked is not None and asked > LONGEST_WAIT:
            raise NotFetched(f"{reason}: the server asks to wait {asked:.0f} s", status) from error
        wait = min(LONGEST_BACK_OFF, BACK_OFF * 2**(self.failed - 1)) * random.uniform(0.75, 1.25)  # not all at once
        wait = wait if asked is None else asked + min(1.0, BACK_OFF) * random.random()
        self.say(f"{self.what}: {reason}; attempt {self.failed + 1} of {most} in {wait:.0f} s")
        pause(wait, self.stop)


def pause(seconds: float, stop: threading.Event) -> None:
    """Wait for so long, or until `stop` is set."""
    stop.wait(seconds)


def status_of(error: Exception) -> int | None:
    """Return the HTTP status that an error stands for, None where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def may_pass(status: int | None) -> bool:
    """Return whether a later attempt may bring what this status refused."""
    return status is None or status in BUSY or status >= 500


def retry_after(error: Exception) -> float | None:
    """Return how many seconds the answer asks to wait: Retry-After, in seconds or as a date. None where it does not."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    text = headers.get("Retry-After", "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


def reason_of(error: Exception) -> str:
    """Return in words what went wrong."""
    status = status_of(error)
    if status is not None:
        words = {401: " (log in: set HF_TOKEN)", 403: " (no access: ask for it, or set HF_TOKEN)",
                 404: " (not found)", 429: " (too many requests)"}
        said = " ".join((error.response.headers.get("X-Error-Message") or "").split())[:200]  # of the hub
        return f"the server answers {status}{words.get(status, '')}{': ' if said else ''}{said}"
    name = type(error).__name__
    if isinstance(error, ValueError) and not isinstance(error, UserError):
        return "the answer is not that of a hub, but perhaps a web page (does this network ask to sign in?)"
    text = next(iter(str(error).strip().splitlines()), "")
    if "Timeout" in name:
        return f"nothing came for {TIMEOUT:.0f} s"
    return text or name


def ask_hub(ask: Callable[[], R], what: str, say: Callable[[str], None], stop: threading.Event | None = None) -> R:
    """Return the answer of a call of the hub's API; try again where that may help.

    Without a network, and where something else than a hub answers, it is given up after WITHOUT_NETWORK attempts.

    Raises:
        NotFetched: there is no answer, or it is a refusal; its status tells which.
    """
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
    retries = Retries(what, say, stop)
    while True:
        try:
            return ask()
        except UserError:
            raise
        except OfflineModeIsEnabled as error:
            raise NotFetched("HF_HUB_OFFLINE is set", network=True) from error
        except (HTTPError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            # the last four come from an answer that no hub gives
            status = status_of(error)
            if not may_pass(status) or status is None and retries.failed >= WITHOUT_NETWORK - 1:
                raise NotFetched(reason_of(error), status, network=status is None) from error
            retries.wait(error)


def fetch_file(url: str, path: Path, listed: Listed, *, say: Callable[[str], None],
               headers: dict[str, str] | None = None, part: Path | None = None, stop: threading.Event | None = None,
               advance: Callable[[int], None] = lambda size: None) -> None:
    """Download a file to `path`, which appears whole and verified or not at all.

    Args:
        url, headers: of the request; redirects are followed.
        path: in a folder that exists.
        listed: what the file must be. Without a size, the answer's own says when it is complete.
        say: prints a line before each further attempt.
        part: where it grows; None is .NAME.part beside `path`. What is there already is not fetched again.
        stop: once it is set, the download ends; the part stays.
        advance: told how many bytes came; less than 0 where some are dropped.

    Raises:
        NotFetched: with the reason. NotWritten: the disk is full or fails.
    """
    part = part or path.with_name(f".{path.name}.part")
    stop = stop or threading.Event()
    retries, wrong = Retries(path.name, say, stop), 0
    transfer = _Transfer(url, headers or {}, part, listed, stop, advance)
    try:
        part.touch()
        while True:
            if stop.is_set():
                raise NotFetched("stopped, because others failed; the part that came is kept")
            before = part.stat().st_size
            try:
                transfer.run()
            except Exception as error:
                if isinstance(error, OSError) and error.errno in (*TROUBLES, *OF_OPEN_FILES) and error.strerror:
                    raise  # of the disk
                if not transfer.is_of_network(error):
                    raise
                status = status_of(error)
                if status == 416:  # the part is longer than the file, and so not a part of it
                    transfer.restart()
                elif not may_pass(status):
                    raise NotFetched(reason_of(error), status) from error
                if transfer.restarts >= RESTARTS:
                    raise NotFetched(f"it had to begin again {RESTARTS} times; at last, {reason_of(error)}") from error
                if part.stat().st_size > before:
                    retries.gained()
                retries.wait(error)
                continue
            if not (problem := listed.problem(part)):
                break
            transfer.restart()
            wrong += 1
            if wrong == WRONG_FILES:
                raise NotFetched(f"the server twice sent a file that {problem}: try later")
            say(f"{path.name}: what came {problem}; fetching it again")
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        transfer.about.unlink(missing_ok=True)
        sync_folder(path.parent)
    except NotFetched:
        if not transfer.can_go_on():
            part.unlink(missing_ok=True)
        raise
    except OSError as error:
        if error.errno in TROUBLES:
            raise not_written(path, error, f"{in_words(_size(part))} of which came and are kept") from error
        raise


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


class _Transfer:
    """One file on its way. `about` remembers which version of it the part is of, where no checksum is listed."""

    def __init__(self, url: str, headers: dict[str, str], part: Path, listed: Listed, stop: threading.Event,
                 advance: Callable[[int], None]):
        self.url, self.headers, self.part, self.listed = url, headers, part, listed
        self.stop, self.advance, self.restarts = stop, advance, 0
        self.about = part.with_name(f"{part.name}.version")
        self.whole_only = False  # the server packs what it sends: its ranges would be of the packed bytes

    def is_of_network(self, error: Exception) -> bool:
        from huggingface_hub.errors import HTTPError
        return isinstance(error, HTTPError | OSError)

    def run(self) -> None:
        """Append what is missing. Raises an error of the session, or _Broken where the answer ends early."""
        from huggingface_hub import get_session
        size, version = self.listed.size, self._version()
        checked = bool(self.listed.sha256 or self.listed.git_sha1)
        if _size(self.part) and (size is not None and _size(self.part) > size or not self.can_go_on()
                                 or self.whole_only):
            self.restart()
        have = _size(self.part)
        if have and have == size:
            return
        headers = self.headers | {"Accept-Encoding": "identity"}
        if have:
            headers |= {"Range": f"bytes={have}-"} | ({"If-Range": version} if not checked else {})
        with get_session().stream("GET", self.url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as answer:
            if answer.status_code >= 400:
                raise _Refused(answer)
            packed = answer.headers.get("Content-Encoding", "identity").lower() not in ("", "identity")
            ranged = answer.headers.get("Content-Range", "")
            if "text/html" in answer.headers.get("Content-Type", "") and self.part.suffix != ".html":
                raise _Broken("a web page came instead of the file (does this network ask to sign in?)")
            now = _version_in(answer.headers)
            if have and ranged.startswith(f"bytes {have}-") and (packed or not checked and now != version):
                self.whole_only = packed
                self.restart()
                raise _Broken("the file changed on the server" if not packed else "the server packs what it sends")
            if have and not ranged.startswith(f"bytes {have}-"):
                self.restart()  # the server ignores the range, or has another version, and sends the whole file
                have = 0
            total = _total(answer.headers, have) if not packed else None
            if size is not None and total is not None and total != size:
                raise _Broken(f"the server's file has {total} bytes, the list says {size}")
            if not have and not checked:
                self._remember(now)
            end = size if size is not None else total
            with open(self.part, "ab") as file:
                for piece in answer.iter_bytes():  # no chunk size: a break would lose an unfilled chunk
                    file.write(piece)
                    self.advance(len(piece))
                    if end is not None and file.tell() > end:
                        break
                    if self.stop.is_set():
                        raise NotFetched("stopped, because others failed; the part that came is kept")
        have = _size(self.part)
        if end is not None and have > end:
            self.restart()
            raise _Broken(f"more than the {end} bytes of the file came")
        if end is not None and have < end:
            raise _Broken(f"the connection broke off after {have} of {end} bytes")

    def can_go_on(self) -> bool:
        """Return whether a later attempt can use what came."""
        return _size(self.part) > 0 and bool(self.listed.sha256 or self.listed.git_sha1 or self._version())

    def restart(self) -> None:
        """Drop what came."""
        self.restarts += 1
        self.advance(-_size(self.part))
        os.truncate(self.part, 0)

    def _version(self) -> str:
        try:
            return json.loads(self.about.read_text(encoding="utf-8"))[self.url]
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _remember(self, version: str) -> None:
        if version:
            self.about.write_text(json.dumps({self.url: version}), encoding="utf-8")
        else:
            self.about.unlink(missing_ok=True)  # then the part is of no use to a later attempt


def _version_in(headers: Any) -> str:
    """Return what tells a version of a file from others, as If-Range takes it; "" where there is nothing."""
    etag = headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")


def _total(headers: Any, have: int) -> int | None:
    """Return the bytes of the whole file by the headers of an answer that begins after `have` bytes."""
    text = headers.get("Content-Range", "").rpartition("/")[2] if have else headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None
