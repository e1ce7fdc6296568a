"""nanochat/transfer.py: whatever the server does, a file comes whole, verified and resumed, or a sentence says why not.

tests/test_download.py has the shards, tests/test_core_bundle.py the bundle, and this file the models of the hub."""

import email.utils
import hashlib
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nanochat import loading, transfer
from nanochat.errors import NotWritten, UserError
from nanochat.loading import from_hub
from nanochat.transfer import Listed, NotFetched, fetch_file
from tests.bad_hub import COMMIT, CUT, NEWER, serving_hub
from tests.conftest import ROOT

NAME = "model_000010.pt"
REPO = "someone/some-model"


@pytest.fixture
def hub(monkeypatch):
    dice = random.Random(1)
    files = {NAME: dice.randbytes(200_000), "meta_000010.json": b'{"step": 10}' + b" " * 9000,
             "tokenizer.pkl": dice.randbytes(500), "optim_000010.pt": b"not wanted", "README.md": b"not wanted"}
    with serving_hub(monkeypatch, REPO, files, "models") as server:
        yield server


@pytest.fixture
def waits(monkeypatch):
    """The waits, which do not take place."""
    seconds = []
    monkeypatch.setattr(transfer, "pause", lambda wait, stop: seconds.append(wait))
    monkeypatch.setattr(transfer, "BACK_OFF", 1.0)
    return seconds


def listed(hub):
    return Listed(len(hub.files[NAME]), hashlib.sha256(hub.files[NAME]).hexdigest())


def get(hub, folder, about=None, **more):
    said = []
    fetch_file(f"{hub.url}/plain/{NAME}", folder / NAME, listed(hub) if about is None else about, say=said.append,
               **more)
    assert (folder / NAME).read_bytes() == hub.files[NAME]
    assert [path.name for path in folder.iterdir()] == [NAME]
    return said


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("faults, ranges", [
    ([], [None]),
    (["cut", "cut"], [None, "bytes=70000-", "bytes=140000-"]),
    (["nothing", "nothing"], [None, None, None]),
    (["chunked cut"], [None, "bytes=70000-"]),
    (["cut", "whole"], [None, "bytes=70000-"]),
    ([503, 500, 429, 408], [None] * 5),
    (["html", "html"], [None] * 3),
    (["gzip"], [None]),
    (["cut", "gzip"], [None, "bytes=70000-", None]),
    (["loop"] * 25, None),
    (["stall"], [None, "bytes=70000-"]),
], ids=lambda value: str(value)[:40])
def test_what_passes_is_mended_and_told_in_a_line(hub, tmp_path, monkeypatch, faults, ranges, known):
    if faults == ["gzip"] and not known:
        pytest.skip("what is packed and has no checksum comes in one piece: the case above")
    monkeypatch.setattr(transfer, "TIMEOUT", 0.3 if "stall" in faults else 30.0)
    hub.faults = {NAME: list(faults)}
    said = get(hub, tmp_path, None if known else Listed())
    assert ranges is None or hub.gets(NAME) == ranges
    told = [line for line in said if line.startswith(f"{NAME}: ") and " of 6 in " in line]
    assert len(told) == len(said) and (len(told) == len(hub.gets(NAME)) - 1 or "loop" in faults), said


@pytest.mark.parametrize("fault", ["wrong byte", "short", "long"])
def test_a_wrong_file_never_gets_the_name(hub, tmp_path, fault):
    hub.faults = {NAME: [fault]}
    get(hub, tmp_path)
    (tmp_path / NAME).unlink()
    hub.faults = {NAME: [fault] * 20}
    with pytest.raises(NotFetched, match="SHA-256|bytes"):
        get(hub, tmp_path)
    assert not (tmp_path / NAME).exists() and len(hub.gets(NAME)) <= 2 + 6


@pytest.mark.parametrize("status, told", [(401, "HF_TOKEN"), (403, "no access"), (404, "not found"), (410, "410")])
def test_a_refusal_is_not_asked_again(hub, tmp_path, status, told):
    hub.faults = {NAME: [status] * 5}
    with pytest.raises(NotFetched, match=told) as error:
        get(hub, tmp_path)
    assert len(hub.gets(NAME)) == 1 and error.value.status == status and not error.value.network


