"""Which layers stay in host memory, what that frees and what it costs a step: integers in, integers out, no torch.

kernels/triton/stream.py does it: two buffers on the card, each filled with the layers of its own in turn, ahead of their use. So
a model of L layers of which k are out takes the room of L - k + 2, and each step brings k layers over the bus::

    step = max(what the step takes with all weights on the card, bytes of the k layers / bytes a second of the bus)

The layers that are out lie evenly over the depth: then each copy has the same number of resident layers to hide behind, and
neither the bus nor the card waits for the other more than it must. Two buffers are enough for that: while one is read the other
fills. What a third could hold in advance the bus has to bring all the same; it would even out at most the 15 % below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from appliance.config import GIB
from appliance.memory.modules import UP, Loaded, Machinery, layer_weights
from kernels.layout import STREAM_ALIGN, padded, pinned_pieces
from models.spec import ModelSpec
from quant.scheme import QuantScheme

BUFFERS = 2
STAYING = ("q_b", UP)  # slots of weights that no layer brings
LINK_SHARE = 0.8
"""Of what PCIe carries, copies from pinned memory get so much: 12.5 of 15.8 GB/s (generation 3, 16 lanes), 25 of 31.5 (4). The
rest are the headers of packets. An estimate until it has been measured (scripts/gpu_check does)."""


@dataclass(frozen=True)
class Offload:
    """The layers that are not on the card."""

    layers: tuple[int, ...]  # by number
    bytes_out: int  # of their words and params
    staging_bytes: int  # of the two buffers, on the card
    host_bytes: int  # pinned
    step_bytes: int  # over the bus, a step

    @property
    def saved(self) -> int:
        """Bytes of the card that are free for something else."""
        return self.bytes_out - self.staging_bytes

    def step_seconds(self, compute: float, link: float) -> float:
        """Of a step that takes ``compute`` seconds with all weights on the card, over a bus of ``link`` bytes a second.

        ``link`` is what copies reach: LINK_SHARE of what the bus carries. A simulation of both streams says the same where one of
        the two takes much longer, or an even number of layers divides the depth; else up to 15 % more, with three layers 25 %.
        """
        return max(compute, self.step_bytes / link)


NOTHING = Offload((), 0, 0, 0, 0)


def offloaded(layer_bytes: Sequence[int], gib: float) -> Offload:
    """The fewest layers of which ``saved`` is ``gib`` or more; where there are not enough, those that save most: all of them.

    layer_bytes: what each layer has to bring, first layer first (sums of ``streamed_parts``). More is never less: what is saved
    does not fall with ``gib``, nor does the number of layers.
    """
    if gib <= 0:
        return NOTHING
    choices = _choices(tuple(layer_bytes))
    enough = (choice for choice in choices if choice.saved >= gib * GIB)
    return next(enough, max(choices, key=lambda choice: (choice.saved, len(choice.layers))))


@lru_cache(maxsize=16)
def _choices(layer_bytes: tuple[int, ...]) -> tuple[Offload, ...]:
    """With no layer out, one, two and so on: a plan is made a few hundred times while it is looked for what would fit."""
    return tuple(_spread(layer_bytes, count) for count in range(len(layer_bytes) + 1))


def _spread(layer_bytes: Sequence[int], count: int) -> Offload:
    """So many layers, as evenly as can be: each in the middle of its share of the depth."""
    depth = len(layer_bytes)
    layers = tuple((2 * i + 1) * depth // (2 * count) for i in range(count))
    sizes = [layer_bytes[number] for number in layers]
    rings = [sizes[place::BUFFERS] for place in range(BUFFERS)]
    return Offload(
        layers=layers,
        bytes_out=sum(sizes),
        staging_bytes=min(BUFFERS, count) * max(sizes, default=0),
        host_bytes=sum(sum(pinned_pieces(size)) for size in sizes),
        step_bytes=sum(sum(ring) for ring in rings if len(ring) > 1),  # a layer that has a buffer for itself stays there
    )


def streamed_parts(spec: ModelSpec, scheme: QuantScheme, machinery: Machinery) -> tuple[dict[str, int], ...]:
    """For each layer the bytes that leave the card with it, by part, as kernels/triton/stream.py has them.

    Their sum, with the padding between them, is what has to be brought. Norms, biases and permutations stay, and so does what
    takes queries to latents and back (kernels/latent.py).
    """
    found: list[dict[str, int]] = [{"padding": 0} for _ in range(spec.layers)]
    tensors: dict[tuple[int, str], int] = {}
    for one in layer_weights(spec, scheme):
        if one.slot in STAYING:
            continue
        number, size, part = int(one.module.name.split(".")[2]), _moving(one).nbytes(machinery), one.module.part
        found[number][part] = found[number].get(part, 0) + size
        name = one.slot if part == "experts" else one.module.name  # all experts' are joined
        tensors[number, name] = tensors.get((number, name), 0) + size
    for (number, _), size in tensors.items():
        found[number]["padding"] += padded(size, STREAM_ALIGN) - size
    return tuple(found)


def _moving(weight: Loaded) -> Loaded:
    """Without what stays on the card."""
    if not weight.module.bias and not weight.stored.act_order:
        return weight
    return replace(weight, module=replace(weight.module, bias=False), stored=replace(weight.stored, act_order=False))


def on_card(weights: Mapping[str, int], parts: Sequence[Mapping[str, int]], offload: Offload) -> dict[str, int]:
    """Bytes of weights by part, of the whole model, less those that are out; with the buffers, where there are any."""
    left = dict(weights)
    for number in offload.layers:
        for part in left.keys() & parts[number].keys():
            left[part] -= parts[number][part]
    return {**left, "staging": offload.staging_bytes} if offload.layers else left
