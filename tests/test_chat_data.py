import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.chat_data import (
    Conversations,
    ConversationSource,
    ConversationSteps,
    SupervisedSource,
    SupervisedSteps,
    batch_of,
    count_tokens,
)
from nanochat.dataloader import PackedLoader
from nanochat.distributed import Ranks
from nanochat.errors import UserError
from nanochat.tokenizer import RustBPETokenizer
from tests.helpers import small_model

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer():
    text = "some words to make a few tokens of: one two three four five six"
    return RustBPETokenizer.train_from_iterator([text] * 3, 290)


class Chats(list):
    name = "Chats"


def chats(sizes, seed=0):
    """One question and answer a size; the words tell which."""
    words = "one two three four five six".split()
    rng = np.random.default_rng(seed)

    def text(n):
        return " ".join(words[int(k)] for k in rng.integers(0, 6, n))

    return Chats({"messages": [{"role": "user", "content": f"{i} {text(asked)}"},
                               {"role": "assistant", "content": f"{text(told)} {i}"}]}
                 for i, (asked, told) in enumerate(sizes))


def conversations_in(inputs, targets, bos):
    """The documents of packed rows, as lists of ids without bos."""
    found = []
    for row, wanted in zip(inputs.tolist(), targets.tolist()):
        tokens = [*row, wanted[-1]]
        real = [row[0], *wanted]  # what is −1 is padding
        assert all(a == b for a, b in zip(tokens, real) if b != -1 and a != bos)
        part = []
        for token in real:
            if token in (bos, -1):
                if part:
                    found.append(part)
                part = []
            else:
                part.append(token)
        if part:
            found.append(part)
    return found


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=30), st.integers(1, 3),
       st.integers(0, 5))
def test_packed_rows_hold_every_conversation_whole_once_an_epoch(tokenizer, sizes, B, seed):
    task, bos = chats(sizes, seed), tokenizer.get_bos_token_id()
    loader = PackedLoader(ConversationSource(tokenizer, task, seed), B, 60, ranks=ALONE, cut=False, loop=False)
    with loader:
        found = [part for inputs, targets in loader for part in conversations_in(inputs, targets, bos)]
    wanted = [tokenizer.render_conversation(chat)[0][1:] for chat in task]
    assert sorted(found) == sorted(wanted)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), min_size=1, max_size=30), st.integers(0, 5))
def test_supervised_rows_hold_every_conversation_once_and_the_assistants_tokens_as_targets(tokenizer, sizes, seed):
    T, task, bos = 60, chats([*sizes, (1, 1)], seed), tokenizer.get_bos_token_id()
    source = SupervisedSource(tokenizer, task, seed, max_tokens=T)
    with PackedLoader(source, 2, T, ranks=ALONE, cut=False, loop=False) as loader:
        rows = [(i.tolist(), t.tolist()) for inputs, targets in loader for i, t in zip(inputs, targets)]
    found = []
    for inputs, targets in rows:
        starts = [at for at, token in enumerate(inputs) if token == bos]
        for start, end in zip(starts, [*starts[1:], T]):
            if any(token != -1 for token in targets[start:end]):  # else it is padding
                found.append((inputs[start:end], targets[start:end]))
    wanted = []
    for chat in task:
        ids, mask = tokenizer.render_conversation(chat, max_tokens=T + 1)
        if any(mask):
            wanted.append((ids, [token if learnt else -1 for token, learnt in zip(ids[1:], mask[1:])]))
    assert source.left_out == len(task) - len(wanted) == len(task) - len(found)
    for (ids, targets), (whole, learnt) in zip(sorted(found), sorted(wanted), strict=True):
        at_end = len(ids) == len(whole) - 1  # of a row: its last token is a target alone
        assert ids == whole[:len(ids)] and targets == (learnt if at_end else [*learnt, -1])


