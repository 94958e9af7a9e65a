"""Engines for bench_http.py: one that follows a script, and a watch over the real one."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, ClassVar

from appliance.core.messages import EngineInfo, Event, Stats, Submit, TokenLogprob


class Scripted:
    """Gives every request one token a step, at a steady pace, from the moment that all of them are there."""

    notes: ClassVar[dict[str, Any]] = {"steps": [], "width": 0}

    @classmethod
    def load(cls, config: Any, progress: Any = None, **of_a_server: Any) -> Scripted:
        from appliance.text.tokenizer import Tokenizer

        return cls(Tokenizer.load(config.tokenizer), json.loads(os.environ["BENCH_HTTP"]))

    def __init__(self, tokenizer: Any, setup: dict[str, Any]) -> None:
        self.pace, self.streams = setup["pace"], setup["streams"]
        text = " the"
        (self.token,) = tokenizer.encode(text, add_special_tokens=False)
        self.notes["width"] = len(text)
        others = tuple((i + 300, -1.5 - i) for i in range(setup["logprobs"]))
        self.scored = (TokenLogprob(self.token, -0.25, 1, others),) if others else None
        self.waiting: list[tuple[str, int]] = []
        self.running: dict[str, int] = {}  # request id -> tokens to come
        self.next = 0.0
        self.info = EngineInfo(
            model="demo", directory=".", architecture="", quantization="awq", dtype="float32", device="cpu", max_model_len=4096,
            vocab_size=len(range(4096)), eos_token_ids=(2,), ready_s=0.0, plan={},
        )  # fmt: skip

    def prepare(self) -> None:
        """It follows no grammars."""

    reading = False  # a vocabulary for grammars

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def submit(self, submit: Submit) -> None:
        assert submit.params.max_tokens is not None
        self.waiting.append((submit.request_id, submit.params.max_tokens))
        if len(self.waiting) == self.streams:
            self.running, self.waiting = dict(self.waiting), []
            self.next = time.monotonic() + 0.1

    def abort(self, request_id: str, index: int | None = None, reason: str = "abort") -> list[Event]:
        self.running.pop(request_id, None)
        return []

    def stats(self) -> Stats:
        return Stats(time=time.monotonic(), running=len(self.running))

    def step(self) -> list[Event]:
        if not self.running:
            return []
        time.sleep(max(0.0, self.next - time.monotonic()))
        self.next += self.pace
        events = []
        for name in list(self.running):
            self.running[name] -= 1
            reason = None if self.running[name] else "length"
            events.append(Event(name, 0, (self.token,), self.scored, finish_reason=reason))
            if reason:
                del self.running[name]
        self.notes["steps"].append(time.monotonic())
        return events


def note_steps(streams: int) -> dict[str, Any]:
    """From now on the real engine waits until so many sequences are there, and notes when each step begins and ends."""
    from appliance.runtime.engine import Engine

    notes: dict[str, Any] = {"steps": [], "waited": []}
    step = Engine.step

    def noted(self: Engine) -> list[Event]:
        if not notes["steps"] and len(self.scheduler.waiting) < streams:
            time.sleep(0.001)
            return []
        begun, cpu = time.monotonic(), time.process_time()
        events = step(self)
        notes["steps"].append((begun, time.monotonic(), len(events), cpu, time.process_time()))
        if not len(notes["steps"]) % 20:  # it takes as long as a tenth of a small step
            notes["waited"].append((len(notes["steps"]), waited_ns()))
        return events

    Engine.step = noted  # type: ignore[method-assign]
    return notes


def waited_ns() -> int:
    """So long were threads of this process ready to run while the processors ran others (the kernel's own count)."""
    return sum(int((task / "schedstat").read_text().split()[1]) for task in Path("/proc/self/task").iterdir())


def run_alone(threads: int, sequences: int, tokens: int, model: str | None = None) -> None:
    """As many sequences as clients would ask for, to their end."""
    from appliance.config import EngineConfig
    from appliance.core.params import SamplingParams
    from appliance.hub import demo_model
    from appliance.runtime.engine import Engine

    config = EngineConfig(model=model or str(demo_model()), skip_tokenizer_init=True, threads=threads, max_num_seqs=64)
    engine = Engine.load(config)
    for i in range(sequences):
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=1.0, seed=i)
        engine.submit(Submit(f"r{i}", tuple(range(300, 305)), params, time.monotonic()))
    while engine.has_work:
        engine.step()
