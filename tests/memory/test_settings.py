from __future__ import annotations

import math
from dataclasses import replace

import pytest

from appliance.config import EngineConfig
from appliance.memory.devices import DeviceInfo
from appliance.memory.fit import budget_of, fit
from appliance.memory.options import Variants, options
from appliance.memory.settings import Settings, parse_length, resolve_dtype
from quant.errors import InputError
from tests.memory.test_plan import DEFAULTS, LLAMA_8B

CPU, CARD = DeviceInfo("cpu", "c", 8 << 30, 4 << 30), DeviceInfo("cuda", "g", 8 << 30, 8 << 30)


def test_defaults() -> None:
    assert Settings.from_config(EngineConfig(), CPU) == Settings(
        utilization=0.5, kv_bytes=None, block_size=16, max_tokens=2048, max_seqs=None, max_len=None
    )
    card = Settings.from_config(EngineConfig(), CARD)
    assert (card.utilization, card.block_size) == (0.92, 64)


def test_block_sizes() -> None:
    """The number that was given; auto is the one that a device's attention likes best."""
    for device in (CPU, CARD):
        for size in (8, 16, 64, 256):
            assert Settings.from_config(EngineConfig(block_size=size), device).block_size == size
    assert Settings.from_config(EngineConfig(reference_ops=True), CARD).block_size == 16


@pytest.mark.parametrize(
    ("field", "flag", "bad"),
    [
        ("gpu_memory_utilization", "--gpu-memory-utilization", (0, 0.0, -0.1, 1.0001, 1.5, math.nan, math.inf, "0.5", True)),
        ("block_size", "--block-size", (0, -16, 1, 4, 24, 512, 16.0, "16", "Auto", None, True)),
        ("max_num_batched_tokens", "--max-num-batched-tokens", (0, -1, 2.5, True, "64")),
        ("max_num_seqs", "--max-num-seqs", (0, -1, 2.5, None, True, "8", "many")),
        ("kv_cache_memory_bytes", "--kv-cache-memory-bytes", (0, -1, 1e9, "4PiB", "0.5", "1.5", "", True, "-1G")),
        ("gpu_memory_reserve", "--gpu-memory-reserve", (-1, 1e9, "4 GiB free", "0.3", "", False, "all")),
        ("swap_space", "--swap-space", (-1, math.nan, math.inf, "-4G", "much", "1e3", "", True, None)),
        ("cpu_offload_gb", "--cpu-offload-gb", (-0.5, math.nan, "4", False)),
        ("max_model_len", "--max-model-len", (0, 1, -2, "", "long", "32kb", "1.5", 1.5, "nan", True, "1_0", "٣٣")),
    ],
)
def test_values_that_could_not_work_are_refused_by_flag(field: str, flag: str, bad: tuple[object, ...]) -> None:
    for value in bad:
        with pytest.raises(InputError) as error:
            Settings.from_config(EngineConfig(**{field: value}), CPU)
        assert str(error.value).startswith(f"{flag} is {value!r}: ") and str(error.value).endswith(("needed", "auto"))


def test_sizes_in_bytes() -> None:
    """K, M and G are binary, k, m and g decimal, as for --max-model-len; with B they are what they are called."""
    for given, expected in (
        (4096, 4096),
        ("4096", 4096),
        ("2K", 2048),
        ("2k", 2000),
        ("1.5G", 3 << 29),
        ("3g", 3 * 10**9),
        ("5M", 5 << 20),
        ("64MiB", 64 << 20),
        ("64 mib", 64 << 20),
        ("1.5GiB", 3 << 29),
        ("2KB", 2000),
        ("3gb", 3 * 10**9),
        ("1T", 1 << 40),
        ("2TB", 2 * 10**12),
    ):
        config = EngineConfig(kv_cache_memory_bytes=given, gpu_memory_reserve=given)
        settings = Settings.from_config(config, CARD)
        assert (settings.kv_bytes, settings.reserve) == (expected, expected)
        if str(given)[-1] not in "0123456789":  # without a unit it is GiB, as it always was
            assert Settings.from_config(EngineConfig(swap_space=given), CARD).swap_bytes == expected
    for gib in (4, 4.0, "4", "4.0"):
        assert Settings.from_config(EngineConfig(swap_space=gib), CARD).swap_bytes == 4 << 30
    assert Settings.from_config(EngineConfig(swap_space=0.5, cpu_offload_gb=1.5), CARD).swap_bytes == 1 << 29
    assert Settings.from_config(EngineConfig(swap_space=4), CARD).swap_bytes == 4 << 30


def test_a_reserve_says_what_is_left() -> None:
    """All but that may be taken, unless a share is given too."""
    for device, default in ((CPU, 0.5), (CARD, 0.92)):
        assert Settings.from_config(EngineConfig(), device).utilization == default
        for reserve in (0, "1G"):
            assert Settings.from_config(EngineConfig(gpu_memory_reserve=reserve), device).utilization == 1
        both = Settings.from_config(EngineConfig(gpu_memory_reserve="1G", gpu_memory_utilization=0.8), device)
        assert (both.utilization, both.reserve) == (0.8, 1 << 30)


