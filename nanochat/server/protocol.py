"""OpenAI's request and error shapes: parse and check request bodies, and turn them into messages for the workers.

Fields of OpenAI's that change nothing here (user, metadata, store, ...) are ignored. Fields that would change the
answer, and that this server does not support, are refused by name.
"""

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from nanochat.errors import UserError
from nanochat.request import (
    MAX_CHAT_LOGPROBS,
    MAX_COMPLETION_LOGPROBS,
    MAX_INTEGER,
    MAX_STOP_CHARS,
    MAX_STOPS,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MIN_TOP_P,
    REPETITION_PENALTIES,
    Defaults,
    Settings,
)
from nanochat.server.messages import ModelInfo, RowRequest


class ApiError(Exception):
    """An error for the client. The body is OpenAI's: {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None):
        """Make an error.

        Args:
            message: for people.
            status: the HTTP status.
            param: the field of the body that is wrong.
            code: for programs.
            headers: of the response.
        """
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.headers = message, status, param, code, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
                404: "invalid_request_error",
                405: "invalid_request_error", 429: "rate_limit_error",
                503: "service_unavailable_error"}.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def to_bytes(value: Any) -> bytes:
    """Return JSON in ASCII, which can hold any text, lone surrogates included."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


# ---------------------------------------------------------------------------------------------------------------------
# Request bodies

def _valid(text: str) -> str:
    """Return text that can be encoded.

    Raises UserError for half of a surrogate pair, which broken JSON escapes leave.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("the text holds half of a surrogate pair (\\ud800 to \\udfff): "
                        "it is not valid Unicode") from None
    return text


ValidText = Annotated[str, AfterValidator(_valid)]


class StrictModel(BaseModel):
    """A part of a request body. Strict: "5" is not a number, and true is not 1. Infinities and NaN are not numbers."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(StrictModel):
    """include_usage: a last chunk with the token counts."""

    include_usage: bool | None = None


class RequestBody(StrictModel):
    """The fields that both endpoints take."""

    model: ValidText | None = Field(None, description="one of /v1/models; the server's default if left out",
                                    max_length=300)
    max_tokens: int | None = Field(None, ge=0, le=MAX_INTEGER,
                                   description="new tokens at most, cut to what fits the context")
    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE,
                                      description="0 takes the most likely token; higher is more varied")
    top_p: float | None = Field(
        None, gt=0, le=1, description="sample from the most likely tokens that together have this probability")
    top_k: int | None = Field(None, ge=0, le=MAX_INTEGER,
                              description="sample from this many of the most likely tokens; 0 = all")
    repetition_penalty: float | None = Field(None, ge=REPETITION_PENALTIES[0], le=REPETITION_PENALTIES[1],
                                             description="above 1 makes tokens seen before less likely")
    seed: int | None = Field(None, ge=-MAX_INTEGER, lt=2 * MAX_INTEGER,
                             description="the same seed and request give the same answer")
    stop: ValidText | list[ValidText] | None = Field(
        None, description=f"the answer ends before this text, or before the first of up to {MAX_STOPS}")
    n: int | None = Field(None, ge=1, le=MAX_INTEGER, description="answers for each prompt")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # refused by name, unless the value changes nothing
    frequency_penalty: float | None = Field(None, description="only 0; see repetition_penalty")
    presence_penalty: float | None = Field(None, description="only 0; see repetition_penalty")
    logit_bias: dict[str, Any] | None = Field(None, description="only empty")

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def row_requests(self, id: str, model: ModelInfo, prompts: list[list[int]], max_tokens: list[int],
                     defaults: Defaults, *, timeout: float, tools: bool, logprobs: int | None,
                     prompt_logprobs: bool = False) -> list[RowRequest]:
        """Return the messages to the worker: n rows for each prompt, those of the first prompt first.

        Args:
            id: of the HTTP request; the rows' ids are made of it.
            model: which decodes them.
            prompts: token ids.
            max_tokens: new tokens at most, of each prompt.
            defaults: what holds where the body does not say.
            timeout: seconds.
            tools, logprobs, prompt_logprobs: as in RowRequest.
        """
        seed = secrets.randbits(48) if self.seed is None else self.seed % 2 ** 64
        rows: list[RowRequest] = []
        for prompt, limit in zip(prompts, max_tokens):
            for sample in range(self.n or 1):
                settings = Settings(
                    temperature=defaults.temperature if self.temperature is None else self.temperature,
                    top_k=min(defaults.top_k if self.top_k is None else self.top_k, MAX_TOP_K),
                    top_p=defaults.top_p if self.top_p is None else max(self.top_p, MIN_TOP_P),
                    repetition_penalty=self.repetition_penalty or defaults.repetition_penalty, seed=seed, sample=sample)
                rows.append(RowRequest(f"{id}-{len(rows)}", prompt, max(limit, 1), settings, tools=tools,
                                       logprobs=logprobs, prompt_logprobs=prompt_logprobs, timeout=timeout,
                                       model=model))
        return rows

    @model_validator(mode="after")
    def _check(self) -> "RequestBody":
        for name, harmless in self._unsupported().items():
            value = getattr(self, name)
            if value is not None and value != harmless:
                raise UserError(f"{name}: this server does not support it")
        if len(self.stops) > MAX_STOPS:
            raise UserError(f"stop: at most {MAX_STOPS} texts")
        if any(not 0 < len(text) <= MAX_STOP_CHARS for text in self.stops):
            raise UserError(f"stop: each text has 1 to {MAX_STOP_CHARS} characters")
        return self

    def _unsupported(self) -> dict[str, Any]:
        """Return the fields that are refused, each with the value that changes nothing."""
        return {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}}


