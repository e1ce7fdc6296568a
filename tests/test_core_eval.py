"""CORE: prompts as published, and batches that answer as one prompt at a time does."""

import contextlib
import csv
import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch

from nanochat import transfer
from nanochat.checkpoint import save_checkpoint
from nanochat.distributed import Ranks
from nanochat.errors import NotWritten, UserError
from nanochat.evaluation import core as core_eval
from nanochat.evaluation.core import (
    Question,
    common_prefix,
    cut_left,
    evaluate_core,
    evaluate_core_task,
    load_examples,
    make_question,
    prompt_texts,
    score_plain,
    score_questions,
)
from nanochat.evaluation.core_bundle import Bundle, CoreTask, read_bundle
from nanochat.files import base_dir
from nanochat.loading import load_model
from nanochat.logs import read_log
from nanochat.tokenizer import RustBPETokenizer
from tests.conftest import ROOT
from tests.helpers import free_port, small_model

CPU = torch.device("cpu")
WORDS = "the cat sat on a mat and dog ran to my red house in green fields of corn where rain falls".split()


class LetterTokenizer:
    """One token a letter; 0 is bos."""

    def get_bos_token_id(self):
        return 0

    def encode(self, text, prepend=None):
        if isinstance(text, list):
            return [self.encode(part, prepend) for part in text]
        return [prepend, *(ord(c) % 96 + 1 for c in text)]


def task_of(tmp_path, kind, rows, shots=0, delimiter=" ", baseline=0.25, label="trial"):
    path = tmp_path / f"{label}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CoreTask(label, kind, shots, delimiter, baseline, path)


def random_rows(kind, count, seed=0):
    dice = random.Random(seed)

    def text(low, high):
        return " ".join(dice.choices(WORDS, k=dice.randint(low, high)))
    if kind == "multiple_choice":
        return [{"query": text(1, 40), "choices": [text(1, 4) for _ in range(dice.randint(2, 5))],
                 "gold": dice.randrange(2)}
                for _ in range(count)]
    if kind == "schema":
        return [{"context_options": [text(1, 9), text(1, 9)], "continuation": text(2, 6),
                 "gold": dice.randrange(2)} for _ in range(count)]
    return [{"context": text(1, 40) + " ", "continuation": text(1, 3)} for _ in range(count)]


# ---- prompts

def test_the_examples_are_shuffled_with_1337_then_cut(tmp_path):
    rows = [{"context": str(i), "continuation": "x"} for i in range(30)]
    order = list(range(30))
    random.Random(1337).shuffle(order)
    asked = load_examples(task_of(tmp_path, "language_modeling", rows), 7)
    assert [int(row["context"]) for row in asked] == order[:7]
    assert len(load_examples(task_of(tmp_path, "language_modeling", rows))) == 30


def test_the_examples_before_a_question_are_drawn_from_all_others_with_1234_plus_its_number(tmp_path):
    rows = [{"context": f"c{i}", "continuation": f"d{i}"} for i in range(9)]
    task = task_of(tmp_path, "language_modeling", rows, shots=4)
    for i in range(9):
        drawn = random.Random(1234 + i).sample([j for j in range(9) if j != i], 4)
        expected = "".join(f"c{j} d{j}\n\n" for j in drawn) + f"c{i} d{i}"
        assert prompt_texts(task, rows, i)[1] == expected


def test_prompts_of_each_kind_read_as_published(tmp_path):
    choice = [{"query": "Q: a? ", "choices": ["yes", "no"], "gold": 1},
              {"query": "Q: b?", "choices": ["x", "y"], "gold": 0}]
    task = task_of(tmp_path, "multiple_choice", choice, shots=1, delimiter="\nAnswer: ")
    assert prompt_texts(task, choice, 0) == ["Q: b?\nAnswer: x\n\nQ: a? \nAnswer: yes",
                                             "Q: b?\nAnswer: x\n\nQ: a? \nAnswer: no"]
    schema = [{"context_options": ["He", "She"], "continuation": "ran", "gold": 1},
              {"context_options": ["A", "B"], "continuation": "c", "gold": 0}]
    assert prompt_texts(task_of(tmp_path, "schema", schema, shots=1), schema, 0) == ["A c\n\nHe ran", "A c\n\nShe ran"]
    lm = [{"context": " one \n", "continuation": "two "}, {"context": "three: ", "continuation": " four"}]
    task = task_of(tmp_path, "language_modeling", lm, shots=1)
    assert prompt_texts(task, lm, 0) == ["three:  four\n\none", "three:  four\n\none two "]