def test_packed_rows_of_one_conversation_have_the_loss_of_padded_ones(tokenizer):
    task = chats([(i % 9, 12 + i % 5) for i in range(12)])
    sizes = [len(tokenizer.render_conversation(chat)[0]) for chat in task]
    T = max(sizes)
    assert T < 2 * min(sizes)  # no two share a row
    model = small_model(sequence_len=T, vocab_size=tokenizer.get_vocab_size()).double()
    model.compute_dtype = torch.float64
    packed = PackedLoader(SupervisedSource(tokenizer, task, max_tokens=T), 3, T, ranks=ALONE, cut=False, loop=False)
    padded = SupervisedSteps(tokenizer, task, examples_per_step=12, device_batch_size=5, max_tokens=T, ranks=ALONE)
    with packed, padded, torch.no_grad():
        (one, count), (other, same) = ([sum(x) for x in zip(*(
            (model(inputs, targets, "none").double().sum().item(), (targets != -1).sum().item())
            for inputs, targets in batches))] for batches in (packed, padded(0)))
    assert count == same > 100 and one / count == pytest.approx(other / same, rel=1e-6)


def test_conversations_without_anything_to_learn_end_packing(tokenizer):
    source = SupervisedSource(tokenizer, chats([(60, 2)] * 5), max_tokens=40)
    with PackedLoader(source, 1, 40, ranks=ALONE, cut=False) as loader:
        with pytest.raises(UserError, match="nothing to learn.*--max-seq-len"):
            next(loader)


def test_padding_is_never_a_target_and_a_long_conversation_goes_on_in_the_next_row(tokenizer):
    task, bos = chats([(2, 3), (40, 60), (1, 1)]), tokenizer.get_bos_token_id()
    with PackedLoader(ConversationSource(tokenizer, task), 1, 50, ranks=ALONE, cut=False, loop=False) as loader:
        rows = list(loader)
    assert any((targets == -1).any() for _, targets in rows)
    assert all(((inputs != bos) | (inputs == bos)).all() and (inputs >= 0).all() for inputs, _ in rows)
    found = [part for inputs, targets in rows for part in conversations_in(inputs, targets, bos)]
    long = tokenizer.render_conversation(task[1], max_tokens=10_000)[0][1:]
    pieces = [part for part in found if len(part) > 20 or part[0] not in (long[0],)]
    wanted = sum(len(tokenizer.render_conversation(chat, max_tokens=10_000)[0]) - 1 for chat in task)
    assert sum(map(len, found)) == wanted
    assert pieces and any(long[:len(part)] == part for part in pieces)


@pytest.mark.parametrize("supervised", [False, True])
def test_packed_rows_go_on_bit_for_bit_and_two_ranks_share_the_same_rows(tokenizer, supervised):
    task = chats([(i % 5, i % 7) for i in range(100)])

    def loader(ranks=ALONE, state=None):
        source = (SupervisedSource(tokenizer, task, 1, max_tokens=40) if supervised
                  else ConversationSource(tokenizer, task, 1))
        return PackedLoader(source, 2, 40, ranks=ranks, rows_per_step=8, cut=False, state=state)

    with loader() as whole:
        batches = [next(whole) for _ in range(28)]  # beyond one epoch
    with loader() as first:
        for _ in range(12):
            next(first)
        state = first.state_dict()
    assert state["rows"] == 24
    for world in (1, 2, 3):
        parts = [[] for _ in range(16)]
        for rank in range(world):
            with loader(Ranks(rank, 0, world, torch.device("cpu")), state) as other:
                for number in range(16):
                    if number % 4 % world == rank:
                        parts[number] = next(other)
        for got, wanted in zip(parts, batches[12:], strict=True):
            assert torch.equal(got.inputs, wanted.inputs) and torch.equal(got.targets, wanted.targets)


