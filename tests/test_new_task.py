"""A task is one class: a toy task, added here, is trained on, graded and rewarded. docs/extending.md follows it."""

import pytest
import torch

from nanochat.chat_data import ConversationSource, SupervisedSteps
from nanochat.dataloader import PackedLoader
from nanochat.distributed import Ranks
from nanochat.engine import Engine
from nanochat.evaluation.chat import evaluate_task
from nanochat.rl import rollouts
from nanochat.tokenizer import RustBPETokenizer
from scripts import chat_eval
from tasks import recipes
from tasks.base import GENERATIVE, Mixture, Task
from tasks.small_world import WorldQuestions
from tests.helpers import small_model

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
WORDS = ["stone", "river", "lamp", "window", "garden", "letter", "bridge", "apple"]


class Backwards(Task):
    """Spell a word backwards. The last two words are for the test."""

    name, kind, chance = "Backwards", GENERATIVE, 0.0

    def __init__(self, split: str = "train"):
        self.words = WORDS[:-2] if split == "train" else WORDS[-2:]

    def __len__(self):
        return len(self.words)

    def conversation(self, i):
        return {"messages": [{"role": "user", "content": f"Spell backwards: {self.words[i]}"},
                             {"role": "assistant", "content": self.words[i][::-1]}]}

    def evaluate(self, conversation, answer):
        return answer.strip() == conversation["messages"][-1]["content"]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [message["content"] for chat in Backwards() for message in chat["messages"]]
    return RustBPETokenizer.train_from_iterator(texts * 3, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return small_model(1, vocab_size=tokenizer.get_vocab_size(), sequence_len=64)


def test_it_is_mid_trained_and_fine_tuned_on_beside_other_tasks(tokenizer, model):
    mixture = Mixture([Backwards(), Backwards(), WorldQuestions("train", size=3)])
    assert len(mixture) == 2 * 6 + 3
    source = ConversationSource(tokenizer, mixture, seed=0)
    with PackedLoader(source, 2, 32, ranks=ALONE, cut=False) as loader:
        packed = next(loader)
    assert packed[0].shape == (2, 32) and model(*packed[:2]).isfinite()
    with SupervisedSteps(tokenizer, Backwards(), examples_per_step=4, device_batch_size=2, max_tokens=48,
                         ranks=ALONE) as steps:
        micro_batches = list(steps(0))
    answered = [tokenizer.decode(row[row >= 0].tolist()) for _, targets in micro_batches for row in targets]
    assert {answer.removesuffix("<|assistant_end|>") for answer in answered} < {word[::-1] for word in WORDS}


def test_it_is_graded_and_rewarded(tokenizer, model, monkeypatch):
    result = evaluate_task(model, tokenizer, Backwards("test"), ALONE, max_tokens=8)
    assert (result.count, result.correct) == (2, 0)
    task = Backwards()
    monkeypatch.setattr(task, "evaluate", lambda conversation, answer: len(answer) % 2 == 0)
    group, = rollouts(Engine(model, tokenizer, graphs=False), task, [task[0]], [1], 6, max_tokens=8)
    assert {reward for reward in group.rewards} <= {0.0, 1.0} and len(group.rewards) == 6
    chat = Backwards("test")[0]
    assert Backwards().reward(chat, chat["messages"][-1]["content"]) == 1.0


def test_a_line_in_the_recipes_makes_chat_eval_ask_it(monkeypatch):
    graded = recipes.graded
    monkeypatch.setattr(recipes, "graded", lambda data, seed=0: {**graded(data, seed),
                                                                 "Backwards": lambda: Backwards("test")})
    assert list(chat_eval.select_tasks("Backwards", "small-world", 0)) == ["Backwards"]
