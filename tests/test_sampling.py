"""nanochat/sampling.py: the probabilities of sampled tokens, and rows that do not depend on each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.sampling import Sampler, Settings, penalize, sample


def plain_probabilities(logits, temperature, top_k, top_p):
    """The definition, one row at a time in float64."""
    rows = []
    for row in logits.double():
        order = row.argsort(descending=True, stable=True)
        kept, mass = [], 0.0
        p_k = torch.softmax(row[order[:top_k]] / temperature, 0)
        for token, p in zip(order[:top_k].tolist(), p_k.tolist()):
            if mass >= top_p and kept:
                break
            kept.append((token, p))
            mass += p
        p = torch.zeros(len(row), dtype=torch.float64)
        for token, value in kept:
            p[token] = value
        rows.append(p / p.sum())
    return torch.stack(rows)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([1, 3, 11]),
       st.sampled_from([0.2, 0.7, 1.0]))
def test_sampled_tokens_have_the_probabilities_they_should(seed, temperature, top_k, top_p):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, 11, generator=g)
    N = 20_000
    u = (torch.arange(N) + 0.5) / N  # a grid, so each token's share is its probability up to 1/N at each border
    full = torch.full((N,), 1.0)
    want = plain_probabilities(logits, temperature, top_k, top_p)
    for row, p in zip(logits, want):
        ids = sample(row.expand(N, -1), u, temperature * full, (top_k * full).long(), top_p * full, top_k)
        share = torch.bincount(ids, minlength=11).double() / N
        assert (share - p).abs().max() < 3 / N + 1e-5


@pytest.mark.parametrize("V", [255, 256, 257, 1000])
def test_of_a_large_vocabulary_the_token_is_the_one_where_the_sum_passes_u(V):
    g = torch.Generator().manual_seed(V)
    logits = 3 * torch.randn(V, generator=g)
    logits[torch.rand(V, generator=g) < 0.9] = -torch.inf  # most have no mass, whole blocks too
    logits[300:700] = -torch.inf
    N = 5000
    u = torch.cat([torch.rand(N - 2, generator=g), torch.tensor([0.0, 1 - 2 ** -24])])
    ids = sample(logits.expand(N, -1), u, torch.ones(N), torch.full((N,), V), torch.ones(N), 0, 0)
    sums = logits.double().softmax(0).cumsum(0)
    assert logits[ids].isfinite().all()
    assert ((sums[ids] > u - 1e-6) & (sums[ids] - logits.double().softmax(0)[ids] < u + 1e-6)).all()


def test_a_token_without_mass_is_never_sampled():
    logits = torch.tensor([[5.0, -torch.inf, 1.0, -torch.inf]])
    for u in (0.0, 0.5, 1 - 2 ** -24):
        one = torch.tensor([u])
        assert sample(logits, one, torch.ones(1), torch.tensor([4]), torch.ones(1), 4).item() in (0, 2)


@pytest.mark.parametrize("tiny", [{"temperature": 1e-50}, {"temperature": 1e-8}, {"top_p": 1e-60}])
def test_settings_that_are_zero_in_float32_take_the_most_likely_token(tiny):
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    for seed in range(5):
        sampler = Sampler([Settings(**tiny, seed=seed), Settings(seed=seed)], 50)
        assert sampler(logits.expand(2, -1))[0] == logits.argmax()


def test_samples_depend_neither_on_the_order_of_a_sort_nor_on_other_rows_settings():
    # ties, also at the borders of top-k and top-p
    logits = torch.randint(0, 4, (1, 400), generator=torch.Generator().manual_seed(2)).float()
    for seed, (k, p) in enumerate([(50, 0.9), (50, 1.0), (0, 0.3), (7, 0.5)] * 5):
        own = Settings(1.0, k, p, seed=seed)
        alone = Sampler([own], 400)(logits)[0]
        for other in (Settings(0.5, 300, 0.99, seed=9), Settings(2.0, seed=9), Settings(0.0)):
            assert Sampler([own, other], 400)(logits.expand(2, -1))[0] == alone


row_settings = st.tuples(st.sampled_from([0.0, 0.7, 1.5]), st.sampled_from([None, 0, 1, 4]),
                         st.sampled_from([None, 0.5, 1.0]), st.sampled_from([1.0, 1.3]))


@settings(max_examples=30, deadline=None)
@given(st.lists(row_settings, min_size=2, max_size=5), st.integers(0, 9))
def test_a_row_samples_what_it_would_alone(rows, seed):
    rows = [Settings(*row, seed=seed, sample=i) for i, row in enumerate(rows)]
    torch.manual_seed(seed)
    together = Sampler(rows, 13)
    alone = [Sampler([row], 13) for row in rows]
    for step in range(8):
        logits = 3 * torch.randn(len(rows), 13)
        got = together(logits).tolist()
        assert got == [int(one(logits[i:i + 1])) for i, one in enumerate(alone)]
        for i, token in enumerate(got):
            together.mark_seen(i, [token])
            alone[i].mark_seen(0, [token])
        if step == 3:  # the rows are reordered and one is added
            order = list(reversed(range(len(rows))))
            more = Settings(1.1, 5, 0.9, 1.2, seed=seed, sample=77)
            together.select(order)
            together.extend([more])
            alone = [alone[i] for i in order] + [Sampler([more], 13)]
            rows = [rows[i] for i in order] + [more]


def test_penalty_is_that_of_its_definition():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    seen = torch.tensor([[True, True, False]])
    assert penalize(logits, seen, torch.tensor([2.0])).tolist() == [[1.0, -4.0, 1.0]]


def test_without_a_seed_samples_differ():
    logits = torch.zeros(1, 10_000)
    sampled = {int(Sampler([Settings()], 10_000)(logits)) for _ in range(5)}
    assert len(sampled) > 1


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0},
                                   {"top_p": 1.1}, {"repetition_penalty": 0}, {"seed": -1}])
def test_impossible_settings_are_refused_in_words(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Settings(**wrong)
