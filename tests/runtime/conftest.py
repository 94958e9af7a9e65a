from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import pytest
import torch

from appliance.config import EngineConfig
from appliance.core.messages import Event, Submit
from appliance.core.params import SamplingParams
from appliance.runtime.engine import Engine
from quant.tensor import QuantTensor
from tests.tiny_model import make_checkpoint

if TYPE_CHECKING:
    from tests.runtime.oracle_engines import Oracle


@pytest.fixture(scope="module", autouse=True)
def dequantized_once() -> Iterator[None]:
    """The reference's products dequantize their weight at every use, to keep nothing: a fifth of what engines over tiny models
    take. Here what came of it stays with the weight."""
    compute, kept = QuantTensor.dequantize, WeakKeyDictionary[QuantTensor, dict[torch.dtype, torch.Tensor]]()

    def dequantize(self: QuantTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        found = kept.setdefault(self, {})
        if dtype not in found:
            found[dtype] = compute(self, dtype)
        return found[dtype]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantTensor, "dequantize", dequantize)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Oracle]:
    """By name, what transformers says of models with states, and of one of latents: one process for all tests."""
    from tests.runtime.oracle_engines import make_oracles  # which takes from here

    return make_oracles(tmp_path_factory.mktemp("states"))


@pytest.fixture
def load(tiny: Path) -> Callable[..., Engine]:
    """An engine over the tiny model with the reference operators in float32, where equality is exact."""

    def make(**options: Any) -> Engine:
        settings = {
            "model": str(tiny),
            "dtype": "float32",
            "reference_ops": True,
            "max_model_len": 256,
            "kv_cache_memory_bytes": 4 << 20,
            "threads": 1,
        }
        return Engine.load(EngineConfig(**{**settings, **options}))

    return make


def submit(name: str, ids: Iterable[int], *, cache_salt: str = "", **params: Any) -> Submit:
    settings = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
    return Submit(name, tuple(ids), SamplingParams(**{**settings, **params}), arrival=0.0, cache_salt=cache_salt)


def finish(engine: Engine, limit: int = 10_000) -> dict[tuple[str, int], list[Event]]:
    """Step until nothing is left; every request must end, and the pool must be whole and empty."""
    events: dict[tuple[str, int], list[Event]] = {}
    for _ in range(limit):
        if not engine.has_work:
            break
        for event in engine.step():
            events.setdefault((event.request_id, event.index), []).append(event)
        engine.check()
    assert not engine.has_work, "requests were left after so many steps"
    assert engine.scheduler.pool.used == 0
    return events


def answers(engine: Engine, submits: Iterable[Submit]) -> dict[tuple[str, int], list[int]]:
    for one in submits:
        engine.submit(one)
    events = finish(engine)
    for news in events.values():
        assert [e.finish_reason is not None for e in news].count(True) == 1 and news[-1].finish_reason
    return {key: [t for e in news for t in e.token_ids] for key, news in events.items()}