class Part(StrictModel):
    """A part of a message: text; or, of the assistant, a call of the calculator (python) or its result
    (python_output)."""

    type: Literal["text", "python", "python_output"]
    text: ValidText


class Message(StrictModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: ValidText | list[Part]
    tool_calls: list[Any] | None = Field(None, description="only empty")

    @model_validator(mode="after")
    def _check(self) -> "Message":
        if self.tool_calls:
            raise UserError("tool_calls: this server does not support them; "
                            "send the parts of the answer back as its content")
        parts = self.content if isinstance(self.content, list) else []
        if self.role != "assistant" and any(part.type != "text" for part in parts):
            raise UserError(f"a {self.role} message holds text alone")
        return self

    def plain(self) -> dict[str, Any]:
        """Return it in the form of nanochat/tokenizer/conversation.py."""
        role, content = "system" if self.role == "developer" else self.role, self.content
        if isinstance(content, list) and role == "assistant":
            content = [part.model_dump() for part in content]
        elif isinstance(content, list):
            content = "".join(part.text for part in content)
        return {"role": role, "content": content}


class ChatRequest(RequestBody):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(
        min_length=1, description="user and assistant take turns, user first and last; a system message may come first")
    max_completion_tokens: int | None = Field(None, ge=0, le=MAX_INTEGER,
                                              description="the same as max_tokens, and used instead of it")
    logprobs: bool | None = Field(None, description="tell the log-probability of each token")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_CHAT_LOGPROBS,
                                     description="and of this many of the most likely, with logprobs")
    tools_shown: bool | None = Field(None,
                                     description="show the calls of the calculator and their results in the stream")
    drop_oldest: bool | None = Field(None,
                                     description="drop the oldest turns if the conversation does not fit the context")
    tools: list[Any] | None = Field(None, description="only empty")
    tool_choice: Any = Field(None, description='only "none" or "auto"')
    functions: list[Any] | None = Field(None, description="only empty")
    function_call: Any = Field(None, description='only "none" or "auto"')
    response_format: dict[str, Any] | None = Field(None, description='only {"type": "text"}')
    modalities: list[Any] | None = Field(None, description='only ["text"]')
    audio: Any = Field(None, description="only null")
    prediction: Any = Field(None, description="only null")

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise UserError("top_logprobs: needs logprobs to be true")
        return self

    def _unsupported(self) -> dict[str, Any]:
        choices = ("tool_choice", "function_call")
        choice = {name: "none" if getattr(self, name) == "none" else "auto" for name in choices}
        return {**super()._unsupported(), **choice, "tools": [], "functions": [], "response_format": {"type": "text"},
                "modalities": ["text"], "audio": None, "prediction": None}


class CompletionRequest(RequestBody):
    """The body of POST /v1/completions."""

    prompt: ValidText | list[int] | list[ValidText] | list[list[int]] | None = Field(
        None, description="text, token ids, or a list of either; <|bos|> is put before text, "
                          "token ids are taken as they are")
    logprobs: int | None = Field(None, ge=0, le=MAX_COMPLETION_LOGPROBS,
                                 description="tell the log-probability of each token and of this many most likely ones")
    echo: bool | None = Field(None, description="put the prompt before the answer")
    suffix: str | None = Field(None, description="only empty")
    best_of: int | None = Field(None, description="only n")

    def _unsupported(self) -> dict[str, Any]:
        return {**super()._unsupported(), "suffix": "", "best_of": self.n or 1}


# ---------------------------------------------------------------------------------------------------------------------
# Errors of a body

KINDS = {"prompt": "text, a list of texts, token ids, or a list of such lists", "stop": "text, or a list of texts",
         "content": "text, or a list of parts: {type, text}, where type is text, or for the assistant also python or "
                    "python_output"}


def from_validation(errors: list[dict[str, Any]]) -> ApiError:
    """Return the error of an invalid body from pydantic's list of errors: one line about the first wrong field."""
    first = errors[0] if errors else {}
    if first.get("type") == "json_invalid":
        return ApiError(f"the body is not valid JSON: {_short(first.get('ctx', {}).get('error', ''))}")
    where, kind = [], None
    for part in first.get("loc", ()):
        if part != "body" and kind is None:
            where.append(str(part))
            kind = KINDS.get(part)  # the rest of the path says which kind pydantic tried first, which does not help
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
