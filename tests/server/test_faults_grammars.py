"""Grammars that take long: others do not wait for them, and they themselves not for those whose clients have gone."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from appliance.core.params import RequestError, StructuredOutputsParams
from appliance.server import structured
from appliance.text.compiler import Unfinished, _brief


class Lines:
    """In place of the compiler: grammars that begin with "long" take until ``go`` where they have all their time."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), list[str]()

    def compile(self, asked: StructuredOutputsParams, *_: Any, **__: Any) -> str:
        assert asked.regex is not None
        if asked.regex.startswith("long"):
            if _brief.get() is not None:
                raise Unfinished
            self.begun.append(asked.regex)
            assert self.go.wait(60)
        if "wrong" in asked.regex:
            raise RequestError("wrong", param="structured_outputs.regex")
        return asked.regex


def test_what_is_short_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines()
    monkeypatch.setattr(structured, "compile_grammar", lines.compile)

    async def ask(regex: str) -> str:
        return await structured.compiled(StructuredOutputsParams(regex=regex))

    async def all_() -> None:
        tasks = [asyncio.create_task(ask("long 0"))]
        while not lines.begun:
            await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(ask(f"long {k}")) for k in range(1, 40)]  # more than there are threads
        tasks.append(asyncio.create_task(ask("long and wrong")))
        assert await ask("short") == "short" and not any(task.done() for task in tasks)
        for task in tasks[1:39]:
            task.cancel()
        await asyncio.wait(tasks[1:39])
        lines.go.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert (found[0], found[39]) == ("long 0", "long 39")
        assert isinstance(found[40], RequestError)

    asyncio.run(all_())
    assert lines.begun[0] == "long 0" and sorted(lines.begun) == ["long 0", "long 39", "long and wrong"]
