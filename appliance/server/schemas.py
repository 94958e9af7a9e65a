"""The bodies of requests. Every optional field may be null, which means absent; extra fields are kept apart.

Types are strict, but JSON knows one kind of number: 5.0 is as good as 5 where an integer is asked for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from appliance.core.params import RequestError
from appliance.server.fields import REFUSED_OF_EMBEDDINGS, refuse
from appliance.server.kinds import Messages, Prompts, Stop, ToolChoice, Tools

Body = TypeVar("Body", bound=BaseModel)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


class Fields(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    not_described: ClassVar[Collection[str]] = ()  # fields that are read in order to be refused

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, data: Any) -> Any:
        return {k: _whole(v) for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class StreamOptions(Fields):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class PromptFields(Fields):
    """What all that computes shares."""

    model: str | None = None
    cache_salt: str | None = None
    priority: int = 0
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str = "left"
    request_id: str | None = None

    def check(self) -> None:
        """What can be said of the fields without a model. Raises RequestError."""
        refuse(self.model_extra or {})
        if self.cache_salt == "":
            raise RequestError("cache_salt is empty: give it at least one character, or leave it out", param="cache_salt")
        if self.truncation_side not in ("left", "right"):
            raise RequestError(f"truncation_side is left or right, got {self.truncation_side!r}", param="truncation_side")
        if self.truncate_prompt_tokens is not None and (self.truncate_prompt_tokens < -1 or self.truncate_prompt_tokens == 0):
            message = f"truncate_prompt_tokens is -1 (the model's limit) or at least 1, got {self.truncate_prompt_tokens}"
            raise RequestError(message, param="truncate_prompt_tokens")


class SamplingFields(PromptFields):
    """What completions and chat share. None = not given: the model's generation_config or SamplingParams decides."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Stop = None  # text or a list of texts
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    thinking_token_budget: int | None = None
    repetition_detection: dict[str, int] | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    response_format: dict[str, Any] | None = None  # this and the next nine: server/structured.py
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: str | None = None
    grammar: str | None = None
    json_schema: str | dict[str, Any] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False

    def check(self) -> None:
        super().check()
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed together with stream=true", param="stream_options")
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            message = (
                f"best_of is {self.best_of}, more than n = {self.n or 1}: which are best is known in the end: set stream=false"
            )
            raise RequestError(message, param="best_of")
        texts = self.stop if isinstance(self.stop, list) else [] if self.stop is None else [self.stop]
        if not all(isinstance(text, str) for text in texts):
            raise RequestError(f"stop must be text or a list of texts, got {self.stop!r:.80}", param="stop")
        if self.repetition_penalty is not None and not 0.001 <= self.repetition_penalty <= 1000:  # logits stay finite
            message = f"repetition_penalty must be a number at least 0.001 and at most 1000, got {self.repetition_penalty}"
            raise RequestError(message, param="repetition_penalty")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs cannot be streamed: set stream=false", param="prompt_logprobs")


class CompletionRequest(SamplingFields):
    prompt: Prompts  # text, token ids, or a list of either: checked in prompts.py, where a long list costs one pass
    echo: bool = False
    logprobs: int | None = None

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens must be at least 1 (0 only together with echo=true), got 0", param="max_tokens")


class ChatRequest(SamplingFields):
    not_described = ("echo",)
    messages: Messages
    logprobs: bool = False
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    tools: Tools = None  # checked in text/tools/choice.py
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    echo: bool = False

    def check(self) -> None:
        super().check()
        if self.echo:
            raise RequestError("echo: not supported in chat", param="echo", code="unsupported_parameter")
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            message = "continue_final_message=true needs add_generation_prompt=false"
            raise RequestError(message, param="continue_final_message")


class EmbeddingRequest(PromptFields):
    input: Prompts  # as a completion's prompt
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    normalize: bool | None = None  # None: as the model says

    def check(self) -> None:
        super().check()
        refuse(self.model_extra or {}, REFUSED_OF_EMBEDDINGS)


class ModelRequest(Fields):
    """POST /v1/models/load and /v1/models/unload; llama.cpp's router has them without the version."""

    model: str


class LoadAdapterRequest(Fields):
    """POST /v1/load_lora_adapter. ``model``: that it is for, where the server has several."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    model: str | None = None


class UnloadAdapterRequest(Fields):
    lora_name: str


class TokenizeRequest(Fields):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Tools = None
    tool_choice: ToolChoice = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    content: str | None = None  # llama.cpp's form, with the three below
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(Fields):
    model: str | None = None
    tokens: list[int]


def parse(schema: type[Body], raw: bytes) -> Body:
    """Read a JSON body. Raises RequestError (400) that names the field."""
    try:
        return schema.model_validate_json(raw)
    except ValidationError as error:
        raise _refusal(error) from None


def build(schema: type[Body], fields: dict[str, Any]) -> Body:
    """The same of what another form of request says. Raises RequestError that names the field."""
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False)[0]
    kind, where, message, found = first["type"], first["loc"], first["msg"], first.get("input")
    if kind == "json_invalid":
        return RequestError(f"the body is not JSON: {message.removeprefix('Invalid JSON: ')}", code="invalid_json")
    if not where:
        return RequestError(f"the body must be a JSON object, got {type(found).__name__}", code="invalid_json")
    param = str(where[0]) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where[1:])
    if kind == "missing":
        return RequestError(f"{param} is required", param=param, code="missing_required_parameter")
    return RequestError(f"{param}: {message}, got {found!r:.80}", param=param, code="invalid_type")