def test_epochs_have_orders_of_their_own():
    task = Chats(range(50))
    stream = Conversations(task, 3)
    epochs = [[stream[n] for n in range(e * 50, e * 50 + 50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != [Conversations(task, 4)[n] for n in range(50)]
    assert [stream[n] for n in range(50)] == epochs[0]


def test_supervised_targets_are_the_assistants_tokens_alone(tokenizer):
    chat = chats([(3, 4)])[0]
    ids, mask = tokenizer.render_conversation(chat)
    inputs, targets = batch_of([(ids, mask), (ids[:9], [0] * 8 + [1])], 7, "cpu", 2)
    assert inputs[0].tolist() == ids[:-1] and inputs[1, 8:].eq(7).all()
    for position, (token, learnt) in enumerate(zip(ids[1:], mask[1:])):
        assert targets[0, position] == (token if learnt else -1)
    assert targets[1].tolist() == [-1] * 7 + [ids[8]] + [-1] * (len(ids) - 9)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(3, 7), st.integers(1, 4))
def test_a_step_is_the_same_conversations_on_any_number_of_ranks(tokenizer, world, examples, device_batch):
    task = chats([(i % 5, i % 6) for i in range(23)])

    def rows(ranks, step):
        steps = SupervisedSteps(tokenizer, task, examples_per_step=examples, device_batch_size=device_batch,
                                max_tokens=64, ranks=ranks)
        try:
            return sorted(tuple(row[row != -1].tolist()) for _, targets in steps(step) for row in targets)
        finally:
            steps.close()

    for step in (0, 5):
        together = [row for rank in range(world) for row in rows(Ranks(rank, 0, world, torch.device("cpu")), step)]
        assert sorted(together) == rows(ALONE, step) and len(together) == examples


def test_conversations_without_an_answer_before_the_cut_give_their_place_away(tokenizer):
    task = chats([(60, 2) if i % 3 else (1, 2) for i in range(12)])  # two of three ask for longer than the row
    steps = SupervisedSteps(tokenizer, task, examples_per_step=6, device_batch_size=2, max_tokens=40, ranks=ALONE)
    for step in range(4):
        for inputs, targets in steps(step):
            assert inputs.shape[1] <= 40 and (targets != -1).any(dim=1).all()
    steps.close()
    assert steps.replaced > 0
    hopeless = SupervisedSteps(tokenizer, chats([(60, 2)] * 5), examples_per_step=2, device_batch_size=2,
                               max_tokens=40, ranks=ALONE)
    with pytest.raises(UserError, match="nothing to learn.*--max-seq-len"):
        list(hopeless(0))
    hopeless.close()
    with pytest.raises(UserError, match="leaves nothing to some of the 3 ranks.*--target"):
        SupervisedSteps(tokenizer, task, examples_per_step=2, device_batch_size=2, max_tokens=40,
                        ranks=Ranks(0, 0, 3, torch.device("cpu")))
    with pytest.raises(UserError, match="no conversation to train on"):
        Conversations(Chats())


def test_tokens_are_counted_exactly_or_estimated_closely(tokenizer):
    task = chats([(i % 9, i % 4) for i in range(3000)])
    exact = sum(len(tokenizer.render_conversation(chat)[0]) for chat in task)
    assert count_tokens(task, tokenizer) == exact
    assert abs(count_tokens(task, tokenizer, most=2000) / exact - 1) < 0.03
    cut = sum(min(9, len(tokenizer.render_conversation(chat)[0])) for chat in task)
    assert count_tokens(task, tokenizer, max_tokens=9) == cut < exact


@pytest.mark.parametrize("kind", ["steps", "supervised"])
def test_other_steps_after_a_resume_leave_out_and_repeat_no_conversation(tokenizer, kind):
    task = chats([(2, 3)] * 50)

    def of(step, state, per_step, world=1, seed=1, task=task):
        """Numbers of the conversations of three steps from `step` on, of all ranks, and the state behind them."""
        if kind == "steps":
            made = ConversationSteps(task, seed, per_step, step, state)
            return [number for i in range(3) for number in made.take(step + i)], made.state_dict()
        found = []
        for rank in range(world):
            with SupervisedSteps(tokenizer, task, examples_per_step=per_step, device_batch_size=2, max_tokens=64,
                                 ranks=Ranks(rank, 0, world, torch.device("cpu")), seed=seed, step=step, state=state
                                 ) as steps:
                steps._usable = lambda number: found.append(number) or ([1, 2, 3], [0, 1, 1])
                for i in range(3):
                    list(steps(step + i))
                state_now = steps.state_dict()
        return sorted(set(found))[:3 * per_step], state_now

    first, state = of(0, None, 6)
    assert first == list(range(18)) and state["next"] == 18
    more, state = of(3, state, 4, world=2)  # smaller steps
    assert more == list(range(18, 30)) and state["next"] == 30
    assert of(6, state, 7, world=3)[0] == list(range(30, 51))
    assert of(6, None, 5)[0] == list(range(30, 45))  # a checkpoint from before: all steps were of this size
    for other in ({"seed": 2}, {"task": chats([(2, 3)] * 49)}):
        with pytest.raises(UserError, match="the conversations are not those.*--seed.*--fresh"):
            of(6, state, 4, **other)
    with pytest.raises(UserError, match="no position"):
        of(6, {"next": 3}, 4)
