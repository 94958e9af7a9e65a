"""docs/gpu-predictions.md: what an RTX 4090 should do with 4-bit models, computed from bytes and operations; nothing is run.

    .venv/bin/python scripts/gpu_predict.py [--measured gpu_check_bench.json] [--out FILE]

Bytes come from the planner's own arithmetic (appliance/memory), so that a prediction is of weights as they are packed.
``--measured`` takes a report of scripts/gpu_check: the shares of its card's bandwidth that kernels reached there fill a column.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from appliance.config import EngineConfig
from appliance.memory.demand import Demand
from appliance.memory.devices import MIB, DeviceInfo
from appliance.memory.fit import fit
from appliance.memory.modules import Loaded, Machinery
from appliance.memory.plan import MemoryPlan
from appliance.memory.roofline import (
    ATTENTION,
    CAUTION,
    ENDS,
    LAUNCH_S,
    LAUNCHES,
    PREFILL,
    PREFILL_ATTENTION,
    TARGETS,
    Limits,
    Shares,
    Work,
    at_rows,
)
from appliance.memory.settings import Settings
from models.spec import ModelSpec
from quant.scheme import QuantScheme

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "gpu-predictions.md"
CARD = DeviceInfo("cuda", "NVIDIA GeForce RTX 4090", 24564 * MIB, 24564 * MIB, 89)
BANDWIDTH, RATE = 1008e9, 165e12  # bytes, and operations in float16 with sums in float32, a second
CONTEXTS, SEQUENCES, PROMPTS = (2048, 8192), (1, 8, 32), (2048, 8192)

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
SHAPES = {  # layers, hidden, intermediate, heads, kv heads, vocabulary, longest
    "Llama-2-7B": (LLAMA, 32, 4096, 11008, 32, 32, 32000, 4096),
    "Qwen2.5-7B": (QWEN, 28, 3584, 18944, 28, 4, 152064, 32768),
    "Qwen2.5-14B": (QWEN, 48, 5120, 13824, 40, 8, 152064, 32768),
    "Qwen2.5-32B": (QWEN, 64, 5120, 27648, 40, 8, 152064, 32768),
}
PRODUCTS = ("w4a16", "w8a16")
LIMITS = Limits(BANDWIDTH, RATE, RATE)


@dataclass(frozen=True)
class Model:
    """A published 4-bit model (AWQ, groups of 128, zero points, float16), its head stored in int8 by the loader."""

    name: str
    cache: str = "auto"  # as in --kv-cache-dtype

    @cached_property
    def config(self) -> dict[str, Any]:
        family, *numbers = SHAPES[self.name]
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        sizes = dict(zip((*names, "vocab_size", "max_position_embeddings"), numbers, strict=True))
        return {**family, **sizes, "hidden_act": "silu", "torch_dtype": "float16", "quantization_config": AWQ}

    @cached_property
    def parts(self) -> tuple[ModelSpec, QuantScheme, Machinery]:
        spec = ModelSpec.from_config(self.config)
        return spec, QuantScheme.from_config(self.config), Machinery.choose(EngineConfig(device="cuda"), spec.dtype, CARD)

    @property
    def spec(self) -> ModelSpec:
        return self.parts[0]

    @cached_property
    def work(self) -> Work:
        return Work.of(*self.parts)

    @property
    def weights(self) -> tuple[tuple[str, int, Loaded], ...]:
        """(slot, bytes as packed, weight) of all that a token reads: the layers' and the head, not the embedding."""
        return self.work.weights

    @cached_property
    def plan(self) -> MemoryPlan:
        demand = Demand.of(*self.parts, model=self.name)
        return fit(demand, Settings.from_config(EngineConfig(device="cuda", kv_cache_dtype=self.cache), CARD), CARD)

    def decode_s(self, sequences: int, context: int, shares: Shares | None, *, caution: float = 1.0) -> float:
        """Seconds of a step of one token for each sequence, of ``context`` tokens; shares None: the roof."""
        pause = LAUNCH_S if caution == 1.0 else 2 * LAUNCH_S
        return self.work.decode_s(LIMITS, sequences, context, self.plan.kv.token_bytes, shares, caution, pause)

    def prefill_ops(self, prompt: int) -> tuple[float, float]:
        """(of products, of attention) for one prompt."""
        return self.work.prefill_ops(prompt)


