"""nanochat/dataset/download.py, against a server on this machine that answers like the hub and fails like a network.

Covers nanochat/dataset/arrival.py too: text that is read while it arrives."""

import json
import os
import random
import threading
import time

import pytest

from nanochat import transfer
from nanochat.dataloader import PackedLoader, TextSource
from nanochat.dataset import arrival, iter_documents, shard_paths
from nanochat.dataset.__main__ import main
from nanochat.dataset.download import fetch
from nanochat.dataset.shards import (
    HUB_TEXTS,
    ShardWriter,
    being_written,
    data_dir,
    shard_name,
    shards_in,
    write_source,
    writing,
)
from nanochat.errors import UserError
from tests.bad_hub import COMMIT, NEWER, Handler, serving_hub
from tests.test_dataloader import ByteTokenizer, make_text, one_of, rows_of, small  # noqa: F401 (fixture)

SOURCE = "fineweb-edu"
LAST = shard_name(1822)
both = pytest.mark.parametrize("source", HUB_TEXTS, indirect=True)


@pytest.fixture
def source(request, monkeypatch):
    """Which text is fetched; FineWeb-Edu unless a test asks for both."""
    monkeypatch.setitem(globals(), "SOURCE", getattr(request, "param", SOURCE))
    last = {"fineweb-edu": "shard_01822.parquet", "climbmix": "shard_06542.parquet"}
    monkeypatch.setitem(globals(), "LAST", last[SOURCE])
    return SOURCE


@pytest.fixture
def hub(source, monkeypatch):
    dice = random.Random(0)
    files = {name: dice.randbytes(200_000 + dice.randrange(1000)) for name in [*map(shard_name, range(4)), LAST]}
    with serving_hub(monkeypatch, HUB_TEXTS[source].repo, files) as server:
        yield server


def there(folder, hub, *numbers):
    """The shards in `folder` are these, and whole."""
    names = [*map(shard_name, numbers), LAST]
    found = [path.name for path in shards_in(folder)]
    return found == names and all((folder / name).read_bytes() == hub.files[name] for name in names)


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def run(count, folder, **options):
    said = []
    fetch(count, folder, **{"source": SOURCE, "say": said.append} | options)
    return said


@both
def test_fetch_brings_the_first_shards_and_always_the_validation_shard(hub, tmp_path):
    for count in (0, 1, 3):
        run(count, tmp_path)
        assert there(tmp_path, hub, *range(count)) and leftovers(tmp_path) == []
    assert shard_paths("val", tmp_path) == [tmp_path / LAST]
    assert [path.name for path in shard_paths("train", tmp_path)] == [shard_name(i) for i in range(3)]
    assert all(len(hub.gets(name)) == 1 for name in hub.files
               if name != shard_name(3))  # what was there was not fetched again


def test_complete_folder_needs_no_network(hub, tmp_path, monkeypatch):
    run(2, tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "all verified" in run(2, tmp_path)[-1]
    assert "all verified" in run(1, tmp_path)[-1]


@pytest.mark.parametrize("workers", [1, 4])
def test_download_that_breaks_off_goes_on_where_it_stopped(hub, tmp_path, workers):
    hub.faults = {shard_name(1): ["cut", "cut"], LAST: ["cut"]}
    run(2, tmp_path, workers=workers)
    assert there(tmp_path, hub, 0, 1)
    assert hub.gets(shard_name(1)) == [None, "bytes=70000-", "bytes=140000-"]


@both
def test_next_run_goes_on_where_the_last_one_was_killed(hub, tmp_path):
    hub.faults = {shard_name(0): ["cut", *[503] * 20]}
    with pytest.raises(UserError, match="1 of 2 shards could not be fetched.*shard_00000"):
        run(1, tmp_path)
    assert there(tmp_path, hub) and len(leftovers(tmp_path)) == 1
    hub.faults, hub.asked = {}, []
    run(1, tmp_path)
    assert there(tmp_path, hub, 0) and hub.gets(shard_name(0)) == ["bytes=70000-"] and leftovers(tmp_path) == []


def test_server_without_ranges_starts_over(hub, tmp_path):
    hub.faults = {shard_name(0): ["cut", "whole"]}
    run(1, tmp_path)
    assert there(tmp_path, hub, 0) and len(hub.gets(shard_name(0))) == 2


def test_wrong_byte_is_noticed_and_fetched_again(hub, tmp_path):
    hub.faults = {shard_name(0): ["wrong byte"]}
    run(1, tmp_path)
    assert there(tmp_path, hub, 0) and hub.gets(shard_name(0)) == [None, None]


@both
def test_bytes_that_stay_wrong_are_an_error_and_never_in_place(hub, tmp_path):
    hub.faults = {shard_name(0): ["wrong byte"] * 9}
    with pytest.raises(UserError, match="SHA-256"):
        run(1, tmp_path)
    assert there(tmp_path, hub)


def test_busy_server_is_asked_again(hub, tmp_path):
    hub.faults = {shard_name(0): [503, 429, 503], LAST: [503]}
    hub.api_faults = [503, 503]
    run(1, tmp_path)
    assert there(tmp_path, hub, 0)


def test_refusal_is_not_asked_again(hub, tmp_path):
    hub.faults = {shard_name(0): [403] * 5}
    with pytest.raises(UserError, match="answers 403"):
        run(1, tmp_path)
    assert len(hub.gets(shard_name(0))) == 1


def test_shard_that_the_hub_lacks_is_named_and_the_others_come(hub, tmp_path):
    del hub.files[shard_name(1)]
    with pytest.raises(UserError, match="1 of 4 shards.*shard_00001.*no such file"):
        run(3, tmp_path)
    assert there(tmp_path, hub, 0, 2)


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_corrupt_shard_on_disk_is_fetched_again(hub, tmp_path, harm):
    run(2, tmp_path)
    path, data = tmp_path / shard_name(1), hub.files[shard_name(1)]
    path.write_bytes({"flip": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:1000], "empty": b""}[harm])
    hub.asked = []
    assert any(shard_name(1) in line for line in run(2, tmp_path))
    assert there(tmp_path, hub, 0, 1) and [path for path, _ in hub.asked] == [shard_name(1)]


