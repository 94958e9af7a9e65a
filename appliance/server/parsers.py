"""How the text of chat answers is taken apart: by what the options say, else by what the model's chat template shows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from appliance.config import ServerConfig
from appliance.core.params import NOT_WITH_GRAMMAR, RequestError, SamplingParams, StructuredOutputsParams
from appliance.server.prompts import RENDER_S, Prompt
from appliance.server.schemas import ChatRequest, TokenizeRequest
from appliance.server.structured import compiled, form_field
from appliance.text.answer import AnswerParser, HarmonyAnswer
from appliance.text.detokenizer import MARK
from appliance.text.reasoning import HARMONY, REASONING, ReasoningParser, Tags, tags_of
from appliance.text.timelimit import TimeLimit
from appliance.text.tokenizer import Tokenizer
from appliance.text.tools.choice import Forced, ToolChoice, forced, tool_choice
from appliance.text.tools.detect import detect
from appliance.text.tools.formats import PARSERS, Mistral, nine_characters
from appliance.text.tools.forms import FORMS
from appliance.text.tools.forms import HARMONY as HARMONY_FORM
from appliance.text.tools.grammar import harmony, lark
from appliance.text.tools.harmony import MARKERS, MESSAGE, START, Harmony
from appliance.text.tools.parser import ToolParser
from quant.errors import InputError

T = TypeVar("T")
Conversation = TypeVar("Conversation", ChatRequest, TokenizeRequest)
TAIL = 64  # tokens at the end of a prompt that show whether the answer begins within reasoning


@dataclass(frozen=True)
class Parsers:
    """What one server uses for all its answers."""

    tools: type[ToolParser] | None = None
    tags: Tags | None = None
    tokenizer: Tokenizer | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, config: ServerConfig) -> Parsers:
        """Raises InputError where an option names no parser, or the chat template has no end."""
        tools = _named("--tool-call-parser", config.tool_call_parser, PARSERS)
        tags = _named("--reasoning-parser", config.reasoning_parser, REASONING)
        if tokenizer is not None and tokenizer.has_chat_template:
            found = _tried_out(tokenizer, config)
            if config.tool_call_parser == "auto":
                tools = PARSERS.get(found or "")
            if config.reasoning_parser == "auto":
                tags = tags_of(tokenizer.chat_templates)
        return cls(*_as_one(tools, tags, config), tokenizer)

    @property
    def ends_thoughts(self) -> bool:
        """Whether a token of its own ends what this model thinks, so that thoughts can be given a budget."""
        return self.tags is not None and self.tokenizer is not None and self.tokenizer.added(self.tags.end) is not None

    def choice(self, body: ChatRequest, params: SamplingParams | None = None) -> ToolChoice:
        """What a request says of tools. Raises RequestError, also where this model's calls cannot be read.

        Where something in ``params`` does not go with a grammar, or there is one already, strict tools are free like others.
        """
        if body.tool_choice == "none":
            return ToolChoice()  # the tools do not matter
        if body.tools and self.tools is None:
            message = (
                "tools: the model's chat template tells of no tools, or shows no calls of a known form: name it with "
                f"--tool-call-parser ({', '.join([*PARSERS][:4])}, ...: docs/api.md), or set tool_choice to 'none'"
            )
            raise RequestError(message, param="tools", code="unsupported_parameter")
        choice = tool_choice(body.tools, body.tool_choice)
        if params is None or not (
            params.structured_outputs is not None
            or params.use_beam_search
            or any(getattr(params, name) != value for name, value in NOT_WITH_GRAMMAR.items())
        ):
            return choice
        return replace(choice, loose=True, formed=params.structured_outputs is not None)

    def fitted(self, body: Conversation) -> Conversation:
        """With ids of calls that the model's template takes: a conversation may have been begun elsewhere."""
        if self.tools is not Mistral or body.messages is None:
            return body
        return body.model_copy(update={"messages": [_fitted(message) for message in body.messages]})

    async def held(self, params: SamplingParams, choice: ToolChoice, body: ChatRequest, prompt: Prompt) -> SamplingParams:
        """The parameters with a grammar of the whole answer, where calls are a must, a tool is strict, or the answer has a form.

        The form begins behind reasoning, and the model may call tools instead. Raises RequestError where that cannot be.
        """
        must, form, free = choice.mode in ("required", "named"), params.structured_outputs, choice.strict
        if not (must or free or form) or not (grammar := self._around(choice, body, prompt, formed=not must and not free)):
            return params
        calls = await asyncio.to_thread(self._forced, choice, body, free) if choice.parses else None  # a hundred tools: 0.1 s
        around = await asyncio.to_thread(grammar, calls)
        parts = await asyncio.to_thread(_schemas, choice, calls) if calls else None
        if form is None or must:
            form = StructuredOutputsParams(grammar=around)
            return replace(params, structured_outputs=form, grammar=await compiled(form, ours=True, parts=parts))
        return replace(params, grammar=await compiled(form, around, parts=parts))

    def _around(
        self, choice: ToolChoice, body: ChatRequest, prompt: Prompt, *, formed: bool
    ) -> Callable[[Forced | None], str] | None:
        """Makes the grammar of the whole answer out of its calls; None where all of it is the form."""
        specials = self._specials(choice)
        if self.tags is HARMONY:
            if missing := sorted({*MARKERS} - {*specials}):
                told = f"the answer cannot be held to a form: {missing[0]} is no special token of this model's tokenizer"
                raise RequestError(told, param=form_field(body), code="unsupported_parameter")
            place = Harmony(before=self._begun(prompt)).place
            if formed and place == "content":
                return None
            return partial(harmony, place=place, formed=formed, free=choice.strict, specials=specials)
        before = self._before(body, prompt)
        tags = None if self.tags is None or self.tags.closed(*before) else self.tags
        if formed and not (tags or choice.parses):
            return None
        opened = tags is not None and tags.opened(*before)
        markers = self.tools.openers if self.tools is not None and choice.strict else ()
        return partial(lark, tags=tags, opened=opened, formed=formed, markers=markers, specials=specials)

    def _forced(self, choice: ToolChoice, body: ChatRequest, strict: bool) -> Forced:
        assert self.tools is not None and self.tokenizer is not None  # choice() and the prompt have seen to that
        if self.tags is HARMONY:
            return forced(choice, HARMONY_FORM, parallel=False, strict=strict)
        forms = FORMS[self.tools]
        form = forms[0] if len(forms) == 1 or self.tokenizer.special_among((Mistral.ARGS,)) else forms[1]
        return forced(choice, form, parallel=body.parallel_tool_calls, strict=strict)

    def shown(self, choice: ToolChoice) -> dict[int, str]:
        """The special tokens that mark calls and reasoning, and what is written in the text for them."""
        mark = MARK if self.tags is HARMONY else ""  # others know their markers by what stands around them
        return {i: mark + marker for marker, i in self._specials(choice).items()}

    def _specials(self, choice: ToolChoice) -> dict[str, int]:
        """The markers of calls and reasoning that are special tokens, and their ids."""
        markers = (*(self.tags.special if self.tags else ()), *(self.tools.special if self.tools and choice.parses else ()))
        if self.tags is HARMONY:
            markers = MARKERS
        return {one: i for one in markers for i in self.tokenizer.special_among([one])} if self.tokenizer else {}

    def new(self, choice: ToolChoice, body: ChatRequest, prompt: Prompt) -> AnswerParser:
        """For one answer."""
        if self.tags is HARMONY:
            return HarmonyAnswer(self._begun(prompt), self.shown(choice), calls=choice.parses, parallel=body.parallel_tool_calls)
        opened = self.tags is not None and self.tags.opened(*self._before(body, prompt))
        reasoning = ReasoningParser(self.tags, opened=opened) if self.tags else None
        known = [one["name"] for one in choice.functions] if choice.strict else []
        tools = None
        if self.tools is not None and choice.parses:
            tools = self.tools(known=known, functions=choice.functions, held=choice.held)
        return AnswerParser(reasoning, tools, parallel=body.parallel_tool_calls)

    def _begun(self, prompt: Prompt) -> str:
        """What a prompt in the format of gpt-oss has of the message that the answer goes on with."""
        _, start, begun = self._text(prompt).rpartition(START)
        return start + begun if start else MESSAGE  # that began before what was left of the prompt

    def _before(self, body: ChatRequest, prompt: Prompt) -> tuple[str, str | None]:
        """What stands before an answer, as ``Tags`` asks for it: the prompt, and the text of a message that it goes on with."""
        if body.continue_final_message:
            content = body.messages[-1].get("content")
            parts = content if isinstance(content, list) else [content]
            return "", "".join(str(part.get("text") if isinstance(part, Mapping) else part) for part in parts)
        return self._text(prompt), None

    def _text(self, prompt: Prompt) -> str:
        """The end of it, where it was truncated."""
        if prompt.text is not None:
            return prompt.text
        assert self.tokenizer is not None  # the prompt was rendered
        return self.tokenizer.decode(list(prompt.token_ids[-TAIL:]), skip_special_tokens=False)


