"""What guesses (--speculative-config) bring and cost, by the share of guesses that are right.

    .venv/bin/python scripts/bench_drafts.py --model DIR [--tokens N] [--rounds N] [--json FILE]

First the time of a step of one sequence by its rows: the next token alone, or with guesses behind it. The cases follow one
another in each round, so that a machine whose speed moves is the same for all of them; medians of the rounds.

Then how many steps an answer takes. How often guesses are right is the text's affair, and random weights make no text: so an
answer is computed once without guesses, and then again with guesses of which each is right with a given chance, and wrong behind
a wrong one, whatever the model. Steps are counted, not timed; with the times above they give how much faster the answer is.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from array import array
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from bench import commit, machine  # noqa: E402

from appliance.config import EngineConfig  # noqa: E402
from appliance.core.drafts import ROWS, Drafts, Said  # noqa: E402
from appliance.core.messages import Submit  # noqa: E402
from appliance.core.params import SamplingParams  # noqa: E402
from appliance.core.request import Request  # noqa: E402
from appliance.core.step import Chunk, StepPlan  # noqa: E402
from appliance.runtime.engine import Engine  # noqa: E402

CHANCES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0)
MOST = (3, 5, 10)
PROMPT = 512


class Scripted(Drafts):
    """Knows the answer."""

    def know(self, answer: list[int], chance: float) -> None:
        self.answer, self.chance, self.random = answer, chance, random.Random(5)

    def guess(self, request: Request, most: int) -> tuple[int, ...]:
        request.said = request.said or Said(self.tokens)
        right = self.answer[request.output_len :][: min(most, request.said.hope)]
        good = next((i for i in range(len(right)) if self.random.random() >= self.chance), len(right))
        return tuple(token if i < good else token ^ 1 for i, token in enumerate(right))


def step_ms(engine: Engine, rounds: int) -> dict[int, float]:
    """Of a step by its rows, behind PROMPT tokens."""
    params, blocks = SamplingParams(temperature=0.0, max_tokens=64), array("i", range(64))
    ids = list(range(5, 5 + PROMPT + 1))
    request = Request("r", 0, ids, len(ids), params, len(ids) + 64, 0, 0.0, blocks=blocks)

    def took(chunk: Chunk) -> float:
        begun = time.perf_counter()
        engine.runner.launch(StepPlan((chunk,)), [len(ids)]).land()
        return 1e3 * (time.perf_counter() - begun)

    took(Chunk(request, 0, PROMPT, False))
    cases = {rows: Chunk(request, PROMPT, rows, True, (7,) * (rows - 1)) for rows in range(1, 1 + ROWS)}
    found = [{rows: took(chunk) for rows, chunk in cases.items()} for _ in range(rounds)]
    return {rows: statistics.median(one[rows] for one in found) for rows in cases}


def answer(engine: Engine, tokens: int, drafts: Drafts | None) -> tuple[list[int], list[int]]:
    """(the answer, the rows of each step that decodes)."""
    prompt = tuple(random.Random(1).sample(range(engine.info.vocab_size // 2), PROMPT))
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    engine.scheduler.drafts, found, rows = drafts, [], []
    engine.submit(Submit("r", prompt, params, arrival=0.0))
    while engine.has_work:
        before = engine.stats().step_tokens
        found += [token for event in engine.step() for token in event.token_ids]
        rows.append(engine.stats().step_tokens - before)
    return found, rows[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", metavar="FILE", type=Path)
    args = parser.parse_args()
    engine = Engine.load(EngineConfig(model=args.model, max_model_len=2048, max_num_seqs=16, enable_prefix_caching=False))
    cost, same, table = step_ms(engine, args.rounds), 0, {}
    expected, plain = answer(engine, args.tokens, None)
    for most in MOST:
        for chance in CHANCES:
            drafts = Scripted(most, 1, 1)
            drafts.know(expected, chance)
            found, rows = answer(engine, args.tokens, drafts)
            same += found == expected
            table[most, chance] = len(plain) / len(rows), len(plain) * cost[1] / sum(cost[n] for n in rows)
    print(f"{machine()}; commit {commit()}; {args.tokens} tokens behind {PROMPT}, greedy, {engine.info.kernels}\n")
    print("| rows | " + " | ".join(map(str, cost)) + " |\n" + (1 + len(cost)) * "|---" + "|")
    print("| a step, ms | " + " | ".join(f"{ms:.1f}" for ms in cost.values()) + " |")
    print("| against one row | " + " | ".join(f"{ms / cost[1]:.2f}" for ms in cost.values()) + " |\n")
    print(
        "| guesses, at most | " + " | ".join(f"{chance:.0%}" for chance in CHANCES) + " |\n" + (1 + len(CHANCES)) * "|---" + "|"
    )
    for most in MOST:
        cells = (f"{table[most, chance][0]:.2f}, {table[most, chance][1]:.2f} times as fast" for chance in CHANCES)
        print(f"| {most} | " + " | ".join(cells) + " |")
    print(f"\nanswers equal to the one without: {same} of {len(table)}")
    if args.json:
        found = {f"{most} {chance:.0%}": both for (most, chance), both in table.items()}
        args.json.write_text(
            json.dumps({"machine": machine(), "commit": commit(), "step_ms": cost, "tokens a step, speed": found}, indent=1)
        )


if __name__ == "__main__":
    main()
