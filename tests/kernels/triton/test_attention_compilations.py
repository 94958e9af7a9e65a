"""Attention compiled for every architecture: each launch is recorded from the operator itself, for a card that is not here."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ops import KVCache, PagedBatch
from tests.kernels.triton.aot import OLDER, OLDEST, TARGETS, Compilation, Report, compile_all

from kernels.triton import attention as operator  # isort: skip  (after the conftest has chosen the interpreter)
from kernels.triton import attention_decode, attention_prefill  # isort: skip
from kernels.triton.kv import Launch  # isort: skip

TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int16: "*i16", torch.int32: "*i32"}
EVERY = [(None, 75), ("int4", 75), ("fp8_e4m3", 80), (None, 86), ("int8", 86), ("int4", 89), (None, 90), ("fp8_e5m2", 90),
         ("int4", 90), ("fp8_e4m3", 120)]  # fmt: skip
ONCE = {("int4", 75), ("fp8_e4m3", 80), ("int8", 86), ("int4", 89), (None, 90), ("fp8_e5m2", 90), ("fp8_e4m3", 120)}
ONE, FEW, MANY = 1, 2, 512  # rows of a sequence
VARYING = ("table_stride", "window", "first_sequence", "sequences", "splits")  # from step to step: not specialized


class Recorder:
    """Stands for a kernel, and keeps how it was launched."""

    def __init__(self, kernel: Any, module: str, target: int, made: list[Compilation]) -> None:
        self.kernel, self.module, self.target, self.made = kernel, module, target, made

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, num_warps: int = 4, num_stages: int = 3, **given: Any) -> None:
        types, constants = {}, {}
        for name, parameter in inspect.signature(self.kernel.fn).parameters.items():
            value = given.pop(name)
            if "constexpr" in str(parameter.annotation) or value is None:
                constants[name] = value
            else:
                types[name] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32" if isinstance(value, int) else "fp32"
        assert not given
        odd = tuple(name for name in VARYING if name in types)
        path = f"kernels.triton.{self.module}:{self.kernel.fn.__name__}"
        self.made.append(Compilation(path, types, constants, num_warps, num_stages, odd, (self.target,)))


def launches(
    monkeypatch: pytest.MonkeyPatch,
    target: int,
    *,
    size: int,
    rows: int = 1,
    dtype: torch.dtype = torch.float16,
    kind: str | None = None,
    group: int = 4,
    block_size: int = 16,
    window: int | None = None,
    cap: float | None = None,
    sequences: int = 1,
    kv_heads: int = 8,
    values: bool = True,
) -> list[Compilation]:
    """What a step of ``rows`` rows a sequence compiles, on a card of this architecture; tensors are without memory."""
    blocks = -(-999 // block_size)
    with torch.device("meta"):
        q = torch.empty(rows * sequences, kv_heads * group, size, dtype=dtype)
        positions, starts = torch.empty(rows * sequences, dtype=torch.int64), torch.empty(sequences + 1, dtype=torch.int32)
        lengths, tables = (torch.empty(*dims, dtype=torch.int32) for dims in ((sequences,), (sequences, blocks)))
    kept = kind or str(dtype).removeprefix("torch.")
    cache = KVCache.zeros(sequences * blocks, block_size, kv_heads, size, dtype=kept, device=torch.device("meta"), values=values)
    batch = PagedBatch(positions, positions, starts, lengths, tables, max_query=rows, max_seq=999)
    made: list[Compilation] = []
    with monkeypatch.context() as patch:
        patch.setattr(operator, "capability", lambda device: target)
        for module in (attention_decode, attention_prefill):
            for name in ("_decode", "_merge", "_prefill"):
                if hasattr(module, name):
                    short = module.__name__.rpartition(".")[2]
                    patch.setattr(module, name, Recorder(getattr(module, name), short, target, made))
        operator.attention(q, cache, batch, scale=1.0, window=window, cap=cap)
    return made


def compiled(made: Iterable[Compilation], *, loops: bool = True) -> list[Report]:
    """Of each compilation once: it must fit the card's shared memory."""
    different: list[Compilation] = []
    for wanted in made:
        if wanted not in different:
            different.append(wanted)
    reports = compile_all(different, loops=loops)
    for one in reports:
        assert one.fits, one
    return reports


