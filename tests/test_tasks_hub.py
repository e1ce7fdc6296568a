"""Hub data sets read from a mirror folder: the hub's order, the published prompts, grading, and clear errors.

Covers tasks/hub.py, arc.py, gsm8k.py, humaneval.py, mmlu.py, multiple_choice.py and smoltalk.py.
"""

import csv
import gzip
import hashlib
import io
import json
import os
from itertools import islice

import pytest

from nanochat import transfer
from nanochat.errors import UserError
from nanochat.small_world import documents
from nanochat.tokenizer import RustBPETokenizer
from nanochat.tokenizer.conversation import turns_of
from nanochat.tools.sandbox import passes
from tasks.arc import ARC
from tasks.base import reference_text
from tasks.gsm8k import GSM8K, parts_of
from tasks.hub import load_rows
from tasks.humaneval import HumanEval, program_of, setting_of
from tasks.mmlu import MMLU
from tasks.multiple_choice import prompt
from tasks.smoltalk import SmolTalk
from tests.test_tasks_small_world import as_written

ARC_ROW = {"id": "a", "question": "Why?", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]},
           "answerKey": "B"}
MMLU_ROW = {"question": "Who?", "subject": "history", "choices": ["p", "q", "r", "s"], "answer": 3}
GSM8K_ROW = {"question": "How many?", "answer": "He has 12/60=<<12/60=0.2>>0.2, so <<2*2=4>>4.\n#### 1,200"}
HUMANEVAL_ROW = {"task_id": "T/0",
                 "prompt": "import math\nfrom typing import List\n\n\ndef f(x: int) -> int:\n    '''Add one.'''\n",
                 "canonical_solution": "    return x + 1\n", "entry_point": "f",
                 "test": "def check(candidate):\n    assert candidate(1) == 2\n"}


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A function that writes rows into a mirror."""
    folder = tmp_path / "mirror"
    monkeypatch.setenv("NANOCHAT_TASK_DATA", str(folder))

    def write(where: str, rows: list[dict]):
        path = folder / where
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return path
    return write


def test_rows_come_in_the_order_that_datasets_shuffles_to(mirror):
    from datasets import Dataset
    for n in (1, 2, 7, 100, 1319):
        rows = [{"question": str(i), "answer": "#### 1"} for i in range(n)]
        want = Dataset.from_list(rows).shuffle(seed=42)["question"]
        for ending in ("jsonl", "jsonl.gz", "parquet"):
            path = mirror(f"openai/gsm8k/main/test.{ending}", rows)
            found = load_rows("openai/gsm8k", "main", "test", ("question", "answer"))
            assert [row["question"] for row in found] == list(want)
            path.unlink()


def test_hub_and_mirror_give_the_same_rows(mirror, monkeypatch):
    import datasets
    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(50)]
    mirror("openai/gsm8k/main/train.jsonl", rows)
    from_mirror = list(GSM8K("main", "train"))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k))
                        or datasets.Dataset.from_list(rows))
    monkeypatch.delenv("NANOCHAT_TASK_DATA")
    assert list(GSM8K("main", "train")) == from_mirror
    assert asked == [(("openai/gsm8k", "main"), {"split": "train"})]


def test_a_copy_of_the_hubs_own_files_is_a_mirror(mirror):
    rows = [{"messages": [{"role": "user", "content": f"u{i}"}, {"role": "assistant", "content": f"a{i}"}]}
            for i in range(30)]
    mirror("HuggingFaceTB/smol-smoltalk/data/train-00000-of-00002.parquet", rows[:10])
    with pytest.raises(UserError, match="holds 1 of the parts of train"):
        SmolTalk("train")
    mirror("HuggingFaceTB/smol-smoltalk/data/train-00001-of-00002.parquet", rows[10:])
    parts = list(SmolTalk("train"))
    mirror("HuggingFaceTB/smol-smoltalk/default/train.jsonl", rows)
    assert list(SmolTalk("train")) == parts != rows
    assert sorted(c["messages"][0]["content"] for c in parts) == sorted(f"u{i}" for i in range(30))
    turns_of(parts[0])


def test_choices_are_put_as_published():
    assert prompt("Why?", ["x", "y"], "AB") == ("Multiple Choice question: Why?\n- x=A\n- y=B\n\n"
                                               "Respond only with the letter of the correct answer.")


def test_arc(mirror):
    numbered = {**ARC_ROW, "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    mirror("allenai/ai2_arc/ARC-Easy/test.jsonl", [ARC_ROW, numbered])
    task = ARC("ARC-Easy", "test")
    assert (task.name, task.kind, task.chance, len(task)) == ("ARC-Easy", "categorical", 0.25, 2)
    by_answer = {reference_text(c): c for c in task}
    assert by_answer["B"]["letters"] == ["A", "B", "C"] and by_answer["2"]["letters"] == ["1", "2"]
    assert by_answer["B"]["messages"][0]["content"] == prompt("Why?", ["x", "y", "z"], "ABC")
    assert [task.evaluate(by_answer["B"], letter) for letter in "ABC"] == [False, True, False]


@pytest.mark.parametrize("wrong",
                         [{"answerKey": "E"}, {"choices": {"text": ["x"], "label": ["A", "B"]}},
                          {"choices": ["x", "y"]}])
def test_arc_row_that_fits_not_together_is_named(mirror, wrong):
    mirror("allenai/ai2_arc/ARC-Challenge/train.jsonl", [{**ARC_ROW, **wrong}])
    with pytest.raises(UserError, match="ARC-Challenge, question 'Why\\?'"):
        ARC("ARC-Challenge", "train")[0]


def test_mmlu_plain_and_nested(mirror):
    mirror("cais/mmlu/all/test.parquet", [MMLU_ROW])
    task = MMLU("all", "test")
    assert (task.name, task.kind, task.chance) == ("MMLU", "categorical", 0.25)
    conversation = task[0]
    assert conversation["messages"][0]["content"] == prompt("Who?", "pqrs", "ABCD")
    assert reference_text(conversation) == "D" and conversation["letters"] == list("ABCD")
    assert conversation["subject"] == "history"
    for ending in ("jsonl", "parquet"):
        path = mirror(f"cais/mmlu/auxiliary_train/train.{ending}", [{"train": MMLU_ROW}])
        assert MMLU("auxiliary_train", "train")[0] == conversation
        path.unlink()
    mirror("cais/mmlu/auxiliary_train/train.jsonl", [MMLU_ROW])
    assert MMLU("auxiliary_train", "train")[0] == conversation
    mirror("cais/mmlu/all/dev.jsonl", [{**MMLU_ROW, "answer": 4}])
    with pytest.raises(UserError, match="answer from 0 to 3, and there are 4 and 4"):
        MMLU("all", "dev")[0]
    mirror("cais/mmlu/all/dev.jsonl", [{**MMLU_ROW, "choices": "['p', 'q']"}])
    with pytest.raises(UserError, match="question 'Who\\?': there should be four choices"):
        MMLU("all", "dev")[0]


def test_gsm8k_calculations_become_calls(mirror):
    mirror("openai/gsm8k/socratic/test.jsonl", [GSM8K_ROW])
    task = GSM8K("socratic", "test")
    assert task[0]["messages"][1]["content"] == [
        {"type": "text", "text": "He has 12/60="}, {"type": "python", "text": "12/60"},
        {"type": "python_output", "text": "0.2"},
        {"type": "text", "text": "0.2, so "}, {"type": "python", "text": "2*2"}, {"type": "python_output", "text": "4"},
        {"type": "text", "text": "4.\n#### 1,200"}]
    for answer, right in (("#### 1200", True), ("I think\n#### 1,200<|assistant_end|>", True),
                          ("#### 1200 #### 3", True), ("1200", False),
                          ("#### 1201", False), ("#### 1200.0", False), ("", False), (as_written(task[0]), True)):
        assert task.evaluate(task[0], answer) == right, answer
    bare = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "no number"}]}
    assert not task.evaluate(bare, "none here either")
    assert parts_of("<<2*3=6=6>>") == [{"type": "python", "text": "2*3=6"}, {"type": "python_output", "text": "6"}]
    assert parts_of("<<5>>") == [{"type": "python", "text": "5"}, {"type": "python_output", "text": ""}]


def test_humaneval_program(mirror):
    mirror("openai/openai_humaneval/openai_humaneval/test.jsonl", [HUMANEVAL_ROW])
    task = HumanEval()
    prompt = HUMANEVAL_ROW["prompt"]
    assert task[0]["messages"] == [{"role": "user", "content": prompt},
                                   {"role": "assistant", "content": prompt + "    return x + 1\n"}]
    assert setting_of(prompt, "f") == "import math\nfrom typing import List"
    start = "import math\nfrom typing import List\n\n"
    answer = "Here:\n```python\ndef f(x):\n    return 2\n```\nor\n```\nf = 1\n```"
    assert program_of(prompt, answer) == start + "def f(x):\n    return 2"
    assert program_of(prompt, "```\nf = 1\n```") == start + "f = 1"
    for answer in ("def f(x): return 2", "\n def f(x): return 2\n", "So:\n```python \ndef f(x): return 2\n```",
                   "```py\ndef f(x): return 2\n```", "```python\r\ndef f(x): return 2\r\n```"):
        assert program_of(prompt, answer) == start + "def f(x): return 2"


HARD_PROMPT = """from __future__ import annotations
from typing import (
    List,
    Tuple)
