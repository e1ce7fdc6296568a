"""The small world is deterministic, consistent and varied; no document has what is held out, and some tell every fact.

Covers nanochat/small_world: grading.py, phrasings.py, stories.py, words.py and world.py.
"""

import hashlib
import re
import zlib
from itertools import islice

import pytest

from nanochat.small_world import WORLD_KINDS, Fact, World, document, documents, facts, grade
from nanochat.small_world.phrasings import DIFFERENCES, OLDER, PHRASINGS, SUMS
from nanochat.small_world.stories import number
from nanochat.small_world.world import capital

N = 20_000
GOLDEN = "d44d2e5e495938432234e516f4465352111ceeda586c4986739adb6717b5fb26"


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(islice(documents(0), N))


class Sentences:
    """All sentences of the documents, found by their words. No searched text contains a full stop."""

    def __init__(self, texts: list[str]):
        self.all = set(re.split(r"\.(?:\s|$)|\n", "\n".join(texts)))
        by_word: dict[str, list[str]] = {}
        for sentence in self.all:
            for word in set(re.findall(r"\w+", sentence)):
                by_word.setdefault(word, []).append(sentence)
        self.by_word = {word: "\n".join(found) for word, found in by_word.items()}

    def hold(self, name: str, said: str) -> bool:
        """Is the text `said`, in which the name stands, in a document?"""
        assert capital(name) in capital(said) or name in said
        assert ". " not in said
        return said in self.by_word.get(name.split()[-1], "")


@pytest.fixture(scope="module")
def sentences(texts) -> Sentences:
    return Sentences(texts)


def forms(entity, phrasing: str, value: str = "") -> set[str]:
    """The phrasing as it stands in a text that names the entity: at the start of a sentence, and inside one."""
    saying = entity.sentence_forms(phrasing, value)
    return {saying.name, saying.name_in}


def test_first_hundred_documents_are_the_same_everywhere():
    text = "\0".join(islice(documents(0), 100))
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN


def test_document_is_a_function_of_seed_and_number(texts):
    assert list(islice(documents(0, start=700), 5)) == texts[700:705]
    assert document(World(0), 12_345) == texts[12_345]
    assert list(islice(documents(1), 100)) != texts[:100]
    assert World(1).describe() != World(0).describe()


def test_negative_seed_or_number_is_refused(world):
    for wrong in (lambda: World(-1), lambda: document(world, -1)):
        with pytest.raises(ValueError, match="must not be negative"):
            wrong()


def test_no_held_out_phrasing_of_a_fact_is_in_the_documents(world, sentences):
    for (entity, attribute), (held, questions) in world.held_out.items():
        assert held and questions
        for phrasing in held + questions:
            said = forms(entity, phrasing, entity.values[attribute])
            assert not any(sentences.hold(entity.name, form) for form in said), said


def test_no_held_out_phrasing_hides_behind_a_pronoun(world):
    """Pronoun forms cannot be searched for by text alone, so look at what documents may say."""
    for (entity, attribute), (sentences, questions) in world.held_out.items():
        allowed = [said for saying in world.told[entity, attribute] for said in saying]
        for phrasing in sentences:
            assert not any(held in said for held in entity.sentence_forms(phrasing, entity.values[attribute])
                           for said in allowed)
        assert not set(map(entity.fill, questions)) & set(world.asked[entity, attribute])


def test_graded_prompts_are_not_in_the_documents(world, sentences):
    """The same for what is really asked: the prompt with its answer, or the question."""
    for fact in facts(0):
        if fact.kind in (*WORLD_KINDS, "spelling", "comparison"):
            said = re.sub("^Question: | Answer:$", "", fact.prompt) + (fact.answer if "Answer:" not in fact.prompt
                                                                       else "")
            names = [name for name in world.by_name if re.search(rf"\b{capital(name)}\b", capital(said))]
            names += [name for name in world.by_name if re.search(rf"\b{name}\b", said)]
            assert names
            assert not any(said in sentences.by_word[name.split()[-1]] for name in names), said


