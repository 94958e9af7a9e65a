"""An adapter that takes the place of the one that has its name: for those who come, not for those who are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant.errors import InputError
from tests.runtime.conftest import answers, finish, submit
from tests.runtime.test_adapters import Load, adapters, alone, having

__all__ = ["adapters"]


def test_in_place_of_another(load: Load, adapters: dict[str, Path], tmp_path: Path) -> None:
    ids = range(3, 60)
    mine = [having("a", submit(name, ids, max_tokens=20)) for name in ("early", "late", "last")]
    told = alone(load, adapters, [mine[0], having("b", mine[1])])
    engine = load(enable_lora=True, max_loras=2, max_lora_rank=7)
    engine.adapters.load("a", adapters["a"], replace=True)
    engine.submit(mine[0])
    engine.step()
    engine.adapters.load("a", adapters["b"], replace=True)
    engine.submit(mine[1])
    assert len(engine.runner.adapters) == 2, "both are needed"
    with pytest.raises(InputError, match="loaded, 1 of them unloaded, but still in use, a is in use, and --max-loras is 2"):
        engine.adapters.load("a", adapters["a"], replace=True)
    found = {key[0]: [t for event in news for t in event.token_ids] for key, news in finish(engine).items()}
    assert found["early"] == told["early", 0][-len(found["early"]) :] and found["late"] == told["late", 0]
    with pytest.raises(InputError, match=r"has no adapter_config\.json"):
        engine.adapters.load("a", tmp_path, replace=True)
    assert answers(engine, [mine[2]])["last", 0] == told["late", 0], "it stays, where the other one is none"
    assert len(engine.runner.adapters) == 1


def test_no_more_memory_is_taken_than_is_set_aside(load: Load, adapters: dict[str, Path]) -> None:
    """Where nobody has the old one it is gone before the new one is laid out."""
    engine = load(enable_lora=True, max_loras=1, max_lora_rank=7)
    engine.adapters.load("a", adapters["a"])
    pack, held = engine.runner.decoder.ops.pack, []

    def noting(*args: object, **options: object) -> object:
        held.append(len(engine.runner.adapters))
        return pack(*args, **options)  # type: ignore[arg-type]

    object.__setattr__(engine.runner.decoder.ops, "pack", noting)
    engine.adapters.load("a", adapters["b"], replace=True)
    object.__setattr__(engine.runner.decoder.ops, "pack", pack)
    assert held and set(held) == {0} and len(engine.runner.adapters) == 1
    engine.submit(having("a", submit("busy", range(3, 30), max_tokens=4)))
    with pytest.raises(InputError, match="1 LoRA adapters are loaded, a is in use, and --max-loras is 1"):
        engine.adapters.load("a", adapters["a"], replace=True)
    finish(engine)
    engine.adapters.load("a", adapters["a"], replace=True)
