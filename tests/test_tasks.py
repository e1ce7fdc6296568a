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
    non_negative,
    number_after_hashes,
    one_of,
    question_and_answer,
    reference_text,
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


def test_names_and_sizes_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match="no split 'dev'; there is train, test"):
        one_of("split", "dev", ("train", "test"))
    for wrong in (-1, 1.5, True, "3"):
        with pytest.raises(UserError, match="whole number"):
            non_negative("size", wrong)
