"""The engine end to end on a card, random models of real sizes: prefill, decode by number of sequences, time to first token."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from bench_targets import Appliance, Case, measure

from tests.tiny_model import LLAMA_1B, LLAMA_8B, make_checkpoint

SHAPES = {"1b": LLAMA_1B, "8b": LLAMA_8B}
CASES = [Case(sequences=1, prompt=512, tokens=1, repeat=3), Case(sequences=1, prompt=4096, tokens=1, repeat=3)] + [
    Case(sequences=n, prompt=128, tokens=65, repeat=2) for n in (1, 8, 32, 128)
]


def run(names: list[str], out: Path) -> list[dict[str, Any]]:
    """One row a model and case; also told as they come. A model that fails is told with its error, and the next one goes on."""
    rows = []
    for name in names:
        folder = out.parent / f"checkpoint-{name}"
        if not (folder / "config.json").is_file():
            make_checkpoint(folder, shape=SHAPES[name], tokenizer=False)
        for eager in (False, True):
            label = f"{name} {'launched one by one' if eager else 'graphs'}"
            config = {"model": str(folder), "device": "cuda", "max_model_len": 8192, "enforce_eager": eager}
            try:
                engine = Appliance({"config": config})
                rng = random.Random(0)
                for case in CASES[:3] if eager else CASES:
                    rows.append({"model": label, **measure(engine.generate, case, rng, SHAPES[name].vocab)})
                    print(json.dumps(rows[-1]), flush=True)
                rows[-1] |= {"planned_bytes": engine.engine.info.plan["total_bytes"], "ready_s": engine.engine.info.ready_s}
                del engine
            except Exception as error:  # the report must say what worked
                rows.append({"model": label, "error": f"{type(error).__name__}: {error}"})
                print(json.dumps(rows[-1]), flush=True)
    return rows
