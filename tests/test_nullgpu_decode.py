"""Decoding on the null GPU: graphs, waits, and an engine on a card that is not the current one."""

import pytest

from tests.helpers import PARTS
from tests.nullgpu.programs import decoding

TOKENS = "cudaEventSynchronize"  # what a step waits for: the copy of its inputs, twice, and that of its tokens


def decodings() -> list[dict]:
    """Decode with d20's width, then with small models: as it is trained, float32 weights with bfloat16 products; and
    with the optional parts."""
    small = {"device": "cuda:1", "vocab_size": 515, "sequence_len": 128}
    return [decoding(20, [1, 64], 5, device="cuda:1", n_layer=3), decoding(2, [1, 3], 4, ready=False, **small),
            *(decoding(2, [1, 3], 4, **small, **parts) for parts in PARTS.values())]


@pytest.mark.long
def test_decode_steps_are_graphs_on_their_card_and_wait_for_their_tokens_alone(nullgpu):
    """One row and many, greedy and sampled, on cuda:1 while cuda:0 is current: nothing may run on cuda:0."""
    wide, *small = nullgpu.run(decodings, count=2)
    for seen in (wide, *small):
        assert seen["refused"] == [] and seen["captured"] and seen["devices"] == [1]
    assert len(wide["captures"]) == 6 and all(ok and nodes for ok, nodes in wide["captures"])
    assert wide["syncs"] == [[TOKENS] * 3] * 4
    assert [len(graphs) for graphs in wide["replays"]] == [2] * 4 and wide["launches"] == [0] * 4