def test_a_size_of_the_cache_decides_alone() -> None:
    """As in vLLM: a share that is given, too, counts for nothing, and the plan says so."""
    for device in (CPU, CARD):
        given = Settings.from_config(EngineConfig(kv_cache_memory_bytes="1MiB"), device)
        both = Settings.from_config(EngineConfig(kv_cache_memory_bytes="1MiB", gpu_memory_utilization=0.01), device)
        assert budget_of(both, device) == budget_of(given, device)
        assert "as --kv-cache-memory-bytes 1048576 decides, not --gpu-memory-utilization, less" in budget_of(both, device)[1]


def test_swapping_needs_room_for_a_block() -> None:
    """Or --preemption-mode swap would be taken and never done; nor does a refusal name such a remedy."""
    device = DeviceInfo("cpu", "c", 64 << 30, 64 << 30)
    block = 16 * 2 * LLAMA_8B.layers * LLAMA_8B.kv_heads * LLAMA_8B.head_dim * 2
    for size, plain in ((block, True), (block - 1, False), (0, False)):
        chosen = replace(DEFAULTS, swap_bytes=size)
        assert fit(LLAMA_8B, chosen, device).swap_blocks == (1 if plain else 0)
        if plain:
            assert fit(LLAMA_8B, replace(chosen, swaps=True), device).swap_blocks == 1
            continue
        with pytest.raises(InputError, match=r"^--preemption-mode is swap, but --swap-space is .*, and one block has 2.00 MiB"):
            fit(LLAMA_8B, replace(chosen, swaps=True), device)
    assert Settings.from_config(EngineConfig(preemption_mode="swap", swap_space=1), CPU).swaps
    for swaps in (False, True):
        found = options(LLAMA_8B, replace(DEFAULTS, swap_bytes=1 << 30, swaps=swaps), device, Variants())
        sizes = next(list(one.values) for one in found if "swap_bytes" in one.change(1))
        assert sizes == ([3, 2, 1] if swaps else [3, 2, 1, 0])


def test_sequences() -> None:
    for given, expected in (("auto", None), ("Auto", None), (1, 1), (300, 300)):
        assert Settings.from_config(EngineConfig(max_num_seqs=given), CPU).max_seqs == expected


@pytest.mark.parametrize("share", [1, 1.0, 0.001, 0.92])
def test_shares_that_are_fine(share: float) -> None:
    assert Settings.from_config(EngineConfig(gpu_memory_utilization=share), CPU).utilization == share


@pytest.mark.parametrize(
    ("value", "length"),
    [
        ("auto", None),
        ("Auto", None),
        (-1, None),
        (None, None),
        ("-1", None),
        (4096, 4096),
        (" 4096 ", 4096),
        ("32k", 32_000),
        ("32K", 32_768),
        ("25.6k", 25_600),
        ("0.5K", 512),
        ("1m", 10**6),
        ("1M", 2**20),
        (2, 2),
    ],
)
def test_lengths(value: int | str | None, length: int | None) -> None:
    assert parse_length(value) == length


@pytest.mark.parametrize(
    ("asked", "published", "cpu", "card"),
    [
        ("auto", "float16", "bfloat16", "float16"),
        ("auto", "bfloat16", "bfloat16", "bfloat16"),
        ("auto", "float32", "float32", "float16"),
        ("half", "float32", "float16", "float16"),
        ("float", "float16", "float32", "float32"),
        ("bfloat16", "float32", "bfloat16", "bfloat16"),
    ],
)
def test_dtypes(asked: str, published: str, cpu: str, card: str) -> None:
    assert resolve_dtype(asked, published, CPU) == cpu
    assert resolve_dtype(asked, published, CARD) == resolve_dtype(asked, published, replace(CARD, capability=80)) == card


def test_a_card_without_bfloat16() -> None:
    turing = replace(CARD, name="NVIDIA T4", capability=75)
    for published in ("bfloat16", "float16", "float32"):
        assert resolve_dtype("auto", published, turing) == "float16"
    assert resolve_dtype("float", "bfloat16", turing) == "float32" and resolve_dtype("half", "bfloat16", turing) == "float16"
    with pytest.raises(
        InputError, match=r"--dtype bfloat16: NVIDIA T4 \(sm_75\) has no bfloat16; use --dtype float16, or float32"
    ):
        resolve_dtype("bfloat16", "float16", turing)


def test_a_model_too_wide_for_float16() -> None:
    turing = replace(CARD, name="NVIDIA T4", capability=75)
    for published in ("bfloat16", "float16", "float32"):
        assert resolve_dtype("auto", published, CARD, float16=False) == "bfloat16"
        assert resolve_dtype("auto", published, turing, float16=False) == "float32"
        for device, instead in ((CPU, "bfloat16"), (CARD, "bfloat16"), (turing, "float32")):
            with pytest.raises(InputError, match=rf"--dtype half: .* beyond what float16 holds .* use --dtype {instead}"):
                resolve_dtype("half", published, device, float16=False)
    assert resolve_dtype("auto", "float16", CPU, float16=False) == "bfloat16"


def test_an_unknown_dtype() -> None:
    with pytest.raises(
        InputError, match=r"--dtype 'int8' is not known; auto, float16 \(half\), bfloat16 and float32 \(float\) are"
    ):
        resolve_dtype("int8", "float16", CPU)
