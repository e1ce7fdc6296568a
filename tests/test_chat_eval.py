import copy
import json

import pytest
import torch

from nanochat.distributed import Ranks
from nanochat.engine import Row
from nanochat.errors import UserError
from nanochat.evaluation import chat
from nanochat.evaluation.chat import chatcore, evaluate_task
from nanochat.tokenizer import RustBPETokenizer
from tasks.small_world import WorldChoice, WorldQuestions
from tests.helpers import small_model
from tests.test_distributed import start_ranks

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def make_model():
    texts = [message["content"] for task in (WorldQuestions("train", size=60),
                                             WorldChoice("train", size=30)) for chat in task
             for message in chat["messages"]]
    tokenizer = RustBPETokenizer.train_from_iterator(texts, 400)
    return small_model(5, vocab_size=tokenizer.get_vocab_size(), sequence_len=128), tokenizer


@pytest.fixture(scope="module")
def made():
    return make_model()


def plain_choice(model, tokenizer, conversation):
    """The definition: one prompt, a full forward, the letter whose logit is largest behind <|assistant_start|>."""
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.render_for_completion(conversation)]))[0, -1]
    return max(conversation["letters"], key=lambda letter: logits[tokenizer.encode(letter)[0]].item())


@pytest.mark.parametrize("batch_size", [1, 7])
def test_choices_in_batches_equal_one_prompt_at_a_time(made, batch_size):
    model, tokenizer = made
    task = WorldChoice("test", size=40)
    result = evaluate_task(model, tokenizer, task, ALONE, batch_size=batch_size)
    answers = [plain_choice(model, tokenizer, conversation) for conversation in task]
    assert [row["answers"] for row in result.rows] == [[answer] for answer in answers]
    right = sum(answer == conversation["messages"][-1]["content"] for answer, conversation in zip(answers, task))
    assert (result.correct, result.count) == (right, 40) and 0 < right < 40
    assert result.accuracy == right / 40 and json.dumps(result.rows)


def test_near_ties_between_letters_are_settled_alone(made, monkeypatch):
    model, tokenizer = made
    task, alone = WorldChoice("test", size=12), []
    forward = model.forward

    def disturbed(ids, **options):
        """A batch of several is off by more than rounding, a prompt alone is not."""
        alone.append(len(ids) == 1)
        logits = forward(ids, **options)
        return logits if len(ids) == 1 else logits + 2e-3 * torch.randn(logits.shape, generator=dice)

    dice = torch.Generator().manual_seed(0)
    monkeypatch.setattr(model, "forward", disturbed)
    monkeypatch.setattr(chat, "TIE_MARGIN", 1e3)  # all are nearly a tie
    result = evaluate_task(model, tokenizer, task, ALONE, batch_size=12)
    monkeypatch.undo()
    assert sum(alone) == 12 and not alone[0]
    assert [row["answers"] for row in result.rows] == [[plain_choice(model, tokenizer, asked)] for asked in task]


class Lengths(WorldQuestions):
    """The same questions. An answer of even length is correct, so that a random model has some correct ones."""

    def evaluate(self, conversation, answer):
        return len(answer) % 2 == 0


def test_written_answers_are_those_of_one_prompt_at_a_time_and_progress_is_told(made):
    model, tokenizer = made
    task, told = Lengths("test", size=12), []
    together = evaluate_task(model, tokenizer, task, ALONE, max_tokens=8, batch_size=32,
                             progress=lambda *now: told.append(now))
    alone = evaluate_task(model, tokenizer, task, ALONE, max_tokens=8, batch_size=1)
    assert together.rows == alone.rows and 0 < together.share("as_published") < 1
    assert told[-1] == (12, 12, together.correct) and [done for done, _, _ in told] == list(range(1, 13))
    some = evaluate_task(model, tokenizer, task, ALONE, max_problems=5, num_samples=4, temperature=1.0, max_tokens=8)
    assert some.count == 5 and all(len(row["answers"]) == 4 for row in some.rows)
    assert all(row["correct"] == any(len(answer) % 2 == 0 and not cut
                                     for answer, cut in zip(row["answers"], row["cut"])) for row in some.rows)
    assert some.cut == (sum(sum(row["cut"]) for row in some.rows), 20)


