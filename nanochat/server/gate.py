"""The outermost middleware: check host, API key, origin and size of each request; add security headers; count.

Plain ASGI. Only request bodies are buffered, up to their limit; streams pass through.
"""

import asyncio
import hashlib
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.server.protocol import ApiError, to_bytes
from nanochat.server.serving import Serving

PAGE_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
               "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
               "require-trusted-types-for 'script'; trusted-types nanochat dompurify")
DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PUBLIC = ("/", "/health", "/v1/models", "/favicon.ico")
# paths that metrics name; all others count as one
ROUTES = (*PUBLIC, "/metrics", "/openapi.json", "/docs", "/v1/chat/completions", "/v1/completions")
BODY_SECONDS = 30.0  # a body must arrive within them
# of a body that is too large, so many times the limit is read and discarded, because a client that is cut off while it
# sends does not read the error
DISCARD_TIMES = 16


class Gate:
    """The middleware."""

    def __init__(self, app: ASGIApp, serving: Serving):
        config = serving.config
        self.app, self.serving, self.config = app, serving, config
        self.origins = {origin.strip().rstrip("/") for origin in config.cors.split(",") if origin.strip()}
        self.key = hashlib.sha256(config.api_key.encode()).digest() if config.api_key else None
        self.hosts = None
        # against DNS rebinding: any page could let its name resolve to 127.0.0.1
        if config.host in LOOPBACK and self.key is None:
            names = (name.strip().lower() for name in config.allow_host.split(",") if name.strip())
            self.hosts = {*LOOPBACK, config.host, *names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, headers = scope["path"], Headers(scope=scope)
        origin = headers.get("origin", "")
        allowed = origin if origin in self.origins else "*" if "*" in self.origins and origin else ""
        route = path if path in ROUTES else "/static" if path.startswith("/static/") else "other"
        started = False

        async def send_checked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.serving.metrics.requests.labels(route, message["status"]).inc()
                out = MutableHeaders(scope=message)
                out["X-Content-Type-Options"] = "nosniff"
                out["Referrer-Policy"] = "no-referrer"
                out["X-Frame-Options"] = "DENY"
                out["Cross-Origin-Resource-Policy"] = "cross-origin" if allowed else "same-origin"
                out.setdefault("Content-Security-Policy", PAGE_POLICY if route in ("/", "/static") else DATA_POLICY)
                if self.origins:
                    out.add_vary_header("Origin")
                if allowed:
                    out["Access-Control-Allow-Origin"] = allowed
                    out["Access-Control-Expose-Headers"] = "Retry-After"
            await send(message)

        try:
            if allowed and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                names = ["Authorization", "Content-Type", "X-Requested-With", *self._client_headers(headers)]
                await self._send(send_checked, 204, b"", {
                    "Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": "600",
                    "Access-Control-Allow-Headers": ", ".join(names)})
                return
            self._check(scope, path, headers)
            if scope["method"] == "POST":
                receive = await self._body(headers, receive)
            await self.app(scope, receive, send_checked)
        except ApiError as error:
            if started:
                raise
            await self._send(send_checked, error.status, to_bytes(error.body),
                             {"Content-Type": "application/json", **error.headers})
        except Exception:
            self.serving.metrics.requests.labels(route, 500).inc()
            raise

    @staticmethod
    async def _send(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        if status != 204:
            raw.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body})

    @staticmethod
    def _client_headers(headers: Headers) -> list[str]:
        """Return the headers of OpenAI's client that a browser asks permission to send."""
        names = [name.strip().lower() for name in headers.get("access-control-request-headers", "").split(",")]
        return [name for name in names if name.startswith("x-stainless-") and name.replace("-", "").isalnum()]

    def _check(self, scope: Scope, path: str, headers: Headers) -> None:
        """Raise ApiError for a request from a wrong host or without the API key."""
        if self.hosts is not None and self._host(headers) not in self.hosts:
            raise ApiError("this server is reached under another name; start it with --allow-host to give it this one",
                           403, code="host_not_allowed")
        if self.key is None or path in PUBLIC or path.startswith("/static/"):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogatepass")).digest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest, self.key):
            raise ApiError("this server needs an API key: send the header Authorization: Bearer KEY" if not given else
                           "this is not the API key of this server", 401, code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})

    @staticmethod
    def _host(headers: Headers) -> str:
        try:
            return (urlsplit(f"//{headers.get('host', '')}").hostname or "").lower()
        except ValueError:
            return ""

    async def _body(self, headers: Headers, receive: Receive) -> Receive:
        """Read the whole body. Return a `receive` that gives it again, and then the messages after it.

        Raises ApiError if the body is too large or too slow.
        """
        limit = self.config.max_body_bytes
        too_large = ApiError(f"the body is too large; the limit is {limit:,} bytes (--max-body-bytes)",
                             code="body_too_large", headers={"Connection": "close"})
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > DISCARD_TIMES * limit:
            raise too_large
        parts, size = [], 0

        async def read() -> None:
            nonlocal size
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError("the client went away")
                size += len(message.get("body", b""))
                if size <= limit:
                    parts.append(message.get("body", b""))
                more = message.get("more_body", False) and size <= DISCARD_TIMES * limit
            if size > limit:
                raise too_large

        try:
            await asyncio.wait_for(read(), BODY_SECONDS)
        except (TimeoutError, asyncio.TimeoutError):
            raise ApiError(f"the body did not come within {BODY_SECONDS:g} seconds",
                           headers={"Connection": "close"}) from None
        body: bytes | None = b"".join(parts)

        async def again() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message, body = {"type": "http.request", "body": body, "more_body": False}, None
            return message

        return again
