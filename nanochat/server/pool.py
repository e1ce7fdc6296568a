"""The HTTP process's side of the workers: start and restart them, give them rows, and pass their events on.

    pool = Pool(config, devices=["cuda:0", "cuda:1"])
    await pool.start()
    group = pool.submit([RowRequest(...), ...], affinity="conversation")   # all on one worker, or PoolFull or NoWorker
    async for event in group: ...                                         # until each row has ended
    group.close()                                                         # cancels those that have not

All of it runs in one event loop. Each worker has two threads here, which move messages between its pipe and the loop.
"""

import asyncio
import atexit
import multiprocessing
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from nanochat.errors import UserError
from nanochat.server.messages import Event, ModelInfo, RowRequest, WorkerConfig
from nanochat.server.worker import run_worker

BACK_OFF = (0.2, 1.0, 5.0, 15.0, 30.0)  # seconds before a worker that died is started again; the last value repeats
STEADY_SECONDS = 60.0                   # after a life of this length, the next death counts as the first again
MAX_AFFINITIES = 10_000                 # conversations of which the pool remembers the worker
LOOK_SECONDS = 5.0                      # between two looks for new models


class PoolFull(Exception):
    """No worker has room for these rows, not even in its queue."""


class NoWorker(Exception):
    """No worker is running at the moment."""


class RequestGroup:
    """The rows of one HTTP request. Iterate over their events; the last event of each row is of kind "ended"."""

    def __init__(self, requests: list[RowRequest], worker: "Worker"):
        self.requests, self.worker = requests, worker
        self.open = {request.id for request in requests}  # rows whose end was not passed on
        self.event_time = time.monotonic()                # when the last event that was taken arrived
        self._events: asyncio.Queue[tuple[float, Event]] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """Add an event, unless its row was cancelled."""
        if event.id in self.open:
            if event.kind == "ended":
                self.open.discard(event.id)
            self._events.put_nowait((time.monotonic(), event))

    def __aiter__(self) -> "RequestGroup":
        return self

    async def __anext__(self) -> Event:
        if not self.open and self._events.empty():
            raise StopAsyncIteration
        self.event_time, event = await self._events.get()
        return event

    def cancel(self, id: str) -> None:
        """Cancel a row.

        No more of its events are passed on; it takes a place in the worker until the worker reports its end.
        """
        if id in self.open:
            self.open.discard(id)
            self.worker.send(("cancel", id))

    def close(self) -> None:
        """Cancel all rows that have not ended."""
        for id in list(self.open):
            self.cancel(id)

    def end(self, finish: str, message: str) -> None:
        """Cancel all rows that have not ended, and pass on an "ended" event with this reason for each."""
        for id in list(self.open):
            self.put(Event(id, "ended", finish=finish, message=message))
            self.worker.send(("cancel", id))


