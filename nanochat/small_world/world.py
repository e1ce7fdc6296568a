"""The small world itself: who and what there is, every property of it, and which phrasings are held out for which fact.

Everything follows from the seed, by random.Random(int) and its random() alone, which give the same on every platform and
Python version."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from nanochat.small_world import words
from nanochat.small_world.phrasings import PHRASINGS

T = TypeVar("T")
WORLD, DOCUMENT, QUESTION = 0, 1, 2         # streams of random numbers that one seed gives
HELD_OUT_SENTENCES, HELD_OUT_QUESTIONS = 2, 1   # of each fact's phrasings
LARGEST = 15                                # largest number that is added
PRONOUNS = {"she": ("She", "she", "her", "Her", "her"), "he": ("He", "he", "him", "His", "his"), "it": ("It", "it", "it", "Its", "its")}


def rng_of(seed: int, stream: int, index: int = 0) -> random.Random:
    """Return the generator of item `index` of a stream."""
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index of the small world must not be negative, got {seed} and {index}")
    return random.Random((seed * 4 + stream) << 64 | index)


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """Return one of the items."""
    return items[int(rng.random() * len(items))]


def sample(rng: random.Random, items: Sequence[T], n: int) -> list[T]:
    """Return n different items in random order."""
    if n > len(items):
        raise ValueError(f"cannot take {n} of {len(items)} items")
    rest = list(items)
    return [rest.pop(int(rng.random() * len(rest))) for _ in range(n)]


class Saying(NamedTuple):
    """One sentence without its full stop, in the four forms that a text needs."""

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
        """Return the phrasing (placeholders: see phrasings.py) about this entity."""
        start = "The word " + self.name if self.group == "words" else capital(self.name)
        subject, subject_in, thing, possessive, possessive_in = PRONOUNS[self.pronoun]
        own = subject_in, possessive_in
        if not pronoun:
            subject, subject_in, thing, possessive, possessive_in = start, self.name, self.name, start + "'s", self.name + "'s"
        return phrasing.format(S=subject, s=subject_in, o=thing, P=possessive, p=possessive_in, n=self.name,
                               r=own[0], h=own[1], v=value, V=capital(value))

    def saying(self, phrasing: str, value: str) -> Saying:
        """Return the sentence in all its forms."""
        if phrasing.startswith(("{S}", "{P}")):
            inside = "{" + phrasing[1].lower() + phrasing[2:]
        elif phrasing.startswith(("{v}", "{V}")):
            inside = "{v" + phrasing[2:]
        else:
            inside = phrasing[0].lower() + phrasing[1:]
        return Saying(self.fill(phrasing, value), self.fill(phrasing, value, pronoun=True),
                      self.fill(inside, value), self.fill(inside, value, pronoun=True))


def capital(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[:1].upper() + text[1:]


class World:
    """All of one small world.

    people, places, things, words: lists of Entity. values[group, attribute]: every value that attribute has in this world.
    held_out[entity, attribute]: the (sentences, questions) never used for that fact in a document, as phrasings.
    told[entity, attribute], asked[entity, attribute]: the sentences and questions that documents may use."""

    def __init__(self, seed: int = 0, n_people: int = 20, n_places: int = 12, n_things: int = 20, n_words: int = 60):
        rng = rng_of(seed, WORLD)
        self.seed = seed
        towns = sample(rng, words.TOWNS, n_places)
        ages = [str(18 + age) for age in sample(rng, range(63), 16)]
        self.people = _deal(rng, "people", sample(rng, words.WOMEN, n_people // 2), "she", {}) \
            + _deal(rng, "people", sample(rng, words.MEN, n_people - n_people // 2), "he", {})
        self.places = _deal(rng, "places", towns, "it", {
            "river": words.RIVERS[:n_places], "product": words.PRODUCTS[:n_places], "market day": words.DAYS})
        self.things = _deal(rng, "things", ["the " + t for t in sample(rng, words.THINGS, n_things)], "it", {
            "colour": words.COLOURS[:10], "material": words.MATERIALS[:10], "room": words.ROOMS[:10]})
        for attribute, values in {"town": towns, "job": words.JOBS[:12], "pet": words.PETS[:10], "colour": words.COLOURS[:10],
                                  "food": words.FOODS[:12], "instrument": words.INSTRUMENTS[:10], "age": ages}.items():
            _give_values(rng, self.people, attribute, values)
        order = sample(rng, self.places, n_places)
        for a, b in zip(order, order[1:] + order[:1]):     # a ring road: each town has the next one for its neighbour
            a.values["neighbour"] = b.name
        spelled = sorted({t.name[4:] for t in self.things} | set(words.PETS + words.JOBS + words.FOODS + words.GIFTS))
        self.words = [Entity("words", w, "it", {"first letter": w[0], "last letter": w[-1], "length": str(len(w))})
                      for w in sample(rng, spelled, n_words)]

        self.values: dict[tuple[str, str], list[str]] = {}
        self.held_out: dict[tuple[Entity, str], tuple[list[str], list[str]]] = {}
        self.told: dict[tuple[Entity, str], list[Saying]] = {}
        self.asked: dict[tuple[Entity, str], list[str]] = {}
        for entity in self.entities() + self.words:
            for attribute, value in entity.values.items():
                known = self.values.setdefault((entity.group, attribute), [])
                if value not in known:
                    known.append(value)
                said = PHRASINGS[entity.group, attribute]
                sentences = sample(rng, said.last, HELD_OUT_SENTENCES)
                questions = sample(rng, said.questions, HELD_OUT_QUESTIONS)
                self.held_out[entity, attribute] = sentences, questions
                self.told[entity, attribute] = [entity.saying(p, value) for p in said.last + said.other if p not in sentences]
                self.asked[entity, attribute] = [entity.fill(q) for q in said.questions if q not in questions]
        for known in self.values.values():
            known.sort()

        pairs = [(a, b) for a in range(2, LARGEST + 1) for b in range(a, LARGEST + 1)]
        self.held_out_sums = frozenset(sample(rng, pairs, len(pairs) // 10))       # smaller number first
        self.sums = [(a, b) for a in range(2, LARGEST + 1) for b in range(2, LARGEST + 1)
                     if (min(a, b), max(a, b)) not in self.held_out_sums]
        elder = [(a, b) for a in self.people for b in self.people if int(a.values["age"]) > int(b.values["age"])]
        self.held_out_older = sample(rng, elder, len(elder) // 10)                  # the older one first
        held = set(self.held_out_older)
        self.older = [pair for pair in elder if pair not in held]
        self.by_name = {e.name: e for e in self.entities() + self.words}

    def entities(self) -> list[Entity]:
        """Return the people, places and things: what world facts are about."""
        return self.people + self.places + self.things

    def describe(self) -> str:
        """Return one line for each person, place and thing, for a person to read."""
        return "\n".join(f"{capital(e.name)} ({e.group}, {e.pronoun}): " + ", ".join(f"{a} {v}" for a, v in e.values.items())
                         for e in self.entities())


def _deal(rng: random.Random, group: str, names: list[str], pronoun: str, attributes: dict[str, list[str]]) -> list[Entity]:
    entities = [Entity(group, name, pronoun, {}) for name in names]
    for attribute, values in attributes.items():
        _give_values(rng, entities, attribute, values)
    return entities


def _give_values(rng: random.Random, entities: list[Entity], attribute: str, values: list[str]) -> None:
    """Deal the values out as evenly as they go, so that guessing the commonest one gains nothing."""
    deck: list[str] = []
    while len(deck) < len(entities):
        deck += sample(rng, values, len(values))
    for entity, value in zip(entities, deck):
        entity.values[attribute] = value
