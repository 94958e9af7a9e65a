"""What decode steps that are recorded as CUDA graphs take of a card: pure arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LAYER_BYTES = 400 << 10
"""What the driver keeps of one decoder layer in one recorded step. An estimate until it has been measured: others report 6 MiB a
step for models of 16 layers, and 13 to 15 MiB for 32."""
POOL_BYTES = 32 << 20
"""What the recorded steps' own pool of memory takes beside what lies in it: whole segments, and the workspace of torch's dense
products. An estimate until it has been measured."""
_ROUNDING = 512  # bytes: torch's allocator gives multiples


def capture_sizes(most: int) -> tuple[int, ...]:
    """Batch sizes up to ``most`` sequences: 1, 2, 4, steps of 8 to 128, then of 16; little of a large batch is padding."""
    sizes = [1, 2, 4, *range(8, 129, 8), *range(144, most + 16, 16)]
    return tuple(sorted({min(size, most) for size in sizes}))


def graph_bytes(
    sizes: Sequence[int],
    *,
    layers: int,
    token_bytes: int,
    slab: int,
    hidden_bytes: int,
    block_bytes: int,
    sequence_bytes: int = 0,
    layer_bytes: int | None = None,
) -> dict[str, int]:
    """By part, for steps of so many sequences; empty for none.

    All share one pool of memory, as no two run at a time: it holds the activations (``token_bytes`` a sequence) and the partial
    sums (``slab``) of the largest, and each step's result (``hidden_bytes`` a sequence), which the next one must not overwrite
    while it is recorded. What fills a step up lies in a block of its own, and has states (``sequence_bytes``). ``layer_bytes``:
    what the driver has kept of a layer in a step before; the estimate counts where that is more.
    """
    if not sizes:
        return {}
    return {
        "activations": max(sizes) * token_bytes + slab,
        "results": sum(-(-size * hidden_bytes // _ROUNDING) * _ROUNDING for size in sizes),
        "steps": len(sizes) * layers * max(LAYER_BYTES, layer_bytes or 0),
        "pool": POOL_BYTES,
        "spare_block": block_bytes,
        **({"spare_states": sequence_bytes} if sequence_bytes else {}),
    }


def measured_layer(parts: Mapping[str, int], taken: int, *, sizes: int, layers: int) -> int:
    """What the driver kept of a layer in a step, where recording so many sizes took ``taken`` bytes of a card, and ``parts`` were
    planned: what is neither of the other parts. (The spare block was there before.)"""
    others = sum(parts.get(name, 0) for name in ("activations", "results", "pool"))
    return max(0, -(-(taken - others) // (sizes * layers)))
