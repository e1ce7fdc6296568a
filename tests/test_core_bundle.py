"""The CORE bundle: what is read is checked, and what is fetched comes whole or not at all."""

import gzip
import io
import json
import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nanochat import transfer
from nanochat.errors import NotWritten, UserError
from nanochat.evaluation import core_bundle
from nanochat.evaluation.core_bundle import BundleUnavailable, bundle_dir, open_bundle, read_bundle
from nanochat.files import base_dir

YAML = """icl_tasks:
- label: pick
  dataset_uri: some/pick.jsonl
  num_fewshot: [3]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
- {label: mean, dataset_uri: some/mean.jsonl, num_fewshot: [0], icl_task_type: schema}
- {label: go on, dataset_uri: go_on.jsonl, num_fewshot: [10], icl_task_type: language_modeling, has_categories: true}
"""
CSV = ("Eval Task,#shots,Random baseline,Description\n"
       "pick,3,25,\"a, b\"\nmean,0,50,x\ngo on,10,0,y\nnever asked,0,9.1,z\n")
ROWS = {
    "some/pick.jsonl": [{"query": "q", "choices": ["a", "b", "c"], "gold": 2},
                        {"query": "é", "choices": ["a", "b"], "gold": 0}],
    "some/mean.jsonl": [{"context_options": ["a", "b"], "continuation": "c", "gold": 1}],
    "go_on.jsonl": [{"context": "c", "continuation": "d", "category": "e"}],
}


def files():
    texts = {"core.yaml": YAML, "eval_meta_data.csv": CSV}
    return texts | {f"eval_data/{name}": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) for name,
                    rows in ROWS.items()}


@pytest.fixture
def bundle(tmp_path):
    for name, text in files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


# ---- reading

def test_tasks_are_those_of_the_yaml_in_its_order(bundle):
    tasks = read_bundle(bundle).tasks
    assert [(t.label, t.kind, t.shots, t.delimiter, t.baseline) for t in tasks] == [
        ("pick", "multiple_choice", 3, "\nAnswer: ", 0.25), ("mean", "schema", 0, " ", 0.5),
        ("go on", "language_modeling", 10, " ", 0.0)]
    assert [t.rows() for t in tasks] == list(ROWS.values())


