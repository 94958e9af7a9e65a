"""A run as SVG text, drawn by hand (no plotting library is needed): latencies as distributions, and the course of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from appliance.bench.load import Run
from appliance.bench.results import in_flight, queued, shown, tokens_each_second, values
from appliance.config import BenchConfig

WIDTH, HEIGHT = 960, 560
COLOURS = {"ttft": "#0b6e4f", "tpot": "#d1495b", "itl": "#00798c", "e2el": "#b8860b"}
DASHES = {"ttft": "", "tpot": "6 3", "itl": "2 2", "e2el": "9 3 2 3"}  # lines that also differ without colour
STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 12px; fill: #1f2328 }
.title { font-size: 17px; font-weight: 600 }
.small { fill: #59636e }
.page { fill: #ffffff }
.grid { stroke: #e4e4e4 }
.axis { fill: none; stroke: #8c959f }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .small { fill: #9198a1 }
  .page { fill: #0d1117 }
  .grid { stroke: #21262d }
}
"""
Points = Sequence[tuple[float, float]]
Box = tuple[float, float, float, float]  # left, top, right, bottom


def picture(results: dict[str, Any], run: Run, config: BenchConfig) -> str:
    """An SVG document."""
    name = f"{results['model_id']}: {results['completed']} requests, {results['output_throughput']:,.0f} output tokens a second"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f"aria-label={quoteattr(name)}>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
        _text(40, 34, name, "title"),
    ]
    out += _distributions(values(run.outcomes), shown(config), (60, 80, 460, 500))
    seconds = run.seconds
    flight, queue = (
        [(0.0, 0), *((min(t, seconds), n) for t, n in found), (seconds, 0)] for found in (in_flight(run), queued(run))
    )
    out += _course("requests", [("under way", flight, "#00798c", ""), ("waiting for a first token", queue, "#d1495b", "4 2")],
                   seconds, (540, 80, 920, 250))  # fmt: skip
    tokens = [(second, count / min(1.0, max(seconds - second, 1e-9))) for second, count in tokens_each_second(run)]
    tokens = [one for one in tokens if seconds - one[0] > 0.2] or tokens  # a second that had hardly begun says nothing
    tokens.append((seconds, tokens[-1][1]))
    out += _course("output tokens a second", [("", tokens, "#0b6e4f", "")], seconds, (540, 335, 920, 500))
    return "\n".join([*out, "</svg>"]) + "\n"


def _distributions(found: dict[str, list[float]], names: Sequence[str], box: Box) -> list[str]:
    """For each latency, the share of requests (or gaps) that took no longer."""
    left, top, right, bottom = box
    sorted_ms = {name: np.sort(1e3 * np.asarray(found[name])) for name in names if found[name]}
    lows = [max(ms[0], 0.1) for ms in sorted_ms.values()] or [1.0]
    low, high = (
        10 ** math.floor(math.log10(min(lows))),
        10 ** math.ceil(math.log10(max([ms[-1] for ms in sorted_ms.values()] or [10.0]))),
    )
    high = max(high, 10 * low)

    def x(ms: float) -> float:
        return left + (right - left) * math.log10(max(ms, low) / low) / math.log10(high / low)

    def y(share: float) -> float:
        return bottom - (bottom - top) * share

    out = [_text(left, top - 12, "share that took no longer", "small")]
    for decade in range(round(math.log10(low)), round(math.log10(high)) + 1):
        at = x(10.0**decade)
        out.append(f'<line class="grid" x1="{at:.1f}" y1="{top}" x2="{at:.1f}" y2="{bottom}"/>')
        out.append(_text(at, bottom + 18, _label(10.0**decade), "small", "middle"))
    for percent in (0, 25, 50, 75, 90, 100):
        at = y(percent / 100)
        out.append(f'<line class="grid" x1="{left}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>')
        out.append(_text(left - 6, at + 4, f"{percent} %", "small", "end"))
    out += [_axis(box), _text((left + right) / 2, bottom + 36, "milliseconds", "small", "middle")]
    for k, (name, ms) in enumerate(sorted_ms.items()):
        shares = np.linspace(0, 1, min(len(ms), 200) + 1)[1:]
        points = [(x(float(np.quantile(ms, s))), y(s)) for s in shares]
        points.insert(0, (x(float(ms[0])), y(0)))
        out.append(_line(points, COLOURS[name], DASHES[name]))
        out += _key(left + 12, top + 18 + 18 * k, name.upper(), COLOURS[name], DASHES[name])
    return out


def _course(title: str, lines: Sequence[tuple[str, Points, str, str]], seconds: float, box: Box) -> list[str]:
    """Steps over the time of the run."""
    left, top, right, bottom = box
    step = _nice(max([value for _, points, _, _ in lines for _, value in points] or [1.0]) / 4)
    most = step * math.ceil(max([value for _, points, _, _ in lines for _, value in points] or [1.0]) / step + 1e-9) or step

    def x(at: float) -> float:
        return left + (right - left) * at / seconds

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / most

    out = [_text(left, top - 12, title, "small")]
    out += _grid(step, most, lambda v: (left, y(v), right, y(v)), lambda v: _text(left - 6, y(v) + 4, _label(v), "small", "end"))
    every = _nice(seconds / 6)
    out += _grid(
        every, seconds, lambda v: (x(v), top, x(v), bottom), lambda v: _text(x(v), bottom + 18, _label(v), "small", "middle")
    )
    out += [_axis(box), _text((left + right) / 2, bottom + 36, "seconds", "small", "middle")]
    for k, (name, points, colour, dash) in enumerate(lines):
        path: list[tuple[float, float]] = []
        for at, value in points:
            path += [(x(at), path[-1][1])] if path else []
            path.append((x(at), y(value)))
        out.append(_line(_thinned(path), colour, dash))
        if name:
            out += _key(left + 12 + 110 * k, top + 14, name, colour, dash)
    return out


def _thinned(path: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points on the same pixel column, the first, the last, and the extremes."""
    columns: dict[int, list[tuple[float, float]]] = {}
    for point in path:
        columns.setdefault(round(2 * point[0]), []).append(point)
    out: list[tuple[float, float]] = []
    for group in columns.values():
        keep = {0, len(group) - 1}
        keep |= {min(range(len(group)), key=lambda i: group[i][1]), max(range(len(group)), key=lambda i: group[i][1])}
        out += [group[i] for i in sorted(keep)]
    return out


def _grid(
    step: float, most: float, place: Callable[[float], tuple[float, float, float, float]], name: Callable[[float], str]
) -> list[str]:
    out = []
    for k in range(math.floor(most / step + 1e-9) + 1):
        a, b, c, d = place(k * step)
        out += [f'<line class="grid" x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}"/>', name(k * step)]
    return out


def _nice(rough: float) -> float:
    unit = 10.0 ** math.floor(math.log10(max(rough, 1e-6)))
    return next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * (1 - 1e-9))


def _label(value: float) -> str:
    return f"{value / 1e3:g}k" if value >= 10_000 else f"{value:g}"


def _axis(box: Box) -> str:
    left, top, right, bottom = box
    return f'<rect class="axis" x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"/>'


def _line(points: Points, colour: str, dash: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dashed}/>'


def _key(x: float, y: float, name: str, colour: str, dash: str) -> list[str]:
    return [_line([(x, y - 4), (x + 26, y - 4)], colour, dash), _text(x + 32, y, name)]


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    shown_as = f'class="{kind}" ' if kind else ""
    return f'<text {shown_as}x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
