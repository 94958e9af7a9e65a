from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from appliance import doctor
from appliance.memory import devices
from appliance.memory.devices import DeviceInfo, Holder, cgroup_limits, parse_card, parse_holders, this_device
from quant.errors import InputError

MIB, GIB = 1 << 20, 1 << 30


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


def test_the_smaller_of_both_limits_of_version_2(tmp_path: Path) -> None:
    """memory.high is not there on old kernels; the soft limit of version 1 is none."""
    root = tmp_path / "fs"
    for name, limit, high in (("a", 3000, 2000), ("b", 2000, 3000), ("c", "max", 4000), ("d", 5000, "max"), ("e", "max", "max")):
        group_v2(root / name, limit, 500)
        write(root / name, memory__high=high)
    found = {name: cgroup_limits(root, member(tmp_path, f"0::/{name}\n")) for name in "abcde"}
    assert found == {"a": [(2000, 1500)], "b": [(2000, 1500)], "c": [(4000, 3500)], "d": [(5000, 4500)], "e": []}
    group_v1(root / "memory" / "x", 2000, 1500)
    write(root / "memory" / "x", memory__soft_limit_in_bytes=1000)
    assert cgroup_limits(root, member(tmp_path, "4:memory:/x\n")) == [(2000, 500)]


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


def test_memory_that_grows_is_as_large_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in use is in use."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=4 * GIB, available=GIB))
    monkeypatch.setattr(devices, "cgroup_limits", list)
    monkeypatch.setenv("APPLIANCE_RAM", "128GiB")
    found = this_device("cpu")
    assert (found.total, found.available) == (128 * GIB, 125 * GIB)
    monkeypatch.setattr(devices, "cgroup_limits", lambda: [(16 * GIB, 10 * GIB)])
    assert (this_device("cpu").total, this_device("cpu").available) == (16 * GIB, 10 * GIB)
    monkeypatch.setenv("APPLIANCE_RAM", "2GiB")
    assert this_device("cpu").available == 0
    monkeypatch.setenv("APPLIANCE_RAM", "much")
    with pytest.raises(InputError, match="APPLIANCE_RAM is 'much'"):
        this_device("cpu")


def test_a_card_as_nvidia_smi_describes_it() -> None:
    answer = "NVIDIA GeForce RTX 4090, 8.9, 24564, 23010\nNVIDIA GeForce RTX 3090, 8.6, 24576, 1\n"
    assert parse_card(answer) == DeviceInfo("cuda", "NVIDIA GeForce RTX 4090", 24564 * MIB, 23010 * MIB, capability=89)
    assert parse_card("RTX PRO, 12.0, 97887, 97000").capability == 120
    assert parse_card("some, new card, [N/A], 5, 4") == DeviceInfo("cuda", "some, new card", 5 * MIB, 4 * MIB)
    for text in ("", "No devices were found\n", "card, 8.0, [N/A], 5", "card, 24564, 23010"):
        with pytest.raises(InputError, match="which names no card; use --device cpu"):
            parse_card(text)


def test_a_card_that_hides_how_much_is_free() -> None:
    for free in ("[Insufficient Permissions]", "[N/A]", "N/A", "[Unknown Error]"):
        card = parse_card(f"NVIDIA H100 80GB HBM3, 9.0, 81559, {free}")
        assert card.available == card.total == 81559 * MIB


# Recorded: a desktop under Linux (driver 595), Windows (591), an older driver (418), a card in parts (590).
DESKTOP = """
==============NVSMI LOG==============

Timestamp                                 : Fri Jun 26 11:59:44 2026
Driver Version                            : 595.71.05
CUDA Version                              : 13.2

Attached GPUs                             : 1
GPU 00000000:01:00.0
    Processes
        GPU instance ID                   : N/A
        Compute instance ID               : N/A
        Process ID                        : 2165
            Type                          : C+G
            Name                          : /usr/bin/kwin_wayland
            Used GPU Memory               : 25 MiB
        GPU instance ID                   : N/A
        Compute instance ID               : N/A
        Process ID                        : 2496
            Type                          : G
            Name                          : /usr/bin/plasma-keyboard
            Used GPU Memory               : 200 MiB
"""
WINDOWS = r"""
    Processes
        GPU instance ID                   : N/A
        Compute instance ID               : N/A
        Process ID                        : 2056
            Type                          : C+G
            Name                          : C:\Windows\System32\dwm.exe
            Used GPU Memory               : Not available in WDDM driver model
        Process ID                        : 4680
            Type                          : C+G
            Name                          : C:\Program Files\NVIDIA Corporation\NVIDIA GeForce Experience\NVIDIA Share.exe
            Used GPU Memory               : Not available in WDDM driver model
"""
OLDER = """
    Processes
        Process ID                  : 1248
            Type                    : G
            Name                    : /usr/lib/xorg/Xorg
            Used GPU Memory         : 28 MiB
        Process ID                  : 2222
            Type                    : C
            Name                    : /opt/google/chrome/chrome --type=gpu-process --log=/tmp/a/b
            Used GPU Memory         : 46 MiB
"""
HIDDEN = """
    Processes
        Process ID                        : 21180
            Type                          : C
            Name                          : [Insufficient Permissions]
            Used GPU Memory               : 2296 MiB
        Process ID                        : [Insufficient Permissions]
            Type                          : [Insufficient Permissions]
            Name                          : [Insufficient Permissions]
            Used GPU Memory               : [Insufficient Permissions]
        Process ID                        : 42
            Type                          : C
            Name                          :
            Used GPU Memory               : [N/A]
"""


