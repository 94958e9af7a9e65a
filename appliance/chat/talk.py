"""A conversation: its messages and settings, its file, and an answer as it comes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quant.errors import InputError

FORMAT = "appliance.chat"  # of the file, which the built-in page reads and writes, too
ROLES = ("system", "user", "assistant", "tool")
OWN = ("messages", "model", "stream", "stream_options", "n", "more")  # names that are not for /set
FIELDS = ("temperature", "top_p", "max_tokens")  # settings with a place of their own in a file; "more" has the others, as JSON
MEASURABLE_S = 0.04  # tokens that come within less may have come in one piece, and say nothing about speed

Kind = Literal["reasoning", "content"]


@dataclass
class Talk:
    """What was said, and how answers are to be drawn. ``settings`` are fields of a request by their names."""

    model: str | None = None
    system: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def prompt(self) -> list[dict[str, Any]]:
        """The messages as they are sent."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.messages

    def body(self) -> dict[str, Any]:
        options = {"include_usage": True, "continuous_usage_stats": True}
        return {"model": self.model, **self.settings, "messages": self.prompt(), "stream_options": options}

    def set(self, name: str, value: str) -> None:
        """Set a field of the requests: JSON where it is some, else text; an empty value leaves it to the server again."""
        if name in OWN or not name.isidentifier():
            raise InputError(f"/set {name}: this is no setting; some are temperature, top_p, top_k, max_tokens, seed, stop")
        if not value:
            self.settings.pop(name, None)
            return
        try:
            self.settings[name] = json.loads(value)
        except ValueError:
            self.settings[name] = value

    def undo(self) -> str | None:
        """Forget the last question and what was said to it. Returns the question; None where there is none."""
        for at in reversed(range(len(self.messages))):
            if self.messages[at]["role"] == "user":
                question: str = self.messages[at]["content"]
                del self.messages[at:]
                return question
        return None

    def save(self, path: Path) -> None:
        """Raises InputError."""
        title = next((m["content"] for m in self.messages if m["role"] == "user"), "")[:60]
        settings = {name: value for name, value in self.settings.items() if name in FIELDS}
        if more := {name: value for name, value in self.settings.items() if name not in FIELDS}:
            settings["more"] = json.dumps(more)
        whole = {"format": FORMAT, "version": 1, "title": title, "model": self.model, "settings": settings}
        try:
            path.write_text(json.dumps({**whole, "messages": self.prompt()}, indent=1, ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from None

    def load(self, path: Path) -> None:
        """Take over the messages and settings of a file: one of ``save``, or a list of messages. Raises InputError."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError:
            raise InputError(f"{path} is no conversation: it is not JSON") from None
        messages = found if isinstance(found, list) else found.get("messages") if isinstance(found, dict) else None
        if not isinstance(messages, list):
            raise InputError(f'{path} is no conversation: it has no list of "messages"')
        kept = [_message(path, number, message) for number, message in enumerate(messages, 1)]
        self.system = kept.pop(0)["content"] if kept and kept[0]["role"] == "system" else ""
        self.messages = kept
        self.settings = _settings(found.get("settings") if isinstance(found, dict) else None)


def _settings(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        return {}
    try:
        more = json.loads(found.get("more") or "{}")
    except (TypeError, ValueError):
        more = {}
    both = found | (more if isinstance(more, dict) else {})
    return {name: value for name, value in both.items() if name not in OWN}


def _message(path: Path, number: int, message: Any) -> dict[str, Any]:
    """The fields of a message that are for the server."""
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise InputError(f"{path}: the role of message {number} is {role!r}; roles are {', '.join(ROLES)}")
    content = message.get("content") or ""
    if not isinstance(content, str):
        raise InputError(f"{path}: the content of message {number} is not text")
    more = {name: message[name] for name in ("reasoning_content", "tool_calls", "tool_call_id") if message.get(name)}
    return {"role": role, "content": content, **more}


@dataclass
class Answer:
    """An answer, as far as it has come."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_s: float | None = None  # from the question to the first token
    rate: float | None = None  # tokens a second after the first ones

    def follow(self, chunks: Iterable[dict[str, Any]]) -> Iterator[tuple[Kind, str]]:
        """What is new, piece by piece. Raises what reading the chunks does; what came until then stays."""
        begun = time.monotonic()
        first_tokens = 0
        for chunk in chunks:
            usage = chunk.get("usage") or {}
            self.tokens = usage.get("completion_tokens", self.tokens)
            self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or self.cached_tokens
            if not chunk.get("choices"):
                continue
            choice = chunk["choices"][0]
            pieces = list(self._grow(choice.get("delta") or {}))
            self.finish = choice.get("finish_reason") or self.finish
            if pieces or self.tool_calls:
                now = time.monotonic() - begun
                if self.first_s is None:
                    self.first_s, first_tokens = now, self.tokens
                elif now - self.first_s >= MEASURABLE_S and self.tokens > first_tokens:
                    self.rate = (self.tokens - first_tokens) / (now - self.first_s)
            yield from pieces

    def _grow(self, delta: dict[str, Any]) -> Iterator[tuple[Kind, str]]:
        if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
            self.reasoning += reasoning
            yield "reasoning", reasoning
        if content := delta.get("content"):
            self.content += content
            yield "content", content
        for part in delta.get("tool_calls") or ():
            while len(self.tool_calls) <= part["index"]:
                self.tool_calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
            call, function = self.tool_calls[part["index"]], part.get("function") or {}
            call["id"] += part.get("id") or ""
            for name in ("name", "arguments"):
                call["function"][name] += function.get(name) or ""

    @property
    def empty(self) -> bool:
        return not (self.content or self.tool_calls)

    def message(self) -> dict[str, Any]:
        """It as a message of the conversation."""
        reasoning = {"reasoning_content": self.reasoning} if self.reasoning else {}
        calls = {"tool_calls": self.tool_calls} if self.tool_calls else {}
        return {"role": "assistant", "content": self.content, **reasoning, **calls}

    def figures(self) -> str:
        parts = [f"{self.tokens} token{'' if self.tokens == 1 else 's'}"]
        if self.rate:
            parts.append(f"{self.rate:.{1 if self.rate < 100 else 0}f} tokens/s")
        if self.first_s is not None:
            parts.append(f"first after {self.first_s:.2f} s")
        if self.prompt_tokens:
            cached = f", {self.cached_tokens} cached" if self.cached_tokens else ""
            parts.append(f"prompt {self.prompt_tokens}{cached}")
        return " · ".join(parts)
