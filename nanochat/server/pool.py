"""The server's side of its workers: starts them, hands rows out, passes on what happens, and starts again those that die.

    pool = Pool(config, devices=["cuda:0", "cuda:1"])
    await pool.start()
    group = pool.submit([Ask(...), ...], about="who is asking")      # all on one worker; raises Busy or Down
    async for event in group: ...                                    # until each has ended
    group.close()                                                    # cancels those that have not

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
from nanochat.server.messages import Event
from nanochat.server.worker import Ask, ModelInfo, WorkerConfig, run_worker

BACK_OFF = (0.2, 1.0, 5.0, 15.0, 30.0)  # seconds before a worker that died is started again; the last one stays
STEADY = 60.0                           # seconds a worker has to live for the next death to count as the first again
REMEMBERED = 10_000                     # conversations of which it is known who served them


class Busy(Exception):
    """As much waits as may."""


class Down(Exception):
    """No worker runs at the moment."""


class Group:
    """Rows on their way that are one client's: iterate over their events; the last one of each row is of kind "ended"."""

    def __init__(self, asks: list[Ask], worker: "Worker"):
        self.asks, self.worker = asks, worker
        self.left = {ask.id for ask in asks}           # rows whose end has not been told
        self.now = time.monotonic()                    # when the event that was taken last came
        self._events: asyncio.Queue[tuple[float, Event]] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """Take an event in."""
        if event.id in self.left:
            if event.kind == "ended":
                self.left.discard(event.id)
            self._events.put_nowait((time.monotonic(), event))

    def __aiter__(self) -> "Group":
        return self

    async def __anext__(self) -> Event:
        if not self.left and self._events.empty():
            raise StopAsyncIteration
        self.now, event = await self._events.get()
        return event

    def cancel(self, id: str) -> None:
        """Cancel a row. It counts as the worker's until that says that it has ended; here nothing more is told of it."""
        if id in self.left:
            self.left.discard(id)
            self.worker.send(("cancel", id))

    def close(self) -> None:
        """Cancel all rows that have not ended."""
        for id in list(self.left):
            self.cancel(id)

    def end(self, finish: str, message: str) -> None:
        """Cancel all rows that have not ended, and let whoever listens know why."""
        for id in list(self.left):
            self.put(Event(id, "ended", finish=finish, message=message))
            self.worker.send(("cancel", id))


