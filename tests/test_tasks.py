"""tasks/base.py: views, mixtures and sequences hold the right conversations, in the same order on every machine.

The other tests of tasks/ and what they cover: test_tasks_hub.py has arc.py, gsm8k.py, hub.py, humaneval.py, mmlu.py,
multiple_choice.py and smoltalk.py; test_tasks_custom_json.py has custom_json.py and lines.py; test_tasks_spelling.py
has spelling.py and words.py; test_tasks_small_world.py and test_tasks_recipes.py have the file of that name.
"""

import random
from collections import Counter

import pytest

from nanochat.errors import UserError
from tasks.base import (
    Mixture,
    Task,
    TaskSequence,
    in_test,
    last_number,
    meant_number,
    non_negative,
    number_after_hashes,
    one_of,
    question_and_answer,
    reference_text,
    same_number,
)


class LetterTask(Task):
    """A task of known conversations."""

    name, kind, chance = "Letters", "generative", 0.5

    def __init__(self, letter: str, size: int):
        self.letter, self.size = letter, size

    def __len__(self):
        return self.size

    def conversation(self, i):
        return question_and_answer(f"{self.letter}{i}", "yes")

    def evaluate(self, conversation, answer):
        return answer == reference_text(conversation)


def asked(task) -> list[str]:
    return [conversation["messages"][0]["content"] for conversation in task]


def test_indices_are_those_of_a_list():
    task, plain = LetterTask("a", 7), [f"a{i}" for i in range(7)]
    assert asked(task) == plain
    assert task[-1] == task[6] and task[-7] == task[0]
    for wrong in (7, -8):
        with pytest.raises(IndexError, match="Letters has 7 conversations; there is no number"):
            task[wrong]


def test_views_are_slices_of_a_list_and_grade_as_the_task():
    task, plain, rng = LetterTask("a", 20), [f"a{i}" for i in range(20)], random.Random(0)
    for _ in range(200):
        start, stop, step = rng.randint(-25, 25), rng.randint(-25, 25), rng.choice([-3, -1, 1, 2, 5, None])
        assert asked(task[start:stop:step]) == plain[start:stop:step]
    view = task[5:15][::2]
    assert asked(view) == plain[5:15][::2]
    assert (view.name, view.kind, view.chance) == ("Letters", "generative", 0.5)
    assert view.evaluate(view[0], "yes") and not view.evaluate(view[0], "no")
    assert (view.reward(view[0], "yes"), view.reward(view[0], "no")) == (1.0, 0.0)


def test_sequence_is_one_after_the_other():
    parts = [LetterTask("a", 3), LetterTask("b", 0), LetterTask("c", 2)]
    assert asked(TaskSequence(parts)) == ["a0", "a1", "a2", "c0", "c1"]
    assert asked(TaskSequence([])) == []


def test_mixture_holds_everything_as_often_as_listed_and_mixes():
    a, b = LetterTask("a", 300), LetterTask("b", 100)
    mixed = asked(Mixture([a, b, b]))
    assert Counter(mixed) == Counter(asked(a) + asked(b) + asked(b))
    share = sum(text[0] == "a" for text in mixed[:250]) / 250
    assert 0.5 < share < 0.7
    assert mixed == asked(Mixture([a, b, b])) != asked(Mixture([a, b, b], seed=1))


def test_mixture_has_the_same_order_everywhere():
    assert asked(Mixture([LetterTask("a", 4), LetterTask("b", 3)])) == ["a1", "a3", "b0", "a2", "b2", "a0", "b1"]


def test_training_data_is_not_graded():
    mixture = Mixture([LetterTask("a", 1)])
    assert mixture.kind == "none"
    with pytest.raises(NotImplementedError, match="Mixture is not graded"):
        mixture.evaluate(mixture[0], "yes")


def test_share_of_the_test_is_a_tenth_by_hash():
    assert 0.09 < sum(in_test(str(i)) for i in range(20_000)) / 20_000 < 0.11


@pytest.mark.parametrize("words, number", [
    ("so #### 12", "12"), ("#### 1,234 and #### 5", "1234"), ("#### -3", "-3"), ("####3", None), ("", None),
    ("#### x #### 7", "7")])
def test_number_after_hashes_is_the_first_as_published(words, number):
    assert number_after_hashes(words) == number


@pytest.mark.parametrize("words, number", [
    ("It is 15.", "15"), ("1 and 1,200.5!", "1200.5"), ("none", None),
    ("7<|output_start|>8<|output_end|>It is -9.", "-9"),
    ("<|python_start|>7+8<|python_end|><|output_start|>15<|output_end|>done", None)])
def test_last_number_is_looked_for_behind_the_tools_output(words, number):
    assert last_number(words) == number


RIGHT_18 = ("#### 18", "####18", "#### $18", "#### 18.", "#### 18 dollars", "**#### 18**", "#### **18**", "#### 018",
            "#### 1\n#### 18", "The answer is 18.", "It is $18.00", "x = 18", "#### 18.0",
            "so \\boxed{18} it is 7 long", "9 * 2 = 18", "9*2=18", "so 18%", "#### Answer: 18", "#### 18km", "#### 18,",
            "7<|output_end|>That is 18!")
WRONG_18 = ("#### 180", "#### -18", "#### 1", "#### 18/2", "#### 18-20", "#### 18:30", "", "no number", "#### 18 * 2",
            "#### 1.8", "#### 118", "-18", "the answer is - 18", "−18", "#### x18y9", "#### 18\n#### 19", "18 and 19",
            "between 16-18", "1/18", "#### 18e3", "v1.18", "#### 18.5", "#### 1,8000")


def test_a_number_is_read_in_every_usual_form_and_near_misses_are_not():
    for words in RIGHT_18:
        assert same_number(meant_number(words), "18"), words
    for words in WRONG_18:
        assert not same_number(meant_number(words), "18"), words
    for words in ("#### -5", "#### −5", "#### - 5", "#### -$5", "#### $-5", "3 - 8 = -5"):
        assert same_number(meant_number(words), "-5"), words
    assert same_number(meant_number("#### 1,234,567.89 dollars"), "1234567.89")
    rng = random.Random(0)
    for _ in range(200):
        value = rng.choice([rng.randint(-99, 99), rng.randint(-10**6, 10**6), rng.randint(-999, 999) / 4])
        for form in ("#### {v}", "#### {v:,}", "so it is {v:,}.", "#### {v} apples", "\\boxed{{{v}}}", "#### {v:.2f}"):
            words = form.format(v=value)
            assert same_number(meant_number(words), str(value)), words
            assert not same_number(meant_number(words), str(value + rng.choice([-1, 1]))), words
    assert not same_number(None, None) and not same_number("1.", None) and not same_number("x", "1")


def test_names_and_sizes_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match="no split 'dev'; there is train, test"):
        one_of("split", "dev", ("train", "test"))
    for wrong in (-1, 1.5, True, "3"):
        with pytest.raises(UserError, match="whole number"):
            non_negative("size", wrong)
