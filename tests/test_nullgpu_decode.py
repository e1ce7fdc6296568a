"""Decoding on the null GPU: graphs, waits, and an engine on a card that is not the current one."""


import pytest

from tests.nullgpu.programs import decoding

TOKENS = "cudaEventSynchronize"  # what a step waits for: the copy of its inputs, twice, and that of its tokens


@pytest.mark.long
def test_decode_steps_of_d20_s_width_are_graphs_and_wait_for_their_tokens_alone(nullgpu):
    """One row and many, greedy and sampled, on cuda:1 while cuda:0 is current: nothing may run on cuda:0."""
    seen = nullgpu.run(decoding, count=2, depth=20, n_layer=3, rows=[1, 64], steps=5, device="cuda:1")
    assert seen["refused"] == [] and seen["captured"]
    assert len(seen["captures"]) == 6 and all(ok and nodes for ok, nodes in seen["captures"])
    assert seen["syncs"] == [[TOKENS] * 3] * 4
    assert [len(graphs) for graphs in seen["replays"]] == [2] * 4 and seen["launches"] == [0] * 4
    assert seen["devices"] == [1]


def test_a_model_as_it_is_trained_decodes_on_another_card_too(nullgpu):
    """float32 weights with bfloat16 products: other kernels; and the shape of a small model."""
    seen = nullgpu.run(decoding, count=2, depth=2, rows=[1, 3], steps=4, device="cuda:1", ready=False, vocab_size=515,
                       sequence_len=128)
    assert seen["refused"] == [] and seen["captured"] and seen["devices"] == [1]
