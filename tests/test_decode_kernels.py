"""Operations of a single new token against their twins."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.kernels.one_query import one_query, one_query_twin
from nanochat.kernels.slc2_step import next_tap, next_tap_twin


@settings(max_examples=40, deadline=None)
@given(B=st.integers(1, 3), E=st.integers(1, 9), K=st.integers(1, 4), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
       state=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99))
def test_the_next_tap_is_its_twins_to_the_last_bit(B, E, K, dtype, state, seed):
    torch.manual_seed(seed)
    u, taps, room = torch.randn(B, 1, E).to(dtype), torch.randn(E, K).to(dtype), torch.randn(B + 1, K - 1, E).to(state)
    ours, theirs = room.clone(), room.clone()
    assert torch.equal(next_tap(u, taps, ours[:B]), next_tap_twin(u, taps, theirs[:B]))
    assert torch.equal(ours, theirs) and torch.equal(ours[B], room[B]), "another row's memory was written"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, H, G, D, S", [(1, 6, 6, 128, 100), (2, 6, 2, 16, 33), (1, 1, 1, 2, 1), (3, 4, 1, 32, 7)])
def test_one_query_attends_like_torch(B, H, G, D, S, dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(B, 1, H, D).to(dtype), torch.randn(B, S + 9, G, D).to(dtype), torch.randn(B, S + 9, G, D).to(dtype)
    k[:, S:], v[:, S:] = torch.nan, torch.nan  # room that is not in use
    k, v = k[:, :S], v[:, :S]
    wanted = one_query_twin(q.double(), k.double(), v.double())
    got = one_query(q, k, v)
    assert got.dtype == dtype and got.shape == (B, 1, H, D)
    assert (got - wanted).norm() < (0.02 if dtype == torch.bfloat16 else 1e-5) * wanted.norm()
    assert torch.equal(got[:1], one_query(q[:1], k[:1], v[:1])), "what a row gets depends on the others"