class Worker:
    """One worker process, and those that come after it on the same device."""

    def __init__(self, pool: "Pool", number: int, config: WorkerConfig):
        self.pool, self.number, self.config = pool, number, config
        self.state = "starting"  # ready, restarting, failed, stopped
        self.device, self.message = config.device, ""
        self.rows: dict[str, Group] = {}   # by id: rows it has been given and has not ended
        self.stats: dict[str, float] = {}
        self.past: dict[str, float] = {}   # counts of the processes that died
        self.restarts, self.deaths = 0, 0  # in all; since it last ran steadily
        self.since = time.monotonic()
        self.process: multiprocessing.process.BaseProcess | None = None
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()

    # ---- the process

    def start(self) -> None:
        """Start a process. It tells when it is ready."""
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        self.process = context.Process(target=run_worker, args=(there, self.config), name=f"nanochat-worker-{self.number}", daemon=True)
        self.process.start()
        there.close()
        self.since, self._outbox = time.monotonic(), queue.SimpleQueue()
        threading.Thread(target=self._write, args=(here, self._outbox), daemon=True).start()
        threading.Thread(target=self._read, args=(here, self.process, asyncio.get_running_loop()), daemon=True).start()

    @staticmethod
    def _write(pipe: Any, outbox: queue.SimpleQueue) -> None:
        while (message := outbox.get()) is not None:
            with suppress(OSError):  # it died; the reader finds out
                pipe.send(message)

    def _read(self, pipe: Any, process: Any, loop: asyncio.AbstractEventLoop) -> None:
        def tell(what: Callable, *about: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                loop.call_soon_threadsafe(what, process, *about)

        try:
            while True:
                tell(self._heard, pipe.recv())
        except Exception:  # the end of the pipe, or the half of a message
            process.kill()
            process.join()
            tell(self._died)

    def send(self, message: tuple) -> None:
        """Send a message, some time soon."""
        self._outbox.put(message)

    def stop(self) -> None:
        """End it, whatever it does."""
        self.state = "stopped"
        self._outbox.put(None)
        if self.process is not None:
            self.process.kill()

    def _heard(self, process: Any, message: tuple) -> None:
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
            self.pool.asked.clear()  # what it has loaded now may be newer
            self.pool.took_models(rest[0])
            self.device = rest[1]
            self.pool.changed.set()
        elif what == "models":
            self.pool.took_models(rest[0])
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
            group.put(Event(id, "ended", finish="error", message="the process that computed this answer ended; try again"))
        if self.state == "starting":  # the very first start: there is somebody who waits for it, and is told
            self.state, self.message = "failed", "a worker ended before it was ready; what it printed says why"
        elif self.state != "failed" or self.restarts:
            self.deaths = 1 if time.monotonic() - self.since > STEADY else self.deaths + 1
            self.restarts += 1
            self.state = "restarting"
            delay = BACK_OFF[min(self.deaths, len(BACK_OFF)) - 1]
            asyncio.get_running_loop().call_later(delay, self._start_again)
        self.pool.changed.set()

    def _start_again(self) -> None:
        if self.state == "restarting":
            self.start()


class Pool:
    """All workers of a server."""

    def __init__(self, config: WorkerConfig, devices: list[str]):
        self.config = config
        self.workers = [Worker(self, i, replace(config, device=device)) for i, device in enumerate(devices)]
        self.capacity = config.max_rows + config.max_waiting  # rows a worker takes
        self.models: dict[str, ModelInfo] = {}
        self.asked: dict[str, ModelInfo] = {}           # of these, those that were used: what their ids mean stays
        self.changed = asyncio.Event()
        self._served: OrderedDict[str, int] = OrderedDict()
        self._looked = time.monotonic()

    async def start(self) -> None:
        """Start all, and return when each has its model loaded. Raises UserError where one cannot; then none is left."""
        atexit.register(self._kill)  # before multiprocessing's own, which would wait for them
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
        """End all processes."""
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

    def took_models(self, infos: list[ModelInfo]) -> None:
        """Take the models that a worker found. One that is known stays what it is, as long as it is there."""
        self.models = {info.id: self.asked.get(info.id, info) for info in infos}

    def look_for_models(self) -> None:
        """Have the list of models made anew, some time soon; at most every few seconds."""
        ready = [worker for worker in self.workers if worker.state == "ready"]
        if ready and time.monotonic() - self._looked > 5:
            self._looked = time.monotonic()
            min(ready, key=lambda worker: len(worker.rows)).send(("models",))

    def submit(self, asks: list[Ask], about: str = "") -> Group:
        """Hand rows to the worker with the least to do; of several, to the one that served `about` last. Raises Busy where they do not all
        fit beside what waits, Down where no worker runs."""
        ready = [worker for worker in self.workers if worker.state == "ready"]
        if not ready:
            raise Down
        last = self._served.get(about)
        worker = min(ready, key=lambda worker: (len(worker.rows), worker.number != last))
        if len(worker.rows) + len(asks) > self.capacity:
            raise Busy
        self._served[about] = worker.number
        self._served.move_to_end(about)
        if len(self._served) > REMEMBERED:
            self._served.popitem(last=False)
        group = Group(asks, worker)
        for ask in asks:
            self.asked.setdefault(ask.model.id, ask.model)
            worker.rows[ask.id] = group
            worker.send(("submit", ask))
        return group

    def stats(self) -> dict[str, float]:
        """The workers' counts together, of those that died too."""
        total: dict[str, float] = {}
        for worker in self.workers:
            for counts in (worker.past, worker.stats):
                for name, value in counts.items():
                    total[name] = total.get(name, 0) + value
        return {**total, "restarts_total": sum(worker.restarts for worker in self.workers), "rows": self.rows}
