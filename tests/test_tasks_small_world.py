"""Conversations about the small world are true and can be rendered, and training never has a question of the test."""

import re
from itertools import islice

import pytest

from nanochat.errors import UserError
from nanochat.small_world import World, documents
from nanochat.small_world.world import capital
from nanochat.tokenizer import RustBPETokenizer
from nanochat.tokenizer.conversation import turns_of
from tasks.base import reference_text
from tasks.small_world import WorldChoice, WorldLookups, WorldQuestions, WorldSums

TASKS = (WorldQuestions, WorldChoice, WorldLookups, WorldSums)


def users(conversation) -> list[str]:
    return [m["content"] for m in conversation["messages"] if m["role"] == "user"]


def as_written(conversation) -> str:
    """The reference answer as a model would have written it, decoded."""
    content = conversation["messages"][-1]["content"]
    if isinstance(content, str):
        return content + "<|assistant_end|>"
    forms = {"text": "{}", "python": "<|python_start|>{}<|python_end|>",
             "python_output": "<|output_start|>{}<|output_end|>"}
    return "".join(forms[part["type"]].format(part["text"]) for part in content) + "<|assistant_end|>"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_conversations_are_sound_and_their_references_right(task, split):
    for seed in (0, 5):
        made, again = task(split, seed=seed, size=400), task(split, seed=seed, size=300)
        for i, conversation in enumerate(made):
            turns_of(conversation)
            assert made.evaluate(conversation, as_written(conversation) if made.kind == "generative"
                                 else reference_text(conversation))
            assert i >= len(again) or again[i] == conversation
    assert list(task(split)[:50]) != list(task(split, seed=1)[:50])


def test_all_render_with_a_tokenizer():
    tokenizer = RustBPETokenizer.train_from_iterator(islice(documents(0), 300), 400)
    for task in TASKS:
        for conversation in task("train", size=50):
            ids, mask = tokenizer.render_conversation(conversation)
            assert len(ids) == len(mask) and sum(mask) > 1


@pytest.mark.parametrize("seed", [0, 3])
def test_test_asks_each_fact_once_with_its_held_out_question_and_training_never_does(seed):
    world = World(seed)
    held_out = {entity.fill(questions[0]) for (entity, _), (_, questions) in world.held_out.items()
                if entity.group != "words"}
    for task in (WorldQuestions, WorldChoice):
        test = task("test", seed=seed)
        assert len(test) == len({tuple(c["fact"]) for c in test}) == sum(len(e.values) for e in world.entities())
        questions = [users(c)[0].removeprefix("Multiple Choice question: ").split("\n")[0] for c in test]
        assert sorted(questions) == sorted(held_out)
        trained = {q.removeprefix("Multiple Choice question: ").split("\n")[0]
                   for c in task("train", seed=seed, size=5000) for q in users(c)}
        assert len(trained) > 400 and not trained & held_out
    text = "\n".join(islice(documents(seed), 3000))
    assert not [question for question in held_out if question in text]


def test_answers_never_say_a_sentence_that_is_held_out():
    world = World(0)
    held_out = {entity.fill(p, entity.values[a]) + "." for (entity, a), (sentences, _) in world.held_out.items()
                for p in sentences}
    said = {m["content"] for c in WorldQuestions("train", size=3000) for m in c["messages"] if m["role"] == "assistant"}
    assert not said & held_out
    assert not {reference_text(c) for c in WorldQuestions("test")} & held_out


def test_later_turns_use_pronouns_only_for_what_was_just_named():
    world, pronouns, turns = World(0), {"she", "he", "it", "her", "him", "his", "its"}, []
    referred = 0
    for conversation in WorldQuestions("train", size=2000):
        asked, previous = users(conversation), None
        turns.append(len(asked))
        for question, answer in zip(asked, conversation["messages"][1::2]):
            words = set(question.casefold().strip("?").split())
            subject = next(e for e in world.entities() if answer["content"].startswith(capital(e.name)))
            assert subject.name in question or words & pronouns and previous == subject
            referred += subject.name not in question
            previous = subject
    assert referred > 300
    assert set(turns) == {1, 2, 3, 4} and turns.count(1) < 1200