def test_revision_stays_the_one_of_the_first_fetch(hub, tmp_path):
    run(1, tmp_path)
    assert json.loads((tmp_path / "source.json").read_text())["revision"] == COMMIT
    hub.commit = NEWER  # main moves on; the server knows no file of the new commit
    run(2, tmp_path)
    assert there(tmp_path, hub, 0, 1)
    run(2, tmp_path, revision=COMMIT)
    with pytest.raises(UserError, match="revisions never mix"):
        run(2, tmp_path, revision=NEWER)


def test_unknown_revision_is_a_clear_error(hub, tmp_path):
    with pytest.raises(UserError, match="answers 404.*--revision"):
        run(1, tmp_path, revision="nonsense")


@both
def test_shards_of_the_published_program_are_taken_over(hub, tmp_path):
    (tmp_path / shard_name(0)).write_bytes(hub.files[shard_name(0)])
    (tmp_path / shard_name(2)).write_bytes(hub.files[shard_name(2)][:500])
    run(3, tmp_path)
    assert there(tmp_path, hub, 0, 1, 2) and not hub.gets(shard_name(0))


def test_shards_of_unknown_origin_stay_untouched(hub, tmp_path):
    (tmp_path / shard_name(0)).write_bytes(b"my own")
    with pytest.raises(UserError, match="no source.json"):
        run(1, tmp_path)
    assert (tmp_path / shard_name(0)).read_bytes() == b"my own" and len(list(tmp_path.iterdir())) == 1


@both
def test_two_sources_never_mix(hub, tmp_path):
    run(1, tmp_path / "fetched")
    [other], title = HUB_TEXTS.keys() - {SOURCE}, HUB_TEXTS[SOURCE].title
    with pytest.raises(UserError, match=f"holds {title}, not .*never mix.*`--source={SOURCE}` goes on"):
        run(1, tmp_path / "fetched", source=other)
    assert there(tmp_path / "fetched", hub, 0)
    write_source(tmp_path, {"source": "import", "shards": {}})
    with pytest.raises(UserError, match="two sources never mix"):
        run(1, tmp_path)


def test_no_network_says_so_and_offers_other_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(transfer, "BACK_OFF", 0.001)
    with pytest.raises(UserError, match="127.0.0.1:1 cannot be reached.*import PATH.*small-world") as error:
        run(1, tmp_path)
    assert "\n" not in str(error.value)


def test_server_that_is_no_hub_is_a_clear_error(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.answer(200, b"<html>log in to the hotel network</html>"))
    with pytest.raises(UserError, match="cannot be reached"):
        run(1, tmp_path)