def test_waits_grow_with_chance_and_end(hub, tmp_path, waits):
    hub.faults = {NAME: [503] * 9}
    with pytest.raises(NotFetched, match="the server answers 503, 6 times in a row"):
        get(hub, tmp_path)
    assert len(waits) == 5 and all(0.75 * 2**i <= wait <= 1.25 * 2**i for i, wait in enumerate(waits))
    assert waits != [1, 2, 4, 8, 16]
    hub.faults = {NAME: ["cut"] * 2}
    waits.clear()
    get(hub, tmp_path)
    assert len(waits) == 2 and max(waits) < 1.3  # bytes came: it counts from the beginning


def test_a_server_may_say_how_long_to_wait(hub, tmp_path, waits):
    later = email.utils.formatdate(time.time() + 100, usegmt=True)
    hub.faults = {NAME: [(429, "7"), (503, later), (429, "soon"), (429, "-5")]}
    get(hub, tmp_path)
    assert 7 <= waits[0] <= 8 and 60 < waits[1] <= 101 and waits[2] < 6 and waits[3] <= 1
    (tmp_path / NAME).unlink()
    hub.faults = {NAME: [(429, "86400")]}
    with pytest.raises(NotFetched, match="asks to wait 86400 s"):
        get(hub, tmp_path)


@pytest.mark.parametrize("etags, changes, ranges", [
    (True, False, ["bytes=70000-"]), (True, True, ["bytes=70000-"]), (False, False, [None])])
def test_a_file_without_a_checksum_is_resumed_only_where_it_is_the_same(hub, tmp_path, etags, changes, ranges):
    hub.etags = etags
    hub.faults = {NAME: ["cut", *[503] * 9]}
    with pytest.raises(NotFetched):
        get(hub, tmp_path, Listed())
    assert not (tmp_path / NAME).exists()
    hub.asked, hub.faults = [], {}
    if changes:
        hub.files[NAME] = random.Random(2).randbytes(200_000)
    get(hub, tmp_path, Listed())
    assert hub.gets(NAME) == ranges


def test_a_file_that_begins_again_for_ever_is_given_up(hub, tmp_path):
    hub.etags = False
    hub.faults = {NAME: [f"cut {1000 + more}" for more in range(99)]}  # each attempt brings more than the one before
    with pytest.raises(NotFetched, match="begin again 10 times"):
        get(hub, tmp_path, Listed())


