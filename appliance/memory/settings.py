"""The options that decide the memory plan, checked and in plain numbers. Every refusal names the flag and what would work."""

from __future__ import annotations

import math
from dataclasses import dataclass

from appliance.config import GIB, EngineConfig
from appliance.memory.devices import DeviceInfo
from appliance.memory.sizes import LENGTHS, number, parse_bytes, parse_gib
from kernels.layout import ACTIVATIONS, SCALED_CACHES
from quant.errors import InputError

DEFAULT_UTILIZATION = {"cpu": 0.5, "cuda": 0.92}  # of the memory available at start; of a card's total
ITEM_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
BLOCK_SIZES = (8, 16, 32, 64, 128, 256)
_DTYPES = {"half": "float16", "float": "float32", **{name: name for name in ITEM_SIZE}}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a plan is made from, beside the model and the device."""

    utilization: float
    kv_bytes: int | None
    block_size: int
    max_tokens: int  # in one step
    max_seqs: int | None  # None: as many as the memory is good for
    max_len: int | None  # None: the longest that fits
    graphs: bool = False  # whether decode steps are recorded
    kv_dtype: str | None = None  # of a quantized cache; None: that of the activations
    reserve: int = 0  # bytes of the device that stay free beside all else
    swap_bytes: int = 0  # of host memory, for preempted sequences and evicted prefixes
    swaps: bool = False  # whether sequences that give way have to go there
    runtime: int | None = None  # bytes of the process itself, as earlier starts on this device had them; None: an estimate
    layer_bytes: int | None = None  # of a card, for a layer of a recorded step, as earlier starts had it; None: an estimate
    offload_gb: float = 0.0  # GiB of the device to be freed by weights that stay in host memory
    grammars: bool = True  # whether answers may be asked to follow one
    prefixes: bool = True  # whether those of earlier requests are kept while there is room

    @classmethod
    def from_config(cls, config: EngineConfig, device: DeviceInfo) -> Settings:
        """Raises InputError for a value that could not work on any machine."""
        share, reserve = config.gpu_memory_utilization, config.gpu_memory_reserve
        default = DEFAULT_UTILIZATION[device.kind] if reserve is None else 1.0  # a reserve says what is to be left
        utilization = default if share is None else share
        if isinstance(utilization, bool) or not isinstance(utilization, (int, float)) or not 0 < utilization <= 1:
            raise InputError(f"--gpu-memory-utilization is {share!r}: a share of the memory, above 0 and at most 1, is needed")
        if config.activation_dtype not in ACTIVATIONS:
            raise InputError(f"--activation-dtype is {config.activation_dtype!r}: one of {', '.join(ACTIVATIONS)} is needed")
        _at_least_one("--max-num-batched-tokens", config.max_num_batched_tokens)
        given = config.kv_cache_memory_bytes
        return cls(
            utilization=utilization,
            kv_bytes=None if given is None else parse_bytes("--kv-cache-memory-bytes", given, least=1),
            block_size=block_size(config, device.kind),
            max_tokens=config.max_num_batched_tokens,
            max_seqs=_sequences(config.max_num_seqs),
            max_len=parse_length(config.max_model_len),
            graphs=records_steps(config, device.kind),
            kv_dtype=cache_dtype(config.kv_cache_dtype),
            reserve=0 if reserve is None else parse_bytes("--gpu-memory-reserve", reserve),
            swap_bytes=parse_gib("--swap-space", config.swap_space),
            swaps=config.preemption_mode == "swap",
            offload_gb=_offload(config, device.kind),
            grammars=not config.skip_tokenizer_init,
            prefixes=config.enable_prefix_caching,
        )


def parse_length(value: int | str | None) -> int | None:
    """--max-model-len as a number, or None for auto. As with vLLM 32k is 32,000, 32K is 32,768, and -1 or None is auto."""
    text = str(value).strip()
    if value is None or text.lower() == "auto" or text == "-1":
        return None
    length = number(value, LENGTHS)
    if not length >= 2 or length != int(length):
        raise InputError(
            f"--max-model-len is {value!r}: a whole number of at least 2 tokens (a prompt's and an answer's) is needed, "
            "with a suffix if you like (32k = 32,000, 32K = 32,768), or auto"
        )
    return int(length)


def _gib(flag: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value * GIB < math.inf:
        raise InputError(f"{flag} is {value!r}: a number of GiB, 0 or more, is needed")
    return value


def _sequences(value: int | str) -> int | None:
    """--max-num-seqs as a number, or None for auto."""
    if isinstance(value, str) and value.strip().lower() == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"--max-num-seqs is {value!r}: a whole number of at least 1 is needed, or auto")
    return value


def cache_dtype(name: str) -> str | None:
    """--kv-cache-dtype: the name of a quantized cache, or None for the activations' type."""
    if name == "auto":
        return None
    found = "fp8_e4m3" if name == "fp8" else name
    if found not in SCALED_CACHES:
        raise InputError(f"--kv-cache-dtype is {name!r}: one of auto, fp8, {', '.join(SCALED_CACHES)} is needed")
    return found


