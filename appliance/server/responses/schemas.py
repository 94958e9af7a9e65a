"""The bodies of requests. The items of an input are read in ``items.py``, where their places are known."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from appliance.core.params import RequestError
from appliance.server.fields import REFUSED, refuse
from appliance.server.schemas import Fields, SamplingFields

_ITEM = {"type": "object", "properties": {"type": {"type": "string"}, "role": {"type": "string"}}}
Input = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _ITEM}, {"type": "null"}]})]
_FUNCTION = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "name": {"type": "string"},
        "description": {"type": ["string", "null"]},
        "parameters": {"type": ["object", "null"]},
    },
    "required": ["type", "name"],
}
_NAMESPACE = {
    "type": "object",
    "properties": {
        "type": {"const": "namespace"},
        "name": {"type": "string", "minLength": 1},
        "description": {"type": ["string", "null"]},
        "tools": {"type": "array", "items": _FUNCTION},
    },
    "required": ["type", "name", "tools"],
}
_SEARCH = {  # left out: server/responses/tools.py
    "type": "object",
    "properties": {"type": {"type": "string", "pattern": "^web_search"}},
    "required": ["type"],
}
_TOOLS = {"type": "array", "items": {"anyOf": [_FUNCTION, _NAMESPACE, _SEARCH]}}
Tools = Annotated[Any, WithJsonSchema({"anyOf": [_TOOLS, {"type": "null"}]})]
_MODES = {"enum": ["auto", "none", "required", None]}
_NAMED = {"type": "object", "properties": {"type": {"const": "function"}, "name": {"type": "string"}}, "required": ["name"]}
Choice = Annotated[Any, WithJsonSchema({"anyOf": [_MODES, _NAMED]})]

LOGPROBS = "message.output_text.logprobs"
# What else may be included: of tools that are not here nothing comes, and reasoning comes as plain text anyway.
NOTHING_MORE = frozenset(
    {
        "reasoning.encrypted_content",
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
        "message.input_image.image_url",
        "computer_call_output.output.image_url",
        "code_interpreter_call.outputs",
    }
)
# OpenAI's fields that cannot change the answer here.
HARMLESS = frozenset({"service_tier", "prompt_cache_retention", "prompt_cache_options", "mm_processor_kwargs", "client_metadata"})
_NONE: tuple[object, ...] = ([], {}, "", False)
_ONE = "a response is one answer: leave it out, or use /v1/chat/completions"
REFUSED_HERE: dict[str, tuple[tuple[object, ...], str]] = {
    "background": (_NONE, "responses are not made in the background: leave it out, or set stream=true"),
    "conversation": (_NONE, "conversations are not kept here: use previous_response_id"),
    "prompt": (_NONE, "prompt templates are not kept here: send instructions and input"),
    "context_management": (_NONE, "conversations are not compacted here: use truncation='auto'"),
    "personality": (_NONE, "personalities are OpenAI's: say it in instructions"),
    "previous_input_messages": (_NONE, "not supported: send the items as input"),
    "previous_response": (_NONE, "not supported: use previous_response_id, or send the items as input"),
    "enable_response_messages": (_NONE, "not supported: leave it out"),
    "messages": (_NONE, "not supported under this name: use input"),
    "functions": (_NONE, "not supported under this name: use tools"),
    "max_tokens": ((), "not supported under this name: use max_output_tokens"),
    "max_completion_tokens": ((), "not supported under this name: use max_output_tokens"),
    "response_format": (({"type": "text"},), "not supported under this name: use text.format"),
    "reasoning_effort": ((), "not supported under this name: use reasoning.effort"),
    "logprobs": ((False,), f"not supported under this name: include {LOGPROBS!r}, and use top_logprobs"),
    "continue_final_message": ((False,), "not supported here: use /v1/chat/completions"),
    "add_generation_prompt": ((True,), "not supported here: use /v1/chat/completions"),
    "prompt_logprobs": ((), "not supported here: use /v1/completions or /v1/chat/completions"),
    "logprob_token_ids": (([],), "not supported here: use /v1/completions or /v1/chat/completions"),
    "return_token_ids": ((False,), "not supported here: use /v1/completions or /v1/chat/completions"),
    "return_tokens_as_token_ids": ((False,), "not supported here: use /v1/completions or /v1/chat/completions"),
    "echo": ((False,), "not supported here: use /v1/completions"),
    "include_reasoning": ((True,), "not supported here: leave aside the items of type 'reasoning'"),
    "n": ((1,), _ONE),
    "best_of": ((1,), _ONE),
    "use_beam_search": ((False,), _ONE),
}


class ResponsesStreamOptions(Fields):
    include_obfuscation: bool = False  # there is none


class ResponsesReasoning(Fields):
    effort: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None  # nobody makes one: what was thought is told as it is
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesText(Fields):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class InputTokensRequest(SamplingFields):
    """A conversation: what /v1/responses/input_tokens takes. Of chat's fields those that are not refused mean the same."""

    not_described = tuple(REFUSED_HERE)

    stream_options: ResponsesStreamOptions | None = None  # type: ignore[assignment]  # another kind than chat's
    input: Input = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: Tools = None
    tool_choice: Choice = None
    parallel_tool_calls: bool = True
    text: ResponsesText = ResponsesText()
    reasoning: ResponsesReasoning = ResponsesReasoning()
    truncation: Literal["auto", "disabled"] = "disabled"
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None

    def check(self) -> None:
        """What can be said of the fields without a model. Raises RequestError."""
        given = {**{name: getattr(self, name) for name in self.model_fields_set}, **(self.model_extra or {})}
        elsewhere = {name: rule for name, rule in REFUSED.items() if name not in type(self).model_fields}
        refuse({name: value for name, value in given.items() if value is not None}, elsewhere | REFUSED_HERE)
        for name in HARMLESS | REFUSED_HERE.keys():
            (self.model_extra or {}).pop(name, None)
        if self.text.verbosity is not None:
            refuse({"text.verbosity": self.text.verbosity}, {"text.verbosity": REFUSED["verbosity"]})


class ResponsesRequest(InputTokensRequest):
    store: bool = True
    max_output_tokens: int | None = Field(None, ge=1)
    max_tool_calls: int | None = Field(None, ge=0)  # of OpenAI's own tools: there are none
    include: list[str] = Field(default_factory=list)
    top_logprobs: int | None = Field(None, ge=0)
    metadata: dict[str, str] = Field(default_factory=dict)
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def check(self) -> None:
        super().check()
        for i, name in enumerate(self.include):
            if name != LOGPROBS and name not in NOTHING_MORE:
                message = f"include[{i}] is {name!r:.80}: there is {', '.join(sorted({LOGPROBS, *NOTHING_MORE}))}"
                raise RequestError(message, param=f"include[{i}]")

    @property
    def scored(self) -> bool:
        """Whether log-probabilities are asked for."""
        return LOGPROBS in self.include or bool(self.top_logprobs)