def test_who_else_is_on_the_card() -> None:
    assert parse_holders(DESKTOP) == (Holder(2496, "plasma-keyboard", 200 * MIB), Holder(2165, "kwin_wayland", 25 * MIB))
    assert parse_holders(WINDOWS) == (Holder(2056, "dwm.exe", None), Holder(4680, "NVIDIA Share.exe", None))
    assert parse_holders(OLDER) == (Holder(2222, "chrome", 46 * MIB), Holder(1248, "Xorg", 28 * MIB))
    assert parse_holders(HIDDEN) == (Holder(21180, "unknown", 2296 * MIB), Holder(42, "unknown", None))
    for nothing in ("", "No devices were found", "    Processes                         : None", "Process ID : \nName : x"):
        assert parse_holders(nothing) == ()


def test_the_card_with_its_processes_but_for_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = DESKTOP + f"        Process ID : {os.getpid()}\n Name : python\n Used GPU Memory : 500 MiB\n"
    (tmp_path / "processes").write_text(listed)
    script = tmp_path / "nvidia-smi"
    script.write_text(f'#!/bin/sh\n[ "$1" = -q ] && exec /bin/cat {tmp_path}/processes\necho "card, 8.9, 24564, 23000"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [one.name for one in this_device("cuda").holders] == ["plasma-keyboard", "kwin_wayland"]


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


STUB = r"""
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned flags) { return getenv("STUB_FAILS") ? 999 : 0; }
int cuDeviceGet(int *card, int which) { *card = 7; return which; }
int cuDeviceGetName(char *name, int most, int card) { strncpy(name, "NVIDIA H100 MIG 1g", most); return card != 7; }
int cuDeviceTotalMem_v2(size_t *total, int card) { *total = (size_t)20 << 30; return card != 7; }
int cuDeviceGetAttribute(int *value, int kind, int card) { *value = kind == 75 ? 9 : kind == 76 ? 0 : -1; return card != 7; }
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_a_card_of_which_only_cudas_driver_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No nvidia-smi, or one that does not know what was asked for; and a driver that fails."""
    (tmp_path / "stub.c").write_text(STUB)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "stub.c"], check=True)
    monkeypatch.setattr(devices, "_answers", {})
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5c1d")
    card = DeviceInfo("cuda", "NVIDIA H100 MIG 1g", 20480 * MIB, 20480 * MIB, 90)
    monkeypatch.setenv("PATH", "")
    assert this_device("cuda") == card and doctor.card().startswith("NVIDIA H100 MIG 1g, sm_90, 20.00 GiB of 20.00 GiB free")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 6\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert this_device("cuda") == card
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # in a container with a part of a card
    for total in ("[Insufficient Permissions]", "81559"):  # the first as people report it
        told = f"NVIDIA H100 80GB HBM3, 9.0, {total}, [Insufficient Permissions]"
        (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\ncase $1 in --query*) echo "{told}";; esac\n')
        monkeypatch.setattr(devices, "_answers", {})
        assert this_device("cuda") == card
    monkeypatch.setenv("STUB_FAILS", "1")
    monkeypatch.setattr(devices, "_answers", {})
    assert this_device("cuda") == DeviceInfo("cuda", "NVIDIA H100 80GB HBM3", 81559 * MIB, 81559 * MIB, 90)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 6\n")
    monkeypatch.setattr(devices, "_answers", {})
    with pytest.raises(InputError, match="nor to CUDA's driver; use --device cpu"):
        this_device("cuda")


def test_no_card_and_no_such_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_answers", {})
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match="--device cuda: no NVIDIA card answers on this machine"):
        this_device("cuda")
    with pytest.raises(InputError, match="--device 'tpu' is not known; auto, cpu and cuda are"):
        this_device("tpu")
