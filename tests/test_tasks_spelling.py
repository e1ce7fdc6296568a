"""Spelling tasks: no test word is ever trained on; counts are true; conversations are short enough for a tiny model.

Covers tasks/spelling.py and tasks/words.py.
"""

import zipfile
from collections import Counter

import pytest

from nanochat.errors import UserError
from nanochat.files import base_dir
from nanochat.small_world import documents
from nanochat.tokenizer import RustBPETokenizer
from nanochat.tokenizer.conversation import turns_of
from nanochat.tools.calculator import calculate
from tasks.base import reference_text
from tasks.small_world import WorldSums
from tasks.spelling import ALL_QUESTIONS, PLAIN_QUESTIONS, SimpleSpelling, SpellingBee
from tasks.words import INVENTED, checked, invented_words, load_words
from tests.test_tasks_small_world import as_written

TASKS = (SimpleSpelling, SpellingBee)


def words_of(task) -> set[str]:
    return {reference_text(c).split(":")[0] for c in task}


def test_no_word_of_the_test_is_trained_on_whatever_the_seed_and_size():
    trained, tested = set(), set()
    for task in TASKS:
        for seed in (0, 1, 7):
            for size in (1, 500, 3000):
                trained |= words_of(task("train", size=size, seed=seed))
                tested |= words_of(task("test", size=size, seed=seed))
    assert len(trained) > 5000 and len(tested) > 1000
    assert not trained & tested


def test_split_follows_from_the_word_alone_and_leaves_none_out():
    train, test = (set(load_words(split, "invented").words) for split in ("train", "test"))
    assert train | test == set(invented_words()) and not train & test
    assert 0.08 < len(test) / INVENTED < 0.12
    assert load_words("test", "invented").words[:5] == ("drervir", "presspuk", "woudveak", "predsland", "kohedclax")


def test_invented_words_are_many_short_and_plain():
    words = invented_words()
    assert len(set(words)) == len(words) == INVENTED
    assert all(word.isascii() and word.islower() and 4 <= len(word) <= 9 for word in words)
    assert all(set(word) & set("aeiou") for word in words)
    assert len(set("".join(words))) >= 24


@pytest.mark.parametrize("task", TASKS)
def test_conversations_are_sound_and_the_same_each_time(task):
    for split in ("train", "test"):
        made = task(split, size=200)
        assert made.source == "invented"
        for conversation, again in zip(made, task(split, size=300)):
            assert conversation == again
            turns_of(conversation)
            assert made.evaluate(conversation, as_written(conversation))
    assert list(task("train")[:20]) != list(task("train", seed=1)[:20])


def test_spelling_has_the_published_form():
    for conversation in SimpleSpelling("train", size=100):
        asked, answer = (m["content"] for m in conversation["messages"])
        word = asked.removeprefix("Spell the word: ")
        assert answer == word + ":" + ",".join(word)
    task = SimpleSpelling("test")
    right = reference_text(task[0])
    assert task.evaluate(task[0], right + "<|assistant_end|>") and not task.evaluate(task[0], right[:-1])


def test_bee_spells_counts_calls_and_answers():
    absent = 0
    for conversation in SpellingBee("train", size=500):
        first, call, output, last = conversation["messages"][1]["content"]
        spelled, counted = first["text"].split("\n")
        word = spelled.split(":")[0]
        letter = call["text"].removeprefix(f"'{word}'.count('").removesuffix("')")
        assert call["text"] == f"'{word}'.count('{letter}')" and len(letter) == 1
        n = sum(one == letter for one in word)
        assert spelled == word + ":" + ",".join(word)
        assert [part[0] for part in counted.split()] == list(word)
        assert [part[1:] for part in counted.split() if part[1:]] == [str(i) for i in range(1, n + 1)]
        assert output["text"] == str(n) and last["text"] == f"#### {n}"
        question = conversation["messages"][0]["content"]
        assert word in question and letter in question
        absent += n == 0
    assert 10 < absent < 100


def test_bee_is_graded_by_the_first_number_behind_the_hashes():
    task = SpellingBee("test")
    n = int(reference_text(task[0]).split("#### ")[1])
    for answer, right in ((f"#### {n}", True), (f"x<|output_end|>#### {n}<|assistant_end|>", True),
                          (f"#### {n + 1}", False),
                          (f"#### {n} #### {n + 1}", True), (f"{n}", False), ("", False),
                          (f"<|assistant_end|>#### {n}", False)):
        assert task.evaluate(task[0], answer) == right, answer