LATENTS = [(None, 75, 1), (None, 80, 1), (None, 86, 512), (None, 89, 1), ("fp8_e4m3", 89, 1), (None, 90, 1),
           ("fp8_e4m3", 90, 512), (None, 120, 512)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 heads over one key of 576 numbers, which is the value, too: nothing is spilled, and what comes is on its way before."""
    wide = {"size": 576, "group": 128, "kv_heads": 1, "values": False, "block_size": 64}
    for kind, target, rows in LATENTS:
        dtype = torch.bfloat16 if target >= 80 else torch.float32
        made = launches(monkeypatch, target, rows=rows, kind=kind, dtype=dtype, **wide)[:1]
        assert made[0].constants["SHARING"] == (16 if target < 80 else 8 if kind else 4)
        for one in compiled(made):
            assert one.stack == 0, one
            assert target < 80 or (one.count("LDGSTS") and products(one)), one


def products(one: Report) -> int:
    return one.count("HMMA", "HGMMA", "QMMA", "UTCHMMA")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_common_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bits: nothing is spilled, and keys and values arrive in shared memory while products run."""
    wanted = []
    for target in TARGETS:
        made = [one for size in (64, 128) for rows in (1, 512) for one in launches(monkeypatch, target, size=size, rows=rows)]
        assert [one.kernel.partition(":")[2] for one in made] == ["_decode", "_merge", "_prefill"] * 2
        wanted += made[:1] + made[2:]
    for one in compiled(wanted):
        assert one.stack == 0, one
        assert one.target < 80 or "_merge" in one.label or (one.count("LDGSTS") and products(one)), one


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_caches_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands are read as whole registers, never byte by byte."""
    kinds = [("fp8_e4m3", 80), ("fp8_e4m3", 89), ("fp8_e5m2", 90), ("int8", 89), ("int4", 80), ("int4", 89)]
    wanted = [launches(monkeypatch, target, size=128, kind=kind, block_size=64, sequences=40)[0] for kind, target in kinds]
    for made, one in zip(wanted, compiled(wanted), strict=True):
        assert one.stack <= 16 and not one.count("LDL", "STL"), one  # some compilers put a number away before the loop
        assert one.count("LDSM") and one.count("LDGSTS") and products(one), one
        assert not one.count("LDS.U8", "LDS.S8", "LDG.E.U8"), one
        assert one.count("I2F") <= 4, one  # of the tokens' scales
        tile = made.constants["BLOCK_N"]
        # Keys and values that a thread widens.
        assert one.per_weight(2 * tile * 128 // (32 * made.num_warps)) < (7.1 if OLDEST and one.target == 80 else 6.5), one


def used(one: Compilation) -> tuple[str, Launch]:
    """A kernel, and how it is launched."""
    return one.kernel, Launch(one.constants["ROWS"], one.constants["BLOCK_N"], one.num_warps, one.num_stages)


def chosen(kind: str | None, target: int, dtype: torch.dtype, widest: int) -> Iterator[tuple[str, Launch]]:
    """What the kernels can choose, for heads of up to 512 and chunks of up to ``widest`` features, as ``used`` has it."""
    bits = 16 if kind is None else 4 if kind == "int4" else 8
    for width in (16, 32, 64, 128, 256, 512):
        yield "kernels.triton.attention_decode:_decode", attention_decode.choose(width, bits, target, dtype=dtype)
        for rows in (16, 17) if width <= widest else ():
            yield "kernels.triton.attention_prefill:_prefill", attention_prefill.choose(width, rows, bits, target, dtype=dtype)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "target"), EVERY)
def test_all_launches(kind: str | None, target: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every choice of rows, tiles, warps and stages, and every branch of the kernels, on every card; each cache on some.

    What changes the code without changing the launch goes together, since a compilation takes a second or two: each group, block
    size, dtype, window and padding of a head is in some kernel of each cache, not each with each other. Launches that depend on
    neither card nor cache, float32's and those of chunks of heads of 512, are compiled for each card and each cache once.
    """
    brain, once = torch.bfloat16 if target >= 80 else torch.float16, (kind, target) in ONCE
    # Models with heads of 512 compute in bfloat16 where a card has that, else in float32, eight query heads to a program.
    wide = {"group": 8, "dtype": torch.bfloat16} if target >= 80 else {"group": 16, "dtype": torch.float32}
    variations: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((FEW,), {"size": 16}),
        ((ONE, MANY), {"size": 48, "group": 16, "block_size": 64}),
        ((ONE, MANY) if once else (), {"size": 96, "dtype": torch.float32}),
        ((ONE, FEW, MANY), {"size": 128, "group": 7, "window": 100, "block_size": 128, "dtype": brain}),
        *(((ONE, MANY), {"size": 256, "cap": 50.0, "window": given}) for given in ((None, 100) if kind is None else (100,))),
        ((ONE, FEW, MANY) if once else (ONE,), {"size": 512, **wide}),
    ]
    made = [one for every, given in variations for rows in every
            for one in launches(monkeypatch, target, rows=rows, kind=kind, sequences=40, **given)]  # fmt: skip
    assert set(chosen(kind, target, brain, 512 if once else 256)) <= {used(one) for one in made}
    for one in compiled(made, loops=False):
        assert one.fits and one.stack <= (40 if OLDEST and kind else 16), one
        assert OLDER or target != 120 or one.registers <= 208, one  # what only the end needs is not kept across loops
