"""nanochat/tools/sandbox.py: what a program may not do it cannot do, at each level that this machine reaches, and passing cannot be faked.

Each attack is bounded in itself, so that a sandbox that fails harms nobody.
"""

import gzip
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat.errors import UserError
from nanochat.tools import sandbox
from nanochat.tools.sandbox import LEVELS, Level, best_level, bwrap_arguments, passes, run_python

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(os.name != "posix", reason="no sandbox on Windows")
linux = pytest.mark.skipif(sys.platform != "linux", reason="macOS cannot do this")


@pytest.fixture(params=["limits", "isolated"])
def way(request, monkeypatch):
    """Each level that this machine reaches, in turn: how it is reached."""
    ways = [way for way in LEVELS if LEVELS[way].name.lower() == request.param]
    problems = {way: sandbox._problem(way) for way in ways}
    usable = [way for way in ways if not problems[way]]
    if not usable:
        pytest.skip(f"level {request.param}: {problems}")
    monkeypatch.setattr(sandbox, "_best", lambda: (LEVELS[usable[0]], usable[0], ["a reason"]))
    return usable[0]


@pytest.fixture
def isolated():
    """The best way, skipped where that is below ISOLATED."""
    if best_level() < Level.ISOLATED:
        pytest.skip("this machine reaches the level limits only")


def processes_with(mark):
    """Processes of any user whose command line holds `mark`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                pass
    return found


# ---- ordinary programs

def test_a_program_runs_and_its_output_comes_back(way):
    result = run_python("import sys, math\nprint('é', math.sqrt(16))\nprint('oops', file=sys.stderr)")
    assert (result.ok, result.stdout, result.stderr, result.reason, result.timed_out) == (True, "é 4.0\n", "oops\n", "", False)
    assert result.level == LEVELS[way]


def test_the_standard_library_and_classes_work(way):
    result = run_python("import collections, dataclasses, hashlib, itertools, json, random, re, typing\n"
                        "@dataclasses.dataclass\nclass A:\n    x: int = 3\n"
                        "print(A(), __name__, hashlib.md5(b'x').hexdigest()[:4], json.dumps([1]))\n"
                        "if __name__ == '__main__': print(open('f', 'w').write('abc'), open('f').read())")
    assert result.ok and result.stdout == "A(x=3) __main__ 9dd4 [1]\n3 abc\n", result


@pytest.mark.parametrize("code, reason", [
    ("1/0", "ZeroDivisionError: division by zero"), ("def f(:", "SyntaxError: invalid syntax"), ("import sys; sys.exit(3)", "exit code 3"),
    ("raise SystemExit('so')", "so"), ("import os; os.abort()", "SIGABRT|SIGSEGV"), ("\0", "null bytes"),
    ("def f(): f()\nf()", "RecursionError"), ("x = '\ud800'", ""), ("", ""),
])
def test_the_reason_says_what_went_wrong(code, reason):
    result = run_python(code)
    assert result.ok == (not reason) and not result.timed_out
    assert any(part in result.reason for part in reason.split("|")), result


def test_an_endless_loop_is_stopped(way):
    began = time.monotonic()
    result = run_python("print('begun', flush=True)\nwhile True: pass", timeout=0.7)
    assert result.timed_out and not result.ok and result.reason == "timed out after 0.7 s" and result.stdout == "begun\n"
    assert 0.7 <= time.monotonic() - began < 4
    assert run_python("import time; time.sleep(60)", timeout=0.5).timed_out


def test_signals_that_a_program_ignores_do_not_save_it(way):
    code = ("import signal\nfor s in signal.valid_signals():\n  try: signal.signal(s, signal.SIG_IGN)\n  except OSError: pass\n"
            "while True: pass")
    began = time.monotonic()
    assert run_python(code, timeout=0.5).timed_out and time.monotonic() - began < 4


# ---- bounds

@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output_is_cut_and_ends_the_program(way, stream):
    began = time.monotonic()
    result = run_python(f"import sys\nfor _ in range(300_000): print('x' * 1000, file=sys.{stream})", timeout=10)
    assert not result.ok and result.reason == "wrote more than 262,144 bytes of output" and time.monotonic() - began < 8
    assert len(getattr(result, stream)) == sandbox.OUTPUT


@linux
def test_a_program_cannot_take_much_memory(way):
    code = "taken = []\nfor _ in range(48): taken.append(bytearray(64 << 20))\nprint('took 3 GB')"
    result = run_python(code, memory=300 << 20)
    assert not result.ok and "took" not in result.stdout and "MemoryError" in result.reason, result
    assert run_python("x = bytearray(100 << 20)", memory=300 << 20).ok


@pytest.mark.alone  # looks through the processes of the whole machine
@linux
def test_a_fork_bomb_stays_small_and_nothing_of_it_is_left(way, tmp_path):
    # at most 2**6 processes, each sleeping, if nothing holds it
    code = ("import os, time\nfor _ in range(6):\n  try: os.fork()\n  except OSError: print('refused', flush=True)\n"
            "time.sleep(20.0625)")
    before = set(processes_with("-X\0utf8\0-c"))
    result = run_python(code, timeout=1, processes=8)
    assert result.timed_out and result.stdout.count("refused") > 5, result
    assert set(processes_with("-X\0utf8\0-c")) - before == set()


@pytest.mark.alone  # an ordinary user's other processes count too
@linux
def test_threads_count_as_processes(way):
    result = run_python("import threading, time\nfor n in range(40):\n"
                        "  threading.Thread(target=time.sleep, args=(1,), daemon=True).start()", processes=8)
    assert not result.ok and "can't start new thread" in result.reason
    assert run_python("import threading\nt = threading.Thread(target=print, args=('hi',))\nt.start(); t.join()").stdout == "hi\n"


def test_files_are_bounded(way):
    result = run_python("f = open('big', 'wb', buffering=0)\nfor _ in range(64): f.write(bytes(1 << 20))\nprint('64 MB')")
    assert not result.ok and "64 MB" not in result.stdout
    result = run_python("files = [open('/dev/null') for _ in range(100)]")
    assert not result.ok and "Too many open files" in result.reason


@linux
def test_limits_cannot_be_raised_again(way):
    code = ("import resource\nfor name in ('AS', 'NPROC', 'CPU', 'FSIZE', 'NOFILE', 'CORE'):\n"
            "  kind = getattr(resource, 'RLIMIT_' + name)\n"
            "  try: resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)); print('raised', name)\n"
            "  except (ValueError, OSError): pass")
    result = run_python(code)
    assert result.ok and result.stdout == "", result


# ---- nothing left, nobody hurt

LEAVE = """
import os, sys, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', 'import time; time.sleep(20)', '{mark}'])
        os._exit(0)
