"""Several machines that run a job together: one is killed and returns, the network between them is cut and comes back.

The "machines" are processes on the loopback interface, or in network namespaces of their own."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from nanochat.checkpoint import latest_step
from nanochat.errors import UserError
from nanochat.launcher import Job, Owner
from nanochat.logs import read_log
from scripts.nodes import Elsewhere, Link, Place, persist, place_of
from tests.conftest import ROOT
from tests.helpers import free_port, gone
from tests.test_all_ranks import own_base, weights
from tests.test_training import assert_same

BASE = ["scripts.base_train", "--", "--depth=2", "--max-seq-len=128", "--device-batch-size=2", "--total-batch-size=512",
        "--num-iterations=60", "--eval-every=-1", "--eval-tokens=1000", "--save-every=5", "--sample-every=-1",
        "--device-type=cpu"]


def start_node(node: int, base, port: int, command: list[str], *, address="127.0.0.1", inside=(), warn=30, end=60,
               flags=("--max-restarts=2",)) -> subprocess.Popen:
    """Start scripts.launch as node 0 or 1 of two. inside: what to run it in. Its output comes on one pipe."""
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", "NNODES": "2",
           "NODE_RANK": str(node), "MASTER_ADDR": address, "MASTER_PORT": str(port), "NANOCHAT_HANG_WARN": str(warn),
           "NANOCHAT_HANG_END": str(end)}
    argv = [*inside, sys.executable, "-m", "scripts.launch", "--ranks=1", *flags, *command]
    return subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def read_until(process: subprocess.Popen, *wanted: str) -> str:
    """Read lines until one contains one of these; return all of them."""
    lines = []
    while not lines or not any(text in lines[-1] for text in wanted):
        lines.append(process.stdout.readline())
        assert lines[-1], (wanted, lines)
    return "".join(lines)


def kill_machine(launcher: subprocess.Popen) -> None:
    """Kill a launcher and its ranks at once, as a power cut does."""
    launcher.send_signal(signal.SIGSTOP)  # it must not see the end of its ranks
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True).stdout
    for pid in map(int, listed.split()):
        os.kill(pid, signal.SIGKILL)
    launcher.kill()
    launcher.communicate()
    assert gone(list(map(int, listed.split())))


def end(*processes: subprocess.Popen) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)


def test_the_place_of_a_machine_is_checked():
    assert place_of("", "", "", "") is None and place_of("1", "", "", "") is None
    assert place_of("2", "1", "host", "") == Place(2, 1, "host", 29500)
    for settings, told in ((("2", "", "host", ""), "NODE_RANK is ''"), (("2", "2", "host", ""), "count from 0 to 1"),
                           (("two", "0", "host", ""), "NNODES is 'two'"), (("2", "0", "", ""), "MASTER_ADDR"),
                           (("2", "0", "host", "x"), "MASTER_PORT is 'x'")):
        with pytest.raises(UserError, match=told):
            place_of(*settings)


def test_the_slurm_script_gives_each_task_its_place(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "setup.sh").write_text("echo set up\n")
    (tmp_path / "speedrun.sh").write_text('echo "$NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT $*"\n')
    for name, text in {"scontrol": '[ "$*" = "show hostnames n[3-4]" ] && seq -f n%g 3 99999',
                       "srun": 'shift; for id in 0 1; do SLURM_NODEID=$id "$@"; done'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
           "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[3-4]", "SLURM_JOB_ID": "41007"}
    env.pop("MASTER_PORT", None)
    argv = ["bash", str(ROOT / "dev" / "slurm.sh"), "--dry-run"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["set up", "2 0 n3 21007 --dry-run", "2 1 n3 21007 --dry-run"], done


class Failing:
    """A stand-in for an owner whose jobs fail with these codes at these steps."""

    wait = Owner.wait

    def __init__(self, *ends: tuple[int, int, bool]):
        self.ends, self.stopped, self.whys = list(ends), 0, []

    def start(self) -> Job:
        self.whys.append(os.environ.get("NANOCHAT_RESTARTED", ""))
        code, step, mend = self.ends.pop(0)
        job = Ended("the job", [])
        job.failed, job.at = (code, "it was killed", mend) if code else None, step
        return job


class Ended(Job):
    """A job that has ended at step `at`."""

    step = property(lambda self: self.at)


def test_a_job_is_started_again_while_it_is_of_use(capfd):
    owner = Failing((137, 3, False), (137, 9, False), (0, 12, False))
    assert persist(owner, owner.start, 3).code == 0
    assert owner.whys == ["", "restart 1 of at most 3, at step 3: it was killed",
                          "restart 2 of at most 3, at step 9: it was killed"]
    assert "restart 2 of at most 3: the job failed at step 9 (it was killed). It goes on" in capfd.readouterr().err
    assert "NANOCHAT_RESTARTED" not in os.environ


@pytest.mark.parametrize("end, starts", [((1, 5, True), 1), ((143, 5, False), 1), ((2, -1, False), 1),
                                         ((137, 5, False), 3)])
def test_what_its_user_must_mend_and_what_fails_at_one_step_is_not_started_again(end, starts, capfd):
    owner = Failing(*[end] * 9)
    assert persist(owner, owner.start, 8).code == end[0]
    assert 9 - len(owner.ends) == starts
    assert ("has failed 3 times at step 5" in capfd.readouterr().err) == (starts == 3)


def test_a_machine_with_another_command_is_refused(tmp_path):
    port = free_port()
    first = start_node(0, tmp_path / "0", port, ["tests.launched_exit", "--", "0"])
    second = start_node(1, tmp_path / "1", port, ["tests.launched_exit", "--", "1"])
    out, _ = second.communicate(timeout=120)
    assert second.returncode == 1 and "refuses this machine: it would run other commands than node 0" in out, out
    assert "tests.launched_exit -- 1, not tests.launched_exit -- 0" not in out and "launched_exit 1, not" in out
    second = start_node(1, tmp_path / "1", port, ["tests.launched_exit", "--", "0"])  # the right one now
    assert "node 1 of 2 is here" in first.communicate(timeout=120)[0] and first.returncode == 0
    assert second.communicate(timeout=120) and second.returncode == 0


@pytest.mark.long
def test_a_machine_is_killed_and_returns_and_the_run_ends_as_an_undisturbed_one(tiny, tmp_path):
    """Each machine has a base folder of its own, so that the one that returns needs node 0's checkpoint."""
    bases = [own_base(tiny, tmp_path / str(node)) for node in (0, 1)]
    alone = own_base(tiny, tmp_path / "alone")
    port = free_port()
    nodes = [start_node(node, bases[node], port, BASE) for node in (0, 1)]
    try:
        read_until(nodes[0], "saved ")
        kill_machine(nodes[1])
        out = read_until(nodes[0], "waiting for node 1")
        assert "restart 1 of at most 2: scripts.base_train failed at step " in out, out
        assert "node 1 has closed its connection" in out, out
        nodes[1] = start_node(1, bases[1], port, BASE)
        out, _ = nodes[0].communicate(timeout=240)
        assert nodes[0].returncode == 0 and f"copying {bases[0]}/base_checkpoints/d2 (" in out, out
        assert nodes[1].communicate(timeout=60) and nodes[1].returncode == 0
    finally:
        end(*nodes)
    whys = [row["why"] for row in read_log(bases[0] / "logs" / "base_d2.jsonl") if row["kind"] == "restart"]
    assert len(whys) == 1 and "node 1 has closed its connection" in whys[0]
    copied = latest_step(bases[1] / "base_checkpoints" / "d2")
    assert 0 < copied < 60 and not (bases[1] / "logs").exists()
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(alone), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "scripts.launch", "--ranks=2", *BASE], cwd=ROOT, env=env, check=True,
                   capture_output=True, timeout=240)
    assert_same(weights(bases[0], "base", 60), weights(alone, "base", 60))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("node", [0, 1])
