"""docs/gpu-kernels.md: what the compiler makes of every Triton kernel, for every architecture, on a machine without a card.

    scripts/gpu_kernels [--out FILE] [--cards 89 90]

Launches are recorded from the operators (tests/kernels/triton/launches.py), compiled as Triton would for a card of that kind, and
read back from the machine code (tests/kernels/triton/aot.py).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.kernels.triton.aot import TOOLS, Compilation, Report, compile_all
from tests.kernels.triton.cards import CARDS
from tests.kernels.triton.launches import recorded

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "gpu-kernels.md"
Found = dict[str, dict[str, dict[int, tuple[Compilation, Report]]]]  # kernel, title of the launch, architecture

HEAD = """# What the kernels compile to
Written by `scripts/gpu_kernels` (Triton {triton}; {ptxas}): compiled, not run. Each kernel is here in its usual launches: with
the shapes of an 8B model (experts: of Qwen3-30B-A3B and Mixtral 8x7B; latents: of Kimi K2) and blocks of 64 tokens, as an
operator on a card of that kind launches it.

- **stack**: bytes a thread of what did not fit its registers
- **at a time**: blocks x their warps in a multiprocessor, the share of the warps it could hold, what forbids one more block
- **loop**: instructions of the longest loop (in brackets: of the whole kernel, where there is none)
- **for each**: instructions of the loop for each weight, or each number of a key or value, that passes through it

"""
LIMITS = """## Limits of a multiprocessor
65,536 registers in four partitions, 256 at a time to a warp; from sm_80 on the system takes 1 KB of shared memory for each block.
Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the arithmetic is that of the toolkit's
cuda_occupancy.h.

"""


def items(one: Compilation) -> int:
    """Weights, or numbers of keys and values, that a thread handles in a turn of the loop; 0 for kernels that have neither."""
    constants, threads = one.constants, 32 * one.num_warps
    name = one.kernel.rpartition(":")[2]
    if name == "product":  # a tile of the weight has 128 inputs; a dense one of experts what is multiplied at a time
        return int(constants["BN"] * (constants["BK"] if constants.get("BITS") == 16 else 128) // threads)
    if name in ("_decode", "_prefill"):
        return int(2 * constants["BLOCK_N"] * (constants["WIDTH"] + constants["SIDE"]) // threads)
    return 0


def compiled(targets: Sequence[int]) -> Found:
    """Every recorded launch of every kernel. Launches of one title that differ in constants alone are numbered."""
    found: Found = defaultdict(lambda: defaultdict(dict))
    for target in targets:
        launches = recorded(target)
        print(f"sm_{target}: {len(launches)} launches", file=sys.stderr, flush=True)
        for one, report in zip(launches, compile_all(launches), strict=True):
            kernel, title = one.kernel.removeprefix("kernels.triton."), one.case
            same = sum(target in reports for name, reports in found[kernel].items() if name.partition(" #")[0] == title)
            found[kernel][f"{title} #{same + 1}" if same else title][target] = (one, report)
    return found


def limits() -> str:
    rows = [
        [f"sm_{target}", card.name, str(card.warps), str(card.blocks), _kilobytes(card.shared), _kilobytes(card.shared_of_block)]
        for target, card in CARDS.items()
    ]
    head = ["architecture", "card", "warps", "blocks", "shared memory, KB", "of one block, KB"]
    return LIMITS + _table(head, rows)


def summary(found: Found) -> str:
    """Instructions for a weight, or a number of the cache, of all hot loops, card by card."""
    rows = []
    for kernel, launches in found.items():
        for title, reports in launches.items():
            if any(items(one) for one, _ in reports.values()):
                cells = [_each(*reports[target]) if target in reports else "" for target in CARDS]
                rows.append([f"{kernel}: {title}", *cells])
    return "## Instructions in hot loops, for a weight or a number of the cache\n" + _table(
        ["launch", *(f"sm_{target}" for target in CARDS)], rows
    )


def section(kernel: str, launches: Mapping[str, Mapping[int, tuple[Compilation, Report]]]) -> str:
    rows = []
    for title, reports in launches.items():
        for target, (one, report) in reports.items():
            full = report.occupancy
            length = sum(report.loop.values())
            held = f"{full.blocks} x {report.warps}, {100 * full.share:.0f} %, {full.limit}"
            sizes = [str(report.registers), str(report.stack), _kilobytes(report.shared)]
            loop = str(length) if report.turns else f"({length})"
            rows.append([title, f"sm_{target}", *sizes, held, loop, _each(one, report)])
    head = ["launch", "card", "registers", "stack", "shared, KB", "at a time", "loop", "for each"]
    return f"### {kernel}\n" + _table(head, rows)


def _each(one: Compilation, report: Report) -> str:
    return f"{report.per_weight(items(one)):.2f}" if items(one) and report.turns else ""


def _kilobytes(size: int) -> str:
    return f"{size / 1024:.1f}".removesuffix(".0")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def versions() -> dict[str, str]:
    """Of Triton and of the assemblers in its wheel."""
    import triton

    tools, found = Path(triton.__file__).parent.joinpath(*TOOLS), []
    for path in sorted(tools.glob("ptxas*")):
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
        found.append(f"{path.name} {answer.rpartition('release ')[2].partition(',')[0]}")
    return {"triton": triton.__version__, "ptxas": ", ".join(found)}


def document(found: Found) -> str:
    parts = [limits(), summary(found), *(section(kernel, found[kernel]) for kernel in sorted(found))]
    return HEAD.format(**versions()) + "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    parser.add_argument("--cards", type=int, nargs="+", choices=tuple(CARDS), default=tuple(CARDS))
    args = parser.parse_args()
    args.out.write_text(document(compiled(args.cards)))


if __name__ == "__main__":
    main()
