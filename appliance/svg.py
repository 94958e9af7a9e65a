"""What pictures of measurements are made of: SVG text, drawn by hand (without a plotting library), for light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape, quoteattr

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


def document(name: str, width: float, height: float, shapes: Sequence[str]) -> str:
    """A whole picture under a title."""
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'role="img" aria-label={quoteattr(name)}>',
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{width:g}" height="{height:g}" rx="8"/>',
        text(40, 34, name, "title"),
    ]
    return "\n".join([*head, *shapes, "</svg>"]) + "\n"


def grid(
    step: float, most: float, place: Callable[[float], tuple[float, float, float, float]], name: Callable[[float], str]
) -> list[str]:
    """Lines at 0, ``step``, ... up to ``most``, from and to where ``place`` says, and what ``name`` writes beside each."""
    out = []
    for k in range(math.floor(most / step + 1e-9) + 1):
        out += [grid_line(*place(k * step)), name(k * step)]
    return out


def grid_line(a: float, b: float, c: float, d: float) -> str:
    return f'<line class="grid" x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}"/>'


def nice(rough: float) -> float:
    """The next of 1, 2 or 5 times a power of ten."""
    unit = 10.0 ** math.floor(math.log10(max(rough, 1e-6)))
    return next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * (1 - 1e-9))


def label(value: float) -> str:
    return f"{value / 1e3:g}k" if value >= 10_000 else f"{value:g}"


def axis(box: Box) -> str:
    left, top, right, bottom = box
    return f'<rect class="axis" x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"/>'


def line(points: Points, colour: str, dash: str = "", width: float = 1.8) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashed}/>'


def key(x: float, y: float, name: str, colour: str, dash: str) -> list[str]:
    return [line([(x, y - 4), (x + 26, y - 4)], colour, dash), text(x + 32, y, name)]


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    shown_as = f'class="{kind}" ' if kind else ""
    return f'<text {shown_as}x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
