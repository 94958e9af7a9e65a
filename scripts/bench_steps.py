"""What the API process costs the engine: its steps with 64 sequences of a model, with an API and without.

    .venv/bin/python scripts/bench_steps.py [--threads 1,2] [--rounds N] [--json FILE] [--model DIR --tokenizer DIR --tokens N]

Without: the engine alone in its process. With: as it is, and then, where the engine has all processors, without what is done for
it there (appliance/runtime/pace.py): with an engine that does not ask to come first, with news told at once, with the event loop
at the engine's own priority, and with both of these; and with clients of which half do not read at all. Clients run when nobody
else does: they are not what is measured. Only steps in which all sequences took part count, and of these not the first fifth. The
cases of a round follow one another, so that a machine whose speed moves is the same for all of them; the table has the medians of
the rounds.

"waited" does not move with the machine's speed: so long, in a step, were threads of the engine ready to run while the processors
ran something else (schedstat). It is all that another process can take from an engine that never waits for it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import threading
from pathlib import Path
from typing import Any

from bench_http import CASES, Server, Stream, drive

HOW = (
    "no API",
    "completions",
    "completions, the engine not first",
    "completions, told at once",
    "completions, same priority",
    "completions, told at once, same priority",
    "completions, half of the clients do not read",
)
COLUMNS = {
    "CPU in a step, ms": "step_cpu_ms",
    "between two": "between_cpu_ms",
    "waited": "waited_ms",
    "step, ms": "step_ms_median",
    "p99": "step_ms_p99",
    "from step to step, ms": "turn_ms_median",
    "mean": "turn_ms_mean",
}


def steps_of(case: str, threads: int, tokens: int = 400, streams: int = 64, **model: str | None) -> dict[str, float]:
    """Of the steps in which all sequences took part, in milliseconds. ``model``: its folder, and ``tokenizer``."""
    alone = streams if case == "no API" else 0
    how = {"aside": "same" not in case, "at_once": "at once" in case, "first": "not first" not in case}
    server = Server(threads=threads, alone=alone, streams=streams, tokens=tokens, **how, **model, loop="asyncio", profile=None)
    if not alone:
        path, body = CASES["completions"]
        body = {**body, "stream": True, "max_tokens": tokens, "ignore_eos": True, "temperature": 1.0}
        slow = streams // 2 if "half" in case else 0
        clients = [Stream(server.port, path, body, f"s{i}", reads=i >= slow) for i in range(streams)]
        reading = threading.Thread(target=read, args=(clients,))
        reading.start()
        reading.join()
    found = server.stop()
    steps = found["steps"]
    full = [k for k, (_, _, events, _, _) in enumerate(steps[:-1]) if events == streams == steps[k + 1][2]]
    full = full[len(full) // 5 :]
    took = [1e3 * (steps[k][1] - steps[k][0]) for k in full]
    turn = [1e3 * (steps[k + 1][0] - steps[k][0]) for k in full]
    (first, begin), *_, (last, end) = [(k, ns) for k, ns in found["waited"] if full[0] <= k <= full[-1]]
    return {
        "step_ms_median": statistics.median(took), "step_ms_p99": statistics.quantiles(took, n=100)[98],
        "step_cpu_ms": statistics.median(1e3 * (steps[k][4] - steps[k][3]) for k in full),
        "between_cpu_ms": statistics.median(1e3 * (steps[k + 1][3] - steps[k][4]) for k in full),
        "turn_ms_median": statistics.median(turn), "turn_ms_mean": statistics.fmean(turn),
        "waited_ms": (end - begin) / (last - first) / 1e6,
    }  # fmt: skip


def read(clients: list[Stream]) -> None:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # of this thread
    drive(clients, [], 0, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--threads", default="1,2", help="of the engine")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", type=int, default=len(HOW), help="so many of them")
    parser.add_argument("--model", metavar="DIR", help="default: the demo model")
    parser.add_argument("--tokenizer", metavar="DIR", help="the model's, where DIR has none")
    parser.add_argument("--tokens", type=int, default=400, help="that each sequence gets")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    cases = HOW[: args.cases]
    for threads in map(int, args.threads.split(",")):
        for number in range(args.rounds):
            for case in cases:
                found = steps_of(case, threads, args.tokens, model=args.model, tokenizer=args.tokenizer)
                rows.append({"threads": threads, "case": case, "round": number, **found})
            print(f"{threads} threads: round {number + 1} of {args.rounds}", flush=True)
    print("| threads | | " + " | ".join(COLUMNS) + " |\n" + (2 + len(COLUMNS)) * "|---" + "|")
    for threads in map(int, args.threads.split(",")):
        for case in cases:
            mine = [row for row in rows if (row["threads"], row["case"]) == (threads, case)]
            cells = (f"{statistics.median(row[key] for row in mine):.2f}" for key in COLUMNS.values())
            print(f"| {threads} | {case} | " + " | ".join(cells) + " |")
    if args.json:
        args.json.write_text(json.dumps({"python": platform.python_version(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
