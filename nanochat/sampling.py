"""From logits to the next token: repetition penalty, temperature, top-k, top-p, a draw that a seed reproduces."""

import torch
from torch import Tensor

from nanochat.files import UserError


def filtered(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Return logits (B, V) divided by temperature, with −inf outside the top_k likeliest and outside the smallest set of mass top_p.

    The likeliest token always stays. Of tokens that tie at the edge of top_k, all stay.
    """
    logits = logits / temperature
    if top_k is not None and 0 < top_k < logits.shape[-1]:
        edge = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < edge, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(dim=-1)
        drop = mass.cumsum(dim=-1) - mass >= top_p  # what lies before a token already holds the mass
        drop[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)
    return logits


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits (B, V) with those of tokens in seen (B, T) divided by penalty where positive, multiplied where negative."""
    taken = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(taken > 0, taken / penalty, taken * penalty))


class Sampler:
    """Draws next tokens. One seed gives one sequence of draws on one device; no seed, a fresh one.

    temperature 0 takes the likeliest; top_k None or 0, and top_p None or 1, leave all tokens in; repetition_penalty 1 changes nothing.
    """

    def __init__(self, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, repetition_penalty: float = 1.0, *,
                 seed: int | None = None, device: torch.device | str = "cpu"):
        if temperature < 0:
            raise UserError(f"temperature must be 0 or more, not {temperature}")
        if top_k is not None and top_k < 0:
            raise UserError(f"top_k must be 0 (all) or more, not {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {top_p}")
        if repetition_penalty <= 0:
            raise UserError(f"repetition_penalty must be above 0, not {repetition_penalty}")
        self.temperature, self.top_k, self.top_p, self.repetition_penalty = temperature, top_k, top_p, repetition_penalty
        self.generator = torch.Generator(device=device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return next ids (B,) for logits (B, V). seen (B, T): the tokens so far, needed by the repetition penalty."""
        if self.repetition_penalty != 1 and seen is not None:
            logits = penalised(logits, seen, self.repetition_penalty)
        if self.temperature == 0 or self.top_k == 1:
            return logits.argmax(dim=-1)
        probabilities = filtered(logits, self.temperature, self.top_k, self.top_p).softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(1)