def test_what_is_judged_is_what_differs(tmp_path):
    rows = [{"query": "ab", "choices": ["cat", "cow", "dog"], "gold": 0}]
    question = make_question(LetterTokenizer(), task_of(tmp_path, "multiple_choice", rows), rows, 0)
    assert question.starts == [4, 4, 4] and question.gold == 0  # bos a b space
    rows[0]["choices"] = ["cat", "cow"]
    assert make_question(LetterTokenizer(), task_of(tmp_path, "multiple_choice", rows), rows, 0).starts == [5, 5]
    rows = [{"context_options": ["x", "yy"], "continuation": "end", "gold": 1}]
    question = make_question(LetterTokenizer(), task_of(tmp_path, "schema", rows), rows, 0)
    assert [p[s:] for p, s in zip(question.prompts, question.starts)] == [LetterTokenizer().encode(" end", 0)[1:]] * 2
    rows = [{"context": "ab ", "continuation": "cd"}]
    question = make_question(LetterTokenizer(), task_of(tmp_path, "language_modeling", rows), rows, 0)
    assert question.prompts == [LetterTokenizer().encode("ab cd", 0)]
    assert question.starts == [3] and question.gold is None


def test_common_beginnings():
    dice = random.Random(0)
    for _ in range(300):
        rows = [[dice.randrange(2) for _ in range(dice.randrange(1, 12))] for _ in range(dice.randrange(1, 4))]
        n = common_prefix(rows)
        assert all(row[:n] == rows[0][:n] and len(row) >= n for row in rows)
        assert any(len(row) == n for row in rows) or len({row[n] for row in rows}) > 1


def test_prompts_beyond_ten_rows_of_the_model_lose_their_beginning():
    question = Question([list(range(20)), list(range(12))], [18, 9], 0)
    assert cut_left(question, 20) is question
    assert cut_left(question, 10) == Question([list(range(10, 20)), list(range(2, 12))], [8, 7], 0)
    # something must be before what is judged
    assert cut_left(Question([list(range(20))], [3], None), 10).starts == [1]


def test_too_few_rows_and_ids_that_do_not_go_on_are_told(tmp_path):
    task = task_of(tmp_path, "language_modeling", random_rows("language_modeling", 8), shots=5)
    with pytest.raises(UserError, match="trial puts 5 other examples .* only 5 rows: use --max-per-task=6"):
        load_examples(task, 5)

    class Joins(LetterTokenizer):
        def encode(self, text, prepend=None):
            return super().encode(text.replace("b c", "%") if isinstance(text, str) else text, prepend)
    rows = [{"context": "ab", "continuation": "cd"}]
    with pytest.raises(UserError, match="trial, example 0 .* not a prefix"):
        make_question(Joins(), task_of(tmp_path, "language_modeling", rows), rows, 0)


# ---- judging

def random_questions(seed, V=97):
    """Questions of all kinds: shared prefixes, duplicates, choices that differ in the last token or are prefixes."""
    dice = random.Random(seed)

    def ids(low, high):
        return [dice.randrange(V) for _ in range(dice.randint(low, high))]
    questions, story = [], ids(60, 90)
    for number in range(24):
        kind, before = number % 5, [0, *ids(1, 80)]
        if kind == 0:
            prompts = [before + ids(1, 6) for _ in range(dice.randint(2, 5))]
        elif kind == 1:
            prompts = [before + [n] for n in dice.sample(range(V), 4)]
        elif kind == 2:
            prompts = [before + story[:n] for n in dice.sample(range(1, 6), 3)]
        elif kind == 3:
            ending = ids(2, 6)
            prompts = [before + ids(1, 5) + ending for _ in range(2)]
            shared = common_prefix([prompt[::-1] for prompt in prompts])
            questions.append(Question(prompts, [len(prompt) - shared for prompt in prompts], dice.randrange(2)))
            continue
        else:
            prompt = [0, *story[:dice.randint(30, len(story))], *ids(1, 20)]
            questions.append(Question([prompt], [len(prompt) - 1 if dice.random() < 0.8 else len(prompt) - 2], None))
            continue
        questions.append(Question(prompts, [common_prefix(prompts)] * len(prompts), dice.randrange(len(prompts))))
    return questions


