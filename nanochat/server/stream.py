"""Server-sent events, and clients that disconnect."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanochat.server.protocol import ApiError, to_bytes

# of silence, after which a stream sends a comment, so that nothing on the way closes the connection
PING_SECONDS = 10.0

R = TypeVar("R")


class ClientDisconnected(Exception):
    """The client closed the connection."""


async def unless_disconnected(receive: Receive, work: Awaitable[R]) -> R:
    """Return what `work` returns. If the client disconnects first, cancel it and raise ClientDisconnected."""
    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        for future in (task, watcher):
            future.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await future


class EventStream(Response):
    """A response of server-sent events.

    Args:
        lines: the data of each event: a JSON value, or bytes that are sent as they are. An ApiError that it raises
            becomes the last event.
        close: called at the end, also if the client disconnects.
    """

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncIterator[Any], close: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.lines, self.close, self.silent = lines, close, True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientDisconnected):
                await unless_disconnected(receive, self._send(send))
        finally:
            self.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pinger = asyncio.ensure_future(self._ping(send))
        try:
            async for line in self.lines:
                self.silent = False
                await self._send_line(send, line)
        except ApiError as error:
            await self._send_line(send, error.body)
        finally:
            pinger.cancel()
        await send({"type": "http.response.body", "body": b""})

    async def _ping(self, send: Send) -> None:
        while True:
            self.silent = True
            await asyncio.sleep(PING_SECONDS)
            if self.silent:
                await send({"type": "http.response.body", "body": b": still there\n\n", "more_body": True})

    @staticmethod
    async def _send_line(send: Send, line: Any) -> None:
        data = line if isinstance(line, bytes) else to_bytes(line)
        await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})
