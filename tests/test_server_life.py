"""The server under pressure: full, abandoned, killed, told to end; and who may ask it at all."""

import json
import signal
import socket
import threading

import httpx
import pytest

from tests import server_helpers
from tests.server_helpers import Running

LONG = {"model": "base", "prompt": "the cat", "max_tokens": 3500, "seed": 1}  # seconds of work


folder = server_helpers.folder


@pytest.fixture(scope="module")
def small(folder):
    """A server that decodes two answers and lets one wait."""
    with Running(folder, "--max-rows=2", "--max-waiting=1", "--cors=https://friend.example", "--timeout=60",
                 "--max-body-bytes=20000") as server:
        yield server


def ask(server, body, **options):
    return httpx.post(server.url + "/v1/completions", json=body, timeout=90, **options)


def begin(server, body):
    """A streamed request of which the first bytes of text have come; the open connection."""
    data = json.dumps({**body, "stream": True}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n%s" % (len(data), data))
    got = b""
    while b"data: " not in got:
        piece = connection.recv(4096)
        assert piece, got
        got += piece
    assert b" 200 " in got.split(b"\r\n")[0]
    return connection


def test_a_client_that_goes_away_frees_its_row(small):
    connection = begin(small, LONG)
    small.wait("the row runs", lambda: small.metrics()["nanochat_running"] == 1)
    connection.close()
    small.wait("the row is free", lambda: small.metrics()["nanochat_running"] == 0)
    gone = threading.Event()

    def impatient():
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(small.url + "/v1/completions", json=LONG, timeout=httpx.Timeout(60, read=1.0))
        gone.set()

    threading.Thread(target=impatient).start()  # not streamed
    small.wait("the row runs", lambda: small.metrics()["nanochat_running"] == 1 or gone.is_set())
    assert gone.wait(60)
    small.wait("the row is free", lambda: small.metrics()["nanochat_running"] == 0)
    assert ask(small, {"prompt": "the", "max_tokens": 3}).status_code == 200


def test_beyond_the_queue_there_is_429_with_retry_after_and_the_others_go_on(small):
    connections = [begin(small, {**LONG, "seed": seed}) for seed in range(2)]
    waits = threading.Thread(target=ask, args=(small, {"model": "base", "prompt": "a", "max_tokens": 2}))
    waits.start()
    small.wait("one waits", lambda: httpx.get(small.url + "/health").json()["queue"] == 1)
    refused = ask(small, {"model": "base", "prompt": "b", "max_tokens": 2})
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error" and refused.json()["error"]["message"]
    for connection in connections:
        connection.close()
    waits.join(60)
    assert not waits.is_alive() and ask(small, {"model": "base", "prompt": "b", "max_tokens": 2}).status_code == 200


def test_other_sites_may_not_use_it_unless_named(small):
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    friend = httpx.options(small.url + "/v1/completions", headers={"Origin": "https://friend.example", **asking})
    assert friend.headers["access-control-allow-origin"] == "https://friend.example"
    stranger = httpx.options(small.url + "/v1/completions", headers={"Origin": "https://evil.example", **asking})
    assert "access-control-allow-origin" not in stranger.headers
    assert httpx.get(small.url + "/v1/models", headers={"Host": "evil.example"}).status_code == 403


def test_a_body_that_is_too_large_is_refused_however_it_comes(small):
    body = json.dumps({"prompt": "a", "max_tokens": 1, "user": "x" * 30_000}).encode()
    pieces = (body[i:i + 1000] for i in range(0, len(body), 1000))
    # of a known length, of an unknown one, and so large that it is not read
    for content in (body, pieces, b"x" * 1_000_000):
        said = httpx.post(small.url + "/v1/completions", content=content, headers={"Content-Type": "application/json"},
                          timeout=60)
        assert said.status_code == 400 and "the limit is 20,000 bytes" in said.json()["error"]["message"]
    assert ask(small, {"prompt": "a", "max_tokens": 1, "user": "x" * 10_000}).status_code == 200


def test_a_worker_that_is_killed_ends_its_requests_with_an_error_and_comes_again(small):
    [worker] = small.workers()
    answers = []
    asking = threading.Thread(target=lambda: answers.append(ask(small, LONG)))
    asking.start()
    small.wait("the row runs", lambda: small.metrics()["nanochat_running"] == 1)
    worker.send_signal(signal.SIGKILL)
    asking.join(60)
    assert answers[0].status_code in (500, 503) and "try again" in answers[0].json()["error"]["message"]
    small.wait("another worker", lambda: httpx.get(small.url + "/health").json()["status"] == "ok")
    assert ask(small, {"prompt": "the", "max_tokens": 3}).status_code == 200
    assert [new.pid for new in small.workers()] != [worker.pid] and small.metrics()["nanochat_restarts_total"] == 1


@pytest.mark.long
def test_a_key_is_needed_where_one_was_set_and_a_request_has_its_time(folder):
    with Running(folder, "--api-key=secret", "--timeout=1") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"},
                        {"Authorization": "Bearer sécret"}):
            raw = {name: value.encode() for name, value in headers.items()}
            said = ask(server, {"prompt": "a", "max_tokens": 1}, headers=raw)
            assert said.status_code == 401 and "key" in said.json()["error"]["message"]
        assert httpx.get(server.url + "/metrics").status_code == 401
        for public in ("/", "/health", "/v1/models", "/static/app.js"):
            assert httpx.get(server.url + public).status_code == 200
        key = {"Authorization": "Bearer secret"}
        assert ask(server, {"prompt": "a", "max_tokens": 1}, headers=key).status_code == 200
        late = ask(server, LONG, headers=key)
        assert late.status_code == 503 and "time limit of 1 seconds" in late.json()["error"]["message"]
        *_, error = [line for line in ask(server, {**LONG, "stream": True}, headers=key).text.split("\n\n") if line]
        # in mid-stream; no [DONE] behind it
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"


