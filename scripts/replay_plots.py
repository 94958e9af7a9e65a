"""Pictures of a replay as SVG text, drawn by hand (no plotting library is needed)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from bench_report import COLOURS, decades, number, text

WIDTH, HEIGHT = 940, 480
BOX = (80, 50, 640, 420)  # left, top, right, bottom of the axes; the names are to the right
KNOWN = (
    "paged, prefix cache",
    "contiguous, longest",
    "contiguous, exact length",
    "whole batches, exact length",
    "whole batches, longest",
    "paged, no prefix cache",
    "blocks of 16",
    "blocks of 64",
)
Points = Sequence[tuple[float, float]]


class Scale:
    """Numbers onto pixels, evenly or by their logarithm."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        high = high if high > low else 2 * low + 1  # a single value
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low)
        return round(self.start + (self.end - self.start) * min(1.0, max(0.0, share)), 1)

    def ticks(self) -> list[float]:
        if self.log:
            found = decades(self.low, self.high)
            return found if len(found) < 10 else [v for v in found if f"{v:e}"[0] == "1"]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough)
        return [k * step for k in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]


def frame(title: str, x_name: str, y_name: str, x: Scale | None, y: Scale) -> list[str]:
    """The begin of a document: title, axes, grid. Without ``x`` there is no grid along it."""
    left, top, right, bottom = BOX
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(left, 26, title),
        text((left + right) / 2, bottom + 42, x_name, anchor="middle"),
        f'<g transform="translate(18 {(top + bottom) / 2}) rotate(-90)">{text(0, 0, y_name, anchor="middle")}</g>',
    ]
    for value in x.ticks() if x else ():
        out.append(f'<line x1="{x(value)}" y1="{top}" x2="{x(value)}" y2="{bottom}" stroke="#e4e4e4"/>')  # type: ignore[misc]
        out.append(text(x(value), bottom + 18, label(value), anchor="middle"))  # type: ignore[misc]
    for value in y.ticks():
        out.append(f'<line x1="{left}" y1="{y(value)}" x2="{right}" y2="{y(value)}" stroke="#e4e4e4"/>')
        out.append(text(left - 6, y(value) + 4, label(value), anchor="end"))
    return [*out, f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" fill="none" stroke="#888"/>']


def label(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and value % (size / 10) == 0):
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def names(found: Sequence[str], colours: Mapping[str, str]) -> list[str]:
    out = []
    for i, name in enumerate(found):
        out.append(f'<rect x="656" y="{58 + 20 * i}" width="12" height="12" fill="{colours[name]}"/>')
        out.append(text(674, 68 + 20 * i, name))
    return out


def colour_of(found: Sequence[str]) -> dict[str, str]:
    """The same in every picture: by KNOWN, or by place for other names."""
    return {name: COLOURS[(KNOWN.index(name) if name in KNOWN else i) % len(COLOURS)] for i, name in enumerate(found)}


def lines(
    title: str, x_name: str, y_name: str, series: Mapping[str, Points], *, log_x: bool = False, log_y: bool = False,
    y_top: float | None = None, x_low: float | None = None, level: tuple[str, float] | None = None, dots: bool = False,
) -> str:  # fmt: skip
    """A line for each series; ``level`` is a named horizontal one. Values beyond the axes stay on their rim."""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points] + ([level[1]] if level else [])
    left, top, right, bottom = BOX
    x = Scale(x_low if x_low is not None else min(xs) if log_x else min(0.0, *xs), max(xs), left, right, log=log_x)
    y = Scale(min(ys) if log_y else 0.0, y_top or 1.05 * max(ys), bottom, top, log=log_y)
    colours = colour_of(list(series))
    out = frame(title, x_name, y_name, x, y)
    if level:
        out.append(f'<line x1="{left}" y1="{y(level[1])}" x2="{right}" y2="{y(level[1])}" stroke="#999" stroke-dasharray="5 3"/>')
        out.append(text(right - 4, y(level[1]) - 5, level[0], anchor="end", colour="#666"))
    for name, points in reversed(series.items()):  # the first, which is ours, above the others
        path = " ".join(f"{x(a)},{y(b)}" for a, b in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="1.8"/>')
        out += [f'<circle cx="{x(a)}" cy="{y(b)}" r="3" fill="{colours[name]}"/>' for a, b in points if dots]
    return "\n".join([*out, *names(list(series), colours), "</svg>"]) + "\n"


def bars(title: str, y_name: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    """A group of bars for each name, a colour for each kind of bar, its value above it."""
    kinds = list(dict.fromkeys(kind for group in groups.values() for kind in group))
    left, top, right, bottom = BOX
    y = Scale(0.0, 1.1 * max(v for group in groups.values() for v in group.values()), bottom, top)
    colours, out = colour_of(kinds), frame(title, "", y_name, None, y)
    room = (right - left) / len(groups)
    for i, (name, group) in enumerate(groups.items()):
        width = 0.88 * room / len(group)
        for k, (kind, value) in enumerate(group.items()):
            at = round(left + room * (i + 0.06) + k * width, 1)
            shape = f'x="{at}" y="{y(value)}" width="{width - 1:.1f}" height="{bottom - y(value):.1f}"'
            out.append(f'<rect {shape} fill="{colours[kind]}"><title>{escape(f"{name}, {kind}: {number(value)}")}</title></rect>')
            turn = f'transform="translate({at + width / 2 + 4:.1f} {y(value) - 4}) rotate(-90)"'
            out.append(f'<g {turn} font-size="10">{text(0, 0, number(value))}</g>')
        for k, part in enumerate(name.split(", ")):
            out.append(text(left + room * (i + 0.5), bottom + 18 + 15 * k, part, anchor="middle"))
    return "\n".join([*out, *names(kinds, colours), "</svg>"]) + "\n"
