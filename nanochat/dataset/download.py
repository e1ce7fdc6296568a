"""Shards of FineWeb-Edu from the Hugging Face hub, each checked against the hub's own SHA-256.

    python -m nanochat.dataset -n 240 -w 8       # 240 training shards, and always the one validation shard; 8 downloads at once

The data set has no release to name, so the revision is pinned at first use: the branch `main` (or --revision) is resolved to its
commit once, the commit is written to source.json with the size and SHA-256 of each shard, and every later fetch into that folder uses
that commit. Where all shards are there already, no network is needed.

huggingface_hub gives the listing, the session and its headers (token, $HF_ENDPOINT); the bytes come over plain HTTP with ranges. Its
own download deletes a file that broke off and cannot go on with it later; ours keeps `.shard_00000.parquet.<sha>.part` and does.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from nanochat.dataset.shards import LAST_SHARD, read_source, shard_name, shards_in, write_source, writing
from nanochat.errors import UserError
from nanochat.files import FULL, in_words, need_disk, sha256_of, sync_folder

REPO = "karpathy/fineweb-edu-100b-shuffle"
TRIES = 6                # in a row without a byte gained; waits of 1, 2, 4, 8, 16 s between them
BACK_OFF = 1.0           # seconds
TIMEOUT = 30.0           # seconds without a byte
OTHER_WAYS = ("Without a network, train on your own text (`python -m nanochat.dataset import PATH...`) "
              "or on the built-in generator's (`python -m nanochat.dataset small-world`).")


@dataclass(frozen=True)
class Listed:
    """A shard as the hub knows it."""

    bytes: int
    sha256: str


class Unreachable(UserError):
    """The hub does not answer, or not with what a hub answers."""


def fetch(count: int, folder: Path, *, workers: int = 4, revision: str = "main", say: Callable[[str], None] = print) -> None:
    """Bring the first `count` training shards (-1: all) and the validation shard into `folder`, whole and verified.

    What is there and right stays; what is corrupt is fetched again. Raises UserError where in the end anything is missing.
    """
    if count < -1 or workers < 1:
        raise UserError(f"-n is {count} and -w is {workers}: -n counts training shards (-1 for all {LAST_SHARD}), -w downloads at once.")
    wanted = LAST_SHARD if count == -1 else min(count, LAST_SHARD)
    names = [*map(shard_name, range(wanted)), shard_name(LAST_SHARD)]
    with writing(folder):
        folder.mkdir(exist_ok=True)
        Fetch(folder, workers, revision, say).run(names)


class Fetch:
    """One run of `fetch`. Threads share `stop`, set when going on makes no sense."""

    def __init__(self, folder: Path, workers: int, revision: str, say: Callable[[str], None]):
        self.folder, self.workers, self.revision, self.say = folder, workers, revision, say
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self.commit = ""
        self.listed: dict[str, Listed] = {}
        self.stop = threading.Event()
        self._bar = None
        self._lock = threading.Lock()

    def run(self, names: list[str]) -> None:
        source = read_source(self.folder)
        if source and source["source"] != "fineweb-edu":
            raise UserError(f"{self.folder} holds other text ({source['source']}: {source.get('summary', 'see source.json')}): two sources "
                            "never mix in one folder. Set NANOCHAT_BASE_DIR to another place, or move that folder away.")
        unknown_origin = [path.name for path in shards_in(self.folder)] if not source else []
        self.commit = source.get("revision", "")
        if self.commit and self.revision not in ("main", source.get("asked"), self.commit):
            raise UserError(f"{self.folder} holds shards of revision {self.commit}, and {self.revision} was asked for: revisions "
                            "never mix in one folder. Set NANOCHAT_BASE_DIR to another place for the other one.")
        self.listed = {name: Listed(*facts) for name, facts in source.get("files", {}).items()}
        unlisted = [name for name in dict.fromkeys([*names, *unknown_origin]) if name not in self.listed]
        if unlisted:
            self._list(unlisted)

        with ThreadPoolExecutor(self.workers) as pool:
            wrong = dict(zip(names, pool.map(self._what_is_wrong, names)))
        if unknown_origin and all(map(self._what_is_wrong, unknown_origin)):
            raise UserError(f"{self.folder} holds shards that are not of {REPO}, such as {unknown_origin[0]}, and no source.json that says "
                            "what they are: set NANOCHAT_BASE_DIR to another place, or move them away.")
        write_source(self.folder, {
            "source": "fineweb-edu", "repo": REPO, "revision": self.commit, "asked": source.get("asked", self.revision),
            "files": {name: [facts.bytes, facts.sha256] for name, facts in sorted(self.listed.items())}})

        for name, what in wrong.items():
            if what and (self.folder / name).exists():
                self.say(f"{name} {what}: fetching it again")
        failed = {name: f"the hub has no such file at revision {self.commit[:12]}" for name in names if name not in self.listed}
        missing = [name for name in names if wrong[name] and name in self.listed]
        if missing:
            failed |= self._fetch_all(missing)
        if failed:
            first = "; ".join(f"{name} ({why})" for name, why in list(failed.items())[:3]) + ("; ..." if len(failed) > 3 else "")
            raise UserError(f"{len(failed)} of {len(names)} shards could not be fetched into {self.folder}: {first}. "
                            "Run the same command again: it goes on where it stopped.")
        size = sum(self.listed[name].bytes for name in names)
        self.say(f"{len(names) - 1} training shards and the validation shard are in {self.folder} ({in_words(size)}, all verified)")

    def _list(self, names: list[str]) -> None:
        """Ask the hub for size and SHA-256 of `names`, and for the commit where it is not known yet."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HTTPError
        api = HfApi(endpoint=self.endpoint)

        def ask() -> None:
            if not self.commit:
                self.commit = api.dataset_info(REPO, revision=self.revision, timeout=TIMEOUT).sha or ""
                if not self.commit:
                    raise Unreachable(f"{self.endpoint} does not say which commit {self.revision!r} of {REPO} is.")
            for start in range(0, len(names), 500):
                part = names[start:start + 500]
                for found in api.get_paths_info(REPO, part, revision=self.commit, repo_type="dataset"):
                    if getattr(found, "lfs", None) is None:
                        raise UserError(f"{self.endpoint} gives no SHA-256 of {found.path}: it cannot be checked.")
                    self.listed[found.path] = Listed(found.lfs.size, found.lfs.sha256)

        for attempt in range(TRIES):
            try:
                return ask()
            except UserError:
                raise
            except HfHubHTTPError as error:
                code = error.response.status_code
                if code not in (408, 429) and code < 500:
                    raise UserError(f"{self.endpoint} answers {code} for {REPO} at revision {self.commit or self.revision}: "
                                    f"check --revision, HF_ENDPOINT and, if it asks for one, HF_TOKEN. {OTHER_WAYS}") from error
                last: Exception = error
            except (HTTPError, OSError, ValueError, KeyError, TypeError) as error:  # the last three: an answer that no hub gives
                last = error
                if attempt >= 2:  # a machine without network should not wait half a minute to hear so
                    break
            self.stop.wait(BACK_OFF * 2**attempt)
        raise Unreachable(f"the Hugging Face hub at {self.endpoint} cannot be reached ({_reason(last)}). {OTHER_WAYS}") from last

    def _what_is_wrong(self, name: str) -> str:
        """'' where the shard is there and right, else what is wrong with it."""
        path, listed = self.folder / name, self.listed.get(name)
        if listed is None or not path.is_file():
            return "is missing"
        if path.stat().st_size != listed.bytes:
            return f"has {path.stat().st_size} bytes, not {listed.bytes}"
        return "" if sha256_of(path) == listed.sha256 else "is corrupt (its SHA-256 is wrong)"

    def _part(self, name: str) -> Path:
        return self.folder / f".{name}.{self.listed[name].sha256[:8]}.part"

    def _fetch_all(self, names: list[str]) -> dict[str, str]:
        """Fetch shards side by side; return what went wrong by name."""
        from tqdm import tqdm
        have = sum(min(self._part(name).stat().st_size, self.listed[name].bytes) for name in names if self._part(name).exists())
        total = sum(self.listed[name].bytes for name in names)
        need_disk(self.folder, total - have, f"fetching {len(names)} shards")
        failed: dict[str, str] = {}
        pool = ThreadPoolExecutor(self.workers)
        with closing(tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=f"{len(names)} shards", disable=None)) as self._bar:
            futures: dict[Future, str] = {pool.submit(self._fetch, name): name for name in names}
            waiting: Iterable[Future] = futures
            try:
                while waiting:
                    done, waiting = wait(waiting, timeout=30, return_when=FIRST_COMPLETED)
                    for future in done:
                        error = future.exception()
                        if isinstance(error, UserError):
                            failed[futures[future]] = str(error)
                        elif error is not None:
                            raise error
                    if self._bar.disable and not done:
                        self.say(f"{len(names) - len(waiting)} of {len(names)} shards fetched")
            finally:
                self.stop.set()  # after an error or Ctrl-C: threads end at their next piece, and keep what they have
                pool.shutdown(cancel_futures=True)
        return failed

    def _fetch(self, name: str) -> None:
        """Fetch one shard into its place: again where it breaks off or is wrong, until nothing more comes of it."""
        from huggingface_hub.errors import HfHubHTTPError, HTTPError
        part, listed = self._part(name), self.listed[name]
        part.touch()
        attempt = wrong = 0
        while True:
            if self.stop.is_set():
                raise UserError("not begun, as others failed")
            before = part.stat().st_size
            try:
                self._transfer(name, part)
                if sha256_of(part) == listed.sha256:
                    os.replace(part, self.folder / name)
                    sync_folder(self.folder)
                    return
                self._restart(part)
                wrong += 1
                if wrong == 2:
                    raise UserError(f"{self.endpoint} twice sent bytes of another SHA-256 than it states: try later")
                continue
            except HfHubHTTPError as error:
                code = error.response.status_code
                if code == 416:  # what we have does not belong to it
                    self._restart(part)
                elif code not in (408, 429) and code < 500:
                    raise UserError(f"the hub answers {code}") from error
                last: Exception = error
            except (HTTPError, OSError) as error:
                if isinstance(error, OSError) and error.errno in FULL:
                    self.stop.set()
                    raise UserError("the disk is full: free some space") from error
                last = error
            attempt = 0 if part.stat().st_size > before else attempt + 1
            if attempt == TRIES:
                if not isinstance(last, HfHubHTTPError):
                    self.stop.set()  # no network: each of the others would wait as long
                raise Unreachable(f"the hub does not answer: {_reason(last)}") from last
            self.stop.wait(BACK_OFF * 2**max(attempt - 1, 0))

    def _transfer(self, name: str, part: Path) -> None:
        """Append to `part` what it lacks. Raises OSError where the answer ends too early."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status
        size = self.listed[name].bytes
        if part.stat().st_size > size:
            self._restart(part)
        have = part.stat().st_size
        if have < size:
            url = hf_hub_url(REPO, name, repo_type="dataset", revision=self.commit, endpoint=self.endpoint)
            headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
            with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as answer:
                hf_raise_for_status(answer)
                if have and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                    self._restart(part)  # the server sends all of it, whatever was asked
                with open(part, "ab") as file:
                    for piece in answer.iter_bytes():  # as they come: a chunk size would hold back, and lose, an unfilled one
                        file.write(piece)
                        self._advance(len(piece))
                        if self.stop.is_set():
                            raise UserError("stopped, as others failed; what came is kept")
                    file.flush()
                    os.fsync(file.fileno())
        if part.stat().st_size != size:
            raise OSError(f"{part.stat().st_size} of {size} bytes came")

    def _restart(self, part: Path) -> None:
        self._advance(-part.stat().st_size)
        os.truncate(part, 0)

    def _advance(self, size: int) -> None:
        with self._lock:
            self._bar.update(size)


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
