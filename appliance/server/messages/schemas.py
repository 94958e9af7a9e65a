"""The bodies of requests. Blocks of content are read in ``convert.py``, where their places are known."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NoReturn

from pydantic import Field, WithJsonSchema

from appliance.core.params import RequestError
from appliance.server.fields import refuse
from appliance.server.schemas import ChatRequest, Fields

_BLOCK = {"type": ["object", "string"], "properties": {"type": {"type": "string"}}, "required": ["type"]}
Content = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _BLOCK}]})]

# Fields of chat that mean the same here.
SHARED = frozenset(
    {
        *("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "stop_token_ids", "ignore_eos"),
        *("min_tokens", "logit_bias", "allowed_token_ids", "bad_words", "cache_salt", "priority", "request_id", "documents"),
        *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_json_object"),
        *("guided_whitespace_pattern", "grammar", "json_schema", "chat_template_kwargs", "add_special_tokens"),
        *("skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens", "truncation_side"),
    }
)
# Anthropic's fields that cannot change the answer here.
HARMLESS = frozenset(
    {
        *("cache_control", "inference_geo", "speed", "user_profile_id", "workspace_id", "diagnostics", "betas"),
        *("context_management", "billing_policy", "fallbacks", "fallback_credit_token", "anthropic_version"),
    }
)
_NONE: tuple[object, ...] = ([], {}, "")
_ONE = "a message is one answer: leave it out, or use /v1/chat/completions"
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "container": (_NONE, "containers are not supported: leave it out"),
    "mcp_servers": (_NONE, "servers are not asked for tools: declare the tools, and call the servers yourself"),
    "compaction": (_NONE, "compaction is not supported: leave it out"),
    "stop": (_NONE, "not supported under this name: use stop_sequences"),
    "response_format": (_NONE, "not supported under this name: use output_config.format"),
    "max_completion_tokens": ((), "not supported under this name: use max_tokens"),
    "n": ((1,), _ONE),
    "best_of": ((1,), _ONE),
    "use_beam_search": ((False,), _ONE),
}


class Message(Fields):
    role: Literal["user", "assistant", "system"]
    content: Content


class Thinking(Fields):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)
    display: Literal["summarized", "omitted"] | None = None


class ToolChoice(Fields):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class OutputFormat(Fields):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Fields):
    effort: str | None = None
    format: OutputFormat | None = None


class CountRequest(Fields):
    """A conversation: what /v1/messages/count_tokens takes."""

    model: str
    messages: list[Message]
    system: Content = None
    thinking: Thinking | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # an older place of output_config.format

    def extras(self) -> dict[str, Any]:
        """The fields for chat beside those above. Raises RequestError for what would change the answer and is not supported."""
        extra = {k: v for k, v in (self.model_extra or {}).items() if k not in HARMLESS | MessagesRequest.model_fields.keys()}
        if extra.get("thread"):  # the code is Anthropic's: its clients then go on without one
            message = "thread: nothing is kept here: send the whole conversation as messages"
            raise RequestError(message, param="thread", code="thread_unsupported_request")
        refuse(extra, REFUSED)
        strange = next((name for name in extra if name in ChatRequest.model_fields and name not in SHARED | REFUSED.keys()), None)
        if strange is not None:
            message = f"{strange}: not supported in messages: leave it out, or use /v1/chat/completions"
            raise RequestError(message, param=strange, code="unsupported_parameter")
        return {name: value for name, value in extra.items() if name not in REFUSED}


class MessagesRequest(CountRequest):
    max_tokens: int = Field(ge=0)  # 0: the prompt is computed, and kept for later ones
    stop_sequences: list[str] | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


def wrong(where: str, why: str, code: str | None = None) -> NoReturn:
    """Raise RequestError: what stands there is not what should."""
    raise RequestError(f"{where} {why}", param=where, code=code)
