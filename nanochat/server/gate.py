"""What every request passes, and every answer: hosts, keys, origins, sizes; security headers; the count of answers.

Plain ASGI: nothing is buffered but the body of a request, up to its limit.
"""

import asyncio
import hashlib
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.server.protocol import ApiError, to_bytes
from nanochat.server.serving import Serving

PAGE_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; font-src 'self'; "
               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
               "trusted-types nanochat dompurify")
DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PUBLIC = ("/", "/health", "/v1/models", "/favicon.ico")
ROUTES = (*PUBLIC, "/metrics", "/openapi.json", "/docs", "/v1/chat/completions", "/v1/completions")  # the others count as one
BODY_SECONDS = 30.0
READ_ON = 16  # times the limit: so much is read and thrown away, since a client that is cut off while it sends does not read why


class Gate:
    """The outermost layer of the app."""

    def __init__(self, app: ASGIApp, serving: Serving):
        config = serving.config
        self.app, self.serving, self.config = app, serving, config
        self.origins = {origin.strip().rstrip("/") for origin in config.cors.split(",") if origin.strip()}
        self.key = hashlib.sha256(config.api_key.encode()).digest() if config.api_key else None
        self.hosts = None
        if config.host in LOOPBACK and self.key is None:  # else any page could name itself 127.0.0.1 (DNS rebinding)
            self.hosts = {*LOOPBACK, config.host, *(name.strip().lower() for name in config.allow_host.split(",") if name.strip())}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, headers = scope["path"], Headers(scope=scope)
        origin = headers.get("origin", "")
        allowed = origin if origin in self.origins else "*" if "*" in self.origins and origin else ""
        route = path if path in ROUTES else "/static" if path.startswith("/static/") else "other"
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
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
                names = ["Authorization", "Content-Type", "X-Requested-With", *self._asked(headers)]
                await self._send(answer, 204, b"", {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": "600",
                                                    "Access-Control-Allow-Headers": ", ".join(names)})
                return
            self._check(scope, path, headers)
            if scope["method"] == "POST":
                receive = await self._body(headers, receive)
            await self.app(scope, receive, answer)
        except ApiError as error:
            if begun:
                raise
            await self._send(answer, error.status, to_bytes(error.body), {"Content-Type": "application/json", **error.headers})
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
    def _asked(headers: Headers) -> list[str]:
        """Headers that a browser asks to send: those of OpenAI's client among them."""
        names = [name.strip().lower() for name in headers.get("access-control-request-headers", "").split(",")]
        return [name for name in names if name.startswith("x-stainless-") and name.replace("-", "").isalnum()]

    def _check(self, scope: Scope, path: str, headers: Headers) -> None:
        """Raise ApiError for a request that may not be."""
        if self.hosts is not None and self._host(headers) not in self.hosts:
            raise ApiError("this server is reached under another name; start it with --allow-host to give it this one", 403,
                           code="host_not_allowed")
        if self.key is None or path in PUBLIC or path.startswith("/static/"):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogatepass")).digest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest, self.key):
            raise ApiError("this server needs an API key: send the header Authorization: Bearer KEY" if not given else
                           "this is not the API key of this server", 401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    @staticmethod
    def _host(headers: Headers) -> str:
        try:
            return (urlsplit(f"//{headers.get('host', '')}").hostname or "").lower()
        except ValueError:
            return ""

    async def _body(self, headers: Headers, receive: Receive) -> Receive:
        """Read the body; return a `receive` that gives it, and then what comes. Raises ApiError where it is too large, or slow."""
        limit = self.config.max_body_bytes
        too_large = ApiError(f"the body is too large; the limit is {limit:,} bytes (--max-body-bytes)", code="body_too_large",
                             headers={"Connection": "close"})
        said = headers.get("content-length", "0")
        if not said.isdecimal() or len(said) > 15 or int(said) > READ_ON * limit:
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
                more = message.get("more_body", False) and size <= READ_ON * limit
            if size > limit:
                raise too_large

        try:
            await asyncio.wait_for(read(), BODY_SECONDS)
        except (TimeoutError, asyncio.TimeoutError):
            raise ApiError(f"the body did not come within {BODY_SECONDS:g} seconds", headers={"Connection": "close"}) from None
        body: bytes | None = b"".join(parts)

        async def again() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message, body = {"type": "http.request", "body": body, "more_body": False}, None
            return message

        return again
