"""Disks that are full, become full, or may not be written to: training goes on where it can, nothing is half-written,
and with room again the same command ends as if nothing had happened. And folders with odd names.

As root on Linux a small file system in memory is mounted for each case; elsewhere the largest file that a process may
write is limited, which gives the same errors in the middle of a write.
"""

import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.torture.judge import SURVIVED, Verdict, all_whole, changed, compare_end, lost
from bench.torture.kills import finish, keep, last_line, made
from bench.torture.lab import JOBS, PATIENCE, START, TEXT, Job, Lab, Room, content
from bench.torture.processes import Hung

MB = 1 << 20


def _mount(*arguments: str) -> bool:
    return not subprocess.run(["mount", *arguments], capture_output=True).returncode


def can_mount(lab: Lab) -> bool:
    """Return whether file systems in memory can be mounted here."""
    if os.geteuid() or not shutil.which("mount"):
        return False
    place = lab.scratch / "mount"
    place.mkdir(exist_ok=True)
    if not _mount("-t", "tmpfs", "-o", "size=1m", "torture", str(place)):
        return False
    subprocess.run(["umount", "-l", str(place)], capture_output=True)
    return True


@contextmanager
def small_disk(room: Room, size: int) -> Iterator[Callable[[str], None]]:
    """Put the base folder of a room on a file system in memory. Yields a function that mounts it with other options.

    size: bytes of it.
    """
    aside = room.base.with_name("aside")
    room.base.rename(aside)
    room.base.mkdir()
    if not _mount("-t", "tmpfs", "-o", f"size={size}", "torture", str(room.base)):
        raise RuntimeError("cannot mount a file system in memory")
    try:
        shutil.copytree(aside, room.base, dirs_exist_ok=True)
        shutil.rmtree(aside)

        def again(options: str) -> None:
            if not _mount("-o", f"remount,{options}", str(room.base)):
                raise RuntimeError(f"cannot mount with {options}")

        yield again
    finally:
        room.stop()
        if room.keep:
            shutil.copytree(room.base, room.base.with_name("kept"), symlinks=True)
        subprocess.run(["umount", "-l", str(room.base)], capture_output=True)


