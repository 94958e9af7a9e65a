"""What guesses (--speculative-config) bring and cost: tokens a second by the share of guesses that are right.

    .venv/bin/python scripts/bench_drafts.py --model DIR [--tokens N] [--rounds N] [--json FILE]

How often guesses are right is the text's affair, and random weights make no text: so an answer is computed once without guesses,
and then again with guesses of which each is right with a given chance, and wrong behind a wrong one, whatever the model. "none":
without. "no place": with guesses, but the text never says anything twice: what the search costs. Cases of a round follow one
another; the table has the medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from bench import commit, machine  # noqa: E402

from appliance.config import EngineConfig  # noqa: E402
from appliance.core.drafts import Drafts, Said  # noqa: E402
from appliance.core.messages import Submit  # noqa: E402
from appliance.core.params import SamplingParams  # noqa: E402
from appliance.core.request import Request  # noqa: E402
from appliance.runtime.engine import Engine  # noqa: E402

CHANCES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0)
PROMPT = 512


class Scripted(Drafts):
    """Knows the answers."""

    def know(self, answers: dict[str, list[int]], chance: float) -> None:
        self.answers, self.chance, self.random = answers, chance, random.Random(5)

    def guess(self, request: Request, most: int) -> tuple[int, ...]:
        request.said = request.said or Said(self.tokens)
        right = self.answers[request.request_id][request.output_len :][: min(most, request.said.hope)]
        good = next((i for i in range(len(right)) if self.random.random() >= self.chance), len(right))
        return tuple(token if i < good else token ^ 1 for i, token in enumerate(right))


def answer(engine: Engine, sequences: int, tokens: int) -> tuple[float, dict[str, list[int]]]:
    """(tokens a second while all decode, the answers)."""
    rng, found, vocab = random.Random(1), {}, engine.info.vocab_size
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    for i in range(sequences):
        prompt = tuple(rng.sample(range(vocab // 2), PROMPT))
        engine.submit(Submit(f"r{i}", prompt, params, arrival=0.0))
        found[f"r{i}"] = list[int]()
    while any(not one for one in found.values()):
        for event in engine.step():
            found[event.request_id] += event.token_ids
    begun, before = time.perf_counter(), sum(map(len, found.values()))
    while engine.has_work:
        for event in engine.step():
            found[event.request_id] += event.token_ids
    return (sum(map(len, found.values())) - before) / (time.perf_counter() - begun), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", type=Path)
    args = parser.parse_args()
    config = EngineConfig(model=args.model, max_model_len=2048, max_num_seqs=16, enable_prefix_caching=False)
    engine = Engine.load(config)
    rows = []
    for number in range(args.rounds):
        for sequences in (1, 4):
            engine.scheduler.drafts = None
            speed, answers = answer(engine, sequences, args.tokens)
            rows.append({"sequences": sequences, "guesses": 0, "case": "none", "speed": speed})
            for most in (3, 5, 10):
                engine.scheduler.drafts = Drafts(most, 64, 64)
                speed, _ = answer(engine, sequences, args.tokens)
                rows.append({"sequences": sequences, "guesses": most, "case": "no place", "speed": speed})
                for chance in CHANCES:
                    engine.scheduler.drafts = drafts = Scripted(most, 1, 1)
                    drafts.know(answers, chance)
                    speed, found = answer(engine, sequences, args.tokens)
                    same = sum(found[key] == answers[key] for key in answers)
                    rows.append({"sequences": sequences, "guesses": most, "case": f"{chance:.0%}", "speed": speed, "same": same})
        print(f"round {number + 1} of {args.rounds}", flush=True)
    print(f"{machine()}; commit {commit()}; {args.tokens} tokens behind {PROMPT}, greedy, {engine.info.kernels}\n")
    cases = ["none", "no place", *(f"{chance:.0%}" for chance in CHANCES)]
    print("| sequences | guesses, at most | " + " | ".join(cases) + " |\n" + (2 + len(cases)) * "|---" + "|")
    for sequences in (1, 4):
        for most in (3, 5, 10):
            mine = [row for row in rows if row["sequences"] == sequences and row["guesses"] in (0, most)]
            cells = [statistics.median(row["speed"] for row in mine if row["case"] == case) for case in cases]
            print(f"| {sequences} | {most} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    again = [row for row in rows if "same" in row]
    print(f"\nanswers equal to those without: {sum(r['same'] for r in again)} of {sum(r['sequences'] for r in again)}")
    if args.json:
        args.json.write_text(json.dumps({"python": platform.python_version(), "machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
