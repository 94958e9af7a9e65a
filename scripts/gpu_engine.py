"""The engine end to end on a card, random models of real sizes: prefill, decode by number of sequences, time to first token.

A decode step reads every weight once and the cache of each sequence; a prompt takes two operations for each weight and token. A
row tells these bytes and operations a second, for the report to compare with what the card can do. With layers in host memory
(--cpu-offload-gb) a row also tells what was predicted: of a step that takes as long as with all on the card, or as long as the
layers need over the bus, whose speed is measured first.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import time
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
VARIANTS: dict[str, tuple[dict[str, Any], slice]] = {  # options, and which of CASES
    "graphs": ({}, slice(None)),
    "launched one by one": ({"enforce_eager": True}, slice(3)),
    "1 GiB freed": ({"cpu_offload_gb": 1.0}, slice(2, 4)),
    "all layers in host memory": ({"cpu_offload_gb": 1000.0}, slice(2, 4)),
}
START_S = 120.0  # until a model of 8B is made, loaded and warmed up, at most
Row = dict[str, Any]


def run(names: list[str], out: Path, bench: Bench) -> list[Row]:
    """One row a model and case; also told as they come. A model that fails is told with its error, and the next one goes on."""
    rows: list[Row] = []
    free()
    link = bus(bench)
    for words, (options, cases) in VARIANTS.items():
        if "cpu_offload_gb" in options and not bench.card:
            continue  # weights are on the host anyway
        for name in names:
            label = f"{name} {words}"
            if not bench.begins(f"engine, {label}", START_S):
                continue
            folder = out.parent / f"checkpoint-{name}"
            config = {"model": str(folder), "device": bench.device.type, "max_model_len": LENGTH, **options}
            try:
                if not (folder / "config.json").is_file():
                    make_checkpoint(folder, shape=SHAPES[name], tokenizer=False)
                engine = Appliance({"config": config})
                rng = random.Random(0)
                for case in CASES[cases]:
                    if not bench.begins(f"engine, {label}, {case.sequences} x {case.prompt}"):
                        continue
                    found = measure(engine.generate, case, rng, SHAPES[name].vocab)
                    rows.append({"model": label, **found, **work(engine, SHAPES[name], found)})
                    rows[-1] |= predicted(rows[-1], f"{name} graphs", rows, engine, link)
                    print(json.dumps(rows[-1]), flush=True)
                if rows and rows[-1]["model"] == label:
                    rows[-1] |= {"planned_bytes": engine.engine.info.plan["total_bytes"], "ready_s": engine.engine.info.ready_s}
                del engine
            except Exception as error:  # the report must say what worked
                rows.append({"model": label, "error": f"{type(error).__name__}: {error}"})
                print(json.dumps(rows[-1]), flush=True)
            free()
    return rows


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


def predicted(row: Row, resident: str, rows: list[Row], engine: Appliance, link: float) -> Row:
    """{predicted_tok_s, bus_bytes_s} of a model with layers in host memory, from what was measured with all on the card."""
    offload = engine.engine.info.plan["offload"]
    keys = ("sequences", "prompt", "tokens")
    same = [one for one in rows if one["model"] == resident and all(one.get(key) == row[key] for key in keys)]
    if not offload["layers"] or not same or not same[0]["decode_tok_s"]:
        return {}
    step_s = row["sequences"] / same[0]["decode_tok_s"]
    slower = max(step_s, offload["step_bytes"] / link)
    return {"predicted_tok_s": row["sequences"] / slower, "bus_bytes_s": link}


def free() -> None:
    """What a model has left behind: the next one plans with what is free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
