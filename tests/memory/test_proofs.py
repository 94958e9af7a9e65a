"""What --device auto is: a card that has been right once, with this driver, compiler and kernels; else the CPU."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from appliance.config import EngineConfig
from appliance.memory import devices, planner, proofs
from appliance.memory.devices import DeviceInfo
from appliance.memory.plan import PlanError
from appliance.memory.proofs import SEPARATOR, card_key, device_kind, proved, remember, untried, usable_card
from appliance.memory.together import Wish, seats
from quant.errors import InputError
from tests.memory.test_devices import fake_smi
from tests.memory.test_planner import awq_checkpoint
from tests.memory.test_shard import LLAMA_8B


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a card of sm_75, and a torch for cards; torch's version.py is returned."""
    find, told = importlib.util.find_spec, tmp_path / "version.py"
    stand_in: Any = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: stand_in if name == "torch" else find(name))
    monkeypatch.setenv("APPLIANCE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    told.write_text("cuda: Optional[str] = '12.8'\n")
    fake_smi(tmp_path, monkeypatch)
    return told


def test_what_auto_is(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = usable_card()
    assert found is not None and not proved(found)
    assert device_kind("auto") == "cpu" and "card 0 is not used" in str(untried())
    remember(SEPARATOR.join([card_key(found), "float16"]))
    assert device_kind("auto") == "cuda" and untried() is None
    assert device_kind("cpu") == "cpu" and device_kind("cuda") == "cuda"
    monkeypatch.setattr(proofs, "_kernels", lambda: "others")
    assert device_kind("auto") == "cpu"  # it was not these kernels that were right
    with pytest.raises(InputError, match="--device 'tpu' is not known; auto, cpu and cuda are"):
        device_kind("tpu")


def test_the_driver_is_asked_once_in_a_start(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the card, and for who is on it; by all that a start plans. What is free is a moment's: later it is asked again."""
    smi, log = card.with_name("nvidia-smi"), card.with_name("log")
    smi.write_text(smi.read_text().replace("#!/bin/sh", f"#!/bin/sh\necho $1 >> {log}"))
    directory = awq_checkpoint(card.parent, LLAMA_8B)
    config = EngineConfig(model=str(directory), device="cuda")

    def start() -> None:
        assert untried() is not None and device_kind("auto") == "cpu"
        assert planner.make_plan(directory, config).device.name == "card 0"
        seats([Wish(name, directory, replace(config, max_num_seqs=4)) for name in "ab"], config)
        monkeypatch.setattr(proofs, "proved", lambda card: True)
        assert untried() is None and device_kind("auto") == "cuda"
        monkeypatch.setattr(proofs, "proved", proved)

    start()
    assert sorted(log.read_text().split()) == ["--query-gpu=name,compute_cap,memory.total,memory.free", "-q"]
    monkeypatch.setattr(devices, "ANSWER_S", -1.0)
    assert usable_card() is not None
    assert len(log.read_text().split()) == 4


def test_cards_that_are_of_no_use(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card.write_text("cuda: Optional[str] = None\nhip: Optional[str] = '6'\n")
    assert usable_card() is None and untried() is None and device_kind("auto") == "cpu"
    card.write_text("cuda: Optional[str] = '12.8'\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert usable_card() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    smi = card.with_name("nvidia-smi")
    smi.write_text(smi.read_text().replace("7.5", "7.0"))
    assert usable_card() is None  # an older one
    monkeypatch.setenv("PATH", "")
    assert usable_card() is None


def test_no_cache_no_proof(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = usable_card()
    assert found is not None
    monkeypatch.setenv("APPLIANCE_CACHE_DIR", "")
    remember(SEPARATOR.join([card_key(found), "float16"]))
    assert device_kind("auto") == "cpu"
    monkeypatch.setenv("APPLIANCE_CACHE_DIR", str(card.parent / "cache"))
    (card.parent / "cache").mkdir()
    for text in ("{", '{"a": 1}', "[1, 2]"):
        (card.parent / "cache" / proofs.FILE).write_text(text)
        assert device_kind("auto") == "cpu"


def test_a_card_without_room_says_that_there_is_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = DeviceInfo("cuda", "a busy card", 2 << 30, 200 << 20, 86)
    monkeypatch.setattr(planner, "device_kind", lambda choice: "cuda")
    monkeypatch.setattr(
        planner, "this_device", lambda kind: small if kind == "cuda" else DeviceInfo("cpu", "host", 1 << 35, 1 << 34)
    )
    directory = awq_checkpoint(tmp_path, LLAMA_8B)
    with pytest.raises(PlanError, match=r"--device cpu leaves the card alone$"):
        planner.make_plan(directory, EngineConfig(model=str(directory)))
    with pytest.raises(PlanError) as told:
        planner.make_plan(directory, EngineConfig(model=str(directory), device="cuda"))
    assert "--device cpu" not in str(told.value)