def test_a_signal_on_one_machine_lets_all_save_and_end(tiny, tmp_path, node, number):
    bases, port = [own_base(tiny, tmp_path / str(number)) for number in (0, 1)], free_port()
    nodes = [start_node(number, bases[number], port, [*BASE, "--num-iterations=99999", "--save-every=-1"])
             for number in (0, 1)]
    try:
        read_until(nodes[0], "step 00009/")
        nodes[node].send_signal(number)
        outs = [each.communicate(timeout=120)[0] for each in nodes]
    finally:
        end(*nodes)
    assert nodes[node].returncode == 128 + number, outs
    assert nodes[1 - node].returncode in (130, 143) and "restart" not in "".join(outs), outs
    assert latest_step(bases[0] / "base_checkpoints" / "d2") >= 9


@pytest.fixture(scope="module")
def namespaces():
    """Two network namespaces with a cable between them: their names, and a function that pulls and plugs it."""
    names = [f"nc{os.getpid()}{letter}" for letter in "ab"]

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")

    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        yield names, lambda how: ip("-n", names[1], "link", "set", "cable", how)
    except OSError as error:  # not root, or a container that does not permit it
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_a_node_that_falls_silent_after_a_rank_here_has_failed_is_named_and_not_waited_for(monkeypatch):
    monkeypatch.setenv("NANOCHAT_HANG_WARN", "500")
    monkeypatch.setenv("NANOCHAT_HANG_END", "1000")
    here, there = socket.socketpair()
    link = Link(here)
    elsewhere = Elsewhere({1: link}, "a/1", leads=True)
    own = "rank 0 of 2 failed first: rank 1 hangs: no sign of life for 1 s"
    assert not elsewhere.ended() and elsewhere.better_reason(own) == own  # heard just now
    link.heard -= 700
    assert not elsewhere.ended() and elsewhere.better_reason("out of memory") == "out of memory"
    assert re.fullmatch("node 1 has shown no sign of life for 70\\d s", elsewhere.better_reason(own))
    link.heard -= 700
    assert elsewhere.ended()
    link.results["a/1"] = {"code": 1, "reason": "no memory", "mend": False}
    assert elsewhere.ended() and elsewhere.better_reason(own) == "node 1: no memory"
    link.close()
    there.close()


