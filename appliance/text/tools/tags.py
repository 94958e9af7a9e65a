"""Calls that are written in tags: arguments are text, and the tool's parameters say what that stands for.

Where a grammar holds the model to the parameters, a string without constraints is text, and all else is JSON (``as_text``).
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from appliance.core.params import RequestError
from appliance.text.schema import NOTES
from appliance.text.tools.parser import ToolParser
from appliance.text.tools.reader import Step, Steps

_NAME, _KEY = re.compile(r"[-\w.:/]*"), re.compile(r'[^"<>\n]*')
KEYWORD = re.compile(r"[^\s\x00-/:-@\[-^`{-\x7f]*")  # \w knows no vowel signs, of which names may be full
_OF_ALL = frozenset({
    "anyOf", "oneOf", "allOf", "not", "if", "then", "else", "$ref", "$dynamicRef", "$recursiveRef", "enum", "const",
    "minProperties", "maxProperties", "propertyNames", "patternProperties", "dependencies", "dependentRequired",
    "dependentSchemas", "unevaluatedProperties",
})  # fmt: skip
"""Those that constrain all arguments together, or such as have no names."""

_SOURCE = "<what a model wrote>"
warnings.filterwarnings("ignore", module=re.escape(_SOURCE))  # Python's compiler's, of such text alone and in every thread


class Tagging(NamedTuple):
    """The tags of an argument: before its name, between that and its value (line by line), and behind it."""

    before: str
    between: str
    end: str = ""  # none: the value is JSON, and a comma stands between two

    def begin(self, key: str) -> str:
        return self.before + key + self.between


class Tagged(ToolParser):
    """What such formats share. Each argument is given out as JSON when it is complete, white space between tags is none.

    Where a call's tags are broken its arguments end; the rest is content.
    """

    tags: Tagging

    def call(self, name: str, close: str) -> Step[bool]:
        """Read a call's arguments and the tag ``close`` behind them. False where something else stands there."""
        self.begin(name, "{")
        self._ending = True
        whole = yield from self._arguments(name, close)
        self._ending = False
        return whole

    def _arguments(self, name: str, close: str) -> Step[bool]:
        given = next((one.get("parameters") for one in self.functions if one.get("name") == name), None)
        types = given.get("properties") if isinstance(given, Mapping) else None
        between = ""
        while True:
            yield from self.peek()
            if (yield from self.sees(close)):
                self.give("}")
                return True
            if not (yield from self.sees(self.tags.before)):
                return False
            key = yield from self.run_of(_KEY)
            for number, part in enumerate(self.tags.between.split("\n")):
                if number:
                    yield from self.peek()
                if not (yield from self.sees(part)):
                    return False
            value = yield from self._value(types.get(key) if isinstance(types, Mapping) else None, name in self.held_names)
            self.give(f"{between}{json.dumps(key, ensure_ascii=False)}: {value}")
            between = ", "

    def _value(self, schema: Any, held: bool) -> Step[str]:
        start = self.at
        if held and schema is not None and not as_text(schema, self.tags) and (yield from self.value()):
            text = self.held[start : self.at]
            if _is_json(text) and (yield from self.sees(self.tags.end)):
                return text
        self.at = start
        return typed((yield from self.until(self.tags.end)), schema)


class SeedOss(Tagged):
    """``<seed:tool_call><function=f><parameter=a>1</parameter></function></seed:tool_call>``."""

    START, END = "<seed:tool_call>", "</seed:tool_call>"
    openers: tuple[str, ...] = (START,)
    ends = special = (START, END)
    head: tuple[str, str, str] = ("<function=", ">", "</function>")  # before a call's name, behind it, and behind its arguments
    tags = Tagging("<parameter=", ">", "</parameter>")

    def read(self, marker: str) -> Steps:
        yield from self.peek()
        while (yield from self.sees(self.head[0])):
            name = yield from self.run_of(_NAME)
            if not name or not (yield from self.sees(self.head[1])):
                return
            if not (yield from self.call(name, self.head[2])):
                return
            yield from self.peek()
            if (yield from self.sees(self.END)):
                self.drop()
                return


class Qwen3Coder(SeedOss):
    """``<tool_call><function=f><parameter=a>1</parameter></function></tool_call>``: Qwen3-Coder, Qwen 3.5, Step 3.5."""

    START, END = "<tool_call>", "</tool_call>"
    openers = (START,)
    ends = special = (START, END)


