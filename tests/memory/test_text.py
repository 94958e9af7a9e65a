"""The plan's text: sums, names, and what stands beside the bars."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace

import pytest

from appliance.memory.devices import DeviceInfo, Holder
from appliance.memory.fit import fit
from appliance.memory.plan import MemoryPlan
from appliance.memory.text import columns, device_lines, parts_of, plan_table, rest_of, size_text
from tests.memory.test_plan import DEFAULTS, GIB, LLAMA_8B

CARD = DeviceInfo("cuda", "card", 24 * GIB, 23 * GIB, 89)


def plan(device: DeviceInfo = CARD, **changes: object) -> MemoryPlan:
    return fit(LLAMA_8B, replace(DEFAULTS, utilization=0.9, max_len=8192, graphs=device.kind == "cuda", **changes), device)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_byte_of_the_device_has_a_name(kind: str) -> None:
    made = plan(replace(CARD, kind=kind), swap_bytes=GIB, max_seqs=300)
    parts = parts_of(made)
    assert sum(part.nbytes for part in parts) == made.total
    assert sum(size for _, size in rest_of(made)) + made.total == 24 * GIB
    assert len({(part.category, part.name) for part in parts}) == len(parts)
    assert any(part.category == "swap space" for part in parts) == (kind == "cpu")
    table = plan_table(made)
    assert ("Host memory" in table) == (kind == "cuda") and ("while loading, at most" in table) == (kind == "cuda")
    assert re.search(r"^  swap space(, 512 blocks)? +1\.00 GiB", table, re.M)
    names = ("in use by others",) if kind == "cpu" else ("held by the driver and others",)
    assert {*names} <= {name for name, _ in rest_of(made)}


def test_sizes() -> None:
    assert [size_text(n) for n in (0, 1023, 1024, 1536, (1 << 20) - 1, 1020 << 20, 24564 << 20)] == [
        "0 bytes", "1023 bytes", "1.00 KiB", "1.50 KiB", "1.00 MiB", "1020.00 MiB", "23.99 GiB",
    ]  # fmt: skip


def test_who_holds_memory_is_named() -> None:
    holders = (Holder(7, "Xorg", 200 << 20), Holder(123, "python", None), *(Holder(n, f"p{n}", None) for n in range(4)))
    lines = device_lines(replace(CARD, holders=holders))
    assert lines[1] == (
        "  1.00 GiB held by the driver and others: Xorg (pid 7, 200.00 MiB), python (pid 123), p0 (pid 0), p1 (pid 1), p2 (pid 2)"
        " and 1 more"
    )
    assert len(device_lines(CARD)) == 1


def test_the_cache_s_own_type_is_told() -> None:
    assert "activations and KV cache in float16, head" in plan_table(plan())
    assert "activations in float16, KV cache in int8, head" in plan_table(plan(kv_dtype="int8"))


def test_bars_where_the_terminal_has_no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.search(r"^  total .*█", plan_table(plan()), re.M)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    table = plan_table(plan())
    assert table.isascii() and re.search(r"^  total .* #{29,30}$", table, re.M)


def test_columns() -> None:
    assert columns(("a", "bb"), [("1", "x" * 14)]) == [f"  {'a':>12}  {'bb':>14}", f"  {'1':>12}  {'x' * 14}"]
