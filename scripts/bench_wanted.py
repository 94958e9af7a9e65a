"""What a prompt takes where the last layers store nothing, and so compute the rows alone whose hidden states are wanted.

    .venv/bin/python scripts/bench_wanted.py [--model DIR] [--tokens N ..] [--before N ..] [--rounds N] [--threads N]

Without --model it is one of random weights with Gemma 4 E2B's layers at half of its sizes (35 layers, of which 20 store nothing
and have MLPs of twice the width), rounded to 4 bits while it is loaded. A chunk of a prompt is computed with all rows wanted
(as for prompt_logprobs, whose scores are left out here), with the last one, and with none, in turns: medians of processor time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from array import array
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from bench import commit, machine  # noqa: E402

from appliance.config import EngineConfig  # noqa: E402
from appliance.core.params import SamplingParams  # noqa: E402
from appliance.core.request import Request  # noqa: E402
from appliance.core.step import Chunk, StepPlan  # noqa: E402
from appliance.runtime.engine import Engine  # noqa: E402
from models.spec import ModelSpec  # noqa: E402

HALF = {
    "architectures": ["Gemma4ForCausalLM"], "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 35,
    "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 128, "global_head_dim": 256, "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True, "attention_k_eq_v": False, "hidden_size_per_layer_input": 128, "vocab_size": 32768,
    "vocab_size_per_layer_input": 32768, "sliding_window": 512, "max_position_embeddings": 8192, "dtype": "bfloat16",
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
}  # fmt: skip
CASES = {"all rows": (True, 0), "the last row": (True, None), "no row": (False, None)}  # whether it samples, prompt_logprobs


def make_model(directory: Path) -> Path:
    """Random weights under the published names."""
    spec, rng = ModelSpec.from_config(HALF), torch.Generator().manual_seed(1)
    sizes = {f"{m.name}.weight": (m.N, m.K) for m in spec.modules()}
    tensors = {name: torch.randn(*size, generator=rng).mul_(size[1] ** -0.5).bfloat16() for name, size in sizes.items()}
    tensors |= {name: torch.ones(size, dtype=torch.bfloat16) for name, size in spec.small_tensors()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(HALF))
    return directory


def seconds(engine: Engine, tokens: int, before: int, rounds: int) -> dict[str, float]:
    """Of processor time, in the median: of a chunk of so many tokens behind others."""
    size = engine.runner.block_size
    ids, blocks = [5 + i % 1000 for i in range(before + tokens)], array("i", range(-(-(before + tokens) // size)))

    def took(samples: bool, scores: int | None) -> float:
        params = SamplingParams(temperature=0.0, prompt_logprobs=scores)
        request = Request("r", 0, ids, len(ids), params, len(ids) + 1, 0, 0.0, blocks=blocks)
        begun = time.process_time()
        engine.runner.launch(StepPlan((Chunk(request, before, tokens, samples),)), [len(ids)]).land()
        return time.process_time() - begun

    for case in CASES.values():
        took(*case)
    found = [{name: took(*case) for name, case in CASES.items()} for _ in range(rounds)]
    return {name: statistics.median(one[name] for one in found) for name in CASES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--before", type=int, nargs="+", default=[0, 1536])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quantization", default="int4")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        model = args.model or make_model(Path(made))
        config = EngineConfig(
            model=str(model), max_model_len=max(args.before) + max(args.tokens) + 16, max_num_batched_tokens=max(args.tokens),
            max_num_seqs=4, threads=args.threads, quantization=args.quantization, kv_cache_memory_bytes=1 << 28,
            skip_tokenizer_init=True,
        )  # fmt: skip
        engine = Engine.load(config)
    print(f"{machine()}; commit {commit()}; {engine.info.kernels}, {args.threads} threads\n")
    print("| tokens | behind | " + " | ".join(CASES) + " | all against the last |\n" + "|---" * (3 + len(CASES)) + "|")
    for before in args.before:
        for tokens in args.tokens:
            found = seconds(engine, tokens, before, args.rounds)
            speeds = " | ".join(f"{tokens / one:.0f} tokens/s" for one in found.values())
            print(f"| {tokens} | {before} | {speeds} | {found['all rows'] / found['the last row']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
