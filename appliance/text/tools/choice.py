"""What a request says about tools: the tools themselves, and ``tool_choice``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from appliance.core.params import RequestError
from appliance.text.schema import constraining
from appliance.text.tools.forms import Form
from appliance.text.tools.tags import Tagging, check_name, check_tags

MAX_TOOLS = 1024  # of a request; about ten microseconds each
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class ToolChoice:
    """``auto``: the model decides. ``none``: it is told of no tools. ``required``, ``named``: it must call, see ``forced``."""

    mode: Literal["auto", "none", "required", "named"] = "none"
    tools: tuple[dict[str, Any], ...] = ()  # for the chat template: as sent, with what the template may ask for
    name: str | None = None  # of the function, where mode is "named"
    loose: bool = False  # strict tools are free like others
    formed: bool = False  # the answer has a form, and is calls instead where the model likes

    @property
    def parses(self) -> bool:
        """Whether calls are looked for in the answer."""
        return self.mode != "none"

    @property
    def functions(self) -> list[dict[str, Any]]:
        """The functions that may be called."""
        all_ = [tool["function"] for tool in self.tools]
        return [one for one in all_ if one["name"] == self.name] if self.mode == "named" else all_

    @property
    def strict(self) -> bool:
        """Whether the model decides, and a function's arguments have to fit its parameters if it calls that one."""
        return self.mode == "auto" and not self.loose and any(one.get("strict") for one in self.functions)

    @property
    def held(self) -> list[str]:
        """The functions whose arguments a grammar holds to their parameters."""
        every = self.formed or self.mode in ("required", "named")
        return [one["name"] for one in self.functions if every or (self.strict and one.get("strict"))]


def tool_choice(tools: Any, choice: Any) -> ToolChoice:
    """Read a request's ``tools`` and ``tool_choice`` (None: not given). Raises RequestError that names the field."""
    if tools is not None and not isinstance(tools, list):
        raise RequestError(f"tools must be a list, got {type(tools).__name__}", param="tools")
    if tools is not None and len(tools) > MAX_TOOLS:
        raise RequestError(f"tools has {len(tools)} entries: at most {MAX_TOOLS} are taken", param="tools")
    seen: set[str] = set()
    for i, tool in enumerate(tools or ()):
        _check(tool, f"tools[{i}]", seen)
    given = tuple(_completed(tool) for tool in tools or ())
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        choice, allowed = _allowed(choice.get("allowed_tools"), seen)
        given = tuple(tool for tool in given if tool["function"]["name"] in allowed)
    if choice is None or choice in ("auto", "none"):
        return ToolChoice("auto" if given and choice != "none" else "none", given)
    name = _named(choice)
    if not given:
        raise RequestError("tool_choice needs tools", param="tool_choice")
    if name is None:
        return ToolChoice("required", given)
    if name not in seen:
        raise RequestError(f"tool_choice names {name!r}, tools are: {', '.join(sorted(seen))}", param="tool_choice")
    return ToolChoice("named", given, name)


def _check(tool: Any, where: str, seen: set[str]) -> None:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        raise RequestError(f"{where} must be {{'type': 'function', 'function': {{...}}}}, got {tool!r:.80}", param=where)
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where}.function.name must be text, got {name!r:.80}", param=f"{where}.function.name")
    if name in seen:
        raise RequestError(f"{where}.function.name: there are two tools called {name!r:.80}", param=f"{where}.function.name")
    seen.add(name)
    if not isinstance(strict := function.get("strict") or False, bool):
        raise RequestError(f"{where}.function.strict must be true or false, got {strict!r:.80}", param=f"{where}.function.strict")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        message = f"{where}.function.parameters must be a JSON schema, got {parameters!r:.80}"
        raise RequestError(message, param=f"{where}.function.parameters")


def _completed(tool: Mapping[str, Any]) -> dict[str, Any]:
    """With a description and parameters, which some templates (Hermes 3) cannot do without, and without fields that are null."""
    function = {k: v for k, v in tool["function"].items() if v is not None}
    for name, value in (("description", ""), ("parameters", _NO_PARAMETERS)):
        function.setdefault(name, value)
    return {**{k: v for k, v in tool.items() if v is not None}, "type": "function", "function": function}


def _allowed(given: Any, known: set[str]) -> tuple[str, set[str]]:
    """(mode, the names of the tools that there are left) of a choice of several: what is not allowed is not there."""
    message = "tool_choice.allowed_tools must be {'mode': 'auto' or 'required', 'tools': [{'type': 'function', ...}]}"
    if (
        not isinstance(given, Mapping)
        or given.get("mode") not in ("auto", "required")
        or not isinstance(given.get("tools"), list)
    ):
        raise RequestError(f"{message}, got {given!r:.80}", param="tool_choice")
    names = [_named(tool) for tool in given["tools"]]
    if unknown := next((name for name in names if name not in known), None):
        raise RequestError(f"tool_choice names {unknown!r:.80}, tools are: {', '.join(sorted(known))}", param="tool_choice")
    return given["mode"], {name for name in names if name is not None}


def _named(choice: Any) -> str | None:
    """The name that a tool_choice says, None where it says "required"."""
    if choice == "required":
        return None
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type", "function") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        message = "tool_choice is 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}"
        raise RequestError(f"{message}, got {choice!r:.80}", param="tool_choice")
    return name


@dataclass(frozen=True)
class Forced:
    """What constrained decoding lets a model write where it must call: ``before``, calls with ``between`` two, ``after``.

    A call is the ``begin`` of one alternative, JSON that fits its ``schema`` (``tagged``: in tags), and ``end``. There are at
    least one and at most ``most`` calls (None: any number).
    """

    alternatives: tuple[Alternative, ...]
    between: str
    before: str
    after: str
    most: int | None
    tagged: Tagging | None = None


@dataclass(frozen=True)
class Alternative:
    begin: str
    schema: dict[str, Any]
    end: str


def forced(choice: ToolChoice, form: Form, *, parallel: bool = True, strict: bool = False) -> Forced:
    """Any of the tools, several if ``parallel``; in the mode "named" one call of that one.

    ``strict``: of those that are not, the arguments are any object. Raises RequestError for tools that the format cannot hold.
    """

    def schema(f: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "object"} if strict and not f.get("strict") else parameters(f)

    alternatives = tuple(Alternative(form.begin(f["name"]), schema(f), form.closing) for f in choice.functions)
    for f, one in zip(choice.functions, alternatives, strict=True) if not form.as_json else ():
        check_name(f["name"])
        if form.tagged:
            check_tags(f["name"], one.schema, form.tagged)
    most = None if parallel and choice.mode != "named" else 1
    return Forced(alternatives, form.between, form.before, form.after, most, form.tagged)


def parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments: always an object, by OpenAI's word an empty one where none is given.

    Without its descriptions and the like, which take room in a grammar.
    """
    given = function.get("parameters") or _NO_PARAMETERS
    with contextlib.suppress(RecursionError):  # one so deep is left as it is
        given = constraining(given, formats=False)
    return {**given, "additionalProperties": False} if given == _NO_PARAMETERS else {"type": "object", **given}


def schema(choice: ToolChoice, *, parallel: bool = True) -> dict[str, Any]:
    """One JSON schema for the calls of "required" as a list of ``{"name", "parameters"}``, whatever format the model knows."""
    one = [
        {
            "type": "object",
            "properties": {"name": {"const": f["name"]}, "parameters": parameters(f)},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for f in choice.functions
    ]
    limit = {} if parallel and choice.mode == "required" else {"maxItems": 1}
    return {"type": "array", "minItems": 1, "items": {"anyOf": one}, **limit}
