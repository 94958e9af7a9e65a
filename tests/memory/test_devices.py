from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from appliance.memory import devices
from appliance.memory.devices import DeviceInfo, cgroup_limits, parse_card, this_device
from quant.errors import InputError

MIB = 1 << 20


def write(path: Path, **files: object) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (path / name.replace("__", ".")).write_text(f"{value}\n")


def group_v2(path: Path, limit: object, usage: int, cache: int = 0) -> None:
    write(path, memory__max=limit, memory__current=usage, memory__stat=f"anon 1\ninactive_file {cache}")


def group_v1(path: Path, limit: int, usage: int, cache: int = 0) -> None:
    write(path, memory__limit_in_bytes=limit, memory__usage_in_bytes=usage, memory__stat=f"cache 1\ntotal_inactive_file {cache}")


def member(tmp_path: Path, text: str) -> Path:
    (tmp_path / "cgroup").write_text(text)
    return tmp_path / "cgroup"


def test_version_2_with_a_limit_on_a_parent(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    group_v2(root / "a" / "b", "max", 10)
    group_v2(root / "a", 1000, 600, cache=100)
    found = cgroup_limits(root, member(tmp_path, "0::/a/b\n"))
    assert found == [(1000, 500)]


def test_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    group_v2(root, 4096, 96)
    assert cgroup_limits(root, member(tmp_path, "0::/docker/0123\n")) == [(4096, 4000)]


def test_version_1_and_hybrid_trees(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    group_v1(root / "memory" / "x", 2000, 1500, cache=200)
    group_v1(root / "memory", 9223372036854771712, 5)  # no limit, as version 1 writes it
    group_v2(root / "unified" / "y", 3000, 1000)
    lines = "4:memory:/x\n3:cpu,cpuacct:/x\n0::/y\n"
    assert sorted(cgroup_limits(root, member(tmp_path, lines))) == [(2000, 700), (3000, 2000)]


def test_more_in_use_than_the_limit_leaves_nothing(tmp_path: Path) -> None:
    group_v2(tmp_path / "fs", 100, 150)
    assert cgroup_limits(tmp_path / "fs", member(tmp_path, "0::/\n")) == [(100, 0)]


def test_without_control_groups(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path / "fs", tmp_path / "absent") == []
    assert cgroup_limits(tmp_path / "fs", member(tmp_path, "0::/a\n")) == []


def test_the_cpu_has_what_the_machine_has_or_the_group_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cgroup_limits", list)
    device = this_device("cpu")
    assert device.kind == "cpu" and device.name
    assert 0 < device.available <= device.total == psutil.virtual_memory().total
    monkeypatch.setattr(devices, "cgroup_limits", lambda: [(64 * MIB, 32 * MIB), (1 << 60, 1 << 60)])
    limited = this_device("cpu")
    assert (limited.total, limited.available) == (64 * MIB, 32 * MIB)


def test_a_card_as_nvidia_smi_describes_it() -> None:
    answer = "NVIDIA GeForce RTX 4090, 8.9, 24564, 23010\nNVIDIA GeForce RTX 3090, 8.6, 24576, 1\n"
    assert parse_card(answer) == DeviceInfo("cuda", "NVIDIA GeForce RTX 4090", 24564 * MIB, 23010 * MIB, capability=89)
    assert parse_card("RTX PRO, 12.0, 97887, 97000").capability == 120
    assert parse_card("some, new card, [N/A], 5, 4") == DeviceInfo("cuda", "some, new card", 5 * MIB, 4 * MIB)
    for text in ("", "No devices were found\n", "card, 8.0, [N/A], 5", "card, 24564, 23010"):
        with pytest.raises(InputError, match="which names no card; use --device cpu"):
            parse_card(text)


def fake_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvidia-smi that answers with the card it was asked for as the name."""
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\nfor a; do case $a in --id=*) echo "card ${a#--id=}, 7.5, 15360, 15000";; esac; done\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_the_first_card_that_cuda_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert this_device("cuda") == DeviceInfo("cuda", "card 0", 15360 * MIB, 15000 * MIB, 75)
    for visible, card in (("3,1", "card 3"), ("GPU-5c1d", "card GPU-5c1d"), ("0", "card 0")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert this_device("cuda").name == card
    for visible in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES hides every card"):
            this_device("cuda")


def test_no_card_and_no_such_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match="--device cuda: no NVIDIA card answers on this machine"):
        this_device("cuda")
    with pytest.raises(InputError, match="--device 'tpu' is not known; auto, cpu and cuda are"):
        this_device("tpu")
