import itertools

import pytest
import torch

from nanochat.distributed import Ranks
from nanochat.engine import Engine, Row
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.recipe import override, published
from nanochat.rl import AnswerGroup, batches, pass_at_k, rollouts
from nanochat.tokenizer import RustBPETokenizer
from nanochat.training import train_step
from tests.helpers import small_model
from tests.test_distributed import start_ranks

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(["a few words for a few tokens"] * 3, 270)


def some_groups(seed=0):
    dice = torch.Generator().manual_seed(seed)

    def row():
        size = int(torch.randint(1, 9, (1,), generator=dice))
        mask = torch.randint(0, 2, (size,), generator=dice).tolist()
        ids = torch.randint(97, (4 + size,), generator=dice).tolist()
        return Row(ids[:4], 9, tokens=ids[4:], mask=mask)

    return [AnswerGroup([row() for _ in range(4)], rewards)
            for rewards in ([1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0.5, 0], [0, 0, 0, 0])]


def plain_objective(model, groups):
    """−Σ advantage · log p / N, one answer at a time: N counts the sampled tokens of groups whose rewards differ."""
    total, count = 0.0, 0
    for group in groups:
        mean = sum(group.rewards) / len(group.rewards)
        if len(set(group.rewards)) == 1:
            continue
        for row, reward in zip(group.rows, group.rewards):
            ids = torch.tensor([[*row.prompt, *row.tokens]])
            logp = model(ids[:, :-1]).log_softmax(-1)
            for position, (token, sampled) in enumerate(zip(row.tokens, row.mask), len(row.prompt) - 1):
                if sampled:
                    total = total - (reward - mean) * logp[0, position, token]
                    count += 1
    return total / count


@pytest.mark.parametrize("device_batch", [1, 3, 99])
def test_the_gradient_is_that_of_the_definition_whatever_the_micro_batches(device_batch):
    groups = some_groups()
    model, twin = small_model(1), small_model(1)
    wanted = plain_objective(twin, groups)
    wanted.backward()
    optimizer = MuonAdamW(parameter_groups(model), ALONE)
    gradients = {}


    def step(*, grad_scale, **_):
        gradients.update({name: p.grad * grad_scale for name, p in model.named_parameters()})
        return torch.tensor(0.0)

    optimizer.step = step
    stats = train_step(model, optimizer, batches(groups, device_batch, 0, "cpu"), ALONE)
    assert stats[0].item() == pytest.approx(wanted.item(), abs=1e-5)
    for name, p in twin.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-5,
                                   msg=lambda m, name=name: f"{name}: {m}")


def test_forced_tokens_and_prompts_are_no_targets_and_the_closing_token_is():
    row = Row([5, 6], 9, tokens=[7, 8, 9, 3], mask=[1, 0, 0, 1])
    other = Row([5, 6], 9, tokens=[4], mask=[1])
    [(inputs, targets, factors)] = batches([AnswerGroup([row, other], [1.0, 0.0])], 8, 0, "cpu")
    rows = {tuple(targets[i].tolist()): factors[i, 0].item() for i in range(2)}
    assert rows == {(-1, 7, -1, -1, 3): 0.5, (-1, 4, -1, -1, -1): -0.5}
    assert inputs.shape == (2, 5)
    assert list(batches([AnswerGroup([row, row], [1.0, 1.0])], 8, 0, "cpu")) == []


def _one_step(ranks, out):
    torch.manual_seed(0)
    model, groups = small_model(1), some_groups()
    optimizer = MuonAdamW(parameter_groups(model), ranks)
    stats = train_step(model, optimizer, batches(groups[ranks.rank::ranks.world_size], 2, 0, "cpu"), ranks)
    if ranks.is_main:
        torch.save((stats, model.state_dict()), out)


