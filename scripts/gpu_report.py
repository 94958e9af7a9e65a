"""What scripts/gpu_check found, as Markdown tables and a roofline picture."""

from __future__ import annotations

from typing import Any

from bench_report import COLOURS, Axes, number, roofs, table, text

Report = dict[str, Any]


def markdown(report: Report) -> str:
    facts = report["machine"]
    parts = [", ".join(f"{name} {value}" for name, value in facts.items()) + ".\n", f"    {report['command']}\n"]
    for part in ("kernels", "engine"):
        if f"{part}_tests" in report:
            found = report[f"{part}_tests"]
            parts.append(f"Tests of the {part}: {found['summary']} ({found['seconds']} s).\n")
    if "limits" in report:
        limits = report["limits"]
        rates = ", ".join(f"{name} {number(rate / 1e12)} Top/s" for name, rate in limits.items() if name != "copy")
        parts.append(f"Limits measured in the same run: copy {number(limits['copy'] / 1e9)} GB/s; products of {rates}.\n")
        parts += [product_table(report, limits), attention_table(report, limits)]
    if "engine" in report:
        parts.append(engine_table(report["engine"]))
    return "\n".join(part for part in parts if part)


def share(value: float, of: float) -> str:
    return f"{100 * value / of:.0f} %"


def product_table(report: Report, limits: dict[str, float]) -> str:
    rows = []
    for row in report["kernels"]:
        if "N" not in row:
            continue
        ours = row["ours_s"]
        rows.append(
            [
                f"{row['op']} {row['dtype']}",
                f"{row['shape']} {row['N']}x{row['K']}",
                str(row["rows"]),
                number(1e6 * ours),
                share(row["bytes"] / ours, limits["copy"]),
                share(row["ops"] / ours, limits[row["dtype"]]),
                f"{number(row['dense_s'] / ours)} x",
                f"{number(row['tinygemm_s'] / ours)} x" if "tinygemm_s" in row else "",
            ]
        )
    head = [
        "product",
        "shape",
        "rows",
        "us",
        "of the copy's bandwidth",
        "of the large product's rate",
        "against cuBLAS",
        "against tinygemm",
    ]
    return table(head, rows)


def attention_table(report: Report, limits: dict[str, float]) -> str:
    rows = [
        [
            f"{row['rows']} x {row['context']} {row['dtype']}",
            number(1e6 * row["ours_s"]),
            share(row["bytes"] / row["ours_s"], limits["copy"]),
            f"{number(row['sdpa_s'] / row['ours_s'])} x",
        ]
        for row in report["kernels"]
        if "context" in row
    ]
    return table(["decode attention: sequences x context", "us", "of the copy's bandwidth", "against SDPA, contiguous"], rows)


def engine_table(engines: list[Report]) -> str:
    head = ["model", "sequences", "prompt", "prefill tok/s", "decode tok/s", "first token, ms"]
    rows = [
        [
            one["model"],
            str(one["sequences"]),
            str(one["prompt"]),
            number(one["sequences"] * one["prompt"] / one["first_s"]),
            number(one["decode_tok_s"]),
            number(1e3 * one["first_s"]),
        ]
        for one in engines
        if "error" not in one
    ]
    return table(head, rows) + "".join(f"\n{one['model']}: {one['error']}\n" for one in engines if "error" in one)


def roofline(report: Report) -> str:
    """Operations for a byte against 10^12 operations a second, every product and attention case a point."""
    limits, rows = report["limits"], report["kernels"]
    points = [(r.get("shape", r["op"]), r["rows"], r["ops"] / r["bytes"], r["ops"] / r["ours_s"] / 1e12) for r in rows]
    tops = {name: rate / 1e12 for name, rate in limits.items() if name != "copy"}
    slope, ceiling = limits["copy"] / 1e12, max(tops.values())
    xs, ys = [p[2] for p in points], [p[3] for p in points]
    axes = Axes((min(xs) / 1.5, max([*xs, ceiling / slope]) * 1.6), (min(ys) / 2, max(*ys, ceiling) * 1.6), (70, 40, 650, 500))
    out = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 560" font-family="sans-serif" font-size="12">',
        '<rect width="940" height="560" fill="white"/>',
        text(70, 24, f"{report['machine'].get('card', 'no card')}: kernels under the card's measured limits"),
        *axes.grid(),
        text(360, 536, "operations for each byte read or written", anchor="middle"),
        f'<g transform="translate(18 270) rotate(-90)">{text(0, 0, "10¹² operations a second", anchor="middle")}</g>',
        *roofs(axes, slope, tops),
    ]
    names = list(dict.fromkeys(name for name, *_ in points))
    for name, rows_, x, y in points:
        colour = COLOURS[names.index(name) % len(COLOURS)]
        px, py = axes.at(x, y)
        out.append(f'<circle cx="{px}" cy="{py}" r="4" fill="{colour}"><title>{name}, {rows_} rows</title></circle>')
    for i, name in enumerate(names):
        out.append(
            f'<circle cx="668" cy="{60 + 20 * i}" r="5" fill="{COLOURS[i % len(COLOURS)]}"/>' + text(680, 64 + 20 * i, name)
        )
    return "\n".join([*out, "</svg>"]) + "\n"
