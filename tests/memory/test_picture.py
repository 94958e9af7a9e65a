"""The memory map: well-formed, to scale, and safe with any name."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from appliance.memory.devices import DeviceInfo
from appliance.memory.fit import fit
from appliance.memory.picture import INNER, MARGIN, WIDTH, memory_map
from appliance.memory.plan import MemoryPlan
from appliance.memory.text import parts_of
from tests.memory.test_plan import DEFAULTS, GIB, LLAMA_8B

SVG = "{http://www.w3.org/2000/svg}"
CARD = DeviceInfo("cuda", "card", 24 * GIB, 23 * GIB, 89)


def plan(device: DeviceInfo = CARD, **changes: object) -> MemoryPlan:
    settings = replace(DEFAULTS, utilization=0.9, max_len=8192, graphs=device.kind == "cuda")
    return fit(LLAMA_8B, replace(settings, **changes), device)  # type: ignore[arg-type]


def rectangles(svg: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(f"{SVG}rect"))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_bar_is_to_scale(kind: str) -> None:
    made = plan(replace(CARD, kind=kind), swap_bytes=GIB)
    bars = [one for one in rectangles(memory_map(made)) if one.find(f"{SVG}title") is not None]
    assert len(bars) == len(parts_of(made))
    x = float(MARGIN)
    for bar, part in zip(bars, parts_of(made), strict=True):
        assert float(bar.get("x", "")) == pytest.approx(x, abs=0.02)
        assert float(bar.get("width", "")) == pytest.approx(INNER * part.nbytes / (24 * GIB), abs=0.01)
        x += INNER * part.nbytes / (24 * GIB)


def test_what_others_hold_is_at_the_end_of_the_bar() -> None:
    def held(device: DeviceInfo) -> list[float]:
        found = [one for one in rectangles(memory_map(plan(device))) if one.get("class") == "held" and one.get("height") == "56"]
        return [float(one.get(key, "")) for one in found for key in ("x", "width")]

    assert held(replace(CARD, available=24 * GIB)) == []
    assert held(replace(CARD, available=18 * GIB)) == pytest.approx([MARGIN + 0.75 * INNER, 0.25 * INNER])


def test_blocks_of_the_pool() -> None:
    def squares(made: MemoryPlan, kind: str) -> int:
        return sum(
            1
            for one in rectangles(memory_map(made))
            if one.get("class") == kind and one.get("rx") == "2" and one.get("width") == "11"
        )

    few = plan(kv_bytes=100 * 2 * 2**20, max_len=512)
    assert few.num_blocks == 100 and (squares(few, "sequence"), squares(few, "other")) == (32, 68)
    many = plan()
    each = -(-many.num_blocks // (squares(many, "sequence") + squares(many, "other")))
    assert squares(many, "sequence") == -(-512 // each)


def test_nothing_leaves_the_page() -> None:
    for made in (plan(), plan(max_len=256, max_seqs=1), plan(replace(CARD, total=5 << 40, available=5 << 40))):
        root = ElementTree.fromstring(memory_map(made, ["facts", "of one line"]))
        _, _, width, height = map(float, root.get("viewBox", "").split())
        assert width == WIDTH
        for one in root.iter(f"{SVG}rect"):
            assert float(one.get("x", "")) >= 0 and float(one.get("x", "")) + float(one.get("width", "")) <= width
            assert float(one.get("y", "")) >= 0 and float(one.get("y", "")) + float(one.get("height", "")) <= height
        for one in root.iter(f"{SVG}text"):
            assert 0 <= float(one.get("x", "")) <= width and 0 < float(one.get("y", "")) < height - 4


def test_names_are_escaped() -> None:
    made = replace(plan(), model='a/<b> & "c"', budget_source="x < y")
    text = memory_map(made, ["1 < 2 & 3"])
    words = [one.text for one in ElementTree.fromstring(text).iter(f"{SVG}text")]
    assert '<b> & "c" on card' in words and "1 < 2 & 3" in words
    assert any("x < y" in (word or "") for word in words)
