"""The conversation at a terminal: lines, commands, answers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from appliance.chat.client import ChatError, Server
from appliance.chat.files import with_files
from appliance.chat.lines import Lines
from appliance.chat.screen import Screen
from appliance.chat.talk import Answer, Talk
from quant.errors import InputError

HELP = """\
/system [TEXT]       show the system prompt, or set it ("" for none)
/set [NAME [VALUE]]  show or set a field of requests, as /set temperature 0.7;
                     without a value it is as the model says
/regen               answer again
/undo                take back the last question
/clear               begin anew
/save FILE           write the conversation; /save! also over a file that is there
/load FILE           go on with such a file, also one of the built-in page
/tokens              how many tokens the conversation has
/model [NAME]        show the server's models, or talk to another one
/help                this
/quit                end, as ctrl-D does
Ctrl-C stops an answer. A line that ends with \\ goes on in the next; \"\"\" begins
and ends a text of several lines. @FILE adds that file to a message. A message
that begins with / is written with //."""


class Repl:
    def __init__(self, server: Server, talk: Talk, screen: Screen) -> None:
        self.server, self.talk, self.screen = server, talk, screen
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.screen.note(HELP),
            "/system": self._system,
            "/set": self._set,
            "/regen": lambda _: self._regen(),
            "/undo": lambda _: self._undo(),
            "/clear": lambda _: self._clear(),
            "/save": self._save,
            "/save!": lambda name: self._save(name, over=True),
            "/load": self._load,
            "/tokens": lambda _: self._tokens(),
            "/model": self._model,
        }
        self._file: Path | None = None  # the conversation's own: /save writes over it
        self._lines = Lines([*self._commands, "/quit"])

    def run(self) -> int:
        self.screen.note(f"{self.talk.model} at {self.server.url}. /help lists the commands, ctrl-D ends.")
        with self._lines:
            while (text := self._lines.read(self.screen.prompt)) is not None:
                try:
                    if not text.strip():
                        continue
                    if text.startswith("/") and not text.startswith("//"):
                        if not self._command(text):
                            break
                    else:
                        self._say(text.removeprefix("/") if text.startswith("//") else text)
                except (ChatError, InputError) as error:
                    self.screen.error(str(error))
                except KeyboardInterrupt:
                    self.screen.note("(stopped)")
        return 0

    def _command(self, text: str) -> bool:
        """Whether to go on. Raises InputError."""
        name, _, rest = text.partition(" ")
        if name in ("/quit", "/exit", "/bye", "/q"):
            return False
        if (command := self._commands.get("/help" if name == "/?" else name)) is None:
            raise InputError(f"there is no command {name}: /help lists them (a message that begins with / is written with //)")
        command(rest.strip())
        return True

    def _say(self, text: str) -> None:
        content = with_files(text)
        if content != text:
            self.screen.note(f"(with {len(content) - len(text):,} characters of files)")
        self._ask(content, [*self.talk.messages])

    def _ask(self, question: str, before: list[dict[str, Any]]) -> None:
        """Ask, and show what comes. Where there is no answer, the messages are those of ``before``. Raises ChatError."""
        self.talk.messages.append({"role": "user", "content": question})
        answer, stopped = Answer(), False
        self.screen.begin()
        try:
            with closing(self.server.stream(self.talk.body())) as chunks:
                for kind, text in answer.follow(chunks):
                    self.screen.piece(kind, text)
        except KeyboardInterrupt:
            stopped = True
        finally:
            self.screen.end()
            if answer.empty:
                self.talk.messages = before
            else:
                self.talk.messages.append(answer.message())
        for call in answer.tool_calls:
            self.screen.note(f"calls {call['function']['name']}({call['function']['arguments']})")
        self._end(answer, stopped)

    def _end(self, answer: Answer, stopped: bool) -> None:
        parts = [answer.figures()] if answer.tokens else []
        if stopped:
            parts.append("stopped before an answer came; the conversation is as it was" if answer.empty else "stopped")
        elif answer.finish == "length":
            parts.append("cut off: the limit of tokens is reached")
        if parts:
            self.screen.note(f"[{' · '.join(parts)}]")
            self.screen.note("")

    def _regen(self) -> None:
        before = [*self.talk.messages]
        question = self.talk.undo()
        if question is None:
            raise InputError("/regen: nothing was asked yet")
        self._ask(question, before)

    def _undo(self) -> None:
        question = self.talk.undo()
        if question is None:
            raise InputError("/undo: nothing was asked yet")
        self.screen.note(f"taken back: {question[:70]}")

    def _clear(self) -> None:
        self.talk.messages.clear()
        self._file = None
        self.screen.note("the conversation is empty")

    def _system(self, text: str) -> None:
        if text:
            self.talk.system = "" if text == '""' else text
        self.screen.note(f"system prompt: {self.talk.system or '(none)'}")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name:
            self.talk.set(name, value.strip())
        shown = ", ".join(f"{name} = {json.dumps(value)}" for name, value in self.talk.settings.items())
        self.screen.note(shown or "all is as the model says")

    def _save(self, name: str, over: bool = False) -> None:
        path = Path(os.path.expanduser(name)) if name else self._file
        if path is None:
            raise InputError("/save needs the name of a file")
        if os.path.exists(path) and path != self._file and not over:
            raise InputError(f"{path} is there already: /save! {name} writes over it")
        self.talk.save(path)
        self._file = path
        self.screen.note(f"{len(self.talk.messages)} messages written to {path}")

    def _load(self, name: str) -> None:
        if not name:
            raise InputError("/load needs the name of a file")
        path = Path(os.path.expanduser(name))
        self.talk.load(path)
        self._file = path
        for message in self.talk.messages[-2:]:
            self.screen.note(f"{message['role']}: {message['content'][:300]}")
        self.screen.note(f"{len(self.talk.messages)} messages read from {path}")

    def _tokens(self) -> None:
        models = self.server.models()
        most = models.get(self.talk.model or "")
        count = self.server.count(self.talk.model, self.talk.prompt()) if self.talk.prompt() else 0
        self.screen.note(f"{count:,} tokens" + (f" of {most:,}" if most else ""))

    def _model(self, name: str) -> None:
        names = list(self.server.models())
        if name and name not in names:
            raise InputError(f"there is no model {name}: {self.server.url} has {', '.join(names)}")
        self.talk.model = name or self.talk.model
        for one in names:
            self.screen.note(f"{'*' if one == self.talk.model else ' '} {one}")
