"""What becomes of gate and up: silu(gate) * up, or gelu(gate) * up in the approximation by tanh.

silu(x) = x / (1 + e^-x), and gelu(x) = x (1 + tanh u) / 2 = x / (1 + e^-2u) for u = sqrt(2 / pi) (x + 0.044715 x^3): no tanh is
needed, and nothing cancels.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gate_mul(gate, up, GELU: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of float32, of any size: where the exponential is infinite the result is 0."""
    if GELU:
        return gate / (1.0 + tl.exp(gate * (gate * gate * -0.07135481627260025 - 1.5957691216057308))) * up
    else:
        return gate / (1.0 + tl.exp(-gate)) * up
