"""Make conversations in which the model says who it is, from a short description. Needs no network and no other model.

    python dev/gen_identity.py                  # 1,000 into $NANOCHAT_BASE_DIR/identity_conversations.jsonl
    python dev/gen_identity.py --name="Robin" --maker="Ada" --size="" --out=robin.jsonl
    python dev/gen_identity.py --short          # few words, for a model of a few million parameters

Mid-training and SFT read this file if it exists (tasks/recipes.py). Each line is a JSON array of messages; all lines
differ. The same seed and description give the same file. The conversations never mention an empty field of the
description. For a model of your own, read the output and edit the questions and answers in dev/identity_phrases.py.
"""

import dataclasses
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # so that it runs as a file, without an installed package
    sys.path.insert(0, str(ROOT))

from dev.identity_phrases import FULL, GREETINGS, OPENINGS, RIVALS, SHORT, SHORT_OPENINGS, Topic  # noqa: E402
from nanochat.cli import COUNT, SEED, flag, parse, run_main  # noqa: E402
from nanochat.errors import UserError  # noqa: E402
from nanochat.files import atomic_write, base_dir, to_json  # noqa: E402
from nanochat.recipe import published  # noqa: E402

SAME_START = 5     # conversations that may begin with the same question and answer
TRIES = 300        # for each conversation, before giving up
TURNS = (1, 1, 1, 1, 2, 2, 2, 2, 3, 3)


@dataclass
class Description:
    """The model, described in words that fit into the sentences of dev/identity_phrases.py."""

    name: str = flag("Saint Iberis", "what the model is called")
    maker: str = flag("Rikka Botan", "who made it")
    project: str = flag("Liquid-Time nanochat", "the code it was trained with")
    kind: str = flag("a hybrid of short convolutions and attention", "what it is, technically")
    size: str = flag("542 million", "parameters, in words; --short: 5 million")
    data: str = flag("educational web pages", "what it has read; --short: stories of a small invented world")
    time: str = flag("about three hours on eight GPUs",
                     "how long training took, or what it cost; --short: a few minutes on a laptop")
    year: str = flag("2025", "when it was first published")
    licence: str = flag("MIT", "licence of code and weights")
    questions: str = flag("people, places and things", "what it answers questions about; for --short alone")


SMALL = {"size": "5 million", "data": "stories of a small invented world", "time": "a few minutes on a laptop"}


@dataclass
class Config(Description):
    """The flags: the description, and what to write."""

    count: int = flag(published.identity.count, "conversations", within=COUNT)
    seed: int = flag(0, "of the random choice of phrases", within=SEED)
    short: bool = flag(published.identity.short, "short questions and answers, for a tiny model")
    out: str = flag("", "file to write; unset: identity_conversations.jsonl in the base directory")


def conversations(description: Description, count: int = 1000, seed: int = 0,
                  short: bool = False) -> list[list[dict[str, str]]]:
    """Return different conversations of one to three turns, each a list of messages.

    At most SAME_START of them begin with the same question and answer. The result depends on the arguments alone.

    Args:
        description: of the model. Empty fields are not mentioned.
        count: number of conversations.
        seed: of the random choice of phrases.
        short: use few words, and the fields of SMALL in place of the defaults.

    Raises:
        UserError: the name is empty, or there are not `count` different conversations.
    """
    if not description.name.strip():
        raise UserError("the model needs a name: --name=...")
    if count < 1:
        raise UserError(f"--count is {count}; at least one conversation is needed")
    about = {field.name: getattr(description, field.name).strip() for field in dataclasses.fields(Description)}
    if short:
        usual = Description()
        about |= {key: value for key, value in SMALL.items() if getattr(description, key) == getattr(usual, key)}
    topics = [topic for topic in (SHORT if short else FULL) if all(about[need] for need in topic.needs)]
    rng, found, first = random.Random(f"identity {seed}"), {}, Counter()
    for _ in range(count * TRIES):
        made = _conversation(rng, topics, about, short)
        key, start = to_json(made), (made[0]["content"], made[1]["content"])
        if key not in found and first[start] < SAME_START:
            found[key] = made
            first[start] += 1
            if len(found) == count:
                return list(found.values())
    raise UserError(f"there are no {count} different conversations to be made of this description, only about "
                    f"{len(found)}: ask for fewer, or add phrases to dev/identity_phrases.py")


def _conversation(rng: random.Random, topics: Sequence[Topic], about: dict[str, str],
                  short: bool) -> list[dict[str, str]]:
    turns, messages = rng.choice(TURNS), []
    if not short and rng.random() < 0.15:   # a greeting in any language; the rest is in English
        asked, answer = rng.choice(GREETINGS)
        messages += _turn(asked, answer, about)
    weights = [topic.weight for topic in topics]
    chosen: list[Topic] = []
    while len(chosen) < min(turns, len(topics)):
        topic = rng.choices(topics, weights)[0]
        if topic not in chosen and (not chosen or topic.later) and (not topic.last or len(chosen) == turns - 1):
            chosen.append(topic)
    for topic in chosen:
        asked, answer = rng.choice(topic.questions), rng.choice(topic.answers)
        if not messages:
            asked = _opened(rng, asked, SHORT_OPENINGS if short else OPENINGS)
        messages += _turn(asked, answer, {**about, "rival": rng.choice(RIVALS)})
    return messages[:6]


def _opened(rng: random.Random, asked: str, openings: Sequence[str]) -> str:
    """Return the question after an opening such as "Hello!", sometimes without capitals and punctuation."""
    opening, sloppy = rng.choice(openings), rng.random()
    if opening.endswith(","):
        asked = asked if asked.startswith(("I ", "I'")) else asked[:1].lower() + asked[1:]
    asked = f"{opening} {asked}".strip()
    if openings is OPENINGS and sloppy < 0.2:
        asked = asked.lower() if "{" not in asked else asked[:1].lower() + asked[1:]
        asked = asked.rstrip("?.") if sloppy < 0.1 else asked
    return asked


def _turn(asked: str, answer: str, about: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked.format(**about)},
            {"role": "assistant", "content": answer.format(**about)}]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file and print where it is. Raises UserError as `conversations` does."""
    config = parse(Config, argv, __doc__)
    made = conversations(config, config.count, config.seed, config.short)
    path = Path(config.out).expanduser() if config.out else base_dir() / "identity_conversations.jsonl"
    with atomic_write(path, "w") as file:
        file.writelines(to_json(messages) + "\n" for messages in made)
    print(f"{len(made)} conversations about {config.name}: {path}")


if __name__ == "__main__":
    run_main(main)
