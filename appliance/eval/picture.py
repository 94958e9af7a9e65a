"""Size against quality against speed: two panels beside a column of names, all at the height of their quality. Lower is better.

Each name stands once, as near to the height of its points as its neighbours leave room, and lines lead from it to both; so names
never cover anything, however close models are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from xml.sax.saxutils import escape

from appliance.svg import Box, axis, document, grid_line, label, line, nice, text

COLOURS = ("#2f81f7", "#d1495b", "#2da44e", "#bf8700", "#8957e5", "#0e9aa7", "#db61a2", "#8c6d46")  # seen on white and on black
SHAPES = ("M-5,0 a5,5 0 1,0 10,0 a5,5 0 1,0 -10,0", "M-4.5,-4.5 h9 v9 h-9 z", "M0,-6 L6,0 L0,6 L-6,0 z", "M0,-6 L5.5,4 H-5.5 z")
TOP, LEFT, PANEL, NAMES, GAP, LETTER = 80, 76, 400, 300, 17, 6.4  # pixels
UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes"))


@dataclass(frozen=True)
class Point:
    """A model in the picture."""

    name: str
    size: float  # bytes of weights in memory
    quality: float  # the lower the better
    error: float  # standard error of it
    speed: float | None  # tokens a second
    colour: str
    shape: str


@dataclass(frozen=True)
class Scale:
    """Numbers onto pixels; what lies beyond an end is put there."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(max(v, self.low)) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self) -> list[float]:
        if not self.log:
            step = nice((self.high - self.low) / 5)
            return [k * step for k in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        wide = math.log10(self.high / self.low)
        digits = (1,) if wide > 5 else (1, 2, 5) if wide > 0.7 else tuple(k / 2 for k in range(2, 20))
        return [m * 10.0**p for p in powers for m in digits if self.low <= m * 10.0**p <= self.high]


def picture(rows: Sequence[Mapping[str, Any]], title: str = "") -> str:
    """An SVG document of rows as ``Row.to_dict`` has them. Those without the quality that is drawn are left out."""
    words, key, log = _quality(rows)
    drawn = [row for row in rows if row.get(key) is not None]
    points = [_point(k, row, key) for k, row in enumerate(drawn)]
    speeds = [point.speed for point in points if point.speed is not None]
    bottom = TOP + max(340, GAP * (len(points) + 1))
    width = LEFT + PANEL + NAMES + (PANEL + 24 if speeds else 0)
    head = title or ("Size, quality and speed" if speeds else "Size and quality")
    if not points:
        return document(f"{head}: nothing to draw", width, bottom + 60, [])
    y = _heights(points, log, bottom)
    unit, unit_name = next(one for one in UNITS if max(point.size for point in points) >= one[0] or one[0] == 1)
    left = (LEFT, TOP, LEFT + PANEL, bottom)
    x = _padded([point.size / unit for point in points], left)
    words += "; on the lower rim: none to speak of" if log and any(point.quality < y.low for point in points) else ""
    out = [*_frame(left, x, y, f"weights in memory, {unit_name}"), text(LEFT, TOP - 14, words, "small")]
    out += [text(LEFT - 6, y(value) + 4, label(round(value, 9)), "small", "end") for value in y.ticks()]
    out += _best(points, lambda point: x(point.size / unit), y)
    heights = spread([y(point.quality) for point in points], GAP, TOP, bottom)
    begin, end = left[2] + 44, left[2] + NAMES - 26
    for point, height in zip(points, heights, strict=True):
        out += _mark(point, x(point.size / unit), y, (left[2], begin - 20, height))
        out.append(_shape(point, begin - 11, height, point.name))
        out.append(f"<g><title>{escape(point.name)}</title>{text(begin, height + 4, _short(point.name, end - begin))}</g>")
    if speeds:
        out += _speeds(points, heights, y, (left[2] + NAMES, TOP, left[2] + NAMES + PANEL, bottom), begin, speed_words(rows))
    return document(head, width, bottom + 60, out)


def _speeds(points: Sequence[Point], heights: Sequence[float], y: Scale, box: Box, begin: float, words: str) -> list[str]:
    """The panel at the right."""
    x = _padded([point.speed for point in points if point.speed is not None], box)
    out = _frame(box, x, y, words)
    for point, height in zip(points, heights, strict=True):
        if point.speed is not None:
            width = LETTER * len(_short(point.name, NAMES - 70))
            out += _mark(point, x(point.speed), y, (box[0], begin + width + 6, height))
    return out


def _quality(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str, bool]:
    """(in words, its name in a row, whether its axis is logarithmic): the most telling that was measured."""
    if any(row.get("kl") is not None for row in rows):
        return "KL divergence from the base, with its standard error (lower is better)", "kl", True
    if any(row.get("perplexity") is not None for row in rows):
        return "perplexity, with its standard error (lower is better)", "perplexity", False
    return "share of answers that are wrong (lower is better)", "exact_match", False


def speed_words(rows: Sequence[Mapping[str, Any]]) -> str:
    count = next(next(iter(row["decode_tokens_per_s"])) for row in rows if row.get("decode_tokens_per_s"))
    return f"tokens a second, {count} sequence{'' if count == '1' else 's'} decoding"


def _point(k: int, row: Mapping[str, Any], key: str) -> Point:
    decode = row.get("decode_tokens_per_s") or {}
    return Point(
        name=row["label"],
        size=row["weights_bytes"],
        quality=1 - row[key] if key == "exact_match" else row[key],
        error=row.get(f"{key}_error") or 0.0,
        speed=next(iter(decode.values()), None),
        colour=COLOURS[k % len(COLOURS)],
        shape=SHAPES[k // len(COLOURS) % len(SHAPES)],
    )


def _heights(points: Sequence[Point], log: bool, bottom: float) -> Scale:
    """The axis of quality. A divergence of nothing has no logarithm: it stands on the lower rim."""
    values = [point.quality + sign * point.error for point in points for sign in (-1, 0, 1)]
    if not log:
        room = 0.06 * (max(values) - min(values)) or 1.0
        return Scale(min(values) - room, max(values) + room, bottom, TOP)
    positive = [value for value in values if value > 1e-7] or [1e-3]
    return Scale(min(positive) / 1.3, max(positive) * 1.3, bottom, TOP, log=True)


def _padded(values: Sequence[float], box: Box) -> Scale:
    room = 0.08 * (max(values) - min(values)) or 0.1 * max(values) or 1.0
    return Scale(max(0.0, min(values) - room), max(values) + room, box[0], box[2])


def _frame(box: Box, x: Scale, y: Scale, words: str) -> list[str]:
    left, top, right, bottom = box
    out = [grid_line(x(value), top, x(value), bottom) for value in x.ticks()]
    out += [grid_line(left, y(value), right, y(value)) for value in y.ticks()]
    out += [text(x(value), bottom + 18, label(round(value, 9)), "small", "middle") for value in x.ticks()]
    return [*out, axis(box), text((left + right) / 2, bottom + 40, words, "small", "middle")]


def _mark(point: Point, at: float, y: Scale, name: tuple[float, float, float]) -> list[str]:
    """A point with its standard error, and a line to its name: (the panel's rim, x and y of the name)."""
    rim, beside, height = name
    own = y(point.quality)
    error = f'stroke="{point.colour}" stroke-width="1.2"'
    low, high = y(max(point.quality - point.error, y.low)), y(point.quality + point.error)
    facts = f"{point.name}: {point.quality:.4g}" + (f" ± {point.error:.2g}" if point.error else "")
    return [
        f'<g opacity="0.75">{line([(at, own), (rim, own), (beside, height)], point.colour, "1 3", 1.2)}</g>',
        f'<line x1="{at:.1f}" y1="{low:.1f}" x2="{at:.1f}" y2="{high:.1f}" {error}/>',
        _shape(point, at, own, facts),
    ]


def _shape(point: Point, x: float, y: float, facts: str) -> str:
    where = f'transform="translate({x:.1f} {y:.1f})"'
    return f'<path {where} d="{point.shape}" fill="{point.colour}"><title>{escape(facts)}</title></path>'


def _best(points: Sequence[Point], x: Callable[[Point], float], y: Scale) -> list[str]:
    """Steps through the models that none is both smaller and better than."""
    front: list[Point] = []
    for point in sorted(points, key=lambda one: (one.size, one.quality)):
        if not front or point.quality < front[-1].quality:
            front.append(point)
    path = [(x(front[0]), y(front[0].quality))]
    for before, after in pairwise(front):
        path += [(x(after), y(before.quality)), (x(after), y(after.quality))]
    return [f'<g opacity="0.5">{line(path, "#8c959f", "", 1.2)}</g>'] if len(front) > 1 else []


def spread(heights: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """The same, moved as little as possible (in squares) until all are ``gap`` apart and between ``top`` and ``bottom``.

    With the order given, heights less their places times ``gap`` may not fall: isotonic regression, solved by pooling neighbours.
    """
    order = sorted(range(len(heights)), key=lambda k: heights[k])
    pools: list[list[float]] = []  # [sum, count]
    for place, k in enumerate(order):
        pools.append([heights[k] - place * gap, 1.0])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + count]
    flat = [total / count for total, count in pools for _ in range(int(count))]
    last = bottom - gap / 2 - (len(order) - 1) * gap
    found = [0.0] * len(heights)
    for place, k in enumerate(order):
        found[k] = max(top + gap / 2, min(flat[place], last)) + place * gap
    return found


def _short(name: str, room: float) -> str:
    most = int(room / LETTER)
    return name if len(name) <= most else name[: most - 1] + "…"
