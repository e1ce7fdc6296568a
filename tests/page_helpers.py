"""A scripted server in place of the real one: the page's files with the same headers, and answers that tests write.

    server.script["hello"] = [["Good ", "day"]]     # the pieces of the answer to hello; further lists: to it again

A piece is text, bytes (sent as they are), or one of Tool, GATE (wait until the test opens it), FOREVER (go on until
stopped), DIE (the connection breaks), Finish, Extra, Fails, and as the first one Refused. What is not scripted is
echoed.
"""

import json
import select
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nanochat

STATIC = Path(nanochat.__file__).parent / "server" / "static"
CSP = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
       "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
       "require-trusted-types-for 'script'; trusted-types nanochat dompurify")
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
MODELS = [
    {"id": "sft", "object": "model", "created": 1, "owned_by": "nanochat", "context_length": 2048, "step": 700,
     "chat": True, "default": True, "description": "d4 after fine-tuning"},
    {"id": "base", "object": "model", "created": 1, "owned_by": "nanochat", "context_length": 1024, "step": 5400,
     "chat": False, "default": False, "description": "d4 before it learnt to answer"},
]
GATE, FOREVER, DIE = object(), object(), object()


@dataclass
class Tool:
    """A calculator call or its result: in each chunk as far as it has come, in the last one whole."""

    type: str
    pieces: list[str]


@dataclass
class Finish:
    """Why the answer ends, where it is not "stop"."""

    reason: str


@dataclass
class Extra:
    """The field "nanochat" of a chunk."""

    fields: dict


@dataclass
class Fails:
    """An error in the middle of the stream."""

    message: str


@dataclass
class Refused:
    """No stream: a status and OpenAI's error body."""

    status: int
    message: str
    code: str | None = None
    headers: dict = field(default_factory=dict)


CODE = """def mix(x, taps):
    \"\"\"A causal convolution.\"\"\"
    y = 0
    for k in range(3):  # taps
        y = y + taps[k] * shift(x, k)
    return gate(y)"""
RICH = [
    "Three things about **short convolutions**, and one about *attention*:\n\n",
    "1. They remember only their last inputs.\n2. They are cheap: `K − 1` vectors a layer.\n"
        "3. They sit in 13 of 20 layers.\n\n",
    f"## In code\n\n```python\n{CODE}\n```\n\n",
    "| layer | remembers |\n| --- | ---: |\n| SLC2 | 2 inputs |\n| attention | all keys and values |\n\n"
        "Seventeen of them make ",
    Tool("python", ["17*23"]), Tool("python_output", ["391"]),
    ". See the [notes](https://example.org/notes).\n\n> Small, and often wrong.",
]


def error_body(message, code=None):
    return {"error": {"message": message, "type": "error", "param": None, "code": code}}


class Gone(Exception):
    """The client has gone away."""


class Server:
    """Runs in a thread until close(). requests: (path, body, headers) of each POST; ended: how each answer ended."""

    def __init__(self):
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"server_of": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/"
        self.reset()
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def reset(self):
        self.script, self.requests, self.ended, self.models, self.down = {}, [], [], MODELS, False
        self.gate = threading.Event()

    def close(self):
        self.gate.set()
        self._http.shutdown()
        self._http.server_close()

    def pieces(self, text: str) -> list:
        answers = self.script.get(text)
        if answers is None:
            return ["You said: ", text]
        with self.lock:
            return answers.pop(0) if len(answers) > 1 else answers[0]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_of: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/v1/models":
            if self.server_of.down:
                return self._json(503, error_body("The server is starting."))
            return self._json(200, {"object": "list", "data": self.server_of.models})
        file = STATIC / (path.removeprefix("/static/") if path != "/" else "index.html")
        if not file.is_file() or STATIC not in file.resolve().parents:
            return self._json(404, error_body("not found"))
        self._send(200, file.read_bytes(),
                   {"Content-Type": TYPES.get(file.suffix, "text/plain"), "Content-Security-Policy": CSP,
                                            "X-Content-Type-Options": "nosniff", "Cache-Control": "max-age=600"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server_of.requests.append((self.path, body, dict(self.headers)))
        asked = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        pieces = self.server_of.pieces(asked)
        if pieces and isinstance(pieces[0], Refused):
            refused = pieces[0]
            return self._json(refused.status, error_body(refused.message, refused.code), refused.headers)
        try:
            self._stream(pieces, body)
            self.server_of.ended.append("done")
        except (Gone, OSError):
            self.close_connection = True
            self.server_of.ended.append("gone")

    # ---- streaming

    def _stream(self, pieces, body):
        self.chat = "messages" in body
        self.send_response(200)
        for name, value in {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked",
                            "Cache-Control": "no-store"}.items():
            self.send_header(name, value)
        self.end_headers()
        finish, words = "stop", 0
        if self.chat:
            self._chunk({"role": "assistant", "content": ""})
        for piece in pieces:
            words += 1
            if isinstance(piece, str):
                self._text(piece)
            elif isinstance(piece, bytes):
                self._write(piece)
            elif isinstance(piece, Tool):
                for n in [*range(1, len(piece.pieces) + 1), len(piece.pieces)]:
                    self._chunk({}, nanochat={"tool": {"type": piece.type, "text": "".join(piece.pieces[:n])}})
            elif isinstance(piece, Extra):
                self._chunk({}, nanochat=piece.fields)
            elif isinstance(piece, Finish):
                finish = piece.reason
            elif isinstance(piece, Fails):
                return self._write(f"data: {json.dumps(error_body(piece.message))}\n\n".encode(), True)
            elif piece is GATE:
                while not self.server_of.gate.wait(0.01):
                    self._still_there()
            elif piece is FOREVER:
                while True:
                    self._text("on and ")
                    time.sleep(0.005)
                    self._still_there()
            elif piece is DIE:
                self.connection.shutdown(socket.SHUT_RDWR)
                raise Gone
        timings = {"prompt_tokens": 12, "cached_tokens": 0, "completion_tokens": words, "first_token_seconds": 0.05,
                   "tokens_per_second": 61.4, "context_used": 410 + words, "context_length": 2048}
        self._chunk({}, finish=finish, nanochat={"timings": timings})
        usage = {"prompt_tokens": 12, "completion_tokens": words, "total_tokens": 12 + words}
        self._write(f"data: {json.dumps({'id': 'a', 'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode(),
                    True)

    def _text(self, text):
        self._chunk({"content": text})

    def _chunk(self, delta, finish=None, nanochat=None):
        choice = {"index": 0, "finish_reason": finish,
                  **({"delta": delta} if self.chat else {"text": delta.get("content", "")})}
        chunk = {"id": "a", "object": "chat.completion.chunk" if self.chat else "text_completion", "created": 1,
                 "model": "sft", "choices": [choice], **({"nanochat": nanochat} if nanochat else {})}
        self._write(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode())

    def _write(self, data: bytes, last=False):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) + (b"0\r\n\r\n" if last else b""))
        self.wfile.flush()

    def _still_there(self):
        if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
            raise Gone

    # ---- whole answers

    def _json(self, status, value, headers=()):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **dict(headers)})

    def _send(self, status, data, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