class Worker:
    """One worker process, and its successors on the same device."""

    def __init__(self, pool: "Pool", number: int, config: WorkerConfig):
        self.pool, self.number, self.config = pool, number, config
        self.state = "starting"  # ready, restarting, failed, stopped
        self.device, self.message = config.device, ""
        self.rows: dict[str, RequestGroup] = {}  # by id: the rows that it was given and has not ended
        self.stats: dict[str, float] = {}
        self.past: dict[str, float] = {}         # counts of the processes that died
        self.restarts, self.deaths = 0, 0        # in all; since it last ran steadily
        self.since = time.monotonic()
        self.process: multiprocessing.process.BaseProcess | None = None
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()

    def start(self) -> None:
        """Start a process. Its message "ready" comes later."""
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        self.process = context.Process(target=run_worker, args=(there, self.config),
                                       name=f"nanochat-worker-{self.number}", daemon=True)
        self.process.start()
        there.close()
        self.since, self._outbox = time.monotonic(), queue.SimpleQueue()
        threading.Thread(target=self._write, args=(here, self._outbox), daemon=True).start()
        threading.Thread(target=self._read, args=(here, self.process, asyncio.get_running_loop()), daemon=True).start()

    @staticmethod
    def _write(pipe: Any, outbox: queue.SimpleQueue) -> None:
        while (message := outbox.get()) is not None:
            with suppress(OSError):  # the process died: the reading thread notices
                pipe.send(message)

    def _read(self, pipe: Any, process: Any, loop: asyncio.AbstractEventLoop) -> None:
        def call(method: Callable, *arguments: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(method, process, *arguments)

        try:
            while True:
                call(self._received, pipe.recv())
        except Exception:  # the pipe ended, perhaps in the middle of a message
            process.kill()
            process.join()
            call(self._died)

    def send(self, message: tuple) -> None:
        """Queue a message to the process."""
        self._outbox.put(message)

    def stop(self) -> None:
        """Kill the process."""
        self.state = "stopped"
        self._outbox.put(None)
        if self.process is not None:
            self.process.kill()

    def _received(self, process: Any, message: tuple) -> None:
        if process is not self.process:
            return
        what, *rest = message
        if what == "events":
            events, stats = rest
            if stats is not None:
                self.stats = stats
            for event in events:
                group = self.rows.pop(event.id, None) if event.kind == "ended" else self.rows.get(event.id)
                if group is not None:
                    group.put(event)
        elif what == "ready":
            self.state, self.message = "ready", ""
            self.pool.used_models.clear()  # the new process may have loaded newer checkpoints
            self.pool.set_models(rest[0])
            self.device = rest[1]
            self.pool.changed.set()
        elif what == "models":
            self.pool.set_models(rest[0])
        elif what == "failed":
            self.state, self.message = "failed", rest[0]
            self.pool.changed.set()

    def _died(self, process: Any) -> None:
        if process is not self.process or self.state == "stopped":
            return
        for name, value in self.stats.items():
            if name.endswith("_total"):
                self.past[name] = self.past.get(name, 0) + value
        self.stats = {}
        self._outbox.put(None)
        rows, self.rows = self.rows, {}
        for id, group in rows.items():
            group.put(Event(id, "ended", finish="error",
                            message="the process that computed this answer ended; try again"))
        if self.state == "starting":  # the first start: Pool.start waits for it and reports the failure
            self.state, self.message = "failed", "a worker ended before it was ready; what it printed says why"
        elif self.state != "failed" or self.restarts:
            self.deaths = 1 if time.monotonic() - self.since > STEADY_SECONDS else self.deaths + 1
            self.restarts += 1
            self.state = "restarting"
            delay = BACK_OFF[min(self.deaths, len(BACK_OFF)) - 1]
            asyncio.get_running_loop().call_later(delay, self._start_again)
        self.pool.changed.set()

    def _start_again(self) -> None:
        if self.state == "restarting":
            self.start()


class Pool:
    """All workers of a server, one on each device."""

    def __init__(self, config: WorkerConfig, devices: list[str]):
        self.config = config
        self.workers = [Worker(self, i, replace(config, device=device)) for i, device in enumerate(devices)]
        self.capacity = config.max_rows + config.max_waiting  # rows that a worker takes
        self.models: dict[str, ModelInfo] = {}
        self.used_models: dict[str, ModelInfo] = {}  # those that a request has used; their ids keep their meaning
        self.changed = asyncio.Event()               # set when a worker's state changes
        self._affinities: OrderedDict[str, int] = OrderedDict()
        self._looked = time.monotonic()

    async def start(self) -> None:
        """Start all workers and wait until each has loaded its model.

        Raises UserError if one cannot; then all are stopped.
        """
        atexit.register(self._kill)  # runs before multiprocessing's own handler, which would wait for the processes
        for worker in self.workers:
            worker.start()
        try:
            while any(worker.state == "starting" for worker in self.workers):
                await self.changed.wait()
                self.changed.clear()
            for worker in self.workers:
                if worker.state == "failed":
                    raise UserError(worker.message)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Kill all processes and wait for their end."""
        self._kill()
        atexit.unregister(self._kill)
        for worker in self.workers:
            if worker.process is not None:
                await asyncio.to_thread(worker.process.join)

    def _kill(self) -> None:
        for worker in self.workers:
            worker.stop()

    @property
    def rows(self) -> int:
        """Rows that are decoded or wait."""
        return sum(len(worker.rows) for worker in self.workers)

    def set_models(self, infos: list[ModelInfo]) -> None:
        """Set the list of models to those a worker found.

        A used one keeps its checkpoint as long as its id is found, unless an older one is found: then that checkpoint
        is damaged or gone.
        """
        for info in infos:
            if info.id in self.used_models and info.step < self.used_models[info.id].step:
                del self.used_models[info.id]
        self.models = {info.id: self.used_models.get(info.id, info) for info in infos}

    def look_for_models(self) -> None:
        """Ask a worker for a new list of models, at most every few seconds. It arrives later."""
        ready = [worker for worker in self.workers if worker.state == "ready"]
        if ready and time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            min(ready, key=lambda worker: len(worker.rows)).send(("models",))

    def submit(self, requests: list[RowRequest], affinity: str = "") -> RequestGroup:
        """Give rows to one worker: the one with the fewest rows.

        Args:
            requests: the rows of one HTTP request.
            affinity: names the conversation. Of several workers with the fewest rows, the one that served it last gets
                it, because its prefix cache holds the earlier turns.

        Raises:
            PoolFull: the rows do not all fit beside what waits.
            NoWorker: no worker is running.
        """
        ready = [worker for worker in self.workers if worker.state == "ready"]
        if not ready:
            raise NoWorker
        last = self._affinities.get(affinity)
        worker = min(ready, key=lambda worker: (len(worker.rows), worker.number != last))
        if len(worker.rows) + len(requests) > self.capacity:
            raise PoolFull
        self._affinities[affinity] = worker.number
        self._affinities.move_to_end(affinity)
        if len(self._affinities) > MAX_AFFINITIES:
            self._affinities.popitem(last=False)
        group = RequestGroup(requests, worker)
        for request in requests:
            self.used_models.setdefault(request.model.id, request.model)
            worker.rows[request.id] = group
            worker.send(("submit", request))
        return group

    def stats(self) -> dict[str, float]:
        """Return the counts and current values of all workers together, counts of processes that died included."""
        total: dict[str, float] = {}
        for worker in self.workers:
            for counts in (worker.past, worker.stats):
                for name, value in counts.items():
                    total[name] = total.get(name, 0) + value
        return {**total, "restarts_total": sum(worker.restarts for worker in self.workers), "rows": self.rows}