@pytest.mark.long
@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT], [signal.SIGKILL]],
                         ids=["told", "told_twice", "killed"])
def test_however_it_ends_no_process_is_left(folder, signals):
    with Running(folder, f"--shutdown-seconds={1 if len(signals) == 1 else 600}") as server:
        connection = begin(server, LONG)
        for number in signals:
            server.process.send_signal(number)
            if number == signal.SIGINT:  # two at the same time would be one
                server.wait("it has heard", lambda: stopping(server))
        got = b""
        try:
            while piece := connection.recv(65536):
                got += piece
        except ConnectionResetError:
            assert signals != [signal.SIGTERM]
        assert b"shutting down" in got or signals != [signal.SIGTERM]  # the client is told why its answer ends
        server.process.wait(60)
        server.wait("all processes have ended", server.all_gone)
        connection.close()


def stopping(server):
    """Does it say that it ends, or is it gone?"""
    try:
        return httpx.get(server.url + "/health").json()["status"] == "stopping"
    except httpx.TransportError:
        return True


@pytest.mark.long
def test_what_runs_may_end_before_the_server_does_but_nothing_new_begins(folder):
    with Running(folder, "--shutdown-seconds=600") as server:
        answers = []
        asking = threading.Thread(target=lambda: answers.append(ask(server, {**LONG, "max_tokens": 600})))
        asking.start()
        server.wait("the row runs", lambda: server.metrics()["nanochat_running"] == 1)
        server.process.send_signal(signal.SIGTERM)
        server.wait("it has heard", lambda: stopping(server))
        if asking.is_alive():
            try:
                assert ask(server, {"prompt": "a", "max_tokens": 1}).status_code == 503
            except httpx.TransportError:  # it was gone a moment later
                pass
        asking.join(60)
        assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 600
        server.process.wait(60)
        server.wait("all processes have ended", server.all_gone)