import math; import re

FACTOR = 3


@dataclass_like
class Pair:
    one: int = 1


def poly(xs: list, x: float):
    \"\"\" Value of the polynomial with coefficients xs at x. \"\"\"
    return sum(c * math.pow(x, i) for i, c in enumerate(xs))


@cached
def find_root(xs: list):
    \"\"\" Find x with poly(xs, x) = 0.

    >>> find_root([-6, 3])
    \"\"\"
"""
PLAIN_PROMPT = HARD_PROMPT.replace("@dataclass_like\n", "").replace("@cached\n", "")
FUNCTION = "def find_root(xs):\n    a, b = xs\n    return -a / b\n"


def test_what_a_humaneval_prompt_defines_stays_and_the_function_asked_for_goes():
    setting = setting_of(HARD_PROMPT, "find_root")
    assert setting.splitlines() == [
        "from __future__ import annotations", "from typing import (", "    List,", "    Tuple)",
        "import math; import re", "FACTOR = 3", "@dataclass_like", "class Pair:",
        "    one: int = 1", "def poly(xs: list, x: float):",
        '    """ Value of the polynomial with coefficients xs at x. """',
        "    return sum(c * math.pow(x, i) for i, c in enumerate(xs))"]
    assert setting_of("import os\n\ndef f(x):\n", "f") == "import os"              # a signature alone
    assert setting_of("import os\nthis is no Python\ndef f(x):\n", "f").startswith("import os\nthis")
    assert setting_of("no function here", "f") == setting_of("", "f") == ""


@pytest.mark.parametrize("answer", [
    FUNCTION, PLAIN_PROMPT + "    a, b = xs\n    return -a / b\n",
    "    a, b = xs\n    return -a / b\n", "a, b = xs\nreturn -a / b", "a, b = xs\n    return -a / b\n",
    f"Sure, here it is:\n\n```python\n{FUNCTION}```\n\nIt returns x.",
    "```\n    a, b = xs\n    return -a / b\n```",
    f"It is called so:\n```\nfind_root([1, 2])\n```\nand this is it:\n```py\n{FUNCTION}```",
    f"```python\nfrom __future__ import annotations\n{FUNCTION}```"])
def test_a_right_humaneval_program_passes_in_every_form_and_a_near_miss_does_not(answer):
    checks = "def check(candidate):\n    assert abs(poly([-6, 3], candidate([-6, 3]))) < 1e-4\n\ncheck(find_root)\n"
    for wrong in (False, True):
        program = program_of(PLAIN_PROMPT, answer.replace("-a / b", "a / b") if wrong else answer, "find_root")
        assert passes(program, checks).ok is not wrong, program


def test_other_readings_of_a_humaneval_answer_are_lenient(mirror):
    mirror("openai/openai_humaneval/openai_humaneval/test.jsonl", [HUMANEVAL_ROW])
    task = HumanEval()
    chat, body = task[0], "    return x + one\n"
    for answer in (f"First\n```python\none = 1\n```\nthen\n```python\ndef f(x):\n{body}```",
                   f"```python\none = 1\ndef f(x):\n{body}",                 # not closed
                   f"~~~\none = 1\ndef f(x):\n{body}~~~",
                   "- so:\n  ```python\n  one = 1\n  def f(x):\n      return x + one\n  ```",
                   f"This does it:\n\nimport math\none = 1\n\ndef f(x):\n{body}\nI hope this helps."):
        for right in (True, False):
            given = answer if right else answer.replace("x + one", "x - one")
            assert not task.evaluate(chat, given) and task.evaluate_lenient(chat, given) == right, given
    assert task[:1].evaluate_lenient(chat, "~~~\ndef f(x):\n    return x + 1\n~~~")  # a view grades as its task
    for answer in ("", "I cannot.", "def f(x):\n    return x", "```", "(" * 5000, "\0"):
        assert not task.evaluate(chat, answer) and not task.evaluate_lenient(chat, answer)


def test_gsm8k_is_read_strictly_and_leniently(mirror):
    mirror("openai/gsm8k/main/test.jsonl", [GSM8K_ROW])
    task = GSM8K("main", "test")
    for answer, strict, lenient in (("#### 1200", True, True), ("#### $1,200.", False, True), ("1200", False, True),
                                    ("#### 1200.0 apples", False, True), ("#### 120", False, False),
                                    ("#### 12001", False, False), ("#### -1200", False, False)):
        assert (task.evaluate(task[0], answer), task.evaluate_lenient(task[0], answer)) == (strict, lenient), answer


def test_humaneval_is_graded_by_running(mirror):
    mirror("openai/openai_humaneval/openai_humaneval/test.jsonl", [HUMANEVAL_ROW])
    task = HumanEval()
    assert task.evaluate(task[0], reference_text(task[0]) + "<|assistant_end|>")
    for wrong in ("def f(x):\n    return x", "import sys\nsys.exit(0)", "def f(x)", ""):
        assert not task.evaluate(task[0], wrong)


# ---- real rows, where they are present


def unpacked(path) -> str:
    return gzip.open(path, "rt", encoding="utf-8").read()


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in unpacked(path).splitlines()]


def test_real_rows_all_render_and_references_are_right(shared, mirror):
    data = shared / "data"
    arc = [{"question": r["question"]["stem"], "answerKey": r["answerKey"],
            "choices": {key: [c[key] for c in r["question"]["choices"]] for key in ("text", "label")}}
           for r in rows_of(data / "arc/ARC-Challenge-Test.jsonl.gz")]
    mmlu = [{"question": r[0], "choices": r[1:5], "answer": "ABCD".index(r[5]),
             "subject": path.name.removesuffix("_dev.csv.gz")}
            for path in sorted((data / "mmlu/dev").glob("*.csv.gz")) for r in csv.reader(io.StringIO(unpacked(path)))]
    mirror("allenai/ai2_arc/ARC-Challenge/test.parquet", arc)
    mirror("cais/mmlu/all/dev.jsonl", mmlu)
    mirror("openai/gsm8k/main/test.jsonl.gz", rows_of(data / "gsm8k/test.jsonl.gz"))
    mirror("openai/openai_humaneval/openai_humaneval/test.jsonl.gz", rows_of(data / "humaneval/HumanEval.jsonl.gz"))
    tasks = [ARC("ARC-Challenge", "test"), MMLU("all", "dev"), GSM8K("main", "test"), HumanEval()]
    assert [len(task) for task in tasks] == [1172, 285, 1319, 164]
    tokenizer = RustBPETokenizer.train_from_iterator(islice(documents(0), 300), 400)
    for task in tasks:
        for i, conversation in enumerate(task):
            turns_of(conversation)
            if i < 40:
                ids, mask = tokenizer.render_conversation(conversation, 4096)
                assert len(ids) == len(mask) and 0 < sum(mask) < len(ids)
            if task.kind == "categorical":
                assert [task.evaluate(conversation, l) for l in conversation["letters"]].count(True) == 1
            elif task.name == "GSM8K":
                assert task.evaluate(conversation, as_written(conversation))
                assert not task.evaluate(conversation, "#### 3.1415")


def test_real_prompts_with_helpers_take_any_form(shared, mirror):
    mirror("openai/openai_humaneval/openai_humaneval/test.jsonl.gz",
           rows_of(shared / "data/humaneval/HumanEval.jsonl.gz"))
    task = HumanEval()
    found = [chat for chat in task if chat["task_id"] in ("HumanEval/32", "HumanEval/38", "HumanEval/50")]
    for chat in found:
        prompt, whole = chat["messages"][0]["content"], reference_text(chat)
        for answer in (whole[whole.rindex(f"def {chat['entry_point']}"):], f"```\n{whole[len(prompt):]}```"):
            assert task.evaluate(chat, answer), (chat["task_id"], answer)
    assert len(found) == 3


def test_real_programs_are_whole(shared, mirror):
    mirror("openai/openai_humaneval/openai_humaneval/test.jsonl.gz",
           rows_of(shared / "data/humaneval/HumanEval.jsonl.gz"))
    for conversation in HumanEval():
        compile(program_of(conversation["messages"][0]["content"], reference_text(conversation)), "program", "exec")
        compile(conversation["test"], "test", "exec")


@pytest.mark.slow
def test_all_real_programs_pass_and_their_heads_alone_do_not(shared, mirror):
    mirror("openai/openai_humaneval/openai_humaneval/test.jsonl.gz",
           rows_of(shared / "data/humaneval/HumanEval.jsonl.gz"))
    task = HumanEval()
    for i, conversation in enumerate(task):
        assert task.evaluate(conversation, reference_text(conversation)), conversation["task_id"]
        assert i % 10 or not task.evaluate(conversation, conversation["messages"][0]["content"] + "    return 'x'\n")


# ---- what can be wrong


def test_a_split_the_mirror_lacks_is_named_with_where_it_was_looked_for(mirror, tmp_path):
    with pytest.raises(UserError,
                       match=f"no openai/gsm8k, main, test: looked for {tmp_path}/mirror/openai/gsm8k/main/test.jsonl"):
        GSM8K("main", "test")


@pytest.mark.parametrize("line, what", [(b"{torn", "line 3 is not JSON"), (b"[1]", "line 3: a row is a JSON object"),
                                        (b'{"question": "x"}',
                                         "line 3: this row has no column answer; it has question"),
                                        (b"\xff\xfe\x00", "line 3 is not JSON")])
def test_a_line_that_is_no_row_is_named(mirror, line, what):
    path = mirror("openai/gsm8k/main/test.jsonl", [GSM8K_ROW])
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=what):
        GSM8K("main", "test")


def test_files_that_are_torn_or_empty_or_lack_a_column(mirror):
    path = mirror("openai/gsm8k/main/test.jsonl.gz", [GSM8K_ROW] * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="test.jsonl.gz is not a complete gzip file"):
        GSM8K("main", "test")
    path.unlink()
    for content in (b"", b"\n\n"):
        mirror("openai/gsm8k/main/train.jsonl", []).write_bytes(content)
        with pytest.raises(UserError, match="train.jsonl holds nothing"):
            GSM8K("main", "train")
    path = mirror("openai/gsm8k/socratic/test.parquet", [{"question": "x"}])
    with pytest.raises(UserError, match="test.parquet has no column answer; it has question"):
        GSM8K("socratic", "test")
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="test.parquet cannot be read as parquet"):
        GSM8K("socratic", "test")


def test_without_network_the_mirror_is_explained(monkeypatch):
    import datasets
    monkeypatch.delenv("NANOCHAT_TASK_DATA", raising=False)
    monkeypatch.setattr(transfer, "BACK_OFF", 0.001)
    asked = []

    def unreachable(*arguments, **options):
        asked.append(arguments)
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\nmore")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError,
                       match="Couldn't reach 'openai/gsm8k' on the Hub\\).*set NANOCHAT_TASK_DATA to a folder"):
        GSM8K("main", "test")
    assert len(asked) == 3


def refused(status, retry_after=None):
    """The error of `datasets` for a status, raised for one of the hub's session."""
    answer = type("Answer", (), {"status_code": status, "headers": {"Retry-After": retry_after} if retry_after else {}})
    inner = ConnectionError("inner")
    inner.response = answer
    outer = RuntimeError("An error occurred while generating the dataset")
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize("errors, told, calls", [
    ([refused(503), refused(429, "3")], None, 3), ([refused(500)] * 9, "answers 500, 6 times", 6),
    ([refused(404)], "answers 404", 1), ([refused(401)], "HF_TOKEN", 1),
    ([json.JSONDecodeError("x", "<html>", 0)] * 9, "sign in", 3),
    ([ValueError("BuilderConfig 'x' not found")], "not found", 1),
    ([OSError(28, "No space left on device")], "No space left", 1)], ids=lambda value: str(value)[:30])
