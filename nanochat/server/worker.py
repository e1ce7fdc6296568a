"""A worker process: it owns a device, loads models on it, and runs a scheduler for each.

The HTTP process starts it (pool.py) and talks to it over a pipe, in the messages of messages.py. It ends when the pipe
closes, also when the HTTP process was killed. A model is loaded in a thread when a request first asks for it; the other
models continue meanwhile.

PyTorch is imported inside the functions here: the HTTP process imports this file too, for `run_worker`, and does
without PyTorch.
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
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

from nanochat.errors import UserError
from nanochat.server.messages import Event, ModelInfo, ModelKey, RowRequest, WorkerConfig

if TYPE_CHECKING:
    from nanochat.server.scheduler import Scheduler

STATS_EVERY = 0.25  # seconds


def run_worker(pipe: Connection, config: WorkerConfig) -> None:
    """Run a worker process until its pipe closes."""
    # Ctrl-C reaches the whole process group; the HTTP process handles it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, inbox), daemon=True).start()
    try:
        host = ModelHost(config, inbox)
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
    """Move messages from the pipe to the inbox. When the pipe closes, end the process at once, whatever it computes."""
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)


def _serve(pipe: Connection, inbox: queue.SimpleQueue, host: "ModelHost") -> None:
    """Handle messages between steps; block on the inbox only if there is nothing to compute."""
    reported = time.monotonic()
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
                events += host.handle(message)
        events += host.step()
        now, stats = time.monotonic(), None
        if now - reported > STATS_EVERY or (events and not host.busy):
            reported, stats = now, host.stats()
        if events or stats is not None:
            pipe.send(("events", events, stats))


class Arrived(NamedTuple):
    """A request that waits for its model, and the time.monotonic() of its arrival, from which its timeout counts."""

    request: RowRequest
    at: float


class ModelHost:
    """The models of a worker, each with a scheduler. One thread owns it; only loading runs in threads of its own."""

    def __init__(self, config: WorkerConfig, inbox: queue.SimpleQueue):
        """Choose the device. Raises UserError if it is missing. inbox: where loading threads put ("loaded", ...)."""
        from nanochat.distributed import init_ranks, use_gpu

        self.config, self.inbox = config, inbox
        kind, _, number = config.device.partition(":")
        if number:  # one GPU of several: init_ranks would take the first
            import torch
            if kind != "cuda" or not int(number) < torch.cuda.device_count():
                raise UserError(f"there is no {config.device}: this machine shows {torch.cuda.device_count()} GPUs; "
                                "see --num-gpus")
            self.device = torch.device(config.device)
            use_gpu(self.device)
        else:
            self.device = init_ranks(kind).device
        self.schedulers: dict[ModelKey, Scheduler] = {}     # the least recently used first
        # models that are being loaded, and the requests that wait for each
        self._loading: dict[ModelKey, list[Arrived]] = {}
        self._rows: dict[str, ModelKey] = {}                # the model of each row that has not ended
        self._past: dict[str, float] = {}                   # counts of schedulers that were unloaded

    def models(self) -> list[ModelInfo]:
        """Return the models that can be asked for now."""
        from nanochat.server.models import find_models

        return find_models(self.config)

    # ---- loading

    def load_now(self, info: ModelInfo) -> None:
        """Load a model in this thread. Raises UserError."""
        self._add(info.key, self._load(info))

    def _load(self, info: ModelInfo) -> "Scheduler":
        from nanochat.engine import Engine
        from nanochat.loading import load_for_decoding
        from nanochat.server.scheduler import Scheduler

        model, tokenizer, _ = load_for_decoding(info.folder, self.device, step=info.step, quantize=self.config.quantize)
        rows = self.config.max_rows
        waiting = rows + self.config.max_waiting  # the pool enforces the limit
        return Scheduler(Engine(model, tokenizer), max_rows=rows, max_waiting=waiting,
                         prefix_bytes=self.config.prefix_bytes)

    def _load_in_thread(self, info: ModelInfo) -> None:
        """Load a model and put it, or the exception, into the inbox."""
        try:
            loaded: Any = self._load(info)
        except Exception as error:
            loaded = error
        self.inbox.put(("loaded", info, loaded))

    def _add(self, key: ModelKey, scheduler: "Scheduler") -> None:
        """Add a model, and unload idle ones beyond max_models, the least recently used first."""
        self.schedulers[key] = scheduler
        idle = [other for other, running in self.schedulers.items() if not running.busy and other != key]
        for other in idle[:max(len(self.schedulers) - self.config.max_models, 0)]:
            self._unload(other)

    def _unload(self, key: ModelKey) -> None:
        for name, value in self.schedulers.pop(key).stats().items():
            if name.endswith("_total"):
                self._past[name] = self._past.get(name, 0) + value
        if self.device.type == "cuda":
            import torch
            torch.cuda.empty_cache()

    # ---- requests

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return any(scheduler.busy for scheduler in self.schedulers.values())

    def handle(self, message: tuple) -> list[Event]:
        """Handle a message of the pipe or of a loading thread: ("submit", ...), ("cancel", ...) or ("loaded", ...)."""
        what, *rest = message
        if what == "cancel":
            return self._cancel(rest[0])
        if what == "loaded":
            return self._loaded(*rest)
        arrived = Arrived(rest[0], time.monotonic())
        key = arrived.request.model.key
        self._rows[arrived.request.id] = key
        if key in self.schedulers:
            return self._guarded(key, lambda: self._submit(arrived))
        if key not in self._loading:
            self._loading[key] = []
            threading.Thread(target=self._load_in_thread, args=(arrived.request.model,), daemon=True).start()
        self._loading[key].append(arrived)
        return []

    def _submit(self, arrived: Arrived) -> list[Event]:
        """Give a request to the scheduler of its model."""
        from nanochat.server.scheduler import QueueFull

        request = arrived.request
        scheduler = self.schedulers[request.model.key] = self.schedulers.pop(request.model.key)  # to the end: used last
        try:
            scheduler.submit(request, arrived.at)
        except QueueFull as error:
            return self._end([request.id], "refused", str(error))
        except UserError as error:
            return self._end([request.id], "error", str(error))
        return []

    def _guarded(self, key: ModelKey, work: Callable[[], list[Event]]) -> list[Event]:
        """Return work(). After an unexpected exception, unload the model and end its rows, but no others."""
        try:
            return work()
        except Exception:
            traceback.print_exc()
            self._unload(key)
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
            self._loading[key] = [arrived for arrived in self._loading[key] if arrived.request.id != id]
            return self._end([id], "cancelled")
        return []

    def _loaded(self, info: ModelInfo, loaded: "Scheduler | Exception") -> list[Event]:
        """Submit the requests that waited for a model, or end them if it could not be loaded."""
        waiting = self._loading.pop(info.key)
        if isinstance(loaded, Exception):
            print(f"the model {info.id} cannot be loaded: {loaded}", file=sys.stderr, flush=True)
            return self._end([arrived.request.id for arrived in waiting], "error",
                             f"the model {info.id} cannot be loaded; the server's terminal says why")
        self._add(info.key, loaded)
        return self._guarded(info.key, lambda: [event for arrived in waiting for event in self._submit(arrived)])

    def step(self) -> list[Event]:
        """Do one scheduler step for each model that has work."""
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
        """Return the counts and current values of all models together."""
        total = dict(self._past)
        for scheduler in self.schedulers.values():
            for name, value in scheduler.stats().items():
                total[name] = total.get(name, 0) + value
        total["waiting"] = total.get("waiting", 0) + sum(map(len, self._loading.values()))
        total["models"] = len(self.schedulers)
        return total
