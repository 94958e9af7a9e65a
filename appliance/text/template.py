"""Chat templates: the model's own Jinja program, run in a sandbox over plain data."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from appliance.core.params import RequestError
from appliance.text.messages import calls_as_text, join_parts, one_call_each, plain_messages, split_parts
from appliance.text.reasoning import HARMONY, tags_of
from appliance.text.tools.formats import Granite
from appliance.text.tools.forms import FORMS, Form
from appliance.text.tools.pythonic import Lfm2
from appliance.text.turns import arguments_as_text, one_of_each, told_otherwise, unsaid
from quant.errors import InputError

MAX_CHARACTERS = 32 * 2**20  # of one rendered conversation: a template is a program and could write for ever
FIELDS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})  # of requests
MAX_BITS = 2**16  # of a number in a template
_TAIL = "\ue000the last message ends here "  # the space shows whether the template trims


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant wrote, for training. Here it is a block like any other."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would write < > & ' as escapes, which no model has seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Sandbox(ImmutableSandboxedEnvironment):
    """In which no multiplication takes long: a time limit ends a template between two operations, and not in the midst of one."""

    intercepted_binops = frozenset({"*", "**"})  # which are not computed when the template is compiled then

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise TemplateError(f"a number of more than {MAX_BITS} bits")
        elif operator == "*":
            times, sized = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and hasattr(sized, "__len__") and times * len(sized) > MAX_CHARACTERS:
                raise TemplateError(f"a product of more than {MAX_CHARACTERS} characters or elements")
        return super().call_binop(context, operator, left, right)


def _environment() -> ImmutableSandboxedEnvironment:
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _refuse
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


_ENV = _environment()


def explicit_template(given: str) -> str:
    """The template that ``--chat-template`` names or spells out. InputError where there is no such file, or it is no Jinja."""
    if not isinstance(given, str) or not given:
        raise InputError(f"--chat-template is {given!r:.80}: Jinja, or a file that holds it, is needed")
    source, where = given, "--chat-template"
    if "{" not in given:
        try:
            source, where = Path(given).read_text(encoding="utf-8"), given
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--chat-template {given}: cannot read this file ({error}), and it is no template itself") from error
    try:
        _ENV.parse(source)
    except TemplateSyntaxError as error:
        raise InputError(f"{where}: line {error.lineno}: not a Jinja template ({error.message})") from error
    return source


def explicit_defaults(given: str | None) -> dict[str, Any]:
    """The variables of ``--default-chat-template-kwargs``. InputError where these are no JSON object of such."""
    flag, example = "--default-chat-template-kwargs", """'{"enable_thinking": false}'"""
    try:
        found = {} if given is None else json.loads(given)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{flag} is {given!r:.80}: JSON is needed, as {example}") from error
    if not isinstance(found, dict):
        raise InputError(f"{flag} is {given!r:.80}: an object of the template's variables is needed, as {example}")
    if taken := sorted(FIELDS & found.keys()):
        raise InputError(f"{flag} may not hold {taken[0]!r}: that is said by each request")
    return found


class ChatTemplates:
    """The templates of one model, by name ("default", "tool_use", ...)."""

    def __init__(
        self, templates: Mapping[str, str], named_tokens: Mapping[str, str], defaults: Mapping[str, Any] | None = None
    ) -> None:
        """``defaults``: what a template is told besides, unless ``extra`` says otherwise."""
        self._sources, self._tokens = dict(templates), {**named_tokens, **(defaults or {})}
        self._compiled: dict[str, tuple[Template, Callable[[Any], Any]]] = {}  # by source

    def __bool__(self) -> bool:
        return bool(self._sources)

    @property
    def sources(self) -> tuple[str, ...]:
        """The templates themselves."""
        return tuple(self._sources.values())

    def render(
        self,
        messages: Sequence[Any],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: list[dict[str, Any]] | None,
        documents: list[dict[str, Any]] | None,
        extra: Mapping[str, Any],
    ) -> str:
        """The conversation as text. RequestError where the template, the messages or the options do not do."""
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "continue_final_message goes on with the last message, add_generation_prompt begins a new one: set one to false",
                param="continue_final_message",
            )
        if taken := sorted(FIELDS & extra.keys()):
            raise RequestError(
                f"chat_template_kwargs may not hold {taken[0]!r}: it is a field of its own", param="chat_template_kwargs"
            )
        template, convert = self._template("tool_use" if tools and "tool_use" in self._sources else "default")
        conversation = plain_messages(messages, convert)
        if tags_of(self.sources) is HARMONY:
            conversation = one_call_each(conversation)
        if (form := _form_of_calls(self.sources)) is not None:
            conversation = calls_as_text(conversation, form.write)
        if continue_final_message:
            _mark_end(conversation)
        values = {
            **self._tokens,
            **extra,
            "messages": conversation,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = _run(template, values)
        except RequestError as error:
            if isinstance(error.__cause__, TypeError):  # of texts and objects that are added up: DeepSeek's
                ways = arguments_as_text(conversation)
            elif isinstance(error.__cause__, TemplateError):
                ways = told_otherwise(conversation)
            else:
                raise
            text = _first_taken(template, values, ways, error)
        else:
            if unsaid(conversation, text) and (turns := one_of_each(conversation)) is not None:
                with contextlib.suppress(RequestError):
                    text = text if unsaid(conversation, said := _run(template, {**values, "messages": turns})) else said
        return _cut_at_mark(text) if continue_final_message else text

    def _template(self, name: str) -> tuple[Template, Callable[[Any], Any]]:
        if not self._sources:
            raise RequestError(
                "the model has no chat template: it needs one (--chat-template FILE of the server, chat_template of LLM.chat), "
                "or prompts without messages (/v1/completions, LLM.generate)",
                param="messages",
            )
        if name not in self._sources and len(self._sources) > 1:
            raise RequestError(
                f"the model has several chat templates ({', '.join(sorted(self._sources))}) and none is the default: "
                "choose one with --chat-template FILE",
                param="messages",
            )
        source = self._sources.get(name) or next(iter(self._sources.values()))
        if source not in self._compiled:
            try:
                self._compiled[source] = (_ENV.from_string(source), _content_form(source))
            except TemplateSyntaxError as error:
                raise RequestError(
                    f"the model's chat template is damaged (line {error.lineno}: {error.message}): "
                    "give another one with --chat-template FILE",
                    param="messages",
                ) from error
        return self._compiled[source]


def _form_of_calls(sources: Sequence[str]) -> Form | None:
    """How models call whose templates tell them of tools, and leave out the calls of earlier messages: Granite 3's and LFM2's."""
    if any("tool_calls" in source for source in sources):
        return None
    marks = ((Granite.openers[0], Granite), ("List of tools: ", Lfm2))
    return next((FORMS[kind][0] for mark, kind in marks if any(mark in source for source in sources)), None)


def _run(template: Template, values: dict[str, Any]) -> str:
    pieces, size = [], 0
    try:
        for piece in template.generate(values):
            size += len(piece)
            if size > MAX_CHARACTERS:
                raise TemplateError(f"it wrote more than {MAX_CHARACTERS} characters")
            pieces.append(piece)
    except Exception as error:  # a template is somebody else's program: whatever it raises is its answer to this request
        raise RequestError(f"the chat template did not accept this conversation: {error}", param="messages") from error
    return "".join(pieces)


def _first_taken(template: Template, values: dict[str, Any], ways: Iterator[list[dict[str, Any]]], error: RequestError) -> str:
    """The text of the first of these conversations that the template takes. Raises ``error`` where it takes none."""
    for told in ways:
        try:
            return _run(template, {**values, "messages": told})
        except RequestError:
            continue
    raise error from None


def _content_form(source: str) -> Callable[[Any], Any]:
    """What to make of a message's content: a template may know text only, parts only, or both (then it is left as it came)."""
    tree = _ENV.parse(source)
    names = {"content"}
    for node in tree.find_all(nodes.Assign):
        if isinstance(node.target, nodes.Name) and _is_content(node.node, names):
            names.add(node.target.name)
    if not any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For)):
        return join_parts
    if any(test.name in ("string", "iterable", "sequence", "mapping") for test in tree.find_all(nodes.Test)):
        return lambda content: content
    return split_parts


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    """Whether an expression is ``message.content``, ``message['content']`` or a variable that was set to it."""
    if isinstance(node, nodes.Filter) and node.node is not None:
        return _is_content(node.node, names)
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return (isinstance(node, nodes.Getattr) and node.attr == "content") or (isinstance(node, nodes.Name) and node.name in names)


def _mark_end(conversation: list[dict[str, Any]]) -> None:
    """Append a mark to the last message's text, to find where the template puts its end."""
    content = conversation[-1].get("content") if conversation else None
    if isinstance(content, str) and content:
        conversation[-1]["content"] = content + _TAIL
    elif isinstance(content, list) and content:
        content[-1] = {**content[-1], "text": content[-1]["text"] + _TAIL}
    else:
        raise RequestError("continue_final_message needs a last message with text to continue", param="continue_final_message")


def _cut_at_mark(text: str) -> str:
    head, mark, tail = text.rpartition(_TAIL.rstrip())
    if not mark:
        raise RequestError(
            "continue_final_message: the chat template leaves out the end of the last message", param="continue_final_message"
        )
    return head if tail.startswith(" ") else head.rstrip()
