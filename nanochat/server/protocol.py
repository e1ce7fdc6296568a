"""What clients may ask, checked, and how they are told that they may not: OpenAI's request and error shapes.

Fields of OpenAI's that change nothing here (user, metadata, store, ...) are ignored. Those that would change the answer, and that this
server cannot honour, are refused by name.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from nanochat.errors import UserError

BIG = 2 ** 63


class ApiError(Exception):
    """An error for the client. The body is OpenAI's: {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None):
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.headers = message, status, param, code, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "invalid_request_error",
                405: "invalid_request_error", 429: "rate_limit_error", 503: "service_unavailable_error"}.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def to_bytes(value: Any) -> bytes:
    """JSON in ASCII: whatever the text, lone surrogates too, it can be sent."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


# ---------------------------------------------------------------------------------------------------------------------
# Requests

def _whole(text: str) -> str:
    """Text that can be sent and stored. Raises UserError for half of a surrogate pair, as broken JSON escapes leave it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("the text holds half of a surrogate pair (\\ud800 to \\udfff): it is not valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]


class Body(BaseModel):
    """Strict: "5" is no number, and true is not 1. Infinities and NaN are no numbers."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    """include_usage: a last chunk with the token counts."""

    include_usage: bool | None = None


class Asked(Body):
    """What both endpoints take."""

    model: Text | None = Field(None, description="one of /v1/models; the server's default if left out", max_length=300)
    max_tokens: int | None = Field(None, ge=0, le=BIG, description="new tokens at most, cut to what fits the context")
    temperature: float | None = Field(None, ge=0, le=100, description="0 takes the likeliest token; higher is more varied")
    top_p: float | None = Field(None, gt=0, le=1, description="draw from the likeliest tokens that have this much of the probability")
    top_k: int | None = Field(None, ge=0, le=BIG, description="draw from this many of the likeliest tokens; 0 = all")
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="above 1 makes tokens seen before less likely")
    seed: int | None = Field(None, ge=-BIG, lt=2 * BIG, description="the same seed and request give the same answer")
    stop: Text | list[Text] | None = Field(None, description="the answer ends before this text, or the first of up to 4")
    n: int | None = Field(None, ge=1, le=BIG, description="answers for each prompt")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # told by name that they cannot be had, unless they change nothing
    frequency_penalty: float | None = Field(None, description="only 0; see repetition_penalty")
    presence_penalty: float | None = Field(None, description="only 0; see repetition_penalty")
    logit_bias: dict[str, Any] | None = Field(None, description="only empty")

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop

    @model_validator(mode="after")
    def _known(self) -> "Asked":
        for name, nothing in self._refused().items():
            value = getattr(self, name)
            if value is not None and value != nothing:
                raise UserError(f"{name}: this server does not support it")
        if len(self.stops) > 4:
            raise UserError("stop: at most 4 texts")
        if any(not 0 < len(text) <= 256 for text in self.stops):
            raise UserError("stop: each text has 1 to 256 characters")
        return self

    def _refused(self) -> dict[str, Any]:
        return {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}}


class Part(Body):
    """A part of a message: text; or, of the assistant, a call of the calculator (python) and what it said (python_output)."""

    type: Literal["text", "python", "python_output"]
    text: Text


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    tool_calls: list[Any] | None = Field(None, description="only empty")

    @model_validator(mode="after")
    def _known(self) -> "Message":
        if self.tool_calls:
            raise UserError("tool_calls: this server does not support them; send the parts of the answer back as its content")
        if self.role != "assistant" and isinstance(self.content, list) and any(part.type != "text" for part in self.content):
            raise UserError(f"a {self.role} message holds text alone")
        return self

    def plain(self) -> dict[str, Any]:
        """As nanochat/tokenizer/conversation.py has it."""
        role, content = "system" if self.role == "developer" else self.role, self.content
        if isinstance(content, list):
            content = [part.model_dump() for part in content] if role == "assistant" else "".join(part.text for part in content)
        return {"role": role, "content": content}


class ChatRequest(Asked):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(
        min_length=1, description="user and assistant take turns, user first and last; a system message may lead")
    max_completion_tokens: int | None = Field(None, ge=0, le=BIG, description="the same as max_tokens, and goes before it")
    logprobs: bool | None = Field(None, description="tell the log-probability of each token")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="and of this many of the likeliest, with logprobs")
    tools_shown: bool | None = Field(None, description="show in the stream what the calculator is asked and says")
    drop_oldest: bool | None = Field(None, description="let the oldest turns go where the conversation does not fit the context")
    tools: list[Any] | None = Field(None, description="only empty")
    tool_choice: Any = Field(None, description='only "none" or "auto"')
    functions: list[Any] | None = Field(None, description="only empty")
    function_call: Any = Field(None, description='only "none" or "auto"')
    response_format: dict[str, Any] | None = Field(None, description='only {"type": "text"}')
    modalities: list[Any] | None = Field(None, description='only ["text"]')
    audio: Any = Field(None, description="only null")
    prediction: Any = Field(None, description="only null")

    @model_validator(mode="after")
    def _complete(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise UserError("top_logprobs: needs logprobs to be true")
        return self

    def _refused(self) -> dict[str, Any]:
        choice = {name: "none" if getattr(self, name) == "none" else "auto" for name in ("tool_choice", "function_call")}
        return {**super()._refused(), **choice, "tools": [], "functions": [], "response_format": {"type": "text"}, "modalities": ["text"],
                "audio": None, "prediction": None}


class CompletionRequest(Asked):
    """The body of POST /v1/completions."""

    prompt: Text | list[int] | list[Text] | list[list[int]] | None = Field(
        None, description="text, token ids, or a list of either; text begins behind <|bos|>, token ids are taken as they are")
    logprobs: int | None = Field(None, ge=0, le=5, description="tell the log-probability of each token and of this many of the likeliest")
    echo: bool | None = Field(None, description="put the prompt before the answer")
    suffix: str | None = Field(None, description="only empty")
    best_of: int | None = Field(None, description="only n")

    def _refused(self) -> dict[str, Any]:
        return {**super()._refused(), "suffix": "", "best_of": self.n or 1}


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with one

KINDS = {"prompt": "text, a list of texts, token ids, or a list of such lists", "stop": "text, or a list of texts",
         "content": "text, or a list of parts: {type, text}, where type is text, or for the assistant also python or python_output"}


def from_validation(errors: list[dict[str, Any]]) -> ApiError:
    """The error of a body that is not as it should be, from what pydantic says: about the field that is wrong, in one line."""
    first = errors[0] if errors else {}
    if first.get("type") == "json_invalid":
        return ApiError(f"the body is not valid JSON: {_short(first.get('ctx', {}).get('error', ''))}")
    where, kind = [], None
    for part in first.get("loc", ()):
        if part != "body" and kind is None:
            where.append(str(part))
            kind = KINDS.get(part)  # what follows tells which of the kinds was tried first: no help
    param = ".".join(where) or None
    if first.get("type") == "value_error":
        message = _short(str(first.get("ctx", {}).get("error") or first.get("msg")))
        field, colon, _ = message.partition(":")
        named = [field] if colon and field.isidentifier() else []
        return ApiError(f"{param}: {message}" if param else message, param=".".join([*where, *named]) or None)
    if param is None or not param.replace(".", "").replace("_", "").isalnum():
        return ApiError("the body must be a JSON object, sent with Content-Type: application/json")
    value = first.get("input")
    shown = f"; it is {_short(json.dumps(value))}" if isinstance(value, (str, int, float)) else ""
    said = f"must be {kind}" if kind and first.get("type") != "missing" else _short(first.get("msg", "is not valid"))
    return ApiError(f"{param}: {said}{shown}", param=param)


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "…"
