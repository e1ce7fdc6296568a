"""A server on this machine that answers like the Hugging Face hub, and fails like a network and worse.

    python -m bench.torture.bad_hub FOLDER SEED       # writes its port to FOLDER/port

It serves three training shards and the validation shard, of random bytes that depend on the seed. Each file fails up
to twice in a way that the seed chooses. With a file FOLDER/good it behaves.
"""

import hashlib
import json
import random
import sys
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPO = "karpathy/fineweb-edu-100b-shuffle"
COMMIT = "c" * 40
NAMES = ("shard_00000.parquet", "shard_00001.parquet", "shard_00002.parquet", "shard_01822.parquet")
FAULTS = ("cut", "cut", "wrong bytes", "too short", "too long", "404", "429", "503", "stalled", "loop", "html",
          "no range", "dropped")


def shards(seed: int) -> dict[str, bytes]:
    """Return the files by name."""
    dice = random.Random(f"{seed} shards")
    return {name: dice.randbytes(100_000 + dice.randrange(200_000)) for name in NAMES}


class Hub(ThreadingHTTPServer):
    """Serves `files`; `faults` by name are used up one by one."""

    daemon_threads = True

    def __init__(self, folder: Path, seed: int):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.files, dice = folder, shards(seed), random.Random(f"{seed} faults")
        self.faults = {name: [dice.choice(FAULTS) for _ in range(dice.randrange(3))] for name in NAMES}
        self.api_faults = [dice.choice(("429", "503", "html", "dropped")) for _ in range(dice.randrange(2))]
        self.dice = dice

    def next_fault(self, faults: list[str]) -> str:
        """Return what to do wrong with this request; "" for nothing."""
        return faults.pop(0) if faults and not (self.folder / "good").exists() else ""

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing about clients that go away: some are killed on purpose."""


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def answer(self, code: int, body: bytes = b"", **headers: object) -> None:
        """Send a whole answer."""
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def misbehave(self, fault: str) -> bool:
        """Do what a fault of the whole answer is. Return False for faults of its bytes."""
        if fault in ("429", "503", "404"):
            self.answer(int(fault), **({"Retry_After": 1} if fault == "429" else {}))
        elif fault == "html":
            self.answer(200, b"<html><body>Sign in to the guest network</body></html>", Content_Type="text/html")
        elif fault == "loop":
            self.answer(302, Location=self.path)
        elif fault == "dropped":
            self.close_connection = True
            self.connection.close()
        else:
            return False
        return True

    def do_POST(self) -> None:
        """List files with their sizes and SHA-256."""
        fields = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        if self.misbehave(self.server.next_fault(self.server.api_faults)):
            return
        found = [{"type": "file", "path": name, "size": len(self.server.files[name]), "oid": "0" * 40,
                  "lfs": {"oid": hashlib.sha256(self.server.files[name]).hexdigest(),
                          "size": len(self.server.files[name]), "pointerSize": 134}}
                 for name in fields["paths"] if name in self.server.files]
        self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        """Name the commit, or send a file."""
        if self.path.startswith("/api/"):
            if not self.misbehave(self.server.next_fault(self.server.api_faults)):
                info = {"id": REPO, "sha": COMMIT, "siblings": [], "private": False, "disabled": False, "downloads": 0,
                        "likes": 0, "tags": []}
                self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            return
        name = self.path.rsplit("/", 1)[-1]
        if name not in self.server.files:
            self.answer(404, X_Error_Code="EntryNotFound")
            return
        data, fault = self.server.files[name], self.server.next_fault(self.server.faults[name])
        if self.misbehave(fault):
            return
        self.send_file(data, fault)

    def send_file(self, data: bytes, fault: str) -> None:
        """Send a file, from where it is asked for, with what is wrong with its bytes."""
        dice, start = self.server.dice, 0
        if fault == "wrong bytes":
            place = dice.randrange(len(data))
            data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1:]
        data = data[:-1 - dice.randrange(999)] if fault == "too short" else data
        data = data + b"more" if fault == "too long" else data
        asked = self.headers.get("Range")
        if asked and fault != "no range":
            start = min(int(asked.removeprefix("bytes=").removesuffix("-")), len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.end_headers()
        end = len(data) if fault not in ("cut", "stalled") else start + dice.randrange(len(data) - start + 1)
        for at in range(start, end, 20_000):
            self.wfile.write(data[at:min(at + 20_000, end)])
            time.sleep(0.01)  # so that a client can be killed in the middle
        self.wfile.flush()
        if fault in ("cut", "stalled"):
            time.sleep(2 if fault == "stalled" else 0)
            self.close_connection = True
            self.connection.shutdown(2)


def main() -> None:
    """Serve until killed."""
    folder = Path(sys.argv[1])
    hub = Hub(folder, int(sys.argv[2]))
    part = folder / ".port"
    part.write_text(str(hub.server_port))
    part.rename(folder / "port")
    hub.serve_forever(0.05)


if __name__ == "__main__":
    main()