time.sleep(0.3)
print('left')
"""


@linux
@pytest.mark.parametrize("then", ["", "\nwhile True: pass", "\nos._exit(5)"])
def test_children_that_left_their_session_are_killed_too(way, then):
    mark = f"mark{os.getpid()}{time.monotonic_ns()}"
    result = run_python(LEAVE.format(mark=mark) + then, timeout=1 if "while" in then else 5)
    assert processes_with(mark) == []
    assert "left" in result.stdout or then == "\nos._exit(5)" or result.timed_out, result  # os._exit flushes nothing


@linux
@pytest.mark.parametrize("whom", ["the caller", "the launcher"])
def test_where_its_keeper_is_killed_it_dies_too(way, whom, tmp_path):
    mark = f"mark{os.getpid()}{time.monotonic_ns()}"
    program = f"import os, sys\nos.execv(sys.executable, [sys.executable, '-I', '-S', '-c', 'import time; time.sleep(30)', '{mark}'])"
    code = ("from nanochat.tools import sandbox\n"
            f"print(sandbox._Run({way!r}, {program!r}, None, 20.0, 512 << 20, 2).result().reason)")
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"TMPDIR": str(tmp_path)})
    try:
        wait_until(lambda: processes_with(f"\0{mark}\0"))  # as an argument of its own: the program, not the caller
        launcher = Path(f"/proc/{caller.pid}/task/{caller.pid}/children").read_text().split()[0]
        os.kill(caller.pid if whom == "the caller" else int(launcher), 9)
        caller.wait(10)
        wait_until(lambda: not processes_with(f"\0{mark}\0"))
        assert whom == "the caller" or caller.stdout.read() == "the sandbox was ended from outside\n"
    finally:
        caller.kill()
        caller.wait()
        caller.stdout.close()


def wait_until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@linux
def test_the_parent_and_others_cannot_be_killed(way):
    bystander = subprocess.Popen(["sleep", "20"], **({"user": 65533} if os.getuid() == 0 else {}))
    code = ("import os, signal\nrefused = 0\n"
            f"for pid in (os.getppid(), {os.getpid()}, {bystander.pid}):\n"
            "  try: pid > 1 and os.kill(pid, signal.SIGKILL); refused += pid <= 1\n"
            "  except OSError: refused += 1\nprint(refused)")
    try:
        result = run_python(code)
        assert result.ok and result.stdout == "3\n", result
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_its_folder_is_gone_afterwards(way, monkeypatch, tmp_path):
    folder, outside = Path("/tmp") / f"boxes{os.getpid()}{time.monotonic_ns()}", tmp_path / "outside"
    folder.mkdir()
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(folder))
    try:
        outside.mkdir()
        outside.chmod(0o755)
        (outside / "kept").write_text("x")
        result = run_python("import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('x')\nos.chmod('a/b', 0)\nos.chmod('a', 0)\n"
                            f"os.symlink({str(outside)!r}, 'link')\n"
                            "print(os.getcwd() == os.environ['HOME'] == os.environ['TMPDIR'], sorted(os.listdir('.')))")
        assert result.ok and result.stdout == "True ['a', 'link']\n", result
        assert list(folder.iterdir()) == [] and (outside / "kept").read_text() == "x" and outside.stat().st_mode & 0o777 == 0o755
    finally:
        folder.rmdir()


def test_what_a_killed_caller_left_is_swept_later(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    for name, age in ((f"{gone.pid}-old", 4000), (f"{gone.pid}-young", 10), (f"{os.getpid()}-alive", 4000), ("mine-x", 4000)):
        box = tmp_path / f"nanochat-sandbox-{name}"
        box.mkdir()
        (box / "x").write_text("x")
        os.utime(box, (time.time() - age,) * 2)
    sandbox._sweep(tmp_path)
    assert sorted(path.name.removeprefix("nanochat-sandbox-") for path in tmp_path.glob("nanochat*")) == sorted(
        [f"{gone.pid}-young", f"{os.getpid()}-alive", "mine-x"])


def test_the_environment_does_not_come_along(way, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    monkeypatch.setenv("PYTHONSTARTUP", "/tmp/x")
    result = run_python("import os, sys\nprint(sorted(os.environ), sys.flags.isolated, sys.flags.no_site, sys.argv)")
    assert "HF_TOKEN" not in result.stdout and result.stdout.endswith("1 1 ['program.py']\n")
    assert set(eval(result.stdout.rpartition(" 1 1")[0])) <= {"HOME", "TMPDIR", "PATH", "LC_CTYPE", "PWD", "__CF_USER_TEXT_ENCODING"}


@linux
def test_the_parents_memory_and_environment_cannot_be_read(way, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2")  # children of this process get it
    bystander = subprocess.Popen(["sleep", "20"])
    try:
        result = run_python(f"for pid in ({bystander.pid}, 'self'):\n"
                            "  try: print(open(f'/proc/{pid}/environ').read())\n  except OSError: print('refused')")
        if os.getuid() == 0 or LEVELS[way] == Level.ISOLATED:
            assert result.ok and "hunter2" not in result.stdout and "refused" in result.stdout
    finally:
        bystander.kill()
        bystander.wait()


def test_files_outside_can_be_neither_read_nor_written(isolated):
    folder = Path("/tmp") / f"outside{os.getpid()}{time.monotonic_ns()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    secret = folder / "secret"
    secret.write_text("hunter2")
    secret.chmod(0o666)
    try:
        code = (f"import os\nfor path in ({str(secret)!r}, '/etc/passwd', {str(ROOT / 'pyproject.toml')!r}, '/proc/1/environ'):\n"
                "  try: print(open(path).read())\n  except OSError as e: print('refused')\n"
                f"for path in ({str(secret)!r}, {str(folder / 'new')!r}, '/usr/x', '/x', os.__file__, '/bin/x', '/dev/x'):\n"
                "  try: open(path, 'w').write('x'); print('wrote', path)\n  except OSError: print('refused')")
        result = run_python(code)
        assert result.ok and result.stdout == "refused\n" * 11, result
        assert result.level == Level.ISOLATED
        assert secret.read_text() == "hunter2" and [path.name for path in folder.iterdir()] == ["secret"]
    finally:
        secret.unlink()
        folder.rmdir()


def test_what_a_program_sees_is_read_only_also_where_everyone_may_write(isolated, monkeypatch):
    folder = Path("/tmp") / f"open{os.getpid()}{time.monotonic_ns()}"
    folder.mkdir()
    folder.chmod(0o777)
    binds = sandbox._binds
    monkeypatch.setattr(sandbox, "_binds", lambda python: [*binds(python), str(folder)])
    try:
        result = run_python(f"import os\nprint(os.listdir({str(folder)!r}))\ntry: open({str(folder / 'x')!r}, 'w')\n"
                            "except OSError as error: print(error.strerror)")
        assert result.stdout == "[]\nRead-only file system\n" and list(folder.iterdir()) == [], result
    finally:
        folder.rmdir()


@linux
def test_no_network(way):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):  # from outside it works
            server.accept()[0].close()
        result = run_python(f"import socket\ntry: socket.create_connection(('127.0.0.1', {port}), 1); print('connected')\n"
                            "except OSError: print('refused')\n"
                            f"try: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port})); print('sent')\n"
                            "except OSError: print('refused')")
        assert result.ok and result.stdout.splitlines()[0] == "refused" and "sent" not in result.stdout or LEVELS[way] == Level.ISOLATED
        with pytest.raises(TimeoutError):
            server.accept()


@linux
def test_no_privileges_are_left(way):
    code = ("import os\nprint(os.getuid() != 0, os.geteuid() != 0)\n"
            "for call in (lambda: os.setuid(0), lambda: os.chroot('/'), lambda: os.setgroups([0]), lambda: os.nice(-5)):\n"
            "  try: call(); print('did it')\n  except OSError: print('refused')\n"
            "import ctypes\nlibc = ctypes.CDLL(None)\n"
            "print(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None), libc.umount2(b'/tmp', 2))")
    result = run_python(code)
    assert result.ok and result.stdout == "True True\n" + "refused\n" * 4 + "-1 -1\n", result


def test_no_new_user_namespaces_inside(isolated):
    result = run_python("import ctypes\nlibc = ctypes.CDLL(None)\nprint(libc.unshare(0x10000000))")
    assert result.ok and result.stdout == "-1\n", result


# ---- passing

ADD = "def add(a, b):\n    return a + b\n"
CHECK = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\ncheck(add)"


def test_a_right_program_passes_and_a_wrong_one_does_not(way):
    right, wrong = passes(ADD, CHECK), passes(ADD.replace("+", "-"), CHECK)
    assert (right.ok, right.reason, right.level) == (True, "", LEVELS[way])
    assert (wrong.ok, wrong.reason) == (False, "in the checks: AssertionError")
    assert passes(ADD + "print('hello')", CHECK).stdout == "hello\n"


@pytest.mark.parametrize("program, reason", [
    ("1/0", "in the program: ZeroDivisionError: division by zero"), ("def add(:", "in the program: SyntaxError"),
    ("x = 1", "in the checks: NameError: name 'add' is not defined"), ("def add(a, b): return undefined", "in the checks: NameError"),
    ("while True: pass", "timed out after 0.5 s"), ("def add(a, b):\n    while True: pass", "timed out after 0.5 s"),
    ("import time\ntime.sleep(30)", "timed out"), ("add = lambda a, b: add(a, b)", "in the checks: RecursionError"),
    ("print('x' * 10_000_000)", "of output"), ("raise KeyboardInterrupt", "in the program: KeyboardInterrupt"),
])
def test_the_reason_says_where_it_failed(program, reason):
    result = passes(program, CHECK, timeout=0.5 if "timed" in reason else 5)
    assert not result.ok and reason in result.reason, result
    assert result.timed_out == ("timed out" in reason)


FAKES = {
    "sys.exit": "import sys\nsys.exit(0)", "os._exit": "import os\nos._exit(0)", "SystemExit": "raise SystemExit",
    "exit inside": "import sys\ndef add(a, b): sys.exit(0)", "os._exit inside": "import os\ndef add(a, b): os._exit(0)",
    "print": "for n in range(100): print('12', 'ok', 'passed', n)\ndef add(a, b): pass",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): print('ok')",
    "excepthook": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\nsys.__excepthook__ = sys.excepthook\ndef add(a, b): pass",
    "AssertionError": "import builtins\nclass E(BaseException): pass\nbuiltins.AssertionError = AssertionError = E\ndef add(a, b): pass",
    "exec": "import builtins\nbuiltins.exec = lambda *a: None\nbuiltins.compile = lambda *a, **k: ''\ndef add(a, b): pass",
    "check": "def check(candidate): pass\ndef add(a, b): pass",
    "close": "import os\nos.close(1); os.close(2)\ndef add(a, b): pass",
    "closerange": "import os\nos.closerange(0, 64)\ndef add(a, b): pass",
    "os.write": "import os\nos.write = lambda fd, data: len(data)\nos.read = lambda fd, n: b''\ndef add(a, b): pass",
    "trace": "import sys, os\ndef t(frame, event, arg):\n    if 'check' in frame.f_code.co_name: os._exit(0)\n    return t\n"
             "sys.settrace(t); sys.setprofile(t)\ndef add(a, b): pass",
    "timer": "import signal, os\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\n"
             "signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)\ndef add(a, b): pass",
    "all pipes": "import os\nfor fd in range(3, 64):\n  for text in (b'1', b'2', b'12', b'ok'):\n"
                 "    try: os.write(fd, text)\n    except OSError: pass\ndef add(a, b): pass",
    "optimised": "import sys, os\nos.execv(sys.executable, [sys.executable, '-O', '-c', 'print(1)'])",
    "fork": "import os\ntry:\n  if os.fork() == 0: os._exit(0)\nexcept OSError: pass\ndef add(a, b): pass",
    "thread": "import threading, os, time\ntry: threading.Thread(target=lambda: [time.sleep(0.05), os._exit(0)]).start()\n"
              "except RuntimeError: pass\ndef add(a, b): pass",
    "abs": "abs = len = all = any = isinstance = round = sorted = lambda *a, **k: True\n"
           "import builtins\nbuiltins.abs = builtins.all = abs\ndef add(a, b): pass",
    "frames": """
