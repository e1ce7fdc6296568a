"""Conversations about the small world: its facts as questions and as multiple choice, and sums.

Training uses the questions that documents use too. The test asks for each fact with the question that was held out for
it, which is in no document and in no training conversation.
"""

import math
import re
from functools import lru_cache

from nanochat.small_world import Entity, World
from nanochat.small_world.phrasings import PHRASINGS
from nanochat.small_world.words import COUNTED
from nanochat.small_world.world import pick, sample
from nanochat.tools.calculator import calculate
from tasks import multiple_choice
from tasks.base import (
    CATEGORICAL,
    Task,
    calculator_parts,
    in_test,
    last_number,
    non_negative,
    one_of,
    question_and_answer,
    reference_text,
    rng_for,
    same_number,
    text_part,
    until_assistant_end,
)

SPLITS = ("train", "test")
TURNS = (1, 1, 1, 1, 2, 2, 2, 3, 3, 4)   # the number of turns of a training conversation is one of these
MAX_NUMBER = 99                          # largest number that is added or subtracted
SIZE = 10_000                            # default number of training conversations

# Questions for each calculation, plain or as a story: {a} {b} {c} are numbers, {x} is a person, {t} things to count.
PLAIN_SUMS = {
    "a+b": ("What is {a} plus {b}?", "What is {a} + {b}?", "How much is {a} and {b}?", "Add {b} to {a}.",
            "What do {a} and {b} make?",
            "What is the sum of {a} and {b}?"),
    "a-b": ("What is {a} minus {b}?", "What is {a} - {b}?", "How much is {a} less {b}?", "Take {b} from {a}.",
            "What is left of {a} without {b}?", "What is the difference of {a} and {b}?"),
    "a*b": ("What is {a} times {b}?", "What is {a} * {b}?", "How much is {a} times {b}?", "Multiply {a} by {b}."),
    "a+b+c": ("What is {a} plus {b} plus {c}?", "What is {a} + {b} + {c}?", "Add {a} and {b} and {c}."),
    "a+b-c": ("What is {a} plus {b} minus {c}?", "What is {a} + {b} - {c}?", "Take {c} from {a} plus {b}."),
    "a-b+c": ("What is {a} minus {b} plus {c}?", "What is {a} - {b} + {c}?", "Take {b} from {a} and add {c}."),
}
STORY_SUMS = {
    "a+b": ("{x} has {a} {t} and gets {b} more. How many {t} does {x} have?",
            "{x} has {a} {t} and finds {b} more. How many {t} are there now?"),
    "a-b": ("{x} has {a} {t} and gives away {b}. How many {t} does {x} have?",
            "{x} has {a} {t} and loses {b}. How many {t} are there now?"),
    "a*b": ("{x} has {a} bags with {b} {t} in each. How many {t} does {x} have?",
            "Each of {a} boxes holds {b} {t}. How many {t} are there?"),
    "a+b+c": ("{x} has {a} {t}, gets {b} more and finds {c} more. How many {t} does {x} have?",),
    "a+b-c": ("{x} has {a} {t}, gets {b} more and loses {c}. How many {t} does {x} have?",
              "{x} finds {b} {t}, has {a} already and gives away {c}. How many {t} are left?"),
    "a-b+c": ("{x} has {a} {t}, gives away {b} and gets {c} more. How many {t} does {x} have?",
              "{x} gets {c} {t}, but of the {a} that were there {b} are lost. How many {t} are there now?"),
}
KINDS = ("a+b", "a-b") * 3 + ("a*b", "a*b", "a+b+c", "a+b-c", "a-b+c")   # each as often as it is to be asked


@lru_cache(maxsize=8)
def world_of(seed: int) -> World:
    """Return the world of a seed; cached."""
    return World(non_negative("the seed of the small world", seed))


class WorldTask(Task):
    """Questions about the facts of the small world. A subclass defines the form of a question."""

    def __init__(self, split: str, seed: int = 0, size: int | None = None):
        """Choose the facts.

        Args:
            split: "train" or "test".
            seed: which small world.
            size: number of conversations. Train can have any number, by default 10,000. Test has at most one for each
                fact, by default all.
        """
        self.split, self.seed = one_of("split of the small world", split, SPLITS), seed
        self.world = world_of(seed)
        self.facts = [(entity, attribute) for entity in self.world.entities() for attribute in entity.values]
        if split == "test":   # shuffled, so that the first few are a fair sample of people, places and things
            self.facts = sample(rng_for("world facts", seed), self.facts, len(self.facts))
        known = len(self.facts) if split == "test" else SIZE
        self.size = known if size is None else non_negative("size", size)
        if split == "test":
            self.size = min(self.size, known)

    def __len__(self) -> int:
        return self.size