def most_likely(model, questions):
    """The same questions, every second one of language modelling with the model's own answer: some are then right."""
    for number, question in enumerate(question for question in questions if question.gold is None):
        if number % 2 == 0:
            (prompt,), (start,) = question.prompts, question.starts
            for t in range(start, len(prompt)):
                prompt[t] = int(model(torch.tensor([prompt[:t]]))[0, -1].argmax())
    return questions


@pytest.mark.parametrize("batch_tokens", [1, 700, 1 << 13])
@pytest.mark.parametrize("seed", range(3))
def test_batches_answer_as_one_prompt_at_a_time(seed, batch_tokens, monkeypatch):
    monkeypatch.setattr(core_eval, "TIE_MARGIN", 0.0)  # what batches say by themselves
    monkeypatch.setattr(core_eval, "MAX_LOGITS", 97 * 7)
    with torch.no_grad():
        model = small_model(seed, n_kv_head=1 if seed else 2)
        questions = most_likely(model, random_questions(seed))
        fast = score_questions(model, questions, batch_tokens)
        plain = [score_plain(model, question) for question in questions]
    assert {result.correct for result in plain} == {True, False}
    assert any(v.correct for q, v in zip(questions, plain) if q.gold is None)
    assert any(math.isnan(x) for v in plain for x in v.losses)
    for a, b in zip(fast, plain):
        assert a.correct == b.correct
        assert a.losses == pytest.approx(b.losses, abs=1e-3, nan_ok=True)


def test_what_prompts_begin_with_goes_through_the_model_once(monkeypatch):
    model, sizes = small_model(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden",
                        lambda ids, *args, **more: sizes.append(ids.shape) or hidden(ids, *args, **more))
    before = [0, *torch.randint(97, (199,)).tolist()]
    choices = [[5, 6, 7], [8, 9], [10, 11, 12], [1, 3]]
    score_questions(model, [Question([before + choice for choice in choices], [200] * 4, 0)])
    # all but the last of the beginning, then that one and the choices without their last
    assert sizes == [(1, 199), (4, 3)]
    sizes.clear()
    score_questions(model, [Question([before + [n] for n in range(5)], [200] * 5, 0)])
    assert sizes == [(1, 200)]  # they differ in the last id alone, which is only predicted


def test_different_questions_about_one_story_share_it(monkeypatch):
    model, count = small_model(), 0
    story, questions = [0, *torch.randint(97, (300,)).tolist()], []
    for _ in range(5):
        prompt = story + torch.randint(97, (10,)).tolist()
        questions.append(Question([prompt], [len(prompt) - 2], None))
    hidden = model.hidden

    def counted(ids, *args, **more):
        nonlocal count
        count += ids.numel()
        return hidden(ids, *args, **more)
    monkeypatch.setattr(model, "hidden", counted)
    score_questions(model, questions)
    assert 301 <= count < 400


def test_no_more_logits_at_once_than_allowed(monkeypatch):
    model, most = small_model(), 0
    head = model.head

    def watched(x):
        nonlocal most
        most = max(most, x.shape[0])
        return head(x)
    monkeypatch.setattr(model, "head", watched)
    monkeypatch.setattr(core_eval, "TIE_MARGIN", 0.0)
    monkeypatch.setattr(core_eval, "MAX_LOGITS", 97 * 4)
    score_questions(model, random_questions(1))
    assert most == 4


