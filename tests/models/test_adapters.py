"""LoRA adapters of every architecture against PEFT in float32: all rows of a step, and some of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from appliance.adapters import spec_of
from appliance.config import EngineConfig
from appliance.memory.devices import DeviceInfo
from appliance.memory.planner import make_plan
from kernels.adapters import Adapted, AdapterWeights
from kernels.cpu import backend
from kernels.ops import KVCache, PagedBatch, get_ops
from models.adapters import load_adapter
from models.decoder import Decoder
from models.loader import load_model
from models.spec import AdapterLimits, ModelSpec
from quant.checkpoint import Checkpoint
from quant.errors import InputError
from tests import warm
from tests.models.test_against_transformers import CASES

LIMITS = AdapterLimits(count=2, rank=8)
OTHERS = ("deepseek", "glm4-moe-lite", "qwen3.5", "qwen3-next", "lfm2", "gpt-oss")  # gpt-oss: its file needs more than the oracle
NAMES = [name for name in CASES if not name.startswith(OTHERS)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    script = (Path(__file__).parent / "adapter_oracle.py").read_text()
    done = warm.run("-c", script, str(folder), input=json.dumps({name: CASES[name] for name in NAMES}), cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def load(folder: Path, name: str, kind: str) -> tuple[Decoder, AdapterWeights, dict[str, torch.Tensor]]:
    expected = load_file(folder / f"{name}.expected.safetensors")
    with Checkpoint.open(folder / name) as checkpoint:
        spec = replace(ModelSpec.from_config(checkpoint.config), adapters=LIMITS)
        ops = get_ops("cpu", reference=kind == "reference")
        decoder = load_model(checkpoint, spec, ops, dtype=torch.float32, max_len=len(expected["ids"]), lm_head_dtype="model")
    adapter = load_adapter(folder / f"{name}-adapter", spec, decoder.ops, dtype=torch.float32, max_rank=LIMITS.rank)
    return decoder, adapter, expected


def feed(decoder: Decoder, ids: torch.Tensor, adapters: list[AdapterWeights | None], *, first: int) -> torch.Tensor:
    """Logits [sequences, T, V] of one text by several, each with its adapter: its first tokens in a step, then all others.

    In the second step rows lie apart: those of an adapter are named one by one.
    """
    spec, count, size = decoder.spec, len(adapters), 8
    blocks = -(-len(ids) // size)
    shapes = [(count * blocks, size, heads.count, heads.size) for heads in spec.by_layer if not heads.shared]
    caches = [KVCache(*(torch.full(shape, float("nan"), dtype=decoder.dtype) for _ in "kv")) for shape in shapes]
    tables = torch.randperm(count * blocks, generator=torch.Generator().manual_seed(count)).view(count, blocks).int()
    forward, out = decoder.bind(caches, max_tokens=count * len(ids)), []
    for start, end in ((0, first), (first, len(ids))):
        positions = torch.arange(start, end)
        length = end - start
        rows = {weights: [n for n, one in enumerate(adapters) if one is weights] for weights in adapters if weights is not None}
        named = {weights: torch.cat([torch.arange(n * length, (n + 1) * length) for n in own]) for weights, own in rows.items()}
        batch = PagedBatch(
            positions=positions.repeat(count),
            slots=(tables[:, positions // size].long() * size + positions % size).flatten(),
            query_starts=torch.arange(0, (count + 1) * length, length, dtype=torch.int32),
            seq_lens=torch.full((count,), end, dtype=torch.int32),
            block_tables=tables[:, : -(-end // size)].contiguous(),
            max_query=length,
            max_seq=end,
            adapters=tuple(Adapted(weights, _rows(own), 0) for weights, own in named.items()),
        )
        hidden = forward(ids[start:end].repeat(count), batch)
        logits = decoder.logits(hidden, torch.full((len(hidden), spec.vocab), float("nan")))
        out.append(logits.view(count, length, -1))
    return torch.cat(out, dim=1)


def _rows(own: torch.Tensor) -> slice | torch.Tensor:
    low, high = int(own[0]), int(own[-1]) + 1
    return slice(low, high) if high - low == len(own) else own


@pytest.mark.parametrize("kind", ["reference", "torch", "native"])
@pytest.mark.parametrize("name", NAMES)
def test_logits(models: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "native" and backend.native() is None:
        pytest.skip("the native extension is not built")
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "auto" if kind == "native" else "torch")
    decoder, adapter, expected = load(models, name, kind)
    wanted = {None: expected["plain"], adapter: expected["adapted"]}
    assert (wanted[None] - wanted[adapter]).abs().max() > 0.1  # the adapter changes something
    for mix in ([adapter], [None, adapter, None, adapter], [None]):
        found = feed(decoder, expected["ids"], mix, first=30)
        for one, weights in zip(found, mix, strict=True):
            assert (one - wanted[weights]).abs().max() < 5e-4, mix


@pytest.mark.parametrize("kind", ["torch", "native"])
@pytest.mark.parametrize("name", NAMES)
def test_every_byte_is_planned(models: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's to the byte; an adapter of the largest rank everywhere takes what was set aside, and no other takes more."""
    if kind == "native" and backend.native() is None:
        pytest.skip("the native extension is not built")
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "auto" if kind == "native" else "torch")
    decoder, adapter, expected = load(models, name, kind)
    config = EngineConfig(
        max_model_len=len(expected["ids"]),
        dtype="float32",
        lm_head_dtype="model",
        max_loras=LIMITS.count,
        max_lora_rank=LIMITS.rank,
    )
    plan = make_plan(models / name, config, DeviceInfo("cpu", "some CPU", 8 << 30, 8 << 30))
    room = plan.weights["adapters"]
    assert plan.weight_bytes - room + plan.scratch["positions"] == decoder.nbytes
    assert 0 < adapter.nbytes <= room // LIMITS.count


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(OTHERS[:-1])])
def test_models_whose_products_are_others_are_refused_by_name(name: str) -> None:
    published = {**CASES[name]["config"], "architectures": [CASES[name]["architecture"]]}
    with pytest.raises(InputError, match="LoRA adapters are not supported for"):
        spec_of(published, EngineConfig(enable_lora=True))
