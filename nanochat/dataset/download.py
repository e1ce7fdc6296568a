"""Download shards of FineWeb-Edu from the Hugging Face hub, and check each against the hub's own SHA-256.

    python -m nanochat.dataset -n 240 -w 8       # 240 training shards and the validation shard; 8 parallel downloads

The data set has no named release, so the revision is pinned at the first fetch: the branch `main` (or --revision) is
resolved to its commit, and source.json records that commit with the size and SHA-256 of each shard. Every later fetch
into the same folder uses this commit. If all shards are there already, no network is needed.

huggingface_hub provides the listing, the HTTP session and its headers (token, $HF_ENDPOINT). The bytes come over plain
HTTP range requests, because the download of huggingface_hub deletes an interrupted file and starts it over. Ours keeps
`.shard_00000.parquet.<sha>.part` and resumes it.
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
RETRIES = 6              # attempts in a row that gain no byte; waits of 1, 2, 4, 8, 16 s between them
BACK_OFF = 1.0           # seconds
TIMEOUT = 30.0           # seconds without a byte
OTHER_WAYS = ("Without a network, train on your own text (`python -m nanochat.dataset import PATH...`) "
              "or on generated text (`python -m nanochat.dataset small-world`).")


@dataclass(frozen=True)
class HubFile:
    """Size and SHA-256 of a shard, as the hub lists them."""

    bytes: int
    sha256: str


class HubUnreachable(UserError):
    """The hub does not answer, or the answer is not that of a hub."""


def fetch(count: int, folder: Path, *, workers: int = 4, revision: str = "main",
          say: Callable[[str], None] = print) -> None:
    """Download training shards and the validation shard, and verify them. Shards that are there and correct are kept.

    Args:
        count: the first `count` training shards; -1 for all.
        folder: where the shards go.
        workers: parallel downloads.
        revision: branch, tag or commit of the data set, for the first fetch into `folder`.
        say: prints one line to the user.

    Raises:
        UserError: a shard is still missing at the end, or `folder` holds text of another source or revision.
    """
    if count < -1 or workers < 1:
        raise UserError(f"-n is {count} and -w is {workers}: -n is the number of training shards (-1 for all "
                        f"{LAST_SHARD}), -w the number of parallel downloads, 1 or more.")
    wanted = LAST_SHARD if count == -1 else min(count, LAST_SHARD)
    names = [shard_name(LAST_SHARD), *map(shard_name, range(wanted))]  # validation first: training starts with it
    with writing(folder):
        folder.mkdir(exist_ok=True)
        Downloader(folder, workers, revision, say).run(names)


class Downloader:
    """One call of `fetch`. Its threads share the event `stop`, which is set when it is no use to continue."""

    def __init__(self, folder: Path, workers: int, revision: str, say: Callable[[str], None]):
        self.folder, self.workers, self.revision, self.say = folder, workers, revision, say
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self.commit = ""
        self.files: dict[str, HubFile] = {}
        self.stop = threading.Event()
        self._bar = None
        self._lock = threading.Lock()

    def run(self, names: list[str]) -> None:
        """Check the shards that are there, record the commit, and download what is missing or corrupt."""
        source = read_source(self.folder)
        if source and source["source"] != "fineweb-edu":
            raise UserError(f"{self.folder} holds other text ({source['source']}: "
                            f"{source.get('summary', 'see source.json')}): two sources never mix in one folder. "
                            "Set NANOCHAT_BASE_DIR to another place, or move that folder away.")
        unknown_origin = [path.name for path in shards_in(self.folder)] if not source else []
        self.commit = source.get("revision", "")
        if self.commit and self.revision not in ("main", source.get("asked"), self.commit):
            raise UserError(f"{self.folder} holds shards of revision {self.commit}, and {self.revision} was asked for: "
                            "revisions never mix in one folder. Set NANOCHAT_BASE_DIR to another place.")
        self.files = {name: HubFile(*facts) for name, facts in source.get("files", {}).items()}
        unlisted = [name for name in dict.fromkeys([*names, *unknown_origin]) if name not in self.files]
        if unlisted:
            self._list(unlisted)

        with ThreadPoolExecutor(self.workers) as pool:
            problems = dict(zip(names, pool.map(self._problem, names)))
        if unknown_origin and all(map(self._problem, unknown_origin)):
            raise UserError(f"{self.folder} holds shards that are not of {REPO}, such as {unknown_origin[0]}, "
                            "and no source.json that says what they are: "
                            "set NANOCHAT_BASE_DIR to another place, or move them away.")
        write_source(self.folder, {
            "source": "fineweb-edu", "repo": REPO, "revision": self.commit, "asked": source.get("asked", self.revision),
            "files": {name: [file.bytes, file.sha256] for name, file in sorted(self.files.items())}})

        for name, problem in problems.items():
            if problem and (self.folder / name).exists():
                self.say(f"{name} {problem}: fetching it again")
        failed = {name: f"the hub has no such file at revision {self.commit[:12]}"
                  for name in names if name not in self.files}
        missing = [name for name in names if problems[name] and name in self.files]
        if missing:
            failed |= self._fetch_all(missing)
        if failed:
            first = "; ".join(f"{name} ({why})" for name, why in list(failed.items())[:3])
            raise UserError(f"{len(failed)} of {len(names)} shards could not be fetched into {self.folder}: "
                            f"{first}{'; ...' if len(failed) > 3 else ''}. "
                            "Run the same command again: it resumes where it stopped.")
        size = sum(self.files[name].bytes for name in names)
        self.say(f"{len(names) - 1} training shards and the validation shard are in {self.folder} "
                 f"({in_words(size)}, all verified)")

    def _list(self, names: list[str]) -> None:
        """Ask the hub for the size and SHA-256 of `names`, and for the commit if it is not known yet."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HTTPError
        api = HfApi(endpoint=self.endpoint)

        def ask() -> None:
            if not self.commit:
                self.commit = api.dataset_info(REPO, revision=self.revision, timeout=TIMEOUT).sha or ""
                if not self.commit:
                    raise HubUnreachable(f"{self.endpoint} does not say which commit {self.revision!r} of {REPO} is.")
            for start in range(0, len(names), 500):
                part = names[start:start + 500]
                for found in api.get_paths_info(REPO, part, revision=self.commit, repo_type="dataset"):
                    if getattr(found, "lfs", None) is None:
                        raise UserError(f"{self.endpoint} gives no SHA-256 of {found.path}, so it cannot be checked. "
                                        "Unset HF_ENDPOINT, or set it to another hub.")
                    self.files[found.path] = HubFile(found.lfs.size, found.lfs.sha256)

        for attempt in range(RETRIES):
            try:
                return ask()
            except UserError:
                raise
            except HfHubHTTPError as error:
                code = error.response.status_code
                if code not in (408, 429) and code < 500:
                    revision = self.commit or self.revision
                    raise UserError(f"{self.endpoint} answers {code} for {REPO} at revision {revision}: check "
                                    f"--revision, HF_ENDPOINT and, if needed, HF_TOKEN. {OTHER_WAYS}") from error
                last: Exception = error
            except (HTTPError, OSError, ValueError, KeyError, TypeError) as error:
                # ValueError, KeyError and TypeError come from an answer that no hub gives
                last = error
                if attempt >= 2:  # without a network, give up after seconds, not after half a minute
                    break
            self.stop.wait(BACK_OFF * 2**attempt)
        raise HubUnreachable(f"the Hugging Face hub at {self.endpoint} cannot be reached ({_reason(last)}). "
                             f"{OTHER_WAYS}") from last

    def _problem(self, name: str) -> str:
        """Say what is wrong with a shard; "" if it is there and correct."""
        path, listed = self.folder / name, self.files.get(name)
        if listed is None or not path.is_file():
            return "is missing"
        if path.stat().st_size != listed.bytes:
            return f"has {path.stat().st_size} bytes, not {listed.bytes}"
        return "" if sha256_of(path) == listed.sha256 else "is corrupt (its SHA-256 is wrong)"

    def _part(self, name: str) -> Path:
        return self.folder / f".{name}.{self.files[name].sha256[:8]}.part"

    def _fetch_all(self, names: list[str]) -> dict[str, str]:
        """Download shards in parallel; return {name: what went wrong} of those that failed."""
        from tqdm import tqdm
        parts = {name: self._part(name) for name in names}
        have = sum(min(part.stat().st_size, self.files[name].bytes) for name, part in parts.items() if part.exists())
        total = sum(self.files[name].bytes for name in names)
        need_disk(self.folder, total - have, f"fetching {len(names)} shards")
        failed: dict[str, str] = {}
        pool = ThreadPoolExecutor(self.workers)
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=f"{len(names)} shards", disable=None)
        with closing(bar) as self._bar:
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
                self.stop.set()  # after an error or Ctrl-C: threads end at their next piece; the part files stay
                pool.shutdown(cancel_futures=True)
        return failed

    def _fetch(self, name: str) -> None:
        """Download one shard. Retry if it breaks off or its SHA-256 is wrong, until RETRIES attempts gain nothing."""
        from huggingface_hub.errors import HfHubHTTPError, HTTPError
        part, listed = self._part(name), self.files[name]
        part.touch()
        attempt = wrong = 0
        while True:
            if self.stop.is_set():
                raise UserError("not started, because others failed")
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
                    raise UserError(f"{self.endpoint} twice sent bytes with another SHA-256 than it lists: try later")
                continue
            except HfHubHTTPError as error:
                code = error.response.status_code
                if code == 416:  # range not satisfiable: the part file does not belong to this shard
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
            if attempt == RETRIES:
                if not isinstance(last, HfHubHTTPError):
                    self.stop.set()  # no network: every other shard would wait as long
                raise HubUnreachable(f"the hub does not answer: {_reason(last)}") from last
            self.stop.wait(BACK_OFF * 2**max(attempt - 1, 0))

    def _transfer(self, name: str, part: Path) -> None:
        """Append the missing bytes to `part`. Raises OSError if the answer ends too early."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status
        size = self.files[name].bytes
        if part.stat().st_size > size:
            self._restart(part)
        have = part.stat().st_size
        if have < size:
            url = hf_hub_url(REPO, name, repo_type="dataset", revision=self.commit, endpoint=self.endpoint)
            headers = build_hf_headers() | {"Accept-Encoding": "identity"}
            if have:
                headers["Range"] = f"bytes={have}-"
            with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as answer:
                hf_raise_for_status(answer)
                if have and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                    self._restart(part)  # the server ignored the range and sends the whole file
                with open(part, "ab") as file:
                    for piece in answer.iter_bytes():  # no chunk size: a break would lose an unfilled chunk
                        file.write(piece)
                        self._advance(len(piece))
                        if self.stop.is_set():
                            raise UserError("stopped, because others failed; the part that came is kept")
                    file.flush()
                    os.fsync(file.fileno())
        if part.stat().st_size != size:
            raise OSError(f"received {part.stat().st_size} of {size} bytes")

    def _restart(self, part: Path) -> None:
        self._advance(-part.stat().st_size)
        os.truncate(part, 0)

    def _advance(self, size: int) -> None:
        with self._lock:
            self._bar.update(size)


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