def test_ties_and_near_ties_are_settled_one_at_a_time(monkeypatch):
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens alike
    even = Question([[0, 1, 2], [0, 1, 3, 4]], [2, 2], 1)
    # the first of equal ones
    assert not score_plain(model, even).correct and not score_questions(model, [even])[0].correct
    lm = [Question([[0, 1, n]], [2], None) for n in (0, 5)]
    # arg max: the first
    assert [v.correct for v in score_questions(model, lm)] == [True, False]
    assert [score_plain(model, q).correct for q in lm] == [True, False]
    asked = []
    monkeypatch.setattr(core_eval, "score_plain",
                        lambda model, question: asked.append(question) or score_plain(model, question))
    score_questions(model, [even, *lm])
    assert asked == [even, *lm]
    asked.clear()
    clear = Question([[0, 1, 2], [0, 1, 3]], [2, 2], 1)
    score_questions(small_model(), [clear])
    assert asked == []


def test_a_choice_that_begins_another_counts_only_where_it_stands_first():
    model = small_model()
    short, long = [0, 1, 2], [0, 1, 2, 3]
    for prompts, gold in (([short, long], 0), ([long, short], 0)):
        question = Question(prompts, [3, 3], gold)
        for result in (score_plain(model, question), *score_questions(model, [question])):
            assert result.correct and sum(map(math.isnan, result.losses)) == 1


# ---- tasks

@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
def test_a_task_gives_what_its_definition_gives_for_any_number_of_ranks(tmp_path, monkeypatch, kind):
    model, rows = small_model(sequence_len=64), random_rows(kind, 23)
    task = task_of(tmp_path, kind, rows, shots=2)
    rows = load_examples(task)
    plain = [score_plain(model, cut_left(make_question(LetterTokenizer(), task, rows, i), 640))
             for i in range(len(rows))]
    parts = []
    for rank in range(3):  # what each rank hands in; the gather is tried for real below
        monkeypatch.setattr(core_eval, "gather_objects", lambda part, ranks: parts.append(part) or [part, *parts])
        with contextlib.suppress(KeyError):  # until the last one, some are missing
            result = evaluate_core_task(model, LetterTokenizer(), task, rows, Ranks(rank, rank, 3, CPU))
    assert sorted(len(found) for found, _ in parts) == [7, 8, 8]
    assert [v.correct for v in result.examples] == [v.correct for v in plain]
    monkeypatch.undo()
    result = evaluate_core_task(model, LetterTokenizer(), task, rows)
    assert [v.correct for v in result.examples] == [v.correct for v in plain]
    accuracy = sum(v.correct for v in plain) / 23
    assert result.accuracy == pytest.approx(accuracy) and result.centered == pytest.approx((accuracy - 0.25) / 0.75)


def test_one_rank_that_fails_tells_all(tmp_path, monkeypatch):
    rows = random_rows("schema", 4)
    monkeypatch.setattr(core_eval, "gather_objects", lambda part, ranks: [part, ({}, "row 7 is odd")])
    with pytest.raises(UserError, match="row 7 is odd"):
        evaluate_core_task(small_model(), LetterTokenizer(), task_of(tmp_path, "schema", rows), rows,
                           Ranks(0, 0, 2, CPU))


def test_core_is_the_mean_of_centred_accuracies_and_computes_in_float32_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    tasks = [task_of(tmp_path, kind, random_rows(kind, 12), baseline=b, label=kind)
             for kind, b in (("multiple_choice", 0.4), ("schema", 0.5), ("language_modeling", 0.0))]
    model, said, dtypes = small_model(), [], set()
    model.compute_dtype = torch.bfloat16
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *args, **more: dtypes.add(model.dtype) or hidden(*args, **more))
    result = evaluate_core(model, LetterTokenizer(), Bundle(tmp_path, tasks), 10, say=said.append)
    assert model.compute_dtype == torch.bfloat16 and dtypes == {torch.float32}
    assert list(result.tasks) == [task.label for task in tasks] and len(said) == 3 and "schema" in said[1]
    for task in tasks:
        got = result.tasks[task.label]
        assert len(got.examples) == 10
        assert got.centered == pytest.approx((got.accuracy - task.baseline) / (1 - task.baseline))
    assert result.core == pytest.approx(sum(task.centered for task in result.tasks.values()) / 3)
    said.clear()
    tasks[2].path.write_text("{")
    with pytest.raises(UserError, match="language_modeling.jsonl, line 1: this is not JSON"):
        evaluate_core(model, LetterTokenizer(), Bundle(tmp_path, tasks), say=said.append)
    assert said == []  # nothing was judged before
    tasks[1].path.unlink()
    with pytest.raises(UserError, match="1 of 3 CORE tasks have no file.*schema"):
        evaluate_core(model, LetterTokenizer(), Bundle(tmp_path, tasks))


