"""A run as SVG text, drawn by hand (no plotting library is needed): latencies as distributions, and the course of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from appliance.bench.load import Run
from appliance.bench.results import in_flight, queued, shown, tokens_each_second, values
from appliance.config import BenchConfig
from appliance.svg import Box, Points, axis, document, grid, grid_line, key, label, line, nice, text

WIDTH, HEIGHT = 960, 560
COLOURS = {"ttft": "#0b6e4f", "tpot": "#d1495b", "itl": "#00798c", "e2el": "#b8860b"}
DASHES = {"ttft": "", "tpot": "6 3", "itl": "2 2", "e2el": "9 3 2 3"}  # lines that also differ without colour


def picture(results: dict[str, Any], run: Run, config: BenchConfig) -> str:
    """An SVG document."""
    name = f"{results['model_id']}: {results['completed']} requests, {results['output_throughput']:,.0f} output tokens a second"
    out = _distributions(values(run.outcomes), shown(config), (60, 80, 460, 500))
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
    return document(name, WIDTH, HEIGHT, out)


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

    out = [text(left, top - 12, "share that took no longer", "small")]
    for decade in range(round(math.log10(low)), round(math.log10(high)) + 1):
        at = x(10.0**decade)
        out.append(grid_line(at, top, at, bottom))
        out.append(text(at, bottom + 18, label(10.0**decade), "small", "middle"))
    for percent in (0, 25, 50, 75, 90, 100):
        at = y(percent / 100)
        out.append(grid_line(left, at, right, at))
        out.append(text(left - 6, at + 4, f"{percent} %", "small", "end"))
    out += [axis(box), text((left + right) / 2, bottom + 36, "milliseconds", "small", "middle")]
    for k, (name, ms) in enumerate(sorted_ms.items()):
        shares = np.linspace(0, 1, min(len(ms), 200) + 1)[1:]
        points = [(x(float(np.quantile(ms, s))), y(s)) for s in shares]
        points.insert(0, (x(float(ms[0])), y(0)))
        out.append(line(points, COLOURS[name], DASHES[name]))
        out += key(left + 12, top + 18 + 18 * k, name.upper(), COLOURS[name], DASHES[name])
    return out


def _course(title: str, lines: Sequence[tuple[str, Points, str, str]], seconds: float, box: Box) -> list[str]:
    """Steps over the time of the run."""
    left, top, right, bottom = box
    step = nice(max([value for _, points, _, _ in lines for _, value in points] or [1.0]) / 4)
    most = step * math.ceil(max([value for _, points, _, _ in lines for _, value in points] or [1.0]) / step + 1e-9) or step

    def x(at: float) -> float:
        return left + (right - left) * at / seconds

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / most

    out = [text(left, top - 12, title, "small")]
    out += grid(step, most, lambda v: (left, y(v), right, y(v)), lambda v: text(left - 6, y(v) + 4, label(v), "small", "end"))
    every = nice(seconds / 6)
    out += grid(
        every, seconds, lambda v: (x(v), top, x(v), bottom), lambda v: text(x(v), bottom + 18, label(v), "small", "middle")
    )
    out += [axis(box), text((left + right) / 2, bottom + 36, "seconds", "small", "middle")]
    for k, (name, points, colour, dash) in enumerate(lines):
        path: list[tuple[float, float]] = []
        for at, value in points:
            path += [(x(at), path[-1][1])] if path else []
            path.append((x(at), y(value)))
        out.append(line(_thinned(path), colour, dash))
        if name:
            out += key(left + 12 + 110 * k, top + 14, name, colour, dash)
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