class WorldQuestions(WorldTask):
    """Questions that one short sentence answers.

    Training conversations have one to four turns; later turns sometimes use a pronoun.
    """

    name = "World-Questions"

    def __init__(self, split: str, seed: int = 0, size: int | None = None):
        super().__init__(split, seed, size)
        values = [self.world.values[entity.group, attribute] for entity, attribute in self.facts]
        self.chance = math.fsum(1 / len(known) for known in values) / len(values)

    def conversation(self, i: int) -> dict:
        if self.split == "test":
            entity, attribute = self.facts[i]
            question = entity.fill(self.world.held_out[entity, attribute][1][0])
            return {**question_and_answer(question, sentence(self.world, entity, attribute)),
                    "fact": [entity.name, attribute]}
        rng = rng_for(self.name, self.split, self.seed, i)
        messages, entity = [], None
        for _ in range(pick(rng, TURNS)):
            stays = entity is not None and rng.random() < 0.7
            pronoun = stays and rng.random() < 0.6
            entity, attribute = (entity, pick(rng, list(entity.values))) if stays else pick(rng, self.facts)
            if pronoun:
                held_out = self.world.held_out[entity, attribute][1]
                question = pick(rng, [q for q in PHRASINGS[entity.group, attribute].questions if q not in held_out])
                question = entity.fill(question, pronoun=True)
            else:
                question = pick(rng, self.world.asked[entity, attribute])
            messages += question_and_answer(question, sentence(self.world, entity, attribute))["messages"]
        return {"messages": messages, "fact": [entity.name, attribute]}

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """Return whether the answer has the value, and no other value of the attribute except the entity's name."""
        name, attribute = conversation["fact"]
        entity = self.world.by_name[name]
        words = set(re.findall(r"\w+", until_assistant_end(answer).casefold()))
        found = {value for value in self.world.values[entity.group, attribute]
                 if value.casefold() in words and value != name}
        return found == {entity.values[attribute]}


class WorldChoice(WorldTask):
    """The same facts with four choices: the right value and three other values of the same attribute."""

    name, kind, chance = "World-Choice", CATEGORICAL, 0.25

    def conversation(self, i: int) -> dict:
        rng = rng_for(self.name, self.split, self.seed, i)
        entity, attribute = self.facts[i] if self.split == "test" else pick(rng, self.facts)
        held_out = entity.fill(self.world.held_out[entity, attribute][1][0])
        question = held_out if self.split == "test" else pick(rng, self.world.asked[entity, attribute])
        right = entity.values[attribute]
        wrong = [value for value in self.world.values[entity.group, attribute] if value not in (right, entity.name)]
        choices = sample(rng, [right, *sample(rng, wrong, 3)], 4)
        letters = multiple_choice.LETTERS[:4]
        answer = letters[choices.index(right)]
        return {**multiple_choice.conversation(question, choices, letters, answer), "fact": [entity.name, attribute]}


class WorldLookups(WorldChoice):
    """Multiple choice that goes on with turns which ask for the letter of a choice, or for the choice of a letter.

    To train on: such turns teach to find what stands beside a word further up. A multiple-choice answer needs that
    besides the fact, and no document of the small world teaches it.
    """

    name = "World-Lookups"

    def conversation(self, i: int) -> dict:
        made, rng = super().conversation(i), rng_for(self.name, self.split, self.seed, i)
        lines = [line[2:].split("=") for line in made["messages"][0]["content"].split("\n") if line.startswith("- ")]
        for _ in range(2 + int(rng.random() * 3)):
            choice, letter = pick(rng, lines)
            made["messages"] += question_and_answer(*pick(rng, (
                (f"Which letter is {choice}?", letter), (f"Which one is {letter}?", choice))))["messages"]
        return made


class WorldSums(Task):
    """Calculations with two or three numbers up to 99, done by the calculator.

    The first two numbers of a test question are never the first two of a training question. The attribute `stories` is
    the share of questions that are told as a story of a person of the small world.
    """

    name, stories = "World-Sums", 0.2

    def __init__(self, split: str, seed: int = 0, size: int | None = None):
        """Choose the pairs of numbers.

        Args:
            split: "train" or "test".
            seed: which small world.
            size: number of conversations; by default 10,000 in training, and one for each of the about 500 test pairs.
        """
        self.split, self.seed = one_of("split of the small world", split, SPLITS), seed
        self.world = world_of(seed)
        pairs = [pair for pair in _pairs() if in_test(f"{pair[0]} {pair[1]}") == (split == "test")]
        self.pairs = sample(rng_for("world sums", split, seed), pairs, len(pairs))
        self.size = (len(pairs) if split == "test" else SIZE) if size is None else non_negative("size", size)

    def __len__(self) -> int:
        return self.size

    def conversation(self, i: int) -> dict:
        rng = rng_for(self.name, self.split, self.seed, i)
        small, large = self.pairs[i % len(self.pairs)]
        kind, story = pick(rng, KINDS), rng.random() < self.stories
        a, b = (small, large) if "-b" not in kind and rng.random() < 0.5 else (large, small)
        c = int(rng.random() * ((min(a + b, MAX_NUMBER) if kind == "a+b-c" else MAX_NUMBER) + 1))
        form = pick(rng, (STORY_SUMS if story else PLAIN_SUMS)[kind])
        question = form.format(a=a, b=b, c=c, x=pick(rng, self.world.people).name, t=pick(rng, COUNTED))
        call = kind.replace("a", str(a)).replace("b", str(b)).replace("c", str(c))
        result = calculate(call)
        return question_and_answer(question, [*calculator_parts(call, result), text_part(f"It is {result}.")])

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """Return whether the last number after the calculator's output is the result."""
        return same_number(last_number(until_assistant_end(answer)), last_number(reference_text(conversation)))


class PlainSums(WorldSums):
    """The calculations without stories, for a model that has read another text."""

    name, stories = "Sums", 0.0


def sentence(world: World, entity: Entity, attribute: str) -> str:
    """Return the sentence that answers for a fact: the first one that documents may use. It ends in the value."""
    return world.told[entity, attribute][0].name + "."


def _pairs() -> list[tuple[int, int]]:
    return [(small, large) for large in range(MAX_NUMBER + 1) for small in range(large + 1)]
