"""The messages between the server's HTTP process and its worker processes.

    to a worker:  ("submit", RowRequest), ("cancel", id), ("models",)
    from it:      ("ready", [ModelInfo], device), ("failed", why), ("models", [ModelInfo]), ("events", [Event], stats)

The stats of an "events" message may be None.

This file does not import PyTorch, because the HTTP process does without it.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from nanochat.request import Settings

# folder and step of a checkpoint: what a model's id refers to may change while the server runs
ModelKey = tuple[str, int]
Scores = tuple[float | None, list[tuple[int, float]]]  # a token's log-probability; the most likely tokens and theirs


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker serves and how much at a time.

    Args:
        source: the model loaded at the start: a stage, a folder, or owner/name on the hub. The models of the other
            stages are loaded when a request asks for them.
        model_tag: which of a stage's models; "" for the only or the deepest one.
        step: which of its checkpoints; -1 for the last.
        device: cpu, mps, cuda or cuda:1; "" for the best there is.
        quantize: "none" or "int8".
        max_rows: rows decoded together, for each model.
        max_waiting: rows that may wait in the queue beside them.
        prefix_bytes: memory of the prefix cache, for each model.
        max_models: models that stay loaded.
    """

    source: str = "sft"
    model_tag: str = ""
    step: int = -1
    device: str = ""
    quantize: str = "none"
    max_rows: int = 16
    max_waiting: int = 64
    prefix_bytes: int = 256 << 20
    max_models: int = 4


@dataclass(frozen=True)
class ModelInfo:
    """A model that clients can ask for.

    Args:
        id: its name in requests.
        folder: of its checkpoints.
        step: of the checkpoint.
        context_length: tokens of a prompt and its answer together.
        tokenizer: the tokenizer's folder.
        chat: whether it was trained on conversations.
        created: seconds since 1970.
        description: what the page says of it.
        default: whether it serves requests that name no model.
    """

    id: str
    folder: str
    step: int
    context_length: int
    tokenizer: str
    chat: bool
    created: int
    description: str
    default: bool = False

    @property
    def key(self) -> ModelKey:
        """The checkpoint that is loaded for it."""
        return self.folder, self.step


@dataclass(frozen=True)
class RowRequest:
    """One row to be decoded: new tokens after `prompt`. An HTTP request becomes one of these for each answer.

    Args:
        id: unique among the rows that have not ended.
        prompt: token ids; together with max_tokens they fit the model's context.
        max_tokens: new tokens at most, at least 1.
        settings: how tokens are sampled.
        tools: whether the calculator answers its calls.
        stops: tokens that end it; None for the engine's.
        logprobs: None, or how many of the most likely tokens to tell beside each token's own log-probability.
        prompt_logprobs: whether to tell these of the prompt's tokens too.
        timeout: seconds it may take from its arrival at the worker, waiting included; None for no limit.
        model: which model decodes it. The worker chooses the scheduler by it; the scheduler, which has one model, does
            not read it.
    """

    id: str
    prompt: list[int]
    max_tokens: int
    settings: Settings = Settings()
    tools: bool = True
    stops: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    timeout: float | None = None
    model: ModelInfo | None = None


class Event(NamedTuple):
    """Something that happened to a row. `kind` says which of the other fields are set:

    started: its prefill begins; `cached` of its prompt's tokens came from the prefix cache.
    prompt: `prompt_logprobs`, one entry for each token of the prompt; the first token has no log-probability.
    token: the next token, with `logprob` and `top` if the request asked for them; `forced` if a tool wrote it. There is
        no event for a stop token.
    ended: `finish` is the reason, `message` explains an error. "refused": the queue is full. "shutdown": the server
        ends.
    """

    id: str
    kind: Literal["started", "prompt", "token", "ended"]
    token: int = -1
    forced: bool = False
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None
    prompt_logprobs: list[Scores] | None = None
    finish: Literal["stop", "length", "cancelled", "timeout", "error", "refused", "shutdown", ""] = ""
    message: str = ""
    cached: int = 0
