"""How products are launched: the rule for cards without a table, tables and what is wrong with them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kernels import configs
from kernels.configs import Launch
from kernels.layout import TRITON_SPLIT_OUTPUTS, TRITON_SPLIT_ROWS
from kernels.tune import choices, choose
from quant.errors import InputError

CARD = "NVIDIA Imaginary 1"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs.table.cache_clear()
    yield tmp_path
    configs.table.cache_clear()


def entry(**changes: Any) -> dict[str, Any]:
    return {"block_m": 16, "block_n": 64, "split": 4, "warps": 2, "stages": 5, "microseconds": 3.25} | changes


def write(folder: Path, launches: Any, **changes: Any) -> Path:
    path = folder / "nvidia-imaginary-1.json"
    path.write_text(json.dumps({"card": CARD, "capability": 90, "multiprocessors": 132, "launches": launches} | changes))
    return path


def test_a_table_is_used_for_what_it_knows(folder: Path) -> None:
    write(folder, {"w4 fp16": {"256x384": {"64": entry(split=1), "8": entry()}}})
    shape = {"outputs": 256, "inputs": 384, "kind": "w4 fp16"}
    card = {"multiprocessors": 132, "capability": 90, "name": CARD}
    assert choose(rows=1, **shape, **card) == choose(rows=8, **shape, **card) == Launch(16, 64, 4, 2, 5)
    assert choose(rows=9, **shape, **card) == choose(rows=64, **shape, **card) == Launch(16, 64, 1, 2, 5)
    plain = card | {"name": ""}
    for other in ({"rows": 65}, {"kind": "w8 fp16"}, {"outputs": 257}, {"inputs": 128}):
        asked = {"rows": 8} | shape | other
        assert choose(**asked, **card) == choose(**asked, **plain), other
    assert choose(rows=8, **shape, **card | {"name": "NVIDIA Imaginary 2"}) == choose(rows=8, **shape, **plain)


def test_a_table_is_read_once_and_not_at_import(folder: Path) -> None:
    path = write(folder, {"w4 fp16": {"256x384": {"8": entry()}}})
    asked = {"rows": 1, "outputs": 256, "inputs": 384, "kind": "w4 fp16", "name": CARD}
    first = choose(**asked)
    path.write_text("{")
    assert choose(**asked) == first
    code = (
        "import sys; sys.addaudithook(lambda e, a: e == 'open' and str(a[0]).endswith('.json') and print(a)); import kernels.tune"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == ""


@pytest.mark.parametrize(
    ("launches", "field"),
    [
        ([], "launches"),
        ({"w5": {}}, "launches.w5"),
        ({"w4 fp16": {"256": {}}}, "launches.w4 fp16.256"),
        ({"w4 fp16": {"256x384": {"0": entry()}}}, "launches.w4 fp16.256x384.0"),
        ({"w4 fp16": {"256x384": {"1": entry(block_m=24)}}}, "launches.w4 fp16.256x384.1.block_m"),
        ({"w4 fp16": {"256x384": {"1": entry(split="2")}}}, "launches.w4 fp16.256x384.1.split"),
        ({"w4 fp16": {"256x384": {"64": entry(split=8)}}}, "launches.w4 fp16.256x384.64.split"),
        ({"w4 fp16": {"256x384": {"1": entry(stages=True)}}}, "launches.w4 fp16.256x384.1.stages"),
        ({"w4 fp16": {"256x384": {"1": {"block_m": 16}}}}, "launches.w4 fp16.256x384.1.block_n"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, launches: Any, field: str) -> None:
    path = write(folder, launches)
    with pytest.raises(InputError, match=rf"{path}: {field}:"):
        choose(rows=1, outputs=256, inputs=384, kind="w4 fp16", name=CARD)


def test_foreign_and_damaged_files(folder: Path) -> None:
    path = write(folder, {}, card="NVIDIA imaginary 1")
    with pytest.raises(InputError, match=rf"{path}: card is 'NVIDIA imaginary 1': a table of '{CARD}'"):
        choose(rows=1, outputs=256, inputs=384, name=CARD)
    write(folder, {}, capability="9.0")
    with pytest.raises(InputError, match=r"capability: '9\.0' is no int"):
        choose(rows=1, outputs=256, inputs=384, name=CARD)
    for damaged in ("{", "[]", ""):
        path.write_text(damaged)
        with pytest.raises(InputError, match=str(path)):
            choose(rows=1, outputs=256, inputs=384, name=CARD)


def test_the_rule() -> None:
    def rule(rows: int, outputs: int = 4096, capability: int = 89) -> Launch:
        return choose(rows=rows, outputs=outputs, inputs=4096, capability=capability)

    assert [rule(rows).block_m for rows in (1, 16, 17, 32, 33, 64)] == [16, 16, 32, 32, 64, 64]
    assert rule(1).split == 8 and rule(1, outputs=1 << 20).split == 1
    assert [rule(rows).split for rows in (16, 32, 33, 64)] == [8, 8, 4, 4] and rule(64, outputs=28672).split == 1
    assert [rule(64, capability=capability).warps for capability in (80, 86, 90, 100, 120)] == [8, 8, 4, 4, 8]
    for rows in range(2, 300):
        assert rule(rows).split == 1 or rule(rows).split * rows <= TRITON_SPLIT_ROWS
    assert rule(65).group and not rule(64).group
    assert [rule(rows, capability=90).slab for rows in (256, 257)] == [False, True]
    assert not any(rule(rows, capability=capability).slab for rows in (65, 256, 257, 8192) for capability in (86, 89, 120))
    assert rule(1, outputs=TRITON_SPLIT_OUTPUTS).split == 1


def test_sums_in_float16_only_where_asked_for(folder: Path) -> None:
    write(folder, {"w4 fp16": {"256x384": {"128": entry(block_m=64, split=1, group=8, half=True)}}}, capability=89)
    asked = {"outputs": 256, "inputs": 384, "kind": "w4 fp16", "capability": 89}
    for name in (CARD, ""):
        assert [choose(rows=100, **asked, name=name, half=half).half for half in (False, True)] == [False, True]
    assert not any(choose(rows=rows, **asked, half=True).half for rows in (1, 64))
    assert not any(choose(rows=100, **asked | {"capability": capability}, half=True).half for capability in (75, 80, 90))
    assert {one.half for one in choices(89)} == {False, True} and {one.half for one in choices(90)} == {False}


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 120])
def test_choices_are_all_there_is(folder: Path, capability: int) -> None:
    write(folder, {"w8 bf16": {"256x384": {"8": entry(), "200": entry(block_m=128, split=1, group=8)}}}, capability=89)
    every = set(choices(capability, "w8 bf16"))
    assert len(every) == len(list(choices(capability, "w8 bf16")))
    name = CARD if capability == 89 else ""
    for rows in (*range(1, 70), 128, 129, 200, 256, 257, 5000):
        for outputs in (64, 256, 4096, 50000):
            found = choose(rows=rows, outputs=outputs, inputs=384, kind="w8 bf16", capability=capability, name=name)
            assert any(one.split > 1 == (found.split > 1) or one == found for one in every)
            assert Launch(**{**vars(found), "split": min(found.split, 2)}) in every, (rows, outputs, found)
