"""Numbers and histories as text, the same on the screen and in plain snapshots."""

from __future__ import annotations

from collections.abc import Sequence

BARS = " ▁▂▃▄▅▆▇█"
SHADES = "·░▒▓█"


def size(n: float) -> str:
    """Bytes: 512 B, 1.5 KiB, 12 MiB, 3.25 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024 or unit == "GiB":
            break
        n /= 1024
    digits = 0 if unit == "B" or n >= 100 else 1 if n >= 10 else 2
    return f"{n:.{digits}f} {unit}"


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3m 05s, 2h 10m, 4d 3h: at most six characters below 100 hours."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h}h"
    if hours:
        return f"{hours}h {m:02}m"
    return f"{minutes}m {s:02}s" if minutes else f"{s} s"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"


def chart(values: Sequence[float], width: int, height: int, top: float) -> list[str]:
    """``height`` lines of ``width`` bars, the newest value to the right; ``top`` is the value of a full bar.

    A value above zero shows at least the lowest bar.
    """
    shown = list(values)[-width:] if width > 0 else []
    eighths = [0] * (width - len(shown)) + [
        min(8 * height, max(round(8 * height * value / top), 1)) if value > 0 and top > 0 else 0 for value in shown
    ]
    return ["".join(BARS[min(8, max(0, n - 8 * row))] for n in eighths) for row in reversed(range(height))]


def fill_map(block_map: str, cells: int) -> str:
    """A pool's map ("#" used, "+" kept, "." blank) in at most ``cells`` characters.

    One a block ("■", "□" or "·") where they fit, else each stands for a run of blocks and is shaded by how many are used:
    "░▒▓" some, "█" all, and of none "□" where some are kept, else "·".
    """
    n = len(block_map)
    if n <= cells:
        return block_map.replace("#", "■").replace("+", "□").replace(".", "·")
    if cells < 1:
        return ""
    runs = (block_map[i * n // cells : (i + 1) * n // cells] for i in range(cells))
    return "".join(_shade(run.count("#"), run.count("+"), len(run)) for run in runs)


def _shade(used: int, kept: int, of: int) -> str:
    if used in (0, of):
        return SHADES[-1] if used else "□" if kept else SHADES[0]
    return SHADES[1 + min(2, 3 * used // of)]


def segments(parts: Sequence[float], width: int, whole: float) -> list[int]:
    """Widths, together at most ``width``, in proportion to ``parts`` of ``whole``; a part above zero gets one if any is left."""
    if whole <= 0 or width <= 0:
        return [0] * len(parts)
    widths = [max(1, round(width * part / whole)) if part > 0 else 0 for part in parts]
    while sum(widths) > width:
        widths[widths.index(max(widths))] -= 1
    return widths
