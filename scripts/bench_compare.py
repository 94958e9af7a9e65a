"""Runs engines one after another, each in a process of its own, on the same cases; sets what they reach against the limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from bench_targets import Case

from models.spec import ModelSpec

PROMPT, TOKENS = 128, 33


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


def run_target(target: Target, cases: Sequence[Case], *, vocab: int, seed: int, log: Path | None = None) -> dict[str, Any]:
    """What one engine did. ``error`` holds its last words where it did not get to the end; its finished cases are kept."""
    ours, theirs = os.pipe()
    script = str(Path(__file__).with_name("bench_targets.py"))
    result: dict[str, Any] = {"name": target.name, "cases": []}
    with open(log or os.devnull, "wb") as sink:
        process = subprocess.Popen(
            [target.python, script, str(theirs)],
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=sink,
            pass_fds=[theirs],
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **target.env},
        )
        os.close(theirs)
        job = {**target.job, "cases": [asdict(c) for c in cases], "vocab": vocab, "seed": seed, "started": time.time()}
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            with os.fdopen(ours) as lines:
                for text in lines:
                    line = json.loads(text)
                    print(f"{target.name}: {text.strip()}", file=sys.stderr, flush=True)
                    if "case" in line:
                        result["cases"].append(line["case"])
                    else:
                        result |= line.get("facts", line)
                    result["rss_bytes"] = max(result.get("rss_bytes", 0), tree_rss(process.pid))
                    if "facts" in line:
                        process.stdin.close()
        finally:
            status = end(process)
    if "read_bytes" not in result:
        result["error"] = f"ended with status {status} after {len(result['cases'])} of {len(cases)} cases"
    return result


def tree_rss(pid: int) -> int:
    """Resident bytes of a process and its children (pages that they share count more than once)."""
    try:
        parent = psutil.Process(pid)
        return sum(p.memory_info().rss for p in (parent, *parent.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def end(process: subprocess.Popen[bytes]) -> int:
    """Let it finish by itself for a while; children that outlive it are ended too."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    if process.stdin is not None and not process.stdin.closed:
        process.stdin.close()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            pass  # it is gone, as it should be
    return process.returncode


@dataclass(frozen=True)
class Work:
    """Arithmetic and cache reads of a model, from its shape: the same for every engine, whatever it does."""

    linear_ops: int  # a token, in all layers: a multiply and an add are two
    head_ops: int  # a token whose logits are wanted
    attention_ops: int  # a token and a token that it sees
    kv_bytes: int  # a token in a cache of 16 bits a value

    @classmethod
    def of(cls, spec: ModelSpec) -> Work:
        layers = [m for m in spec.modules() if m.part in ("attention", "mlp")]
        return cls(
            linear_ops=2 * sum(m.N * m.K for m in layers),
            head_ops=2 * spec.vocab * spec.hidden,
            attention_ops=4 * spec.layers * spec.q_size,
            kv_bytes=4 * spec.layers * spec.kv_size,
        )

    def prefill_ops(self, prompt: int) -> int:
        """Of one prompt, of whose tokens the last one has logits."""
        return prompt * self.linear_ops + self.head_ops + self.attention_ops * prompt * (prompt + 1) // 2

    def decode_ops(self, context: float) -> float:
        """Of one token of one sequence, ``context`` tokens long."""
        return self.linear_ops + self.head_ops + self.attention_ops * context


def derive(result: dict[str, Any], work: Work, read_gb_s: float) -> None:
    """Add to each case what its times mean: tokens, operations and bytes a second."""
    read = result.get("read_bytes")
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
        if read:
            step_bytes = read + n * context * work.kv_bytes
            case["decode_gb_s"] = steps * step_bytes / 1e9
            case["of_memory_read"] = case["decode_gb_s"] / read_gb_s
            case["ops_per_byte"] = n * work.decode_ops(context) / step_bytes
