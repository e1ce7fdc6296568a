"""Jobs that are started again where they fail, and several machines ("nodes") that run the same commands together.

    job = persist(owner, lambda: owner.start("base model", argv, ranks=8), restarts=3)

Of several nodes, node 0 leads and the others follow.

    NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 bash speedrun.sh      # on host0
    NNODES=2 NODE_RANK=1 MASTER_ADDR=host0 bash speedrun.sh      # on the other one, in any order

The nodes connect to MASTER_ADDR, port MASTER_PORT (29500). Node 0 tells which of the commands, a list that is the same
on all, is run next, and gives the ranks their numbers and the port at which they meet. A node that fails tells it; one
that dies closes its connection; one that is cut off is silent. It is named after NANOCHAT_HANG_WARN seconds, and after
NANOCHAT_HANG_END the job ends on all nodes, so that a short cut harms nothing. Where the job may be started again, all
wait NANOCHAT_NODE_MINUTES (30) for the node to come back. All that is lost is what was done since the last checkpoint.
"""

import json
import os
import queue
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from nanochat.errors import Unreachable, UserError
from nanochat.files import base_dir
from nanochat.launcher import RESTARTED, Group, Job, Owner, death
from nanochat.logs import print_line
from nanochat.watch import hang_seconds

BEAT = 2.0      # seconds from one sign of life of a node to the next, at most
REMIND = 60.0   # seconds between two lines about what is waited for
HOPELESS = 3    # failures at one and the same step, after which a job is not started again
FOLLOWS = re.compile(r"connection|peer|socket|nccl|gloo|store|hangs|cut off", re.IGNORECASE)  # from another's failure


@dataclass(frozen=True)
class Place:
    """This machine among `nodes`: its number, and where node 0 listens."""

    nodes: int
    node: int
    address: str
    port: int


def place_of(nodes: str, node: str, address: str, port: str) -> Place | None:
    """Return the place that these settings say, None where there is one node. Raises UserError for wrong ones."""
    if (nodes or "1") == "1":
        return None
    for name, text in (("NNODES", nodes), ("NODE_RANK", node), ("MASTER_PORT", port or "29500")):
        if not text.isdecimal():
            raise UserError(f"{name} is {text!r}: with several nodes it must be a whole number (NNODES is {nodes}).")
    if not 0 <= int(node) < int(nodes):
        raise UserError(f"NODE_RANK is {node}, but NNODES {nodes}: nodes count from 0 to {int(nodes) - 1}.")
    if not address:
        raise UserError(f"NNODES is {nodes} but MASTER_ADDR is not set: it is the address of node 0, as all nodes "
                        "reach it.")
    return Place(int(nodes), int(node), address, int(port or 29500))