def test_every_fact_is_told_in_other_phrasings_and_every_phrasing_is_used_for_other_facts(world, sentences):
    for (entity, attribute), sayings in world.told.items():
        told = sum(any(sentences.hold(entity.name, form) for form in (saying.name, saying.name_in))
                   for saying in sayings)
        assert told >= (len(sayings) - 2 if entity.group != "words" else 3), (entity.name, attribute)
        assert any(sentences.hold(entity.name, asked) for asked in world.asked[entity, attribute])
    for (group, attribute), said in PHRASINGS.items():
        entities = [e for e in world.entities() + world.words if e.group == group]
        for phrasing in said.last + said.other + said.questions:
            assert any(sentences.hold(e.name, form) for e in entities
                       for form in forms(e, phrasing, e.values[attribute])), phrasing


def test_each_kind_of_fact_has_at_least_eight_phrasings_and_no_phrasing_contains_another(world):
    for (entity, attribute), value in {k: k[0].values[k[1]] for k in world.held_out}.items():
        said = PHRASINGS[entity.group, attribute]
        assert len(said.last) >= 8 and all(p.endswith(" {v}") for p in said.last)
        filled = [entity.fill(p, value) for p in said.last + said.other]
        assert not [(a, b) for a in filled for b in filled if a is not b and a in b]


def sentence_pattern(phrasing: str, group: str) -> re.Pattern:
    """Match the phrasing as told of any entity of the group, by name; groups n and v are name and value."""
    names = {"people": "[A-Z][a-z]+", "places": "[A-Z][a-z]+", "things": "[Tt]he [a-z]+", "words": "[a-z]+"}[group]
    text = re.escape(phrasing)
    named = 0

    def slot(match: re.Match) -> str:
        nonlocal named
        letter = match.group(1)
        if letter in "vV":
            return "(?P<v>[A-Za-z0-9]+)"
        if letter in "rh":
            return "[a-z]+"
        named += 1
        word = "[Tt]he word " if letter == "S" and group == "words" else ""
        return word + (f"(?P<n>{names})" if named == 1 else "(?P=n)") + ("'s" if letter in "Pp" else "")

    return re.compile(r"(?<![\w'])" + re.sub(r"\\\{(\w)\\\}", slot, text) + r"(?![\w'])")


def test_no_document_contradicts_the_world(world, texts):
    text = "\n".join(texts[:1500])
    found = 0
    for (group, attribute), said in PHRASINGS.items():
        values = world.values[group, attribute]
        for phrasing in said.last + said.other:
            for match in sentence_pattern(phrasing, group).finditer(text):
                name, value = match["n"].replace("The ", "the "), match["v"]
                entity = world.by_name.get(name)
                if entity is None or entity.group != group or not {value, value.lower()} & set(values):
                    continue        # a pronoun, or a gift
                assert entity.values[attribute] in (value, value.lower()), match.group()
                found += 1
    assert found > 2500
    assert all(len(e.name) == int(e.values["length"]) for e in world.words)


def test_arithmetic_in_documents_is_right_and_never_of_a_held_out_pair(world, texts, sentences):
    everything = "\n".join(texts)
    held = world.held_out_sums
    assert held
    for plus, minus in ((" + ", " - "), (" plus ", " minus ")):
        sums = re.findall(rf"\b(\d+){re.escape(plus)}(\d+) (?:=|is) (\d+)", everything)
        differences = re.findall(rf"\b(\d+){re.escape(minus)}(\d+) (?:=|is) (\d+)", everything)
        assert len(sums) > 100 and len(differences) > 100
        for a, b, c in sums + [(a, b, c) for c, b, a in differences]:
            a, b, c = int(a), int(b), int(c)
            assert a + b == c and (min(a, b), max(a, b)) not in held
    for a, b in held | {(b, a) for a, b in held}:
        for form in SUMS + DIFFERENCES:
            for in_words in (False, True)[:1 + (a + b <= 20)]:
                said = form.format(a=number(a, in_words), b=number(b, in_words), c=number(a + b, in_words))
                assert capital(said) not in sentences.all, said


def test_held_out_pairs_are_never_compared_and_comparisons_are_right(world, sentences):
    for older, younger in world.held_out_older + world.older:
        assert int(older.values["age"]) > int(younger.values["age"])
    for older, younger in world.held_out_older:
        pairs = (older.name, younger.name), (younger.name, older.name)
        assert not any(sentences.hold(older.name, form.format(x=x, y=y)) for form in OLDER for x, y in pairs)


