"""``appliance chat``: finds or starts a server, then one question or a conversation."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from appliance.chat.client import ChatError, Server
from appliance.chat.files import with_files
from appliance.chat.repl import Repl
from appliance.chat.screen import Screen, Status
from appliance.chat.start import Child
from appliance.chat.talk import Answer, Talk
from quant.errors import InputError

DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class Asked:
    """The command line."""

    words: tuple[str, ...]
    url: str | None
    api_key: str | None
    model: str | None
    prompt: str | None
    system: str
    settings: dict[str, Any]
    ssl_ca_certs: str | None = None
    insecure: bool = False

    @property
    def tls(self) -> dict[str, Any]:
        return {"ca_certs": self.ssl_ca_certs, "insecure": self.insecure}


def main(asked: Asked) -> int:
    """The exit code: 0, or 1 where there was no answer. Raises InputError."""
    _check(asked)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)  # so that a server that was started ends with it
    try:
        question = None if asked.prompt is None and sys.stdin.isatty() else _question(asked.prompt)
        with _server(asked) as server:
            talk = Talk(_model(server, asked.model), asked.system, asked.settings)
            if question is not None:
                return _once(server, talk, question)
            return Repl(server, talk, Screen()).run()
    except ChatError as error:
        print(f"appliance: error: {error}", file=sys.stderr)
        return 1


def _check(asked: Asked) -> None:
    """Raises InputError where words are no model, or nothing that goes with --url."""
    word = asked.words[0] if asked.words else ""
    if " " in word and not os.path.exists(word):
        raise InputError(f"{word!r:.60} is no model to start a server for: a question is asked with --prompt (-p)")
    if word and asked.url is not None:
        raise InputError(f"--url is for a server that runs, and {word!r} for one that is to be started")


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _question(prompt: str | None) -> str:
    """What is asked, of --prompt and of what comes by a pipe. Raises InputError where it is nothing."""
    parts = [] if prompt is None else [with_files(os.fsencode(prompt).decode(errors="replace"))]
    if not sys.stdin.isatty():
        parts.append(sys.stdin.buffer.read().decode(errors="replace"))
    question = "\n\n".join(part.strip() for part in parts if part.strip())
    if not question:
        raise InputError("there is no question: --prompt and the input are empty")
    return question


@contextmanager
def _server(asked: Asked) -> Iterator[Server]:
    """The server to talk to, ready. One that was started for this ends with it. Raises ChatError, InputError."""
    status = Status()
    try:
        if not asked.words:
            server = Server(DEFAULT_URL if asked.url is None else asked.url, asked.api_key, **asked.tls)
            try:
                server.wait(status)
                status.clear()
                yield server
                return
            except ChatError as error:
                if asked.url is not None or asked.model or error.status:
                    raise
            if sys.stderr.isatty():
                print(f"no server runs at {DEFAULT_URL}: one is started, with the embedded demo model", file=sys.stderr)
        child = Child(asked.words)
        try:
            server = child.server(status, **asked.tls)
            status.clear()
            yield server
        finally:
            child.stop()
    finally:
        status.clear()


def _model(server: Server, name: str | None) -> str:
    """The name of the model to talk to. Raises ChatError, InputError."""
    names = list(server.models())
    if not names:
        raise ChatError(f"{server.url} serves no model")
    if name is None:
        return names[0]
    if name not in names:
        raise InputError(f"--model {name}: {server.url} has {', '.join(names)}; `appliance chat {name}` starts a server for it")
    return name


def _once(server: Server, talk: Talk, question: str) -> int:
    """One question: the answer alone goes to the output."""
    talk.messages.append({"role": "user", "content": question})
    answer, last = Answer(), "\n"
    for kind, text in answer.follow(server.stream(talk.body())):
        if kind == "content":
            sys.stdout.write(text)
            sys.stdout.flush()
            last = text
    for call in answer.tool_calls:
        print(f"{call['function']['name']}({call['function']['arguments']})")
    if not last.endswith("\n"):
        print(flush=True)
    if answer.finish == "length":
        print("appliance: note: the answer was cut off: the limit of tokens is reached", file=sys.stderr)
    if answer.empty:
        raise ChatError("the answer is empty")
    return 0
