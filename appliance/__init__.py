"""A local server, and a Python API, for quantized language models."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from appliance.version import __version__

# torch's CPU allocator reads this once, when it is imported: huge pages for large tensors. The KV cache is touched as a whole at
# start, and page by page that takes several times as long (2 GiB: 0.7 to 1.0 s against 0.1 to 0.5 s, two cores).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from appliance.core.params import (
        BeamSearchParams,
        PoolingParams,
        RepetitionDetectionParams,
        SamplingParams,
        StructuredOutputsParams,
    )
    from appliance.llm import LLM
    from appliance.lora import LoRARequest

__all__ = [
    "LLM",
    "BeamSearchParams",
    "LoRARequest",
    "PoolingParams",
    "RepetitionDetectionParams",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import on first use: ``import appliance`` alone must not cost the seconds that torch takes."""
    if name == "LLM":
        from appliance.llm import LLM

        return LLM
    if name == "LoRARequest":
        from appliance.lora import LoRARequest

        return LoRARequest
    if name in __all__ and name.endswith("Params"):
        from appliance.core import params

        return getattr(params, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