def _schemas(choice: ToolChoice, calls: Forced) -> dict[str, str]:
    """Of the functions whose arguments are held: name -> schema as JSON."""
    both = zip(choice.functions, calls.alternatives, strict=True)
    held = ((f, one) for f, one in both if not choice.strict or f.get("strict"))
    return {f["name"]: json.dumps(one.schema, ensure_ascii=False) for f, one in held}


def _fitted(message: dict[str, Any]) -> dict[str, Any]:
    fitted = dict(message)
    if isinstance(call_id := message.get("tool_call_id"), str):
        fitted["tool_call_id"] = nine_characters(call_id)
    if isinstance(calls := message.get("tool_calls"), list):
        known = [isinstance(call, Mapping) and isinstance(call.get("id"), str) for call in calls]
        fitted["tool_calls"] = [
            {**call, "id": nine_characters(call["id"])} if ok else call for call, ok in zip(calls, known, strict=True)
        ]
    return fitted


def _tried_out(tokenizer: Tokenizer, config: ServerConfig) -> str | None:
    """The name of the parser that reads the calls of the model's chat template; here it shows, too, where that has no end."""
    try:
        return TimeLimit(RENDER_S).run(partial(detect, tokenizer.chat))
    except TimeoutError as error:
        given = config.chat_template
        name = "the model's chat template" if given is None else f"--chat-template{'' if '{' in given else f' {given}'}"
        raise InputError(f"{name}: {error} to write a question and a call: give another one with --chat-template FILE") from None


def _named(flag: str, name: str, known: Mapping[str, T]) -> T | None:
    if name in ("auto", "none", ""):
        return None
    if name not in known:
        raise InputError(f"{flag} {name}: there is no such parser: auto, none, {', '.join(known)}")
    return known[name]


def _as_one(
    tools: type[ToolParser] | None, tags: Tags | None, config: ServerConfig
) -> tuple[type[ToolParser] | None, Tags | None]:
    """Calls and reasoning of gpt-oss are one format: either option means both. InputError where the other says otherwise."""
    if tools is not Harmony and tags is not HARMONY:
        return tools, tags
    for flag, name, known in (
        ("--tool-call-parser", config.tool_call_parser or "none", ("auto", "openai", "none")),
        ("--reasoning-parser", config.reasoning_parser or "none", ("auto", "openai_gptoss")),
    ):
        if name not in known:
            told = f"calls and reasoning of gpt-oss are one format, and the model or the other option has it: {', '.join(known)}"
            raise InputError(f"{flag} {name}: {told}")
    return Harmony if config.tool_call_parser not in ("none", "") else None, HARMONY
