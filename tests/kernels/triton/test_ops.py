"""A whole model on the Triton operators gives what it gives on the reference: layers, caches, chunks, decode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from appliance.memory.modules import Machinery, ends
from kernels import reference
from kernels.layout import HEADS
from kernels.ops import KVCache, Ops
from kernels.triton.ops import make_ops
from models.decoder import Decoder
from models.loader import load_model
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from quant.rows import quantize_rows
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
