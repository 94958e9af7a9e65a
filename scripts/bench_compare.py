"""Runs engines one after another, each in a process of its own, on the same cases; sets what they reach against the limits."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
from bench_report import QUIET
from bench_targets import Case

from models.spec import ModelSpec

PROMPT, TOKENS = 128, 33
TRIES = 4  # runs of a case to find one in which other programs are quiet
WAITS = 240  # half seconds to wait for that before a run

Usage = tuple[float, float, float]
"""(clock, processor seconds of the whole machine, those of the engine under test)."""


@dataclass(frozen=True)
class Target:
    """One engine to start: which Python runs it, what it is told, and in which environment."""

    name: str
    job: dict[str, Any]
    python: str = sys.executable
    env: dict[str, str] = field(default_factory=dict)


def make_cases(prefill: int, sequences: Sequence[int], contexts: Sequence[int], repeat: int) -> list[Case]:
    """Prefill alone, decode of short prompts by number of sequences, and long contexts (run once: a prompt of that length)."""
    short = [Case(sequences=n, prompt=PROMPT, tokens=TOKENS, repeat=repeat) for n in sequences]
    long = [Case(sequences=1, prompt=length, tokens=TOKENS, repeat=1) for length in contexts]
    return [Case(sequences=1, prompt=prefill, tokens=1, repeat=repeat), *short, *long]


def run_target(
    target: Target, cases: Sequence[Case], *, vocab: int, seed: int, log: Path, read_limit: Callable[[], float]
) -> dict[str, Any]:
    """What one engine did. ``error`` tells where it did not get to the end; the cases it finished are kept.

    read_limit: measures GB/s of memory, before and after each case that memory bounds: a shared machine's changes by the minute.
    """
    result: dict[str, Any] = {"name": target.name, "cases": []}
    with open(log, "wb") as sink:
        engine = Conversation(target, sink)
        try:
            result |= engine.ask({**target.job, "vocab": vocab, "seed": seed, "started": time.time()})
            for case in cases:
                result["cases"].append(least_disturbed(engine, case, read_limit))
                print(f"{target.name}: {json.dumps(result['cases'][-1])}", file=sys.stderr, flush=True)
            result |= engine.ask({"facts": True})
            result["rss_bytes"] = engine.rss()
        except Gone:
            result["error"] = f"after {len(result['cases'])} of {len(cases)} cases"
        finally:
            status = engine.end()
    if "error" in result:
        result["error"] = f"ended with status {status} {result['error']}"
    return result


def least_disturbed(engine: Conversation, case: Case, read_limit: Callable[[], float]) -> dict[str, Any]:
    """Ask again, a few times, when other programs took more than a little of the machine meanwhile; the quietest run counts."""
    runs: list[dict[str, Any]] = []
    while len(runs) < TRIES and (not runs or runs[-1]["others_cores"] > QUIET):
        wait_for_quiet(engine.usage)
        bound = case.sequences == 1 and case.tokens > 1
        read = [read_limit()] if bound else []
        before = engine.usage()
        answer = engine.ask({"case": asdict(case)})
        runs.append({**answer, "others_cores": round(others_cores(before, engine.usage()), 2)})
        if bound:
            runs[-1]["memory_read_gb_s"] = max(*read, read_limit())
    return min(runs, key=lambda run: run["others_cores"])


def usage(own: float) -> Usage:
    """As of now; what a hypervisor stole counts for the machine."""
    times = psutil.cpu_times()._asdict()
    idle = times["idle"] + times.get("iowait", 0.0)
    twice = times.get("guest", 0.0) + times.get("guest_nice", 0.0)  # Linux counts these in user and nice too
    return time.perf_counter(), sum(times.values()) - idle - twice, own


def others_cores(before: Usage, after: Usage) -> float:
    """Cores that other programs used on average."""
    wall, busy, own = (now - then for now, then in zip(after, before, strict=True))
    return max(0.0, busy - own) / wall


def wait_for_quiet(now: Callable[[], Usage]) -> None:
    """Until other programs rest, but not for ever."""
    for _ in range(WAITS):
        before = now()
        time.sleep(0.5)
        if others_cores(before, now()) <= QUIET:
            return


class Gone(Exception):
    """The engine's process has ended."""