def test_network_that_goes_away_ends_the_run(hub, tmp_path, monkeypatch):
    hub.faults = {name: ["cut"] * 2 + [None] * 9 for name in hub.files}
    ask = Handler.do_GET

    def away(self):
        if self.path.startswith("/store/") and len(hub.asked) > 4:
            return self.connection.shutdown(2)
        ask(self)
    monkeypatch.setattr(Handler, "do_GET", away)
    with pytest.raises(UserError, match="could not be fetched"):
        run(4, tmp_path, workers=2)
    monkeypatch.setattr(Handler, "do_GET", ask)
    hub.faults = {}
    run(4, tmp_path)
    assert there(tmp_path, hub, 0, 1, 2, 3)


def test_too_little_disk_is_said_before_the_start(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="fetching 2 shards needs .* free"):
        run(1, tmp_path)
    assert not hub.gets(shard_name(0))


def test_a_second_writer_is_told_to_wait(hub, tmp_path):
    assert not being_written(tmp_path)
    with writing(tmp_path):
        assert being_written(tmp_path)
    assert not being_written(tmp_path)
    with writing(tmp_path), pytest.raises(UserError, match="another process"):
        run(1, tmp_path)


@pytest.mark.parametrize("count, workers", [(-2, 4), (3, 0)])
def test_bad_counts_are_refused(tmp_path, count, workers):
    with pytest.raises(UserError, match="-n"):
        run(count, tmp_path, workers=workers)


@both
def test_published_command_line_fetches_text_that_can_be_read(hub, tmp_path, capsys):
    made = tmp_path / "made"
    made.mkdir()
    writer = ShardWriter(made)
    for i in range(2000):
        writer.add(f"document {i}")
    writer.add_validation("the last")
    writer.close()
    hub.files = {shard_name(0): (made / shard_name(0)).read_bytes(), LAST: (made / shard_name(1)).read_bytes()}
    flags = [] if SOURCE == "fineweb-edu" else [f"--source={SOURCE}"]
    main(["-n", "1", *flags])
    assert list(iter_documents("train")) == [f"document {i}" for i in range(2000)]
    assert list(iter_documents("val")) == ["the last"]
    out = capsys.readouterr()
    assert str(data_dir()) in out.out
    os.remove(data_dir() / LAST)
    with pytest.raises(UserError, match=f"validation shard.*missing.*{' '.join(['-n N', *flags])}`"):
        shard_paths("train")
    main(["--num-files=1", "-w", "2", *flags])
    assert list(iter_documents("val")) == ["the last"]


# ---- text that is read while it arrives

@pytest.fixture
def text(hub, tmp_path, small, monkeypatch):  # noqa: F811
    """Let the hub serve small shards of text; return the names of those to train on."""
    monkeypatch.setattr(arrival, "POLL_SECONDS", 0.01)
    make_text(tmp_path / "made", 400)
    *train, val = shards_in(tmp_path / "made")
    hub.files = {path.name: path.read_bytes() for path in train} | {LAST: val.read_bytes()}
    assert len(train) > 3
    return [path.name for path in train]


def loaders(folder, world_size, state=None, **options):
    """Of each rank; a step is 12 rows."""
    return [PackedLoader(TextSource(ByteTokenizer(), "train", folder, **options), 12 // world_size, 24, prefetch=6,
                         ranks=one_of(rank, world_size), state=state) for rank in range(world_size)]


def rows_of_all(reading, steps):
    """The rows of so many steps, in order."""
    return [row for _ in range(steps) for loader in reading for row in rows_of(loader, 1)]


def position(state):
    return {key: state[key] for key in ("rows", "next", "waiting", "order")}


@pytest.mark.parametrize("source, world_size", [("fineweb-edu", 1), ("climbmix", 2)], indirect=["source"])
def test_the_order_of_documents_does_not_depend_on_when_they_arrive(hub, tmp_path, text, world_size):
    run(len(text), tmp_path / "whole")
    steps, states = 60, []  # more than one pass
    [whole], expected = loaders(tmp_path / "whole", 1), []
    for _ in range(steps):
        states.append(position(whole.state_dict()))
        expected += rows_of(whole, 1)
    assert whole.passes == 1
    whole.close()

    part, dice, said = tmp_path / "part", random.Random(world_size), []
    run(1, part)
    hub.gates = {name: threading.Event() for name in text[1:]}
    late = dice.sample(text[1:], len(text) - 1)
    fetching = threading.Thread(target=run, args=(len(text), part), kwargs={"workers": len(text)})
    fetching.start()
    reading = loaders(part, world_size, expected=len(text), say=said.append)
    assert all(loader.state_dict()["shards"] == 1 and loader.passes == 0 for loader in reading)

    def release():  # a slow network
        for name in late:
            time.sleep(dice.uniform(0, 0.1))
            hub.gates[name].set()
    releasing = threading.Thread(target=release)
    releasing.start()
    got, saved = [], {}
    for step in range(steps):
        if step % 4 == 0:
            saved[step] = [json.loads(json.dumps(loader.state_dict())) for loader in reading]
            assert all(position(state) == states[step] for state in saved[step])
        for loader in reading:
            assert step % 3 or loader.prepare(3) is None
            got += rows_of(loader, 1)
    fetching.join()
    releasing.join()
    assert got == expected
    assert len(said) == world_size and all("waiting for shard_" in line for line in said)  # once each
    for loader in reading:
        loader.close()

    # the state of any rank resumes, on any number of ranks, as that of a run that had all text
    first = {state["shards"] for states in saved.values() for state in states}
    assert min(first) < len(text) == max(first)
    early = [step for step, states in saved.items() if states[0]["shards"] < len(text)]
    for step in {*early[:3], max(saved)}:
        for options in ({}, {"expected": len(text)}):
            for count, state in ((1, saved[step][0]), (3, saved[step][-1])):
                others = loaders(part, count, state, **options)
                assert rows_of_all(others, 3) == expected[12 * step:12 * step + 36]
                for loader in others:
                    loader.close()