def test_outcomes_of_the_published_evaluation_example_by_example(shared):
    folder = shared / "golden" / "core_f"
    expected = json.loads((folder / "expected_core.json").read_text())
    model, tokenizer, _ = load_model(folder, CPU)
    bundle = read_bundle(shared / "data" / "core" / "eval_bundle")
    quick = ("jeopardy", "bigbench_qa_wikidata", "arc_easy", "copa", "piqa", "openbook_qa", "lambada_openai",
             "winograd", "winogrande")
    for task in (task for task in bundle.tasks if task.label in quick):
        result = evaluate_core_task(model, tokenizer, task, load_examples(task, expected["max_per_task"]))
        assert [v.correct for v in result.examples] == expected["tasks"][task.label]["correct"], task.label
        assert result.centered == pytest.approx(expected["tasks"][task.label]["centered"])


# ---- base_eval

@pytest.fixture
def trained(tmp_path):
    """A checkpoint, its tokenizer and a bundle in base_dir(); no text, and no address to fetch a bundle from."""
    tokenizer = RustBPETokenizer.train_from_iterator([" ".join(WORDS)] * 3, 300)
    tokenizer.save(base_dir() / "tokenizer")
    model = small_model(vocab_size=tokenizer.get_vocab_size())
    save_checkpoint(base_dir() / "base_checkpoints" / "d1", 42, model.state_dict(),
                    {"model_config": model.config.to_dict(), "tokenizer": tokenizer.fingerprint()})
    bundle = base_dir() / "eval_bundle"
    (bundle / "eval_data").mkdir(parents=True)
    lines = ["icl_tasks:"]
    for kind in ("multiple_choice", "schema", "language_modeling"):
        task_of(bundle / "eval_data", kind, random_rows(kind, 9), label=kind)
        lines += [f"- label: {kind}", f"  dataset_uri: {kind}.jsonl", "  num_fewshot: [1]", f"  icl_task_type: {kind}"]
    (bundle / "core.yaml").write_text("\n".join(lines))
    baselines = "multiple_choice,25\nschema,50\nlanguage_modeling,0\n"
    (bundle / "eval_meta_data.csv").write_text(f"Eval Task,Random baseline\n{baselines}")
    return base_dir()


def environment(base):
    return {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1",
            "NANOCHAT_EVAL_BUNDLE_URL": "http://127.0.0.1:9/x.zip",
            "NO_PROXY": "127.0.0.1"}


def test_base_eval_writes_the_table_the_answers_and_a_record(trained, capfd):
    from scripts import base_eval
    base_eval.main(["--max-per-task=8", "--device-type=cpu"])
    out = capfd.readouterr().out
    assert "bits per byte and samples are skipped: there is no text in" in out and "CORE" in out
    path = trained / "base_eval" / "base_model_000042.csv"
    first = path.read_text(), path.with_suffix(".jsonl").read_text()
    rows = [[cell.strip() for cell in row] for row in csv.reader(first[0].splitlines())]
    assert [row[0] for row in rows] == ["Task", "multiple_choice", "schema", "language_modeling", "CORE"]
    assert float(rows[-1][2]) == pytest.approx(sum(float(row[2]) for row in rows[1:-1]) / 3, abs=2e-6)
    answers = [json.loads(line) for line in first[1].splitlines()]
    assert len(answers) == 24
    assert answers[9]["task"] == "schema" and answers[9]["example"] == 1 and len(answers[9]["losses"]) == 2
    share = sum(answer["correct"] for answer in answers if answer["task"] == "schema") / 8
    assert float(rows[2][1]) == pytest.approx(share, abs=1e-6)
    record, = [row for row in read_log(trained / "logs" / "base_eval_d1.jsonl") if row["kind"] == "core"]
    assert record["core"] == pytest.approx(float(rows[-1][2]), abs=1e-6)
    assert record["max_per_task"] == 8 and record["seconds"] > 0
    assert record["tasks"]["schema"] == pytest.approx({"accuracy": float(rows[2][1]), "centered": float(rows[2][2])},
                                                      abs=1e-6)