def test_a_full_disk_is_not_asked_again(hub, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with pytest.raises(NotWritten, match=f"the disk is full: cannot write .*{NAME}"):
        fetch_file(f"{hub.url}/plain/{NAME}", tmp_path / NAME, listed(hub), say=print, part=Path("/dev/full"))
    assert len(hub.gets(NAME)) == 1 and not (tmp_path / NAME).exists()


def test_a_killed_download_is_resumed_by_the_next(hub, tmp_path):
    hub.faults = {NAME: ["stall"]}
    code = ("import sys; from pathlib import Path; from nanochat.transfer import *\n"
            "fetch_file(sys.argv[1], Path(sys.argv[2]), Listed(200000, sys.argv[3]), say=print)")
    process = subprocess.Popen([sys.executable, "-c", code, f"{hub.url}/plain/{NAME}", tmp_path / NAME,
                                listed(hub).sha256], cwd=ROOT)
    part = tmp_path / f".{NAME}.part"
    ends = time.monotonic() + 120
    while not (part.exists() and part.stat().st_size) and time.monotonic() < ends:
        time.sleep(0.02)
    process.kill()
    process.wait()
    came = part.stat().st_size
    assert 0 < came <= CUT and not (tmp_path / NAME).exists()
    hub.over.set()
    get(hub, tmp_path)
    assert hub.gets(NAME) == [None, f"bytes={came}-"]


def test_a_download_stops_when_it_is_told(hub, tmp_path):
    stop = threading.Event()
    hub.faults = {NAME: [503] * 9}
    with pytest.raises(NotFetched, match="stopped, because others failed"):
        fetch_file(f"{hub.url}/plain/{NAME}", tmp_path / NAME, listed(hub), say=lambda line: stop.set(), stop=stop)
    assert len(hub.gets(NAME)) == 1


# ---- a model of the hub

def fetched(folder, hub):
    names = [NAME, "meta_000010.json", "tokenizer.pkl"]
    return sorted(path.name for path in folder.iterdir()) == sorted(names) and all(
        (folder / name).read_bytes() == hub.files[name] for name in names)


def test_a_model_of_the_hub_comes_whole_and_once(hub, capsys, tmp_path):
    folder = from_hub(REPO, None)
    assert fetched(folder, hub) and folder.name == COMMIT
    hub.asked = []
    assert from_hub(REPO, None) == folder and [path for path, _ in hub.asked] == ["info"]
    assert from_hub(REPO, COMMIT) == folder
    hub.commit, hub.files["meta_000010.json"] = NEWER, b'{"step": 11}'
    hub.commits.add(NEWER)
    newer = from_hub(REPO, "main")
    assert newer != folder and fetched(newer, hub)


@pytest.mark.parametrize("faults", [["cut"], ["wrong byte"], ["html", "html"], [503, (429, "0")], ["short"], ["gzip"]],
                         ids=str)
def test_a_model_of_the_hub_is_mended_on_the_way(hub, faults):
    hub.faults = {NAME: list(faults), "meta_000010.json": list(faults) if faults[0] != "cut" else []}
    hub.api_faults = ["html", 503]
    assert fetched(from_hub(REPO, None), hub)


def test_a_model_that_broke_off_goes_on_at_the_next_start(hub):
    hub.faults = {NAME: ["cut", *[503] * 9]}
    with pytest.raises(UserError, match=f"{NAME} of {REPO} cannot be fetched .* 503, 6 times.*where it stopped"):
        from_hub(REPO, None)
    assert not list(loading.base_dir().rglob(NAME))
    hub.faults, hub.asked = {}, []
    assert fetched(from_hub(REPO, None), hub) and hub.gets(NAME) == ["bytes=70000-"]


def test_a_flipped_byte_in_a_fetched_model_is_fetched_again(hub):
    folder = from_hub(REPO, None)
    for name in (NAME, "meta_000010.json"):
        data = bytearray((folder / name).read_bytes())
        data[1000] ^= 1
        (folder / name).write_bytes(data)
    hub.asked = []
    assert fetched(from_hub(REPO, None), hub) and len(hub.gets(NAME)) == 1


@pytest.mark.parametrize("faults, told", [
    (["html"] * 9, "cannot be fetched from the hub at http.*a web page.*sign in.*HF_ENDPOINT"),
    ([401] * 9, "answers 401.*HF_TOKEN"), ([404] * 9, "answers 404"), ([500] * 9, "answers 500"),
    (["loop"] * 99, "cannot be fetched"), (["nothing"] * 9, "cannot be fetched")])
def test_a_hub_that_does_not_answer_is_a_sentence(hub, faults, told):
    hub.api_faults = list(faults)
    with pytest.raises(UserError, match=told) as error:
        from_hub(REPO, None)
    assert "\n" not in str(error.value) and len(hub.asked) <= 70
    assert not (loading.base_dir() / "hub").exists()


def test_what_is_complete_is_used_where_the_hub_is_away(hub, monkeypatch, capsys):
    folder = from_hub(REPO, None)
    for faults in (["html"] * 9, ["nothing"] * 9):
        hub.api_faults = list(faults)
        assert from_hub(REPO, None) == folder == from_hub(REPO, COMMIT)
        assert "the hub cannot be reached" in capsys.readouterr().out
    hub.api_faults = ["nothing"] * 9
    with pytest.raises(UserError, match="cannot be fetched"):
        from_hub(REPO, "another")
    hub.api_faults = [401]  # not away: it refuses
    with pytest.raises(UserError, match="401"):
        from_hub(REPO, None)


def test_the_cache_of_huggingface_hub_is_used(hub, monkeypatch, tmp_path):
    cached = tmp_path / "blob"
    cached.write_bytes(hub.files[NAME])
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache",
                        lambda name, path, revision: str(cached) if path == NAME else None)
    assert fetched(from_hub(REPO, None), hub) and not hub.gets(NAME)


@pytest.mark.parametrize("name", ["../evil.pt", "/abs/model.pt", "a/../../b.pt", "C:/x.pt"])
def test_a_file_outside_of_the_folder_is_refused(hub, name):
    hub.files[name] = b"x"
    with pytest.raises(UserError, match="outside of its folder"):
        from_hub(REPO, None)


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "../x", "~/x", "./x", "a/b\n", "a b/c"])
def test_what_is_no_name_on_the_hub_asks_nobody(hub, name):
    with pytest.raises(UserError, match="there is no folder"):
        from_hub(name, None)
    assert not hub.asked


def test_a_repository_without_a_checkpoint_says_so(hub):
    hub.files = {"config.json": b"{}"}
    with pytest.raises(UserError, match="holds no checkpoint"):
        from_hub(REPO, None)


def test_too_little_disk_is_said_before(hub, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=f"fetching {REPO} needs .* free"):
        from_hub(REPO, None)
    assert not hub.gets(NAME)


