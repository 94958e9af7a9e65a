"""Layers that are streamed in: the bits of resident ones, whatever the order in which a card may do what it is told."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from itertools import count

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.layout import STREAM_ALIGN, padded, pinned_pieces
from kernels.ops import MLP, Layer, Mixture
from models.decoder import Decoder
from tests.kernels.triton import test_stack
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.late import LateQueues, Queues
from tests.kernels.triton.test_stack import SHAPES, make_decoder, same, split, step  # noqa: F401

from kernels.triton import stream  # isort: skip  (after the conftest has chosen the interpreter)
from kernels.triton.ops import make_ops  # isort: skip
from kernels.triton.weights import TritonWeight  # isort: skip

POISON = 0x7F  # of a buffer nobody has filled: NaN in both 16-bit types


def marked(number: int, size: int, *, mixture: bool = False) -> Layer:
    """A layer whose every weight says whose it is."""

    def weight(place: int) -> TritonWeight:
        words = torch.full((size, 3), 10 * number + place, dtype=torch.int16)
        params = torch.full((1, 1, 5), 10 * number + place, dtype=torch.int32) if place % 2 else None
        return TritonWeight(4, words, params, None, 1, torch.ones(3), None, False, 3, size)

    gain, mlp = torch.ones(2), MLP((weight(3),), weight(4))
    own = {"shared": MLP((weight(6),), weight(7)), "shared_gate": weight(8)}
    return Layer(gain, (weight(0), weight(1)), weight(2), gain, Mixture(weight(5), (mlp,), 1, True, **own) if mixture else mlp)


def moved(layer: Layer) -> list[Tensor]:
    weights = layer.weights
    return [t for w in weights if isinstance(w, TritonWeight) for t in (w.words, w.params) if t is not None]


def wrong_reads(layers: int, *, dropped: int = 0, fail: bool = False) -> tuple[int, int]:
    """Three steps are launched at once, and done in every order there is: (reads that may see another layer, waits).

    fail: the first step ends amid a layer, and the second leaves one out.
    """
    queues, device = Queues(), torch.device("cpu")
    made = {2 * n + 1: marked(n, 40 + n % 2) for n in range(layers)}
    streamed = stream.WeightStream({number: stream.park(layer) for number, layer in made.items()}, device, queues)
    for buffer in streamed._buffers:
        buffer.fill_(POISON)
    first = queues.waits
    queues.dropped = first + dropped if dropped else 0

    def read(number: int) -> bool:
        both = zip(moved(streamed.layers[number]), moved(made[number]), strict=True)
        return all(torch.equal(seen, told) for seen, told in both)

    for turn in range(3):
        for number in sorted(made):
            if fail and turn == 1 and number == 3:
                continue
            try:
                with streamed.layers[number].present():
                    queues.main().items.append(partial(read, number))
                    if fail and turn == 0 and number == 2 * (layers // 2) + 1:
                        raise InterruptedError
            except InterruptedError:
                break
    return len(queues.wrong()), queues.waits - first


@pytest.mark.parametrize("layers", range(1, 8))
def test_every_read_sees_its_layer(layers: int) -> None:
    """In whatever order two streams do it; also where steps fail, or leave layers out."""
    assert wrong_reads(layers)[0] == wrong_reads(layers, fail=True)[0] == 0


@pytest.mark.parametrize("layers", [4, 6])
def test_every_event_is_needed(layers: int) -> None:
    """Without any one of the waits there is an order in which a layer is read that is not there, or not there any more.

    (With an odd number one wait a step is implied: the first layer is copied behind the second.)
    """
    waits = wrong_reads(layers)[1]
    assert waits == 2 * 3 * layers  # before each layer the steps wait, and behind it the copies
    assert all(wrong_reads(layers, dropped=wait)[0] for wait in range(1, waits + 1))


def test_a_buffer_of_its_own_is_filled_once() -> None:
    """One layer, or two, have nobody to make room for."""
    for layers in (1, 2):
        assert wrong_reads(layers)[1] == 3 * layers


@pytest.fixture
def deep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of four layers."""
    monkeypatch.setattr(test_stack, "LAYERS", 4)


def offload(decoder: Decoder, numbers: tuple[int, ...], streams: Queues | None = None) -> tuple[Decoder, stream.WeightStream]:
    parked = {number: stream.park(decoder.layers[number]) for number in numbers}
    found = stream.WeightStream(parked, decoder.ops.device, streams)  # type: ignore[arg-type]
    layers = tuple(found.layers.get(i, layer) for i, layer in enumerate(decoder.layers))
    return replace(decoder, layers=layers), found


