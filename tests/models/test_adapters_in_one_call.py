"""What native kernels add within their products, against the operators one by one: awkward ranks, widths and rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.adapters import Adapted, AdapterWeights
from kernels.cpu import backend
from kernels.layout import ADAPTED_AT_ONCE
from kernels.ops import KVCache, PagedBatch, get_ops
from models.adapters import load_adapter
from models.decoder import Decoder
from models.loader import load_model
from models.spec import AdapterLimits, ModelSpec
from quant.checkpoint import Checkpoint
from tests.adapters import SOME, write_adapter
from tests.tiny_model import Shape, make_checkpoint

pytestmark = pytest.mark.skipif(backend.native() is None, reason="the native extension is not built")

WIDE = Shape(hidden=96, heads=3, kv_heads=1, head_dim=32, mlp=4160, group=32, layers=2)  # more inputs than a piece has
ODD = replace(WIDE, mlp=160)  # gate and up share a panel: operators one by one
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.05}  # to what adapters make different; int8 activations


def load(directory: Path, dtype: torch.dtype, rank: int) -> tuple[Decoder, list[AdapterWeights]]:
    with Checkpoint.open(directory / "model") as checkpoint:
        spec = replace(ModelSpec.from_config(checkpoint.config), adapters=AdapterLimits(count=3, rank=rank))
        decoder = load_model(checkpoint, spec, get_ops("cpu"), dtype=dtype, max_len=512, lm_head_dtype="model")
    kinds = (SOME, ("q_proj", "v_proj", "up_proj"), ("gate_proj", "down_proj"))  # the latter two leave ranks, or products, out
    made = [
        write_adapter(directory / str(n), spec, seed=n, rank=max(1, rank - 2 * n), modules=kind, size=0.1 * (16 / rank) ** 0.25)
        for n, kind in enumerate(kinds)
    ]
    return decoder, [load_adapter(path, spec, decoder.ops, dtype=dtype, max_rank=rank) for path in made]


def adapted(each: list[AdapterWeights | None]) -> tuple[Adapted, ...]:
    """By whom which rows are added to, as StepArrays says it: window by window."""
    found = []
    for weights in dict.fromkeys(one for one in each if one is not None):
        for window in range(0, len(each), ADAPTED_AT_ONCE):
            rows = [window + n for n, one in enumerate(each[window : window + ADAPTED_AT_ONCE]) if one is weights]
            if rows:
                whole = rows[-1] - rows[0] + 1 == len(rows)
                found.append(Adapted(weights, slice(rows[0], rows[-1] + 1) if whole else torch.tensor(rows), window))
    return tuple(found)


def step(lengths: list[int], adapters: list[AdapterWeights | None]) -> tuple[torch.Tensor, PagedBatch]:
    """Prompts of these lengths, each in a block of its own, and by which adapter."""
    ends = torch.tensor(lengths).cumsum(0)
    positions = torch.cat([torch.arange(length) for length in lengths])
    blocks = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    batch = PagedBatch(
        positions=positions,
        slots=blocks * 512 + positions,
        query_starts=torch.cat((torch.zeros(1, dtype=torch.int64), ends)).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_tables=torch.arange(len(lengths), dtype=torch.int32)[:, None],
        max_query=max(lengths),
        max_seq=max(lengths),
        adapters=adapted([one for one, length in zip(adapters, lengths, strict=True) for _ in range(length)]),
    )
    return torch.randint(3, 256, (int(ends[-1]),), generator=torch.Generator().manual_seed(len(lengths))), batch


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize(("shape", "rank"), [(WIDE, 1), (WIDE, 5), (WIDE, 16), (WIDE, 133), (ODD, 5)])
def test_as_the_operators_one_by_one(
    tmp_path: Path, shape: Shape, rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(tmp_path, shape, rank, dtype, "auto", monkeypatch)


@pytest.mark.parametrize("isa", [one for one in backend.available() if one != backend.TORCH])
def test_every_instruction_set(tmp_path: Path, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in CLOSE:
        compare(tmp_path / str(dtype), WIDE, 5, dtype, isa, monkeypatch)


def compare(tmp_path: Path, shape: Shape, rank: int, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_CPU_ISA", isa)
    make_checkpoint(tmp_path / "model", shape=shape, tokenizer=False)
    decoder, (a, b, c) = load(tmp_path, dtype, rank)
    assert decoder.ops.adapts is not None and decoder.ops.adapts(decoder.stack) == (shape is WIDE)
    spec = decoder.spec
    for lengths, adapters in (
        ([1], [a]),
        ([1] * 9, [a, None, b, a, c, None, b, a, a]),
        ([300, 2, 255, 1, 1, 7], [None, a, b, c, None, a]),  # beyond a block of the kernels' rows
        ([260, 260], [a, a]),
    ):
        ids, batch = step(lengths, adapters)
        results = []
        for plain in (False, True):
            shape_of = (len(lengths), 512, spec.kv_heads, spec.head_dim)
            caches = [KVCache(*(torch.full(shape_of, float("nan"), dtype=dtype) for _ in "kv")) for _ in range(spec.layers)]
            if plain:
                results.append(decoder.forward(ids, batch, caches).float())
            else:
                forward = decoder.bind(caches, max_tokens=len(ids))
                results.append(forward(ids, batch).clone().float())
                without = forward(ids, replace(batch, adapters=())).float()
        found, expected = results
        rows = torch.cat([torch.full((length,), one is not None) for length, one in zip(lengths, adapters, strict=True)])
        assert (found - expected)[rows].norm() <= CLOSE[dtype] * (found - without)[rows].norm()
        assert torch.equal(found[~rows], without[~rows])  # neighbours change nothing
        assert (found[rows] - without[rows]).abs().amax(dim=1).min() > 0.01  # and each adapter does