def test_packed_files_do_as_well_and_missing_ones_are_named(bundle):
    path = bundle / "eval_data/some/pick.jsonl"
    path.with_name("pick.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    found = read_bundle(bundle)
    assert found.missing() == [] and found.tasks[0].rows() == ROWS["some/pick.jsonl"]
    found.check()
    path.with_name("pick.jsonl.gz").unlink()
    assert found.missing() == ["pick"] and [task.label for task in found.present().tasks] == ["mean", "go on"]
    for asked in (found.check, found.tasks[0].rows):
        with pytest.raises(UserError, match=r"pick.*pick\.jsonl.*remove the task from core.yaml"):
            asked()


@pytest.mark.parametrize("name, change, told", [
    ("core.yaml", lambda text: None, "has no core.yaml"),
    ("core.yaml", lambda text: "icl_tasks: [", "core.yaml cannot be read as YAML"),
    ("core.yaml", lambda text: "tasks: []", "has no list icl_tasks"),
    ("core.yaml", lambda text: text.replace("schema", "poem"), r"task 2 \(mean\): icl_task_type is 'poem'"),
    ("core.yaml", lambda text: text.replace("some/mean", "../mean"), r"mean\): dataset_uri is '../mean.jsonl'"),
    ("core.yaml", lambda text: text.replace("some/mean", "/etc/mean"), r"mean\): dataset_uri"),
    ("core.yaml", lambda text: text.replace("[10]", "[x]"), r"go on\): num_fewshot is \['x'\]"),
    ("core.yaml", lambda text: text.replace("label: mean", "label: pick"), "'pick' twice"),
    ("core.yaml", lambda text: text.replace("label: mean", "label: odd"), r"\(odd\): eval_meta_data.csv has no row"),
    ("eval_meta_data.csv", lambda text: None, "eval_meta_data.csv is missing"),
    ("eval_meta_data.csv", lambda text: text.replace("Random baseline", "Chance"), "needs the columns"),
    ("eval_meta_data.csv", lambda text: text.replace(",50,", ",100,"), "baseline of mean is '100'"),
    ("eval_meta_data.csv", lambda text: text.replace(",50,", ",,"), "baseline of mean is ''"),
])
def test_a_broken_list_of_tasks_is_told(bundle, name, change, told):
    text = change((bundle / name).read_text())
    (bundle / name).unlink() if text is None else (bundle / name).write_text(text)
    with pytest.raises(UserError, match=told):
        read_bundle(bundle)


@pytest.mark.parametrize("task, line, told", [
    (0, "{", "line 3: this is not JSON"),
    (0, "[1]", "line 3: a row is a JSON object"),
    (0, '{"query": "q", "gold": 0}', "line 3: a row of multiple_choice needs 'choices' .list.; it is missing"),
    (0, '{"query": "q", "choices": ["a", "b"], "gold": "0"}',
     "line 3: a row of multiple_choice needs 'gold' .int.; it is str"),
    (0, '{"query": "q", "choices": ["a", "b"], "gold": true}',
     "line 3: a row of multiple_choice needs 'gold' .int.; it is bool"),
    (0, '{"query": "q", "choices": ["a", "b"], "gold": 2}', "line 3: gold is 2, but there are 2"),
    (0, '{"query": "q", "choices": ["a", "b"], "gold": -1}', "line 3: gold is -1"),
    (0, '{"query": "q", "choices": ["a", 1], "gold": 0}', "line 3: the options must be two texts"),
    (1, '{"context_options": ["a"], "continuation": "x", "gold": 0}', "line 2: the options must be two texts"),
    (2, '{"context": "q"}', "line 2: a row of language_modeling needs 'continuation'"),
    (2, b"\xff\xfe", "line 2: this is not JSON"),
])
def test_a_bad_row_is_told_with_its_file_and_line(bundle, task, line, told):
    path = bundle / "eval_data" / list(ROWS)[task]
    path.write_bytes(path.read_bytes() + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(UserError, match=f"{path.name}, {told}"):
        read_bundle(bundle).tasks[task].rows()


def test_an_empty_or_torn_file_is_told(bundle):
    path = bundle / "eval_data/go_on.jsonl"
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no rows"):
        read_bundle(bundle).tasks[2].rows()
    path.unlink()
    path.with_name("go_on.jsonl.gz").write_bytes(gzip.compress(b'{"context": "c", "continuation": "d"}\n' * 50)[:-20])
    with pytest.raises(UserError, match="cannot read .*go_on.jsonl.gz"):
        read_bundle(bundle).tasks[2].rows()


# ---- fetching

class BundleServer(ThreadingHTTPServer):
    """Answers every GET with `data`; `faults`: what to do at the first GET, the second, ..."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), BundleHandler)
        self.data, self.faults, self.count, self.ranges, self.etag = b"", [], 0, [], ""


class BundleHandler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.count += 1
        fault = server.faults.pop(0) if server.faults else None
        data, asked = server.data, self.headers.get("Range")
        server.ranges.append(asked)
        if fault == "wrong byte":
            data = data[:-200] + bytes([data[-200] ^ 1]) + data[-199:]
        start = int(asked[6:-1]) if asked and self.headers.get("If-Range") == server.etag else 0
        self.send_response(fault if isinstance(fault, int) else 206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        if fault == "html":
            self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[:len(data) // 2] if fault == "cut" else data[start:])


@pytest.fixture
def server(monkeypatch):
    server = BundleServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE_URL", f"http://127.0.0.1:{server.server_port}/bundle.zip")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(transfer, "BACK_OFF", 0.001)
    server.data = packed(files())
    yield server
    server.shutdown()
    server.server_close()


def packed(texts, folder="eval_bundle/"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            archive.writestr(folder + name, text)
        archive.writestr("__MACOSX/._core.yaml", "x")
    return buffer.getvalue()


def test_the_bundle_is_fetched_once(server):
    said = []
    tasks = open_bundle(say=said.append).tasks
    assert [task.rows() for task in tasks] == list(ROWS.values()) and bundle_dir() == base_dir() / "eval_bundle"
    assert len(said) == 2 and server.count == 1
    open_bundle(say=said.append)
    assert len(said) == 2 and server.count == 1
    assert [path.name for path in base_dir().iterdir()] == ["eval_bundle"]


def test_a_broken_connection_is_tried_again(server):
    server.faults = ["cut", 503]
    assert open_bundle().missing() == [] and server.count == 3
    assert [path.name for path in base_dir().iterdir()] == ["eval_bundle"]


@pytest.mark.parametrize("prepare, told", [
    (lambda server: server.faults.extend(["cut"] * 9), "cannot be downloaded from http"),
    (lambda server: server.faults.append(404), "answers 404"),
    (lambda server: setattr(server, "data", b"no zip at all"), "not a readable zip file"),
    (lambda server: setattr(server, "data", server.data[:-300]), "not a readable zip file"),
    (lambda server: setattr(server, "data", packed({"../core.yaml": YAML})), "outside of the folder"),
    (lambda server: setattr(server, "data", packed({"x": "y"}, "/abs/")), "outside of the folder"),
    (lambda server: setattr(server, "data", packed({"x": "y"}, "C:\\abs\\")), "outside of the folder"),
    (lambda server: setattr(server, "data", packed({"x": "y"})), "no core.yaml"),
    (lambda server: setattr(server, "data", packed({"core.yaml": "[]"})), "no list icl_tasks"),
])
def test_what_is_not_a_whole_bundle_is_refused_and_leaves_nothing(server, prepare, told):
    prepare(server)
    with pytest.raises(UserError, match=told):
        open_bundle()
    assert list(base_dir().iterdir()) == []


def test_a_flipped_byte_is_seen(server):
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:  # not compressed: nothing but the checksum can tell
        for name, text in files().items():
            archive.writestr(name, text)
    server.data = stored.getvalue().replace(b'"choices": ["a"', b'"choices": ["x"')
    with pytest.raises(UserError, match="damaged: the checksum of eval_data/some/pick.jsonl is wrong"):
        open_bundle()
    assert list(base_dir().iterdir()) == []


def test_a_bundle_that_broke_off_or_came_damaged_is_mended(server, capsys):
    server.faults = ["html", "cut"] + [503] * 9
    server.etag = "v1"
    with pytest.raises(BundleUnavailable, match="answers 503, 6 times in a row"):
        open_bundle()
    part = ".eval_bundle.zip.part"
    assert sorted(path.name for path in base_dir().iterdir()) == [part, f"{part}.version"]
    server.faults, server.ranges = ["wrong byte"], []
    assert open_bundle().missing() == []
    half = len(server.data) // 2
    assert server.ranges == [f"bytes={half}-", None]  # the rest, and as that was damaged, all of it again
    assert "came damaged" in capsys.readouterr().out
    assert [path.name for path in base_dir().iterdir()] == ["eval_bundle"]


def test_a_full_disk_is_a_sentence_and_leaves_nothing(server, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(NotWritten, match="the CORE bundle needs .* free"):
        open_bundle()
    monkeypatch.undo()
    monkeypatch.setattr(zipfile.ZipFile, "extractall", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(UserError):
        core_bundle.fetch_bundle(base_dir() / "eval_bundle")
    assert list(base_dir().iterdir()) == []


def test_a_zip_that_swells_is_refused(server, monkeypatch):
    monkeypatch.setattr(core_bundle, "MAX_UNPACKED", 100)
    with pytest.raises(UserError, match="would grow to"):
        open_bundle()


def test_without_a_network_or_a_folder_it_is_said_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(transfer, "BACK_OFF", 0.001)
    monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE_URL", "http://127.0.0.1:9/x.zip")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(BundleUnavailable, match=r"cannot be downloaded from http://127.0.0.1:9/x.zip: .*--bundle"):
        open_bundle()
    with pytest.raises(BundleUnavailable, match="there is no CORE bundle at"):
        open_bundle(fetch=False)
    with pytest.raises(BundleUnavailable, match="there is no folder .*nowhere"):
        open_bundle(tmp_path / "nowhere")
    monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE_URL", "bundle.zip")
    with pytest.raises(BundleUnavailable, match="is not a URL"):
        open_bundle()
    assert list(base_dir().iterdir()) == []


def test_another_folder_is_read_where_it_is(bundle):
    assert len(open_bundle(str(bundle)).tasks) == 3
    (bundle / "core.yaml").unlink()
    with pytest.raises(UserError, match="has no core.yaml"):
        open_bundle(bundle)
