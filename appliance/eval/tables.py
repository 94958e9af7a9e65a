"""What was found, as tables for people: quality, then size and speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from appliance.eval.rows import Row
from appliance.memory.text import size_text

Column = tuple[str, Callable[[Row], str]]


def tables(rows: Sequence[Row], caption: str) -> list[Table]:
    """One or two, with the columns for which there is something."""
    found = [_table(f"Quality ({caption})", rows, _quality(rows))]
    return [*found, _table("Size and speed", rows, _cost(rows))]


def _table(title: str, rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold")
    made.add_column("model", overflow="fold")
    for head, _ in columns:
        made.add_column(head, justify="right", overflow="fold")
    for row in rows:
        made.add_row(row.label, *(cell(row) for _, cell in columns))
    return made


def _quality(rows: Sequence[Row]) -> list[Column]:
    found: list[Column] = []
    known = {name for row in rows if row.score for name in row.score.to_dict()}
    if known:
        found.append(("perplexity", lambda row: _score(row, "perplexity", "perplexity_error", "{:.3f}")))
    if "kl" in known:
        found += [
            ("against base", lambda row: _score(row, "ratio", "ratio_error", "{:+.2%}", less=1.0)),
            ("KL from base", lambda row: _score(row, "kl", "kl_error", "{:.5f}")),
            ("median", lambda row: _score(row, "kl_median", None, "{:.5f}")),
            ("99 %", lambda row: _score(row, "kl_99", None, "{:.4f}")),
            ("largest", lambda row: _score(row, "kl_max", None, "{:.3f}")),
            ("same top token", lambda row: _score(row, "top1_agreement", "top1_error", "{:.2%}")),
        ]
    if any(row.answers for row in rows):
        found.append(("exact match", lambda row: f"{row.answers.share:.1%} of {row.answers.of}" if row.answers else ""))
    return found


def _score(row: Row, name: str, error: str | None, form: str, less: float = 0.0) -> str:
    """A value and, behind it, its standard error."""
    found = {} if row.score is None else row.score.to_dict()
    value, around = found.get(name), found.get(error or "")
    if value is None:
        return "not finite" if name in found else ""
    return form.format(value - less) + ("" if around is None else " ± " + form.replace("+", "").format(around))


def _cost(rows: Sequence[Row]) -> list[Column]:
    def of(name: str, form: Callable[[float], str]) -> Callable[[Row], str]:
        return lambda row: form(row.sizes.to_dict()[name]) if row.sizes else ""

    found: list[Column] = [
        ("quantization", lambda row: row.quantization),
        ("bits a weight of linears", of("bits_per_linear_weight", "{:.2f}".format)),
        ("of all", of("bits_per_weight", "{:.2f}".format)),
        ("files", of("file_bytes", _bytes)),
        ("in memory", of("weights_bytes", _bytes)),
        ("embedding", of("embedding_bytes", _bytes)),
        ("head", lambda row: _head(row)),
    ]
    if any(row.speed for row in rows):
        found.append(("prefill tok/s", lambda row: _rate(row.speed.prefill) if row.speed else ""))
        for count in dict.fromkeys(count for row in rows if row.speed for count in row.speed.decode):
            found.append((f"decode {count} tok/s", lambda row, count=count: _rate(row.speed.decode[count]) if row.speed else ""))  # type: ignore[misc]
    if any(row.answers for row in rows):
        found.append(("answers tok/s", lambda row: _rate(row.answers.tokens / row.answers.seconds) if row.answers else ""))
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
