"""The GPU path on this machine's card: tests, then benchmarks against what the card can do; a report as Markdown and JSON.

    scripts/gpu_check                         everything
    scripts/gpu_check --part kernels          tests of the kernels against the reference, on the card
    scripts/gpu_check --part engine           tests of the engine on the card, then a 1B and an 8B model end to end
    scripts/gpu_check --part bench            kernels against cuBLAS, torch's 4-bit kernel, SDPA and the card's own limits
    scripts/gpu_check --small --device cpu    try the benchmarks themselves without a card, in Triton's interpreter

Each part stays under nine minutes on an H200. The exit code is 1 when a test fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = {"kernels": ["tests/kernels/triton"], "engine": ["tests/runtime/test_cuda.py"]}
Report = dict[str, Any]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("all", "kernels", "engine", "bench"), default="all")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_check_out")), help="folder for the report")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for the interpreter")
    parser.add_argument("--models", default="1b,8b", help="random checkpoints for the engine: 1b, 8b")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    report: Report = {"machine": machine(args.device), "command": "scripts/gpu_check " + " ".join(argv or sys.argv[1:])}
    failed = False
    for part in ("kernels", "engine"):
        if args.part in ("all", part) and args.device == "cuda":
            report[f"{part}_tests"] = run_tests(part, args.out)
            failed |= report[f"{part}_tests"]["exit_code"] != 0
    if args.part in ("all", "bench"):
        report |= bench(args)
    if args.part in ("all", "engine") and args.device == "cuda":
        import gpu_engine

        report["engine"] = gpu_engine.run(args.models.split(","), args.out)
    write(report, args.out, args.part)
    return int(failed)


def machine(device: str) -> Report:
    import torch
    import triton

    facts: Report = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts |= {
            "card": card.name,
            "multiprocessors": card.multi_processor_count,
            "memory_gib": round(card.total_memory / 2**30, 1),
        }
        facts["capability"] = f"{card.major}.{card.minor}"
    return facts


def run_tests(part: str, out: Path) -> Report:
    """pytest in a process of its own, with settings that need none of its plugins."""
    begun = time.monotonic()
    settings = ROOT / "scripts" / "gpu_pytest.ini"
    command = [sys.executable, "-m", "pytest", "-c", str(settings), "--rootdir", str(ROOT), "-q", "--maxfail=30", *TESTS[part]]
    with open(out / f"{part}_tests.log", "w") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=520, check=False)
    lines = (out / f"{part}_tests.log").read_text().splitlines()
    print("\n".join(lines[-40:]), flush=True)
    return {"exit_code": done.returncode, "summary": lines[-1] if lines else "", "seconds": round(time.monotonic() - begun)}


def bench(args: argparse.Namespace) -> Report:
    import gpu_bench
    import torch

    from kernels.ops import get_ops

    place = gpu_bench.Bench(torch.device(args.device), small=args.small)
    if args.device == "cpu":
        from kernels.triton.ops import make_ops

        ops = make_ops(place.device)
    else:
        ops = get_ops("cuda")
    limits = gpu_bench.limits(place)
    print(limits, flush=True)
    return {"limits": limits, "kernels": gpu_bench.kernels(place, ops)}


def write(report: Report, out: Path, part: str) -> None:
    import gpu_report

    (out / f"gpu_check_{part}.json").write_text(json.dumps(report, indent=1) + "\n")
    text = gpu_report.markdown(report)
    (out / f"gpu_check_{part}.md").write_text(text)
    if report.get("kernels"):
        (out / f"gpu_check_{part}.svg").write_text(gpu_report.roofline(report))
    print(text)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
