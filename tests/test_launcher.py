"""An owner hands signals on once, waits for a save, ends the others where one rank fails, and leaves nothing behind.

Covers scripts/launch.py too. The processes here are small programs without torch; tests/test_all_ranks.py runs the real
ones."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nanochat import launcher
from nanochat.launcher import Owner
from tests.conftest import ROOT
from tests.helpers import gone, running

CHILD = """
import os, signal, sys, time
from nanochat.launcher import *
def say(*words):  # in one write, as several processes print
    sys.stdout.write(' '.join(map(str, words)) + '\\n')
    sys.stdout.flush()
def started(folder, ranks):  # waits until so many ranks have called it
    open(f"{folder}/started{os.environ['RANK']}", "w").close()
    while sum(name.startswith("started") for name in os.listdir(folder)) < ranks:
        time.sleep(0.01)
obey_owner()
"""
STEPS = """
with stop_signals() as received:
    say('steps')
    while not received: time.sleep(0.01)
    say('saving', received)
    with saving('step 7'):
        time.sleep({seconds})
        say('saved', received)
        open({saved!r} + (os.environ['RANK'] if {saved!r} != os.devnull else ''), 'w')
raise SystemExit(128 + received[0])
"""


def program(text: str) -> list[str]:
    """The command of a process that obeys its owner and then runs this text."""
    return [sys.executable, "-c", CHILD + textwrap.dedent(text)]


def steps(seconds: float, saved: Path | str = os.devnull) -> list[str]:
    """The command of a process that trains until it is asked to stop and then saves for some seconds."""
    return program(STEPS.format(seconds=seconds, saved=str(saved)))


def owner_of(argv: list[str], ranks: int = 1, settings: str = "") -> subprocess.Popen:
    """A process that owns a job and ends with its code. Its output and the job's come on one pipe."""
    text = f"""
        import sys
        from nanochat import launcher
        from nanochat.cli import run_main
        {settings}
        def main():
            with launcher.Owner() as owner:
                print("owner", flush=True)
                job = owner.start("the job", {argv!r}, ranks={ranks})
                print("pids", *(member.popen.pid for member in job.members), flush=True)
                sys.exit(owner.wait(job))
        run_main(main)
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(text)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def read_until(process: subprocess.Popen, *wanted: str) -> list[str]:
    """Read lines until each of these has begun one of its own; return all of them."""
    lines, left = [], list(wanted)
    while left:
        line = process.stdout.readline()
        assert line, (left, lines)
        lines.append(line.rstrip("\n"))
        found = next((start for start in left if line.startswith(start)), None)
        if found is not None:
            left.remove(found)
    return lines


def pids_in(lines: list[str]) -> list[int]:
    return [int(pid) for line in lines if line.startswith("pids") for pid in line.split()[1:]]


@pytest.fixture(autouse=True)
def from_root(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv(launcher.LINE, raising=False)


def run(argv: list[str], ranks: int = 1) -> launcher.Job:
    with Owner() as owner:
        job = owner.start("the job", argv, ranks=ranks)
        owner.wait(job)
    assert not any(running(member.popen.pid) for member in job.members)
    return job


def test_ranks_know_their_number_and_rank_0_inherits_the_socket_at_which_they_meet(tmp_path):
    job = run(program(f"""
        import socket, pathlib
        rank, port = os.environ['RANK'], int(os.environ['MASTER_PORT'])
        assert os.environ['WORLD_SIZE'] == os.environ['LOCAL_WORLD_SIZE'] == '3' and os.environ['LOCAL_RANK'] == rank
        assert {launcher.LINE!r} not in os.environ  # it is for this process, not for those that it starts
        if rank == '0':
            master = socket.socket(fileno=int(os.environ[{launcher.MASTER!r}]))
            for _ in range(2):
                master.accept()[0].send(b'met')
        else:
            assert socket.create_connection((os.environ['MASTER_ADDR'], port)).recv(3) == b'met'
        pathlib.Path({str(tmp_path)!r}, rank).touch()
    """), ranks=3)
    assert job.code == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_where_one_rank_fails_the_others_end_and_its_error_is_the_last_line(capfd, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE", 1.0)
    began = time.monotonic()
    job = run(program("""
        if os.environ['RANK'] == '1':
            tell_owner(error='Traceback: where\\nOutOfMemoryError: full')
            os._exit(3)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as one that hangs in a collective
        time.sleep(600)
    """), ranks=3)
    err = capfd.readouterr().err.splitlines()
    assert job.code == 3 and time.monotonic() - began < 60
    assert err == ["rank 1: Traceback: where", "OutOfMemoryError: full",
                   "error: rank 1 of 3 failed first: OutOfMemoryError: full"]


def test_an_error_of_all_ranks_is_told_once_and_those_that_follow_from_another_in_short(capfd, tmp_path):
    run(program("tell_owner(error='error: --depth is wrong'); os._exit(1)"), ranks=4)
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 2 and err[0][6:] == ": error: --depth is wrong" and err[1].endswith("first: --depth is "
                                                                                          "wrong")
    run(program(f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        started({str(tmp_path)!r}, 2)
        if os.environ['RANK'] == '0':
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(1)
        tell_owner(error='Traceback: far\\nConnectionError: rank 0 is gone')
        os._exit(1)
    """), ranks=2)
    err = capfd.readouterr().err.splitlines()
    assert err == ["rank 1: ConnectionError: rank 0 is gone",
                   "error: rank 0 of 2 failed first: it was ended by SIGSEGV"]


