"""The HTTP application: its routes, its errors in OpenAI's shape, and `serve`, which runs it until the shutdown.

    asyncio.run(serve(WorkerConfig(source="sft"), ["cpu"], ServerConfig(port=8000)))    # what scripts/chat_web.py does
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
from nanochat.server.messages import WorkerConfig
from nanochat.server.pool import Pool
from nanochat.server.protocol import ApiError, ChatRequest, CompletionRequest, from_validation, to_bytes
from nanochat.server.serving import ServerConfig, Serving
from nanochat.server.stream import ClientDisconnected, unless_disconnected

STATIC = Path(__file__).parent / "static"
CLOSE_SECONDS = 5.0  # at the shutdown, for responses that were ended to reach their clients

ERROR = {"type": "object", "required": ["error"], "properties": {"error": {
    "type": "object", "required": ["message", "type", "param", "code"], "properties": {
        "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]}}}}}
STATUSES = {
    400: "the request is invalid or over a limit; the message says why, `param` names the field",
    401: "the API key is missing or wrong", 403: "the Host header names another host", 404: "there is no such model",
    429: "the queue is full; Retry-After says when to try again", 500: "the server failed",
    503: "no worker runs, the server shuts down, or the request took longer than the time limit"}


class JsonResponse(Response):
    """JSON in ASCII, which can hold any text, lone surrogates included."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_bytes(content)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": STATUSES[status], "content": content} for status in statuses}


def _ok(*types: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": "as in OpenAI's API" if len(types) > 1 else "fine",
                  "content": {kind: {} for kind in types}}}