@pytest.mark.parametrize("name", ["heads of 48, normed, biased", "act-order and bytes", "dense"])
@pytest.mark.usefixtures("split", "deep")
def test_the_answers_of_resident_layers(name: str) -> None:
    """Bit for bit, bound and one by one, step after step, with copies that come when they are waited for and not before."""
    shape, dtype, device = SHAPES[name], torch.float16, torch.device(DEVICE)
    plain, late = make_decoder(make_ops(device), shape, dtype), LateQueues() if DEVICE == "cpu" else None
    ours, streamed = offload(plain, (0, 1, 2, 3), late)
    for buffer in streamed._buffers if late else ():
        buffer.fill_(POISON)
    assert ours.nbytes == plain.nbytes
    on = step([(3, 1), (0, 2)], shape, dtype)
    ids, batch, _ = on(device)
    for bound in (True, False):  # on a card these may round differently from each other, with resident layers too
        caches = [on(device)[2] for _ in range(2)]
        found = [
            (one.bind(own, max_tokens=3) if bound else partial(one.forward, caches=own))(ids, batch)
            for one, own in zip((plain, ours), caches, strict=True)
        ]
        assert torch.equal(*found) and same(*caches)


@pytest.mark.skipif(DEVICE != "cpu", reason="a card is not to be made to read what it should not")
@pytest.mark.usefixtures("deep")
def test_a_forgotten_wait_is_seen() -> None:
    shape, late = SHAPES["dense"], LateQueues()
    plain = make_decoder(make_ops(torch.device("cpu")), shape, torch.float16)
    ours, _ = offload(plain, (0, 1, 2, 3), late)
    ids, batch, caches = step([(2, 1)], shape, torch.float16)(ours.ops.device)
    expected = plain.forward(ids, batch, caches)
    assert torch.equal(ours.forward(ids, batch, caches), expected)
    for place in (0, 3):
        late.dropped = late.waits + 2 * place + 1  # the one before the layer is read
        assert not torch.equal(ours.forward(ids, batch, caches), expected)


@pytest.mark.parametrize("mixture", [False, True])
def test_what_moves_and_what_stays(mixture: bool) -> None:
    """Words and params, each where the allocator could have put it; in pieces whose sizes are powers of two."""
    layer = marked(3, 200_003, mixture=mixture)
    parked = stream.park(layer)
    assert [len(piece) for piece in parked.pieces] == pinned_pieces(parked.nbytes) and len(parked.pieces) == 3
    assert parked.nbytes == sum(padded(tensor.nbytes, STREAM_ALIGN) for tensor in moved(layer))
    assert all(tensor.device.type == "meta" for tensor in moved(parked.layer))
    streamed = stream.WeightStream({7: parked}, torch.device("cpu"))
    assert (streamed.nbytes, streamed.host_nbytes) == (parked.nbytes, sum(pinned_pieces(parked.nbytes)))
    found = streamed.layers[7]
    assert found.input_norm is layer.input_norm and found.o.bias is layer.o.bias  # type: ignore[attr-defined]
    start = streamed._buffers[0].data_ptr()
    for ours, theirs in zip(moved(found), moved(layer), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and (ours.data_ptr() - start) % STREAM_ALIGN == 0


def test_pieces_of_pinned_memory() -> None:
    mib = 1 << 20
    assert (
        pinned_pieces(0) == [] and pinned_pieces(1) == [mib] and pinned_pieces(110 * mib) == [n * mib for n in (64, 32, 8, 4, 2)]
    )
    rng = random.Random(0)
    for size in (rng.randrange(1, 1 << rng.randrange(1, 40)) for _ in count()):
        pieces = pinned_pieces(size)
        assert size <= sum(pieces) < size + mib and all(piece & piece - 1 == 0 for piece in pieces)
        if size > 1 << 38:
            break


def test_weights_of_other_operators() -> None:
    decoder = make_decoder(reference.make_ops(torch.device("cpu")), SHAPES["plain"], torch.float16)
    with pytest.raises(TypeError, match="packed for other operators"):
        stream.park(decoder.layers[0])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_every_type_of_words(dtype: torch.dtype) -> None:
    layer = marked(1, 9)
    bits = torch.randint(0, 255, (130, dtype.itemsize), dtype=torch.uint8)
    words = bits.view(dtype).view(26, 5)
    layer = replace(layer, o=replace(layer.o, words=words))  # type: ignore[type-var]
    found = stream.WeightStream({0: stream.park(layer)}, torch.device("cpu")).layers[0].o
    assert isinstance(found, TritonWeight) and found.words.dtype == dtype and found.words.shape == (26, 5)
    assert torch.equal(found.words.view(torch.uint8), words.view(torch.uint8))