def records_steps(config: EngineConfig, device_kind: str) -> bool:
    """Whether decode steps are recorded as CUDA graphs.

    Not with the reference operators: they wait for the card, which cannot be recorded. Not where weights are streamed in: such a
    step waits for the bus, and while it does its kernels are launched one by one in no time of their own (docs/gpu.md).
    """
    return device_kind == "cuda" and not config.enforce_eager and not config.reference_ops and not config.cpu_offload_gb


def _offload(config: EngineConfig, device_kind: str) -> float:
    gib = _gib("--cpu-offload-gb", config.cpu_offload_gb)
    if gib and device_kind == "cpu":
        raise InputError(
            f"--cpu-offload-gb is {gib:g}, but on the CPU weights are in host memory anyway: leave it out, or use --device cuda"
        )
    if gib and config.reference_ops:
        raise InputError(f"--cpu-offload-gb is {gib:g}, but the reference operators stream no weights: leave out one of the two")
    return gib


def block_size(config: EngineConfig, device_kind: str) -> int:
    """--block-size. Triton's attention takes up to 64 tokens at a time, and finds them with one look-up in blocks of 64."""
    if config.block_size == "auto":
        return 64 if device_kind == "cuda" and not config.reference_ops else 16
    if config.block_size not in BLOCK_SIZES or not isinstance(config.block_size, int):
        raise InputError(f"--block-size is {config.block_size!r}: auto or one of {', '.join(map(str, BLOCK_SIZES))} is needed")
    return config.block_size


def resolve_dtype(dtype: str, published: str, device: DeviceInfo, *, float16: bool = True) -> str:
    """The type of activations and KV cache.

    auto: on a CPU bfloat16 for checkpoints published in 16 bits (it has no overflow, and CPUs multiply it) and float32 for those
    published in float32; on a card the published one, float16 where that is float32 or the card has no bfloat16. Not ``float16``:
    the model's activations can grow beyond that; bfloat16 takes its place, float32 where the card has none. InputError for a type
    that does not exist, that the card does not have, or that does not hold what the model computes.
    """
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise InputError(f"--dtype {dtype!r} is not known; auto, float16 (half), bfloat16 and float32 (float) are")
        if _DTYPES[dtype] == "bfloat16" and not device.bfloat16:
            raise InputError(
                f"--dtype bfloat16: {device.name} (sm_{device.capability}) has no bfloat16; use --dtype float16, or float32"
            )
        if _DTYPES[dtype] == "float16" and not float16:
            raise InputError(
                f"--dtype {dtype}: this model's activations can grow beyond what float16 holds (65504), and answers be wrong; "
                f"use --dtype {'bfloat16' if device.bfloat16 else 'float32'}"
            )
        return _DTYPES[dtype]
    if device.kind == "cpu":
        return "float32" if published == "float32" else "bfloat16"
    wanted = "float16" if published == "float32" or not device.bfloat16 else published
    return wanted if float16 or wanted != "float16" else "bfloat16" if device.bfloat16 else "float32"


def _at_least_one(flag: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{flag} is {value!r}: a whole number of at least 1 is needed")