import sys, os
def add(a, b):
    frame, found = sys._getframe(), []
    while frame:
        for place in (frame.f_locals, frame.f_globals):
            for value in list(place.values()):
                if isinstance(value, (str, bytes)) and len(value) in (16, 32, 64):
                    found.append(value if isinstance(value, bytes) else value.encode())
        frame = frame.f_back
    for value in found:
        for fd in range(64):
            try: os.write(fd, value)
            except OSError: pass
""",
    "own files": """
import sys, os, glob
def add(a, b):
    texts = []
    for path in [__file__, 'checks.py', *glob.glob('*'), *glob.glob('/proc/self/cmdline'), *glob.glob('/proc/self/fd/*')]:
        try:
            if 'fd' not in path: texts.append(open(path, 'rb').read())
        except OSError: pass
    for text in [*texts, *map(str.encode, sys.argv), *map(str.encode, os.environ.values())]:
        print(text)
""",
    "objects": """
import gc, os
def add(a, b):
    for thing in gc.get_objects():
        if isinstance(thing, (list, tuple)):
            for value in thing:
                if isinstance(value, bytes) and len(value) == 32: print(value)
""",
}


@pytest.mark.parametrize("fake", FAKES)
def test_passing_cannot_be_faked(fake):
    checks = CHECK if fake != "abs" else "assert abs(-1) == 1 and not all([0]) and len('ab') == 2\n" + CHECK
    result = passes(FAKES[fake], checks, timeout=3)
    assert not result.ok and result.reason, result


def test_what_a_program_breaks_does_not_fail_it_where_it_is_right():
    assert passes("import sys, builtins\nsys.settrace(lambda *a: None)\nbuiltins.print = None\nsum = max = None\n" + ADD,
                  "assert sum([1]) == max(1, 0) == 1\n" + CHECK).ok


@linux
def test_a_program_that_is_checked_starts_no_process_and_no_thread(way):
    program = ("import os, threading\nstarted = []\nfor start in (os.fork, threading.Thread(target=print).start):\n"
               "  try: start(); started.append(start)\n  except (OSError, RuntimeError): pass")
    assert passes(program, "assert started == []").ok


def test_what_a_program_set_to_run_by_itself_does_not_run_in_the_checks():
    program = ("import gc, signal, sys\nseen = []\ndef f(): return [[] for _ in range(3000)]\n"
               "sys.setprofile(lambda *a: seen.append('profile'))\nsys.settrace(lambda *a: seen.append('trace'))\n"
               "gc.callbacks.append(lambda *a: seen.append('gc'))\nsignal.signal(signal.SIGALRM, lambda *a: seen.append('timer'))\n"
               "signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)")
    checks = "seen.clear()\nimport time\nend = time.monotonic() + 0.1\nwhile time.monotonic() < end: f()\nassert seen == [], seen[0]"
    result = passes(program, checks)
    assert result.ok, result


def test_helpers_of_the_program_are_seen_by_the_checks():
    assert passes("import math\ndef poly(x): return x + 1\ndef f(x): return -1\n", "assert poly(f(0)) == 0 and math.pi > 3").ok


def test_each_run_has_another_secret():
    runs = [sandbox._Run("limits", "", "", 1.0, 1, 0) for _ in range(8)]
    assert len({run.secret for run in runs}) == 8 and all(len(run.secret) == 32 for run in runs)


def test_many_at_once_do_not_disturb_each_other(way):
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda n: run_python(f"open('x', 'w').write('{n}')\nprint(open('x').read())", timeout=20), range(18)))
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(18)]


def test_long_programs_come_through(way):
    assert run_python(f"x = {'a' * 2_000_000!r}\nprint(len(x))").stdout == "2000000\n"
    assert passes(f"x = {'a' * 500_000!r}", f"assert x == {'a' * 500_000!r}").ok


@pytest.mark.parametrize("every", [14, pytest.param(1, marks=pytest.mark.slow)])
def test_the_reference_solutions_of_humaneval_pass_and_empty_ones_do_not(shared, every):
    path = shared / "data" / "humaneval" / "HumanEval.jsonl.gz"
    if not path.exists():
        pytest.skip("no HumanEval here")
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file][::every]
    for row in rows:
        checks = f"{row['test']}\ncheck({row['entry_point']})\n"
        right, empty = passes(row["prompt"] + row["canonical_solution"], checks), passes(row["prompt"] + "    pass\n", checks)
        assert right.ok and not empty.ok, (row["task_id"], right, empty)


# ---- levels

def test_a_run_below_the_level_asked_for_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox, "_best", lambda: (Level.LIMITS, "limits", ["namespaces: not allowed here"]))
    monkeypatch.setenv("NANOCHAT_SANDBOX", "isolated")
    with pytest.raises(UserError, match="namespaces: not allowed here.*NANOCHAT_SANDBOX=limits"):
        run_python("print(1)")
    monkeypatch.delenv("NANOCHAT_SANDBOX")
    with pytest.raises(UserError, match="isolated is asked for"):
        passes("", "", level_needed=Level.ISOLATED)
    assert run_python("print(1)").level == Level.LIMITS
    monkeypatch.setenv("NANOCHAT_SANDBOX", "off")
    with pytest.raises(UserError, match="limits or isolated, not 'off'"):
        run_python("print(1)")


def test_where_nothing_confines_nothing_runs(monkeypatch):
    monkeypatch.setattr(sandbox, "_problem", lambda way: "no")
    sandbox._best.cache_clear()
    try:
        with pytest.raises(UserError, match="cannot be confined on this machine"):
            run_python("print(1)")
    finally:
        sandbox._best.cache_clear()


def test_a_sandbox_that_cannot_be_set_up_says_so(monkeypatch):
    if sandbox._problem("namespaces"):
        pytest.skip("no namespaces here")
    monkeypatch.setattr(sandbox, "_binds", lambda python: ["/usr", "/dev/zero/x"])
    assert sandbox._problem("namespaces").startswith("the sandbox (namespaces) failed: ")


def test_bubblewrap_is_called_with_nothing_shared_and_all_read_only():
    command = bwrap_arguments("/usr/bin/bwrap", ["/usr", "/dev/null", "/lib" if Path("/lib").is_symlink() else "/usr/lib"])
    assert command[0] == "/usr/bin/bwrap" and command[-1] == "--"
    assert {"--unshare-all", "--disable-userns", "--die-with-parent", "--new-session"} <= set(command) and "--bind" not in command
    assert command[command.index("--remount-ro") + 1] == "/dev" and command[command.index("--size") + 2] == "--tmpfs"
    at = command.index("--ro-bind")
    assert command[at + 1:at + 3] == ["/usr", "/usr"] and "--share-net" not in command
    assert command[command.index("--tmpfs") + 1] == command[command.index("--chdir") + 1] == "/tmp"


@linux
def test_it_holds_for_an_ordinary_user_too(tmp_path):
    if os.getuid() != 0:
        pytest.skip("we are one")
    code = f"""
