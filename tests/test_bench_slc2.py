"""bench.slc2: ablations against a model that is changed by hand, and the plots of what it finds."""

import torch

from bench import slc2
from nanochat.distributed import Ranks
from nanochat.evaluation.loss import evaluate_bpb
from nanochat.kernels.slc2 import gated_input
from tests.helpers import small_model

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def test_layers_are_measured_as_if_changed_by_hand_and_stay_as_they_are(tmp_path):
    model = small_model(n_layer=3, layer_pattern="SAS")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    V = model.config.vocab_size
    ids = torch.randint(V, (2, 9))
    rows, token_bytes = [(ids[:, :-1], ids[:, 1:])], torch.full((V,), 3)
    whole, found = slc2.layers(model, rows, token_bytes, ALONE)
    assert whole == evaluate_bpb(model, rows, token_bytes, ALONE)
    assert [record["letter"] for record in found] == list("SAS")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    mixer = model.transformer.h[2].attn
    assert found[2]["taps"] == mixer.conv1d.weight.detach().abs().mean((0, 1)).tolist()
    with torch.no_grad():
        mixer.conv1d.weight[..., :-1] = 0
        assert found[2]["present"] == evaluate_bpb(model, rows, token_bytes, ALONE) - whole != 0
        model.transformer.h[1].attn.c_proj.weight.zero_()
        mixer.conv1d.weight.copy_(before["transformer.h.2.attn.conv1d.weight"])
        assert found[1]["without"] == evaluate_bpb(model, rows, token_bytes, ALONE) - whole != 0
        model.load_state_dict(before)
        first = model.transformer.h[0].attn
        h = []
        first.register_forward_pre_hook(lambda module, given: h.append(given[0]))
        model(ids)
        gate = gated_input(torch.ones_like(h[0]), first.A_proj(h[0]), first.alpha_proj(h[0]))
        stats = slc2.gate_statistics(model, ids)
        assert stats.keys() == {0, 2} and stats[0]["gate_rms"] == float(gate.square().mean().sqrt())
        assert 0 < stats[0]["gate_closed"] < 1

    costs = slc2.by_context(model, [8, 16], new_tokens=2)
    states = {(record["context"], record["model"]): record["state"] for record in costs}
    assert states[16, "attention"] == 2 * states[8, "attention"] > states[16, "hybrid"]
    slc2.save_plots(tmp_path, found, costs)
    assert all(b"</svg>" in (tmp_path / f"slc2_{name}.svg").read_bytes() for name in ("layers", "context"))
