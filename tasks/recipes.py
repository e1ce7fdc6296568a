"""What each stage is trained on and graded on, from top to bottom.

    train, val = mid("hub")              conversations, tools, multiple choice: the first stage after the base model
    train, val = sft("small-world")      fewer and better ones, nearer to what is asked of it
    graded("hub")["GSM8K"]()             the task that chat_eval asks; each is loaded when it is called for
    rl("hub", "train")                   what rewards are earned on

data "hub" is the published recipe, on data of the Hugging Face hub or a mirror of it (tasks/hub.py); "small-world" needs no network and
suits a model of a few million parameters. `extra` are files of your own conversations (tasks/custom_json.py), all of each added once."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from nanochat.files import base_dir
from tasks.arc import ARC
from tasks.base import Mixture, Task, one_of
from tasks.custom_json import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.hub import MIRROR
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.small_world import WorldChoice, WorldQuestions, WorldSums
from tasks.smoltalk import SmolTalk
from tasks.spelling import SimpleSpelling, SpellingBee

DATA = ("hub", "small-world")
IDENTITY = "identity_conversations.jsonl"   # in the base directory; dev/gen_identity.py makes it
FRESH = 50_000                              # SFT on the small world begins at this conversation, so that it sees other ones than mid


def mid(data: str, seed: int = 0, extra: Iterable[str | Path] = (), **sizes: int) -> tuple[Task, Task]:
    """Return (train, val) of mid-training. `seed` is that of the small world, which the hub's data has not.

    sizes, as conversations: of the hub's recipe spelling and bee; of the small world's questions, choices, sums, spelling and bee.
    Raises UserError for data that cannot be had."""
    one_of("data", data, DATA)
    return _mid_hub(extra, **sizes) if data == "hub" else _mid_small_world(seed, extra, **sizes)


def sft(data: str, seed: int = 0, extra: Iterable[str | Path] = (), **sizes: int) -> tuple[Task, Task]:
    """Return (train, val) of supervised fine-tuning. Arguments as for mid; of the hub's recipe also smoltalk."""
    one_of("data", data, DATA)
    return _sft_hub(extra, **sizes) if data == "hub" else _sft_small_world(seed, extra, **sizes)


def graded(data: str, seed: int = 0) -> dict[str, Callable[[], Task]]:
    """Return the tasks that a chat model is graded on, by name, each as a function that loads it."""
    one_of("data", data, DATA)
    if data == "hub":
        return {
            "ARC-Easy": lambda: ARC("ARC-Easy", "test"),
            "ARC-Challenge": lambda: ARC("ARC-Challenge", "test"),
            "MMLU": lambda: MMLU("all", "test"),
            "GSM8K": lambda: GSM8K("main", "test"),
            "HumanEval": lambda: HumanEval(),
            "SpellingBee": lambda: SpellingBee("test", 256, **_english()),
        }
    return {
        "World-Questions": lambda: WorldQuestions("test", seed),
        "World-Choice": lambda: WorldChoice("test", seed),
        "World-Sums": lambda: WorldSums("test", seed),
        "SpellingBee": lambda: SpellingBee("test", 256, seed, **PLAIN),
    }


def rl(data: str, split: str, seed: int = 0) -> Task:
    """Return what reinforcement learning asks: word problems, or sums of the small world. split: "train" or "test"."""
    one_of("data", data, DATA)
    return GSM8K("main", split) if data == "hub" else WorldSums(split, seed)


# ---- the hub: 848,000 conversations in mid, 23,000 in SFT


def _mid_hub(extra: Iterable[str | Path], spelling: int = 200_000, bee: int = 80_000) -> tuple[Task, Task]:
    train = [
        SmolTalk("train"),                                       # 460K conversations about everything
        MMLU("auxiliary_train", "train"),                        # 100K questions of multiple choice
        GSM8K("main", "train"),                                  # 8K problems solved with the calculator
        *_identity() * 2,                                        # who it is, twice
        SimpleSpelling("train", spelling, **_english()),         # what tokens are made of
        SpellingBee("train", bee, **_english()),
        *map(CustomJSON, extra),
    ]
    val = [SmolTalk("test"), MMLU("all", "test")[:5200], GSM8K("main", "test")[:420]]   # in the proportions of training
    return Mixture(train), Mixture(val)


def _sft_hub(extra: Iterable[str | Path], smoltalk: int = 10_000, spelling: int = 300, bee: int = 300) -> tuple[Task, Task]:
    train = [
        ARC("ARC-Easy", "train"),                                # 2.3K
        ARC("ARC-Challenge", "train"),                           # 1.1K
        GSM8K("main", "train"),                                  # 8K
        SmolTalk("train")[:smoltalk],
        *_identity(),
        SimpleSpelling("train", spelling, **_english()),
        SpellingBee("train", bee, **_english()),
        *map(CustomJSON, extra),
    ]
    return Mixture(train), SmolTalk("test")


def _english() -> dict:
    """English words, fetched where a network may be used; never invented ones in their place."""
    return {"source": "words_alpha", "fetch": not os.environ.get(MIRROR)}


# ---- the small world


PLAIN = {"source": "invented", "phrasings": "plain"}


def _mid_small_world(seed: int, extra: Iterable[str | Path], questions: int = 5000, choices: int = 1500, sums: int = 2500,
                     spelling: int = 3000, bee: int = 3000) -> tuple[Task, Task]:
    train = [
        WorldQuestions("train", seed, questions),
        WorldChoice("train", seed, choices),
        WorldSums("train", seed, sums),
        SimpleSpelling("train", spelling, seed, "invented"),
        SpellingBee("train", bee, seed, **PLAIN),
        *_identity(),
        *map(CustomJSON, extra),
    ]
    return Mixture(train), _val_small_world(seed)


def _sft_small_world(seed: int, extra: Iterable[str | Path], questions: int = 1500, choices: int = 500, sums: int = 800,
                     spelling: int = 300, bee: int = 1000) -> tuple[Task, Task]:
    train = [
        WorldQuestions("train", seed, FRESH + questions)[FRESH:],
        WorldChoice("train", seed, FRESH + choices)[FRESH:],
        WorldSums("train", seed, FRESH + sums)[FRESH:],
        SimpleSpelling("train", FRESH + spelling, seed, "invented")[FRESH:],
        SpellingBee("train", FRESH + bee, seed, **PLAIN)[FRESH:],
        *_identity(),
        *map(CustomJSON, extra),
    ]
    return Mixture(train), _val_small_world(seed)


def _val_small_world(seed: int) -> Task:
    """As much of each kind, in an order that a part of which is a fair part."""
    size = 80
    return Mixture([
        WorldQuestions("test", seed, size), WorldChoice("test", seed, size), WorldSums("test", seed, size),
        SimpleSpelling("test", size, seed, "invented"), SpellingBee("test", size, seed, **PLAIN)])


def _identity() -> list[Task]:
    path = base_dir() / IDENTITY
    return [CustomJSON(path)] if path.exists() else []
