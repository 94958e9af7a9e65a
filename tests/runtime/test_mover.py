"""Copies of blocks, carried out in batches as if one after another."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from appliance.core.store import Copy
from appliance.memory.plan import PlanError
from appliance.runtime.mover import AT_ONCE, PlainMover, batches, make_mover
from kernels.kv_cache import KVCache

BLOCKS, SLOTS = 12, 7


def caches(dtype: str) -> list[KVCache]:
    made = [KVCache.zeros(BLOCKS, 8, 3, 16, dtype=dtype, device=torch.device("cpu")) for _ in range(2)]
    for tensor in (t for cache in made for t in cache.tensors):
        tensor.view(torch.uint8).random_(0, 256)
    return made


def copies(rng: random.Random, count: int) -> list[Copy]:
    kinds = {"out": (BLOCKS, SLOTS), "in": (SLOTS, BLOCKS), "copy": (BLOCKS, BLOCKS)}
    chosen = [rng.choice(["out", "out", "in", "copy"]) for _ in range(count)]
    found = [Copy(kind, rng.randrange(kinds[kind][0]), rng.randrange(kinds[kind][1])) for kind in chosen]  # type: ignore[arg-type]
    return [copy for copy in found if copy.kind != "copy" or copy.source != copy.target]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8_e4m3", "int8", "int4"])
def test_as_if_one_after_another(dtype: str) -> None:
    """Against whole blocks moved about in plain dictionaries; every tensor of a block, scales too."""
    rng = random.Random(dtype)
    made = caches(dtype)
    tensors = [t.view(torch.uint8) for cache in made for t in cache.tensors]
    pool = {b: [t[b].clone() for t in tensors] for b in range(BLOCKS)}
    host = {s: [torch.zeros_like(t[0]) for t in tensors] for s in range(SLOTS)}
    mover = PlainMover(made, SLOTS)
    for _ in range(30):
        wanted = copies(rng, rng.randrange(12))
        mover.move(wanted)
        for copy in wanted:
            source = (host if copy.kind == "in" else pool)[copy.source]
            (host if copy.kind == "out" else pool)[copy.target] = source
        for block, expected in pool.items():
            assert all(torch.equal(t[block], one) for t, one in zip(tensors, expected, strict=True))


class Passing(TorchDispatchMode):
    """Keeps how many bytes each selection of rows had."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.index_select:
            self.found.append(result.nbytes)
        return result


@pytest.mark.parametrize("rows", [0.5, 1, 3.5, 100])
def test_little_is_in_passing(rows: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than is allowed, but a whole row; and what arrives is the same."""
    made = [KVCache.zeros(BLOCKS, 8, 3, 16, dtype="float32", device=torch.device("cpu"))]
    made[0].k.normal_()
    expected, row = made[0].k.clone(), made[0].k[0].nbytes
    monkeypatch.setattr("appliance.runtime.mover.IN_PASSING", int(rows * row))
    mover = PlainMover(made, SLOTS)
    with Passing() as passing:
        mover.move([Copy("out", i, i) for i in range(SLOTS)])
        made[0].k.fill_(float("nan"))
        mover.move([Copy("in", i, BLOCKS - 1 - i) for i in range(SLOTS)])
    assert max(passing.found) == min(max(1, int(rows)), SLOTS) * row
    assert sum(passing.found) == 2 * 2 * SLOTS * row  # out and in, of keys and values
    assert torch.equal(made[0].k.flip(0)[:SLOTS], expected[:SLOTS])


def test_batches_keep_what_depends_on_each_other_apart() -> None:
    rng = random.Random(1)
    for _ in range(200):
        wanted = copies(rng, 40)
        found = list(batches(wanted))
        assert [Copy(kind, s, t) for kind, sources, targets in found for s, t in zip(sources, targets, strict=True)] == wanted  # type: ignore[arg-type]
        for kind, sources, targets in found:
            assert len(set(targets)) == len(targets)
            assert kind != "copy" or not set(targets) & set(sources)
    assert [len(sources) for _, sources, _ in batches([Copy("out", i, i) for i in range(AT_ONCE + 3)])] == [AT_ONCE, 3]
    assert list(batches([])) == []


def test_no_memory_to_pin_is_told_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA has the same words for the card's memory and the host's."""
    transfer = pytest.importorskip("kernels.triton.transfer")

    def failing(error: Exception, slots: int) -> None:
        def fail(*args: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(transfer, "Transfers", fail)
        make_mover("triton", [], slots)

    with pytest.raises(PlanError, match=r"--swap-space: no memory to pin on the host for 9 blocks: a smaller one"):
        failing(RuntimeError("CUDA error: out of memory\nmore"), 9)
    with pytest.raises(torch.OutOfMemoryError):
        failing(torch.OutOfMemoryError("CUDA out of memory"), 9)
    with pytest.raises(RuntimeError, match=r"^illegal"):
        failing(RuntimeError("illegal"), 0)
