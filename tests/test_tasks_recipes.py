"""Recipes: each stage gets what the publication says, or the small world's share; identity and your own files are in;
errors are clear."""

import json
import re
from collections import Counter
from itertools import islice

import pytest

from nanochat.errors import UserError
from nanochat.files import base_dir
from nanochat.recipe import modern, published
from nanochat.small_world import World, documents
from nanochat.tokenizer import RustBPETokenizer
from tasks import recipes
from tasks.base import Task
from tests.test_tasks_hub import ARC_ROW, GSM8K_ROW, HUMANEVAL_ROW, MMLU_ROW, mirror  # noqa: F401 (a fixture)

OWN = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Me."}]


def first_words(task: Task) -> Counter:
    return Counter(conversation["messages"][0]["content"] for conversation in task)


def own_file(path, count: int = 1):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((json.dumps(OWN) + "\n") * count)
    return path


def test_small_world_needs_nothing_and_all_of_it_renders_in_short_rows():
    tokenizer = RustBPETokenizer.train_from_iterator(islice(documents(0), 2000), 1024)
    (train, val), (fine, fine_val) = recipes.mid("small-world"), recipes.sft("small-world")
    assert len(train) == 13_500 and len(fine) == 5_100 and len(val) == len(fine_val) == 480
    for task in (train[:300], val, fine[:300]):
        for conversation in task:
            ids, mask = tokenizer.render_conversation(conversation)
            assert sum(mask) and len(ids) < 200


def test_basics_know_no_fact_of_the_small_world_and_have_its_letters_and_sums():
    train, val = recipes.mid("basics", seed=3)
    said = " ".join(str(message["content"]) for task in (train[:600], val) for c in task for message in c["messages"])
    assert not {entity.name.split()[-1] for entity in World(3).entities()} & set(re.findall(r"\w+", said))
    assert all(kind in said for kind in ("Spell the word: ", "How many '", "What is the sum of"))
    assert len(recipes.sft("basics", sums=5, spelling=0, bee=0)[0]) == 5
    assert list(recipes.graded("basics")) == ["Sums", "SpellingBee"]
    assert recipes.rl("basics", "train").name == "Sums"


def test_sft_sees_other_conversations_than_mid():
    sizes = {"choices": 0, "lookups": 0, "spelling": 0, "bee": 0}
    mid, _ = recipes.mid("small-world", questions=1000, sums=1000, **sizes)
    sft, _ = recipes.sft("small-world", questions=1000, sums=1000, **sizes)
    assert len(mid) == len(sft) == 2000
    many_turns = [{json.dumps(c["messages"]) for c in task if len(c["messages"]) > 4} for task in (mid, sft)]
    assert len(many_turns[0]) > 200 and not many_turns[0] & many_turns[1]


def test_sizes_seed_identity_and_own_files_count(tmp_path):
    none = dict.fromkeys(("questions", "choices", "lookups", "sums", "spelling", "bee"), 0)
    own = own_file(tmp_path / "own.jsonl", 3)
    assert len(recipes.mid("small-world", **none)[0]) == 0
    assert first_words(recipes.sft("small-world", extra=[own, own], **none)[0]) == {"Who are you?": 6}
    own_file(base_dir() / "identity_conversations.jsonl", 5)
    assert first_words(recipes.mid("small-world", extra=[own], **none)[0]) == {"Who are you?": 8}
    one, other = (recipes.mid("small-world", seed=seed, **{**none, "questions": 50})[0] for seed in (0, 1))
    assert first_words(one) != first_words(other)


def test_graded_tasks_are_those_of_the_report():
    small = recipes.graded("small-world")
    assert list(small) == ["World-Questions", "World-Choice", "World-Sums", "SpellingBee"]
    assert list(recipes.graded("hub")) == ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee"]
    for name, make in small.items():
        task = make()
        assert task.name == name and len(task) > 200 and task.kind in ("categorical", "generative")
    assert recipes.graded("small-world", seed=4)["World-Sums"]()[0] != small["World-Sums"]()[0]
    assert recipes.rl("small-world", "train").name == "World-Sums"


