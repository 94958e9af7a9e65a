"""A turn as OpenAI's response object, and as the events of a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from appliance.server.errors import describe
from appliance.server.logprobs import Logprobs
from appliance.server.responses.events import Event, Numbered, Output
from appliance.server.responses.items import Item
from appliance.server.responses.schemas import ResponsesRequest
from appliance.server.responses.store import Record
from appliance.server.responses.tools import left_out, namespaced
from appliance.server.turn import Turn
from appliance.text.output import Delta

_UNSAID = {"description": None, "parameters": None, "strict": None}  # of a function
ENDS = {"length": "incomplete", "abort": "cancelled"}  # how an answer ended -> the response's status, else "completed"


class ResponseView:
    def __init__(self, turn: Turn, body: ResponsesRequest, response_id: str, given: list[Item], key: str | None) -> None:
        """``given``: the body's own input. ``key``: whose it is."""
        self.turn, self.job, self.state, self.body = turn, turn.job, turn.state, body
        self.job.id, self.given, self.key = response_id, given, key
        self.event = Numbered()
        self.output = Output(self.event, namespaced(body.tools))
        self.format = Logprobs(self.state, self.job.pace, as_ids=False)

    async def batches(self) -> AsyncGenerator[list[Event], None]:
        """Events; those of one delta are a batch. The last one of all has the whole response."""
        store, ended = self.state.shared.responses, False
        try:
            async with aclosing(self.turn.announced()) as all_:
                async for one in all_:
                    if one is None:
                        begun = self._keep("in_progress")
                        yield [self.event("response.created", response=begun), self.event("response.in_progress", response=begun)]
                        continue
                    _, delta, news = one
                    batch = self.output.push(news, await self._scored(delta))
                    if delta.finish_reason is not None:
                        batch += self._end(ENDS.get(delta.finish_reason, "completed"))
                        ended = True
                    if batch:
                        yield batch
        finally:
            if not ended and self.body.store and (record := store.find(self.key, self.job.id)) and record.job:
                store.delete(self.key, self.job.id)  # its client went away

    def _end(self, status: str) -> list[Event]:
        events = self.output.finish("completed" if status == "completed" and not self.turn.cut(0) else "incomplete")
        kind = "response.completed" if status == "completed" else "response.incomplete"
        return [*events, self.event(kind, response=self._keep(status))]

    def failed(self, error: Exception) -> list[Event]:
        """The end of a stream on which something failed."""
        http, body = describe(error)
        code = "rate_limit_exceeded" if http == 429 else "server_error"
        events = self.output.close("incomplete")
        response = self._keep("failed", error={"code": code, "message": body["error"]["message"]})
        return [*events, self.event("response.failed", response=response)]

    def _keep(self, status: str, **more: Any) -> dict[str, Any]:
        """The response as it is now, which is kept if the body says so."""
        response = self._response(status) | more
        if self.body.store:
            running = self.job if status == "in_progress" else None
            self.state.shared.responses.put(self.key, Record.of(response, self.given, running))
        return response

    async def _scored(self, delta: Delta) -> list[Any]:
        """Log-probabilities of what is text: not of the token that ends it."""
        if not self.body.scored or not delta.logprobs:
            return []
        silent = delta.finish_reason == "stop" and not isinstance(delta.stop_reason, str)
        shown = delta.logprobs[:-1] if silent and not self.job.params.include_stop_str_in_output else delta.logprobs
        entries = [entry async for entry in self.format.entries(shown, self.body.top_logprobs or 0)]
        for one in (*entries, *(top for entry in entries for top in entry["top_logprobs"])):
            one["bytes"] = one["bytes"] or []
        return entries

    def _response(self, status: str) -> dict[str, Any]:
        body, params = self.body, self.job.params
        response: dict[str, Any] = {
            "id": self.job.id,
            "object": "response",
            "created_at": int(self.job.begun),
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "model": self.job.model,
            "output": [] if status == "in_progress" else self.output.items,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort, "summary": body.reasoning.summary},
            "service_tier": "default",
            "store": body.store and self.state.shared.responses.most > 0,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "top_logprobs": body.top_logprobs or 0,
            "text": {"format": body.text.format or {"type": "text"}, "verbosity": "medium"},
            "tool_choice": body.tool_choice or "auto",
            "tools": [
                {**({} if tool.get("type") == "namespace" else _UNSAID), **tool}
                for tool in body.tools or ()
                if not left_out(tool)
            ],
            "truncation": body.truncation,
            "metadata": body.metadata,
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
            **({"user": body.user} if body.user is not None else {}),
        }
        return response if status == "in_progress" else {**response, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        usage = self.turn.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},  # keeping them costs nothing
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }
