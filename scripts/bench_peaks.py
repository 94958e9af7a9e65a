"""The limits of this machine, with as many threads as the engines get: what their figures are fractions of.

Memory reads and peak multiply-adds come from bench_peaks.c (compiled for this processor; absent where there is no C compiler),
"torch" figures from large products of torch's own, which is what a good library reaches.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("bench_peaks.c")
BYTES = 2**29  # a thread reads this much: far more than caches hold
KINDS = {"fma_f32": "float32", "dot_bf16": "bfloat16", "dot_int8": "int8", "dot_int8_amx": "int8 (AMX)"}
ROUNDS = {"dot_int8_amx": 1_000_000}  # a tile takes 16 cycles


def limits(threads: int) -> dict[str, object]:
    """{"memory_read_gb_s", "tops": {kind: 10^12 operations a second}, "torch_tops": {dtype: ...}, "how"}."""
    library = build()
    tops = {} if library is None else arithmetic(library, threads)
    dtypes = (torch.float32, torch.bfloat16, torch.int8)
    return {
        "memory_read_gb_s": read_limit(library, threads),
        "tops": {kind: round(rate, 3) for kind, rate in tops.items()},
        "torch_tops": {str(t).removeprefix("torch."): round(gemm(t, threads), 3) for t in dtypes},
        "how": "torch's sum over 1 GiB; no C compiler for the rest" if library is None else "scripts/bench_peaks.c, best of 5",
        "threads": threads,
    }


def read_limit(library: ctypes.CDLL | None, threads: int) -> float:
    """GB/s that all threads read from memory together."""
    return round(torch_read(threads) if library is None else memory_read(library, threads), 1)


def build() -> ctypes.CDLL | None:
    """The routines compiled for this very processor; None without a compiler that takes them."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "peaks.so"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(target), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"the limits of arithmetic are not measured: {compiler} says {done.stderr.strip().splitlines()[:1]}")
            return None
        return ctypes.CDLL(str(target))


def best_s(threads: int, work: Callable[[int], object], repeat: int = 5) -> float:
    """Seconds from the first start until all threads have done ``work(i)``, each on a core of its own; the best of ``repeat``."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    best = float("inf")
    for _ in range(repeat):
        gate, spans = threading.Barrier(threads), [(0.0, 0.0)] * threads

        def one(i: int, gate: threading.Barrier = gate, spans: list[tuple[float, float]] = spans) -> None:
            if len(cores) >= threads:
                os.sched_setaffinity(0, {cores[i]})  # of this thread alone
            gate.wait()
            begun = time.perf_counter()
            work(i)
            spans[i] = begun, time.perf_counter()

        team = [threading.Thread(target=one, args=(i,)) for i in range(threads)]
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()
        best = min(best, max(end for _, end in spans) - min(begun for begun, _ in spans))
    return best


def memory_read(library: ctypes.CDLL, threads: int) -> float:
    """GB/s of all threads together, each reading a part of its own."""
    library.read_words.restype, library.read_words.argtypes = ctypes.c_uint64, [ctypes.c_void_p, ctypes.c_int64]
    data = torch.ones(threads * BYTES, dtype=torch.uint8)
    took = best_s(threads, lambda i: library.read_words(data.data_ptr() + i * BYTES, BYTES))
    return threads * BYTES / took / 1e9


def arithmetic(library: ctypes.CDLL, threads: int) -> dict[str, float]:
    """10^12 operations a second of all threads together, for each kind of multiply-add this processor has."""
    found = {}
    for symbol, kind in KINDS.items():
        if not hasattr(library, symbol) or (symbol.endswith("amx") and library.amx_permission()):
            continue
        routine = getattr(library, symbol)
        routine.restype, routine.argtypes = ctypes.c_double, [ctypes.c_int64]
        rounds = ROUNDS.get(symbol, 40_000_000)
        done = [0.0] * threads

        def work(i: int, routine: Callable[[int], float] = routine, done: list[float] = done, rounds: int = rounds) -> None:
            done[i] = routine(rounds)

        took = best_s(threads, work)
        found[kind] = sum(done) / took / 1e12
    return found


def torch_read(threads: int) -> float:
    torch.set_num_threads(threads)
    data = torch.ones(2**28)
    return data.nbytes / fastest(data.sum) / 1e9


def gemm(dtype: torch.dtype, threads: int, size: int = 2048) -> float:
    """10^12 operations a second of a square product."""
    torch.set_num_threads(threads)
    if dtype == torch.int8:
        a = torch.randint(-128, 128, (size, size), dtype=dtype)
        return 2 * size**3 / fastest(lambda: torch._int_mm(a, a)) / 1e12
    x = torch.randn(size, size).to(dtype)
    return 2 * size**3 / fastest(lambda: x @ x) / 1e12


def fastest(call: Callable[[], object], repeat: int = 5) -> float:
    times = []
    for _ in range(repeat):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)