def test_a_hub_that_fails_is_asked_again_where_that_helps(monkeypatch, errors, told, calls):
    import datasets
    monkeypatch.delenv("NANOCHAT_TASK_DATA", raising=False)
    waits, asked, errors = [], [], list(errors)
    monkeypatch.setattr(transfer, "pause", lambda seconds, stop: waits.append(seconds))

    def load(*arguments, **options):
        asked.append(options)
        if errors:
            raise errors.pop(0)
        return datasets.Dataset.from_list([{"question": "q", "answer": "#### 1"}])
    monkeypatch.setattr(datasets, "load_dataset", load)
    if told is None:
        assert len(GSM8K("main", "test")) == 1 and 3 <= waits[1] <= 4
    else:
        with pytest.raises(UserError, match=told):
            GSM8K("main", "test")
    assert len(asked) == calls and len(waits) == calls - 1


@pytest.mark.parametrize("times", [1, 9])
def test_a_damaged_file_of_a_data_set_is_fetched_again(monkeypatch, tmp_path, capsys, times):
    import datasets
    from huggingface_hub import constants
    monkeypatch.delenv("NANOCHAT_TASK_DATA", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "datasets--openai--gsm8k"
    right, asked = b"the bytes that the hub lists", []
    blob = repo / "blobs" / hashlib.sha256(right).hexdigest()
    old = repo / "blobs" / ("0" * 64)  # of an earlier day: it is not read anew at every start
    link = repo / "snapshots" / "commit" / "main" / "test.parquet"
    link.parent.mkdir(parents=True)
    blob.parent.mkdir(parents=True)
    old.write_bytes(b"x")
    os.utime(old, (1, 1))

    def load(*arguments, **options):
        asked.append(options)
        if not blob.exists():
            blob.write_bytes(b"other" if len(asked) <= times else right)
            link.symlink_to(blob)
        return datasets.Dataset.from_list([{"question": "q", "answer": "#### 1"}])
    monkeypatch.setattr(datasets, "load_dataset", load)
    if times == 1:
        assert len(GSM8K("main", "test")) == 1 and blob.read_bytes() == right
    else:
        with pytest.raises(UserError, match="test.parquet came damaged .*, twice"):
            GSM8K("main", "test")
        assert not blob.exists() and not link.is_symlink()
    assert asked == [{"split": "test"}, {"split": "test", "download_mode": "force_redownload"}] and old.exists()
    assert "test.parquet came damaged" in capsys.readouterr().out


@pytest.mark.parametrize("make, what", [
    (lambda: ARC("ARC-Hard", "test"), "no subset of ARC 'ARC-Hard'; there is ARC-Easy, ARC-Challenge"),
    (lambda: ARC("ARC-Easy", "dev"), "no split of ARC 'dev'; there is train, validation, test"),
    (lambda: MMLU("some", "test"), "no subset of MMLU 'some'"),
    (lambda: MMLU("all", "train"), "no split of MMLU, all 'train'"),
    (lambda: MMLU("auxiliary_train", "test"), "auxiliary_train 'test'; there is train"),
    (lambda: GSM8K("side", "test"), "no subset of GSM8K 'side'"),
    (lambda: GSM8K("main", "dev"), "no split of GSM8K 'dev'"),
    (lambda: SmolTalk("dev"), "no split of SmolTalk 'dev'")])
def test_subsets_and_splits_that_do_not_exist_are_refused(make, what):
    with pytest.raises(UserError, match=what):
        make()
