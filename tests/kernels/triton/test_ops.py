"""A whole model on the Triton operators gives what it gives on the reference: layers, caches, chunks, decode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from appliance.memory.modules import Machinery, ends
from kernels import reference
from kernels.adapters import Adapted
from kernels.layout import HEADS
from kernels.ops import KVCache, Ops
from kernels.triton.ops import make_ops
from models.adapters import load_adapter
from models.decoder import Decoder
from models.loader import load_model
from models.spec import AdapterLimits, ModelSpec
from quant.checkpoint import Checkpoint
from quant.rows import quantize_rows
from tests.adapters import write_adapter
from tests.kernels.paged import make_step
from tests.kernels.triton.conftest import DEVICE
from tests.tiny_model import Shape, make_checkpoint

SHAPE = Shape(hidden=128, heads=4, kv_heads=2, head_dim=32, mlp=256, group=64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), shape=SHAPE, tokenizer=False)


def load(folder: Path, ops: Ops, head: str) -> Decoder:
    with Checkpoint.open(folder) as checkpoint:
        spec = ModelSpec.from_config(checkpoint.config)
        return load_model(checkpoint, spec, ops, dtype=torch.float16, max_len=128, lm_head_dtype=head)


@pytest.mark.parametrize("head", ["model", "int8"])
def test_a_model_agrees_with_the_reference(checkpoint: Path, head: str) -> None:
    device = torch.device(DEVICE)
    ours, plain = load(checkpoint, make_ops(device), head), load(checkpoint, reference.make_ops(torch.device("cpu")), head)
    for sequences in ([(0, 20)], [(20, 1), (35, 1)], [(16, 1), (0, 17), (15, 3)]):
        batch, cache = make_step(sequences, kv_heads=2, head_dim=32, dtype=torch.float16)
        ids = torch.randint(SHAPE.vocab, (len(batch.positions),))
        mine = [KVCache(cache.k.to(device, copy=True), cache.v.to(device, copy=True)) for _ in range(2)]
        theirs = [KVCache(cache.k.clone(), cache.v.clone()) for _ in range(2)]
        there = type(batch)(
            *(t.to(device) for t in (batch.positions, batch.slots, batch.query_starts, batch.seq_lens, batch.block_tables)),
            max_query=batch.max_query,
            max_seq=batch.max_seq,
        )
        hidden = ours.bind(mine, max_tokens=64)(ids.to(device), there)
        expected = plain.forward(ids, batch, theirs)
        out, wanted = (torch.full((len(ids), SHAPE.vocab), float("nan")) for _ in range(2))
        found = ours.logits(hidden, out.to(device)).cpu()
        plain.logits(expected, wanted)
        assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()
        assert torch.equal(mine[1].k.cpu().isnan(), theirs[1].k.isnan())  # the same slots are written
        values, picks = ours.ops.argmax(found.to(device))
        assert torch.equal(picks.cpu(), found.argmax(1)) and torch.equal(values.cpu(), found.amax(1))


def test_adapters_agree_with_the_reference(checkpoint: Path, tmp_path: Path) -> None:
    """Rows of two adapters and of none, some of which lie apart, in a step of prompts and single tokens."""
    device, made = torch.device(DEVICE), []
    for ops in (make_ops(device), reference.make_ops(torch.device("cpu"))):
        with Checkpoint.open(checkpoint) as opened:
            spec = replace(ModelSpec.from_config(opened.config), adapters=AdapterLimits(2, 8))
            decoder = load_model(opened, spec, ops, dtype=torch.float16, max_len=128, lm_head_dtype="model")
        paths = (write_adapter(tmp_path / str(seed), spec, seed=seed, rank=3 + seed, size=0.2) for seed in range(2))
        made.append((decoder, [load_adapter(path, spec, ops, dtype=torch.float16, max_rank=8) for path in paths]))
    batch, cache = make_step([(20, 1), (35, 1), (9, 1), (16, 1), (0, 17), (15, 3)], kv_heads=2, head_dim=32, dtype=torch.float16)
    ids, rows = torch.randint(SHAPE.vocab, (len(batch.positions),)), (torch.tensor([0, 2, *range(21, 24)]), slice(4, 21))
    found = []
    for decoder, adapters in made:
        there = decoder.ops.device
        caches = [KVCache(cache.k.to(there, copy=True), cache.v.to(there, copy=True)) for _ in range(2)]
        tensors = (batch.positions, batch.slots, batch.query_starts, batch.seq_lens, batch.block_tables)
        more = [row if isinstance(row, slice) else row.to(there) for row in rows]
        adapted = [tuple(map(Adapted, adapters, more, (0, 0))), ()]
        for each in adapted:
            step = type(batch)(*(t.to(there) for t in tensors), max_query=17, max_seq=batch.max_seq, singles=4, adapters=each)
            found.append(decoder.bind(caches, max_tokens=64)(ids.to(there), step).float().cpu())
    ours, ours_plain, theirs, theirs_plain = found
    assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()
    changed = (theirs - theirs_plain).abs().amax(1)
    assert [int(row) for row in changed.nonzero()] == [0, 2, *range(4, 24)] and changed[changed > 0].min() > 0.05
    assert (ours_plain - theirs_plain).abs().max() < 0.02 * theirs_plain.abs().max()


@pytest.mark.parametrize(("choice", "dtype"), [("int8", "float16"), ("int4", "bfloat16"), ("int8", "float32")])
def test_an_embedding_by_itself(tmp_path: Path, choice: str, dtype: str) -> None:
    """In codes, of as many bytes as were planned, with the rows that they stand for."""
    folder = make_checkpoint(tmp_path / "model", shape=replace(SHAPE, layers=1), tokenizer=False)
    ops, name = make_ops(torch.device(DEVICE)), getattr(torch, dtype)
    with Checkpoint.open(folder) as checkpoint:
        spec = ModelSpec.from_config(checkpoint.config)
        machinery = Machinery(ops="triton", dtype=dtype, head_bits=None, embedding_bits=HEADS[choice])
        planned = ends(spec, checkpoint.scheme, machinery)
        table = checkpoint.weight("model.embed_tokens")
        assert isinstance(table, torch.Tensor) and HEADS[choice] is not None
    with Checkpoint.open(folder) as checkpoint:
        decoder = load_model(checkpoint, spec, ops, dtype=name, max_len=64, lm_head_dtype="model", embedding_dtype=choice)
    assert not decoder.tied and planned.embedding_bytes == decoder.embedding.nbytes
    ids = torch.randint(SHAPE.vocab, (5,))
    expected = quantize_rows(table, HEADS[choice]).dequantize()[ids].to(name)
    found = ops.embedding(ids.to(DEVICE), decoder.embedding, name).cpu()
    torch.testing.assert_close(found, expected, rtol=2**-7 if dtype == "bfloat16" else 1e-3, atol=0)


@pytest.mark.parametrize(
    ("head", "dtype"), [("int8", "float16"), ("int4", "bfloat16"), ("int8", "float32"), ("model", "float16")]
)
@pytest.mark.parametrize("activation", ["auto", "int8"])
def test_a_tied_embedding_is_its_head(tmp_path: Path, head: str, dtype: str, activation: str) -> None:
    """One copy, of as many bytes as were planned, with the rows of the table that the head's codes stand for."""
    folder = make_checkpoint(tmp_path / "model", shape=replace(SHAPE, layers=1, tied=True), tokenizer=False)
    ops, name = make_ops(torch.device(DEVICE)), getattr(torch, dtype)
    with Checkpoint.open(folder) as checkpoint:
        spec = ModelSpec.from_config(checkpoint.config)
        machinery = Machinery(ops="triton", dtype=dtype, head_bits=HEADS[head], activation=activation)
        planned = ends(spec, checkpoint.scheme, machinery)
        table = checkpoint.weight("model.embed_tokens")
        assert isinstance(table, torch.Tensor)
    with Checkpoint.open(folder) as checkpoint:
        decoder = load_model(checkpoint, spec, ops, dtype=name, max_len=64, lm_head_dtype=head, activation=activation)
    assert decoder.tied and (decoder.head is decoder.embedding) == (head != "model")
    assert (planned.embedding_bytes, planned.head_bytes) == (decoder.embedding.nbytes, 0)
    ids = torch.randint(SHAPE.vocab, (5,))
    bits = HEADS[head]
    expected = (table if bits is None else quantize_rows(table, bits).dequantize())[ids].to(name)
    found = ops.embedding(ids.to(DEVICE), decoder.embedding, name).cpu()
    torch.testing.assert_close(found, expected, rtol=2**-7 if dtype == "bfloat16" else 1e-3, atol=0)
