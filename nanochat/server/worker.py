"""A worker: one process that has a device, hosts models on it, and runs their schedulers.

It is started by nanochat/server/pool.py, which talks to it over a pipe in the messages below, and it ends when that pipe does: also when
the server was killed. A model is loaded when it is first asked for, in a thread, so that the others go on meanwhile.

Nothing heavy is imported here at the top: the server's own process reads this file for the messages, and needs no PyTorch.
"""

import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from nanochat.errors import UserError
from nanochat.server.messages import Event

if TYPE_CHECKING:
    from nanochat.server.scheduler import Scheduler

STATS_EVERY = 0.25  # seconds

Key = tuple[str, int]  # folder and step: what an id means may change while a server runs


# ---------------------------------------------------------------------------------------------------------------------
# Messages

@dataclass(frozen=True)
class WorkerConfig:
    """What a worker is to host: `source` (a stage, a folder, or owner/name on the hub) is loaded at the start, the other stages of that tag
    when they are asked for. device: cpu, mps, cuda or cuda:1; "" takes the best there is. max_models stay loaded."""

    source: str = "sft"
    model_tag: str = ""
    step: int = -1
    device: str = ""
    quantize: str = "none"
    max_rows: int = 16
    max_waiting: int = 64
    prefix_bytes: int = 256 << 20
    max_models: int = 4


@dataclass(frozen=True)
class ModelInfo:
    """A model that can be asked for."""

    id: str
    folder: str
    step: int
    context_length: int
    tokenizer: str              # its folder
    chat: bool
    created: int                # seconds since 1970
    description: str
    default: bool = False

    @property
    def key(self) -> Key:
        """What is loaded for it."""
        return self.folder, self.step


@dataclass(frozen=True)
class Ask:
    """One row to be decoded. settings and the rest as in nanochat.server.scheduler.Request; seconds: it may take, waiting included."""

    id: str
    model: ModelInfo
    prompt: list[int]
    max_tokens: int
    settings: dict[str, Any] = field(default_factory=dict)
    tools: bool = True
    logprobs: int | None = None
    prompt_logprobs: bool = False
    seconds: float | None = None


# ---------------------------------------------------------------------------------------------------------------------
# The process

