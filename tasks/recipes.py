"""Which tasks each stage is trained on and graded on. How much of each: nanochat/recipe/.

    train, val = mid("hub")              conversations, tools, multiple choice: the first stage after the base model
    train, val = sft("small-world")      fewer and better conversations, nearer to what the model is asked
    graded("hub")["GSM8K"]()             a task that chat_eval asks, loaded when it is called
    rl("hub", "train")                   problems whose right answers are rewarded

data "hub" is the published mixture, of data sets of the Hugging Face hub or a mirror of it (tasks/hub.py).
"small-world" and "basics" need no network and suit a model of a few million parameters: the first for one that has
read the small world, the second, without its facts, for one that has read any other text. `extra` are .jsonl files of
your own conversations (tasks/custom_json.py), each added once, whole.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from nanochat.files import base_dir
from nanochat.recipe import Recipe, published, small
from nanochat.recipe.parts import FineTuningRecipe, MidRecipe
from tasks.arc import ARC
from tasks.base import Mixture, Task, one_of
from tasks.custom_json import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.hub import MIRROR
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.small_world import PlainSums, WorldChoice, WorldLookups, WorldQuestions, WorldSums
from tasks.smoltalk import SmolTalk
from tasks.spelling import SimpleSpelling, SpellingBee

DATA = ("hub", "small-world", "basics")
ARC_NAME, SMOLTALK_NAME = "allenai/ai2_arc", "HuggingFaceTB/smol-smoltalk"
IDENTITY = "identity_conversations.jsonl"   # in the base folder; dev/gen_identity.py makes it
SFT_START = 50_000                          # first conversation of SFT that is made here: beyond those of mid-training
PLAIN = {"source": "invented", "phrasings": "plain"}  # spelling tasks for a model that knows only the small world


def mid(data: str, seed: int = 0, extra: Iterable[str | Path] = (), **sizes: int) -> tuple[Task, Task]:
    """Return the training and the validation conversations of mid-training.

    Args:
        data: "hub", "small-world" or "basics".
        seed: of what is made here; the hub's data has none.
        extra: files of further conversations.
        sizes: conversations of one kind, instead of the recipe's number: spelling, bee, without the hub sums too, and
            in the small world questions, choices and lookups. identity: how often the file of identity conversations is
            repeated.

    Raises:
        UserError: unknown or unreachable data, or a file that is missing.
    """
    one_of("data", data, DATA)
    if data == "hub":
        return _mid_hub(extra, **{**published.mid.mixture, **sizes})
    return _made_here(data, 0, seed, extra, small.mid, sizes)


def sft(data: str, seed: int = 0, extra: Iterable[str | Path] = (), recipe: Recipe = published,
        **sizes: int) -> tuple[Task, Task]:
    """Return the training and the validation conversations of fine-tuning.

    Arguments are those of `mid`; the hub's sizes include smoltalk, -1 for all of it, and of arc, mmlu and gsm8k, how
    often they are repeated. recipe: whose mixture of the hub's data.
    """
    one_of("data", data, DATA)
    if data == "hub":
        return _sft_hub(extra, recipe.sft.validation, **{**recipe.sft.mixture, **sizes})
    return _made_here(data, SFT_START, seed, extra, small.sft, sizes)


def graded(data: str, seed: int = 0) -> dict[str, Callable[[], Task]]:
    """Return the tasks that a chat model is graded on, by name; each is a function that loads the task."""
    one_of("data", data, DATA)
    if data == "hub":
        return {
            "ARC-Easy": lambda: ARC("ARC-Easy", "test"),
            "ARC-Challenge": lambda: ARC("ARC-Challenge", "test"),
            "MMLU": lambda: MMLU("all", "test"),
            "GSM8K": lambda: GSM8K("main", "test"),
            "HumanEval": lambda: HumanEval(),
            "SpellingBee": lambda: SpellingBee("test", **_english()),
        }
    sums = WorldSums if data == "small-world" else PlainSums
    tasks = {sums.name: lambda: sums("test", seed), "SpellingBee": lambda: SpellingBee("test", seed=seed, **PLAIN)}
    if data == "basics":
        return tasks
    return {"World-Questions": lambda: WorldQuestions("test", seed),
            "World-Choice": lambda: WorldChoice("test", seed), **tasks}


def rl(data: str, split: str, seed: int = 0) -> Task:
    """Return the problems of reinforcement learning, GSM8K or sums. split: "train" or "test"."""
    one_of("data", data, DATA)
    if data == "hub":
        return GSM8K("main", split)
    return (WorldSums if data == "small-world" else PlainSums)(split, seed)


def hub_splits(stages: Iterable[str], recipe: Recipe = published) -> list[tuple[str, str, str]]:
    """Return the splits of the hub's data sets that these stages of a recipe are trained and graded on: (name, subset,
    split)."""
    stages, found = set(stages), []
    of_sft = {name for name, times in recipe.sft.mixture.items() if times and "sft" in stages}
    if stages:  # graded after each
        found += [(ARC_NAME, "ARC-Easy", "test"), (ARC_NAME, "ARC-Challenge", "test"), ("cais/mmlu", "all", "test"),
                  ("openai/gsm8k", "main", "test"), ("openai/openai_humaneval", "openai_humaneval", "test")]
    if stages & {"mid", "sft"}:
        found += [(SMOLTALK_NAME, "default", "train"), (SMOLTALK_NAME, "default", "test")]
    if stages & {"mid", "rl"} or "gsm8k" in of_sft:
        found += [("openai/gsm8k", "main", "train")]
    if "mid" in stages or "mmlu" in of_sft:
        found += [("cais/mmlu", "auxiliary_train", "train")]
    if "arc" in of_sft:
        found += [(ARC_NAME, "ARC-Easy", "train"), (ARC_NAME, "ARC-Challenge", "train")]
    return found


# ---- the hub: 848,000 conversations in mid-training, 23,000 in SFT; of the recipe modern 1,072,000 in SFT


def _mid_hub(extra: Iterable[str | Path], identity: int, spelling: int, bee: int) -> tuple[Task, Task]:
    train = [
        SmolTalk("train"),                                       # 460K conversations about everything
        MMLU("auxiliary_train", "train"),                        # 100K questions of multiple choice
        GSM8K("main", "train"),                                  # 8K problems solved with the calculator
        *_identity(identity),
        SimpleSpelling("train", spelling, **_english()),         # which letters a token is made of
        SpellingBee("train", bee, **_english()),
        *map(CustomJSON, extra),
    ]
    return Mixture(train), _val_hub(**published.mid.validation)


def _val_hub(mmlu: int, gsm8k: int) -> Task:
    """Return SmolTalk's test split, alone or mixed with some questions."""
    if not mmlu and not gsm8k:
        return SmolTalk("test")
    return Mixture([SmolTalk("test"), MMLU("all", "test")[:mmlu], GSM8K("main", "test")[:gsm8k]])


