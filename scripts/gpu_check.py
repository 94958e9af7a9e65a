"""The GPU path on this machine's card: tests, then benchmarks against what the card can do; a report as Markdown and JSON.

    scripts/gpu_check                         everything
    scripts/gpu_check --part kernels          tests of the kernels against the reference, on the card
    scripts/gpu_check --part engine           tests of the engine on the card, then a 1B and an 8B model end to end
    scripts/gpu_check --part bench            kernels against cuBLAS, others' 4-bit kernels, SDPA and the card's own limits
    scripts/gpu_check --small --device cpu    try the benchmarks themselves without a card, in Triton's interpreter

After eight minutes a part begins nothing new, the report says what is missing. The exit code is 1 if a test fails or is cut off.
Needed: torch, triton, safetensors, tokenizers, numpy, psutil and pytest. gemlite is compared with where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = {"kernels": ["tests/kernels/triton/test_*.py"], "engine": ["tests/runtime/test_cuda.py"]}
WITHOUT_A_CARD = ("compilations", "kernel_report", "emulated")  # tests that need none, and run in every change's checks
MINUTES, GRACE = 8.0, 40.0  # of a part, and seconds for what has begun
AT_ONCE = max(2, min(8, (os.cpu_count() or 4) // 2))  # test files, each in a process: most of their time is compilation
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
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which a part begins nothing new")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    report: Report = {"machine": machine(args.device), "command": "scripts/gpu_check " + " ".join(argv or sys.argv[1:])}
    failed = False
    for part in ("kernels", "bench", "engine"):
        if args.part not in ("all", part) or (part != "bench" and args.device != "cuda"):
            continue
        deadline = time.monotonic() + 60 * args.minutes
        if part in TESTS:
            report[f"{part}_tests"] = run_tests(part, args.out, deadline)
            failed |= report[f"{part}_tests"]["exit_code"] != 0
        if part != "kernels":
            report.setdefault("left_out", []).extend(measure(part, args, report, deadline))
        write(report, args.out, args.part)
    print(markdown(report), flush=True)
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


def found(part: str) -> list[Path]:
    return sorted(path for pattern in TESTS[part] for path in ROOT.glob(pattern))


def run_tests(part: str, out: Path, deadline: float) -> Report:
    """pytest, a process for each file, with settings that need none of its plugins."""
    begun = time.monotonic()
    waiting = [path for path in found(part) if not any(name in path.name for name in WITHOUT_A_CARD)]
    running: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
    ended: dict[str, tuple[int, str]] = {}
    while waiting or running:
        late = time.monotonic() - deadline
        if late > 0:
            ended |= {path.name: (1, "not begun") for path in waiting}
            waiting = []
        while waiting and len(running) < AT_ONCE:
            path = waiting.pop(0)
            log = out / f"{path.stem}.log"
            with open(log, "wb") as file:
                process = subprocess.Popen(pytest_command(path), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
            running[path.name] = process, log
        for name, (process, log) in list(running.items()):
            if late > GRACE:
                process.kill()
            if process.poll() is not None or late > GRACE:
                lines = log.read_text().splitlines()
                ended[name] = (process.wait(), lines[-1] if lines and late <= GRACE else "cut off")
                print(f"{name}: {ended[name][1]}", *(lines[-40:-1] if ended[name][0] else ()), sep="\n  ", flush=True)
                del running[name]
        time.sleep(0.1)
    wrong = {name: told for name, (code, told) in ended.items() if code not in (0, 5)}
    return {
        "exit_code": int(bool(wrong)),
        "summary": f"{len(ended) - len(wrong)} of {len(ended)} files pass",
        "wrong": wrong,
        "files": {name: told for name, (_, told) in sorted(ended.items())},
        "seconds": round(time.monotonic() - begun),
    }


def pytest_command(path: Path) -> list[str]:
    """Without hypothesis, which no test here draws from, also without what all tests of the project share and needs it."""
    settings = ["-c", str(ROOT / "scripts" / "gpu_pytest.ini"), "--rootdir", str(ROOT), "-q", "--maxfail=30"]
    if importlib.util.find_spec("hypothesis") is None:
        settings += ["--confcutdir", str(path.parent), "-m", "not realdata"]
    return [sys.executable, "-m", "pytest", *settings, str(path)]


def measure(part: str, args: argparse.Namespace, report: Report, deadline: float) -> list[str]:
    """Adds a part's figures to the report; what there was no time for."""
    import gpu_bench
    import torch

    from kernels.triton.ops import make_ops

    place = gpu_bench.Bench(torch.device(args.device), small=args.small, deadline=deadline)
    if "limits" not in report:
        report["limits"] = gpu_bench.limits(place)
        print(report["limits"], flush=True)
    if part == "engine":
        import gpu_engine

        report["engine"] = gpu_engine.run(args.models.split(","), args.out, place)
    else:
        rows = report["kernels"] = []
        for case in cases(place, make_ops(place.device)):
            try:
                for row in case:
                    rows.append(row)
                    print(row, flush=True)
            except Exception as error:  # the report must say what worked
                report.setdefault("errors", []).append(f"{case.__name__}: {type(error).__name__}: {error}")
                print(report["errors"][-1], flush=True)
    return place.left_out


def cases(place: Any, ops: Any) -> list[Generator[Report]]:
    """Everything that is measured of the kernels, what matters most first."""
    import torch
    from gpu_attention import KINDS, decode, prefill
    from gpu_bench import products, rounded
    from gpu_small import kernels

    half = torch.float16
    if place.small:
        return [
            products(place, ops, half, (1, 70)),
            rounded(place, ops, half, (3,)),
            decode(place, ops, half, ((1, 40), (2, 33)), KINDS),
            prefill(place, ops, half, ((1, 20, 20), (1, 40, 7))),
            kernels(place, ops, half),
        ]
    rows, few = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096), (1, 16, 128, 4096)
    contexts = ((1, 4096), (1, 32768), (8, 4096), (32, 1024), (32, 4096), (128, 1024))
    prompts = ((1, 2048, 2048), (1, 8192, 8192), (1, 8192, 512), (8, 1024, 1024))
    main = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else half
    found = [
        products(place, ops, main, rows),
        decode(place, ops, main, contexts, KINDS),
        prefill(place, ops, main, prompts),
    ]
    found += [kernels(place, ops, main), rounded(place, ops, main, few)]
    if main != half:
        found += [
            products(place, ops, half, rows),
            decode(place, ops, half, contexts[::2]),
            prefill(place, ops, half, prompts[:1]),
        ]
    return found


def write(report: Report, out: Path, part: str) -> None:
    import gpu_report

    (out / f"gpu_check_{part}.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / f"gpu_check_{part}.md").write_text(markdown(report))
    if gpu_report.points(report):
        (out / f"gpu_check_{part}.svg").write_text(gpu_report.roofline(report))


def markdown(report: Report) -> str:
    import gpu_report

    return gpu_report.markdown(report)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