def test_a_resumed_run_waits_for_the_shards_it_has_read(hub, tmp_path, text):
    run(len(text), tmp_path / "whole")
    [loader] = loaders(tmp_path / "whole", 1, expected=len(text))
    rows_of(loader, 100)
    state, expected = loader.state_dict(), rows_of(loader, 5)
    loader.close()
    hub.gates = {text[1]: threading.Event()}
    fetching = threading.Thread(target=run, args=(len(text), tmp_path / "part"))
    fetching.start()
    opening = threading.Timer(0.1, hub.gates[text[1]].set)
    opening.start()
    [loader] = loaders(tmp_path / "part", 1, state, expected=len(text))
    assert rows_of(loader, 5) == expected
    loader.close()
    fetching.join()


@both
def test_text_that_will_not_come_is_told_after_what_is_there(hub, tmp_path, text, monkeypatch):
    monkeypatch.setattr(arrival, "START_SECONDS", 0.05)
    with pytest.raises(UserError, match="source.json of the 3 planned shards is not in .*no download is running.*-n 3"):
        loaders(tmp_path / "part", 1, expected=3)
    run(0, tmp_path / "part")
    os.remove(tmp_path / "part" / LAST)
    again = "-n 3" if SOURCE == "fineweb-edu" else f"-n 3 --source={SOURCE}"
    with pytest.raises(UserError, match=f"{LAST} of the 3 planned .* is not in .*no download is running.*{again}`"):
        loaders(tmp_path / "part", 1, expected=3)
    run(1, tmp_path / "part")
    [whole], [loader] = loaders(tmp_path / "part", 1), loaders(tmp_path / "part", 1, expected=3)
    got = []
    while (error := loader.prepare(2)) is None:
        got += rows_of(loader, 1)
    got += rows_of(loader, 1)  # what it had prepared, one of two
    assert text[1] in str(error) and got == rows_of(whole, len(got) // 12)
    with pytest.raises(UserError, match=f"{text[1]} of the 3 planned shards.*no download is running"):
        rows_of(loader, 100)
    whole.close()

    monkeypatch.setattr(arrival, "SHARD_SECONDS", 0.05)
    with writing(tmp_path / "part"):  # a download that brings nothing
        [loader] = loaders(tmp_path / "part", 1, expected=3)
        with pytest.raises(UserError, match="has not come .* is the network gone.*-n 3"):
            rows_of(loader, 100)


def test_a_loader_that_waits_for_text_can_be_closed_and_interrupted(hub, tmp_path, text):
    run(1, tmp_path / "part")
    with writing(tmp_path / "part"):
        [loader] = loaders(tmp_path / "part", 1, expected=3)
        asked = []
        while not asked:
            loader.prepare(3, lambda: bool(asked.append(1)) or True)
            if not asked:
                rows_of(loader, 1)
        loader.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_planned_shards_of_text_that_is_complete(tmp_path, small):  # noqa: F811
    make_text(tmp_path / "made", 400)
    there = len(shards_in(tmp_path / "made")) - 1
    assert TextSource(ByteTokenizer(), "train", tmp_path / "made", expected=2).planned == 2
    with pytest.raises(UserError, match=f"--shards is 99, but .* holds {there} training shards, and they are all"):
        TextSource(ByteTokenizer(), "train", tmp_path / "made", expected=99)
    with pytest.raises(UserError, match="--shards is 0"):
        TextSource(ByteTokenizer(), "train", tmp_path / "made", expected=0)