def _sft_hub(extra: Iterable[str | Path], validation: Mapping[str, int], identity: int, arc: int, mmlu: int, gsm8k: int,
             smoltalk: int, spelling: int, bee: int) -> tuple[Task, Task]:
    train = [
        *([ARC("ARC-Easy", "train"), ARC("ARC-Challenge", "train")] * arc if arc else []),  # 2.3K, 1.1K
        *([MMLU("auxiliary_train", "train")] * mmlu if mmlu else []),
        *([GSM8K("main", "train")] * gsm8k if gsm8k else []),    # 7.5K
        SmolTalk("train")[:None if smoltalk < 0 else smoltalk],
        *_identity(identity),
        SimpleSpelling("train", spelling, **_english()),
        SpellingBee("train", bee, **_english()),
        *map(CustomJSON, extra),
    ]
    return Mixture(train), _val_hub(**validation)


def _english() -> dict:
    """Return the arguments for English words: fetched unless there is a mirror, never replaced by invented ones."""
    return {"source": "words_alpha", "fetch": not os.environ.get(MIRROR)}


# ---- made here: the small world, and what goes with any text


def _made_here(data: str, start: int, seed: int, extra: Iterable[str | Path], stage: MidRecipe | FineTuningRecipe,
               sizes: Mapping[str, int]) -> tuple[Task, Task]:
    """Return the training conversations from number `start` on, of each kind, and those of the validation.

    stage: has the number of conversations of each kind. sizes: instead of these.
    """
    kinds = _kinds(data, seed)
    counts = {kind: count for kind, count in stage.mixture.items() if kind in (*kinds, "identity")}
    if unknown := sizes.keys() - counts.keys():
        raise TypeError(f"{data} has no conversations of the kind {', '.join(sorted(unknown))}")
    counts |= sizes
    train = [make("train", start + counts[kind]) for kind, make in kinds.items()]
    train = [task[start:] for task in train] if start else train
    each = stage.validation["each"]  # Mixture shuffles them, so that any beginning is a fair part
    return (Mixture([*train, *_identity(counts["identity"]), *map(CustomJSON, extra)]),
            Mixture([make("test", each) for make in kinds.values()]))


def _kinds(data: str, seed: int) -> dict[str, Callable[[str, int], Task]]:
    """Return the kinds of conversations by name; each is made of a split and the number of conversations."""
    world = {} if data == "basics" else {
        "questions": lambda split, size: WorldQuestions(split, seed, size),
        "choices": lambda split, size: WorldChoice(split, seed, size),
        "lookups": lambda split, size: WorldLookups(split, seed, size),
    }
    sums = PlainSums if data == "basics" else WorldSums
    return {
        **world,
        "sums": lambda split, size: sums(split, seed, size),
        "spelling": lambda split, size: SimpleSpelling(split, size, seed, "invented"),
        "bee": lambda split, size: SpellingBee(split, size, seed, **PLAIN),
    }


def _identity(times: int) -> list[Task]:
    """Return the identity conversations, repeated; nothing where the file is not there."""
    path = base_dir() / IDENTITY
    return [CustomJSON(path)] * times if path.exists() else []
