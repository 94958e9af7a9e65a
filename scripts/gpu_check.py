"""The GPU path on this machine's card: tests, then benchmarks against what the card can do; a report as Markdown and JSON.

    scripts/gpu_check                         everything
    scripts/gpu_check --part kernels          tests of the kernels against the reference, on the card
    scripts/gpu_check --part engine           tests of the engine on the card, then a 1B and an 8B model end to end
    scripts/gpu_check --part models           these models without the tests
    scripts/gpu_check --part bench            kernels against cuBLAS, others' 4-bit kernels, SDPA and the card's own limits
    scripts/gpu_check --small --device cpu    try the benchmarks themselves without a card, in Triton's interpreter

After eight minutes (the start is in the first part's) a part begins nothing new, the report says what is missing. All that uses
the card is in processes of its own: what crashes, hangs or loses the card is told, and the rest goes on. The report is written as
it grows: gpu_check_PART.md, .json, .svg (roofline) and .log (what processes printed that failed; tests in which a process ended
are in it once more, a launch at a time and under compute-sanitizer). The exit code is 1 if a test fails or is cut off.
Needed: torch, triton, safetensors, tokenizers, numpy, psutil and pytest. gemlite is compared with where it is installed.
On a virtual machine whose memory grows as it is used APPLIANCE_RAM=128GiB says how much that may be: engines plan with it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_report
import gpu_tests
from gpu_children import SILENT_S, Child, own_folders, run

MINUTES = 8.0  # of a part
TESTS_SHARE = 0.4  # of a part's time for its tests, where something is measured after them
START_S = 120.0  # until a model of 8B is made, loaded and warmed up, at most, where it has not been measured
LOAD_S = 300.0  # without a word while a model is made and loaded, at most: kernels that are compiled are words
FIRST_S = 150.0  # until torch is read from a disk that nobody has read before, and a card says what it is
Report = dict[str, Any]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("all", "kernels", "engine", "models", "bench"), default="all")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_check_out")), help="folder for the report")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for the interpreter")
    parser.add_argument("--models", default="1b,8b", help="random checkpoints for the engine: 1b, 8b")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which a part begins nothing new")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, begun = parse(argv), time.monotonic()
    own_folders()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        check = Check(args, Path(folder), "scripts/gpu_check " + " ".join(argv or sys.argv[1:]))
        answers = check.machine(begun + FIRST_S)
        for part in ("kernels", "bench", "engine") if answers else ():
            if args.part in ("all", part) and (part == "bench" or args.device == "cuda"):
                check.part(part, begun)
                begun = time.monotonic()
        if args.part == "models" and answers:
            check.models(begun + 60 * args.minutes)
    print(gpu_report.markdown(check.report), flush=True)
    return int(check.failed or not answers)


class Check:
    """What has been found so far; written whenever there is more."""

    def __init__(self, args: argparse.Namespace, folder: Path, command: str) -> None:
        """``folder``: for what need not stay."""
        self.args, self.folder, self.failed, self.log = args, folder, False, ""
        self.report: Report = {"machine": {}, "command": command, "errors": [], "left_out": []}

    def part(self, part: str, begun: float) -> None:
        seconds = 60 * self.args.minutes
        if part in gpu_tests.TESTS:
            deadline, before = begun + seconds * (1.0 if part == "kernels" else TESTS_SHARE), self.log

            def seen(found: Report, log: str) -> None:
                self.report[f"{part}_tests"], self.log = found, before + log
                self.failed |= found["exit_code"] != 0
                self.write()

            seen(*gpu_tests.run(part, self.folder, deadline, seen))
        if part == "bench":
            self.bench(begun + seconds)
        elif part == "engine":
            self.models(begun + seconds)

    def machine(self, deadline: float) -> bool:
        """Whether there is a device that says what it is."""
        for row in self.child("machine", deadline):
            self.report["machine"] |= row
        self.write()
        return bool(self.report["machine"])

    def limits(self, deadline: float) -> None:
        """Asked once. What could not be measured is absent."""
        if "limits" in self.report:
            return
        found: Report = {}
        for row in self.child("limits", deadline):
            found |= row
        self.report |= {"bus": found.pop("bus", None), "limits": found}
        print(found, flush=True)
        self.write()

    def bench(self, deadline: float) -> None:
        from gpu_case import cases

        self.limits(deadline)
        bfloat = float(self.report["machine"].get("capability", 0)) >= 8
        self.report["kernels"] = []
        for name in cases(self.args.small, bfloat):
            before = list(self.report["kernels"])
            self.child(name, deadline, lambda rows, before=before: self.report.update(kernels=before + rows))
        self.write()

    def models(self, deadline: float) -> None:
        from gpu_engine import labels, predicted

        self.limits(deadline)
        link, found, starts = self.report["bus"], [], {}
        for label in labels(self.args.models.split(","), self.args.device == "cuda"):
            name = label.partition(" ")[0]
            if time.monotonic() + starts.get(name, START_S) > deadline:
                self.report["left_out"].append(f"engine: {label}")
                continue
            rows = self.child(f"engine: {label}", deadline)
            found += [row | (predicted(row, found, link) if link else {}) for row in rows]
            if rows:  # compiled kernels are on disk from now on
                starts[name] = 1.5 * rows[0]["ready_s"] + 15
            self.report["engine"] = found
            self.write()

    def child(self, name: str, deadline: float, seen: Any = None) -> list[Report]:
        """Rows that a process of its own found; ``seen`` is told them meanwhile. Errors and what is left out go to the report."""
        if time.monotonic() >= deadline:
            self.report["left_out"].append(name)
            return []
        options = ["--device", self.args.device, "--folder", str(self.folder)] + ["--small"] * self.args.small
        seconds = str(deadline - time.monotonic())
        program = [sys.executable, str(Path(__file__).with_name("gpu_case.py")), name, *options, "--seconds", seconds]
        child = Child(name, program, self.folder, silent=LOAD_S if name.startswith("engine") else SILENT_S)

        def look() -> list[Report]:
            rows = child.of("row")
            if seen is not None:
                seen(rows)
                self.write()
            return rows

        run(child, deadline, look)
        rows = look()
        errors = child.of("error") + [f"{name}: {fault}" for fault in child.faults]
        self.report["errors"] += errors
        self.report["left_out"] += child.of("left_out")
        compiled = [note["seconds"] for note in child.notes if "compiled" in note]
        if compiled:
            self.report.setdefault("compiled", {})[name] = {"kernels": len(compiled), "seconds": round(sum(compiled))}
        if errors:
            self.log += f"=== {name}\n{child.output}\n"
            print(*errors, *child.output.splitlines()[-20:], sep="\n  ", flush=True)
        print(f"{name}: {len(rows)} rows", flush=True)
        self.write()
        return rows

    def write(self) -> None:
        where = self.args.out / f"gpu_check_{self.args.part}"
        where.with_suffix(".json").write_text(json.dumps(self.report, indent=1) + "\n")
        where.with_suffix(".md").write_text(gpu_report.markdown(self.report))
        if gpu_report.measured(self.report):
            where.with_suffix(".svg").write_text(gpu_report.roofline(self.report))
        if self.log:
            where.with_suffix(".log").write_bytes(self.log.encode()[-12_000_000:])


if __name__ == "__main__":
    sys.exit(main())
