"""A run's results as a table for people."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from appliance.bench.results import METRICS, percentiles, shown
from appliance.config import BenchConfig


def report(results: dict[str, Any], config: BenchConfig) -> None:
    console = Console(highlight=False)
    console.print(f"{results['model_id']} at {results['url']}", soft_wrap=True, markup=False)
    console.print(_overview(results))
    console.print(_latencies(results, config))
    for line in notes(results):
        console.print(line, soft_wrap=True, markup=False)


def _overview(r: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", justify="right")
    offered = f" ({r['offered_rate']:.2f} offered)" if r["offered_rate"] is not None else ""
    rows: list[tuple[str, str] | None] = [
        ("Requests answered", f"{r['completed']:,}"),
        ("Requests failed", f"{r['failed']:,}"),
        ("Duration, s", f"{r['duration']:.2f}"),
        ("Requests a second", f"{r['request_throughput']:.2f}{offered}"),
        ("Good requests a second", f"{r['request_goodput']:.2f}") if r["request_goodput"] is not None else None,
        ("Input tokens", f"{r['total_input_tokens']:,}"),
        ("Output tokens", f"{r['total_output_tokens']:,}"),
        ("Output tokens a second", f"{r['output_throughput']:,.1f}"),
        ("Tokens a second, input and output", f"{r['total_token_throughput']:,.1f}"),
        ("Requests under way: mean, most", f"{r['mean_concurrent_requests']:.1f}, {r['max_concurrent_requests']}"),
        ("Of these, waiting for a first token", f"{r['mean_queue_depth']:.1f}, {r['max_queue_depth']}"),
    ]
    for row in rows:
        if row is not None:
            table.add_row(*row)
    return table


def _latencies(r: dict[str, Any], config: BenchConfig) -> Table:
    wanted = percentiles(config)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("latency, ms", no_wrap=True)
    for name in ("mean", "median", *(f"p{p:g}" for p in wanted), "most"):
        table.add_column(name, justify="right")
    for name in shown(config):
        keys = ("mean", "median", *(f"p{p:g}" for p in wanted), "max")
        figures = [r[f"{key}_{name}_ms"] for key in keys]
        table.add_row(METRICS[name], *map(_figure, figures))
    return table


def _figure(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.2f}" if ms < 100 else f"{ms:,.0f}" if ms >= 1000 else f"{ms:.1f}"


def notes(r: dict[str, Any]) -> list[str]:
    """What a reader of the figures has to know."""
    said = {kind: f" ({detail})" if detail else "" for kind, detail in r["error_examples"].items()}
    found = [f"failed: {count} x {kind}{said[kind]}" for kind, count in r["errors_by_kind"].items()]
    if r["cut_off_by_user"]:
        found.append("ended by ctrl-C: these are the figures so far")
    if not r["tokens_counted_by_server"]:
        found.append("the server did not count all tokens: where it did not, each chunk of a stream is taken for one")
    if (r["tokens_per_chunk"] or 1) > 1.05:
        found.append(f"chunks held {r['tokens_per_chunk']:.2f} tokens on average: ITL is the time between chunks")
    if r["short_answers"]:
        found.append(f"{r['short_answers']} answers were shorter than asked for (--ignore-eos keeps them from ending early)")
    if r["max_concurrency"] and r["offered_rate"] is not None and r["client_queue_max_ms"] > 10:
        waited = f"median {r['client_queue_median_ms']:.0f} ms, at most {r['client_queue_max_ms']:.0f} ms"
        found.append(f"requests waited for a place (--max-concurrency): {waited}; their latencies include it")
    busy = f"{100 * r['generator_cpu']:.0f} % of a core, awake {r['generator_late_p99_ms']:.1f} ms late (p99)"
    if r["generator_kept_up"]:
        found.append(f"the load generator kept up: {busy}")
    else:
        most = f"at most {r['generator_late_max_ms']:.0f} ms"
        found.append(
            f"WARNING: the load generator itself was late or busy: {busy}, {most}. Latencies may be its own: use less load"
        )
    return found