def measured_shares(report: Mapping[str, Any]) -> Shares:
    """By rows, of the copy's bandwidth in a report of scripts/gpu_check: float16, the least where there are several."""
    found: dict[str, dict[int, float]] = {name: {} for name in TARGETS}
    for row in report["kernels"]:
        slot = ATTENTION if row["op"] == f"{ATTENTION}, cache 16 bits" else row.get("shape", "") if row["op"] in PRODUCTS else ""
        if slot in found and row["dtype"] == "float16":
            share = row["bytes"] / row["ours_s"] / report["limits"]["copy"]
            found[slot][row["rows"]] = min(share, found[slot].get(row["rows"], share))
    missing = [slot for slot, shares in found.items() if not shares]
    if missing:
        raise SystemExit(f"the report has no measurement in float16 of {', '.join(missing)}")
    return found


def fits_table(models: Iterable[Model]) -> str:
    rows = []
    for model in models:
        spec, plan = model.spec, model.plan
        counts = [f"{plan.sequences(n):.1f}" if n <= spec.max_len else "too long" for n in CONTEXTS]
        sizes = [
            f"{size / 1e9:.2f}" for size in (plan.weight_bytes, plan.workspace + plan.graph_bytes + plan.runtime, plan.kv_bytes)
        ]
        rows.append([model.name, *sizes, f"{plan.kv.token_bytes / 1e3:.0f}", str(plan.tokens), str(plan.max_model_len), *counts])
    head = ["model", "weights, GB", "workspace and runtime, GB", "cache, GB", "KB a token", "tokens", "longest context"]
    return table([*head, *(f"sequences of {n}" for n in CONTEXTS)], rows)


def decode_table(models: Iterable[Model], measured: Shares | None) -> str:
    rows = []
    for model in models:
        for context in CONTEXTS:
            for sequences in SEQUENCES if context <= model.spec.max_len else ():
                weights = sum(nbytes for _, nbytes, _ in model.weights)
                cached = sequences * context * model.plan.kv.token_bytes
                row = [model.name, str(context), str(sequences), f"{weights / 1e9:.2f} + {cached / 1e9:.2f}"]
                if model.plan.sequences(context) < sequences:
                    rows.append([*row, "", f"{int(model.plan.sequences(context))} fit", ""])
                    continue
                roof, best = model.decode_s(sequences, context, None), model.decode_s(sequences, context, TARGETS)
                low = model.decode_s(sequences, context, TARGETS, caution=CAUTION)
                ours = model.decode_s(sequences, context, measured) if measured else None
                cells = [rate(sequences, roof), f"{rate(sequences, low)} to {rate(sequences, best)}"]
                rows.append([*row, *cells, rate(sequences, ours) if ours else ""])
    head = [
        "model",
        "context",
        "sequences",
        "GB a step: weights + cache",
        "roof, tok/s",
        "predicted, tok/s",
        "at measured shares, tok/s",
    ]
    return table(head, rows)


def caches_table(models: Iterable[Model]) -> str:
    context, sequences = 2048, 8
    rows = []
    kinds = {"auto": "float16", "int8": "int8, fp8_e4m3, fp8_e5m2", "int4": "int4"}
    for name, kind in ((model.name, kind) for model in models for kind in kinds):
        model = Model(name, kind)
        plan, roof = model.plan, sequences * context * model.plan.kv.token_bytes / BANDWIDTH
        best = roof / at_rows(TARGETS[ATTENTION], sequences)
        sizes = [f"{plan.kv.token_bytes / 1e3:.0f}", str(plan.tokens), f"{plan.sequences(context):.0f}", f"{1e3 * roof:.2f}"]
        row = [name, kinds[kind], *sizes, f"{1e3 * best:.2f} to {1e3 * best / CAUTION:.2f}"]
        if plan.sequences(context) < sequences:
            rows.append([*row, f"{int(plan.sequences(context))} fit"])
            continue
        low, high = (model.decode_s(sequences, context, TARGETS, caution=caution) for caution in (CAUTION, 1.0))
        rows.append([*row, f"{rate(sequences, low)} to {rate(sequences, high)}"])
    head = ["model", "cache", "KB a token", "tokens", f"sequences of {context}", "roof, ms", "attention, ms", "predicted, tok/s"]
    return table(head, rows)


