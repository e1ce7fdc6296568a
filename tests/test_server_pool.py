"""Which worker gets what, which models there are, and what a worker does when something in it fails."""

import asyncio
import queue

import pytest

from nanochat.errors import UserError
from nanochat.request import Settings
from nanochat.server.messages import Event, ModelInfo, RowRequest, WorkerConfig
from nanochat.server.models import find_models
from nanochat.server.pool import NoWorker, Pool, PoolFull
from nanochat.server.serving import ServerConfig, Serving
from nanochat.server.worker import ModelHost
from tests import server_helpers

INFO = ModelInfo("sft", "folder", 5, 128, "tokenizer", True, 0, "")


folder = server_helpers.folder


@pytest.fixture
def base(folder, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder


# ---- the server's side, its workers being none

def a_pool(workers=2):
    """A pool whose workers have no process, and what it sends to each."""
    pool = Pool(WorkerConfig(max_rows=2, max_waiting=1), [""] * workers)
    sent = [[] for _ in pool.workers]
    for worker, messages in zip(pool.workers, sent):
        worker.state, worker.send = "ready", messages.append
    return pool, sent


def rows(*ids):
    return [RowRequest(id, [1], 5, model=INFO) for id in ids]


def tell(worker, *events):
    events = [Event(id, kind, finish="stop" if kind == "ended" else "") for id, kind in events]
    worker._received(worker.process, ("events", events, None))


def test_rows_go_to_the_worker_with_the_least_to_do_and_else_where_they_were():
    pool, sent = a_pool(3)
    assert [pool.submit(rows(id), affinity=id).worker.number for id in "abc"] == [0, 1, 2]
    for worker, id in zip(pool.workers, "abc"):
        tell(worker, (id, "ended"))
    assert pool.rows == 0 and [pool.submit(rows(id + "2"), affinity=id).worker.number for id in "cba"] == [2, 1, 0]
    tell(pool.workers[1], ("b2", "ended"))
    assert pool.submit(rows("c3"), affinity="c").worker.number == 1  # less to do counts more
    assert [message[0] for message in sent[1]] == ["submit"] * 3


def test_no_more_rows_than_fit_and_a_cancelled_one_counts_until_it_has_ended():
    pool, sent = a_pool(1)
    with pytest.raises(PoolFull):
        pool.submit(rows("a", "b", "c", "d"))
    group = pool.submit(rows("a", "b", "c"))
    group.cancel("a")
    group.cancel("a")
    with pytest.raises(PoolFull):
        pool.submit(rows("d"))
    assert sent[0][3:] == [("cancel", "a")]
    tell(pool.workers[0], ("a", "ended"))
    pool.submit(rows("d"))
    pool.workers[0].state = "restarting"
    with pytest.raises(NoWorker):
        pool.submit(rows("e"))


def test_a_group_ends_when_each_row_has_ended_or_was_given_up():
    async def seen():
        pool, sent = a_pool(1)
        group = pool.submit(rows("a", "b", "c"))
        tell(pool.workers[0], ("a", "token"), ("b", "ended"), ("a", "ended"))
        group.end("shutdown", "")
        tell(pool.workers[0], ("c", "token"), ("c", "ended"))
        return [(event.id, event.kind, event.finish) async for event in group], sent[0][3:]

    told, sent = asyncio.run(seen())
    assert told == [("a", "token", ""), ("b", "ended", "stop"), ("a", "ended", "stop"), ("c", "ended", "shutdown")]
    assert sent == [("cancel", "c")]


# ---- the models there are

def test_a_stage_and_the_tags_beside_it_have_ids_of_their_own(base):
    found = find_models(WorkerConfig())
    assert [(model.id, model.default, model.chat) for model in found] == [("sft", True, True), ("base", False, False)]
    (base / "chatsft_checkpoints" / "d1").symlink_to(base / "chatsft_checkpoints" / "d2")
    try:
        assert [model.id for model in find_models(WorkerConfig())] == ["sft", "base", "sft/d1"]
        assert [model.id for model in find_models(WorkerConfig(model_tag="d1"))] == ["sft", "base/d2", "sft/d2"]
    finally:
        (base / "chatsft_checkpoints" / "d1").unlink()
    by_path = find_models(WorkerConfig(source=str(base / "base_checkpoints" / "d2")))
    assert [(model.id, model.chat) for model in by_path] == [("d2", False), ("sft", True)]


@pytest.mark.parametrize("wrong", [{"source": "rl"}, {"source": "sft", "step": 7}, {"source": "nowhere"},
                                   {"model_tag": "d9"}])
def test_a_model_that_is_not_there_is_told_at_once(base, wrong):
    with pytest.raises(UserError):
        find_models(WorkerConfig(**wrong))


# ---- inside a worker

@pytest.fixture
def host(base):
    host = ModelHost(WorkerConfig(device="cpu", max_models=1), queue.SimpleQueue())
    host.infos = {info.id: info for info in host.models()}
    return host


def row(id, model, max_tokens=3, **more):
    """A message with a row that does not end by itself."""
    return "submit", RowRequest(id, [1, 2], max_tokens, Settings(temperature=0), model=model, **more)


def run(host, *messages):
    """All events until nothing is to be done."""
    events = [event for message in messages for event in host.handle(message)]
    while host.busy or host._loading:
        if host._loading:
            events += host.handle(host.inbox.get(timeout=60))
        events += host.step()
    return events


def test_a_model_is_loaded_when_it_is_asked_for_and_the_one_used_longest_ago_goes(host):
    sft, base = host.infos["sft"], host.infos["base"]
    assert run(host, row("a", sft))[-1].finish == "length" and list(host.schedulers) == [sft.key]
    counted = host.stats()["generated_tokens_total"]
    assert run(host, row("b", base))[-1].finish == "length" and list(host.schedulers) == [base.key]
    assert host.stats()["generated_tokens_total"] == 2 * counted and host._rows == {}


def test_a_row_can_be_cancelled_or_be_late_while_its_model_loads(host):
    sft = host.infos["sft"]
    events = run(host, row("a", sft), row("b", sft), ("cancel", "a"), ("cancel", "nobody"),
                 row("c", sft, timeout=-1))
    ends = {event.id: event.finish for event in events if event.kind == "ended"}
    assert ends == {"a": "cancelled", "b": "length", "c": "timeout"}


def test_a_model_that_cannot_be_loaded_ends_only_its_own_requests(host, capsys):
    sft = host.infos["sft"]
    broken = ModelInfo("broken", sft.folder, 6, 128, sft.tokenizer, True, 0, "")
    events = run(host, row("a", broken), row("b", sft))
    ends = {event.id: event for event in events if event.kind == "ended"}
    assert ends["a"].finish == "error" and "cannot be loaded" in ends["a"].message and ends["b"].finish == "length"
    assert "no checkpoint of step 6" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["step", "cancel", "submit"])