@pytest.mark.long
def test_a_short_cut_of_the_network_harms_nothing_and_a_long_one_ends_the_job(namespaces, tmp_path):
    names, cable = namespaces
    ended = tmp_path / "ended"
    nodes = [start_node(node, tmp_path / str(node), 29500, ["tests.launched_hang", "--", "until", str(ended)],
                        address="10.77.0.1", inside=["ip", "netns", "exec", names[node]], warn=3, end=15, flags=())
             for node in (0, 1)]
    try:
        read_until(nodes[0], "node 1 of 2 is here: 10.77.0.2")
        read_until(nodes[1], "met")  # the ranks do
        cable("down")
        out = read_until(nodes[0], "warning: node 1 has shown no sign of life")
        assert "it is stopped or dead, or the network is cut" in out
        cable("up")
        read_until(nodes[0], "the other node is back")
        cable("down")
        began = time.monotonic()
        for node in (0, 1):
            out, _ = nodes[node].communicate(timeout=120)
            assert nodes[node].returncode and f"node {1 - node} has shown no sign of life for 1" in out, out
        assert time.monotonic() - began > 10
    finally:
        end(*nodes)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_a_whole_speedrun_on_two_machines(tmp_path, monkeypatch, shared):
    bases = [tmp_path / ("both" if shared else str(node)) for node in (0, 1)]
    for name, value in {"SPEEDRUN_PROFILE": "small", "SPEEDRUN_DEVICE_BATCH": "2", "NNODES": "2",
                        "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    nodes = []
    for node, base in enumerate(bases):
        base.mkdir(exist_ok=True)
        env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "NODE_RANK": str(node), "PYTHONPATH": str(ROOT)}
        nodes.append(subprocess.Popen([sys.executable, "-m", "tests.launched_speedrun", "1"], cwd=tmp_path, env=env,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        out, _ = nodes[0].communicate(timeout=900)
        assert nodes[0].returncode == 0 and "== done in" in out, out
        assert ("the same base folder" in out) == shared
        assert nodes[1].communicate(timeout=60) and nodes[1].returncode == 0
    finally:
        end(*nodes)
    for stage in ("base", "mid", "sft", "rl"):
        log = read_log(bases[0] / "logs" / f"{stage}_d2.jsonl")
        assert {row["world_size"] for row in log if row["kind"] == "model"} == {2}
    assert (bases[1] / "tokenizer").exists() and (bases[1] / "logs").exists() == shared
