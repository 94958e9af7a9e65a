"""A recorded step is launches with the arguments that they had while it was recorded: nothing of it is decided again.

On the CPU a step is recorded as a CUDA graph would be, kernels and torch's operations with all they were given, and repeated over
what then lies in the same places; memory that was new is full of rubbish each time.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from appliance.core.params import SamplingParams
from appliance.core.request import Request
from appliance.core.step import Chunk
from appliance.memory.inputs import input_bytes
from appliance.runtime.batch import StepArrays
from appliance.runtime.graphs import DecodeGraphs
from appliance.runtime.staging import Staging
from kernels.ops import KVCache
from tests.kernels.triton.conftest import INTERPRETED
from tests.kernels.triton.test_stack import Shape, make_decoder, make_ops
from tests.runtime.fake_lane import FakeLane

if not INTERPRETED:
    pytest.skip("a card records by itself (tests/runtime/test_cuda.py)", allow_module_level=True)

CPU, SIZE, WIDTH, BLOCK, SPARE = torch.device("cpu"), 2, 9, 16, 12
EMPTY = (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like)


class Tape(TorchDispatchMode):
    """A recorder as appliance.runtime.graphs wants one."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[Callable[[], object]] = []
        self.kernels = 0

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        run, done = InterpretedFunction.run, list[Callable[[], object]]()

        def launch(kernel: Any, *args: Any, **given: Any) -> None:
            self.kernels += 1
            with _disable_current_modes():
                done.append(lambda: run(kernel, *args, **given))
                done[-1]()

        with pytest.MonkeyPatch.context() as patch, self:
            patch.setattr(InterpretedFunction, "run", launch)
            self.done = done
            result = work()
        return lambda: [again() for again in done].clear(), result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if func.overloadpacket in EMPTY:
            self.done.append(lambda: found.fill_(float("nan") if found.is_floating_point() else 77))
        elif func._schema.is_mutable:
            self.done.append(lambda: func(*args, **kwargs))
        elif not func.is_view:
            self.done.append(lambda: found.copy_(func(*args, **kwargs)))
        return found


def step(ends: list[int], first: int, drawn: bool) -> StepArrays:
    """A token of each sequence, of which so many are in the cache; the first one's is what the step before drew."""
    chunks, sampling, blocks = [], {}, iter(range(first, SPARE))
    for i, end in enumerate(ends):
        own = array("i", [next(blocks) for _ in range(-(-end // BLOCK))])
        known = end - 1 if drawn and i == 0 else end
        request = Request(f"r{i}", 0, [7 * i + 1] * known, known, SamplingParams(), end + 1, 0, 0.0, blocks=own)
        chunks.append(Chunk(request, end - 1, 1, True))
        sampling[request] = i
    return StepArrays.build(chunks, BLOCK, sampling)


@torch.inference_mode()
def test_recorded_launches_fit_every_step() -> None:
    """Recorded over nothing but padding, repeated for long and short sequences, in as many parts as the longest would have."""
    shape = Shape(heads=2, kv_heads=1, size=32, hidden=64, inner=64, window=40)  # of every other layer
    decoder, tape = make_decoder(make_ops(CPU), shape, torch.float16), Tape()
    caches = [KVCache.zeros(SPARE + 1, BLOCK, shape.kv_heads, shape.size, dtype="float16", device=CPU) for _ in decoder.layers]
    for cache in caches:
        cache.k.normal_()
        cache.v.normal_()
    forward, drawn = decoder.bind(caches, max_tokens=SIZE), torch.tensor([33, 44])
    staging = Staging(input_bytes(SIZE, SIZE, WIDTH), FakeLane(), CPU)

    def known(ids: Tensor) -> Tensor:
        return torch.where(ids < 0, drawn[(-1 - ids).clamp_(min=0)], ids).clamp_(min=0)

    graphs = DecodeGraphs(
        lambda ids, batch: forward(known(ids), batch),
        sizes=(SIZE,), table_width=WIDTH, spare_block=SPARE, block_size=BLOCK, recorder=tape, send=staging.send,
    )  # fmt: skip
    launched = tape.kernels
    for ends, first in (([131, 1], 0), ([33], 8)):
        one = step(ends, first, drawn=True)
        kept = [tensor.clone() for cache in caches for tensor in cache.tensors]
        expected = forward(known(torch.from_numpy(one.ids)), one.batch([torch.from_numpy(array) for array in one.arrays]))
        written = [tensor.clone() for cache in caches for tensor in cache.tensors]
        for tensor, before in zip((t for cache in caches for t in cache.tensors), kept, strict=True):
            tensor.copy_(before)
        prepared = graphs.prepare(one)
        assert prepared is not None
        staging.send(prepared.arrays)
        found = graphs.replay(prepared)[: len(ends)]
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
        for tensor, after in zip((t for cache in caches for t in cache.tensors), written, strict=True):
            torch.testing.assert_close(tensor[:SPARE], after[:SPARE], atol=1e-3, rtol=1e-2)
    assert launched > 10 * len(decoder.layers) and tape.kernels == launched
