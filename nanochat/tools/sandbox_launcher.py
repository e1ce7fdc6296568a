"""Start one confined program for sandbox.py, wait for it, and leave no process behind. Standard library only.

sandbox.py runs this file by its path in a separate interpreter, with a JSON description as the only argument. Nothing
imports it. When its stdin closes, because sandbox.py closed it or died, it kills everything. It writes lines of JSON
about the outcome to the report pipe, which no confined process has.

    method "namespaces"   own user, process, network, IPC and mount namespaces; a read-only root with the interpreter
    method "bubblewrap"   the same through bwrap, for systems that allow only that program to create namespaces
    method "limits"       resource limits; on Linux (x86-64, ARM64) seccomp refuses signals and sockets

In all of them, root first changes to an unused user id: process limits do not apply to root, and a process of another
user id cannot signal this one.
"""

import json
import os
import re
import select
import signal
import struct
import sys
import time

NOBODY = 65534
LINUX = sys.platform == "linux"

# Runs in the confined interpreter. It binds the functions it needs to local names before the program runs, so that the
# program cannot replace them. It reads each message only after the phase before it, so that nothing can be found early.
# Arguments: file descriptor to read, file descriptor to write, whether there are checks, limits.
HARNESS = r'''
def run():
    import builtins, gc, os, resource, signal, sys, types
    fd_in, fd_out, checked = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1"
    for limit in sys.argv[4:]:
        try:
            name, value = limit.split("=")
            kind, value = getattr(resource, name), int(value)
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        except (AttributeError, ValueError, OSError):
            if sys.platform == "linux":
                raise
    read, write, execute, compiled, size, number, joined = os.read, os.write, exec, compile, len, int, b"".join
    settrace, setprofile, frames, show = sys.settrace, sys.setprofile, sys._current_frames, sys.__excepthook__
    leave, disable, callbacks = os._exit, gc.disable, gc.callbacks
    getsignal, setsignal, setitimer = signal.getsignal, signal.signal, signal.setitimer
    timers, default = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF), signal.SIG_DFL
    signals, callable_ = sorted(signal.valid_signals()), callable
    flush = sys.stdout.flush
    monitoring = getattr(sys, "monitoring", None)
    set_events, get_tool = (monitoring.set_events, monitoring.get_tool) if monitoring else (None, None)
    own, Exit, Failure, Any = dict(builtins.__dict__), SystemExit, RuntimeError, BaseException

    def exactly(count):
        parts = []
        while count:
            part = read(fd_in, count)
            if not part:
                leave(1)
            parts.append(part)
            count -= size(part)
        return joined(parts)

    def take():
        return exactly(number(exactly(8), 16))

    def calm():  # remove all hooks through which code of the program could still run
        settrace(None)
        setprofile(None)
        disable()
        callbacks.clear()
        for timer in timers:
            setitimer(timer, 0)
        for one in signals:
            if callable_(getsignal(one)):
                setsignal(one, default)
        if monitoring:
            for tool in (0, 1, 2, 3, 4, 5):
                if get_tool(tool) is not None:
                    set_events(tool, 0)
        if size(frames()) > 1:
            raise Failure("a thread of the program is still running")

    module = types.ModuleType("__main__")
    names = module.__dict__
    names.update(__file__="program.py", __builtins__=builtins)
    sys.modules["__main__"], sys.argv = module, ["program.py"]
    try:
        execute(compiled(take(), "program.py", "exec", dont_inherit=True, optimize=0), names)
        if checked:
            calm()
            write(fd_out, b"1")
            # the checks get Python's built-in functions, even if the program replaced them
            view = {name: value for name, value in names.items() if name not in own or name[:2] == "__"}
            view["__builtins__"] = own
            execute(compiled(take(), "checks.py", "exec", dont_inherit=True, optimize=0), view)
            try:
                flush()
            except Any:  # the program closed or broke stdout
                pass
            calm()
            write(fd_out, b"2")
            write(fd_out, take())
            leave(0)
    except Exit:
        raise
    except Any as error:
        show(type(error), error, error.__traceback__.tb_next)
        raise Exit(1) from None
run()
'''

# System calls that the method "limits" refuses on Linux: signals to other processes of the same user and access to
# their memory (kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, ptrace, process_vm_readv, process_vm_writev,
# pidfd_send_signal), and sockets (socket, io_uring_setup). Architecture and numbers from the kernel's tables.
REFUSED = {"x86_64": (0xC000003E, (62, 200, 234, 129, 297, 101, 310, 311, 424, 41, 425)),
           "aarch64": (0xC00000B7, (129, 130, 131, 138, 240, 117, 270, 271, 424, 198, 425))}
