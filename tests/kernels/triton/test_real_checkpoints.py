"""Real checkpoints with 8 bits on either side of their products, through a whole model on the Triton operators."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.ops import KVCache, Ops, PagedBatch
from kernels.triton.kv import capability
from kernels.triton.ops import make_ops
from kernels.triton.weights import TritonWeight
from kernels.tune import AMPERE
from models.decoder import Decoder
from models.loader import load_model
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from tests.kernels.triton.conftest import DEVICE

pytestmark = pytest.mark.realdata


def load(folder: Path, ops: Ops, activation: str) -> Decoder:
    with Checkpoint.open(folder) as checkpoint:
        spec = ModelSpec.from_config(checkpoint.config)
        return load_model(checkpoint, spec, ops, dtype=torch.float16, max_len=64, lm_head_dtype="model", activation=activation)


def log_probabilities(decoder: Decoder, prompt: list[int]) -> Tensor:
    """Of all tokens of a prompt but the first, fed at once."""
    spec, device, count = decoder.spec, decoder.ops.device, len(prompt)
    shape = (-(-count // 16), 16, spec.kv_heads, spec.head_dim)
    empty = torch.full(shape, torch.nan, dtype=decoder.dtype, device=device)
    caches = [KVCache(empty.clone(), empty.clone()) for _ in range(spec.layers)]
    ids = torch.tensor(prompt, device=device)
    batch = PagedBatch(
        positions=torch.arange(count, device=device),
        slots=torch.arange(count, device=device),
        query_starts=torch.tensor([0, count], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([count], dtype=torch.int32, device=device),
        block_tables=torch.arange(shape[0], dtype=torch.int32, device=device).unsqueeze(0),
        max_query=count,
        max_seq=count,
    )
    hidden = decoder.bind(caches, max_tokens=count)(ids, batch)
    logits = decoder.logits(hidden, torch.full((count, spec.vocab), torch.nan, device=device))
    return logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0].cpu()


@pytest.mark.parametrize(
    ("name", "activation", "bits", "rounds", "most"),
    [
        ("ct-w8a8-int8", "auto", 8, "token", 0.08),  # the expected values have no rounded activations
        ("ct-fp8-dynamic", "auto", 8, None, 0.01),
        ("ct-w4a16-g128", "int8", 4, "tile", 0.08),
        ("gptq-8bit-channel", "int8", 8, "tile", 0.08),
    ],
)
def test_log_probabilities(shared_data: Path, name: str, activation: str, bits: int, rounds: str | None, most: float) -> None:
    if rounds and 0 < capability(torch.device(DEVICE)) < AMPERE:
        pytest.skip("nothing is rounded on this card")
    folder = shared_data / "quantized" / name
    ours = load(folder, make_ops(torch.device(DEVICE)), activation)
    weight = ours.layers[0].only_mlp.down
    assert isinstance(weight, TritonWeight) and (weight.bits, weight.rounds) == (bits, rounds)
    plain = load(folder, reference.make_ops(torch.device("cpu")), "auto") if rounds != "tile" else None
    errors = []
    for one in json.loads((folder / "expected.json").read_text())[:2]:
        found = log_probabilities(ours, one["prompt_token_ids"])
        errors.append((found - torch.tensor(one["prompt_logprobs"][1:])).abs())
        if plain is not None:  # the reference rounds activations too
            assert (found - log_probabilities(plain, one["prompt_token_ids"])).abs().max() < 0.1
    assert torch.cat(errors).mean() <= most
