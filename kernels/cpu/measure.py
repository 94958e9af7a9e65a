"""Times the CPU's products: the table in docs/benchmarks/cpu-torch-ops.md, and the ground for FEW_ROWS.

python -m kernels.cpu.measure [--threads 2]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kernels.cpu.weights import CpuWeight, NibbleWeight, matmul, pack
from quant.tensor import QuantTensor

SHAPES = ((2048, 8192), (2048, 2048))  # N, K
ROWS = (1, 4, 8, 16, 32, 64, 96, 128, 256, 512)
ALWAYS = 1 << 30


def best(run: Callable[[], Tensor], repeats: int) -> float:
    """Milliseconds of the fastest of some runs, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return 1e3 * min(times[1:])


def weights(N: int, K: int) -> dict[str, CpuWeight]:
    """The columns of the table."""

    def integers(bits: int, group: int, activation: str | None = None) -> QuantTensor:
        values = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
        scales = torch.rand(K // group, N).half()
        return QuantTensor.from_values(values, scales=scales, bits=bits, group_size=group, activation=activation)

    dtype, found = torch.bfloat16, {}
    for bits in (4, 8):
        packed = pack(integers(bits, 128), dtype=dtype)
        assert isinstance(packed, NibbleWeight)
        if packed.few_rows:
            found[f"{bits}-bit, int4 kernel"] = replace(packed, few_rows=ALWAYS)
        found[f"{bits}-bit, expanded"] = replace(packed, few_rows=0)
    fp8 = QuantTensor(torch.randn(N, K).to(torch.float8_e4m3fn), torch.rand(1, N), None, None, 8, K, K, N)
    return found | {
        "W8A8": pack(integers(8, K, "int8-token"), dtype=dtype),
        "FP8": pack(fp8, dtype=dtype),
        "dense": pack(torch.randn(N, K), dtype=dtype),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads; milliseconds, bfloat16")
    for N, K in SHAPES:
        columns = weights(N, K)
        print(f"\n| {N}x{K}, rows | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
        for rows in ROWS:
            x = torch.randn(rows, K, dtype=torch.bfloat16)
            with torch.inference_mode():
                times = [best(lambda w=w, x=x: matmul(x, w), 7 if rows < 64 else 3) for w in columns.values()]  # type: ignore[misc]
            print(f"| {rows} | " + " | ".join(f"{t:.2f}" for t in times) + " |", flush=True)


if __name__ == "__main__":
    main()