STARTS = {"x86_64": (56, 57, 58, 435), "aarch64": (220, 435)}  # clone, fork, vfork, clone3

# constants of the kernel's headers
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE, RELATIME = 1, 2, 4, 32, 4096, 16384, 1 << 18, 1 << 21
PDEATHSIG, DUMPABLE, SECCOMP, SUBREAPER, NO_NEW_PRIVS = 1, 4, 22, 36, 38
MOUNT_SETATTR, AT_RECURSIVE = 442, 0x8000


class Libc:
    """Calls of the C library that Python has no function for. Each raises OSError if it fails."""

    def __init__(self):
        import ctypes
        self.ctypes, self.lib = ctypes, ctypes.CDLL(None, use_errno=True)

    def call(self, name, *arguments):
        arguments = [os.fsencode(a) if isinstance(a, str) else self.ctypes.c_ulong(a) if isinstance(a, int) else a
                     for a in arguments]
        if getattr(self.lib, name)(*arguments) < 0:
            number = self.ctypes.get_errno()
            raise OSError(number, f"{name}: {os.strerror(number)}")

    def prctl(self, option, value):
        self.call("prctl", option, value, 0, 0, 0)

    def seccomp(self, alone):
        """Refuse the calls in REFUSED from now on, and with `alone` new processes too.

        Does nothing on other processors, or on kernels without seccomp.
        """
        processor = os.uname().machine
        if processor not in REFUSED:
            return
        arch, calls = REFUSED[processor]
        calls += STARTS[processor] if alone else ()
        # load the architecture: kill if another one; load the number: kill if x32; EPERM if refused; else allow
        kill = (0x06, 0, 0, 0x80000000)
        code = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), kill, (0x20, 0, 0, 0), (0x35, 0, 1, 0x40000000), kill]
        code += [(0x15, len(calls) - i, 0, number) for i, number in enumerate(calls)]
        code += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001)]
        filters = self.ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
        program = self.ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), self.ctypes.addressof(filters)))
        try:
            self.call("prctl", SECCOMP, 2, self.ctypes.addressof(program), 0, 0)
        except OSError:
            pass

    def read_only(self, path):
        """Make a mount and all mounts below it read-only."""
        attributes = self.ctypes.create_string_buffer(struct.pack("QQQQ", 1 | 2, 0, 0, 0))  # read-only, no set-user-id
        try:
            self.call("syscall", MOUNT_SETATTR, (1 << 64) - 100, path, AT_RECURSIVE, attributes, 32)
        except OSError:  # before Linux 5.12: only this mount, with the flags it must keep
            kept = os.statvfs(path).f_flag
            flags = kept & (2 | 4 | 8 | 1024 | 2048) | (RELATIME if kept & 4096 else 0)
            self.call("mount", None, path, None, BIND | REMOUNT | RDONLY | NOSUID | flags, None)


def free_uid(low=False):
    """Return a user id that no process has; with `low`, one below 65536 for containers that map no others.

    The low range is the one that systemd reserves for dynamic users.
    """
    uid = 61184 + os.getpid() % 4336 if low else 2_000_000_000 + os.getpid()
    while low and any(entry.isdigit() and _owner(entry) == uid for entry in os.listdir("/proc")):
        uid = 61184 + (uid + 1 - 61184) % 4336
    return uid


def _owner(pid):
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def drop(uid):
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def can_become(uid):
    """Return whether this system lets root change to `uid`."""
    if (pid := os.fork()) == 0:
        try:
            drop(uid)
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


