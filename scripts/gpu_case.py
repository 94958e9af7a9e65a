"""A process of scripts/gpu_check that uses the card: measures one of ``cases``, the card's limits or an engine, and notes it.

gpu_case.py NAME --device cuda --seconds 400 [--small] [--folder DIR]
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_attention import KINDS, decode, prefill
from gpu_bench import Bench, limits, products, rounded, words_of
from gpu_children import SILENT_S, own_folders
from gpu_experts import experts
from gpu_small import kernels

from appliance.memory.devices import this_device

Row = dict[str, Any]
Case = Callable[[Bench, Any], Iterator[Row]]
ROWS, FEW = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096), (1, 16, 128, 4096)
CONTEXTS = ((1, 4096), (1, 32768), (8, 4096), (32, 1024), (32, 4096), (128, 1024))
PROMPTS = ((1, 2048, 2048), (1, 8192, 8192), (1, 8192, 512), (8, 1024, 1024))
HALF, BFLOAT = torch.float16, torch.bfloat16


def cases(small: bool, bfloat: bool) -> dict[str, Case]:
    """By name, what matters most first; on a card that computes in ``bfloat`` mostly in that."""
    if small:
        return {
            "products": lambda bench, ops: products(bench, ops, HALF, (1, 70)),
            "rounded": lambda bench, ops: rounded(bench, ops, HALF, (3,)),
            "decode": lambda bench, ops: decodes(bench, ops, HALF, ((1, 40), (2, 33)), ((2, 33),)),
            "prefill": lambda bench, ops: prefills(bench, ops, HALF, ((1, 20, 20), (1, 40, 7)), ((1, 20, 20),)),
            "experts": lambda bench, ops: experts(bench, ops, HALF, (1, 3)),
            "small kernels": lambda bench, ops: kernels(bench, ops, HALF),
        }
    main = BFLOAT if bfloat else HALF
    found: dict[str, Case] = {
        "products": lambda bench, ops: products(bench, ops, main, ROWS),
        "decode": lambda bench, ops: decodes(bench, ops, main, CONTEXTS, CONTEXTS[::2]),
        "prefill": lambda bench, ops: prefills(bench, ops, main, PROMPTS, PROMPTS[:1]),
        "experts": lambda bench, ops: experts(bench, ops, main, (1, 16, 128, 2048)),
        "small kernels": lambda bench, ops: kernels(bench, ops, main),
        "rounded": lambda bench, ops: rounded(bench, ops, main, FEW),
    }
    if bfloat:
        found |= {
            "products in float16": lambda bench, ops: products(bench, ops, HALF, ROWS),
            "decode in float16": lambda bench, ops: decode(bench, ops, HALF, CONTEXTS[::2]),
            "prefill in float16": lambda bench, ops: prefill(bench, ops, HALF, PROMPTS[:1]),
        }
    return found


def decodes(bench: Bench, ops: Any, dtype: torch.dtype, cases: Sequence[Any], of_gemma: Sequence[Any]) -> Iterator[Row]:
    yield from decode(bench, ops, dtype, cases, KINDS)
    yield from decode(bench, ops, dtype, of_gemma, gemma=True)


def prefills(bench: Bench, ops: Any, dtype: torch.dtype, cases: Sequence[Any], of_gemma: Sequence[Any]) -> Iterator[Row]:
    yield from prefill(bench, ops, dtype, cases)
    yield from prefill(bench, ops, dtype, of_gemma, gemma=True)


def machine(device: str) -> Row:
    import triton

    facts: Row = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts |= {
            "card": card.name,
            "multiprocessors": card.multi_processor_count,
            "memory_gib": round(card.total_memory / 2**30, 1),
        }
        facts["capability"] = f"{card.major}.{card.minor}"
        host = this_device("cpu")
        facts |= {"cuda": torch.version.cuda, "free_gib": round(torch.cuda.mem_get_info()[0] / 2**30, 1), "cpus": os.cpu_count()}
        facts |= {"host_gib": round(host.total / 2**30, 1), "host_available_gib": round(host.available / 2**30, 1)}
        facts |= driver()
    return facts


def driver() -> Row:
    """What nvidia-smi tells of the first card; nothing where there is none."""
    names = ("driver_version", "compute_mode", "ecc.mode.current", "mig.mode.current", "power.limit", "clocks.max.sm")
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in answer.split(",")]
    return {name: value for name, value in zip(names, values, strict=False) if not value.startswith("[")}


def found(name: str, bench: Bench, folder: Path) -> Iterator[Row]:
    if name == "machine":
        yield machine(bench.device.type)
    elif name == "limits":
        import gpu_engine

        yield from limits(bench)
        yield from bench.rows([("bus", lambda: {"bus": gpu_engine.bus(bench)})])
    elif name.startswith("engine: "):
        import gpu_engine

        yield from gpu_engine.run(name.removeprefix("engine: "), folder, bench)
    else:
        from kernels.triton.ops import make_ops

        bfloat = bench.card and torch.cuda.get_device_capability()[0] >= 8
        yield from cases(bench.small, bfloat)[name](bench, make_ops(bench.device))


def main() -> None:
    parser = argparse.ArgumentParser(prog="gpu_case", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for the interpreter")
    parser.add_argument("--seconds", type=float, default=400.0, help="after which nothing new begins")
    parser.add_argument("--folder", type=Path, default=Path("."), help="for checkpoints")
    args = parser.parse_args()
    bench = Bench(torch.device(args.device), small=args.small, deadline=time.monotonic() + args.seconds)
    own_folders()
    if not bench.card:
        from tests.kernels.triton.interpreter import hasten

        hasten()
    bench.notebook.compilations()
    faulthandler.enable()
    faulthandler.dump_traceback_later(SILENT_S - 10, repeat=True)  # where it is, should it hang
    try:
        for row in found(args.name, bench, args.folder):
            bench.notebook(row=row)
            print(row, flush=True)
    except Exception as error:
        bench.notebook(error=f"{args.name}: {words_of(error)}")
        raise


if __name__ == "__main__":
    main()
