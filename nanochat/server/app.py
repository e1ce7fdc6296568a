"""The app: its routes, its errors in OpenAI's shape; and its life, from the start of the workers to the last answer.

    asyncio.run(serve(WorkerConfig(source="sft"), ["cpu"], ServerConfig(port=8000)))        # what scripts/chat_web.py does
"""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from nanochat.errors import UserError
from nanochat.server import docs
from nanochat.server.chat import chat
from nanochat.server.completions import completion
from nanochat.server.gate import Gate
from nanochat.server.pool import Pool
from nanochat.server.protocol import ApiError, ChatRequest, CompletionRequest, from_validation, to_bytes
from nanochat.server.serving import Gone, ServerConfig, Serving, unless_gone
from nanochat.server.worker import WorkerConfig

STATIC = Path(__file__).parent / "static"
LATER = 5.0  # seconds that answers which were told to end, at the end, have for it

ERROR = {"type": "object", "required": ["error"], "properties": {"error": {
    "type": "object", "required": ["message", "type", "param", "code"], "properties": {
        "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]}}}}}
SAID = {400: "the request is not as it should be, or over a limit; the message says what, `param` names the field",
        401: "the API key is missing or wrong", 403: "the Host header names another host", 404: "there is no such model",
        429: "too many requests wait already; Retry-After says when to try again", 500: "the server failed",
        503: "no worker runs, the server shuts down, or the time limit of a request is over"}


class Json(Response):
    """JSON in ASCII."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_bytes(content)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": SAID[status], "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
            for status in statuses}


def _ok(*types: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": "as in OpenAI's API" if len(types) > 1 else "fine", "content": {kind: {} for kind in types}}}


def make_app(serving: Serving) -> FastAPI:
    """Return the app of a server whose pool runs."""
    app = FastAPI(title="Liquid-Time nanochat", version="1", docs_url=None, redoc_url=None, openapi_url=None,
                  description="An OpenAI-like API to a small language model. Errors are {\"error\": {message, type, param, code}}; "
                              "in a stream, such an object is the last event.")
    asked = {**_ok("application/json", "text/event-stream"), **_errors(*SAID)}

    @app.post("/v1/chat/completions", summary="Answer a conversation", responses=asked)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """The assistant's answer to a conversation; with stream, as server-sent events. It may use a calculator on the way, whose
        calls are not part of the content."""
        return await _answered(request, *await chat(serving, body))

    @app.post("/v1/completions", summary="Continue a text", responses=asked)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """How a text or a list of token ids goes on; with stream, as server-sent events."""
        return await _answered(request, *await completion(serving, body))

    @app.get("/v1/models", summary="The models there are", responses={**_ok("application/json"), **_errors(403)})
    async def models() -> Json:
        """Every id can be given as `model`."""
        serving.pool.look_for_models()
        config = serving.config
        defaults = {"temperature": config.temperature, "top_k": config.top_k, "max_tokens": config.max_tokens}
        return Json({"object": "list", "data": [
            {"id": info.id, "object": "model", "created": info.created, "owned_by": "nanochat", "context_length": info.context_length,
             "step": info.step, "chat": info.chat, "default": info.default, "description": info.description,
             "defaults": defaults}
            for info in serving.pool.models.values()]})

    @app.get("/health", summary="Is all well?", responses={**_ok("application/json"), **_errors(403), 503: {
        "description": "no worker can be given work, or the server shuts down", "content": {"application/json": {}}}})
    async def health() -> Json:
        """status: ok, degraded (some workers are down), down, stopping. queue: rows that wait."""
        workers = [{"device": worker.device, "state": worker.state, "rows": len(worker.rows), "restarts": worker.restarts}
                   for worker in serving.pool.workers]
        ready = sum(worker["state"] == "ready" for worker in workers)
        status = "stopping" if serving.draining else "ok" if ready == len(workers) else "degraded" if ready else "down"
        waiting = max(sum(max(worker["rows"] - serving.pool.config.max_rows, 0) for worker in workers), 0)
        return Json({"status": status, "workers": workers, "queue": waiting}, 200 if ready and not serving.draining else 503)

    @app.get("/metrics", summary="Counters, for Prometheus", responses={**_ok("text/plain"), **_errors(401, 403)})
    async def metrics() -> Response:
        """In Prometheus's text form."""
        return Response(serving.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Json:
        return Json(description(app))

    @app.get("/docs", include_in_schema=False)
    async def documentation() -> Response:
        return HTMLResponse(docs.page(description(app)), headers={"Content-Security-Policy": docs.POLICY})

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    app.mount("/static", Static(directory=STATIC))
    app.add_middleware(Gate, serving=serving)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Json:
        return Json(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Json:
        return Json(from_validation(list(error.errors())).body, 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Json:
        said = {404: f"there is no {request.url.path}", 405: f"{request.url.path} does not take {request.method}",
                400: "the body cannot be read as JSON"}
        return Json(ApiError(said.get(error.status_code, str(error.detail)), error.status_code).body, error.status_code,
                    dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Json:
        return Json(ApiError("the server failed on this request; its terminal says how", 500).body, 500)

    return app


async def _answered(request: Request, asked: Any, stream: Response | None) -> Response:
    """The stream of a request, or its whole answer; whose rows are cancelled when the client goes away."""
    if stream is not None:
        return stream
    try:
        return Json(await unless_gone(request.receive, asked.answer()))
    except Gone:
        return Response(status_code=499)  # nobody reads it
    finally:
        asked.run.close()


class Static(StaticFiles):
    """The page's files, looked at anew each time: they change with the server."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


def description(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description: FastAPI's, with our errors in place of its own."""
    if app.openapi_schema is None:
        app.openapi_schema = made = FastAPI.openapi(app)
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        schemas["Error"] = ERROR
        for methods in made["paths"].values():
            for about in methods.values():
                about["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
    return app.openapi_schema


# ---------------------------------------------------------------------------------------------------------------------
# Its life

class Server(uvicorn.Server):
    """Uvicorn's server, but a signal begins the end described in `serve`."""

    def __init__(self, config: uvicorn.Config, serving: Serving):
        super().__init__(config)
        self.serving, self._loop, self._ending = serving, asyncio.get_running_loop(), None

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Called by the signal."""
        self._loop.call_soon_threadsafe(self._signalled)

    def _signalled(self) -> None:
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end())
        else:  # at once
            self.should_exit = self.force_exit = True
            self._ending.cancel()

    async def _end(self) -> None:
        self.serving.draining = True
        await self._wait(self.serving.config.shutdown_seconds)
        for group in list(self.serving.groups):
            group.end("shutdown", "")
        await self._wait(LATER)
        self.should_exit = True

    async def _wait(self, seconds: float) -> None:
        """Until nothing runs any more, or the time is over."""
        end = self._loop.time() + seconds
        while self.serving.groups and self._loop.time() < end:
            await asyncio.sleep(0.02)


async def serve(worker: WorkerConfig, devices: list[str], config: ServerConfig, started: Callable[[str], None] = print) -> None:
    """Run a server until it is told to end; `started` is called with its address. Raises UserError where it cannot start.

    SIGTERM or SIGINT: new requests get 503, what runs may go on for shutdown_seconds, the rest is told and cancelled, the workers end.
    The second one ends all at once. Port 0 takes one that is free.
    """
    listener = _bind(config.host, config.port)  # first: a port that is taken should not take a minute to be told
    pool = Pool(worker, devices)
    await pool.start()
    try:
        serving = Serving(pool, config)
        await serving.model(None)
        settings = uvicorn.Config(make_app(serving), log_level="warning", access_log=False, lifespan="off", server_header=False,
                                  timeout_keep_alive=20, timeout_graceful_shutdown=2)
        server = Server(settings, serving)
        running = asyncio.ensure_future(server.serve([listener]))
        while not server.started and not running.done():
            await asyncio.sleep(0.02)
        host, port = listener.getsockname()[:2]
        started(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        await running
    finally:
        await pool.stop()
        listener.close()


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(f"cannot listen on {host} port {port}: {str(error).rstrip('.')}. --port takes another.") from None
    return listener
