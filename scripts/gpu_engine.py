"""The engine end to end on a card, random models of real sizes: prefill, decode by number of sequences, time to first token.

A decode step reads every weight once and the cache of each sequence; a prompt takes two operations for each weight and token. A
row tells these bytes and operations a second, for the report to compare with what the card can do. With layers in host memory
(--cpu-offload-gb) a row also tells what was predicted: of a step that takes as long as with all on the card, or as long as the
layers need over the bus, whose speed is measured first.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_targets import Appliance, Case, measure
from gpu_bench import Bench

from tests.tiny_model import LLAMA_1B, LLAMA_8B, Shape, make_checkpoint

SHAPES = {"1b": LLAMA_1B, "8b": LLAMA_8B}
CASES = [Case(sequences=1, prompt=512, tokens=1, repeat=3), Case(sequences=1, prompt=4096, tokens=1, repeat=3)] + [
    Case(sequences=n, prompt=128, tokens=65, repeat=2) for n in (1, 8, 32, 128)
]
LENGTH = 8192
VARIANTS: dict[str, tuple[dict[str, Any], slice]] = {  # options, and which of CASES; what matters most first
    "graphs": ({}, slice(None)),
    "1 GiB freed": ({"cpu_offload_gb": 1.0}, slice(2, 4)),
    "all layers in host memory": ({"cpu_offload_gb": 1000.0}, slice(2, 4)),
    "launched one by one": ({"enforce_eager": True}, slice(3)),
}
Row = dict[str, Any]


def labels(names: Sequence[str], card: bool) -> list[str]:
    """Of all models and variants. Without a card weights are on the host anyway."""
    return [
        f"{name} {words}" for words, (options, _) in VARIANTS.items() if card or "cpu_offload_gb" not in options for name in names
    ]


def run(label: str, folder: Path, bench: Bench) -> Iterator[Row]:
    """One row a case of a model and variant, of a checkpoint that is made in ``folder`` where it is not yet there."""
    name, _, words = label.partition(" ")
    options, cases = VARIANTS[words]
    checkpoint = folder / f"checkpoint-{name}"
    if not (checkpoint / "config.json").is_file():
        make_checkpoint(checkpoint, shape=SHAPES[name], tokenizer=False)
    bench.notebook(at="loading")
    engine = Appliance({"config": {"model": str(checkpoint), "device": bench.device.type, "max_model_len": LENGTH, **options}})
    bench.notebook(at="ready")
    info, rng = engine.engine.info, random.Random(0)

    def one(case: Case) -> Row:
        found = measure(engine.generate, case, rng, SHAPES[name].vocab)
        told = {"planned_bytes": info.plan["total_bytes"], "ready_s": info.ready_s, "offload": info.plan["offload"]}
        told |= {"startup": info.startup, "measured": info.plan["measured"]}
        return {"model": label, **found, **work(engine, SHAPES[name], found), **told}

    yield from bench.rows((f"{label}, {case.sequences} x {case.prompt}", partial(one, case)) for case in CASES[cases])


def bus(bench: Bench) -> float:
    """Bytes a second of copies from pinned memory, as large as the pieces in which layers come."""
    size, spans = 1 << (12 if bench.small else 26), []
    host = torch.zeros(size, dtype=torch.uint8, pin_memory=bench.card)
    there = torch.zeros_like(host, device=bench.device)
    for _ in range(10):
        begun = time.perf_counter()
        there.copy_(host)
        spans.append(time.perf_counter() - begun)
    return size / statistics.median(spans)


def predicted(row: Row, rows: Sequence[Row], link: float) -> Row:
    """{predicted_tok_s, bus_bytes_s} of a model with layers in host memory, from what was measured with all on the card."""
    offload, resident = row["offload"], f"{row['model'].partition(' ')[0]} graphs"
    keys = ("sequences", "prompt", "tokens")
    same = [one for one in rows if one.get("model") == resident and all(one.get(key) == row[key] for key in keys)]
    if not offload["layers"] or not same or not same[0]["decode_tok_s"]:
        return {}
    step_s = row["sequences"] / same[0]["decode_tok_s"]
    slower = max(step_s, offload["step_bytes"] / link)
    return {"predicted_tok_s": row["sequences"] / slower, "bus_bytes_s": link}


def work(engine: Appliance, shape: Shape, found: Row) -> Row:
    """{decode_bytes_s, prefill_ops_s} of a measured case."""
    decoder, sequences = engine.engine.runner.decoder, found["sequences"]
    read = decoder.nbytes - decoder.cos_sin.nbytes - (0 if decoder.tied else decoder.embedding.nbytes)
    of_token = 4 * shape.layers * shape.kv_heads * shape.head_dim  # of the cache, in 16 bits
    told: Row = {"prefill_ops_s": 2 * parameters(shape) * sequences * found["prompt"] / found["first_s"]}
    if found["decode_tok_s"]:
        steps = found["decode_tok_s"] / sequences
        told["decode_bytes_s"] = steps * (read + sequences * of_token * (found["prompt"] + found["tokens"] / 2))
    return told


def parameters(shape: Shape) -> int:
    """Of the layers: those that every token of a prompt meets."""
    heads = 2 * shape.heads + 2 * shape.kv_heads
    return shape.layers * shape.hidden * (heads * shape.head_dim + 3 * shape.mlp)
