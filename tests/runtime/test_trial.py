"""Whether a device computes what the reference does: right kernels pass, wrong ones are found, results are remembered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from appliance.config import EngineConfig
from appliance.memory import proofs
from appliance.memory.plan import MemoryPlan
from appliance.memory.planner import make_plan
from appliance.runtime import trial
from appliance.runtime.startup import Timeline, load_decoder
from kernels import reference
from kernels.ops import KVCache, PagedBatch, Weight
from models.decoder import Decoder
from tests.memory.gemma4 import EXPERTS, TOLD, write_gemma4
from tests.memory.gemma4 import SMALL as GEMMA4
from tests.memory.published import GLM4_MOE, fill, livelier, write_published


def loaded(directory: Path, **options: Any) -> tuple[EngineConfig, MemoryPlan, Decoder]:
    config = EngineConfig(model=str(directory), kv_cache_memory_bytes=1 << 20, threads=1, max_model_len=256, **options)
    plan = make_plan(directory, config)
    return config, plan, load_decoder(config, plan, torch.device("cpu"), Timeline(), None)[0]


def found(config: EngineConfig, plan: MemoryPlan, decoder: Decoder) -> dict[int, float]:
    oracle, tokens = trial.load_oracle(config, plan, decoder)
    assert oracle.spec.layers == 1 and len(tokens) == oracle.spec.vocab <= trial.KNOWN
    return dict(trial.deviations(decoder, oracle, tokens, plan, None))


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "int4"}])
def test_right_kernels_pass(tiny: Path, options: dict[str, Any]) -> None:
    off = found(*loaded(tiny, **options))
    assert set(off) == set(trial.STEPS) and all(value < trial.ALLOWED / 2 for value in off.values())


@pytest.mark.parametrize("most", [1, 16])
def test_small_steps(tiny: Path, most: int) -> None:
    off = found(*loaded(tiny, max_num_batched_tokens=most, max_num_seqs=1))
    assert all(value < trial.ALLOWED / 2 for value in off.values())


def test_of_layers_with_experts_one_is_compared(tmp_path: Path) -> None:
    """Though the first layer has none."""
    folder = livelier(fill(write_published(tmp_path, {**GLM4_MOE, "max_position_embeddings": 256}, "none"), "none"))
    config, plan, decoder = loaded(folder, dtype="float32", reference_ops=True)
    assert trial.tried(decoder.spec) == range(1, 2) and all(value < 1e-4 for value in found(config, plan, decoder).values())
    wrong = replace(decoder, ops=replace(decoder.ops, mix=lambda x, mixture, *, norm: x))
    assert all(value > trial.ALLOWED for value in found(config, plan, wrong).values())


def test_of_heads_of_two_kinds_both_are_compared(tmp_path: Path) -> None:
    folder = livelier(fill(write_gemma4(tmp_path, {**GEMMA4, **EXPERTS}, "none"), "none"))
    config, plan, decoder = loaded(folder, dtype="float32", reference_ops=True)
    oracle, tokens = trial.load_oracle(config, plan, decoder)
    assert trial.tried(decoder.spec) == range(1, 3) and oracle.spec.kv_shapes == ((2, 64), (1, 128))
    assert all(off < 1e-4 for _, off in trial.deviations(decoder, oracle, tokens, plan, None))

    def blind(q: Tensor, cache: KVCache, *given: Any, **options: Any) -> Tensor:
        return q if cache.head_dim == 128 else reference.attention(q, cache, *given, **options)

    wrong = replace(decoder, ops=replace(decoder.ops, attention=blind))
    assert all(off > trial.ALLOWED for _, off in trial.deviations(wrong, oracle, tokens, plan, None))


def test_what_layers_are_told_is_compared(tmp_path: Path) -> None:
    """Of the last two of three layers, of which one reads the keys of the other."""
    types = ["full_attention"] * 3
    folder = livelier(fill(write_gemma4(tmp_path, {**GEMMA4, **TOLD, "layer_types": types}, "none"), "none"))
    config, plan, decoder = loaded(folder, dtype="float32", reference_ops=True)
    oracle, tokens = trial.load_oracle(config, plan, decoder)
    assert trial.tried(decoder.spec) == range(1, 3) and oracle.spec.shared == (False, True)
    assert all(off < 1e-4 for _, off in trial.deviations(decoder, oracle, tokens, plan, None))
    assert decoder.inputs is not None and isinstance(decoder.inputs.table, Tensor)
    wrong = replace(decoder, inputs=replace(decoder.inputs, table=decoder.inputs.table.flip(1)))
    assert all(off > trial.ALLOWED for _, off in trial.deviations(wrong, oracle, tokens, plan, None))


def neighbour(ids: Tensor, table: Tensor | Weight, dtype: torch.dtype) -> Tensor:
    return reference.embedding((ids - 1).clamp(min=0), table, dtype)


def shifted(qkv: Tensor, heads: int, cache: KVCache, batch: PagedBatch, cos_sin: Tensor, **norms: Any) -> Tensor:
    """Queries and keys of single tokens are turned as if they stood elsewhere: relative positions are wrong."""
    late = replace(batch, positions=batch.positions * 2)
    return reference.rope_store(qkv, heads, cache, late, cos_sin.repeat(2, 1), **norms)


def forgetful(q: Tensor, cache: KVCache, batch: PagedBatch, **options: Any) -> Tensor:
    return reference.attention(q, cache, batch, **{**options, "window": 8})


def unscaled(x: Tensor, weight: Weight, **options: Any) -> Tensor:
    return reference.matmul(x, weight, **options) * 1.2


WRONG: dict[str, Any] = {"embedding": neighbour, "rope_store": shifted, "attention": forgetful, "matmul": unscaled}


@pytest.mark.parametrize("operator", WRONG)
def test_wrong_kernels_are_found(
    operator: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("APPLIANCE_CACHE_DIR", str(tmp_path))
    config, plan, decoder = loaded(tiny, reference_ops=True)
    prove = trial.prove
    with caplog.at_level("INFO", "appliance.startup"):
        prove(config, plan, decoder)
    assert "computes what the reference does" in caplog.text
    wrong = replace(decoder, ops=replace(decoder.ops, **{operator: WRONG[operator]}))
    prove(config, plan, wrong)  # right once, by the same kernels' text: it is not asked again
    (tmp_path / proofs.FILE).unlink()
    with pytest.raises(trial.CardError, match=r"logits differ from the reference's by \d+% .*--device cpu serves this model"):
        prove(config, plan, wrong)
    assert not (tmp_path / proofs.FILE).exists()


def test_embeddings_and_heads_in_codes(tiny: Path) -> None:
    """The oracle has what the model has: coarse codes are no fault of a card."""
    for options in ({"embedding_dtype": "int4"}, {"lm_head_dtype": "int4", "embedding_dtype": "int8"}):
        config, plan, decoder = loaded(tiny, reference_ops=True, **options)
        assert all(value < 1e-3 for value in found(config, plan, decoder).values()), options
    names = {trial.key(plan, loaded(tiny, embedding_dtype=kind)[2]) for kind in ("model", "int8", "int4")}
    assert len(names) == 3