def test_graded_by_the_value_and_no_other():
    task = WorldQuestions("test")
    for conversation in task:
        name, attribute = conversation["fact"]
        entity = task.world.by_name[name]
        right = entity.values[attribute]
        wrong = [v for v in task.world.values[entity.group, attribute] if v not in (right, name)]
        for answer in (right, right.upper() + ".", f"It is {right}.", f"{name}: {right}<|assistant_end|> {wrong[0]}"):
            assert task.evaluate(conversation, answer), answer
        for answer in ("", "I do not know.", wrong[0], f"{right} or {wrong[0]}", f"no{right}",
                       f"<|assistant_end|>{right}"):
            assert not task.evaluate(conversation, answer), answer
    assert 0.05 < task.chance < 0.15


def test_choices_are_four_different_values_with_the_right_one_anywhere():
    task = WorldChoice("train", size=1000)
    assert (task.kind, task.chance) == ("categorical", 0.25)
    seen = []
    for conversation in task:
        name, attribute = conversation["fact"]
        lines = [line[2:].split("=") for line in users(conversation)[0].split("\n") if line.startswith("- ")]
        letter = reference_text(conversation)
        assert [l for _, l in lines] == conversation["letters"] == list("ABCD")
        assert len({v for v, _ in lines}) == 4
        assert dict((l, v) for v, l in lines)[letter] == task.world.by_name[name].values[attribute]
        assert [task.evaluate(conversation, l) for l in "ABCD"] == [l == letter for l in "ABCD"]
        seen.append(letter)
    assert all(180 < seen.count(letter) < 320 for letter in "ABCD")


def test_lookups_are_multiple_choice_with_turns_about_its_list():
    kinds = set()
    for conversation in WorldLookups("train", size=300):
        first, rest = conversation["messages"][:2], conversation["messages"][2:]
        lines = [line[2:].split("=") for line in first[0]["content"].split("\n") if line.startswith("- ")]
        assert len(rest) in (4, 6, 8) and len(first[1]["content"]) == 1 and first[0]["content"].count("question: ") == 1
        for asked, answer in zip(rest[::2], rest[1::2]):
            asked, answer = asked["content"].removesuffix("?"), answer["content"]
            kind, said = asked.rsplit(" is ", 1)
            kinds.add(kind)
            assert ([said, answer] if kind == "Which letter" else [answer, said]) in lines
    assert kinds == {"Which letter", "Which one"}


def numbers(conversation) -> tuple[int, ...]:
    """The first two numbers of a call, the smaller first."""
    call = conversation["messages"][1]["content"][0]["text"]
    return tuple(sorted(int(n) for n in re.findall(r"\d+", call)[:2]))


def test_pairs_of_numbers_of_the_test_are_never_trained_on():
    test = {numbers(c) for seed in (0, 1) for c in WorldSums("test", seed=seed)}
    train = {numbers(c) for seed in (0, 1, 2) for c in WorldSums("train", seed=seed, size=6000)}
    assert not test & train
    assert len(train) > 4000 and 0.08 < len(test) / len(test | train) < 0.12
    assert len({numbers(c) for c in WorldSums("test")}) == len(WorldSums("test"))


def test_sums_are_true_and_told_at_most_a_quarter_of_the_time():
    stories, lengths = 0, set()
    for conversation in WorldSums("train", size=2000):
        call, output, answer = conversation["messages"][1]["content"]
        given = re.findall(r"\d+", call["text"])
        result = eval(call["text"])  # of our own making: numbers, + - *
        assert 0 <= result and max(map(int, given)) <= 99
        assert output["text"] == str(result) and answer["text"] == f"It is {result}."
        question = users(conversation)[0]
        assert sorted(re.findall(r"\d+", question)) == sorted(given)
        stories += "How many" in question
        lengths.add(len(given))
    assert 200 < stories < 500 and lengths == {2, 3}


def test_sums_are_graded_by_the_last_number_behind_the_tool():
    task = WorldSums("test")
    conversation = task[0]
    result = reference_text(conversation).removeprefix("It is ").removesuffix(".")
    for answer, right in ((f"It is {result}.", True), (f"<|output_start|>1<|output_end|>{result}", True),
                          (f"{result} or 3000", False),
                          (f"<|output_start|>{result}<|output_end|>It is", False), ("", False)):
        assert task.evaluate(conversation, answer) == right and task.reward(conversation, answer) == float(right)


def test_what_does_not_exist_is_refused():
    for task in TASKS:
        with pytest.raises(UserError, match="no split of the small world 'dev'; there is train, test"):
            task("dev")
        with pytest.raises(UserError, match="size is -1"):
            task("train", size=-1)
        with pytest.raises(UserError, match="seed of the small world is -1"):
            task("train", seed=-1)