class Launcher:
    """Starts the program, waits until it ends or stdin closes, and kills all its processes."""

    def __init__(self, spec):
        self.spec, self.child, self.uid = spec, None, None
        if os.getuid() == 0:
            self.uid = next((uid for uid in (free_uid(), free_uid(low=True)) if can_become(uid)), None)
        self.root = self.uid is not None  # false also for a root that may not change its id, as in some containers
        self.libc = Libc() if LINUX else None
        self.report_to = spec["report"]
        os.set_inheritable(self.report_to, False)

    def report(self, **values):
        os.write(self.report_to, json.dumps(values).encode() + b"\n")

    def run(self):
        if LINUX:
            self.libc.prctl(SUBREAPER, 1)  # orphans of the program become our children
        stdin = 0
        wakeup_read, wakeup_write = os.pipe()
        os.set_blocking(wakeup_write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup_write)
        try:
            (self.start_namespaces if self.spec["method"] == "namespaces" else self.start_plain)()
        except OSError as error:
            self.report(failed=str(error))
            return
        end, status = time.monotonic() + self.spec["timeout"], None
        while status is None and (left := end - time.monotonic()) > 0:
            ready = select.select([stdin, wakeup_read], [], [], left)[0]
            if stdin in ready:
                break
            if wakeup_read in ready:
                os.read(wakeup_read, 4096)
                pid, found = os.waitpid(self.child, os.WNOHANG)
                status = found if pid else None
        timed_out = status is None and time.monotonic() >= end
        self.kill_all(reaped=status is not None)
        self.report(exit=None if status is None else os.waitstatus_to_exitcode(status), timed_out=timed_out)

    # ---- start

    def command(self, limits):
        """Return the command line of the confined interpreter."""
        spec = self.spec
        return [*spec["python"], "-c", HARNESS, *map(str, spec["channel"]), "1" if spec["checked"] else "0",
                *(f"{name}={value}" for name, value in limits.items())]

    def limits(self):
        """Return the resource limits by name.

        The kernel counts all processes of the user id against RLIMIT_NPROC; since Linux 5.14, in a user namespace only
        those of the namespace.
        """
        limits = dict(self.spec["limits"])
        processes = limits.pop("processes")
        limits["RLIMIT_NPROC"] = 0
        if processes and LINUX:  # macOS cannot find children that left the session, so there the program may have none
            own = {"limits": 1, "namespaces": 2 if self.root else 3, "bubblewrap": 3}[self.spec["method"]]
            new = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (5, 14)
            alone = self.root or new and self.spec["method"] != "limits"
            limits["RLIMIT_NPROC"] = processes + own + (0 if alone else self.users_tasks())
        return limits

    def users_tasks(self):
        """Return the number of threads of all processes of our user id."""
        count = 0
        for entry in os.listdir("/proc"):
            if entry.isdigit() and _owner(entry) == os.getuid():
                try:
                    count += len(os.listdir(f"/proc/{entry}/task"))
                except OSError:
                    pass
        return count

    def execute(self, command, folder):
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.execve(command[0], command, {"HOME": folder, "TMPDIR": folder, "PATH": "/usr/local/bin:/usr/bin:/bin"})

    def start_plain(self):
        """Start the program with limits alone, or through bwrap, in a process that is not root."""
        spec = self.spec
        wrapped = spec["method"] == "bubblewrap"
        command = [*spec["wrapper"], *self.command(self.limits())]
        if self.root:
            os.chown(spec["box"], self.uid, self.uid)
        self.child = os.fork()
        if self.child:
            return
        try:
            os.setsid()
            os.chdir(spec["box"])
            if self.root:
                drop(self.uid)
            if LINUX:
                self.libc.prctl(NO_NEW_PRIVS, 1)
                self.libc.prctl(PDEATHSIG, signal.SIGKILL)
                if not wrapped:
                    # process limits do not apply to root; a root that cannot change its id may start no process
                    self.libc.seccomp(alone=not spec["limits"]["processes"] or os.getuid() == 0)
            self.execute(command, "/tmp" if wrapped else spec["box"])
        except BaseException as error:
            self.report(failed=f"{error}")
        os._exit(127)

    def start_namespaces(self):
        """Start the program under the first process of a new PID namespace. When that ends, the kernel kills all."""
        kinds = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
        user, group, mapped = os.getuid(), os.getgid(), True
        mapper, go = self._mapper() if self.root else (None, None)  # go: a pipe that tells the mapper whether to map
        try:
            self.libc.call("unshare", NEWUSER | kinds)
        except OSError:
            if not self.root:
                raise
            mapped = False
            self.libc.call("unshare", kinds)
        if self.root:
            os.write(go, b"1" if mapped else b"0")
            if os.waitpid(mapper, 0)[1] != 0:
                raise OSError("cannot write the map of user ids")
        else:
            maps = {"setgroups": "deny", "uid_map": f"{NOBODY} {user} 1", "gid_map": f"{NOBODY} {group} 1"}
            for name, text in maps.items():
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        limits = self.limits()
        self.child = os.fork()
        if self.child:
            return
        try:
            if mapped:
                try:
                    with open("/proc/sys/user/max_user_namespaces", "w") as file:
                        file.write("0")  # the program may create no namespaces
                except OSError:
                    pass
            self.build_root()
            if self.root:
                drop(NOBODY if mapped else self.uid)
            os.setsid()
            self.libc.prctl(NO_NEW_PRIVS, 1)
            self.libc.prctl(DUMPABLE, 0)
            self.libc.prctl(PDEATHSIG, signal.SIGKILL)
            program = os.fork()
            if program == 0:
                self.execute(self.command(limits), "/tmp")
            os.close(self.report_to)
            while True:
                pid, status = os.waitpid(-1, 0)
                if pid == program:
                    code = os.waitstatus_to_exitcode(status)
                    os._exit(code if code >= 0 else 128 - code)
        except BaseException as error:
            try:
                self.report(failed=f"{error}")
            finally:
                os._exit(127)

    def _mapper(self):
        """Fork a child that stays outside the namespace and maps two user ids into it on demand.

        These are root's id, to build the file system, and the id of the program.

        Returns:
            The child's process id, and a pipe: b"1" makes it map, b"0" makes it only exit.
        """
        go_read, go_write = os.pipe()
        pid = os.fork()
        if pid:
            os.close(go_read)
            return pid, go_write
        os.close(go_write)
        code = 1
        try:
            if os.read(go_read, 1) == b"1":
                for name in ("uid_map", "gid_map"):
                    with open(f"/proc/{os.getppid()}/{name}", "w") as file:
                        file.write(f"0 0 1\n{NOBODY} {self.uid} 1\n")
            code = 0
        finally:
            os._exit(code)

    def build_root(self):
        """Mount a new root: the paths in spec["binds"], read-only, and an in-memory /tmp as the working folder."""
        mount, box = self.libc.call, self.spec["box"]
        mount("mount", "none", "/", None, REC | PRIVATE, None)
        mount("mount", "tmpfs", box, "tmpfs", NOSUID | NODEV, "mode=755,size=1m")
        os.mkdir(f"{box}/tmp")
        size = self.spec["limits"]["RLIMIT_FSIZE"] * 4
        mount("mount", "tmpfs", f"{box}/tmp", "tmpfs", NOSUID | NODEV, f"mode=1777,size={size},nr_inodes=4096")
        for path in self.spec["binds"]:
            inside = box + path
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            if os.path.islink(path):
                os.symlink(os.readlink(path), inside)
                continue
            if os.path.isdir(path):
                os.makedirs(inside, exist_ok=True)
            else:
                os.close(os.open(inside, os.O_CREAT | os.O_WRONLY, 0o644))
            mount("mount", path, inside, None, BIND | REC, None)
            if not path.startswith("/dev/"):
                self.libc.read_only(inside)
        mount("mount", None, box, None, REMOUNT | BIND | RDONLY | NOSUID | NODEV, None)
        os.chdir(box)
        mount("pivot_root", ".", ".")
        mount("umount2", ".", 2)  # unmounts the old root, which is now on top of the new one
        os.chdir("/tmp")

    # ---- end

    def kill_all(self, reaped):
        """Kill the program and all its descendants, even those that left its session, and wait until none is left.

        Args:
            reaped: whether the program has ended and was waited for.
        """
        if self.spec["method"] == "namespaces":
            if not reaped:
                os.kill(self.child, signal.SIGKILL)
                os.waitpid(self.child, 0)
            return
        if self.root and (pid := os.fork()) == 0:
            try:
                os.setresuid(self.uid, self.uid, self.uid)
                os.kill(-1, signal.SIGKILL)  # everything that this user id may signal: only the program's processes
            finally:
                os._exit(0)
        elif not self.root and not reaped:
            try:
                os.killpg(self.child, signal.SIGKILL)
            except OSError:
                pass
        end = time.monotonic() + 5
        while time.monotonic() < end:
            for pid in self.children():
                try:
                    os.kill(pid, signal.SIGKILL)
                except OSError:
                    pass
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
                time.sleep(0.001)
            except ChildProcessError:
                return
        self.report(failed="processes of the program could not be ended")

    def children(self):
        """Return the process ids of our children, including adopted orphans."""
        if not LINUX:
            return []  # the program may start none there, see limits()
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    with open(f"/proc/{entry}/stat", "rb") as file:
                        parent = int(file.read().rpartition(b")")[2].split()[1])
                except (OSError, ValueError, IndexError):
                    continue
                if parent == os.getpid():
                    found.append(int(entry))
        return found


if __name__ == "__main__":
    Launcher(json.loads(sys.argv[1])).run()