def test_a_model_that_fails_ends_its_requests_and_is_loaded_anew(host, where, monkeypatch, capsys):
    sft = host.infos["sft"]
    run(host, row("a", sft))

    def fail(*_):
        raise RuntimeError("nobody foresaw this")

    host.handle(row("b", sft, 30))
    monkeypatch.setattr(host.schedulers[sft.key], where, fail)
    events = run(host, *{"step": [], "cancel": [("cancel", "b")], "submit": [row("c", sft)]}[where])
    assert {event.finish for event in events if event.kind == "ended"} == {"error"}
    assert "nobody foresaw this" in capsys.readouterr().err
    assert host._rows == {} and not host.schedulers
    assert run(host, row("d", sft))[-1].finish == "length"


def test_a_file_of_chats_is_tried_before_it_is_needed_and_no_answer_fails_for_it(tmp_path, capsys):
    with pytest.raises(UserError, match="--log-chats: .*cannot be written to"):
        Serving(a_pool()[0], ServerConfig(log_chats=str(tmp_path / "nowhere" / "chats")))
    path = tmp_path / "chats"
    serving = Serving(a_pool()[0], ServerConfig(log_chats=str(path)))
    serving.log({"a": "né"})
    assert '"a": "né"' in path.read_text(encoding="utf-8") and path.stat().st_mode & 0o077 == 0
    path.unlink()
    path.mkdir()
    serving.log({"a": 1})
    assert "cannot be written to" in capsys.readouterr().err
