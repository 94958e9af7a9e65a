"""A mixture of experts, with the sizes of Qwen3-30B-A3B in 4 bits, against the bytes of the experts that its tokens choose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial

import torch
from gpu_bench import Bench, Row, random_weight, words
from torch import Tensor

from kernels.mixture import route
from kernels.ops import MLP, Mixture, Norm, Ops

Sizes = tuple[int, int, int, int]
QWEN3_30B: Sizes = (2048, 768, 128, 8)  # hidden, intermediate, experts, of which a token goes to so many
SMALL: Sizes = (128, 128, 4, 2)


def experts(bench: Bench, ops: Ops, dtype: torch.dtype, rows: Sequence[int]) -> Iterator[Row]:
    """Norm, router, choice and both products; tokens are random, and other ones each time, so that they choose other experts."""
    hidden, inner, count, active = SMALL if bench.small else QWEN3_30B

    @cache
    def mixture() -> Mixture:
        def one() -> MLP:
            gate_up, down = (random_weight(N, K, 4, bench.device) for N, K in ((2 * inner, hidden), (hidden, inner)))
            packed = ops.pack(gate_up, dtype=dtype, gated=True, activation="bf16")
            return MLP((packed,), ops.pack(down, dtype=dtype, activation="bf16"))

        assert ops.join_experts is not None
        joined = ops.join_experts((one() for _ in range(count)), count)
        return Mixture(ops.pack(torch.randn(count, hidden, device=bench.device), dtype=dtype), joined, active, True)

    def layer(tokens: int) -> Row:
        made, norm = mixture(), Norm(torch.ones(hidden, device=bench.device, dtype=dtype), 1e-6)
        items = [torch.randn(tokens, hidden, device=bench.device).to(dtype) for _ in range(1 if bench.small else 16)]

        def chosen(x: Tensor) -> int:
            logits = torch.empty(tokens, count, device=bench.device)
            return len(route(ops.matmul(x, made.router, norm=norm, out=logits), active, True)[0].unique())

        read = sum(map(chosen, items)) / len(items) / count
        each, per_token = sum(weight.nbytes for weight in made.experts[0].weights), 2 * active * 3 * hidden * inner
        return {
            "op": f"mixture of {count} experts, 4 bits",
            "rows": tokens,
            "dtype": words(dtype),
            "small": True,
            "ours_s": bench.time(lambda x: ops.mix(x, made, norm=norm), items),
            "bytes": round(read * each) + made.router.nbytes,
            "ops": tokens * per_token,
        }

    yield from bench.rows((f"mixture of experts, {m} rows, {words(dtype)}", partial(layer, m)) for m in rows)
