"""A server on this machine that answers like the Hugging Face hub and fails like a network, on request."""

import gzip
import hashlib
import json
import threading
import urllib.parse
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import close_session, constants

from nanochat import transfer

COMMIT, NEWER = "a" * 40, "b" * 40
PAGE = b"<html><title>Welcome</title>Please sign in to the network</html>"
CUT = 70_000  # bytes after which a connection breaks off


class Hub(ThreadingHTTPServer):
    """Serves `files` of one repository at `commit`, by way of a store, and any of them at /plain/NAME.

    faults: {name: [what to do at the first GET of its bytes, at the second, ...]}; see Handler.send_file.
    api_faults: the same for calls of the API. gates: {name: event that its bytes wait for}.
    asked: (name or call, headers) of each request.
    """

    def __init__(self, repo, files, kind="datasets"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repo, self.files, self.kind = repo, files, kind
        self.faults, self.asked, self.commit, self.api_faults = {}, [], COMMIT, []
        self.commits = {COMMIT}  # whose files it has
        self.gates, self.over, self.etags = {}, threading.Event(), True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self, name):
        return [headers.get("Range") for path, headers in self.asked if path == name]

    def is_lfs(self, name):
        return name.endswith((".parquet", ".pt"))

    def listed(self, name):
        data = self.files[name]
        about = {"size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        if self.is_lfs(name):
            about["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "sha256": hashlib.sha256(data).hexdigest(),
                            "size": len(data), "pointerSize": 134}
        return about

    def handle_error(self, request, client_address):
        pass  # clients that go away are part of the tests


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fails(self, fault):
        """Answer as a fault that a file and a call of the API can have; return whether this is one."""
        if isinstance(fault, int):
            self.answer(fault)
        elif isinstance(fault, tuple):  # (status, what Retry-After says)
            self.answer(fault[0], Retry_After=fault[1])
        elif fault == "html":
            self.answer(200, PAGE, Content_Type="text/html; charset=utf-8")
        elif fault == "loop":
            self.answer(302, Location=self.path)
        elif fault == "nothing":
            self.close_connection = True
            self.connection.shutdown(2)
        else:
            return False
        return True

    def do_POST(self):
        hub = self.server
        fields = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        assert self.path == f"/api/datasets/{hub.repo}/paths-info/{COMMIT}"
        hub.asked.append(("paths-info", self.headers))
        if hub.api_faults and self.fails(hub.api_faults.pop(0)):
            return
        self.answer(200, json.dumps([{"type": "file", "path": name, **hub.listed(name)}
                                     for name in fields["paths"] if name in hub.files]).encode(),
                    Content_Type="application/json")

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        prefix = "" if hub.kind == "models" else f"{hub.kind}/"
        if path.startswith(f"/api/{hub.kind}/{hub.repo}"):
            hub.asked.append(("info", self.headers))
            if hub.api_faults and self.fails(hub.api_faults.pop(0)):
                return None
            revision = path.partition("/revision/")[2] or "main"
            if revision not in ("main", COMMIT, NEWER):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            siblings = [{"rfilename": name, "blobId": about.pop("oid"), **about}
                        for name in hub.files if (about := hub.listed(name))] if hub.kind == "models" else []
            info = {"id": hub.repo, "sha": hub.commit, "siblings": siblings, "private": False, "disabled": False,
                    "downloads": 0, "likes": 0, "tags": []}
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        resolve = f"/{prefix}{hub.repo}/resolve/"
        if path.startswith(resolve):  # the hub sends on to its store
            commit, name = urllib.parse.unquote(path.removeprefix(resolve)).split("/", 1)
            if name not in hub.files or commit not in hub.commits:
                return self.answer(404, X_Error_Code="EntryNotFound")
            return self.answer(302, Location=f"/store/{name}", X_Repo_Commit=commit,
                               X_Linked_Size=len(hub.files[name]),
                               X_Linked_Etag=f'"{hashlib.sha256(hub.files[name]).hexdigest()}"')
        _, where, name = path.split("/", 2)
        if where not in ("store", "plain"):
            return self.answer(404)
        hub.asked.append((name, self.headers))
        if name in hub.gates:
            assert hub.gates[name].wait(60)
        fault = (hub.faults.get(name) or [None]).pop(0)
        return None if self.fails(fault) else self.send_file(hub.files[name], fault)

    def send_file(self, data, fault):
        """Send bytes, as Range asks, with a fault:

        wrong byte, short, long: other bytes, fewer (and a Content-Length that says so), more of them.
        cut, stall: the connection breaks off or falls silent after CUT bytes. chunked cut: without a Content-Length.
        cut N: after N bytes. whole: Range is ignored. gzip: packed, though nobody asked for it.
        """
        hub, start = self.server, 0
        if fault == "wrong byte":
            data = bytes([data[0] ^ 1]) + data[1:]
        if fault == "short":
            data = data[:-1000]
        if fault == "long":
            data = data + bytes(1000)
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        if fault == "gzip":
            data = gzip.compress(data)
        asked = self.headers.get("Range")
        if asked and fault != "whole" and self.headers.get("If-Range", etag) == etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        if fault == "gzip":
            self.send_header("Content-Encoding", "gzip")
        if fault == "chunked cut":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(data) - start))
        if hub.etags:
            self.send_header("ETag", etag)
        self.end_headers()
        if fault == "chunked cut":
            self.wfile.write(b"%x\r\n" % CUT + data[start:start + CUT] + b"\r\n")
        elif fault and fault.startswith(("cut", "stall")):
            self.wfile.write(data[start:start + int(fault.partition(" ")[2] or CUT)])
        else:
            return self.wfile.write(data[start:])
        self.wfile.flush()
        if fault == "stall":
            hub.over.wait(60)
        self.close_connection = True
        return self.connection.shutdown(2)


@contextmanager
def serving_hub(monkeypatch, repo, files, kind="datasets"):
    """Run a Hub that huggingface_hub takes for the real one, with waits too short to notice."""
    server = Hub(repo, files, kind)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(transfer, "BACK_OFF", 0.001)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()  # the next one reads the settings above
    try:
        yield server
    finally:
        server.over.set()
        close_session()
        server.shutdown()
        server.server_close()
