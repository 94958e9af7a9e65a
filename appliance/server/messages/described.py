"""What these routes take and give, for the description of the API."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic knows typing's from Python 3.12 on

from appliance.server.messages.schemas import CountRequest, MessagesRequest
from appliance.server.openapi import ANSWER, COMPUTE, Operation


class AnthropicError(TypedDict):
    type: str
    message: str


class AnthropicErrorAnswer(TypedDict):
    """Every answer of these routes that is no success; in a stream the event that ends it."""

    type: Literal["error"]
    error: AnthropicError
    request_id: str


class TextBlock(TypedDict):
    type: Literal["text"]
    text: str


class ThinkingBlock(TypedDict):
    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


Block = TextBlock | ThinkingBlock | ToolUseBlock


class OutputDetails(TypedDict):
    thinking_tokens: int


class DeltaUsage(TypedDict):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputDetails


class MessageUsage(DeltaUsage):
    service_tier: Literal["standard"]


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class MessageEnd(TypedDict):
    stop_reason: StopReason | None
    stop_sequence: str | None


class MessageAnswer(MessageEnd):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    usage: MessageUsage


class MessageStart(TypedDict):
    type: Literal["message_start"]
    message: MessageAnswer


class BlockStart(TypedDict):
    type: Literal["content_block_start"]
    index: int
    content_block: Block


class TextDelta(TypedDict):
    type: Literal["text_delta"]
    text: str


class ThinkingDelta(TypedDict):
    type: Literal["thinking_delta"]
    thinking: str


class SignatureDelta(TypedDict):
    type: Literal["signature_delta"]
    signature: str


class InputDelta(TypedDict):
    type: Literal["input_json_delta"]
    partial_json: str


class BlockDelta(TypedDict):
    type: Literal["content_block_delta"]
    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class BlockStop(TypedDict):
    type: Literal["content_block_stop"]
    index: int


class MessageDelta(TypedDict):
    type: Literal["message_delta"]
    delta: MessageEnd
    usage: DeltaUsage


class MessageStop(TypedDict):
    type: Literal["message_stop"]


class Ping(TypedDict):
    type: Literal["ping"]


class TokenCount(TypedDict):
    input_tokens: int


class ModelInfo(TypedDict):
    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int | None
    max_tokens: int | None


class ModelsPage(TypedDict):
    """All models, where the request has the header ``anthropic-version``."""

    data: list[ModelInfo]
    has_more: Literal[False]
    first_id: str | None
    last_id: str | None


EXAMPLE = {"model": "", "max_tokens": 16, "messages": [{"role": "user", "content": "Hello!"}]}
OPERATIONS = {
    "POST /v1/messages": Operation(
        tag="answers",
        summary="Answer a conversation, in Anthropic's form",
        body=MessagesRequest,
        example=EXAMPLE,
        answer=MessageAnswer,
        events=MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | Ping,
        done=None,
        errors=(*ANSWER, 529),
        error=AnthropicErrorAnswer,
    ),
    "POST /v1/messages/count_tokens": Operation(
        tag="answers",
        summary="How many tokens the prompt of such a conversation has",
        body=CountRequest,
        example={"model": "", "messages": [{"role": "user", "content": "Hello!"}]},
        answer=TokenCount,
        errors=(*COMPUTE, 529),
        error=AnthropicErrorAnswer,
    ),
}