class MiniMaxM2(SeedOss):
    """``<minimax:tool_call><invoke name="f"><parameter name="a">1</parameter></invoke></minimax:tool_call>``."""

    START, END = "<minimax:tool_call>", "</minimax:tool_call>"
    openers = (START,)
    ends = special = (START, END)
    head = ('<invoke name="', '">', "</invoke>")
    tags = Tagging('<parameter name="', '">', "</parameter>")


class Glm(Tagged):
    """``<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>``: GLM-4.5 and later ones."""

    START, END = "<tool_call>", "</tool_call>"
    openers = (START,)
    tags = Tagging("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>")
    ends = (START, END)
    special = (*ends, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

    def read(self, marker: str) -> Steps:
        yield from self.peek()
        name = yield from self.run_of(_NAME)
        yield from self.peek()
        start = self.at
        if name and ((yield from self.sees(self.tags.before)) or (yield from self.sees(self.END))):
            self.at = start
            yield from self.call(name, self.END)


def as_text(schema: Any, tags: Tagging) -> bool:
    """Whether a value that a grammar holds is written as text, and not as JSON: a string, any or one of a list."""
    if not tags.end or not isinstance(schema, Mapping) or not set(schema) <= NOTES | {"type", "enum"}:
        return False
    if "enum" not in schema:
        return schema.get("type") == "string"
    some = schema["enum"]
    if not isinstance(some, list) or not all(isinstance(one, str) and tags.end not in one for one in some):
        return False
    return bool(some) and all(typed(one, schema) == json.dumps(one, ensure_ascii=False) for one in some)


def in_tags(arguments: str, tags: Tagging) -> str:
    """Arguments (a JSON object) as the model writes them."""
    if not tags.end:
        return ", ".join(
            f"{tags.begin(key)}{json.dumps(value, ensure_ascii=False)}" for key, value in json.loads(arguments).items()
        )
    return "".join(
        f"{tags.begin(key)}{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}{tags.end}\n"
        for key, value in json.loads(arguments).items()
    )


def check_name(name: str) -> None:
    """RequestError where a name does not go into the markup in which a model writes calls."""
    if not name or not _NAME.fullmatch(name):
        told = f"{name!r:.80} does not go into the markup in which this model writes calls: letters, digits and -_.:/ do"
        raise RequestError(f"tools: {told}", param="tools")


def check_tags(name: str, schema: Mapping[str, Any], tags: Tagging) -> None:
    """RequestError where arguments in tags cannot be held to a schema."""
    wrong = next((key for key in schema if key in _OF_ALL), None)
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    if wrong is not None:
        told = (
            f"the parameters of {name!r:.80} have {wrong!r:.80}: this model writes arguments in tags, which nothing holds to that"
        )
    elif not isinstance(properties, Mapping) or not isinstance(required, list):
        told = f"the parameters of {name!r:.80} must have an object of properties and a list of those that are required"
    else:
        fits = _KEY if tags.end else KEYWORD
        keys = [*properties, *required]
        bad = next((key for key in keys if not isinstance(key, str) or not key or not fits.fullmatch(key)), None)
        if bad is None:
            return
        told = f"the parameters of {name!r:.80} have one called {bad!r:.80}, which does not go into a tag"
    raise RequestError(f"tools: {told}", param="tools")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _from_json(text: str) -> Any:
    """Line breaks within strings are let pass."""
    return json.loads(text, strict=False)


def _from_python(text: str) -> Any:
    return ast.literal_eval(ast.parse(text, _SOURCE, "eval"))


def _from_broken_python(text: str) -> Any:
    """The same of what Python would take without line breaks within strings."""
    return _from_python(text.replace("\r", "\\r").replace("\n", "\\n"))


def typed(text: str, schema: Any) -> str:
    """An argument as JSON. A line break at either end belongs to the tags.

    What is no string by ``schema`` is read as JSON, or as Python writes it; without a type objects and lists are. What cannot be
    read so is text.
    """
    text = text.removeprefix("\n").removesuffix("\n")
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind != "string" and (kind is not None or text.lstrip()[:1] in ("{", "[")):
        for read in (_from_json, _from_python, _from_broken_python):
            try:
                return json.dumps(read(text.strip()), ensure_ascii=False, allow_nan=False)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue
    return json.dumps(text, ensure_ascii=False)
