"""The search for a product's best launch: what is tried, in which order, and how it is timed and checked (see tune.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

NEEDED = ("block_m", "block_n", "split", "warps", "stages")
BETTER = 0.98
TOLERANCE = {"fp16": 2e-3, "bf16": 2e-2}  # of the largest result: sums in another order; slabs are rounded once more
Say = Callable[[str], None]


@dataclass(frozen=True, order=True)
class Shape:
    """A product of a model."""

    outputs: int
    inputs: int
    bits: int
    gated: bool
    dtype: str  # fp16 or bf16

    @property
    def kind(self) -> str:
        return f"w{self.bits} {self.dtype}"


class Tuner:
    """Measures shapes one after another on a card."""

    def __init__(self, device: str, *, small: bool, half: bool, say: Say) -> None:
        import gpu_bench
        import torch

        from kernels.triton.ops import this_card

        self.bench = gpu_bench.Bench(torch.device(device), small=small)
        self.card = this_card(self.bench.device)._replace(name="")  # the rule, not a table
        self.small, self.half, self.say = small, half, say

    def shape(self, shape: Shape, rows: list[int]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(number of rows, the table's entry) of a shape, one after another."""
        import gpu_bench
        import torch

        from kernels.triton.weights import pack

        dtype = torch.float16 if shape.dtype == "fp16" else torch.bfloat16
        count = self.bench.copies(shape.outputs * shape.inputs * shape.bits // 8)
        weights = [
            pack(
                gpu_bench.random_weight(shape.outputs, shape.inputs, shape.bits, self.bench.device),
                dtype=dtype,
                gated=shape.gated,
            )
            for _ in range(count)
        ]
        yield from ((str(m), self.rows(shape, m, weights, dtype)) for m in rows)

    def rows(self, shape: Shape, rows: int, weights: list[Any], dtype: Any) -> dict[str, Any]:
        import torch

        from kernels.tune import choose

        x = torch.randn(rows, shape.inputs, device=self.bench.device).to(dtype)
        card = self.card._asdict()
        rule = choose(rows=rows, outputs=shape.outputs, inputs=shape.inputs, kind=shape.kind, **card)
        work = Work(x, weights[0], shape, self.card)
        expected, by_rule = work.result(rule), self.bench.time(work.timed(rule), weights)
        times = {rule: by_rule}

        def measure(candidates: list[Any]) -> None:
            for launch in candidates:
                if launch not in times and work.right(launch, expected):
                    times[launch] = self.bench.time(work.timed(launch), weights)

        measure(first_round(rule, rows, shape, self.card.multiprocessors, small=self.small, half=self.half))
        best = sorted(times, key=lambda launch: times[launch])[: 1 if self.small else 3]
        measure([again for launch in best for again in second_round(launch, rows, shape, small=self.small)])
        winner = min(times, key=lambda launch: times[launch])
        winner = winner if times[winner] < BETTER * by_rule else rule
        self.say(
            f"{shape.kind} {shape.outputs}x{shape.inputs}, {rows} rows: {1e6 * times[winner]:.2f} us, by the rule "
            f"{1e6 * by_rule:.2f}; {len(times)} candidates; {winner}"
        )
        told = {"microseconds": round(1e6 * times[winner], 3), "by_rule_microseconds": round(1e6 * by_rule, 3)}
        return {name: value for name, value in asdict(winner).items() if value or name in NEEDED} | told


def first_round(rule: Any, rows: int, shape: Shape, multiprocessors: int, *, small: bool, half: bool) -> list[Any]:
    """Tiles, warps and loads under way, each with as many parts as fill the card twice."""
    from kernels.tune import GROUP, Launch

    if small:
        return [replace(rule, block_n=64, stages=2)] if not rule.slab else []
    found = [Launch(128, 128, 1, 8, 1, slab=True)] if rows > 64 else []
    for block_m in (16, 32, 64, 128):
        if not (rows <= 2 * block_m or block_m == 128) or (block_m > 16 and rows <= block_m // 2):
            continue
        for block_n in (64, 128):
            for warps in (2, 4, 8):
                if not 8 <= block_m * block_n // (32 * warps) <= 128:  # sums of a thread
                    continue
                tiles = -(-rows // block_m) * -(-shape.outputs // block_n)
                parts = [n for n in splits(rows, shape) if tiles * n <= 4 * multiprocessors]
                group, split = (GROUP, 1) if rows > 64 else (0, max(parts, default=1))
                for stages in (2, 3, 4, 5):
                    found.append(Launch(block_m, block_n, split, warps, stages, group))
    return found + [replace(one, half=True) for one in found if half and one.group and shape.bits == 4]


def second_round(launch: Any, rows: int, shape: Shape, *, small: bool) -> list[Any]:
    """Other numbers of parts, or another order of programs."""
    if launch.slab:
        return [replace(launch, warps=4)]
    if launch.group:
        return [replace(launch, group=group) for group in (1, 4, 16)]
    return [replace(launch, split=split) for split in splits(rows, shape)[: 2 if small else 8]]


def splits(rows: int, shape: Shape) -> list[int]:
    from kernels.layout import TRITON_SPLIT_OUTPUTS, TRITON_SPLIT_ROWS
    from kernels.tune import MAX_SPLIT, TILE

    most = 1 if shape.outputs >= TRITON_SPLIT_OUTPUTS else min(MAX_SPLIT, TRITON_SPLIT_ROWS // rows, shape.inputs // TILE)
    return list(range(1, max(1, most) + 1))


class Work:
    """One product and what takes it up."""

    def __init__(self, x: Any, weight: Any, shape: Shape, card: Any) -> None:
        import torch

        from kernels.triton.norm import MAX_SIZE

        self.x, self.weight, self.shape, self.card = x, weight, shape, card
        self.residual = torch.randn(x.shape[0], weight.N, device=x.device).to(x.dtype)
        self.gain = torch.ones(weight.N, dtype=x.dtype, device=x.device)
        self.joined = not shape.gated and weight.N <= MAX_SIZE

    def timed(self, launch: Any) -> Callable[[Any], Any]:
        """A call for Bench.time."""
        return lambda weight: self.run(weight, launch)

    def run(self, weight: Any, launch: Any) -> Any:
        from kernels.triton import matmul
        from kernels.triton.norm import add_rms_norm

        with launched_as(launch):
            if not self.joined:
                return matmul.matmul(self.x, weight, card=self.card)
            parts = matmul.partial_sums(self.x, weight, card=self.card)
            parts = matmul.matmul(self.x, weight, card=self.card) if parts is None else parts
            return add_rms_norm(parts, self.residual, self.gain, eps=1e-6)[1]

    def result(self, launch: Any) -> Any:
        from kernels.triton.matmul import matmul

        with launched_as(launch):
            out = self.residual.new_full(self.residual.shape, float("nan"))
            return matmul(self.x, self.weight, card=self.card, out=out)

    def right(self, launch: Any, expected: Any) -> bool:
        """Whether a launch fits the card without spills, and gives what is expected."""
        from gpu_children import card_answers
        from triton.errors import TritonError
        from triton.runtime.errors import OutOfResources

        try:
            with compiled() as kernels:
                found = self.result(launch)
        except OutOfResources:
            return False
        except (RuntimeError, TritonError) as error:  # of the compiler, in its passes or behind them
            if not card_answers():
                raise
            print(f"{launch}: {error}", file=sys.stderr)
            return False
        if any(getattr(kernel, "n_spills", 0) for kernel in kernels):
            return False
        error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
        if not float(error) <= TOLERANCE[self.shape.dtype]:
            print(f"wrong by {float(error):.4f}: {self.shape}, {self.x.shape[0]} rows, {launch}", file=sys.stderr)
            return False
        return True


@contextmanager
def launched_as(launch: Any) -> Iterator[None]:
    """Products inside are launched so, whatever their shape."""
    from kernels.triton import matmul

    chosen = matmul.choose
    matmul.choose = lambda **shape: launch
    try:
        yield
    finally:
        matmul.choose = chosen


@contextmanager
def compiled() -> Iterator[list[Any]]:
    """What Triton makes of the kernels that are launched inside."""
    from triton.runtime.jit import JITFunction

    kernels: list[Any] = []
    run = JITFunction.run

    def noted(self: Any, *args: Any, **given: Any) -> Any:
        kernel = run(self, *args, **given)
        kernels.append(kernel)
        return kernel

    JITFunction.run = noted
    try:
        yield kernels
    finally:
        JITFunction.run = run
