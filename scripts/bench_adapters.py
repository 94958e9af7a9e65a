"""What LoRA adapters cost: tokens a second of one model as it is, made ready for adapters, and with them.

    .venv/bin/python scripts/bench_adapters.py --model DIR [--rank N] [--sequences 1,16] [--rounds N] [--tokens N] [--threads N]

Adapters of random numbers, on all linears of attention and MLP. In turns, medians: "plain" is an engine without room for
adapters, "none" one with room whose requests have none, "one" has all sequences with one adapter, "each" every one its own.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

PROMPT = 128
ALL = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sequences", default="1,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    from bench import commit, machine

    from appliance import LLM, LoRARequest
    from models.spec import ModelSpec
    from quant.headers import read_json
    from tests.adapters import write_adapter

    counts = [int(one) for one in args.sequences.split(",")]
    spec = ModelSpec.from_config(read_json(Path(args.model) / "config.json"))
    options = {"threads": args.threads, "skip_tokenizer_init": True, "enable_prefix_caching": False, "max_model_len": 1024}
    sizes = {"kv_cache_memory_bytes": "1GiB", "max_num_seqs": max(counts)}
    room = {"enable_lora": True, "max_loras": max(counts), "max_lora_rank": args.rank}
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            write_adapter(Path(folder, str(n)), spec, seed=n, rank=args.rank, modules=ALL, size=0.01) for n in range(max(counts))
        ]
        adapters = [LoRARequest(f"a{n}", n + 1, path) for n, path in enumerate(paths)]
        plain, ready = LLM(args.model, **options, **sizes), LLM(args.model, **options, **sizes, **room)
        ready._adapters.bring(adapters)
        print(f"{time.strftime('%Y-%m-%d')}, commit {commit()}, {machine()}, {args.rounds} rounds")
        weights = {one.nbytes for one in ready._engine.runner.adapters.values()}
        print(f"{Path(args.model).name}: rank {args.rank}, {max(weights) / 2**20:.1f} MiB an adapter, answers of {args.tokens}\n")
        print("| sequences | | decode, tok/s | to plain | prompts, tok/s | to plain |\n|---|---|---|---|---|---|")
        for count in counts:
            measure(count, args, {
                "plain": (plain, [None] * count), "none": (ready, [None] * count),
                "one": (ready, adapters[:1] * count), "each": (ready, adapters[:count]),
            })  # fmt: skip


def measure(count: int, args: argparse.Namespace, cases: dict) -> None:
    """Of so many sequences at once: rates of steps in which all take part, and of the steps that compute prompts."""
    from appliance import SamplingParams

    rng, rates = random.Random(1), {name: ([], []) for name in cases}
    for number in range(args.rounds + 1):
        for name, (llm, requests) in cases.items():
            vocab = llm._engine.info.vocab_size
            prompts = [[rng.randrange(vocab) for _ in range(PROMPT)] for _ in range(count)]
            found = []
            for tokens in (1, 1 + args.tokens):
                params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
                begun = time.perf_counter()
                llm.generate(prompts, params, use_tqdm=False, lora_request=requests)
                found.append(time.perf_counter() - begun)
            if number:  # the first round makes what is made once
                rates[name][0].append(count * args.tokens / (found[1] - found[0]))
                rates[name][1].append(count * PROMPT / found[0])
    middle = {name: [statistics.median(values) for values in both] for name, both in rates.items()}
    for name, (decode, prompt) in middle.items():
        shares = decode / middle["plain"][0], prompt / middle["plain"][1]
        print(f"| {count} | {name} | {decode:.1f} | {shares[0]:.2f} | {prompt:.0f} | {shares[1]:.2f} |")


if __name__ == "__main__":
    main()
