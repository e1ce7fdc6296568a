"""Bits per byte and likelihoods of choices, against their definitions written out."""

import math

import pytest
import torch

from nanochat.distributed import Ranks
from nanochat.errors import UserError
from nanochat.evaluation.loss import evaluate_bpb, log_likelihoods
from tests.helpers import small_model


class DigraphTokenizer:
    """One token a letter, but "th" is one; 0 is bos."""

    def get_bos_token_id(self):
        return 0

    def encode(self, text, prepend=None):
        if isinstance(text, list):
            return [self.encode(part, prepend) for part in text]
        return [prepend] + [1 if letter == "\1" else ord(letter) - 30 for letter in text.replace("th", "\1")]


def test_bits_per_byte_is_nats_over_bytes_of_the_targets_that_count():
    model = small_model()
    token_bytes = torch.randint(1, 5, (97,))
    token_bytes[90:] = 0  # specials
    batches = [(torch.randint(97, (2, 9)), torch.randint(-1, 97, (2, 9))) for _ in range(3)]
    nats, size = 0.0, 0
    with torch.no_grad():
        for inputs, targets in batches:
            logp = model(inputs).double().log_softmax(-1)
            for row in range(2):
                for t in range(9):
                    target = int(targets[row, t])
                    if target >= 0 and token_bytes[target] > 0:
                        nats -= float(logp[row, t, target])
                        size += int(token_bytes[target])
    alone = Ranks(0, 0, 1, torch.device("cpu"))
    assert evaluate_bpb(model, batches, token_bytes, alone) == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    with pytest.raises(UserError, match="no text to evaluate"):
        evaluate_bpb(model, [(batches[0][0], torch.full((2, 9), 95))], token_bytes)


@pytest.mark.parametrize("logits_per_batch", [1, 3000, 1 << 24])
def test_likelihoods_are_those_of_one_choice_at_a_time(logits_per_batch):
    model, letters = small_model(), DigraphTokenizer()
    prompts = ["a cat", "t", "the end of it"]
    # "t" + "h" is one token: the choice reaches back
    choices = [["s", "nip", "ch", "sup"], ["h", "o", "hus"], [" all", " al", "!"]]
    got = log_likelihoods(model, letters, prompts, choices, logits_per_batch)
    for prompt, options, row in zip(prompts, choices, got):
        head = letters.encode(prompt, 0)
        for option, value in zip(options, row):
            ids = letters.encode(prompt + option, 0)
            start = next((i for i, (a, b) in enumerate(zip(head, ids)) if a != b), len(head))
            with torch.no_grad():
                logp = model(torch.tensor([ids])).log_softmax(-1)[0]
            assert value == pytest.approx(sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids))), abs=1e-3)