def prefill_table(models: Iterable[Model]) -> str:
    rows = []
    for model in models:
        for prompt in PROMPTS if model.spec.max_len > PROMPTS[-1] else PROMPTS[:1]:
            products, attention = model.prefill_ops(prompt)
            roof, best, low = (model.work.prefill_s(LIMITS, prompt, share) for share in (None, 1.0, CAUTION))
            cells = [rate(prompt, roof), f"{rate(prompt, low)} to {rate(prompt, best)}"]
            rows.append([model.name, str(prompt), f"{products / 1e12:.1f} + {attention / 1e12:.1f}", *cells])
    return table(["model", "prompt", "10^12 operations: products + attention", "roof, tok/s", "predicted, tok/s"], rows)


def shares_table(measured: Shares | None) -> str:
    rows = []
    for slot, targets in TARGETS.items():
        for most, share in targets.items():
            here = f"{100 * at_rows(measured[slot], most):.0f} %" if measured else ""
            rows.append([slot, str(most), f"{100 * share:.0f} %", f"{100 * CAUTION * share:.0f} %", here])
    return table(["kernel", "rows, at most", "target", "low end", "measured"], rows)


def shapes_table() -> str:
    names = ["layers", "hidden", "intermediate", "heads", "kv heads", "vocabulary", "longest"]
    return table(["model", *names], [[name, *map(str, numbers)] for name, (_, *numbers) in SHAPES.items()])


def rate(tokens: int, seconds: float) -> str:
    """Tokens a second, three digits."""
    return f"{float(f'{tokens / seconds:.3g}'):.0f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))


def document(report: Path | None) -> str:
    measured, source = None, "none yet"
    if report is not None:
        found = json.loads(report.read_text())
        where = report.resolve()
        path = where.relative_to(ROOT) if where.is_relative_to(ROOT) else where.name
        measured, source = measured_shares(found), f"those of `{path}` ({found['machine'].get('card', 'no card')})"
    models = [Model(name) for name in SHAPES]
    return TEXT.format(
        bandwidth=BANDWIDTH / 1e9, rate=RATE / 1e12, total=CARD.total // MIB, caution=100 * CAUTION, source=source,
        launches=LAUNCHES, ends=ENDS, launch=LAUNCH_S * 1e6, prefill=100 * PREFILL, attention=100 * PREFILL_ATTENTION,
        shares=shares_table(measured), shapes=shapes_table(), fits=fits_table(models), decode=decode_table(models, measured),
        caches=caches_table(models), prompts=prefill_table(models),
    )  # fmt: skip


TEXT = """# Predictions for an RTX 4090
**Nothing here was measured.** Written by `scripts/gpu_predict.py`: bytes and operations of 4-bit models (AWQ, groups of 128,
activations and cache in float16, the head in int8), divided by what the card is sold with ({bandwidth:.0f} GB/s,
{rate:.0f} x 10^12 operations a second in float16 with sums in float32, {total} MiB) times the share of it that each kernel is
meant to reach.

Measured shares: {source}.

A roof is the same with every share 100 % and no pauses. A range ends at the targets, with {launches} launches a layer and {ends}
more, {launch:.0f} us apart; it begins at {caution:.0f} % of every share with twice the pause. What this leaves out: drawing
tokens, steps that mix prompts with answers, and a desktop that uses the same card.

## Shares of the bandwidth
{shares}
Products of a prompt: {prefill:.0f} % of the rate; its attention {attention:.0f} %.

## Models
{shapes}
## What fits
The plan of `appliance plan` for this card with the default flags; sequences of a length that the cache holds at once.

{fits}
## Decode
Each step reads the weights once and every sequence's cache.

{decode}
## Caches
A step of 8 sequences of 2048 tokens with each `--kv-cache-dtype`: what decode attention takes in all layers, for its bytes alone,
and the whole step. Codes and scales are read, nothing is dequantized in memory; the loop has 3.5 (float16) to 4.0 (int8)
instructions for each number (compiled for sm_89, [gpu-kernels.md](gpu-kernels.md)), and this card issues 41 for each byte that
it reads (128 multiprocessors, four warps of 32 at 2.52 GHz).

{caches}
## Prefill
One prompt at a time.

{prompts}"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, help="gpu_check_bench.json of scripts/gpu_check")
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    args = parser.parse_args(argv)
    args.out.write_text(document(args.measured))


if __name__ == "__main__":
    main()
