"""The engine end to end on a card, random models of real sizes: prefill, decode by number of sequences, time to first token.

A decode step reads every weight once and the cache of each sequence; a prompt takes two operations for each weight and token. A
row tells these bytes and operations a second, for the report to compare with what the card can do.
"""

from __future__ import annotations

import gc
import json
import random
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
START_S = 120.0  # until a model of 8B is made, loaded and warmed up, at most
Row = dict[str, Any]


def run(names: list[str], out: Path, bench: Bench) -> list[Row]:
    """One row a model and case; also told as they come. A model that fails is told with its error, and the next one goes on."""
    rows: list[Row] = []
    free()
    for eager in (False, True):
        for name in names:
            label = f"{name} {'launched one by one' if eager else 'graphs'}"
            if not bench.begins(f"engine, {label}", START_S):
                continue
            folder = out.parent / f"checkpoint-{name}"
            config = {"model": str(folder), "device": bench.device.type, "max_model_len": LENGTH, "enforce_eager": eager}
            try:
                if not (folder / "config.json").is_file():
                    make_checkpoint(folder, shape=SHAPES[name], tokenizer=False)
                engine = Appliance({"config": config})
                rng = random.Random(0)
                for case in CASES[:3] if eager else CASES:
                    if not bench.begins(f"engine, {label}, {case.sequences} x {case.prompt}"):
                        continue
                    found = measure(engine.generate, case, rng, SHAPES[name].vocab)
                    rows.append({"model": label, **found, **work(engine, SHAPES[name], found)})
                    print(json.dumps(rows[-1]), flush=True)
                if rows and rows[-1]["model"] == label:
                    rows[-1] |= {"planned_bytes": engine.engine.info.plan["total_bytes"], "ready_s": engine.engine.info.ready_s}
                del engine
            except Exception as error:  # the report must say what worked
                rows.append({"model": label, "error": f"{type(error).__name__}: {error}"})
                print(json.dumps(rows[-1]), flush=True)
            free()
    return rows


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
