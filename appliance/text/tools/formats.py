"""The ways models write tool calls."""

from __future__ import annotations

import re
import secrets
import string
from hashlib import sha256

from appliance.text.tools.gemma import FunctionGemma, Gemma4
from appliance.text.tools.harmony import Harmony
from appliance.text.tools.marked import DeepSeekV3, DeepSeekV31, KimiK2, SolarOpen
from appliance.text.tools.parser import ToolParser
from appliance.text.tools.pythonic import Lfm2, Olmo3
from appliance.text.tools.reader import Step, Steps, decoded, first
from appliance.text.tools.tags import Glm, MiniMaxM2, Qwen3Coder, SeedOss

_KEYS = frozenset({"name", "parameters", "arguments", "type", "id"})
_NAME, _ID = re.compile(r"[-\w.:/]*"), re.compile(r"[a-zA-Z0-9]*")
_FIRST_BRACE, _NEXT_CALL, _BRACE = re.compile(r"\s*\{"), re.compile(r"\s*;?\s*\{"), re.compile(r"(?<=\S)\s*\{")


class Hermes(ToolParser):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes 2 Pro and 3, Qwen 2.5 and 3, QwQ, Granite 4.

    Several objects may stand between two markers, and the last marker may be missing.
    """

    START, END = "<tool_call>", "</tool_call>"
    openers: tuple[str, ...] = (START,)
    ends = special = (START, END)

    def read(self, marker: str) -> Steps:
        if marker == self.END:  # text stood between it and the call
            self.openers = (self.START,)
            self.drop()
            return
        calls = self.count
        while (yield from self.peek()) == "{" and (yield from self.object()):
            pass
        if self.count > calls:
            if (yield from self.sees(self.END)):
                self.drop()
            else:
                self.openers = (self.START, self.END)


class Llama3Json(ToolParser):
    """``{"name": ..., "parameters": {...}}`` at the start of the text or of a line, or behind ``<|python_tag|>``: Llama 3.1 to 4.

    Calls are separated by ";" or white space. Other JSON is content, and so is what Llama writes for its built-in tools
    (``<|python_tag|>brave_search.call(...)``). Where ``known`` holds names, only ``{"name": "<one of them>"`` begins a call
    without a marker (``{"type": "function", `` may come before the name): other keys and names are an answer's own.
    """

    TAG = "<|python_tag|>"
    openers = ends = special = (TAG,)

    def opener(self) -> tuple[int, int, str] | None:
        brace = (_NEXT_CALL if self.fresh and self.count else _FIRST_BRACE).match(self.held)
        if brace is None or not (self.fresh or "\n" in brace[0]):
            brace = next((one for one in _BRACE.finditer(self.held) if "\n" in one[0]), None)
        tag = first(self.held, self.openers)
        if brace is not None and (tag is None or brace.end() <= tag[0]):
            return brace.start(), brace.end(), "{"
        return super().opener()

    def safe(self) -> int:
        return 0 if self.fresh and self.count and self.held.strip() == ";" else super().safe()

    def is_layout(self, text: str) -> bool:
        return text == ";" or super().is_layout(text)

    def read(self, marker: str) -> Steps:
        if marker == "{":
            self.at -= 1
            if not self.known or (yield from self._begins()):
                yield from self.object(_KEYS)
        elif (yield from self.peek()) == "{":
            yield from self.object()

    def _begins(self) -> Step[bool]:
        """Whether a call of a known tool begins with the brace that comes next. Only the brace is read if not."""
        start = self.at
        known = yield from self._head()
        self.at = start if known else start + 1
        return known

    def _head(self) -> Step[bool]:
        self.at += 1
        yield from self.peek()
        typed = ('"type"', ":", '"function"', ",") if (yield from self.sees('"type"')) else ()
        for part in (*typed[1:], '"name"', ":"):
            yield from self.peek()
            if not (yield from self.sees(part)):
                return False
        yield from self.peek()
        for name in self.known:
            if (yield from self.sees(name)):
                return True
        return False


class Mistral(ToolParser):
    """``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``, or ``[TOOL_CALLS]name[ARGS]{...}`` for each call (newer models).

    Ids have nine letters and digits: the models' templates take no others. ``[CALL_ID]`` behind a name says the model's own.
    """

    MARKER, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
    openers = ends = (MARKER,)
    special = (MARKER, CALL_ID, ARGS)

    @staticmethod
    def make_id() -> str:
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    def read(self, marker: str) -> Steps:
        mark = yield from self.peek()
        if mark == "[":
            self.at += 1
            yield from self.listed()
        elif mark == "{":
            yield from self.object()
        else:
            yield from self._named()

    def _named(self) -> Steps:
        name = yield from self.run_of(_NAME)
        call_id = None
        yield from self.peek()
        if (yield from self.sees(self.CALL_ID)):
            yield from self.peek()
            call_id = yield from self.run_of(_ID)
            yield from self.peek()
        yield from self.sees(self.ARGS)
        if (yield from self.peek()) == "{" and name:
            self.begin(name, call_id=call_id)
            yield from self.arguments()


class Granite(ToolParser):
    """``<|tool_call|>[{"name": ..., "arguments": {...}}, ...]``: Granite 3. 3.1 writes ``<tool_call>``, no token there."""

    openers: tuple[str, ...] = ("<|tool_call|>", "<tool_call>")
    ends = special = openers

    def read(self, marker: str) -> Steps:
        calls = self.count
        if (yield from self.peek()) == "[":
            self.at += 1
            yield from self.listed()
        if self.count > calls and not self.at and self.ends != self.openers:
            yield from self.peek()
            if (yield from self.sees(self.ends[-1])):
                self.drop()


class Hunyuan(Granite):
    """``<tool_calls>[{"name": ..., "arguments": {...}}, ...]</tool_calls>``: Hunyuan, Apriel."""

    openers = ("<tool_calls>",)
    ends = special = ("<tool_calls>", "</tool_calls>")


class Phi4Mini(Granite):
    """``functools[{"name": ..., "arguments": {...}}, ...]``: Phi-4-mini."""

    openers = ends = special = ("functools[",)

    def read(self, marker: str) -> Steps:
        yield from self.listed()


class Apertus(ToolParser):
    """``<|tools_prefix|>[{"f": {...}}, ...]<|tools_suffix|>``: a call is an object of its own, its name the key."""

    START, END = "<|tools_prefix|>", "<|tools_suffix|>"
    openers = (START,)
    ends = special = (START, END)

    def read(self, marker: str) -> Steps:
        mark = yield from self.peek()
        whole = mark == "["
        while whole and mark in "[,":
            self.at += 1
            whole = yield from self._call()
            if whole:
                mark = yield from self.peek()
        if not whole or mark != "]":
            return
        self.at += 1
        self.drop()
        yield from self.peek()
        if (yield from self.sees(self.END)):
            self.drop()

    def _call(self) -> Step[bool]:
        """Read one call. False where it does not fit."""
        if (yield from self.peek()) != "{":
            return False
        self.at += 1
        if (yield from self.peek()) != '"':
            return False
        name = decoded((yield from self.string()))
        for mark in ":{":
            if (yield from self.peek()) != mark:
                return False
            self.at += mark == ":"
        if not isinstance(name, str) or not name:
            return False
        self.begin(name)
        yield from self.arguments()
        self._ending = True
        whole = (yield from self.peek()) == "}"
        self.at += whole
        self._ending = False
        if whole:
            self.drop()
        return whole


def nine_characters(call_id: str) -> str:
    """An id as Mistral's templates want it; the same for the same id."""
    fits = len(call_id) == 9 and call_id.isascii() and call_id.isalnum()
    return call_id if fits else sha256(call_id.encode(errors="replace")).hexdigest()[:9]


PARSERS: dict[str, type[ToolParser]] = {
    "hermes": Hermes,
    "granite": Granite,
    "granite4": Hermes,
    "ernie45": Hermes,
    "llama3_json": Llama3Json,
    "llama4_json": Llama3Json,
    "mistral": Mistral,
    "openai": Harmony,
    "seed_oss": SeedOss,
    "glm45": Glm,
    "glm47": Glm,
    "gemma4": Gemma4,
    "functiongemma": FunctionGemma,
    "qwen3_coder": Qwen3Coder,
    "qwen3_xml": Qwen3Coder,
    "step3p5": Qwen3Coder,
    "minimax_m2": MiniMaxM2,
    "deepseek_v3": DeepSeekV3,
    "deepseek_v31": DeepSeekV31,
    "kimi_k2": KimiK2,
    "solar_open": SolarOpen,
    "hunyuan_a13b": Hunyuan,
    "phi4_mini_json": Phi4Mini,
    "apertus": Apertus,
    "olmo3": Olmo3,
    "lfm2": Lfm2,
}
