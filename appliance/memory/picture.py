"""The memory map of a plan as a picture: SVG, written by hand, legible on light and on dark pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

from appliance.memory.text import Part, parts_of, rest_of, size_text

if TYPE_CHECKING:
    from appliance.memory.plan import MemoryPlan

WIDTH, MARGIN = 960, 32
INNER, RIGHT = WIDTH - 2 * MARGIN, MARGIN + 430  # the right column
COLORS = {
    "weights": ("#1f4e8c", "#2f6db5", "#4a8bd1", "#76abe0", "#a6c9ee", "#cfe1f5"),
    "workspace": ("#c77700", "#e08e0b", "#f0a832", "#f6c064", "#fad694", "#fce6bd"),
    "CUDA graphs": ("#a64d79",),
    "states": ("#0e7490",),
    "runtime": ("#6e7781",),
    "grammars": ("#9a6700", "#bf8700", "#d4a72c"),
    "swap space": ("#7b61c4", "#b3a3e0"),
    "KV cache": ("#1a8f62",),
}
STYLE = """
text { font-family: ui-sans-serif, system-ui, 'Segoe UI', 'Helvetica Neue', 'DejaVu Sans', sans-serif; fill: #1f2328 }
.page { fill: #ffffff; stroke: #d0d7de }
.title { font-size: 20px; font-weight: 600 }
.head { font-size: 14px; font-weight: 600 }
.body { font-size: 13px }
.small { font-size: 12px; fill: #57606a }
.inside { font-size: 12px; font-weight: 600; fill: #ffffff }
.number { font-size: 13px; text-anchor: end }
.frame { fill: none; stroke: #8c959f }
.free { fill: #eaeef2 }
.held { fill: #afb8c1 }
.mark { stroke: #cf222e; stroke-width: 2 }
.sequence { fill: #1a8f62 }
.other { fill: #8fd3b6 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .page { fill: #0d1117; stroke: #30363d }
  .small { fill: #9198a1 }
  .inside { fill: #ffffff }
  .free { fill: #21262d }
  .held { fill: #484f58 }
  .frame { stroke: #6e7681 }
  .other { fill: #14543c }
}
"""
CELL, COLUMNS, ROWS = 14, 56, 6  # the block pool: a square is at least one block


def memory_map(plan: MemoryPlan, facts: Sequence[str] = ()) -> str:
    """An SVG document: a bar of the device's memory to scale, a legend with every part, the pool of blocks, and ``facts``."""
    parts, shapes, y = parts_of(plan), [], 118
    device = plan.device
    shapes += _bar(plan, parts, y)
    y += 116
    legend, y_legend = _legend(plan, parts, y)
    pool, y_pool = _pool(plan, y, RIGHT)
    room, y_room = _sequences(plan, y_pool + 36, RIGHT)
    lines = [_text(RIGHT, y_room + 36 + 20 * i, fact, "body" if i else "head") for i, fact in enumerate(facts)]
    height = max(y_legend, y_room + 36 + 20 * (len(lines) - 1)) + 24
    name = plan.model.rstrip("/").rpartition("/")[2] or plan.model
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f"aria-label={quoteattr(f'Memory plan of {name} on {device.name}')}>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10"/>',
        _text(MARGIN, 42, f"{name} on {device.name}", "title"),
        _text(MARGIN, 66, f"{plan.architecture}, {plan.quantization}, {plan.dtype}; KV cache in {plan.kv.dtype}", "small"),
        _text(MARGIN, 86, f"budget {size_text(plan.budget)}: {plan.budget_source}", "small"),
    ]
    return "\n".join([*head, *shapes, *legend, *pool, *room, *lines, "</svg>"]) + "\n"


def _colors(parts: Sequence[Part]) -> Iterator[tuple[Part, str]]:
    seen: dict[str, int] = {}
    for part in parts:
        shades, count = COLORS[part.category], seen.get(part.category, 0)
        seen[part.category] = count + 1
        yield part, shades[min(count, len(shades) - 1)]


def _bar(plan: MemoryPlan, parts: Sequence[Part], y: int) -> list[str]:
    """The device's memory from left to right, the budget's end marked, names inside where there is room."""
    total, height, x = max(plan.device.total, plan.total), 56, float(MARGIN)
    out = [f'<rect class="free" x="{MARGIN}" y="{y}" width="{INNER}" height="{height}" rx="4"/>']
    held = INNER * (plan.device.total - plan.device.available) / total
    if held > 0:
        out.append(f'<rect class="held" x="{WIDTH - MARGIN - held:.2f}" y="{y}" width="{held:.2f}" height="{height}" rx="4"/>')
    spans: dict[str, tuple[float, float]] = {}
    for part, color in _colors(parts):
        width = INNER * part.nbytes / total
        title = f"<title>{escape(f'{part.category}: {part.name}, {size_text(part.nbytes)}')}</title>"
        out.append(f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}" fill="{color}">{title}</rect>')
        begin, _ = spans.get(part.category, (x, x))
        x += width
        spans[part.category] = begin, x
    for category, (begin, end) in spans.items():
        if end - begin > 7.5 * len(category) + 8:
            size = size_text(sum(part.nbytes for part in parts if part.category == category))
            middle = f'x="{(begin + end) / 2:.1f}" text-anchor="middle"'
            out.append(f'<text class="inside" {middle} y="{y + 25}">{escape(category)}</text>')
            out.append(f'<text class="inside" {middle} y="{y + 42}">{size}</text>')
    out.append(f'<rect class="frame" x="{MARGIN}" y="{y}" width="{INNER}" height="{height}" rx="4"/>')
    mark = MARGIN + INNER * min(1.0, plan.budget / total)
    out.append(f'<line class="mark" x1="{mark:.1f}" y1="{y - 8}" x2="{mark:.1f}" y2="{y + height + 8}"/>')
    anchor = "end" if mark > WIDTH - 160 else "start"
    out.append(f'<text class="small" x="{mark:.1f}" y="{y - 12}" text-anchor="{anchor}">budget</text>')
    out += [
        _text(MARGIN, y + height + 22, "0", "small"),
        f'<text class="small" x="{WIDTH - MARGIN}" y="{y + height + 22}" text-anchor="end">{size_text(total)}</text>',
    ]
    return out


def _legend(plan: MemoryPlan, parts: Sequence[Part], y: int) -> tuple[list[str], int]:
    """Every part with its colour, size and share of the device; then what is not taken. Returns the shapes and where they end."""
    out, last, right = [_text(MARGIN, y, "Where every byte goes", "head")], "", MARGIN + 390
    rows: list[tuple[str, str, int, str]] = [(part.category, part.name, part.nbytes, color) for part, color in _colors(parts)]
    for category, name, nbytes, color in rows:
        if category != last and sum(1 for row in rows if row[0] == category) > 1:
            y += 24
            size = sum(row[2] for row in rows if row[0] == category)
            out += [_text(MARGIN, y, category, "body"), *_sizes(size, plan.device.total, right, y)]
            last = category
        single = category != last
        y += 22
        out.append(f'<rect x="{MARGIN + (0 if single else 14)}" y="{y - 11}" width="12" height="12" rx="2" fill="{color}"/>')
        out.append(_text(MARGIN + (20 if single else 34), y, category if single else name, "body"))
        out += _sizes(nbytes, plan.device.total, right, y)
        last = category
    for name, nbytes in rest_of(plan):
        y += 22
        kind = "held" if "others" in name else "free"
        out.append(f'<rect class="{kind}" x="{MARGIN}" y="{y - 11}" width="12" height="12" rx="2" stroke="#8c959f"/>')
        out += [_text(MARGIN + 20, y, name, "body"), *_sizes(nbytes, plan.device.total, right, y)]
    return out, y


def _sizes(nbytes: int, total: int, right: int, y: int) -> list[str]:
    return [
        f'<text class="number" x="{right - 60}" y="{y}">{size_text(nbytes)}</text>',
        f'<text class="number" x="{right}" y="{y}">{nbytes / total:.1%}</text>',
    ]


def _pool(plan: MemoryPlan, y: int, x: int) -> tuple[list[str], int]:
    """The blocks as squares, those of one sequence filled: of a length of which some fit, where there is one."""
    kv, columns = plan.kv, (WIDTH - MARGIN - x) // CELL
    length = next((n for n in reversed(plan.lengths()) if plan.sequences(n) >= 4), plan.max_model_len)
    each = max(1, -(-plan.num_blocks // (columns * ROWS)))
    cells, one = -(-plan.num_blocks // each), -(-kv.blocks(length) // each)
    out = [_text(x, y, f"KV cache: {plan.num_blocks:,} blocks of {kv.block_size} tokens", "head")]
    for cell in range(cells):
        left, top = x + cell % columns * CELL, y + 12 + cell // columns * CELL
        kind = "sequence" if cell < one else "other"
        out.append(f'<rect class="{kind}" x="{left}" y="{top}" width="{CELL - 3}" height="{CELL - 3}" rx="2"/>')
    y += 12 + -(-cells // columns) * CELL
    squares = f"a square is {each:,} blocks; " if each > 1 else ""
    out.append(_text(x, y + 14, f"{squares}filled: one sequence of {length:,} tokens", "small"))
    return out, y + 18


def _sequences(plan: MemoryPlan, y: int, x: int) -> tuple[list[str], int]:
    """How many sequences of which length the pool holds: at most eight lengths, the longest ones."""
    out = [_text(x, y, "Sequences that fit at once", "head")]
    lengths = plan.lengths()[-8:]
    most = max(plan.sequences(length) for length in lengths)
    for length in lengths:
        y += 20
        count = plan.sequences(length)
        width = max(1.0, (WIDTH - MARGIN - x - 190) * count / most)
        out.append(f'<text class="number" x="{x + 110}" y="{y}">{length:,} tokens</text>')
        out.append(f'<rect class="sequence" x="{x + 122}" y="{y - 10}" width="{width:.1f}" height="11" rx="2"/>')
        out.append(_text(x + 128 + width, y, f"{count:,.1f}", "small"))
    return out, y


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(text)}</text>'