def place_of_environment() -> Place | None:
    """Return the place that NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT say."""
    return place_of(*(os.environ.get(name, "") for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")))


def minutes_to_wait() -> float:
    """Return how long nodes wait for one another. Raises UserError where NANOCHAT_NODE_MINUTES is no number."""
    text = os.environ.get("NANOCHAT_NODE_MINUTES") or "30"
    try:
        return float(text)
    except ValueError:
        raise UserError(f"NANOCHAT_NODE_MINUTES is {text!r}: it must be a number of minutes.") from None


def use_interface_of(address: str) -> None:
    """Let gloo use the network interface that leads to node 0, unless GLOO_SOCKET_IFNAME says another. It would take
    the one of the host's name, which is the loopback interface on many machines."""
    with suppress(OSError, ImportError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        import fcntl
        probe.connect((address, 9))  # sends nothing
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                if fcntl.ioctl(probe.fileno(), 0x8915, name.encode().ljust(256, b"\0"))[20:24] == own:  # SIOCGIFADDR
                    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def persist(owner: Owner, start: Callable[[], Job], restarts: int) -> Job:
    """Call `start` and wait for its job; again where it fails, at most `restarts` times. Return the last job.

    A training run goes on from its last checkpoint. What its user must mend, and what fails HOPELESS times at one
    and the same step, is not started again. Raises what `wait` raises.
    """
    failed_at: list[int] = []
    try:
        while True:
            job = start()
            if not owner.wait(job) or job.mend or len(failed_at) >= restarts:
                return job
            failed_at.append(job.step)
            why, at = job.reason or death(job.code), f"step {job.step}" if job.step >= 0 else "its start"
            if failed_at[-HOPELESS:] == [job.step] * HOPELESS:
                print_line(f"{job.title} has failed {HOPELESS} times at {at}: it is not started again", sys.stderr)
                return job
            print_line(f"restart {len(failed_at)} of at most {restarts}: {job.title} failed at {at} ({why}). It "
                       "goes on from its last checkpoint.", sys.stderr)
            os.environ[RESTARTED] = f"restart {len(failed_at)} of at most {restarts}, at {at}: {why}"
    finally:
        os.environ.pop(RESTARTED, None)


class Link:
    """A connection between two nodes. What comes is in `inbox`; `lost` is set where it has ended."""

    def __init__(self, connection: socket.socket):
        self.connection, self.heard, self.lost, self.named = connection, time.monotonic(), threading.Event(), False
        self.inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.results: dict[str, dict[str, Any]] = {}
        self.hello: dict[str, Any] = {}
        self.left = 0  # exit code of a node that was asked to stop
        self._sending = threading.Lock()
        self.warn, self.end = hang_seconds()
        for work in (self._read, self._beat):
            threading.Thread(target=work, name="node", daemon=True).start()

    def send(self, **message: Any) -> None:
        """Send a message; where that fails, the connection is lost."""
        try:
            with self._sending:
                self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.lost.set()

    def close(self) -> None:
        """End the connection."""
        self.lost.set()
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    @property
    def silent(self) -> float:
        """Seconds since the other node was heard last."""
        return time.monotonic() - self.heard

    def silence(self, name: str) -> str:
        """Return in words for how long the node `name` has been silent."""
        return f"{name} has shown no sign of life for {self.silent:.0f} s"

    def trouble(self, name: str) -> str:
        """Return what is wrong with the connection to the node `name`, "" for nothing; warn where it is silent."""
        if self.lost.is_set():
            return f"{name} has closed its connection: its launcher was killed, or its machine restarted"
        if self.silent > self.warn and not self.named:
            self.named = True
            print_line(f"warning: {self.silence(name)}: it is stopped or dead, or the network is cut. The job ends "
                       f"after {self.end:.0f} s.", sys.stderr)
        return self.silence(name) if self.silent > self.end else ""

    def _read(self) -> None:
        with suppress(OSError, ValueError), self.connection.makefile("rb") as lines:
            for line in lines:
                message, silent = json.loads(line), self.silent
                self.heard = time.monotonic()
                if self.named:
                    self.named = False
                    print_line(f"the other node is back after {silent:.0f} s", sys.stderr)
                if "ended" in message:
                    self.results[message["ended"]] = message
                elif "left" in message:
                    self.left = message["left"]
                elif "beat" not in message:
                    self.inbox.put(message)
        self.lost.set()

    def _beat(self) -> None:
        while not self.lost.wait(min(BEAT, self.warn / 4, self.end / 4)):
            self.send(beat=True)


@dataclass
class Elsewhere:
    """What the other nodes do for a job, as its Owner asks; see nanochat.launcher.Job.

    links: to the nodes, by number. attempt: which start of which job.
    """

    links: dict[int, Link]
    attempt: str
    leads: bool
    told: bool = False
    gone: dict[int, str] = field(default_factory=dict)

    def problem(self) -> tuple[int, str, bool] | None:
        """Return exit code, reason and whether its user must mend it, where a node has failed; else None."""
        for node, link in self.links.items():
            if result := link.results.get(self.attempt):
                if result["code"]:
                    return result["code"], f"node {node}: {result['reason']}", result["mend"]
            elif link.left:
                self.gone[node] = "left"
                return link.left, f"node {node} was asked to stop", True
            elif trouble := link.trouble(f"node {node}"):
                self.gone[node] = trouble
                return 1, trouble, False
        return None

    def ended(self) -> bool:
        """Return whether no node runs the job any more, or it is not this one that waits for them.

        A node that is silent for too long is not waited for, also where a rank here has failed before that was clear.
        """
        return not self.leads or all(self.attempt in link.results or node in self.gone or link.trouble(f"node {node}")
                                     for node, link in self.links.items())

    def stop(self, why: str) -> None:
        """Let the other nodes end the job."""
        if not self.told and self.leads:
            self.told = True
            for link in self.links.values():
                link.send(stop=self.attempt, why=why)

    def better_reason(self, own: str) -> str:
        """Return the reason of the node whose failure the others' follows from, as far as reasons tell: what it said,
        or that it says nothing any more."""
        told = [f"node {node}: {result['reason']}" for node, link in self.links.items()
                if (result := link.results.get(self.attempt)) and result["code"]]
        told += [link.silence(f"node {node}") for node, link in self.links.items()
                 if self.attempt not in link.results and link.silent > link.warn]
        if FOLLOWS.search(own):
            return next((reason for reason in told if not FOLLOWS.search(reason)), own)
        return own


class Leader:
    """Node 0. As a context it listens; at its end it tells the other nodes how all has ended.

    Args:
        place: of this machine.
        count: ranks of this machine.
        commands: that are run, in words; all nodes must have the same.
    """

    def __init__(self, place: Place, count: int, commands: Sequence[str]):
        self.place, self.count, self.commands = place, count, list(commands)
        self.links: dict[int, Link] = {}
        self.running: dict[int, str] = {}  # the last attempt that a node was given
        self.code, self._number, self._name = 0, 0, uuid.uuid4().hex[:8]
        self.minutes = minutes_to_wait()

    def __enter__(self) -> "Leader":
        use_interface_of(self.place.address)
        try:
            self._server = socket.create_server(("", self.place.port))
        except OSError as error:
            raise UserError(f"port {self.place.port} cannot be used: {error.strerror}. Set MASTER_PORT to another one, "
                            "the same on all nodes.") from error
        self._token = base_dir() / f".node-{self._name}"
        self._token.touch()  # who sees it shares the folder
        threading.Thread(target=self._accept, name="nodes", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else int(kind is not None)
        for link in list(self.links.values()):
            link.send(end=self.code or code, why="" if error is None or isinstance(error, SystemExit) else str(error))
        self._server.close()
        with suppress(OSError):
            self._token.unlink()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, (host, *_) = self._server.accept()
                threading.Thread(target=self._welcome, args=(Link(connection), host), daemon=True).start()

    def _welcome(self, link: Link, host: str) -> None:
        link.send(look=self._token.name)
        try:
            hello = link.hello = link.inbox.get(timeout=60)
            node = hello["node"]
        except (queue.Empty, KeyError, TypeError):
            link.close()
            return
        wrong = ""
        if hello["nodes"] != self.place.nodes or not 0 < node < self.place.nodes:
            wrong = f"it is node {node} of {hello['nodes']}, node 0 is one of {self.place.nodes}"
        elif hello["commands"] != self.commands:
            pairs = zip([*self.commands, "nothing"], [*hello["commands"], "nothing"])
            mine, theirs = next((pair for pair in pairs if pair[0] != pair[1]), ("more", "fewer commands"))
            wrong = f"it would run other commands than node 0 ({theirs}, not {mine}): give all nodes the same settings"
        elif (old := self.links.get(node)) and not old.trouble(f"node {node}"):
            wrong = f"a node {node} is here already"
        if wrong:
            link.send(refuse=wrong)
            print_line(f"node {node} at {host} was refused: {wrong}", sys.stderr)
            return
        print_line(f"node {node} of {self.place.nodes} is here: {host}, {hello['count']} "
                   f"process{'es' if hello['count'] > 1 else ''}, "
                   + ("the same base folder" if hello["sees"] else "a base folder of its own"), sys.stderr)
        self.running.pop(node, None)  # it ends what it ran before it connects again
        self.links[node] = link

    def gather(self, owner: Owner) -> None:
        """Wait until all nodes are here and none of them runs anything."""
        began = said = time.monotonic()
        while missing := [node for node in range(1, self.place.nodes) if not self._is_idle(node)]:
            now = time.monotonic()
            if owner.stopped:
                raise SystemExit(128 + owner.stopped)
            if now - began > 60 * self.minutes:
                raise Unreachable(f"node {missing[0]} of {self.place.nodes} has not come within {self.minutes:g} "
                                  "minutes. Start the same command there, with its NODE_RANK.")
            if now - said > REMIND or said == began:
                said = now + 1e-6
                print_line(f"waiting for node {', '.join(map(str, missing))} of {self.place.nodes} at "
                           f"{self.place.address}:{self.place.port} ({now - began:.0f} s of at most "
                           f"{60 * self.minutes:.0f})", sys.stderr)
            time.sleep(0.1)

    def _is_idle(self, node: int) -> bool:
        link = self.links.get(node)
        if link is None or link.trouble(f"node {node}"):
            return False
        attempt = self.running.get(node)
        return attempt is None or attempt in link.results

    @property
    def all_share(self) -> bool:
        """Whether all nodes have the same base folder. Call `gather` before."""
        return all(link.hello["sees"] for link in self.links.values())

    def start(self, owner: Owner, number: int, local: Callable[[Group | None], Job | None], *, together: bool = True,
              beside: bool = False) -> Job | None:
        """Start a command on all nodes, when all are here.

        Args:
            owner: of the processes on this machine.
            number: of the command in the list.
            local: starts it on this machine, given the numbers of its ranks; it may return None where nothing is to do.
            together: as ranks of one job; else each node by itself.
            beside: nobody waits for it on the other nodes.
        """
        self.gather(owner)
        self._number += 1
        attempt = f"{self._name}/{self._number}"
        counts = [self.count, *(self.links[node].hello["count"] for node in range(1, self.place.nodes))]
        with socket.create_server(("", 0), backlog=max(128, sum(counts))) as master:
            port = master.getsockname()[1]
            for node, link in self.links.items():
                if not beside:
                    self.running[node] = attempt
                link.send(go=attempt, number=number, together=together, beside=beside, port=port,
                          first=sum(counts[:node]), world=sum(counts), restarted=os.environ.get(RESTARTED, ""))
            group = Group(0, sum(counts), 0, self.place.nodes, self.place.address, port, master) if together else None
            job = local(group)
        if not beside:
            job = job or owner.start("the other nodes", [], ranks=0)
            job.elsewhere = Elsewhere(dict(self.links), attempt, leads=True)
        return job


def follow(owner: Owner, place: Place, count: int, commands: Sequence[str],
           run: Callable[[int, Group | None], Job | None], again: bool = True) -> None:
    """Do on this machine what node 0 says, until it says that all has ended.

    Args:
        owner: of the processes on this machine.
        place: of this machine.
        count: ranks of this machine.
        commands: that may be run, in words.
        run: starts the command of a number, with the numbers of its ranks where it is run by all nodes together.
        again: whether to wait for node 0 to come back where it is lost.

    Raises:
        SystemExit: with the exit code that node 0 says, or after a signal. UserError: node 0 refuses this machine, or
            cannot be reached.
    """
    use_interface_of(place.address)
    while True:
        link = _connect(owner, place)
        try:
            if _obey(owner, link, place, count, commands, run):
                return
        except SystemExit as error:
            link.send(left=error.code)
            raise
        finally:
            link.close()
        if not again:
            raise Unreachable(f"node 0 at {place.address}:{place.port} is lost, and --max-restarts is 0")
        print_line(f"node 0 at {place.address}:{place.port} is lost; waiting for it", sys.stderr)


def _connect(owner: Owner, place: Place) -> Link:
    began = said = time.monotonic()
    minutes = minutes_to_wait()
    while True:
        if owner.stopped:
            raise SystemExit(128 + owner.stopped)
        try:
            connection = socket.create_connection((place.address, place.port), timeout=5)
            connection.settimeout(None)
            return Link(connection)
        except OSError as error:
            now = time.monotonic()
            if now - began > 60 * minutes:
                raise Unreachable(f"node 0 does not answer at {place.address}:{place.port} ({error}). Start the same "
                                  "command there, with NODE_RANK=0, and check MASTER_ADDR and the firewall.") from error
            if now - said > REMIND or said == began:
                said = now + 1e-6
                print_line(f"waiting for node 0 at {place.address}:{place.port}: {error}", sys.stderr)
            time.sleep(0.5)


def _obey(owner: Owner, link: Link, place: Place, count: int, commands: Sequence[str],
          run: Callable[[int, Group | None], Job | None]) -> bool:
    """Do what comes through a connection. Return whether all has ended; False where the connection has."""
    beside: list[Job] = []
    while True:
        order = _next(owner, link)
        if order is None:
            return False
        if "look" in order:
            link.send(nodes=place.nodes, node=place.node, count=count, commands=list(commands),
                      sees=(base_dir() / str(order["look"]).replace("/", "")).exists())
        elif "refuse" in order:
            raise UserError(f"node 0 refuses this machine: {order['refuse']}.")
        elif "end" in order:
            for job in beside:
                owner.wait(job)
            if order["end"]:
                print_line(f"node 0 has ended with exit code {order['end']} {order['why']}".rstrip(), sys.stderr)
                raise SystemExit(order["end"])
            return True
        elif "go" in order:
            group = Group(order["first"], order["world"], place.node, place.nodes, place.address, order["port"], None)
            if order["restarted"]:
                print_line(order["restarted"], sys.stderr)
            try:
                job = run(order["number"], group if order["together"] else None)
                if job is not None and order["beside"]:
                    beside.append(job)
                elif job is not None:
                    job.elsewhere = _Led({0: link}, order["go"], leads=False)
                    owner.wait(job)
            except UserError as error:
                link.send(ended=order["go"], code=1, reason=str(error), mend=error.mend)
                continue
            code = job.code if job is not None and not order["beside"] else 0
            link.send(ended=order["go"], code=code, reason=job.reason if code else "", mend=bool(code) and job.mend)


class _Led(Elsewhere):
    """What node 0 says about a job, for one that follows."""

    def problem(self) -> tuple[int, str, bool] | None:
        link = self.links[0]
        with suppress(queue.Empty):
            order = link.inbox.get_nowait()
            if order.get("stop") == self.attempt:
                return 1, f"node 0: {order['why']}", False
            if "end" in order:
                link.inbox.put(order)
                return 1, "node 0 has ended", False
        trouble = link.trouble("node 0")
        return (1, trouble, False) if trouble else None


def _next(owner: Owner, link: Link) -> dict[str, Any] | None:
    """Return the next order, None where the connection has ended."""
    while True:
        if owner.stopped:
            raise SystemExit(128 + owner.stopped)
        with suppress(queue.Empty):
            return link.inbox.get(timeout=0.2)
        if link.trouble("node 0"):
            return None
