"""What was found, as tables for people: quality, size and speed, each as narrow as it can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from appliance.eval.rows import Row
from appliance.memory.text import size_text

Column = tuple[str, Callable[[Row], str]]


def tables(rows: Sequence[Row], caption: str) -> list[Table]:
    """Those for which there is something."""
    found = {f"Quality: {caption}": _quality(rows), "Size": _size(), "Speed, tokens a second": _speed(rows)}
    return [_table(title, rows, columns) for title, columns in found.items() if columns]


def _table(title: str, rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    made.add_column("model", overflow="fold")
    for head, _ in columns:
        made.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(row.label, *(cell(row) for _, cell in columns))
    return made


def _quality(rows: Sequence[Row]) -> list[Column]:
    found: list[Column] = []
    known = {name for row in rows if row.score for name in row.score.to_dict()}
    if known:
        found.append(("perplexity", lambda row: _score(row, "perplexity", "perplexity_error", 3)))
    if "kl" in known:
        found += [
            ("against base", lambda row: _share(row, "ratio", "ratio_error", less=1.0)),
            ("KL from base", lambda row: _score(row, "kl", "kl_error")),
            ("median", lambda row: _score(row, "kl_median")),
            ("99 %", lambda row: _score(row, "kl_99")),
            ("largest", lambda row: _score(row, "kl_max")),
            ("same top token", lambda row: _share(row, "top1_agreement", "top1_error")),
        ]
    if any(row.answers for row in rows):
        found.append(("exact match", lambda row: f"{row.answers.share:.1%} of {row.answers.of}" if row.answers else ""))
    return found


def _score(row: Row, name: str, error: str = "", decimals: int | None = None) -> str:
    """A value and, behind it, its standard error, which says how many of its decimals mean anything."""
    found = {} if row.score is None else row.score.to_dict()
    value, around = found.get(name), found.get(error)
    if value is None:
        return "not finite" if name in found else ""
    return rounded(value, around, decimals)


def _share(row: Row, name: str, error: str, less: float = 0.0) -> str:
    """In per cent; with a sign where it is a difference."""
    found = {} if row.score is None else row.score.to_dict()
    if found.get(name) is None:
        return "not finite" if name in found else ""
    value, around = 100 * (found[name] - less), found[error]
    return ("+" if less and value > 0 else "") + rounded(value, None if around is None else 100 * around, 1) + " %"


def rounded(value: float, error: float | None, decimals: int | None = None) -> str:
    """``decimals`` at least; without any asked for, as many as its error, or three digits of its own, have."""
    scale = error or value
    digits = (1 if error else 2) - math.floor(math.log10(abs(scale))) if scale else 0
    digits = min(7, max(digits, decimals or 0, 0))
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")


def _size() -> list[Column]:
    def of(name: str, form: Callable[[float], str]) -> Callable[[Row], str]:
        return lambda row: form(row.sizes.to_dict()[name]) if row.sizes else ""

    return [
        ("quantization", lambda row: row.quantization),
        ("bits/weight", of("bits_per_linear_weight", "{:.2f}".format)),
        ("of all", of("bits_per_weight", "{:.2f}".format)),
        ("files", of("file_bytes", _bytes)),
        ("in memory", of("weights_bytes", _bytes)),
        ("embedding", of("embedding_bytes", _bytes)),
        ("head", _head),
    ]


def _speed(rows: Sequence[Row]) -> list[Column]:
    found: list[Column] = []
    if any(row.speed for row in rows):
        found.append(("prefill", lambda row: _rate(row.speed.prefill) if row.speed else ""))
        for count in dict.fromkeys(count for row in rows if row.speed for count in row.speed.decode):
            found.append((f"decode, {count} at once", lambda row, n=count: _rate(row.speed.decode[n]) if row.speed else ""))  # type: ignore[misc]
    if any(row.answers for row in rows):
        found.append(("answers", lambda row: _rate(row.answers.tokens / row.answers.seconds) if row.answers else ""))
    return found


def _bytes(value: float) -> str:
    return size_text(int(value))


def _head(row: Row) -> str:
    """Where the embedding has its bytes, it has none of its own."""
    if row.sizes is None:
        return ""
    size = row.sizes.memory.get("head", 0)
    return f"{size_text(size)}, {row.sizes.head}" if size else row.sizes.head


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