import sys, json
sys.path.insert(0, {str(ROOT)!r})
from nanochat.tools import sandbox as s
out = {{}}
for way in s.LEVELS:
    if problem := s._problem(way):
        out[way] = problem
        continue
    def run(code, checks=None, processes=4):
        r = s._Run(way, code, checks, 2.0, 400 << 20, processes).result()
        return [r.ok, r.stdout[:300], r.reason]
    out[way] = {{
        "plain": run("print(6 * 7)"), "passes": run("x = 1", "assert x == 1"), "fails": run("x = 1", "assert x == 2"),
        "parent": run("import os\\nme = os.getppid()\\ntry: me > 1 and os.kill(me, 9); print(me < 2)\\nexcept OSError: print(True)"),
        "forks": run("import os, time\\nfor _ in range(5):\\n  try: os.fork()\\n  except OSError: print('refused', flush=True)\\n"
                     "time.sleep(.3)"),
        "leave": run({LEAVE.format(mark="ordinary-left")!r}),
        "memory": run("x = [bytearray(64 << 20) for _ in range(30)]"),
        "net": run("import socket\\ntry: socket.create_connection(('127.0.0.1', 1), 1)\\nexcept OSError as e: print(type(e).__name__)"),
    }}
print(json.dumps(out))
"""
    python = sandbox._interpreter("limits")
    if not os.access(python, os.X_OK) or sandbox._problem("limits"):
        pytest.skip("no Python that other users may run")
    done = subprocess.run([python, "-c", code], user=65532, group=65532, extra_groups=[], cwd="/", env={"PATH": "/usr/bin:/bin"},
                          capture_output=True, text=True, timeout=100)
    if "ModuleNotFoundError" in done.stderr or "PermissionError" in done.stderr:
        pytest.skip("other users cannot read this checkout")
    found = json.loads(done.stdout)
    assert isinstance(found["limits"], dict), found["limits"]
    for way, results in found.items():
        if isinstance(results, str):
            continue
        assert results["plain"] == [True, "42\n", ""] and results["passes"][0] and not results["fails"][0], (way, results)
        assert results["parent"][1] == "True\n" and "refused" in results["forks"][1], (way, results)
        assert "MemoryError" in results["memory"][2] and "Error" in results["net"][1], (way, results)
    assert processes_with("ordinary-left") == []


@pytest.mark.alone  # measures time
def test_a_trivial_program_takes_a_fraction_of_a_second(way):
    times = []
    for _ in range(5):
        began = time.perf_counter()
        assert passes(ADD, CHECK).ok
        times.append(time.perf_counter() - began)
    assert min(times) < 0.5, times