class Conversation:
    """A running engine: a JSON line to its standard input, a JSON line back."""

    def __init__(self, target: Target, log: IO[bytes]) -> None:
        ours, theirs = os.pipe()
        script = str(Path(__file__).with_name("bench_targets.py"))
        self.process = subprocess.Popen(
            [target.python, script, str(theirs)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[theirs],
            start_new_session=True,  # so that its children can be found when it is gone
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **target.env},
        )
        os.close(theirs)
        self.answers = os.fdopen(ours)

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Gone from None
        alive = True
        while not select.select([self.answers], [], [], 1.0 if alive else 0.0)[0]:
            if not alive:  # children that outlive it may hold the pipe open
                raise Gone
            alive = self.process.poll() is None
        line = self.answers.readline()
        if not line:
            raise Gone
        answer: dict[str, Any] = json.loads(line)
        return answer

    def total(self, measure: Callable[[psutil.Process], float]) -> float:
        """Of the process and its children, but for those that end meanwhile."""
        found = 0.0
        try:
            parent = psutil.Process(self.process.pid)
            family = [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            raise Gone from None
        for one in family:
            with suppress(psutil.NoSuchProcess):
                found += measure(one)
        return found

    def rss(self) -> int:
        """Resident bytes (pages that the processes share count for each)."""
        return int(self.total(lambda process: process.memory_info().rss))

    def usage(self) -> Usage:
        return usage(self.total(lambda process: sum(process.cpu_times()[:2])))

    def end(self) -> int:
        """Let it finish by itself for a while, then end it, and whatever it has left running. The exit status."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.answers.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


@dataclass(frozen=True)
class Work:
    """Arithmetic and cache reads of a model, from its shape: the same for every engine, whatever it does."""

    linear_ops: int  # a token, in all layers, of experts those that it goes through: a multiply and an add are two
    head_ops: int  # a token whose logits are wanted
    attention_ops: int  # a token and a token that it sees
    kv_bytes: int  # a token in a cache of 16 bits a value
    chosen: float  # of the experts, those that a token goes through

    @classmethod
    def of(cls, spec: ModelSpec) -> Work:
        return cls(
            linear_ops=2 * spec.linear_parameters[1],
            head_ops=2 * spec.vocab * spec.hidden,
            attention_ops=4 * spec.attention_layers * spec.q_size,
            kv_bytes=4 * spec.attention_layers * spec.kv_size,
            chosen=spec.mixture.active / spec.mixture.experts if spec.mixture else 1.0,
        )

    def weight_bytes(self, result: dict[str, Any], tokens: int) -> float:
        """Read by a step of so many tokens; experts in the mean, where all are chosen equally often."""
        return float(result["read_bytes"] - result.get("expert_bytes", 0) * (1 - self.chosen) ** tokens)

    def prefill_ops(self, prompt: int) -> int:
        """Of one prompt, of whose tokens the last one has logits."""
        return prompt * self.linear_ops + self.head_ops + self.attention_ops * prompt * (prompt + 1) // 2

    def decode_ops(self, context: float) -> float:
        """Of one token of one sequence, ``context`` tokens long."""
        return self.linear_ops + self.head_ops + self.attention_ops * context


def derive(result: dict[str, Any], work: Work, read_gb_s: float) -> None:
    """Add to each case what its times mean: tokens, operations and bytes a second."""
    if result.get("read_bytes"):
        result["token_bytes"] = work.weight_bytes(result, 1)
    for case in result["cases"]:
        n, prompt = case["sequences"], case["prompt"]
        case["prefill_tok_s"] = n * prompt / case["first_s"]
        case["prefill_ops_s"] = n * work.prefill_ops(prompt) / case["first_s"]
        if case["decode_tok_s"] is None:
            continue
        context = prompt + case["tokens"] / 2
        steps = case["decode_tok_s"] / n
        case["step_s"] = 1 / steps
        case["decode_ops_s"] = case["decode_tok_s"] * work.decode_ops(context)
        if result.get("read_bytes"):
            step_bytes = work.weight_bytes(result, n) + n * context * work.kv_bytes
            case["decode_gb_s"] = steps * step_bytes / 1e9
            case["of_memory_read"] = case["decode_gb_s"] / case.get("memory_read_gb_s", read_gb_s)
            case["ops_per_byte"] = n * work.decode_ops(context) / step_bytes