def test_calculator_gives_the_outputs_that_the_references_hold():
    for task in (SpellingBee("train", size=500), SpellingBee("test", size=500), WorldSums("train", size=1000),
                 WorldSums("test")):
        for conversation in task:
            parts = conversation["messages"][1]["content"]
            at = [part["type"] for part in parts].index("python")
            assert calculate(parts[at]["text"]) == parts[at + 1]["text"]


def test_many_ways_to_ask_and_a_few_plain_ones():
    assert len(set(ALL_QUESTIONS)) == len(ALL_QUESTIONS) >= 40
    assert all(form.count("{w}") == form.count("{l}") == 1 for form in ALL_QUESTIONS)
    def forms(kind):
        found = Counter()
        for c in SpellingBee("train", size=3000, phrasings=kind):
            word, call = reference_text(c).split(":")[0], c["messages"][1]["content"][1]["text"]
            found[c["messages"][0]["content"].replace(word, "{w}").replace(f"'{call[-3]}'", "'{l}'")] += 1
        return found
    assert set(forms("plain")) == {form.replace("{w}", "'{w}'").replace("{l}", "'{l}'") for form in PLAIN_QUESTIONS}
    assert len(forms("all")) > 500


def test_answers_are_short_in_a_small_vocabulary():
    from itertools import islice
    tokenizer = RustBPETokenizer.train_from_iterator(islice(documents(0), 2000), 1024)
    sizes = [len(tokenizer.render_conversation(c)[0]) for c in SpellingBee("train", size=300, phrasings="plain")
             if len(reference_text(c).split(":")[0]) <= 8]
    assert sum(sizes) / len(sizes) < 90


def write_words(data: bytes) -> None:
    (base_dir() / "words_alpha.txt").write_bytes(data)


def test_list_of_words_in_the_base_directory_is_used_and_checked():
    listed = [word + ending for word in invented_words()[:300] for ending in ("ing", "s")]
    write_words("\r\n".join(listed).encode())
    assert load_words("train").source == SpellingBee("train").source == "words_alpha"
    assert set(load_words("train").words) | set(load_words("test").words) == set(listed)
    assert SpellingBee("train", source="invented").source == "invented"
    write_words("\n".join([*listed, "don't"]).encode())
    with pytest.raises(UserError, match="words_alpha.txt, line 601 is not one lower-case word: b\"don't\""):
        SpellingBee("train")
    write_words(b"one\ntwo\n")
    with pytest.raises(UserError, match="holds 2 words"):
        SpellingBee("train")


@pytest.mark.parametrize("line", [b"Word", b"two words", "caf\u00e9".encode(), b"\xff\xfe", b"a1", b"<html>"])
def test_lines_that_are_no_words_are_named(line):
    good = "\n".join(invented_words()[:200]).encode()
    with pytest.raises(UserError, match="here, line 201 is not one lower-case word"):
        checked(good + b"\n" + line, "here")


def test_list_that_is_not_there_or_cannot_be_fetched(monkeypatch):
    with pytest.raises(UserError, match="there is no list of words at .*words_alpha.txt.*source=\"invented\""):
        SpellingBee("train", source="words_alpha")
    monkeypatch.setattr("tasks.words.URL", "http://127.0.0.1:9/words_alpha.txt")
    with pytest.raises(UserError, match="cannot be fetched from http://127.0.0.1:9"):
        SimpleSpelling("train", fetch=True)


def test_english_words(shared):
    write_words(zipfile.ZipFile(shared / "data/words/words_alpha.zip").read("words_alpha.txt"))
    train, test = load_words("train"), load_words("test")
    assert len(train.words) + len(test.words) > 370_000 and not set(train.words) & set(test.words)
    assert 0.095 < len(test.words) / len(train.words + test.words) < 0.105
    assert not words_of(SpellingBee("train", size=500)) & words_of(SimpleSpelling("test", size=500))


def test_what_does_not_exist_is_refused():
    for task in TASKS:
        with pytest.raises(UserError, match="no split of the words 'dev'"):
            task("dev")
        with pytest.raises(UserError, match="no source of words 'web'"):
            task("train", source="web")
        with pytest.raises(UserError, match="size is -5"):
            task("train", size=-5)
    with pytest.raises(UserError, match="no kind of phrasings 'few'"):
        SpellingBee("train", phrasings="few")