def test_hub_is_the_published_mixture(mirror, tmp_path):  # noqa: F811
    talk = {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]}
    mirror("HuggingFaceTB/smol-smoltalk/default/train.jsonl", [talk] * 40)
    mirror("HuggingFaceTB/smol-smoltalk/default/test.jsonl", [talk] * 4)
    mirror("cais/mmlu/auxiliary_train/train.jsonl", [{"train": MMLU_ROW}] * 10)
    mirror("cais/mmlu/all/test.jsonl", [MMLU_ROW] * 5300)
    mirror("openai/gsm8k/main/train.jsonl", [GSM8K_ROW] * 8)
    mirror("openai/gsm8k/main/test.jsonl", [GSM8K_ROW] * 500)
    mirror("openai/openai_humaneval/openai_humaneval/test.jsonl", [HUMANEVAL_ROW] * 3)
    for subset in ("ARC-Easy", "ARC-Challenge"):
        for split in ("train", "test"):
            mirror(f"allenai/ai2_arc/{subset}/{split}.jsonl", [ARC_ROW] * 2)
    with pytest.raises(UserError, match="there is no list of words at .*words_alpha.txt"):
        recipes.mid("hub")
    words = [f"w{a}{b}{c}" for a in "abcdef" for b in "abcdef" for c in "abcdef"]
    (base_dir() / "words_alpha.txt").write_text("\n".join(words))
    own_file(base_dir() / "identity_conversations.jsonl", 5)

    def kinds(task):
        found = Counter()
        for conversation in task:
            asked, answer = conversation["messages"][0]["content"], json.dumps(conversation["messages"][1]["content"])
            found["bee" if ".count(" in answer else "spelling" if asked.startswith("Spell the word") else
                  "choice" if asked.startswith("Multiple") else asked] += 1
        return dict(found)
    train, val = recipes.mid("hub", spelling=20, bee=9)
    assert kinds(train) == {"Hello.": 40, "choice": 10, "How many?": 8, "Who are you?": 10, "spelling": 20, "bee": 9}
    assert kinds(val) == {"Hello.": 4, "choice": 5200, "How many?": 420}
    train, val = recipes.sft("hub", extra=[own_file(tmp_path / "own.jsonl")])
    assert kinds(train) == {"Hello.": 40, "choice": 4, "How many?": 8, "Who are you?": 6, "spelling": 300, "bee": 300}
    assert kinds(recipes.sft("hub", smoltalk=7)[0])["Hello."] == 7
    assert len(recipes.mid("hub")[0]) == 40 + 10 + 8 + 10 + 280_000
    train, val = recipes.sft("hub", recipe=modern, spelling=20, bee=9)  # from base: all that mid-training teaches
    assert kinds(train) == {"Hello.": 40, "choice": 30, "How many?": 32, "Who are you?": 10, "spelling": 20, "bee": 9}
    assert kinds(val) == {"Hello.": 4, "choice": 5200, "How many?": 420}
    both = [set(recipes.hub_splits(["sft"], recipe)) for recipe in (published, modern)]
    assert both[1] - both[0] == {("cais/mmlu", "auxiliary_train", "train")}
    assert both[0] - both[1] == {(recipes.ARC_NAME, f"ARC-{which}", "train") for which in ("Easy", "Challenge")}
    assert all(make().name == name for name, make in recipes.graded("hub").items())
    assert recipes.rl("hub", "test").name == "GSM8K"


def test_data_and_files_that_do_not_exist_are_refused(tmp_path):
    for call in (recipes.mid, recipes.sft, recipes.graded, lambda data: recipes.rl(data, "train")):
        with pytest.raises(UserError, match="no data 'web'; there is hub, small-world, basics"):
            call("web")
    with pytest.raises(UserError, match="there is no file .*own.jsonl"):
        recipes.mid("small-world", extra=[tmp_path / "own.jsonl"])
    with pytest.raises(UserError, match="no split"):
        recipes.rl("small-world", "validation")