class Wanted:
    """Right is "#### 18"; leniently any answer with 18 in it."""

    name, kind, chance = "Wanted", "generative", 0.0

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "#### 18"}]}

    def evaluate(self, conversation, answer):
        return answer == "#### 18"

    def evaluate_lenient(self, conversation, answer):
        return "18" in answer


def test_a_cut_answer_is_wrong_and_both_readings_beside_the_score_are_told(made, monkeypatch):
    model, tokenizer = made
    end = tokenizer.encode_special("<|assistant_end|>")
    answers = [("#### 18", False), ("#### 18", True), ("it is 18", True), ("it is 18", False)]  # text, cut

    class Answers:
        stops = {end}

        def __init__(self, *_):
            pass

        def complete(self, prompts, **options):
            for number, (text, cut) in enumerate(answers):
                ids = tokenizer.encode(text) + ([] if cut else [end])
                yield number, [Row(prompts[number], 99, tokens=ids, ended="length" if cut else "stop")]

    monkeypatch.setattr(chat, "Engine", Answers)
    result = evaluate_task(model, tokenizer, Wanted(), ALONE)
    assert [row["correct"] for row in result.rows] == [True, False, False, False]
    assert [row["as_published"] for row in result.rows] == [True, True, False, False]
    assert [row["lenient"] for row in result.rows] == [True, False, False, True]
    assert result.readings() == {"cut": 2, "answers": 4, "as_published": 0.5, "lenient": 0.5}
    assert result.notes() == ["2 of 4 answers were cut at the limit and count as wrong; 50.0% with them, as published",
                              "50.0% read leniently"]
    choices = evaluate_task(model, tokenizer, WorldChoice("test", size=3), ALONE)
    assert choices.readings() == {} and choices.notes() == [] and "cut" not in choices.rows[0]


def test_a_model_that_gives_nan_is_not_graded(made):
    model, tokenizer = made
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    for task in (WorldChoice("test", size=3), WorldQuestions("test", size=3)):
        if task.kind == "categorical":
            with torch.no_grad():
                broken.lm_head.weight[:] = float("nan")
        with pytest.raises(UserError, match="gives NaN or infinity"):
            evaluate_task(broken, tokenizer, task, ALONE, max_tokens=4)


def _graded(ranks, out):
    torch.set_num_threads(1)
    model, tokenizer = make_model()
    tasks = WorldChoice("test", size=9), Lengths("test", size=7)
    rows = [evaluate_task(model, tokenizer, task, ranks, max_tokens=6).rows for task in tasks]
    if ranks.is_main:
        out.write_text(json.dumps(rows))


def test_two_ranks_give_what_one_gives(tmp_path):
    _graded(ALONE, tmp_path / "1.json")
    start_ranks(2, _graded, tmp_path / "2.json")
    assert (tmp_path / "2.json").read_text() == (tmp_path / "1.json").read_text()


def test_chatcore_is_the_mean_above_chance():
    accuracy = {"ARC-Easy": 0.3864, "ARC-Challenge": 0.2782, "MMLU": 0.3166, "GSM8K": 0.0455, "HumanEval": 0.0549}
    chance = {"ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25, "GSM8K": 0.0, "HumanEval": 0.0}
    # of the published numbers, without SpellingBee
    assert chatcore(accuracy, chance) == pytest.approx(0.0817, abs=1e-4)
    assert chatcore(chance, chance) == 0


def test_letters_of_several_tokens_and_training_data_are_refused_in_words(made):
    model, tokenizer = made

    class Odd(WorldChoice):
        def conversation(self, i):
            return {**super().conversation(i), "letters": ["A", "Zürich"]}

    with pytest.raises(UserError, match="'Zürich' is .* tokens"):
        evaluate_task(model, tokenizer, Odd("test", size=2), ALONE)
    task = WorldQuestions("test", size=2)
    task.kind = "none"
    with pytest.raises(UserError, match="not graded"):
        evaluate_task(model, tokenizer, task, ALONE)
