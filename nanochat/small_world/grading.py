"""Facts of the small world as prompts to complete, and how to grade a model on them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from nanochat.errors import UserError
from nanochat.small_world.phrasings import DIFFERENCES, OLDER, OWNS, SUMS
from nanochat.small_world.stories import count_list, gifts
from nanochat.small_world.world import MAX_ADDEND, QUESTION, World, pick, rng_of, sample

WORLD_KINDS = ("people", "places", "things")
N_STORIES = 60              # prompts of each kind that comes with a new story


@dataclass(frozen=True)
class Fact:
    """A prompt and what may follow it. A model that guesses is right once in len(choices).

    Attributes:
        prompt: the beginning of a text.
        answer: the right continuation, one of `choices`.
        choices: all continuations, each with the space that separates it from the prompt.
        kind: see `facts`.
    """

    prompt: str
    answer: str
    choices: list[str]
    kind: str


class Grade(NamedTuple):
    """The result for one kind of fact.

    Attributes:
        accuracy: share of facts whose right choice is the most likely one.
        chance: the accuracy of guessing.
        count: number of facts.
    """

    accuracy: float
    chance: float
    count: int


def facts(seed: int = 0) -> list[Fact]:
    """Return every fact to grade, in a fixed order.

    The kinds are people, places and things (the world facts, each with a held-out sentence and a held-out question),
    sums, differences, comparison, spelling, giving and counting.
    """
    world = World(seed)
    found = []
    for (entity, attribute), (sentences, questions) in world.held_out.items():
        kind = "spelling" if entity.group == "words" else entity.group
        choices = [" " + v for v in world.values[entity.group, attribute]]
        prompts = [entity.fill(sentences[0].removesuffix(" {v}"))]
        if entity.group in WORLD_KINDS:
            prompts.append(f"Question: {entity.fill(questions[0])} Answer:")
        found += [Fact(prompt, " " + entity.values[attribute], choices, kind) for prompt in prompts]
    rng = rng_of(seed, QUESTION)
    for a, b in sorted(world.held_out_sums | {(b, a) for a, b in world.held_out_sums}):
        for kind, forms, value in (("sums", SUMS, "{c}"), ("differences", DIFFERENCES, "{a}")):
            answer = a + b if kind == "sums" else a
            near = range(max(0, answer - 4), min(2 * MAX_ADDEND, answer + 4) + 1)
            for form in sample(rng, forms, 2):
                prompt = form.removesuffix(" " + value).format(a=a, b=b, c=a + b)
                found.append(Fact(prompt, f" {answer}", [f" {n}" for n in near], kind))
    for older, younger in world.held_out_older:
        form = pick(rng, OLDER[6:])
        head, answer = form.format(x=older.name, y=younger.name).rsplit(" ", 1)
        found.append(Fact(head, " " + answer, [" " + older.name, " " + younger.name], "comparison"))
    for _ in range(N_STORIES):
        people = sample(rng, world.people, 3)
        text, owner = gifts(rng, people, 2 + int(rng.random() * 2))
        item = pick(rng, list(owner))
        asked = pick(rng, OWNS).removesuffix(" {x}").format(t=item)
        choices = [" " + person.name for person in people]
        found.append(Fact(" ".join(text) + " " + asked, " " + owner[item].name, choices, "giving"))
    for _ in range(N_STORIES):
        text, n = count_list(rng, world)
        found.append(Fact(text.removesuffix(f" {n}"), f" {n}", [f" {k}" for k in range(2, 8)], "counting"))
    return found


def grade(facts: list[Fact], score: Callable[[list[str], list[list[str]]], list[list[float]]]) -> dict[str, Grade]:
    """Grade a model on facts.

    Args:
        facts: what to grade on.
        score: score(prompts, choices) returns the log-likelihood of each choice after its prompt, in nats, summed over
            the tokens of the choice.

    Returns:
        A Grade for each kind, and "world" for all world facts together if there are any. A tie with a wrong choice
        counts as wrong.

    Raises:
        UserError: `score` returned NaN. ValueError: it returned the wrong number of values.
    """
    scores = score([f.prompt for f in facts], [f.choices for f in facts])
    if len(scores) != len(facts):
        raise ValueError(f"score() gave {len(scores)} rows for {len(facts)} facts")
    right: dict[str, list[tuple[bool, float]]] = {}
    for fact, row in zip(facts, scores):
        if len(row) != len(fact.choices) or any(x != x for x in row):  # x != x: NaN
            raise UserError(f"score() gave {row} for the {len(fact.choices)} choices of {fact.prompt!r}")
        answer = row[fact.choices.index(fact.answer)]
        correct = all(x < answer for choice, x in zip(fact.choices, row) if choice != fact.answer)
        for kind in (fact.kind, "world") if fact.kind in WORLD_KINDS else (fact.kind,):
            right.setdefault(kind, []).append((correct, 1 / len(fact.choices)))
    return {kind: Grade(sum(r for r, _ in pairs) / len(pairs), sum(c for _, c in pairs) / len(pairs), len(pairs))
            for kind, pairs in right.items()}
