"""Numbers and histories as text, the same on the screen and in plain snapshots."""

from __future__ import annotations

from collections.abc import Sequence

MUTED = "$foreground 55%"  # the style of what is less important
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


def short_size(n: float) -> str:
    """Bytes in little room: 512B, 1.5K, 12M, 3.25G."""
    return size(n).replace(" ", "").replace("iB", "")


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


def seconds(value: float | None) -> str:
    """A short time: 0.4 ms, 12 ms, 1.25 s, 12.5 s, then as duration(); "-" for None."""
    if value is None:
        return "-"
    if value < 0.9995:
        return f"{1000 * value:.1f} ms" if value < 0.00995 else f"{1000 * value:.0f} ms"
    return f"{value:.2f} s" if value < 9.995 else f"{value:.1f} s" if value < 59.95 else duration(value)


def fit(choices: Sequence[str], width: int) -> str:
    """The first of these that is at most so wide; the last one, cut, where none is."""
    return next((one for one in choices if len(one) <= width), choices[-1][: max(width, 0)])


def percent(part: float, whole: float) -> str:
    """Of the whole; a little is not nothing."""
    share = 100 * part / whole if whole else 0.0
    return "<1 %" if 0 < share < 0.5 else f"{share:.0f} %"


def chart(values: Sequence[float | None], width: int, height: int, top: float) -> list[str]:
    """``height`` lines of ``width`` bars, the newest value to the right; ``top`` is the value of a full bar.

    A value above zero shows at least the lowest bar; None leaves a gap.
    """
    shown = list(values)[-width:] if width > 0 else []
    eighths = [0] * (width - len(shown)) + [
        min(8 * height, max(round(8 * height * value / top), 1)) if value and value > 0 and top > 0 else 0 for value in shown
    ]
    return ["".join(BARS[min(8, max(0, n - 8 * row))] for n in eighths) for row in reversed(range(height))]


SIGNS = str.maketrans("#&+.", "■◆□·")


def fill_map(block_map: str, cells: int) -> str:
    """A pool's map ("#" used, "&" shared, "+" kept, "." blank) in at most ``cells`` characters.

    One a block ("■", "◆", "□" or "·") where they fit, else each stands for a run of blocks: "◆" where at least half of those that
    are used are shared, else shaded by how many are used, "░▒▓" some, "█" all, and of none "□" where some are kept, else "·".
    """
    n = len(block_map)
    if n <= cells:
        return block_map.translate(SIGNS)
    if cells < 1:
        return ""
    runs = (block_map[i * n // cells : (i + 1) * n // cells] for i in range(cells))
    return "".join(_shade(run.count("#"), run.count("&"), run.count("+"), len(run)) for run in runs)


def _shade(used: int, shared: int, kept: int, of: int) -> str:
    if shared and shared >= used:
        return "◆"
    used += shared
    if used in (0, of):
        return SHADES[-1] if used else "□" if kept else SHADES[0]
    return SHADES[1 + min(2, 3 * used // of)]


def segments(parts: Sequence[float], width: int, whole: float) -> list[int]:
    """Widths, together at most ``width``, in proportion to ``parts`` of ``whole``; a part above zero gets one if any is left."""
    if whole <= 0 or width <= 0:
        return [0] * len(parts)
    widths = [max(1, round(width * min(part / whole, 1))) if part > 0 else 0 for part in parts]
    while sum(widths) > width:
        widths[widths.index(max(widths))] -= 1
    return widths