def test_a_full_disk_does_not_cost_the_result_of_base_eval(trained, monkeypatch, capfd):
    from scripts import base_eval

    def full(*arguments):
        raise NotWritten("the disk is full", full=True)
    monkeypatch.setattr(base_eval, "atomic_write", full)
    with pytest.raises(NotWritten):
        base_eval.main(["--max-per-task=2", "--device-type=cpu", "--eval=core"])
    assert [row["kind"] for row in read_log(trained / "logs" / "base_eval_d1.jsonl")][-2:] == ["core", "end"]
    assert "CORE " in capfd.readouterr().out


@pytest.mark.slow
def test_two_ranks_write_what_one_writes(trained):
    from scripts import base_eval
    base_eval.main(["--max-per-task=8", "--device-type=cpu"])
    path = trained / "base_eval" / "base_model_000042.csv"
    table, answers = path.read_text(), path.with_suffix(".jsonl").read_text()
    path.unlink()
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    both = [subprocess.Popen([sys.executable, "-m", "scripts.base_eval", "--max-per-task=8", "--device-type=cpu"],
                             cwd=ROOT, text=True,
                             env={**environment(trained), **where, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                             stderr=subprocess.PIPE)
            for rank in range(2)]
    assert [(done.wait(100), done.stderr.read()[-2000:]) for done in both] == [(0, "")] * 2
    assert path.read_text() == table
    again = path.with_suffix(".jsonl").read_text()
    first, second = ([json.loads(line)["correct"] for line in lines.splitlines()] for lines in (answers, again))
    assert second == first


def test_base_eval_without_a_bundle_goes_on_unless_core_was_asked_for(trained, monkeypatch, capfd):
    from scripts import base_eval
    for name, value in environment(trained).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(transfer, "BACK_OFF", 0.001)
    bundle = trained / "eval_bundle"
    bundle.rename(trained / "elsewhere")
    base_eval.main(["--device-type=cpu"])
    out = capfd.readouterr().out
    assert "CORE is skipped: the CORE bundle cannot be downloaded from http://127.0.0.1:9/x.zip" in out
    with pytest.raises(UserError, match="cannot be downloaded"):
        base_eval.main(["--device-type=cpu", "--eval=core"])
    with pytest.raises(UserError, match="--eval names 'cores'"):
        base_eval.main(["--device-type=cpu", "--eval=cores"])
    base_eval.main(["--device-type=cpu", "--eval=core", f"--bundle={trained / 'elsewhere'}", "--max-per-task=3"])
    assert "bits per byte" not in capfd.readouterr().out
    (trained / "elsewhere" / "core.yaml").unlink()
    with pytest.raises(UserError, match="has no core.yaml"):
        base_eval.main(["--device-type=cpu", f"--bundle={trained / 'elsewhere'}"])


# ---- base_train

def test_base_train_measures_core_on_its_way(trained, monkeypatch, capfd):
    from nanochat.dataset.__main__ import main as dataset
    from scripts import base_train
    for name, value in environment(trained).items():
        monkeypatch.setenv(name, value)
    dataset(["small-world", "--docs=200"])
    flags = ["--depth=1", "--max-seq-len=32", "--device-batch-size=2", "--total-batch-size=64", "--num-iterations=3",
             "--eval-tokens=64",
             "--sample-every=-1", "--device-type=cpu", "--compile=no", "--model-tag=t", "--core-metric-every=2"]
    base_train.main([*flags, "--core-metric-max-per-task=4"])
    records = [row for row in read_log(trained / "logs" / "base_t.jsonl") if row["kind"] == "core"]
    assert [record["step"] for record in records] == [2, 3] and "step 00002 | CORE" in capfd.readouterr().out
    assert all(set(record["tasks"]) == {"multiple_choice", "schema", "language_modeling"} for record in records)
    with pytest.raises(UserError, match="--max-per-task=2 or more"):
        base_train.main([*flags, "--core-metric-max-per-task=1"])
    (trained / "eval_bundle").rename(trained / "elsewhere")
    with pytest.raises(UserError, match="cannot be downloaded"):
        base_train.main(flags)
