"""A rank that is stopped or hangs is named and ended; one that is slow, busy or compiles is not."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from nanochat.errors import UserError
from nanochat.watch import Beat, Seen, Watch, all_wait, busy, hang_seconds, judge
from tests.conftest import ROOT


def seen_of(*beats: Beat | None, at=0.0) -> dict[int, Seen]:
    return {rank: Seen(beat, at) for rank, beat in enumerate(beats)}


WAITS = Beat(9, meetings=6, still=200)
BEHIND = Beat(9, meetings=5, still=200, where="nanochat/gpt.py:7 in forward", step=3)


def test_who_is_behind_and_stands_still_is_named():
    found = judge(seen_of(WAITS, BEHIND, WAITS), 0.0, 120)
    assert found.keys() == {1}
    assert "meeting 6 of step 3, it has come to 5 and has stood still for 200 s at nanochat/gpt.py:7" in found[1]
    assert not judge(seen_of(WAITS, BEHIND, WAITS), 0.0, 300)


@pytest.mark.parametrize("change", [{"still": 3}, {"busy": "saving step 5"}, {"compiles": True}, {"meetings": 6}])
def test_who_moves_or_is_busy_or_compiles_or_has_come_is_not_named(change):
    assert not judge(seen_of(WAITS, Beat(**{**vars(BEHIND), **change}), WAITS), 0.0, 120)
    found = judge(seen_of(WAITS, Beat(**{**vars(BEHIND), "compiles": True, "still": 1300}), WAITS), 0.0, 120)
    assert found.keys() == {1}  # nothing compiles for so long


def test_who_shows_no_sign_of_life_is_named_whatever_it_did_last():
    seen = seen_of(WAITS, Beat(9, 6, 0, busy="saving"), None)
    seen[0].at = 100.0
    assert judge(seen, 130.0, 120).keys() == {1, 2}
    assert judge(seen, 130.0, 120, here=range(1, 3)) == {}  # their owner looks for it


def test_all_that_wait_for_one_another_are_told_from_all_that_work():
    assert all_wait(seen_of(WAITS, WAITS), 0.0, 120) == 200
    for other in (BEHIND, None, Beat(9, 6, 3), Beat(9, 6, 200, busy="saving"), Beat(9, 6, 200, compiles=True)):
        assert not all_wait(seen_of(WAITS, other), 0.0, 120)


def test_the_limits_are_settings(monkeypatch):
    for name in ("WARN", "END"):
        monkeypatch.delenv(f"NANOCHAT_HANG_{name}", raising=False)
    assert hang_seconds() == (120, 600)
    monkeypatch.setenv("NANOCHAT_HANG_END", "0")
    assert hang_seconds() == (120, float("inf"))
    monkeypatch.setenv("NANOCHAT_HANG_WARN", "-3")
    with pytest.raises(UserError, match="NANOCHAT_HANG_WARN is '-3'"):
        hang_seconds()


def launch(*arguments: str, flags: tuple[str, ...] = (), warn=3, end=6) -> subprocess.CompletedProcess:
    """Run tests.launched_hang on two ranks with one thread each; see there for the arguments."""
    command = [sys.executable, "-m", "scripts.launch", "--ranks=2", *flags, "tests.launched_hang", "--", *arguments]

    env = {**os.environ, "OMP_NUM_THREADS": "1", "NANOCHAT_HANG_WARN": str(warn), "NANOCHAT_HANG_END": str(end)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_a_rank_that_hangs_is_named_with_its_place_and_ended():
    done = launch("hang", "1")
    assert done.returncode == 137, done.stderr
    lines = done.stderr.splitlines()
    assert any(line.startswith("warning: rank 1 of 2 hangs: the others wait for it at meeting ")
               and "tests/launched_hang.py:" in line for line in lines), lines
    assert lines[-1].startswith("error: rank 1 of 2 failed first: the others wait for it at meeting "), lines


@pytest.mark.parametrize("rank", ["0", "1"])  # rank 0 holds the store
def test_a_rank_that_is_stopped_is_named_and_ended(rank):
    done = launch("stop", rank)
    assert done.returncode == 137, done.stderr
    assert f"warning: rank {rank} (process " in done.stderr and "it is stopped (SIGSTOP); `kill -CONT " in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: rank {rank} of 2 failed first: no sign of life for ")


@pytest.mark.slow
def test_slow_ranks_are_not_named():
    done = launch("slow", "1", warn=10, end=20)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_a_main_thread_stands_still_where_it_waits_and_not_where_it_computes_or_moves():
    watch = Watch(0, 2, range(0), None, lambda: 7, {"step": 4, "first_step": 1}, print, cpu=True)
    watch._pause = 0.2  # computing for a tenth of it is no standing still

    def look(beats: list[Beat]) -> threading.Thread:
        """A thread that looks three times at what the main thread does."""
        thread = threading.Thread(target=lambda: [beats.append(watch._own_beat()) or time.sleep(0.3) for _ in "123"])
        thread.start()
        return thread

    waited: list[Beat] = []
    look(waited).join()  # in one place
    assert waited[-1].still > 0.25 and "tests/test_watch.py" in waited[-1].where
    assert waited[-1].meetings == 7 and waited[-1].step == 4 and not waited[-1].compiles and not waited[-1].busy

    computed: list[Beat] = []
    thread = look(computed)
    while thread.is_alive():
        sum(range(10_000))
    assert computed[-1].still < 0.25
    with busy("reading"):
        assert watch._own_beat().busy == "reading"


def test_ranks_that_fail_are_started_again_unless_it_is_in_vain(tmp_path):
    done = launch("kill", "1", str(tmp_path / "once"), flags=("--max-restarts=2",))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("restart ") == 1
    assert "restart 1 of at most 2: tests.launched_hang failed at step 2 (rank 1 of 2 failed first: it was killed" in (
        done.stderr), done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")] == [
        [0, "restart 1 of at most 2, at step 2: rank 1 of 2 failed first: it was killed (SIGKILL); often the machine's "
            "memory was full"]]
