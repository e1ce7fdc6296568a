"""Facts of the small world as prompts to complete, and the grading of any model on them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from nanochat.small_world.phrasings import DIFFERENCES, OLDER, OWNS, SUMS
from nanochat.small_world.stories import count_list, gifts
from nanochat.small_world.world import LARGEST, QUESTION, World, pick, rng_of, sample

WORLD_KINDS = ("people", "places", "things")
N_STORIES = 60              # prompts of each kind that is made from fresh little stories


@dataclass(frozen=True)
class Fact:
    """A prompt, and what may follow it. `answer` is one of `choices`; each begins with the space that joins it to the prompt.
    A model that knows nothing is right once in len(choices)."""

    prompt: str
    answer: str
    choices: list[str]
    kind: str


class Grade(NamedTuple):
    """Share of facts where the right choice is the likeliest, what guessing would give, and how many facts."""

    accuracy: float
    chance: float
    count: int


def facts(seed: int = 0) -> list[Fact]:
    """Return every fact to grade, in a fixed order. Kinds: people, places, things (the world facts: for each one a held-out sentence
    and a held-out question), sums, differences, comparison, spelling, giving, counting."""
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
            near = range(max(0, answer - 4), min(2 * LARGEST, answer + 4) + 1)
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
        found.append(Fact(" ".join(text) + " " + asked, " " + owner[item].name, [" " + p.name for p in people], "giving"))
    for _ in range(N_STORIES):
        text, n = count_list(rng, world)
        found.append(Fact(text.removesuffix(f" {n}"), f" {n}", [f" {k}" for k in range(2, 8)], "counting"))
    return found


def grade(facts: list[Fact], score: Callable[[list[str], list[list[str]]], list[list[float]]]) -> dict[str, Grade]:
    """Grade a model on facts, by kind, and under "world" on all world facts together, where there are any.

    score(prompts, choices) gives the log-likelihood (nats, summed over its tokens) of each choice after its prompt. A tie with a wrong
    choice is wrong. Raises ValueError if the shapes do not fit or a score is not a number."""
    scores = score([f.prompt for f in facts], [f.choices for f in facts])
    if len(scores) != len(facts):
        raise ValueError(f"score() gave {len(scores)} rows for {len(facts)} facts")
    right: dict[str, list[tuple[bool, float]]] = {}
    for fact, row in zip(facts, scores):
        if len(row) != len(fact.choices) or any(x != x for x in row):
            raise ValueError(f"score() gave {row} for the {len(fact.choices)} choices of {fact.prompt!r}")
        answer = row[fact.choices.index(fact.answer)]
        mark = all(x < answer for choice, x in zip(fact.choices, row) if choice != fact.answer), 1 / len(fact.choices)
        for kind in (fact.kind, "world") if fact.kind in WORLD_KINDS else (fact.kind,):
            right.setdefault(kind, []).append(mark)
    return {kind: Grade(sum(r for r, _ in marks) / len(marks), sum(c for _, c in marks) / len(marks), len(marks))
            for kind, marks in right.items()}
