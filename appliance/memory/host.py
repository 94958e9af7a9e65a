"""The host's side of a plan for a card: what swapping, grammars, streaming, staging and loading take of its memory. No torch.

On a CPU all this is the same memory, and comes out of the one budget.
"""

from __future__ import annotations

from appliance.memory.devices import MIB
from appliance.memory.offload import Offload
from kernels.layout import pinned, pinned_slots

RUNTIME = 2048 * MIB
"""The process with CUDA in it: torch's libraries, Triton's compiler, the driver's own copies of kernels. An estimate: it has not
been measured on a card."""


def host_parts(
    *, swap: tuple[int, int], ghosts: int, inputs: int, sequences: int, offload: Offload, grammars: int
) -> dict[str, int]:
    """Bytes by part: what lies there from "ready" on. Inputs of a step and its answers are there twice.

    ``swap``: blocks, and bytes of each. ``ghosts``: bytes that are remembered of blocks that left the cache, for them.
    """
    blocks, size = swap
    return {
        "runtime": RUNTIME,
        "swap space": sum(pinned(count * size) for count in pinned_slots(blocks, size)),
        "what left the cache": ghosts,
        "grammars": grammars,
        "streamed weights": offload.host_bytes,
        "staging": 2 * pinned(inputs) + 2 * pinned(8 * sequences),
    }


def loading_peak(parts: dict[str, int], transient: int) -> int:
    """The most while weights are loaded: swap space, staging and grammars come after that."""
    return parts["runtime"] + parts["streamed weights"] + transient
