"""Layers whose weights stay in pinned host memory and are copied to the card ahead of their use, each time anew.

::

    host     layers 1, 4, 7, 10, 13, ..   what Ops.pack made of them, pinned
    card     first buffer   1   7   13 .. 1      each holds a layer while that is computed, and then fetches the next of its own;
             second buffer    4   10   .. 4      behind the last one comes the first again, for the step after this one

Two buffers: one is read while the other one fills. A third would not make the bus faster, and costs the cache a layer. What
happens when is settled by events, and the host never waits: a copy begins behind all that the steps' stream was given before it,
the last reader of the buffer among that, and a layer's kernels begin behind its copy. Copies have a stream of their own.

Words and params of a weight move. What is small stays on the card: norms, biases, permutations (which the norm *before* a layer
reads, see stack.py). A layer's tensors lie in its buffer one behind another, each at a multiple of kernels.layout.STREAM_ALIGN
bytes, as if the allocator had placed it: kernels are compiled for no other alignment. On the CPU (in the interpreter) all is done
at once. Steps that do this are not recorded as graphs: events of one recording mean nothing to another, and to the next step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.layout import STREAM_ALIGN, padded, pinned_pieces
from kernels.ops import MLP, Layer, Mixture, Weight
from kernels.triton.transfer import AtOnce, CudaStreams, Event, Streams
from kernels.triton.weights import TritonWeight

MEMBERS = ("words", "params")  # tensors of a weight that move


@dataclass(frozen=True, eq=False)
class Parked:
    """A layer in host memory."""

    layer: Layer  # with tensors on torch's "meta" device where theirs is in ``pieces``
    pieces: tuple[Tensor, ...]  # uint8, pinned; the layer's bytes are laid out over them
    nbytes: int


def park(layer: Layer) -> Parked:
    """Copy a layer's weights to host memory; its memory on the device is free once nobody holds ``layer``. Waits for the copy.

    TypeError for weights that were packed for other operators, RuntimeError where the host has no memory to pin.
    """
    tensors = [tensor for weight in layer.weights for tensor in _moving(weight).values()]
    places, size = _places(tensors)
    pin = tensors[0].device.type == "cuda"
    pieces = tuple(torch.empty(piece, dtype=torch.uint8, pin_memory=pin) for piece in pinned_pieces(size))
    for at, tensor in zip(places, tensors, strict=True):
        source, first = tensor.contiguous().view(-1).view(torch.uint8), 0
        for piece in pieces:
            a, b = max(at, first), min(at + len(source), first + len(piece))
            if a < b:
                piece[a - first : b - first].copy_(source[a - at : b - at])
            first += len(piece)
    return Parked(_with(layer, [torch.empty_like(tensor, device="meta") for tensor in tensors]), pieces, size)


class WeightStream:
    """The buffers of the layers that are parked, for one model (calls come from one thread).

    ``layers`` are what is to be called in their place: with weights in the buffers, and to be read only while they are
    ``present`` (kernels.ops.Layer). Steps that fail on the way, or leave layers out, cost time, not right answers.
    """

    def __init__(self, parked: Mapping[int, Parked], device: torch.device, streams: Streams | None = None) -> None:
        """``parked``: by the number of the layer. Allocates room for two of the largest (for one, where there is one)."""
        self._streams: Streams = streams or (CudaStreams(device) if device.type == "cuda" else AtOnce())
        self._parked, order = dict(parked), sorted(parked)
        count = min(2, len(order))
        size = max((one.nbytes for one in parked.values()), default=0)
        with self._streams.on_side():  # memory that its copies may write is not handed to others before they are done
            self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
        self._place = {number: i % 2 for i, number in enumerate(order)}
        rings = [order[place::2] for place in range(count)]
        self._next = {number: ring[(i + 1) % len(ring)] for ring in rings for i, number in enumerate(ring)}
        self._holds: list[int | None] = [None] * count
        self._filled: list[Event | None] = [None] * count
        self.layers = {number: self._layer(number) for number in order}
        for ring in rings:
            self._fetch(ring[0])

    @property
    def nbytes(self) -> int:
        """Of the buffers, on the device."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def host_nbytes(self) -> int:
        return sum(piece.nbytes for one in self._parked.values() for piece in one.pieces)

    @contextmanager
    def _present(self, number: int) -> Iterator[None]:
        place, following = self._place[number], self._next[number]
        if self._holds[place] != number:  # a step has failed, or left layers out
            self._fetch(number)
        self._streams.main().wait_event(self._filled[place])
        yield
        if following != number:
            self._fetch(following)

    def _fetch(self, number: int) -> None:
        """Copy a layer into its buffer once all that has been launched is done with what lies there."""
        place, side, first = self._place[number], self._streams.side, 0
        side.wait_event(self._streams.main().record_event())
        self._holds[place] = None
        with self._streams.on_side():
            for piece in self._parked[number].pieces:
                room = self._buffers[place][first : first + len(piece)]
                room.copy_(piece[: len(room)], non_blocking=True)
                first += len(piece)
        self._holds[place], self._filled[place] = number, side.record_event()

    def _layer(self, number: int) -> Layer:
        layer, buffer = self._parked[number].layer, self._buffers[self._place[number]]
        shapes = [tensor for weight in layer.weights for tensor in _moving(weight).values()]
        places, _ = _places(shapes)
        views = [
            buffer[at : at + shape.nbytes].view(shape.dtype).view(shape.shape) for at, shape in zip(places, shapes, strict=True)
        ]
        size = sum(view.nbytes for view in views)
        return replace(_with(layer, views), present=partial(self._present, number), streamed=size)


def _moving(weight: Weight) -> dict[str, Tensor]:
    if not isinstance(weight, TritonWeight):
        raise TypeError(f"a {type(weight).__name__} was packed for other operators than those in Triton")
    return {name: tensor for name in MEMBERS if (tensor := getattr(weight, name)) is not None}


def _places(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """(where each begins, where all end)."""
    places: list[int] = []
    end = 0
    for tensor in tensors:
        places.append(end)
        end += padded(tensor.nbytes, STREAM_ALIGN)
    return places, end


def _with(layer: Layer, tensors: Sequence[Tensor]) -> Layer:
    """The layer with these tensors, in the order of its weights and MEMBERS, in place of those that move."""
    left = iter(tensors)

    def changed(weight: Weight) -> TritonWeight:
        members: dict[str, Any] = {name: next(left) for name in _moving(weight)}
        assert isinstance(weight, TritonWeight)
        return replace(weight, **members)

    def whole(mlp: MLP) -> MLP:
        gate_up = tuple(map(changed, mlp.gate_up))
        return MLP(gate_up, changed(mlp.down))

    def every(mixture: Mixture) -> Mixture:
        router = changed(mixture.router)
        gate = None if mixture.shared_gate is None else changed(mixture.shared_gate)
        shared = None if mixture.shared is None else whole(mixture.shared)
        return replace(mixture, router=router, shared_gate=gate, shared=shared, experts=tuple(map(whole, mixture.experts)))

    qkv = tuple(map(changed, layer.qkv))
    o = changed(layer.o)
    mlp = every(layer.mlp) if isinstance(layer.mlp, Mixture) else whole(layer.mlp)
    beside = None if layer.beside is None else replace(layer.beside, mixture=every(layer.beside.mixture))
    told = None if layer.told is None else replace(layer.told, gate=changed(layer.told.gate), down=changed(layer.told.down))
    return replace(layer, qkv=qkv, o=o, mlp=mlp, beside=beside, told=told)
