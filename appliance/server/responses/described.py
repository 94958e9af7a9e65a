"""What these routes take and give, for the description of the API."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic knows typing's from Python 3.12 on

from appliance.server.answers import CachedTokens, ReasoningTokens, ScoredToken
from appliance.server.openapi import ANSWER, COMPUTE, Operation
from appliance.server.responses.schemas import InputTokensRequest, ResponsesRequest


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ScoredToken]


class ReasoningText(TypedDict):
    type: Literal["reasoning_text"]
    text: str


class SummaryText(TypedDict):
    type: Literal["summary_text"]
    text: str


class InputText(TypedDict):
    type: Literal["input_text"]
    text: str


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class MessageItem(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    status: ItemStatus
    content: list[OutputText | InputText]


class ReasoningItem(TypedDict):
    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[SummaryText]
    content: list[ReasoningText]


class FunctionCallItem(TypedDict):
    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    namespace: NotRequired[str]
    name: str
    arguments: str


class FunctionCallOutputItem(TypedDict):
    id: str
    type: Literal["function_call_output"]
    status: ItemStatus
    call_id: str
    output: str | list[InputText]


OutputItem = MessageItem | ReasoningItem | FunctionCallItem
Item = OutputItem | FunctionCallOutputItem


class ResponseError(TypedDict):
    code: Literal["rate_limit_exceeded", "server_error"]
    message: str


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class Effort(TypedDict):
    effort: str | None
    summary: str | None


class TextFormat(TypedDict):
    format: dict[str, Any]
    verbosity: str


class CachedAndWritten(CachedTokens):
    cache_write_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: CachedAndWritten
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseAnswer(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: Effort
    service_tier: str
    store: bool
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int
    text: TextFormat
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    truncation: Literal["auto", "disabled"]
    metadata: dict[str, str]
    safety_identifier: str | None
    prompt_cache_key: str | None
    user: NotRequired[str]
    usage: NotRequired[ResponseUsage]


class ResponseEvent(TypedDict):
    """Of the whole response."""

    type: Literal["response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"]
    sequence_number: int
    response: ResponseAnswer


class ItemEvent(TypedDict):
    """An item begins, or is complete."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputItem


class PartEvent(TypedDict):
    """A part of an item's content begins, or is complete."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    part: OutputText | ReasoningText


class DeltaEvent(TypedDict):
    """More of a text, of reasoning, or of a call's arguments."""

    type: Literal["response.output_text.delta", "response.reasoning_text.delta", "response.function_call_arguments.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    delta: str
    content_index: NotRequired[int]
    logprobs: NotRequired[list[ScoredToken]]


class DoneEvent(TypedDict):
    """The whole of it."""

    type: Literal["response.output_text.done", "response.reasoning_text.done", "response.function_call_arguments.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: NotRequired[int]
    text: NotRequired[str]
    logprobs: NotRequired[list[ScoredToken]]
    name: NotRequired[str]
    arguments: NotRequired[str]


class InputTokens(TypedDict):
    object: Literal["response.input_tokens"]
    input_tokens: int


class DeletedResponse(TypedDict):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class Items(TypedDict):
    object: Literal["list"]
    data: list[Item]
    first_id: str
    last_id: str
    has_more: bool


Limit = Annotated[int, Field(ge=1, le=100)]

OPERATIONS = {
    "POST /v1/responses": Operation(
        tag="answers",
        summary="Answer a conversation, in the form of OpenAI's Responses API",
        body=ResponsesRequest,
        example={"input": "Hello!", "max_output_tokens": 16},
        answer=ResponseAnswer,
        events=ResponseEvent | ItemEvent | PartEvent | DeltaEvent | DoneEvent,
        done=None,
        leads_to=(
            "GET /v1/responses/{response_id}",
            "GET /v1/responses/{response_id}/input_items",
            "POST /v1/responses/{response_id}/cancel",
            "DELETE /v1/responses/{response_id}",
        ),
        errors=ANSWER,
    ),
    "POST /v1/responses/input_tokens": Operation(
        tag="answers",
        summary="How many tokens the prompt of such a conversation has",
        body=InputTokensRequest,
        example={"input": "Hello!"},
        answer=InputTokens,
        errors=COMPUTE,
    ),
    "GET /v1/responses/{response_id}": Operation(
        tag="answers",
        summary="A response that is kept",
        query={"stream": (Literal[False], "refused where true: a stream cannot be had a second time")},
        answer=ResponseAnswer,
        errors=(404,),
    ),
    "DELETE /v1/responses/{response_id}": Operation(
        tag="answers", summary="Forget a response", answer=DeletedResponse, errors=(404,)
    ),
    "POST /v1/responses/{response_id}/cancel": Operation(
        tag="answers", summary="End a response that is under way", answer=ResponseAnswer, errors=(404,)
    ),
    "GET /v1/responses/{response_id}/input_items": Operation(
        tag="answers",
        summary="The items that a response was made of, a page at a time",
        query={
            "limit": (Limit, "how many"),
            "order": (Literal["asc", "desc"], "the newest first, if nothing is said"),
            "after": (str, "only items behind the one of this id"),
        },
        answer=Items,
        errors=(404,),
    ),
}
