"""What embeddings cost beside the prompts that they are: tokens a second of both, of one model in one process.

    .venv/bin/python scripts/bench_embed.py --model DIR [--texts N] [--tokens N] [--rounds N] [--threads N]

An embedding is a row of the step that computes a text's tokens, so it should come as fast as the prompt of an answer of one token
(``prompts``), and texts that share a step as fast as one long prompt of a whole step (``whole steps``). In turns; medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

STEP = 2048  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="of a text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    from bench import commit, machine

    from appliance import LLM, SamplingParams

    options = {"threads": args.threads, "skip_tokenizer_init": True, "enable_prefix_caching": False}
    sizes = {"max_num_batched_tokens": STEP, "max_model_len": max(STEP + 1, args.tokens), "kv_cache_memory_bytes": "1GiB"}
    embeds, answers = (LLM(args.model, runner=runner, **options, **sizes) for runner in ("pooling", "generate"))
    rng, vocab = random.Random(1), answers._engine.info.vocab_size
    one = SamplingParams(max_tokens=1, temperature=0.0)
    total = args.texts * args.tokens

    def prompts(count: int, length: int) -> list[list[int]]:
        return [[rng.randrange(vocab) for _ in range(length)] for _ in range(count)]

    cases: dict[str, Callable[[], object]] = {
        "embeddings": lambda: embeds.embed(prompts(args.texts, args.tokens), use_tqdm=False),
        "prompts": lambda: answers.generate(prompts(args.texts, args.tokens), one, use_tqdm=False),
        "whole steps": lambda: answers.generate(prompts(max(1, total // STEP), STEP), one, use_tqdm=False),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(args.rounds + 1):
        for name, run in cases.items():
            begun = time.perf_counter()
            run()
            tokens = max(1, total // STEP) * STEP if name == "whole steps" else total
            if number:  # the first round makes what is made once
                rates[name].append(tokens / (time.perf_counter() - begun))
    print(f"{time.strftime('%Y-%m-%d')}, commit {commit()}, {machine()}, {args.rounds} rounds")
    print(f"{Path(args.model).name}: {args.texts} texts of {args.tokens} tokens, steps of {STEP}\n")
    print("| | tokens/s | to whole steps |\n|---|---|---|")
    middle = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in middle.items():
        print(f"| {name} | {value:.0f} | {value / middle['whole steps']:.2f} |")


if __name__ == "__main__":
    main()
