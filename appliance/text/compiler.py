"""Processes that try grammars. They come from strangers, and what takes too long or too much memory ends it, and nothing else.

The library bounds what it does by steps of its own counting, which leave out some of the work (an integer that is a multiple of
99999999 would take hours), and no thread of it can be stopped.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

log = logging.getLogger("appliance.text")

T = TypeVar("T")

CPU_S, BRIEF_S = 2.0, 0.25  # for one grammar: at most, and what most of them do with
TIGHT = {"whitespace_flexible": False, "whitespace_pattern": None}
MEMORY_BYTES = 2 * 2**30  # of address space, of which the deep stack takes an eighth


class Task(NamedTuple):
    kind: str  # a field of StructuredOutputsParams
    text: str
    options: Mapping[str, Any]  # of JSON schemas
    around: str
    parts: Sequence[tuple[str, str]] = ()  # names, and JSON schemas within the text that are tried first, each by itself


class Outcome(NamedTuple):
    grammar: str
    wrong: bool
    words: list[str]
    part: str | None = None  # which one is wrong


class Unfinished(Exception):
    """A grammar takes more than BRIEF_S, or nobody waits for it any more."""


class Brief:
    """Somebody who waits for grammars, and shall not keep others waiting by one that takes long."""

    def __init__(self) -> None:
        self.gone = False  # whether nobody waits any more: for any thread to say

    def run(self, work: Callable[[], T]) -> T:
        """``work()``, in which grammars are tried for BRIEF_S. Raises Unfinished."""
        before = _brief.set(self)
        try:
            return work()
        finally:
            _brief.reset(before)


_brief: ContextVar[Brief | None] = ContextVar("brief", default=None)


class Compiler:
    """Two processes, so that grammars that are tried briefly do not wait for one that takes long."""

    def __init__(self) -> None:
        self._briefly, self._fully = _Process(BRIEF_S), _Process(CPU_S)

    def run(self, task: Task) -> Outcome:
        """Waits for its turn. Raises TimeoutError where the grammar ended the process; within ``Brief.run`` Unfinished, too."""
        process = self._fully if _brief.get() is None else self._briefly
        return process.run(task, _brief.get())


class _Process:
    """Begun with the first grammar and again after one that was too much; one grammar at a time."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._lock = seconds, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._conn: Connection | None = None

    def run(self, task: Task, brief: Brief | None) -> Outcome:
        with self._lock:
            if brief is not None and brief.gone:
                raise Unfinished
            if self._conn is None:
                self._start()
            assert self._conn is not None
            try:
                part = ""
                self._conn.send(task)
                while isinstance(news := self._conn.recv(), str):
                    part = news
                return Outcome(*news)
            except (EOFError, OSError):
                code = self._stop()
                if brief is not None and code == -signal.SIGPROF:
                    raise Unfinished from None
                slow, much = (
                    f"it takes more than {self._seconds:g} s to compile",
                    f"it takes too much to compile (exit code {code})",
                )
                words = slow if code == -signal.SIGPROF else much
                if part:
                    return Outcome("", True, [words], part)
                raise TimeoutError(words) from None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "appliance.text.compiler", str(theirs.fileno()), str(self._seconds)]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self._conn = Connection(ours.detach())

    def _stop(self) -> int:
        assert self._process is not None and self._conn is not None
        self._conn.close()
        self._conn = None
        self._process.kill()  # it has ended, or is about to
        return self._process.wait()


def attempt(task: Task, tell: Callable[[str], object] = id) -> Outcome:
    """In the other process: all that an engine does with a grammar before its first token, for a vocabulary of bytes.

    ``tell`` hears which part is tried, "" for the whole.
    """
    from appliance.text import grammar

    lib = grammar.library()
    for name, schema in task.parts:
        tell(name)
        made = lib.LLMatcher.grammar_from_json_schema(schema, overrides={**task.options, **TIGHT})
        outcome = _tried(made)
        if outcome.wrong:
            return outcome._replace(part=name)
    tell("")
    if task.kind in ("json", "json_object"):
        made = lib.LLMatcher.grammar_from_json_schema(task.text, overrides=dict(task.options))
    elif task.kind == "regex":
        made = lib.LLMatcher.grammar_from_lark(f"start: /{lib.regex_to_lark(task.text, use_ascii='d')}/")
    else:
        made = lib.grammar_from("lark" if task.kind == "choice" else "grammar", task.text)
    return _tried(grammar.within(task.around, made) if task.around else made)


def _tried(made: str) -> Outcome:
    from appliance.text import grammar

    lib = grammar.library()
    wrong, words = lib.LLMatcher.validate_grammar_with_warnings(made, limits=grammar.limits())
    if not wrong:
        bytes_alone = re.sub(r"<\[\d+\]>", "<[0]>", made)  # special tokens of a model, by their ids
        if error := grammar.walked(lib.LLTokenizer("byte"), bytes_alone):
            return Outcome("", True, [error])
    return Outcome(made, wrong, words)


def _timed(seconds: float, task: Task, tell: Callable[[str], object]) -> Outcome:
    signal.setitimer(signal.ITIMER_PROF, seconds)  # time of this process, whatever else the machine does
    try:
        return attempt(task, tell)
    except Exception as error:  # the library's own, and nothing narrower
        return Outcome("", True, [str(error)])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    from appliance.text.grammar import deep_thread, library

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the whole group; the pipe says when it is over
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    library()
    pool = deep_thread()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    conn = Connection(int(sys.argv[1]))
    try:
        while True:
            conn.send(tuple(pool.submit(_timed, float(sys.argv[2]), conn.recv(), conn.send).result()))
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    main()