def make_app(serving: Serving) -> FastAPI:
    """Return the application of a server whose workers run."""
    app = FastAPI(title="Liquid-Time nanochat", version="1", docs_url=None, redoc_url=None, openapi_url=None,
                  description="An OpenAI-like API to a small language model. Errors are "
                              "{\"error\": {message, type, param, code}}; in a stream, such an object is the last "
                              "event.")
    responses = {**_ok("application/json", "text/event-stream"), **_errors(*STATUSES)}

    @app.post("/v1/chat/completions", summary="Answer a conversation", responses=responses)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """The assistant's answer to a conversation; with stream, as server-sent events. The model may call a
        calculator; these calls are not part of the content."""
        return await _respond(request, *await chat(serving, body))

    @app.post("/v1/completions", summary="Continue a text", responses=responses)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """The continuation of a text or a list of token ids; with stream, as server-sent events."""
        return await _respond(request, *await completion(serving, body))

    @app.get("/v1/models", summary="List the models", responses={**_ok("application/json"), **_errors(403)})
    async def models() -> JsonResponse:
        """Each id can be sent as `model`."""
        serving.pool.look_for_models()
        config = serving.config
        defaults = {"temperature": config.temperature, "top_k": config.top_k, "max_tokens": config.max_tokens}
        return JsonResponse({"object": "list", "data": [
            {"id": info.id, "object": "model", "created": info.created, "owned_by": "nanochat",
             "context_length": info.context_length, "step": info.step, "chat": info.chat, "default": info.default,
             "description": info.description, "defaults": defaults}
            for info in serving.pool.models.values()]})

    @app.get("/health", summary="State of the server", responses={**_ok("application/json"), **_errors(403), 503: {
        "description": "no worker is ready, or the server shuts down", "content": {"application/json": {}}}})
    async def health() -> JsonResponse:
        """status: ok, degraded (some workers are down), down, or stopping. queue: rows that wait."""
        workers = [{"device": worker.device, "state": worker.state, "rows": len(worker.rows),
                    "restarts": worker.restarts}
                   for worker in serving.pool.workers]
        ready = sum(worker["state"] == "ready" for worker in workers)
        status = "stopping" if serving.draining else "ok" if ready == len(workers) else "degraded" if ready else "down"
        waiting = max(sum(max(worker["rows"] - serving.pool.config.max_rows, 0) for worker in workers), 0)
        return JsonResponse({"status": status, "workers": workers, "queue": waiting},
                            200 if ready and not serving.draining else 503)

    @app.get("/metrics", summary="Counters, for Prometheus", responses={**_ok("text/plain"), **_errors(401, 403)})
    async def metrics() -> Response:
        """In Prometheus's text form."""
        return Response(serving.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JsonResponse:
        return JsonResponse(description(app))

    @app.get("/docs", include_in_schema=False)
    async def documentation() -> Response:
        return HTMLResponse(docs.page(description(app)), headers={"Content-Security-Policy": docs.POLICY})

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    app.mount("/static", Static(directory=STATIC))
    app.add_middleware(Gate, serving=serving)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JsonResponse:
        return JsonResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JsonResponse:
        return JsonResponse(from_validation(list(error.errors())).body, 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JsonResponse:
        messages = {404: f"there is no {request.url.path}", 405: f"{request.url.path} does not take {request.method}",
                    400: "the body cannot be read as JSON"}
        message = messages.get(error.status_code, str(error.detail))
        return JsonResponse(ApiError(message, error.status_code).body, error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JsonResponse:
        return JsonResponse(ApiError("the server failed on this request; its terminal says how", 500).body, 500)

    return app


async def _respond(request: Request, completion: Any, stream: Response | None) -> Response:
    """Return the stream, or wait for the whole answer. If the client disconnects, the request's rows are cancelled."""
    if stream is not None:
        return stream
    try:
        return JsonResponse(await unless_disconnected(request.receive, completion.answer()))
    except ClientDisconnected:
        return Response(status_code=499)  # the client has closed the connection
    finally:
        completion.generation.close()


class Static(StaticFiles):
    """The page's files. Browsers must ask for them each time, because they change with the server."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


def description(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI description: FastAPI's, with our errors in place of its own."""
    if app.openapi_schema is None:
        app.openapi_schema = schema = FastAPI.openapi(app)
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        schemas["Error"] = ERROR
        for methods in schema["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
    return app.openapi_schema


# ---------------------------------------------------------------------------------------------------------------------
# Start and shutdown

class DrainingServer(uvicorn.Server):
    """Uvicorn's server, but a signal begins the shutdown that `serve` describes."""

    def __init__(self, config: uvicorn.Config, serving: Serving):
        super().__init__(config)
        self.serving, self._loop, self._shutdown_task = serving, asyncio.get_running_loop(), None

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Handle SIGTERM or SIGINT."""
        self._loop.call_soon_threadsafe(self._signalled)

    def _signalled(self) -> None:
        if self._shutdown_task is None:
            self._shutdown_task = asyncio.ensure_future(self._drain())
        else:  # the second signal
            self.should_exit = self.force_exit = True
            self._shutdown_task.cancel()

    async def _drain(self) -> None:
        self.serving.draining = True
        await self._wait(self.serving.config.shutdown_seconds)
        for group in list(self.serving.groups):
            group.end("shutdown", "")
        await self._wait(CLOSE_SECONDS)
        self.should_exit = True

    async def _wait(self, seconds: float) -> None:
        """Wait until no request runs, at most so many seconds."""
        end = self._loop.time() + seconds
        while self.serving.groups and self._loop.time() < end:
            await asyncio.sleep(0.02)


async def serve(worker: WorkerConfig, devices: list[str], config: ServerConfig,
                started: Callable[[str], None] = print) -> None:
    """Run a server until a signal ends it.

    After SIGTERM or SIGINT, new requests get 503 and running ones have shutdown_seconds to finish. Then those that
    still run are cancelled with an error, and the workers end. A second signal ends all at once.

    Args:
        worker: what each worker serves.
        devices: one worker runs on each; "" is the best device there is.
        config: of the HTTP process. Port 0 takes a free one.
        started: called with the address when the server is ready.

    Raises:
        UserError: the server cannot start.
    """
    listener = _bind(config.host, config.port)  # before the model is loaded, so that a port in use is reported at once
    pool = Pool(worker, devices)
    await pool.start()
    try:
        serving = Serving(pool, config)
        await serving.model(None)
        settings = uvicorn.Config(make_app(serving), log_level="warning", access_log=False, lifespan="off",
                                  server_header=False, timeout_keep_alive=20, timeout_graceful_shutdown=2)
        server = DrainingServer(settings, serving)
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
        reason = str(error).rstrip(".")
        raise UserError(f"cannot listen on {host} port {port}: {reason}. --port takes another.") from None
    return listener
