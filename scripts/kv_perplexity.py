"""What each kind of cache costs in perplexity, as a table: docs/kv-cache.md has one.

python scripts/kv_perplexity.py MODEL [MODEL ...] --text FILE [--windows 128] [--length 448] [--dtype auto]

Each window of the text is a prompt, and every token of it is predicted over the cache: a prompt's tokens read what they wrote.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from appliance import LLM, SamplingParams
from kernels.layout import SCALED_CACHES


def perplexity(llm: LLM, text: str, windows: int, length: int) -> tuple[float, int]:
    """(perplexity, tokens scored) of the first ``windows`` stretches of ``length`` tokens, each behind a start token."""
    ids = llm.get_tokenizer().encode(text, add_special_tokens=False)
    firsts = range(0, min(windows * length, len(ids) - length), length)
    prompts = [{"prompt_token_ids": [1, *ids[first : first + length]]} for first in firsts]
    scores = []
    for output in llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False):
        found = zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:], strict=True)
        scores += [entry[token].logprob for token, entry in found if entry is not None]
    return math.exp(-sum(scores) / len(scores)), len(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=448)
    parser.add_argument("--dtype", default="auto", help="of activations; float32 leaves nothing but the cache to differ")
    args = parser.parse_args()
    text = args.text.read_text()
    print("| model | tokens | auto | " + " | ".join(SCALED_CACHES) + " |\n" + "|---" * (len(SCALED_CACHES) + 3) + "|")
    for model in args.models:

        def measure(cache: str, model: Path = model) -> tuple[float, int]:
            options = {"kv_cache_dtype": cache, "dtype": args.dtype, "kv_cache_memory_bytes": 32 << 20}
            return perplexity(LLM(model=str(model), **options), text, args.windows, args.length)

        plain, tokens = measure("auto")
        costs = [f"{100 * (measure(cache)[0] / plain - 1):+.2f} %" for cache in SCALED_CACHES]
        print(f"| {model.name} | {tokens} | {plain:.2f} | " + " | ".join(costs) + " |", flush=True)


if __name__ == "__main__":
    main()
