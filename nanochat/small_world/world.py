"""The entities of the small world, their attributes, and the phrasings that are held out for each fact.

The seed determines everything. Only random.Random(int) and its method random() are used, because they give the same
numbers on every platform and Python version.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from nanochat.small_world import words
from nanochat.small_world.phrasings import PHRASINGS

T = TypeVar("T")
WORLD, DOCUMENT, QUESTION = 0, 1, 2         # the streams of random numbers of a seed
HELD_OUT_SENTENCES, HELD_OUT_QUESTIONS = 2, 1   # for each fact
MAX_ADDEND = 15                             # largest number in a sum
PRONOUNS = {"she": ("She", "she", "her", "Her", "her"), "he": ("He", "he", "him", "His", "his"),
            "it": ("It", "it", "it", "Its", "its")}  # subject, the same inside a sentence, object, possessive, inside


def rng_of(seed: int, stream: int, index: int = 0) -> random.Random:
    """Return the random generator for item `index` of a stream. Raises ValueError for negative numbers."""
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index of the small world must not be negative, got {seed} and {index}")
    return random.Random((seed * 4 + stream) << 64 | index)


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """Return one of the items."""
    return items[int(rng.random() * len(items))]


def sample(rng: random.Random, items: Sequence[T], n: int) -> list[T]:
    """Return n different items in random order. Raises ValueError if there are fewer than n."""
    if n > len(items):
        raise ValueError(f"cannot take {n} of {len(items)} items")
    rest = list(items)
    return [rest.pop(int(rng.random() * len(rest))) for _ in range(n)]


class SentenceForms(NamedTuple):
    """One sentence, without its full stop, in the four forms that a text needs."""

    name: str        # Mara lives in Fenwick
    pronoun: str     # She lives in Fenwick
    name_in: str     # inside a sentence: the lamp stands in the barn
    pronoun_in: str  # she lives in Fenwick


@dataclass(frozen=True, eq=False)
class Entity:
    """A person, place, thing or word, with the value of each of its attributes."""

    group: str                  # people, places, things, words
    name: str                   # as inside a sentence: Mara, Fenwick, the lamp, river
    pronoun: str                # she, he, it
    values: dict[str, str]

    def fill(self, phrasing: str, value: str = "", pronoun: bool = False) -> str:
        """Return the phrasing about this entity; phrasings.py explains the placeholders.

        Args:
            phrasing: with placeholders.
            value: of the attribute.
            pronoun: whether to use pronouns in place of the name.
        """
        start = "The word " + self.name if self.group == "words" else capital(self.name)
        subject, subject_in, thing, possessive, possessive_in = PRONOUNS[self.pronoun]
        pronouns = {"r": subject_in, "h": possessive_in}
        if not pronoun:
            subject, subject_in, thing = start, self.name, self.name
            possessive, possessive_in = start + "'s", self.name + "'s"
        return phrasing.format(S=subject, s=subject_in, o=thing, P=possessive, p=possessive_in, n=self.name,
                               v=value, V=capital(value), **pronouns)

    def sentence_forms(self, phrasing: str, value: str) -> SentenceForms:
        """Return the sentence in its four forms."""
        if phrasing.startswith(("{S}", "{P}")):
            inside = "{" + phrasing[1].lower() + phrasing[2:]
        elif phrasing.startswith(("{v}", "{V}")):
            inside = "{v" + phrasing[2:]
        else:
            inside = phrasing[0].lower() + phrasing[1:]
        return SentenceForms(self.fill(phrasing, value), self.fill(phrasing, value, pronoun=True),
                             self.fill(inside, value), self.fill(inside, value, pronoun=True))


def capital(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[:1].upper() + text[1:]


class World:
    """The small world of a seed.

    Attributes:
        people, places, things, words: lists of Entity.
        by_name: {name: Entity} of all of them.
        values: {(group, attribute): every value of the attribute in this world, sorted}.
        held_out: {(entity, attribute): (sentences, questions)}, the phrasings that no document uses for this fact.
        told: {(entity, attribute): [SentenceForms]}, the sentences that documents may use.
        asked: {(entity, attribute): [question]}, the questions that documents may use.
        sums, held_out_sums: pairs of numbers; documents use only those in `sums`.
        older, held_out_older: pairs of people, the older one first; documents use only those in `older`.
    """

    def __init__(self, seed: int = 0, n_people: int = 20, n_places: int = 12, n_things: int = 20, n_words: int = 60):
        rng = rng_of(seed, WORLD)
        self.seed = seed
        towns = sample(rng, words.TOWNS, n_places)
        ages = [str(18 + age) for age in sample(rng, range(63), 16)]
        self.people = [*_make_entities(rng, "people", sample(rng, words.WOMEN, n_people // 2), "she", {}),
                       *_make_entities(rng, "people", sample(rng, words.MEN, n_people - n_people // 2), "he", {})]
        self.places = _make_entities(rng, "places", towns, "it", {
            "river": words.RIVERS[:n_places], "product": words.PRODUCTS[:n_places], "market day": words.DAYS})
        things = ["the " + thing for thing in sample(rng, words.THINGS, n_things)]
        self.things = _make_entities(rng, "things", things, "it", {
            "colour": words.COLOURS[:10], "material": words.MATERIALS[:10], "room": words.ROOMS[:10]})
        of_people = {"town": towns, "job": words.JOBS[:12], "pet": words.PETS[:10], "colour": words.COLOURS[:10],
                     "food": words.FOODS[:12], "instrument": words.INSTRUMENTS[:10], "age": ages}
        for attribute, values in of_people.items():
            _give_values(rng, self.people, attribute, values)
        order = sample(rng, self.places, n_places)
        for a, b in zip(order, order[1:] + order[:1]):     # a ring: the neighbour of each town is the next one
            a.values["neighbour"] = b.name
        spelled = sorted({t.name[4:] for t in self.things} | set(words.PETS + words.JOBS + words.FOODS + words.GIFTS))
        self.words = [Entity("words", w, "it", {"first letter": w[0], "last letter": w[-1], "length": str(len(w))})
                      for w in sample(rng, spelled, n_words)]

        self.values: dict[tuple[str, str], list[str]] = {}
        self.held_out: dict[tuple[Entity, str], tuple[list[str], list[str]]] = {}
        self.told: dict[tuple[Entity, str], list[SentenceForms]] = {}
        self.asked: dict[tuple[Entity, str], list[str]] = {}
        for entity in self.entities() + self.words:
            for attribute, value in entity.values.items():
                known = self.values.setdefault((entity.group, attribute), [])
                if value not in known:
                    known.append(value)
                phrasings = PHRASINGS[entity.group, attribute]
                sentences = sample(rng, phrasings.last, HELD_OUT_SENTENCES)
                questions = sample(rng, phrasings.questions, HELD_OUT_QUESTIONS)
                self.held_out[entity, attribute] = sentences, questions
                self.told[entity, attribute] = [entity.sentence_forms(p, value)
                                                for p in phrasings.last + phrasings.other if p not in sentences]
                self.asked[entity, attribute] = [entity.fill(q) for q in phrasings.questions if q not in questions]
        for known in self.values.values():
            known.sort()

        numbers = range(2, MAX_ADDEND + 1)
        pairs = [(a, b) for a in numbers for b in numbers if a <= b]
        self.held_out_sums = frozenset(sample(rng, pairs, len(pairs) // 10))       # smaller number first
        self.sums = [(a, b) for a in numbers for b in numbers if (min(a, b), max(a, b)) not in self.held_out_sums]
        older = [(a, b) for a in self.people for b in self.people if int(a.values["age"]) > int(b.values["age"])]
        self.held_out_older = sample(rng, older, len(older) // 10)
        held_out = set(self.held_out_older)
        self.older = [pair for pair in older if pair not in held_out]
        self.by_name = {e.name: e for e in self.entities() + self.words}

    def entities(self) -> list[Entity]:
        """Return the people, places and things, which the world facts are about."""
        return self.people + self.places + self.things

    def describe(self) -> str:
        """Return a readable line for each person, place and thing."""
        return "\n".join(f"{capital(e.name)} ({e.group}, {e.pronoun}): "
                         + ", ".join(f"{a} {v}" for a, v in e.values.items()) for e in self.entities())


def _make_entities(rng: random.Random, group: str, names: list[str], pronoun: str,
                   attributes: dict[str, list[str]]) -> list[Entity]:
    entities = [Entity(group, name, pronoun, {}) for name in names]
    for attribute, values in attributes.items():
        _give_values(rng, entities, attribute, values)
    return entities


def _give_values(rng: random.Random, entities: list[Entity], attribute: str, values: list[str]) -> None:
    """Give each entity a value, all values equally often, so that guessing the most common one gains nothing."""
    deck: list[str] = []
    while len(deck) < len(entities):
        deck += sample(rng, values, len(values))
    for entity, value in zip(entities, deck):
        entity.values[attribute] = value
