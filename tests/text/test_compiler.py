"""Grammars that are tried briefly, and what comes of those that take longer; nobody is kept waiting by what nobody waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from appliance.core.params import RequestError, StructuredOutputsParams
from appliance.text import compiler, grammar
from appliance.text.compiler import Brief, Compiler, Unfinished

BOMB = StructuredOutputsParams(json={"type": "integer", "multipleOf": 99999997})
HARMLESS = StructuredOutputsParams(regex="[0-9]{7}")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    """One that gives a grammar a fifth of a second, and at first half of that."""
    monkeypatch.setattr(compiler, "BRIEF_S", 0.1)
    monkeypatch.setattr(compiler, "CPU_S", 0.2)
    monkeypatch.setattr(grammar, "_compiler", one := Compiler())
    grammar._checked.cache_clear()
    yield one
    grammar._checked.cache_clear()
    for process in (one._briefly, one._fully):
        if process._conn is not None:
            process._stop()


def asked(structured: StructuredOutputsParams) -> Callable[[], str]:
    return lambda: grammar.compile_grammar(structured)


def test_what_takes_long_is_left_unfinished_and_not_refused(found: Compiler) -> None:
    with pytest.raises(Unfinished):
        Brief().run(asked(BOMB))
    assert found._fully._process is None and Brief().run(asked(HARMLESS))
    assert found._fully._process is None, "it has been answered without"
    with pytest.raises(RequestError, match=r"takes more than 0\.2 s to compile"):
        asked(BOMB)()
    with pytest.raises(RequestError, match=r"takes more than 0\.2 s to compile"):  # known by now
        Brief().run(asked(BOMB))


def test_what_nobody_waits_for_is_not_begun(found: Compiler) -> None:
    """It had its place in the line already."""
    brief, ends = Brief(), list[type]()

    def wait() -> None:
        try:
            brief.run(asked(HARMLESS))
        except Unfinished as error:
            ends.append(type(error))

    with found._briefly._lock:
        thread = threading.Thread(target=wait)
        thread.start()
        brief.gone = True
    thread.join()
    assert ends == [Unfinished] and found._briefly._process is None and found._fully._process is None
    assert Brief().run(asked(HARMLESS)) == asked(HARMLESS)()