def test_gift_stories_end_with_the_last_owner():
    """Replay each graded story: whoever is named together with the thing last, as taker, has it."""
    stories = [fact for fact in facts(0) if fact.kind == "giving"]
    assert len({fact.prompt for fact in stories}) == len(stories)
    taker = re.compile(r"to (\w+)$|^(\w+) gets|^(\w+) is given|^(\w+) asks")
    for fact in stories:
        *events, asked = re.split(r"\. ", fact.prompt)
        thing = next(t for t in re.findall(r"the (\w+)", asked) if f"the {t}" in events[0])
        owner = re.search(rf"(\w+)(?: (?:the|of) \w+)? has the {thing}", events[0])[1]
        for event in events[1:]:
            if re.search(rf"\b[Tt]he {thing}\b", event):
                assert owner in event
                owner = next(name for name in taker.search(event).groups() if name)
        assert fact.answer == " " + owner


def test_documents_are_varied(texts):
    assert len(set(texts)) == N
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) >= 38 and max(lengths) <= 200
    grams = []
    seen: set[tuple[str, ...]] = set()
    for i, text in enumerate(texts[:4000], 1):
        words = text.split()
        seen.update(zip(*(words[k:] for k in range(8))))
        if i % 1000 == 0:
            grams.append(len(seen))
    assert grams[0] > 40_000 and grams[3] > 3 * grams[0]        # runs of eight words go on being new
    packed = len(zlib.compress("\n".join(texts[:2000]).encode(), 9)) / sum(map(len, texts[:2000]))
    assert 0.15 < packed < 0.5
    assert len({word for text in texts[:2000] for word in re.findall(r"[a-z]+", text.lower())}) > 500


def test_the_world_has_two_to_four_hundred_facts_and_answers_are_distinct(world):
    assert 200 <= sum(entity.group != "words" for entity, _ in world.held_out) <= 400
    for values in [*world.values.values(), [person.name for person in world.people]]:
        assert len(values) >= 5 and not [(a, b) for a in values for b in values if a != b and b.startswith(a)]
        assert all(len(value.split()) == 1 for value in values)


def test_facts_are_completions_with_their_answer_among_the_choices():
    listed = facts(0)
    assert listed == facts(0) and len({fact.prompt for fact in listed}) == len(listed)
    assert {fact.kind for fact in listed} == {*WORLD_KINDS, "sums", "differences", "comparison", "spelling", "giving",
                                              "counting"}
    for fact in listed:
        assert fact.answer in fact.choices and len(set(fact.choices)) == len(fact.choices) >= 2
        assert all(choice.startswith(" ") and choice.strip() for choice in fact.choices)
        assert not fact.prompt.endswith(" ")
        assert "{" not in fact.prompt + fact.answer
        others = [c for c in fact.choices if c != fact.answer]
        assert not any(c.startswith(fact.answer) or fact.answer.startswith(c) for c in others)


def test_grade_counts_right_answers_by_kind():
    listed = facts(0)
    answers = {fact.prompt: fact.answer for fact in listed}
    known = grade(listed, lambda prompts, choices: [
        [float(c == answers[p]) for c in row] for p, row in zip(prompts, choices)])
    assert all(result.accuracy == 1 for result in known.values())
    assert known["world"].count == sum(known[kind].count for kind in WORLD_KINDS)
    assert 0.05 < known["world"].chance < 0.15 and known["comparison"].chance == 0.5
    ignorant = grade(listed, lambda prompts, choices: [[0.0] * len(row) for row in choices])
    assert all(result.accuracy == 0 for result in ignorant.values())        # a tie is not an answer
    first = grade(listed, lambda prompts, choices: [[-float(i) for i in range(len(row))] for row in choices])
    assert abs(first["world"].accuracy - first["world"].chance) < 0.05


def test_grade_refuses_scores_that_do_not_fit():
    fact = Fact("Mara lives in", " Fenwick", [" Fenwick", " Hollin"], "people")
    for wrong in ([], [[1.0]], [[1.0, float("nan")]]):
        with pytest.raises(ValueError, match="score"):
            grade([fact], lambda prompts, choices, wrong=wrong: wrong)
