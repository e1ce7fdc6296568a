"""Many samples at once through one model, each with its own memory of the past.

    engine = Engine(model, tokenizer)
    for tokens, masks in engine.generate(prompt, num_samples=4, max_tokens=64, temperature=0.8):
        ...                                                   # one token a row; rows that ended repeat their closing token
    rows, masks = engine.generate_batch(prompt, num_samples=4)    # whole rows with the prompt, without the closing token
"""

from collections.abc import Iterator

import torch

from nanochat.files import UserError
from nanochat.sampling import Sampler


class Engine:
    """Decodes with a model and its tokenizer. A row ends at <|assistant_end|> or <|bos|>, or after max_tokens."""

    def __init__(self, model, tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.stops = {tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()}

    @torch.inference_mode()
    def generate(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None, temperature: float = 1.0,
                 top_k: int | None = None, seed: int | None = 42, top_p: float | None = None,
                 repetition_penalty: float = 1.0) -> Iterator[tuple[list[int], list[int]]]:
        """Yield, step by step, (one token per row, one mask per row: 1 sampled, 0 forced).

        tokens: the prompt's ids, the same for all rows; each row draws on its own from the first token on. max_tokens: new tokens a row at
        most; None means up to the model's sequence_len. seed None draws anew each time. A row that has ended repeats its closing token.
        """
        if not tokens:
            raise UserError("the prompt is empty: it must hold at least one token, <|bos|> say")
        if num_samples < 1:
            raise UserError(f"num_samples must be at least 1, not {num_samples}")
        if max_tokens is None:
            max_tokens = max(self.model.config.sequence_len - len(tokens), 0)
        if max_tokens < 1:
            return
        device = self.model.device
        sampler = Sampler(temperature, top_k, top_p, repetition_penalty, seed=seed, device=device)
        state = self.model.new_state(capacity=len(tokens) + max_tokens)
        prompt = torch.tensor([tokens], device=device)
        logits = self.model(prompt, state=state, last_only=True)[:, -1].expand(num_samples, -1)
        if num_samples > 1:
            state = state.fork(num_samples)
        seen = prompt.expand(num_samples, -1) if repetition_penalty != 1 else None
        live = list(range(num_samples))  # which row of the caller each row of the state is
        current = [0] * num_samples
        for step in range(max_tokens):
            drawn = sampler(logits, seen)
            for row, token in zip(live, drawn.tolist()):
                current[row] = token
            yield list(current), [1] * num_samples
            going = [i for i, row in enumerate(live) if current[row] not in self.stops]
            if not going or step == max_tokens - 1:
                return
            if len(going) < len(live):
                live = [live[i] for i in going]
                state, drawn = state.select(going), drawn[going]
                seen = None if seen is None else seen[going]
            if seen is not None:
                seen = torch.cat([seen, drawn.unsqueeze(1)], dim=1)
            logits = self.model(drawn.unsqueeze(1), state=state)[:, -1]

    def generate_batch(self, tokens: list[int], num_samples: int = 1, **options) -> tuple[list[list[int]], list[list[int]]]:
        """Return (rows, masks): for each sample the prompt and what was generated, without the closing token; mask 0 over the prompt.

        options as for `generate`.
        """
        rows = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        ended = [False] * num_samples
        for column, mask in self.generate(tokens, num_samples, **options):
            for i, (token, sampled) in enumerate(zip(column, mask)):
                ended[i] = ended[i] or token in self.stops
                if not ended[i]:
                    rows[i].append(token)
                    masks[i].append(sampled)
        return rows, masks