def test_of_ranks_that_have_all_failed_the_first_is_named(capfd, tmp_path):
    with Owner() as owner:
        job = owner.start("the job", program(f"""
            failed = os.path.join({str(tmp_path)!r}, 'failed')
            while os.environ['RANK'] == '0' and not os.path.exists(failed):
                time.sleep(0.01)
            tell_owner(error='Traceback: ...\\nError of rank ' + os.environ['RANK'])
            open(failed, 'w').close()
            os._exit(1)
        """), ranks=2)
        assert gone([member.popen.pid for member in job.members])  # before the owner looks
        assert owner.wait(job) == 1
    assert capfd.readouterr().err.splitlines() == [
        "rank 1: Traceback: ...", "Error of rank 1", "rank 0: Error of rank 0",
        "error: rank 1 of 2 failed first: Error of rank 1"]


def test_a_rank_that_saves_is_waited_for_though_another_failed(monkeypatch, tmp_path):
    monkeypatch.setattr(launcher, "GRACE", 0.5)
    job = run(program(f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.environ['RANK'] == '1':
            started({str(tmp_path)!r}, 2)
            os._exit(1)
        with saving('step 5'):
            started({str(tmp_path)!r}, 2)
            time.sleep(3)
            open({str(tmp_path / 'saved')!r}, 'w')
        time.sleep(600)
    """), ranks=2)
    assert job.code == 1 and (tmp_path / "saved").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_is_handed_on_once_and_the_save_is_waited_for(number, ranks):
    owner = owner_of(steps(2), ranks, "launcher.GRACE = 1; launcher.REMIND = 0.5")
    lines = read_until(owner, "owner", "pids", *["steps"] * ranks)
    owner.send_signal(number)
    rest = owner.stdout.read().splitlines()
    assert owner.wait(60) == 128 + number
    assert [line for line in rest if line.startswith("sav")] == (
        [f"saving [{int(number)}]"] * ranks + [f"saved [{int(number)}]"] * ranks), rest
    assert sum(f"{number.name}: the job is asked to save and end" in line for line in rest) == 1
    assert any("waiting for the job to save step 7" in line for line in rest)
    assert gone(pids_in(lines), 0)


def test_a_second_ctrl_c_ends_the_job_without_a_save():
    owner = owner_of(steps(600), 2, "launcher.BOUNCE = 0")
    lines = read_until(owner, "owner", "pids", "steps", "steps")
    owner.send_signal(signal.SIGINT)
    read_until(owner, "saving", "saving")
    owner.send_signal(signal.SIGINT)
    assert "saved" not in owner.stdout.read() and owner.wait(60) == 130
    assert gone(pids_in(lines), 0)


def test_an_owner_of_an_owner_hands_on_what_the_ranks_tell_and_hastens_them():
    launch = [sys.executable, "-m", "scripts.launch", "--ranks=2", "tests.launched_steps"]
    owner = owner_of(launch, settings="launcher.REMIND = 0.5; launcher.GRACE = 1; launcher.BOUNCE = 0")
    read_until(owner, "steps", "steps")
    owner.send_signal(signal.SIGINT)
    lines = read_until(owner, "saving", "saving", "waiting for the job to save step 7")
    time.sleep(launcher.BOUNCE)  # the launcher's own, before Ctrl-C counts again
    owner.send_signal(signal.SIGINT)
    rest = owner.stdout.read()
    assert owner.wait(60) == 130 and "saved" not in rest
    assert gone([int(line.split()[1]) for line in lines if line.startswith("saving")], 0)


def test_the_processes_of_an_owner_that_is_killed_save_and_end(tmp_path):
    saved = tmp_path / "saved"
    owner = owner_of(steps(0.5, saved), 2)
    lines = read_until(owner, "owner", "pids", "steps", "steps")
    owner.kill()
    assert gone(pids_in(lines)) and Path(f"{saved}0").exists() and Path(f"{saved}1").exists()
    owner.wait()
    owner.stdout.close()


def test_a_rank_of_torchrun_ends_with_torchrun(tmp_path):
    agent = textwrap.dedent(f"""
        import os, subprocess, sys, time
        os.environ.update(RANK='0', TORCHELASTIC_RUN_ID='1')
        rank = subprocess.Popen({steps(0, tmp_path / 'saved')!r})
        print('pids', rank.pid, flush=True)
        time.sleep(600)
    """)
    agent = subprocess.Popen([sys.executable, "-c", agent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = read_until(agent, "pids", "steps")
    agent.kill()
    assert gone(pids_in(lines)) and (tmp_path / "saved0").exists()
    agent.communicate()


def test_what_a_process_started_ends_with_it(tmp_path):
    run(program(f"""
        import subprocess
        child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
        open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))
    """))
    assert gone([int((tmp_path / "pid").read_text())])


def test_a_process_that_saves_nothing_has_little_time():
    owner = owner_of(program("""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # hangs
        print('hangs', flush=True)
        time.sleep(600)
    """), settings="launcher.GRACE = 0.5")
    lines = read_until(owner, "owner", "pids", "hangs")
    owner.send_signal(signal.SIGINT)
    rest = owner.stdout.read()
    assert owner.wait(60) == 130 and "asked to save" not in rest and gone(pids_in(lines), 0)


def test_a_failure_on_the_way_to_the_end_is_the_exit_code():
    owner = owner_of(program("""
        with stop_signals() as received:
            say('steps')
            while not received: time.sleep(0.01)
            if os.environ['RANK'] == '0':
                tell_owner(error='error: the disk is full')
                os._exit(1)
            time.sleep(600)
    """), 2, "launcher.GRACE = 0.5")
    read_until(owner, "steps", "steps")
    owner.send_signal(signal.SIGTERM)
    rest = owner.stdout.read()
    assert owner.wait(60) == 1 and "rank 0: error: the disk is full" in rest


def test_under_nohup_a_closed_terminal_stops_nothing(monkeypatch):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert launcher.handled_stops() == [signal.SIGINT, signal.SIGTERM]
        with Owner() as owner:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not owner.stopped
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert launcher.handled_stops() == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def test_after_a_signal_nothing_more_is_started():
    with pytest.raises(SystemExit) as ended, Owner() as owner:
        os.kill(os.getpid(), signal.SIGTERM)
        owner.start("the next", program("pass"))
    assert ended.value.code == 143


def test_launch_ends_with_the_code_of_its_script(capfd, monkeypatch):
    from scripts import launch
    with pytest.raises(SystemExit) as ended:
        launch.main(["--ranks=2", "tests.launched_exit", "--", "7"])
    assert ended.value.code == 7
    assert "of 2 failed first: it ended with exit code 7" in capfd.readouterr().err.splitlines()[-1]
