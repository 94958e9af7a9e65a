"""Anthropic's requests as the chat requests that chat templates are written for.

What differs: results of tools are blocks of a user's message there and messages of their own here, system messages may stand
anywhere there, and messages of one role may follow each other. Errors name Anthropic's fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from appliance.server.messages.schemas import CountRequest, Message, MessagesRequest, wrong
from appliance.server.messages.signature import hidden
from appliance.server.messages.tools import chat_tools
from appliance.server.schemas import ChatRequest, build

# What Claude Code puts first into its system prompt, with a number that is another one in each request: a prompt that begins so
# would never be found in the prefix cache.
BILLING = "x-anthropic-billing-header"


@dataclass(frozen=True)
class Way:
    """How a conversation is told to a template. Not all of them take a user who speaks behind a tool's result."""

    after_results: bool = True
    fit_id: Callable[[str], str] = str  # makes a call's id one that the template takes


def chat_request(body: CountRequest, way: Way = Way()) -> ChatRequest:
    """Raises RequestError naming the field."""
    conversation = Conversation(body, way)
    messages = conversation.messages
    continued = messages[-1]["role"] == "assistant"
    fields: dict[str, Any] = {
        **body.extras(),
        "model": body.model,
        "messages": messages,
        "continue_final_message": continued,
        "add_generation_prompt": not continued,
        **chat_tools(body, conversation.found),
    }
    config = body.output_config
    if form := (config and config.format) or body.output_format:
        schema = {"name": "answer", "schema": form.json_schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if config and config.effort:
        fields["reasoning_effort"] = config.effort
    if isinstance(body, MessagesRequest):
        fields |= {"max_tokens": body.max_tokens or 1, "stop": _stops(body), "stream": body.stream}
        fields |= {name: getattr(body, name) for name in ("temperature", "top_p", "top_k")}
    chat = build(ChatRequest, fields)
    if body.thinking is not None and body.thinking.type != "adaptive":
        on = body.thinking.type == "enabled"  # the two names that templates have for it
        chat.chat_template_kwargs = {"enable_thinking": on, "thinking": on, **(chat.chat_template_kwargs or {})}
    return chat


def _stops(body: MessagesRequest) -> list[str] | None:
    if "" in (body.stop_sequences or ()):
        wrong("stop_sequences", "holds an empty text: each needs at least one character")
    return body.stop_sequences


class Conversation:
    """A body's system prompt and messages, as ``messages`` for chat templates: content is text everywhere.

    (While they are made it is a list of texts: a client may send any number of them.)
    """

    def __init__(self, body: CountRequest, way: Way) -> None:
        self.messages: list[dict[str, Any]] = []
        self._way = way
        self.found: set[str] = set()  # names of tools that results told of
        self._calls: set[str] = set()  # ids that results may name
        self._notes: list[str] = []  # of the system, that wait for the next message
        system = [] if body.system is None else _texts(body.system, "system")
        begin = next((i for i, message in enumerate(body.messages) if message.role != "system"), len(body.messages))
        for i, message in enumerate(body.messages[:begin]):
            system += _texts(message.content, f"messages[{i}].content")
        if begin == len(body.messages):
            wrong("messages", "must hold at least one message of the user")
        if system:
            self.messages.append({"role": "system", "content": ["\n".join(system)]})
        for i, message in enumerate(body.messages[begin:], begin):
            self._add(message, f"messages[{i}].content")
        if self._notes:
            self._say("user", "")
        for one in self.messages:
            one["content"] = "".join(one["content"])
        if self.messages[-1]["role"] == "assistant":
            self._check_last(f"messages[{len(body.messages) - 1}]")

    def _add(self, message: Message, where: str) -> None:
        match message.role:
            case "system":
                self._note(_texts(message.content, where))
            case "user":
                self._user(message.content, where)
            case "assistant":
                self._assistant(message.content, where)

    def _note(self, texts: list[str]) -> None:
        """System text within the conversation goes where it stands, since what was said before must stay the same for the prefix
        cache; but few templates know it there, so it becomes part of what comes before it, or after it."""
        if self.messages and self.messages[-1]["role"] in ("user", "tool") and not self._notes:
            _extend(self.messages[-1], "\n\n".join(texts), "\n\n")
        else:
            self._notes += texts

    def _user(self, content: Any, where: str) -> None:
        texts: list[str] = []
        results: list[dict[str, Any]] = []
        for place, block in _blocks(content, where):
            if block["type"] == "tool_result":
                results.append(self._result(block, place))
            else:
                texts.append(_text(block, place))
        if not (results or texts):
            wrong(where, "is empty")
        self.messages += results  # they answer the calls before them, so they come first
        if results and not texts and self._notes:
            self._notes, notes = [], self._notes
            self._note(notes)
        if texts:
            self._say("user", "\n".join(filter(None, texts)))

    def _say(self, role: str, text: str) -> None:
        """Add to the last message where it is of the same role: templates want them to alternate."""
        if role == "user":
            text, self._notes = "\n\n".join([*self._notes, *([text] if text else [])]), []
        last: dict[str, Any] = self.messages[-1] if self.messages else {"role": None}
        if role == "user" and last["role"] == "tool" and not self._way.after_results:
            _extend(last, text, "\n\n")
        elif last["role"] == role and "tool_calls" not in last:
            _extend(last, text, "\n")
        else:
            self.messages.append({"role": role, "content": [text] if text else []})

    def _assistant(self, content: Any, where: str) -> None:
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        for place, block in _blocks(content, where):
            match block["type"]:
                case "thinking":
                    thoughts.append(_thought(block, place))
                case "redacted_thinking":
                    pass  # only Anthropic can read it
                case "tool_use":
                    calls.append(self._call(block, place))
                case _:
                    texts.append(_text(block, place))
        self._say("assistant", "\n".join(filter(None, texts)))
        if any(thoughts):
            self.messages[-1]["reasoning_content"] = "\n".join(filter(None, thoughts))
        if calls:
            self.messages[-1]["tool_calls"] = calls

    def _call(self, block: Mapping[str, Any], where: str) -> dict[str, Any]:
        call_id, name, arguments = block.get("id"), block.get("name"), block.get("input")
        if not isinstance(call_id, str) or not call_id:
            wrong(f"{where}.id", f"must be text, got {call_id!r:.80}")
        if not isinstance(name, str) or not name:
            wrong(f"{where}.name", f"must be text, got {name!r:.80}")
        if not isinstance(arguments, Mapping):
            wrong(f"{where}.input", f"must be an object, got {arguments!r:.80}")
        self._calls.add(call_id)
        return {"id": self._way.fit_id(call_id), "type": "function", "function": {"name": name, "arguments": dict(arguments)}}

    def _result(self, block: Mapping[str, Any], where: str) -> dict[str, Any]:
        call_id, content = block.get("tool_use_id"), block.get("content")
        if not isinstance(call_id, str) or call_id not in self._calls:
            wrong(f"{where}.tool_use_id", f"is {call_id!r:.80}, and no tool_use block before it has that id")
        blocks = _blocks("" if content is None else content, f"{where}.content")
        self.found |= {str(one.get("tool_name")) for _, one in blocks if one["type"] == "tool_reference"}
        text = "\n".join(_text(one, place) for place, one in blocks)
        if block.get("is_error") and not text.lower().startswith("error"):
            text = f"Error: {text}"  # templates know no other way to say so
        return {"role": "tool", "tool_call_id": self._way.fit_id(call_id), "content": [text] if text else []}

    def _check_last(self, where: str) -> None:
        """What the answer goes on with: text, or nothing."""
        last = self.messages[-1]
        if "tool_calls" in last:
            wrong(where, "ends with tool_use: a user's message with its tool_result must follow")
        if not last["content"]:
            if "reasoning_content" in last:
                wrong(where, "ends with thinking: an answer can go on with text only")
            self.messages.pop()
            if not self.messages or self.messages[-1]["role"] == "system":
                wrong("messages", "must hold at least one message of the user")


def _texts(content: Any, where: str) -> list[str]:
    """The texts of a system prompt, without what changes with each request and is not for the model."""
    texts = (_text(block, place) for place, block in _blocks(content, where))
    kept = (text.partition("\n")[2] if text.startswith(BILLING) else text for text in texts)
    return [text for text in kept if text]


def _extend(message: dict[str, Any], text: str, between: str) -> None:
    if text:
        message["content"] += [between, text] if message["content"] else [text]


def _blocks(content: Any, where: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(place, block) for each block; text is one block."""
    if isinstance(content, str):
        return [(where, {"type": "text", "text": content})] if content else []
    if not isinstance(content, list):
        wrong(where, f"must be text or a list of blocks, got {type(content).__name__}")
    found = []
    for i, block in enumerate(content):
        block, place = {"type": "text", "text": block} if isinstance(block, str) else block, f"{where}[{i}]"
        if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
            wrong(place, f"must be a block such as {{'type': 'text', 'text': ...}}, got {block!r:.80}")
        found.append((place, block))
    return found


def _text(block: Mapping[str, Any], where: str) -> str:
    """The text of a block that must have one."""
    if block["type"] == "search_result":
        head = "\n".join(str(block[name]) for name in ("title", "source") if block.get(name))
        return "\n".join([head, *(_text(one, place) for place, one in _blocks(block.get("content"), f"{where}.content"))])
    if block["type"] == "tool_reference":
        return str(block.get("tool_name"))
    if block["type"] != "text":
        wrong(where, f"is of type {block['type']!r:.80}, which is not supported here: only text is", "unsupported_parameter")
    if not isinstance(block.get("text"), str):
        wrong(f"{where}.text", f"must be text, got {block.get('text')!r:.80}")
    return block["text"]


def _thought(block: Mapping[str, Any], where: str) -> str:
    for name in ("thinking", "signature"):
        if not isinstance(block.get(name, ""), str):
            wrong(f"{where}.{name}", f"must be text, got {block[name]!r:.80}")
    return block.get("thinking") or hidden(block.get("signature") or "")