def used(folder: Path) -> int:
    """Return the bytes of the files below a folder, each rounded up to whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in folder.rglob("*"))


def full_disk(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Train with less room than the run needs: a clear word, or older checkpoints go; then with room to the end."""
    job = JOBS[rng.choice(list(JOBS))]
    whole = lab.reference(job)
    room = lab.room(job, name)
    one = used(whole.base / job.folder) // 4  # of about four checkpoints
    if not can_mount(lab):
        limit = int(one * rng.uniform(0.01, 0.5))
        tell(f"{job.stage}: no file above {limit:,} bytes")
        life = room.start(job, prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        verdict = _ended(room, job, life, whole.seconds)
        return keep(room, verdict) if verdict else finish(room, job, whole.base, whole.seconds)
    spare = int(one * rng.uniform(0.05, 3.5))
    tell(f"{job.stage}: room for {spare / one:.1f} checkpoints")
    with small_disk(room, used(room.base) + spare) as again:
        life = room.start(job)
        life.last(10 + 3 * whole.seconds)
        if life.poll() is None:  # it waits for room for its last checkpoint, or is slow
            again("size=400m")
        verdict = _ended(room, job, life, whole.seconds)
        if verdict:
            return keep(room, verdict)
        again("size=400m")
        return finish(room, job, whole.base, whole.seconds, log=False)  # a full disk costs lines of the log


def _ended(room: Room, job: Job, life: object, usual: float) -> Verdict | None:
    """Judge the end of a run that had no room: no traceback, and what has a final name is whole."""
    try:
        code = room.end(life, usual)
    except Hung as error:
        return lost(str(error))
    text = life.text()
    if "Traceback" in text:
        return changed(f"exit code {code} with a traceback: {last_line(life)}")
    if code and "error:" not in text:
        return changed(f"exit code {code} without a word: {last_line(life)}")
    if not code and not (room.folder(job) / f"meta_{job.steps:06d}.json").exists():
        return lost("exit code 0, and the last checkpoint is not there")
    return all_whole(room.folder(job))


def filled_meanwhile(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Someone else fills the disk while a run trains, or it becomes read-only; later there is room again."""
    job = JOBS[rng.choice(list(JOBS))]
    whole = lab.reference(job)
    if not can_mount(lab):
        return Verdict("skipped", "no file system can be mounted here")
    room = lab.room(job, name)
    how = rng.choice(("filled", "filled", "read-only"))
    with small_disk(room, used(room.base) + used(whole.base / job.folder) + 60 * MB) as again:
        life = room.start(job)
        if not life.until(lambda: "step 0" in life.text(), START + PATIENCE * whole.seconds):
            return keep(room, lost(f"did not begin: {last_line(life)}"))
        life.last(rng.uniform(0, whole.seconds / 2))
        filler = room.base / "someone-elses-file"
        if how == "filled":
            left = rng.choice((0, 0, 100_000, 3_000_000))
            with filler.open("wb", buffering=0) as file:
                free = shutil.disk_usage(room.base).free - left
                try:
                    while free > 0:
                        free -= file.write(bytes(min(free, MB)))
                except OSError:
                    pass
            words = f"filled to {left:,} bytes"
        else:
            try:
                again("ro")
                words = how
            except RuntimeError:  # files are open for writing
                words = "not made read-only"
        tell(f"{job.stage}: {words}")
        life.last(10 + 3 * whole.seconds)
        if life.poll() is None:  # as above
            if how == "read-only":
                again("rw")
            filler.unlink(missing_ok=True)
        verdict = _ended(room, job, life, whole.seconds)
        if how == "read-only":
            again("rw")
        filler.unlink(missing_ok=True)
        if verdict:
            return keep(room, Verdict(verdict.word, f"{verdict.note} [{words}]"))
        verdict = finish(room, job, whole.base, whole.seconds, log=False)
        return Verdict(verdict.word, verdict.note and f"{verdict.note} [{words}]")


def text_on_full_disk(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Make text and tokenizer with too little room, and again with enough: the same files, or none before."""
    whole = lab.text()
    if not can_mount(lab):
        return Verdict("skipped", "no file system can be mounted here")
    room = lab.empty_room(name)
    sizes = used(whole / "base_data"), used(whole / "tokenizer")
    with small_disk(room, 64 * MB) as again:
        for (argv, seconds, folder), size in zip(zip(TEXT, (1.0, 2.0), ("base_data", "tokenizer")), sizes):
            spare = int(size * rng.uniform(0, 1.0)) // 4096 * 4096 + 4096
            again(f"size={used(room.base) + spare}")
            life = room.start(argv)
            try:
                code = room.end(life, seconds)
            except Hung as error:
                return keep(room, lost(f"{argv[1]}: {error}"))
            tell(f"{argv[1]}: {spare:,} of {size:,} bytes, exit code {code}")
            if "Traceback" in life.text():
                return keep(room, changed(f"{argv[1]} with {spare:,} of {size:,} bytes: a traceback: "
                                          f"{last_line(life)}"))
            if not code and made(room.base / folder) != made(whole / folder):
                return keep(room, lost(f"{argv[1]} with {spare:,} of {size:,} bytes: exit code 0, and it is not all "
                                       "there"))
            again("size=64m")
            life = room.start(argv)
            if code := room.end(life, seconds):
                return keep(room, lost(f"{argv[1]} does not go on with room again, exit code {code}: "
                                       f"{last_line(life)}"))
            found, wanted = made(room.base / folder), made(whole / folder)
            differ = sorted(path for path in wanted if found.get(path) != wanted[path])
            if differ:
                return keep(room, changed(f"{folder} is other than undisturbed: {', '.join(differ)[:200]}"))
    return Verdict(SURVIVED)


NAMES = ("with space", "模型と語", "a'b\"c", "name=1;x", "%s {0} $HOME", "tail.", "n" * 200)
LOCALES = ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
           {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "none.such", "LANG": ""}, {"HOME": "/nowhere"})


def odd_places(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Train in folders with odd names, without UTF-8, without a home: the same end. In no folder at all: a sentence."""
    job = JOBS[rng.choice(list(JOBS))]
    whole = lab.reference(job)
    room = lab.room(job, name)
    how = rng.choice(("name", "name", "locale", "locale", "file", "nowhere"))
    fresh, env, bad = how == "locale", {}, ""
    if how == "name":
        place = room.base.with_name(rng.choice(NAMES))
        room.base.rename(place)
        room.base = place
    elif how == "locale":
        env = rng.choice(LOCALES)
    elif how == "file":
        bad = str(room.base.with_name("a-file"))
        Path(bad).write_text("text")
    else:
        bad = "/proc/nowhere/base"
    words = f"{job.stage}: {how} {room.base.name if how == 'name' else env or bad}"
    tell(words)
    before = content(room.base)
    life = room.start(job, fresh=fresh, env={**env, **({"NANOCHAT_BASE_DIR": bad} if bad else {})})
    try:
        code = room.end(life, whole.seconds)
    except Hung as error:
        return keep(room, lost(f"{words}: {error}"))
    if bad:
        if not code or "error:" not in life.text() or "Traceback" in life.text():
            return keep(room, changed(f"{words}: exit code {code}, {last_line(life)}"))
        return Verdict(SURVIVED) if content(room.base) == before else keep(room, lost(f"{words}: files changed"))
    if code:
        return keep(room, lost(f"{words}: exit code {code}, {last_line(life)}"))
    return keep(room, compare_end(room.base, whole.base, job))