def run_worker(pipe: Connection, config: WorkerConfig) -> None:
    """The whole life of a worker. In: ("submit", Ask), ("cancel", id), ("models",). Out: ("ready", [ModelInfo], device), ("failed", why),
    ("models", [ModelInfo]), ("events", [Event], stats or None)."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a Ctrl-C or a `kill` of the group is the server's to answer
        signal.signal(number, signal.SIG_IGN)
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, inbox), daemon=True).start()
    try:
        host = Host(config, inbox)
        infos = host.models()
        host.load_now(next(info for info in infos if info.default))
    except UserError as error:
        pipe.send(("failed", str(error)))
        return
    pipe.send(("ready", infos, str(host.device)))
    try:
        _serve(pipe, inbox, host)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)


def _read(pipe: Connection, inbox: queue.SimpleQueue) -> None:
    """Move messages from the pipe to the inbox; when the server is gone, go too, whatever is being done."""
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)


def _serve(pipe: Connection, inbox: queue.SimpleQueue, host: "Host") -> None:
    """Take messages between steps; wait for them only where there is nothing to compute."""
    told = time.monotonic()
    while True:
        messages = [] if host.busy else [inbox.get()]
        with suppress(queue.Empty):
            while True:
                messages.append(inbox.get_nowait())
        events: list[Event] = []
        for message in messages:
            if message[0] == "models":
                pipe.send(("models", host.models()))
            else:
                events += host.take(message)
        events += host.step()
        now, stats = time.monotonic(), None
        if now - told > STATS_EVERY or (events and not host.busy):
            told, stats = now, host.stats()
        if events or stats is not None:
            pipe.send(("events", events, stats))


class Host:
    """The models of a worker and their schedulers. One thread's, but for the loading."""

    def __init__(self, config: WorkerConfig, inbox: queue.SimpleQueue):
        from nanochat.distributed import init_ranks

        self.config, self.inbox = config, inbox
        kind, _, number = config.device.partition(":")
        if number:  # a GPU of several: init_ranks would take the first
            import torch
            if kind != "cuda" or not int(number) < torch.cuda.device_count():
                raise UserError(f"there is no {config.device}: this machine shows {torch.cuda.device_count()} GPUs; see --num-gpus")
            self.device = torch.device(config.device)
            torch.cuda.set_device(self.device)
        else:
            self.device = init_ranks(kind).device
        self.schedulers: dict[Key, Scheduler] = {}  # used longest ago first
        self._loading: dict[Key, list[Ask]] = {}    # and what waits for them
        self._rows: dict[str, Key] = {}             # requests that have not ended, and the model of each
        self._past: dict[str, float] = {}           # counts of schedulers that are gone

    def models(self) -> list[ModelInfo]:
        """The models there are now."""
        from nanochat.server.models import find_models

        return find_models(self.config)

    # ---- loading

    def load_now(self, info: ModelInfo) -> None:
        """Load a model, here and now. Raises UserError."""
        self._host(info.key, self._load(info))

    def _load(self, info: ModelInfo) -> "Scheduler":
        from nanochat.engine import Engine
        from nanochat.loading import load_for_decoding
        from nanochat.server.scheduler import Scheduler

        model, tokenizer, _ = load_for_decoding(info.folder, self.device, step=info.step, quantize=self.config.quantize)
        rows, waiting = self.config.max_rows, self.config.max_rows + self.config.max_waiting  # the pool sees to the bound
        return Scheduler(Engine(model, tokenizer), max_rows=rows, max_waiting=waiting, prefix_bytes=self.config.prefix_bytes)

    def _load_aside(self, info: ModelInfo) -> None:
        """In a thread: load, and say so to the inbox."""
        try:
            loaded: Any = self._load(info)
        except Exception as error:
            loaded = error
        self.inbox.put(("loaded", info, loaded))

    def _host(self, key: Key, scheduler: "Scheduler") -> None:
        self.schedulers[key] = scheduler
        idle = [other for other, busy in self.schedulers.items() if not busy.busy and other != key]
        for other in idle[:max(len(self.schedulers) - self.config.max_models, 0)]:
            self._let_go(other)

    def _let_go(self, key: Key) -> None:
        for name, value in self.schedulers.pop(key).stats().items():
            if name.endswith("_total"):
                self._past[name] = self._past.get(name, 0) + value
        if self.device.type == "cuda":
            import torch
            torch.cuda.empty_cache()

    # ---- requests

    @property
    def busy(self) -> bool:
        """Is there anything to compute?"""
        return any(scheduler.busy for scheduler in self.schedulers.values())

    def take(self, message: tuple) -> list[Event]:
        """Do what a message says."""
        what, *rest = message
        if what == "cancel":
            return self._cancel(rest[0])
        if what == "loaded":
            return self._loaded(*rest)
        ask: Ask = rest[0]
        ask, key = replace(ask, seconds=None if ask.seconds is None else time.monotonic() + ask.seconds), ask.model.key
        self._rows[ask.id] = key
        if key in self.schedulers:
            return self._guarded(key, lambda: self._submit(ask))
        if key not in self._loading:
            self._loading[key] = []
            threading.Thread(target=self._load_aside, args=(ask.model,), daemon=True).start()
        self._loading[key].append(ask)
        return []

    def _submit(self, ask: Ask) -> list[Event]:
        """Hand a request, whose `seconds` are a point in time by now, to its scheduler."""
        from nanochat.sampling import Settings
        from nanochat.server.scheduler import QueueFull, Request

        scheduler = self.schedulers[ask.model.key] = self.schedulers.pop(ask.model.key)  # to the end: used last
        try:
            scheduler.submit(Request(ask.id, ask.prompt, ask.max_tokens, Settings(**ask.settings), tools=ask.tools, logprobs=ask.logprobs,
                                     prompt_logprobs=ask.prompt_logprobs, deadline=ask.seconds))
        except QueueFull as error:
            return self._end([ask.id], "refused", str(error))
        except UserError as error:
            return self._end([ask.id], "error", str(error))
        return []

    def _guarded(self, key: Key, work: Callable[[], list[Event]]) -> list[Event]:
        """Return work(). Where it fails in a way that nobody foresaw, the model's own requests end, and it is loaded anew when needed."""
        try:
            return work()
        except Exception:
            traceback.print_exc()
            self._let_go(key)
            return self._end([row for row, model in self._rows.items() if model == key], "error",
                             "the server failed on this request; its terminal says how")

    def _end(self, ids: list[str], finish: str, message: str = "") -> list[Event]:
        for id in ids:
            del self._rows[id]
        return [Event(id, "ended", finish=finish, message=message) for id in ids]

    def _cancel(self, id: str) -> list[Event]:
        key = self._rows.get(id)
        if key in self.schedulers:
            return self._guarded(key, lambda: self.schedulers[key].cancel(id) or [])
        if key in self._loading:
            self._loading[key] = [ask for ask in self._loading[key] if ask.id != id]
            return self._end([id], "cancelled")
        return []

    def _loaded(self, info: ModelInfo, loaded: "Scheduler | Exception") -> list[Event]:
        waiting = self._loading.pop(info.key)
        if isinstance(loaded, Exception):
            print(f"the model {info.id} cannot be loaded: {loaded}", file=sys.stderr, flush=True)
            return self._end([ask.id for ask in waiting], "error", f"the model {info.id} cannot be loaded; the server's terminal says why")
        self._host(info.key, loaded)
        return self._guarded(info.key, lambda: [event for ask in waiting for event in self._submit(ask)])

    def step(self) -> list[Event]:
        """Let each model that has work do a bounded piece of it."""
        events: list[Event] = []
        for key, scheduler in list(self.schedulers.items()):
            if scheduler.busy:
                events += self._guarded(key, lambda scheduler=scheduler: self._step(scheduler))
        return events

    def _step(self, scheduler: "Scheduler") -> list[Event]:
        events = scheduler.step()
        for event in events:
            if event.kind == "ended":
                del self._rows[event.id]
        return events

    def stats(self) -> dict[str, float]:
        """Of all models together."""
        total = dict(self._past)
        for scheduler in self.schedulers.values():
            for name, value in scheduler.stats().items():
                total[name] = total.get(name, 0) + value
        total["waiting"] = total.get("waiting", 0) + sum(map(len, self._loading.values()))
        total["models"] = len(self.schedulers)
        return total