def test_two_ranks_normalise_over_the_tokens_of_both(tmp_path):
    _one_step(ALONE, tmp_path / "1.pt")
    start_ranks(2, _one_step, tmp_path / "2.pt")
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    torch.testing.assert_close(two[0][:3], one[0][:3], rtol=1e-4, atol=1e-5)
    for name in one[1]:
        torch.testing.assert_close(two[1][name], one[1][name], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("batch_size", [3, 8, 64])
def test_an_answer_does_not_depend_on_what_is_decoded_beside_it(tokenizer, batch_size):
    model = small_model(2, vocab_size=tokenizer.get_vocab_size())
    engine, chats = Engine(model, tokenizer), [{"messages": [
        {"role": "user", "content": "few words " * i}, {"role": "assistant", "content": ""}]} for i in range(5)]
    beside = []
    engine.generate_many = lambda *args, **options: beside.append(options) or Engine.generate_many(
        engine, *args, **options)

    def drawn(numbers, batch_size):
        groups = rollouts(engine, Stops(), [chats[i] for i in numbers], [7 + i for i in numbers], 3, max_tokens=12,
                          batch_size=batch_size)
        return {i: [row.tokens for row in group.rows] for i, group in zip(numbers, groups)}

    together = drawn(range(5), 15)
    apart = {}
    for rank in range(3):
        apart |= drawn(range(5)[rank::3], batch_size)
    assert apart == together and len({str(tokens) for rows in together.values() for tokens in rows}) > 10
    assert all(options["batch_invariant"] for options in beside)  # they would rarely differ without it


def test_pass_at_k_is_the_share_of_all_choices_of_k_answers():
    for samples, correct, k in ((8, 3, 1), (8, 3, 2), (8, 3, 8), (5, 0, 3), (5, 5, 1), (4, 3, 2)):
        answers = [True] * correct + [False] * (samples - correct)
        choices = list(itertools.combinations(answers, k))
        assert pass_at_k(correct, samples, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_a_cut_answer_earns_nothing_and_the_same_text_ended_does(tokenizer):
    class Sums:
        def reward(self, conversation, answer):
            return float(answer == "#### 18")

    end = tokenizer.encode_special("<|assistant_end|>")
    ids = tokenizer.encode("#### 18")

    class Answers:
        stops = {end}

        def __init__(self):
            self.tokenizer = tokenizer

        def generate_many(self, prompts, num_samples, **options):
            return [[Row(prompt, len(ids), tokens=ids, mask=[1] * len(ids), ended="length"),
                     Row(prompt, 99, tokens=[*ids, end], mask=[1] * (len(ids) + 1), ended="stop")]
                    for prompt in prompts]

    chat = {"messages": [{"role": "user", "content": "9 + 9"}, {"role": "assistant", "content": "#### 18"}]}
    group, = rollouts(Answers(), Sums(), [chat], [1], 2)
    assert group.rewards == [0.0, 1.0] and group.teaches


class Stops:
    """Worth 1 for an answer that ends at once: only the closing token can earn it."""

    def reward(self, conversation, answer):
        return float(answer == "")


def test_stopping_is_learnt_when_it_is_rewarded(tokenizer):
    model = small_model(2, vocab_size=tokenizer.get_vocab_size())
    engine, task = Engine(model, tokenizer), Stops()
    groups = override(published.groups, matrix_lr=0.01, embedding_lr=0.02, unembedding_lr=0.01, weight_decay=0.0)
    optimizer = MuonAdamW(parameter_groups(model, groups), ALONE)
    chats = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]} for text in "aaa"]
    rewards = []
    for step in range(25):
        groups = rollouts(engine, task, chats, [step * 3 + i for i in range(3)], 32, max_tokens=3)
        rewards.append(sum(sum(group.rewards) for group in groups) / 96)
        train_step(model, optimizer, batches(groups, 64, 0, "cpu"), ALONE, clip=1.0)
    assert rewards[0] < 0.2 and sum(rewards[-5:]) / 5 > 0.8, rewards
