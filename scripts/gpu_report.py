"""What scripts/gpu_check found, as Markdown tables and a roofline picture."""

from __future__ import annotations

from typing import Any

from bench_report import COLOURS, Axes, number, roofs, table, text

Report = dict[str, Any]


def markdown(report: Report) -> str:
    """Of what there is so far."""
    facts, limits = report["machine"], report.get("limits", {})
    parts = [", ".join(f"{name} {value}" for name, value in facts.items()) + ".\n", f"    {report['command']}\n"]
    for part in ("kernels", "engine"):
        if f"{part}_tests" in report:
            found = report[f"{part}_tests"]
            parts.append(f"Tests of the {part}: {found['summary']}, {len(found['failed'])} tests fail ({found['seconds']} s).\n")
            lines = [f"- {name}: {told}" for told_of in ("wrong", "failed", "again") for name, told in found[told_of].items()]
            lines += [f"- {seconds} s in {name}" for name, seconds in list(found["slow"].items())[:10]]
            parts.append(compiled({f"tests of the {part}": found["compiled"]}))
            parts += lines + [""] * bool(lines)
    parts.append(compiled(report.get("compiled", {})))
    if limits:
        copied = f"copy {number(limits['copy'] / 1e9)} GB/s; " if "copy" in limits else ""
        rates = ", ".join(f"{name} {number(rate / 1e12)} Top/s" for name, rate in limits.items() if name != "copy")
        parts.append(f"Limits measured in the same run: {copied}products of {rates or 'nothing'}.\n")
    if "kernels" in report:
        parts += [product_table(report, limits), attention_table(report, limits), small_table(report, limits)]
    if "engine" in report:
        parts.append(engine_table(report["engine"], limits))
    parts += [f"- {error}" for error in report.get("errors", [])]
    if report.get("left_out"):
        parts.append("Left out, as there was no time for it: " + "; ".join(report["left_out"]) + ".\n")
    return "\n".join(part for part in parts if part)


def compiled(processes: dict[str, Report]) -> str:
    """Kernels that were not in Triton's cache; seconds of processes, of which several may have run at a time."""
    told = "; ".join(f"{name} {one['kernels']} in {one['seconds']} s" for name, one in processes.items() if one["kernels"])
    return f"Kernels compiled: {told}.\n" if told else ""


def share(value: float, of: float | None) -> str:
    """Nothing where that was not measured."""
    return f"{100 * value / of:.0f} %" if of else ""


def times(row: Report, other: str) -> str:
    """How many times as long as ours another takes; nothing where it was not measured."""
    return f"{number(row[f'{other}_s'] / row['ours_s'])} x" if f"{other}_s" in row else ""


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
                share(row["bytes"] / ours, limits.get("copy")),
                share(row["ops"] / ours, limits.get(row["dtype"])),
                *(times(row, other) for other in ("dense", "tinygemm", "gemlite")),
            ]
        )
    head = ["product", "shape", "rows", "us", "of the copy's bandwidth", "of the large product's rate"]
    return table([*head, "cuBLAS takes", "tinygemm", "gemlite"], rows)


def attention_table(report: Report, limits: dict[str, float]) -> str:
    rows = [
        [
            row["op"],
            f"{row['rows']} x {row.get('length', 1)} of {row['context']} {row['dtype']}",
            number(1e6 * row["ours_s"]),
            share(row["bytes"] / row["ours_s"], limits.get("copy")),
            share(row["ops"] / row["ours_s"], limits.get(row["dtype"])),
            times(row, "sdpa"),
        ]
        for row in report["kernels"]
        if "context" in row
    ]
    head = ["attention", "sequences x tokens of context", "us", "of the copy's bandwidth", "of the large product's rate"]
    return table([*head, "SDPA, contiguous, takes"], rows)


def small_table(report: Report, limits: dict[str, float]) -> str:
    rows = []
    for row in report["kernels"]:
        if row.get("small"):
            rate = row["bytes"] / row["ours_s"]
            rows.append(
                [f"{row['op']} {row['dtype']}", str(row["rows"]), number(1e6 * row["ours_s"]), share(rate, limits.get("copy"))]
            )
    return table(["kernel", "tokens", "us", "of the copy's bandwidth"], rows)


def engine_table(engines: list[Report], limits: dict[str, float]) -> str:
    head = ["model", "sequences", "prompt", "first token, ms", "prefill tok/s", "of the large product's rate", "decode tok/s"]
    rate = max((value for name, value in limits.items() if name != "copy"), default=None)
    rows = [
        [
            one["model"],
            str(one["sequences"]),
            str(one["prompt"]),
            number(1e3 * one["first_s"]),
            number(one["sequences"] * one["prompt"] / one["first_s"]),
            share(one["prefill_ops_s"], rate),
            number(one["decode_tok_s"]) if one["decode_tok_s"] else "",
            share(one["decode_bytes_s"], limits.get("copy")) if "decode_bytes_s" in one else "",
            number(one["predicted_tok_s"]) if "predicted_tok_s" in one else "",
        ]
        for one in engines
    ]
    return table([*head, "of the copy's bandwidth", "predicted, with layers on the host"], rows)


def points(report: Report) -> list[tuple[str, str, float, float]]:
    """(what, which, operations a byte, 10^12 operations a second) of all that computes."""
    found = []
    for row in report.get("kernels", []):
        if row["ops"]:
            name, which = f"{row['op']} {row.get('shape', '')}".strip(), f"{row['rows']} rows, {row['dtype']}"
            found.append((name, which, row["ops"] / row["bytes"], row["ops"] / row["ours_s"] / 1e12))
    return found


def measured(report: Report) -> bool:
    """Whether there is what a roofline needs."""
    limits = report.get("limits", {})
    return bool(points(report)) and "copy" in limits and len(limits) > 1


def roofline(report: Report) -> str:
    """Operations for a byte against 10^12 operations a second, every product and attention case a point."""
    limits, found = report["limits"], points(report)
    tops = {name: rate / 1e12 for name, rate in limits.items() if name != "copy"}
    slope, ceiling = limits["copy"] / 1e12, max(tops.values())
    xs, ys = [p[2] for p in found], [p[3] for p in found]
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
    names = list(dict.fromkeys(name for name, *_ in found))
    for name, which, x, y in found:
        colour = COLOURS[names.index(name) % len(COLOURS)]
        px, py = axes.at(x, y)
        out.append(f'<circle cx="{px}" cy="{py}" r="4" fill="{colour}"><title>{name}, {which}</title></circle>')
    for i, name in enumerate(names):
        out.append(
            f'<circle cx="668" cy="{60 + 20 * i}" r="5" fill="{COLOURS[i % len(COLOURS)]}"/>' + text(680, 64 + 20 * i, name)
        )
    return "\n".join([*out, "</svg>"]) + "\n"
