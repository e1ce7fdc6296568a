"""What a request for an answer may say, and what holds where it says nothing: sampling settings, defaults, limits.

Everything that takes requests reads this file: Engine and LLM, scripts/chat_cli.py, scripts/complete.py and the server.
It does not import PyTorch, because the server's HTTP process does without it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nanochat.errors import UserError


@dataclass(frozen=True)
class Settings:
    """How one row samples its tokens.

    Args:
        temperature: 0 takes the most likely token; higher is more varied.
        top_k: sample from this many of the most likely tokens; None or 0 is all.
        top_p: sample from the most likely tokens that together have this probability; None or 1 is all.
        repetition_penalty: above 1 makes tokens that are in the row already less likely; 1 changes nothing.
        seed: of the row's random numbers; None takes a new one each time.
        sample: the number of this row among those that share a prompt and a seed; each has random numbers of its own.

    Raises:
        UserError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    sample: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k must be 0 (all) or more, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not self.repetition_penalty > 0:
            raise UserError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"seed must be 0 or more, not {self.seed}")

    def random(self) -> np.random.Generator:
        """Return the row's own random number generator."""
        return np.random.default_rng(None if self.seed is None else [self.seed, self.sample])


# ---------------------------------------------------------------------------------------------------------------------
# Defaults

class Defaults(NamedTuple):
    """What a request gets where it does not say. max_tokens: new tokens at most, None for all that fit the context."""

    max_tokens: int | None
    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None


# Engine and LLM: the model's own distribution, and reproducible, because programs and evaluations call them
ENGINE = Defaults(max_tokens=None, temperature=1.0, seed=42)
# a conversation in the terminal, as in the published nanochat
CHAT_CLI = Defaults(max_tokens=512, temperature=0.6, top_k=50, top_p=1.0)
# a base model continues a text with its most likely tokens, so that checkpoints can be compared
COMPLETE_CLI = Defaults(max_tokens=128, temperature=0.0, top_k=50, top_p=1.0, seed=42)
# the chat endpoint and the page, as in the published nanochat; chat_web has a flag for each of the three
SERVER_CHAT = Defaults(max_tokens=512, temperature=0.8, top_k=50)
# the completions endpoint: the same, but with OpenAI's length
SERVER_COMPLETION = SERVER_CHAT._replace(max_tokens=16)


def answer_reserve(max_tokens: int, context: int) -> int:
    """Return how many tokens of the context to keep free for an answer by dropping old turns of a conversation."""
    return min(max_tokens, context // 4)


# ---------------------------------------------------------------------------------------------------------------------
# Limits of a request to the server

MAX_INTEGER = 2 ** 63           # of every integer field; a seed may be any unsigned one of 64 bits
MAX_TEMPERATURE = 100.0
MIN_TOP_P = 1e-5                # smaller values are raised to it: a worker may flush a denormal number to 0
MAX_TOP_K = 2 ** 31             # larger values are lowered to it, which is more than any vocabulary
REPETITION_PENALTIES = (0.01, 100.0)
MAX_STOPS = 4                   # stop strings, as in OpenAI's API
MAX_STOP_CHARS = 256            # of one stop string
MAX_CHAT_LOGPROBS = 20          # most likely tokens told beside each token, as in OpenAI's API
MAX_COMPLETION_LOGPROBS = 5

# defaults of chat_web's flags
MAX_ANSWERS = 32                # n times the prompts
MAX_CHARS = 200_000             # of a prompt or conversation
MAX_BODY_BYTES = 1 << 20
TIMEOUT_SECONDS = 300.0         # of a request, waiting included
