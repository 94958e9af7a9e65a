"""A replay as Markdown and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

from bench_report import number, table
from replay_plots import bars, lines
from replay_setups import SHORT

GIB = 2**30
GOAL = 0.04  # of waste
Found = dict[str, Any]


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def ms(seconds: float) -> str:
    return number(1e3 * seconds)


def wrapped(words: str) -> str:
    """Paragraphs that are no tables, in lines of 130."""
    parts = words.split("\n\n")
    return "\n\n".join(p if p.startswith("|") else fill(p, 130, break_long_words=False, break_on_hyphens=False) for p in parts)


def write(report: Found, out: Path) -> None:
    """replay.md and the pictures of the parts that the report has."""
    facts = report["facts"]
    sections = [TEXT.format(**introduction(facts))]
    for name, part in ((name, report["parts"][name]) for name in SECTIONS if name in report["parts"]):
        words, pictures = SECTIONS[name](part["found"], facts)
        origin = f"`{part['command']}`, {part['date']}, commit {part['commit']}, {part['machine']}; {part['seconds']} s"
        shown = "".join(f"![{file}](replay-{file}.svg)\n" for file in pictures)
        sections.append(f"## {TITLES[name]}\n{wrapped(words)}\n{shown}\n{wrapped(origin)}.\n")
        for file, picture in pictures.items():
            (out / f"replay-{file}.svg").write_text(picture)
    (out / "replay.md").write_text("\n".join(sections))


def introduction(facts: Found) -> dict[str, Any]:
    traces = table(
        ["trace", "model", "requests", "prompt, mean", "answer, mean", "longest in all", "hours"],
        [
            [name, t["model"], str(t["requests"]), number(t["prompt"]), number(t["answer"]), str(t["longest"]),
             number(t["seconds"] / 3600, 2) if t["seconds"] else "no times"]
            for name, t in facts["traces"].items()
        ],
    )  # fmt: skip
    models = table(
        [
            "model",
            "tokens in the cache",
            "KB a token",
            "tokens a step",
            "sequences a step",
            "a step of 1 sequence at 1024 tokens, ms",
            "a prompt of 2048, ms",
        ],
        [
            [
                name,
                str(m["tokens"]),
                number(m["kv_token_bytes"] / 1e3),
                str(m["max_num_batched_tokens"]),
                str(m["max_num_seqs"]),
                ms(m["decode_1_s"]),
                ms(m["prompt_2048_s"]),
            ]
            for name, m in facts["models"].items()
        ],
    )
    return {**facts, "traces": traces, "models": models, "bus": facts["bus"] / 1e9}


def throughput(found: Found, facts: Found) -> tuple[str, dict[str, str]]:
    rows = []
    for trace, systems in found.items():
        first = next(iter(systems.values()))
        model = facts["models"][facts["traces"][trace]["model"]]
        prompts_s = (first["prompt_tokens"] - first["hit_tokens"]) * model["prompt_2048_s"] / 2048
        for name, one in systems.items():
            rows.append(
                [trace, name, str(one["jobs"]), number(one["tok_s"], 4), number(one["answer_tok_s"], 3),
                 f"{first['tok_s'] / one['tok_s']:.2f} x", number(one["batch"]), percent(one["waste"]),
                 percent(one["hit_rate"]) if one["hit_tokens"] else "", str(one["preemptions"]),
                 percent(prompts_s / first["span"], 0) if one is first else "",
                 f"{one['host_us_p50']:.0f} / {one['host_us_p99']:.0f}" if name.startswith("paged") else ""]
            )  # fmt: skip
    head = ["trace", "memory", "requests", "tok/s", "of answers", "ours against it", "sequences a step", "waste", "prompt found",
            "preempted", "prompts' share", "scheduler, us"]  # fmt: skip
    rivals = {name: [next(iter(systems.values()))["tok_s"] / systems[name]["tok_s"] for systems in found.values()]
              for name in ("contiguous, longest", "whole batches, longest", "contiguous, exact length")}  # fmt: skip
    said = ", ".join(f"{min(ratios):.2f} to {max(ratios):.2f} times {name!r}" for name, ratios in rivals.items())
    groups = {trace: {name: one["tok_s"] for name, one in systems.items()} for trace, systems in found.items()}
    words = (
        f"The first requests of each trace, all there at once. Ours is {said}. The literature says 2 to 4 times (vLLM, arXiv "
        "2309.06180, at equal latency): with a cache of 0.8 MB a token, answers twice as long as prompts, and room reserved for "
        "the model's longest context. These traces are mostly prompts, whose computation no memory makes faster (prompts' share: "
        "what they take of our time at the speed of a prompt of 2048), and a cache of grouped heads is small. The last trace is "
        "the nearest to those conditions: a cache of 0.5 MB, short prompts, room for 4096 tokens. tok/s: prompts and answers "
        f"together; scheduler: its own processor time a step, median / 99th percentile.\n\n{table(head, rows)}"
    )
    drawn = bars("Throughput with all requests there at once", "tokens a second, prompts and answers", groups)
    return words, {"throughput": drawn}


def load(found: Found, facts: Found) -> tuple[str, dict[str, str]]:
    limits, shown = facts["slowdowns"], facts["shown_load"]
    most, latency, pictures = [], [], {}
    for trace, one in found.items():
        ours = next(iter(one["systems"].values()))["most"]
        for name, system in one["systems"].items():
            pairs = [
                (number(rate), f"{own / rate:.2f} x" if rate else "") for own, rate in zip(ours, system["most"], strict=True)
            ]
            most.append([trace, name, *(cell for pair in pairs for cell in pair)])
            at = next(row for row in system["curve"] if row["load"] == shown)
            units = (("ttft", 1.0), ("itl", 1e3), ("total", 1.0))
            cells = [number(unit * at[f"{key}_p{share}"]) for key, unit in units for share in (50, 99)]
            latency.append([trace, name, *cells])
        pictures |= load_pictures(trace, one, limits, shown)
    counts = ", ".join(f"{one['requests']} of {trace}" for trace, one in found.items())
    head = [
        "trace",
        "memory",
        *(h for limit in limits for h in (f"most requests/s, {limit:.0f} times slower", "ours against it")),
    ]
    words = (
        f"The first requests of each trace ({counts}), with its arrivals, evenly slower or faster. The most load is that at "
        "which (end - arrival) / tokens of the answer, in the mean over requests, is at most "
        f"{' or '.join(f'{limit:.0f}' for limit in limits)} times what it is for requests that are alone on the card; it is "
        f"found by halving.\n\n{table(head, most)}\n"
        f"At {percent(shown, 0)} of what ours does when all is there at once: time to first token and to the end in seconds, "
        "time between tokens in milliseconds, median and 99th percentile.\n\n"
        + table(["trace", "memory", "first p50", "p99", "between p50", "p99", "end p50", "p99"], latency)
    )
    return words, pictures


def load_pictures(trace: str, one: Found, limits: list[float], shown: float) -> dict[str, str]:
    rate = one["requests"] / one["at_once_s"]
    series = {name: [(r["load"] * rate, r["per_token"]) for r in system["curve"]] for name, system in one["systems"].items()}
    curves = {
        name: [(max(v, 1e-3), i / 100) for i, v in enumerate(system["cdf"]["ttft"])] for name, system in one["systems"].items()
    }
    short = trace.lower().replace(",", "").replace(" ", "-")
    return {
        f"load-{short}": lines(
            f"{trace}: latency by load", "requests a second", "seconds a token of the answer, arrival to end", series,
            log_y=True, y_top=10.0, level=(f"{limits[-1]:.0f} times a request alone", limits[-1] * one["alone"]), dots=True,
        ),
        f"latency-{short}": lines(
            f"{trace}: time to first token at {percent(shown, 0)} of our throughput", "seconds", "share of requests", curves,
            log_x=True, y_top=1.0, x_low=0.02,
        ),
    }  # fmt: skip


def _kept(name: str, worst: Mapping[str, float]) -> str:
    """For which traces the goal holds, with the most of each side."""
    kept = {trace: share for trace, share in worst.items() if share <= GOAL}
    over = [f"{trace} ({percent(share, 2)})" for trace, share in worst.items() if share > GOAL]
    most = f"at most {percent(max(kept.values()), 2)}" if kept else ""
    words = f"it holds for all of these traces: {most}" if not over else f"it holds for {'; '.join(kept) or 'none'}: {most}"
    return f"With {name} {words}{'; not for ' + '; '.join(over) if over else ''}."


def waste(found: Found, facts: Found) -> tuple[str, dict[str, str]]:
    names = list(next(iter(found.values())))

    def shares(one: Found) -> list[float]:
        return [one[when] for when in ("under_load", "at_once") if when in one]

    rows = [[trace, *(" / ".join(percent(s, 2) for s in shares(one[name])) for name in names)] for trace, one in found.items()]
    said = [_kept(name, {trace: max(shares(one[name])) for trace, one in found.items()}) for name in names[:2]]
    trace, one = next(iter(found.items()))
    series = {name: [(t / 60, 100 * share) for t, share in one[name]["series"]] for name in names if "series" in one[name]}
    words = (
        "1 - tokens stored / (blocks held by requests x block size), over time, of the first requests: with the trace's "
        f"arrivals at {percent(facts['shown_load'], 0)} load / with all there at once. The goal is {percent(GOAL, 0)} at "
        f"most. {' '.join(said)} (The short ones are a choice of ours: the trace's prompts of up to {SHORT} tokens.) On "
        "average the last block of a sequence is half empty, so blocks of B tokens keep to the goal where sequences have "
        "12 B tokens in the mean over time: 192 with blocks of 16, 768 with 64. Nobody knows the lengths of requests to "
        "come, and `--block-size auto` goes by the device alone (64 on a card, [gpu.md](../gpu.md); 16 on a CPU). Who "
        "serves short requests only can have 16, at the price of slower attention. What is wasted costs room and no time, "
        "and the short requests here are as many at once as the scheduler takes: more room would have changed nothing. "
        "Blocks that nobody holds and that are kept for their contents are free room."
        "\n\n" + table(["trace", *names], rows)
    )
    drawn = lines(f"{trace}: room that is held and empty", "minutes", "% (beyond 40: at the rim)", series, y_top=40.0)
    return words, {"waste": drawn} if series else {}


def hits(found: Found, facts: Found) -> tuple[str, dict[str, str]]:
    rows = [
        ["unlimited" if r["unlimited"] else str(r["tokens"]), f"{r['host_bytes'] / GIB:.0f}", percent(r["hit_rate"], 2),
         percent(r["ideal"], 2), f"{100 * (r['hit_rate'] - r['ideal']):+.2f}", number(r["tok_s"], 4), number(r["batch"])]
        for r in found["rows"]
    ]  # fmt: skip
    head = ["tokens in the pool", "host memory, GiB", "found", "ideal", "points", "tok/s", "sequences a step"]
    pools = [r for r in found["rows"] if not r["host_bytes"]]
    series = {
        "ours": [(r["tokens"], 100 * r["hit_rate"]) for r in pools],
        "ideal of that size": [(r["tokens"], 100 * r["ideal"]) for r in pools],
    }
    words = (
        f"{found['trace']}: the share of prompt tokens that need not be computed. The ideal is computed from the trace's ids "
        "alone: one request at a time, blocks of 512, least recently used blocks leave; with no limit it is "
        f"{percent(found['ideal'], 2)}. (Ours also caches answers and runs many requests together, which takes room; its blocks "
        f"have {facts['block_size']} tokens.)\n\n{table(head, rows)}"
    )
    drawn = lines(f"{found['trace']}: prompt tokens found in the cache", "tokens in the pool", "%", series, log_x=True, dots=True,
                  level=("ideal without limit", 100 * found["ideal"]))  # fmt: skip
    return words, {"hits": drawn}


def tiers(found: Found, facts: Found) -> tuple[str, dict[str, str]]:
    rows = [
        [f"{r['host_bytes'] / GIB:.0f}", r["takes"], percent(r["hit_rate"], 2), str(r["crossed_tokens"]), number(r["tok_s"], 4),
         f"{r['host_us_p50']:.0f} / {r['host_us_p99']:.0f}"]
        for r in found["rows"]
    ]  # fmt: skip
    head = ["host memory, GiB", "it takes", "found", "tokens over the bus", "tok/s", "scheduler, us"]
    words = (
        f"The first {found['requests']} requests of {found['trace']}, all there at once. Once host memory is full, ours takes a "
        "block only if it left the pool before, lately, or while keeping everything would find more (scheduling.md).\n\n"
        f"{table(head, rows)}"
    )
    return words, {}


def preemption(found: Found, facts: Found) -> tuple[str, dict[str, str]]:
    rows = [
        [str(r["tokens"]), r["how"], number(r["tok_s"], 4), str(r["preemptions"]), str(r["again"]), str(r["crossed_tokens"]),
         str(r["refused"])]
        for r in found["rows"]
    ]  # fmt: skip
    head = ["tokens in the pool", "who gives way", "tok/s", "preempted", "tokens computed again", "over the bus", "refused"]
    words = (
        f"{found['trace']}, {found['requests']} requests, all there at once; swapping has 8 GiB of host memory. With the prefix "
        "cache on, host memory also takes blocks that the pool evicts, which here nobody asks for again: compare what crosses "
        f"the bus without it.\n\n{table(head, rows)}"
    )
    return words, {}


def host(found: Found, facts: Found) -> tuple[str, dict[str, str]]:
    rows = [
        [str(r["block_size"]), str(r["running"]), r["kind"], *(number(r[key]) for key in ("p50", "p99", "most"))]
        for r in found["rows"]
    ]
    words = (
        "Microseconds of processor time of schedule() and commit() together, the prefix cache on. decoding: all sequences are "
        "amid their answers; busy: whatever ends is replaced from a queue, and the pool is full of what others left.\n\n"
        + table(["block size", "sequences", "", "median", "99th percentile", "most"], rows)
    )
    return words, {}


SECTIONS: Mapping[str, Callable[[Found, Found], tuple[str, dict[str, str]]]] = {
    "throughput": throughput, "load": load, "waste": waste, "hits": hits, "tiers": tiers, "preemption": preemption, "host": host,
}  # fmt: skip
TITLES = {
    "throughput": "Throughput", "load": "Latency", "waste": "Waste", "hits": "Prefix cache",
    "tiers": "What host memory takes", "preemption": "A pool that is too small", "host": "The scheduler's own time",
}  # fmt: skip

TEXT = """# Traces of real services on a simulated RTX 4090
Written by `scripts/replay`. The scheduler, the pool, the prefix cache and the swapping are the engine's own (`appliance/core`),
fed with real arrivals and lengths; **the card is not real**: a step takes what bytes and operations take at the shares of its
bandwidth and rate that [gpu-predictions.md](../gpu-predictions.md) states, so seconds are predictions, while counts (waste, hits,
preemptions) and the scheduler's own time are measured. {card}, 4-bit weights, a cache in float16, the plan of
`appliance plan` with the default flags, blocks of {block_size}. Blocks go to host memory and back at {bus:.0f} GB/s (assumed),
and nothing else runs meanwhile.

{models}
{traces}
Azure's traces have no contents, so nothing of their prompts repeats; ShareGPT is a small sample of long first turns, each of
which comes 20 times as a request of its own. Compared are, over the same memory, cost model and limits, with chunked prompts
for all:

- **paged**: ours.
- **contiguous**: a request gets room in one piece when it is admitted and keeps it to its end; for the trace's longest request,
  or for exactly what it will need, which nobody can know beforehand: the most that contiguous room could reach. Fragments
  between rooms cost nothing here.
- **whole batches**: nobody is admitted before all of a batch have ended (static batching); room for the trace's longest each,
  or for the batch's longest, known beforehand. Rows that have ended cost nothing, and answers leave as they end.
"""
