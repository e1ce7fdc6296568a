"""Download shards of text from the Hugging Face hub, and check each against the hub's own SHA-256.

    python -m nanochat.dataset -n 240 -w 8       # 240 training shards and the validation shard; 8 parallel downloads
    python -m nanochat.dataset -n 170 --source=climbmix

The data sets (HUB_TEXTS in nanochat/dataset/shards.py) have no named release, so the revision is pinned at the first
fetch: the branch `main` (or --revision) is resolved to its commit, and source.json records that commit with the size
and SHA-256 of each shard. Every later fetch into the same folder uses this commit. If all shards are there already, no
network is needed.

huggingface_hub provides the listing, the HTTP session and its headers (token, $HF_ENDPOINT). The bytes come as
nanochat/transfer.py says: an interrupted shard stays as `.shard_00000.parquet.<sha>.part` and is resumed.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path

from nanochat.dataset.shards import (
    FINEWEB_EDU,
    HUB_TEXTS,
    read_source,
    shard_name,
    shards_in,
    write_source,
    writing,
)
from nanochat.errors import NotWritten, UserError
from nanochat.files import in_words, need_disk
from nanochat.transfer import TIMEOUT, Listed, NotFetched, ask_hub, fetch_file

OTHER_WAYS = ("Without a network, train on your own text (`python -m nanochat.dataset import PATH...`) "
              "or on generated text (`python -m nanochat.dataset small-world`).")


def fetch(count: int, folder: Path, *, source: str = FINEWEB_EDU, workers: int = 4, revision: str = "main",
          say: Callable[[str], None] = print) -> None:
    """Download training shards and the validation shard, and verify them. Shards that are there and correct are kept.

    Args:
        count: the first `count` training shards; -1 for all.
        folder: where the shards go.
        source: which of HUB_TEXTS.
        workers: parallel downloads.
        revision: branch, tag or commit of the data set, for the first fetch into `folder`.
        say: prints one line to the user.

    Raises:
        UserError: a shard is still missing at the end, or `folder` holds text of another source or revision.
    """
    if count < -1 or workers < 1:
        raise UserError(f"-n is {count} and -w is {workers}: -n is the number of training shards (-1 for all "
                        f"{HUB_TEXTS[source].last}), -w the number of parallel downloads, 1 or more.")
    text = HUB_TEXTS[source]
    wanted = text.last if count == -1 else min(count, text.last)
    names = [text.val, *map(shard_name, range(wanted))]  # validation first: training starts with it
    with writing(folder):
        folder.mkdir(exist_ok=True)
        Downloader(folder, source, workers, revision, say).run(names)


class Downloader:
    """One call of `fetch`. Its threads share the event `stop`, which is set when it is no use to continue."""

    def __init__(self, folder: Path, source: str, workers: int, revision: str, say: Callable[[str], None]):
        self.folder, self.workers, self.revision, self.say = folder, workers, revision, say
        self.source, self.repo = source, HUB_TEXTS[source].repo
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self.commit = ""
        self.files: dict[str, Listed] = {}
        self.stop = threading.Event()
        self._bar = None
        self._lock = threading.Lock()

    def run(self, names: list[str]) -> None:
        """Check the shards that are there, record the commit, and download what is missing or corrupt."""
        source = read_source(self.folder)
        if source and source["source"] != self.source:
            held = HUB_TEXTS.get(source["source"])
            what = (f"{held.title}, not {HUB_TEXTS[self.source].title}" if held else
                    f"other text ({source['source']}: {source.get('summary', 'see source.json')})")
            more = f" `--source={source['source']}` goes on with it." if held else ""
            raise UserError(f"{self.folder} holds {what}: two sources never mix in one folder. "
                            f"Set NANOCHAT_BASE_DIR to another place, or move that folder away.{more}")
        unknown_origin = [path.name for path in shards_in(self.folder)] if not source else []
        self.commit = source.get("revision", "")
        if self.commit and self.revision not in ("main", source.get("asked"), self.commit):
            raise UserError(f"{self.folder} holds shards of revision {self.commit}, and {self.revision} was asked for: "
                            "revisions never mix in one folder. Set NANOCHAT_BASE_DIR to another place.")
        self.files = {name: Listed(*facts) for name, facts in source.get("files", {}).items()}
        unlisted = [name for name in dict.fromkeys([*names, *unknown_origin]) if name not in self.files]
        if unlisted:
            self._list(unlisted)

        with ThreadPoolExecutor(self.workers) as pool:
            problems = dict(zip(names, pool.map(self._problem, names)))
        if unknown_origin and all(map(self._problem, unknown_origin)):
            raise UserError(f"{self.folder} holds shards that are not of {self.repo}, such as {unknown_origin[0]}, "
                            "and no source.json that says what they are: "
                            "set NANOCHAT_BASE_DIR to another place, move them away, or name their --source.")
        write_source(self.folder, {
            "source": self.source, "repo": self.repo, "revision": self.commit,
            "asked": source.get("asked", self.revision),
            "files": {name: [file.size, file.sha256] for name, file in sorted(self.files.items())}})

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
        size = sum(self.files[name].size for name in names)
        self.say(f"{len(names) - 1} training shards and the validation shard are in {self.folder} "
                 f"({in_words(size)}, all verified)")

    def _list(self, names: list[str]) -> None:
        """Ask the hub for the size and SHA-256 of `names`, and for the commit if it is not known yet."""
        from huggingface_hub import HfApi
        api = HfApi(endpoint=self.endpoint)

        def ask() -> None:
            if not self.commit:
                self.commit = api.dataset_info(self.repo, revision=self.revision, timeout=TIMEOUT).sha or ""
                if not self.commit:
                    raise UserError(f"{self.endpoint} does not say which commit {self.revision!r} of {self.repo} is.")
            for start in range(0, len(names), 500):
                part = names[start:start + 500]
                for found in api.get_paths_info(self.repo, part, revision=self.commit, repo_type="dataset"):
                    if getattr(found, "lfs", None) is None:
                        raise UserError(f"{self.endpoint} gives no SHA-256 of {found.path}, so it cannot be checked. "
                                        "Unset HF_ENDPOINT, or set it to another hub.")
                    self.files[found.path] = Listed(found.lfs.size, found.lfs.sha256)

        try:
            ask_hub(ask, f"the list of files at {self.endpoint}", self.say, self.stop)
        except NotFetched as error:
            if error.status is not None and error.status < 500:
                raise UserError(f"{self.endpoint} answers {error.status} for {self.repo} at revision "
                                f"{self.commit or self.revision}: check --revision, HF_ENDPOINT and, if needed, "
                                f"HF_TOKEN. {OTHER_WAYS}") from error
            raise UserError(f"the Hugging Face hub at {self.endpoint} cannot be reached ({error}). {OTHER_WAYS}"
                            ) from error

    def _problem(self, name: str) -> str:
        """Say what is wrong with a shard; "" if it is there and correct."""
        listed = self.files.get(name)
        return "is missing" if listed is None else listed.problem(self.folder / name)

    def _part(self, name: str) -> Path:
        return self.folder / f".{name}.{self.files[name].sha256[:8]}.part"

    def _fetch_all(self, names: list[str]) -> dict[str, str]:
        """Download shards in parallel; return {name: what went wrong} of those that failed."""
        from tqdm import tqdm
        parts = {name: self._part(name) for name in names}
        have = sum(min(part.stat().st_size, self.files[name].size) for name, part in parts.items() if part.exists())
        total = sum(self.files[name].size for name in names)
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
        """Download one shard. Where the network or the disk fails, the others stop: each would wait as long."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers
        url = hf_hub_url(self.repo, name, repo_type="dataset", revision=self.commit, endpoint=self.endpoint)
        try:
            fetch_file(url, self.folder / name, self.files[name], say=self._say_above, headers=build_hf_headers(),
                       part=self._part(name), stop=self.stop, advance=self._advance)
        except (NotFetched, NotWritten) as error:
            if isinstance(error, NotWritten) or error.network:
                self.stop.set()
            raise

    def _say_above(self, line: str) -> None:
        """Print a line above the progress bar."""
        with self._lock:
            if self._bar.disable:
                self.say(line)
            else:
                self._bar.clear()
                self.say(line)
                self._bar.refresh()

    def _advance(self, size: int) -> None:
        with self._lock:
            self._bar.update(size)
