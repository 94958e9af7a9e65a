"""An unquantized weight: [N, K] in a float dtype."""

from __future__ import annotations

from torch import Tensor

from quant.formats.common import Source, skip_input_scales
from quant.rules import WeightScheme


def load(source: Source, name: str, scheme: WeightScheme, expect: tuple[int, int] | None = None) -> Tensor:
    """``name``.weight as published: float16, bfloat16 or float32."""
    skip_input_scales(source, name)
    return source.take(f"{name}.weight", dtypes=("F16", "BF16", "F32"), shape=expect or (None, None))
