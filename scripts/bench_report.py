"""A comparison as text: Markdown tables, and a roofline picture drawn as SVG by hand (no plotting library is needed)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any
from xml.sax.saxutils import escape

Report = dict[str, Any]
QUIET = 0.1  # cores that other programs may take while a case runs
COLOURS = ("#0b6e4f", "#d1495b", "#00798c", "#edae49", "#6a4c93", "#8d6a4f", "#444444", "#1b998b")


def number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant ones, never in powers of ten."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def markdown(report: Report) -> str:
    """Everything that was measured, a column an engine."""
    targets, limits = report["targets"], report["limits"]
    parts = [
        f"{report['date']}, commit {report['commit']}, {report['machine']}, {limits['threads']} threads.\n",
        f"    {report['command']}\n",
        f"Limits ({limits['how']}): memory read {limits['memory_read_gb_s']} GB/s"
        + "".join(f", {kind} {number(rate)} Top/s" for kind, rate in limits["tops"].items())
        + "; torch's 2048x2048 products: "
        + ", ".join(f"{kind} {number(rate)}" for kind, rate in limits["torch_tops"].items())
        + " Top/s.\n",
        speed_table(targets),
        fact_table(targets, limits),
    ]
    failed = [f"- {t['name']}: {t['error']}" for t in targets if "error" in t]
    return "\n".join(parts + failed).rstrip() + "\n"


def speed_table(targets: list[Report]) -> str:
    """Tokens a second by case; the fastest of a row is bold, and ``~`` marks what other programs disturbed."""
    rows: dict[str, dict[str, tuple[float, bool]]] = {}
    for target in targets:
        for case in target["cases"]:
            for label, value in case_rows(case):
                rows.setdefault(label, {})[target["name"]] = value, case.get("others_cores", 0) > QUIET
    names = [t["name"] for t in targets]
    lines = []
    for label, found in rows.items():
        best = max(value for value, _ in found.values())

        def cell(name: str, found: dict[str, tuple[float, bool]] = found, best: float = best) -> str:
            if name not in found:
                return ""
            value, disturbed = found[name]
            shown = number(value) + ("~" if disturbed else "")
            return f"**{shown}**" if value == best and len(found) > 1 else shown

        lines.append([label, *map(cell, names)])
    note = f"\n~: other programs took more than {QUIET} cores.\n" if any("~" in c for line in lines for c in line) else ""
    return table(["tok/s", *names], lines) + note


def case_rows(case: Report) -> list[tuple[str, float]]:
    n, prompt, decoded = case["sequences"], case["prompt"], case["decode_tok_s"]
    prefill = (f"prefill {prompt}", case["prefill_tok_s"])
    if decoded is None:
        return [prefill]
    if prompt >= 1024:
        return [prefill, (f"decode, {n} at {prompt} tokens", decoded)]
    return [(f"decode, {n} sequence{'s' if n > 1 else ''}", decoded)]


def fact_table(targets: list[Report], limits: Report) -> str:
    """What is not tokens a second: shares of the limits, memory, start-up, host work."""
    gib = 1024**3
    best_tops = max(limits["tops"].values(), default=None)

    def single(target: Report) -> Report:
        return next((c for c in target["cases"] if c["sequences"] == 1 and "of_memory_read" in c), {})

    def prefill(target: Report) -> float | None:
        return max((c["prefill_ops_s"] / 1e12 for c in target["cases"] if c["decode_tok_s"] is None), default=None)

    def share(part: float | None, whole: float | None) -> str:
        return "" if not part or not whole else f"{100 * part / whole:.0f} %"

    def drift(target: Report) -> str:
        planned, rss = target.get("planned_bytes"), target.get("rss_bytes")
        return "" if not planned or not rss else f"{number(planned / gib)} ({100 * (rss / planned - 1):+.1f} %)"

    rows: list[tuple[str, Callable[[Report], str]]] = [
        ("version", lambda t: t.get("version", "")),
        ("weights read a token, GB", lambda t: number(t["token_bytes"] / 1e9) if "token_bytes" in t else ""),
        ("decode 1: bytes read, GB/s", lambda t: number(single(t).get("decode_gb_s"))),
        ("decode 1: of memory read", lambda t: share(single(t).get("of_memory_read"), 1)),
        ("prefill: Top/s", lambda t: number(prefill(t))),
        ("prefill: of the highest peak", lambda t: share(prefill(t), best_tops)),
        ("from start to first token, s", lambda t: number(t.get("ready_s"))),
        ("resident memory, GiB", lambda t: number(t["rss_bytes"] / gib) if t.get("rss_bytes") else ""),
        ("planned, GiB (resident against it)", drift),
        ("host work a step at 1 / 32 / 256 sequences, us", lambda t: " / ".join(map(number, t.get("host_us", {}).values()))),
        ("of that scheduling and events, us", lambda t: " / ".join(map(number, t.get("bookkeeping_us", {}).values()))),
    ]
    return table(["", *(t["name"] for t in targets)], ([label, *(cell(t) for t in targets)] for label, cell in rows))


class Axes:
    """Two logarithmic axes in a box."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], box: tuple[int, int, int, int]) -> None:
        self.x, self.y, self.box = x, y, box

    def at(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self.box

        def share(v: float, ends: tuple[float, float]) -> float:
            return (math.log10(v) - math.log10(ends[0])) / (math.log10(ends[1]) - math.log10(ends[0]))

        return round(left + (right - left) * share(x, self.x), 1), round(bottom - (bottom - top) * share(y, self.y), 1)

    def grid(self) -> list[str]:
        left, top, right, bottom = self.box
        out = [f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" fill="none" stroke="#888"/>']
        for v in decades(*self.x):
            px, _ = self.at(v, self.y[0])
            out.append(f'<line x1="{px}" y1="{top}" x2="{px}" y2="{bottom}" stroke="#e4e4e4"/>')
            out.append(text(px, bottom + 16, f"{v:g}", anchor="middle"))
        for v in decades(*self.y):
            _, py = self.at(self.x[0], v)
            out.append(f'<line x1="{left}" y1="{py}" x2="{right}" y2="{py}" stroke="#e4e4e4"/>')
            out.append(text(left - 6, py + 4, f"{v:g}", anchor="end"))
        return out


def decades(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]


def text(x: float, y: float, words: str, *, anchor: str = "start", colour: str = "#222") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


def points(target: Report) -> list[tuple[str, float, float]]:
    """(label, operations a byte, 10^12 operations a second): decoding, and the prefill, whose weights are read once."""
    found = []
    for case in target["cases"]:
        if "decode_ops_s" in case and "ops_per_byte" in case:
            label = f"{case['prompt'] // 1024}k" if case["prompt"] >= 1024 else str(case["sequences"])
            found.append((label, case["ops_per_byte"], case["decode_ops_s"] / 1e12))
        elif case["decode_tok_s"] is None and target.get("read_bytes"):
            ops = case["prefill_ops_s"] * case["first_s"]
            found.append((f"prefill {case['prompt']}", ops / target["read_bytes"], case["prefill_ops_s"] / 1e12))
    return found


def roofline(report: Report) -> str:
    """Operations a byte against operations a second, with the memory's slope and the peaks as roofs; an SVG document."""
    limits = report["limits"]
    drawn = [(t["name"], points(t)) for t in report["targets"] if points(t)]
    if not drawn:
        raise ValueError("no engine got far enough to be drawn")
    tops = limits["tops"] or {f"torch, {k}": v for k, v in limits["torch_tops"].items()}
    slope, ceiling = limits["memory_read_gb_s"] / 1e3, max(tops.values())
    xs = [x for _, ps in drawn for _, x, _ in ps]
    ys = [y for _, ps in drawn for _, _, y in ps]
    width, height = 940, 560
    axes = Axes((min(xs) / 1.5, max([*xs, ceiling / slope]) * 1.6), (min(ys) / 2, max(*ys, ceiling) * 1.6), (70, 40, 650, 500))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(70, 24, f"{report['model']}: what was reached, under the limits of this machine"),
        *axes.grid(),
        text(360, 536, "operations for each byte of weights and cache that is read", anchor="middle"),
        f'<g transform="translate(18 270) rotate(-90)">{text(0, 0, "10¹² operations a second", anchor="middle")}</g>',
        *roofs(axes, slope, tops),
    ]
    for i, (name, found) in enumerate(drawn):
        colour = COLOURS[i % len(COLOURS)]
        for label, x, y in found:
            px, py = axes.at(x, y)
            out.append(f'<circle cx="{px}" cy="{py}" r="4" fill="{colour}"><title>{escape(f"{name}: {label}")}</title></circle>')
            if i == 0:
                out.append(text(px - 4, py - 8, label, anchor="end", colour=colour))
        out.append(f'<circle cx="668" cy="{60 + 20 * i}" r="5" fill="{colour}"/>' + text(680, 64 + 20 * i, name))
    out.append(text(662, 84 + 20 * len(drawn), "1, 4, ...: sequences that decode together"))
    out.append(text(662, 100 + 20 * len(drawn), "4k, ...: one sequence at that context"))
    return "\n".join([*out, "</svg>"]) + "\n"


def roofs(axes: Axes, slope: float, tops: dict[str, float]) -> list[str]:
    """The slope of memory up to the highest peak, and each peak from where it meets the slope, as far as they are in sight."""
    (low, right), (floor, _) = axes.x, axes.y
    start = max(low, floor / slope)
    out = []
    for kind, peak in sorted(tops.items(), key=lambda item: item[1]):
        knee = max(peak / slope, low)
        (x1, y1), (x2, _) = axes.at(knee, peak), axes.at(right, peak)
        out.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y1}" stroke="#999" stroke-dasharray="5 3"/>')
        out.append(text(x2 - 4, y1 - 4, f"{kind}, {number(peak)}", anchor="end", colour="#666"))
    top = max(tops.values())
    (x1, y1), (x2, y2) = axes.at(start, start * slope), axes.at(max(top / slope, start), max(top, start * slope))
    out.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#999"/>')
    beside = (x1 + 0.8 * (x2 - x1) - 10, y1 + 0.8 * (y2 - y1))
    out.append(text(*beside, f"memory, {number(slope * 1e3)} GB/s", anchor="end", colour="#666"))
    return out
