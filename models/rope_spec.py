"""Rotary embeddings as configs describe them: old style (rope_theta beside rope_scaling) and new (rope_parameters). No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.family import Architecture
from models.fields import Fields
from quant.errors import InputError

ALIASES = {"su": "longrope", "mrope": "default"}  # Phi-3's first releases; Qwen2-VL's, which for text alone is the plain one
KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "short_factor", "long_factor", "attention_factor"),
    "proportional": ("factor",),
}  # fmt: skip
REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "proportional": (),
}
COMMON = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "llama_4_scaling_beta"}
# Keys that other kinds use and that published configs carry along; transformers passes over them too. And how positions in a
# picture are spread over the features.
IDLE = {"finetuned", "short_mscale", "long_mscale", "max_position_embeddings", "mrope_section", "mrope_interleaved"}
IDLE |= {key for keys in KEYS.values() for key in keys}


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding. ``rotary_dim`` features of each head rotate; the kinds and their parameters are transformers'."""

    kind: str  # default, linear, dynamic, llama3, yarn, longrope, proportional; or none, which rotates nothing
    theta: float
    rotary_dim: int
    max_position: int  # max_position_embeddings
    factor: float = 1.0
    original_max_position: int = 0  # set for llama3, yarn and longrope
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    query_beta: float = 0.0
    """Queries at position p are multiplied by 1 + query_beta * log(1 + p // query_span), as in Llama 4."""
    query_span: int = 0
    spread: int = 0
    """proportional: features of a head, over all of which frequencies are spread, and whose halves turn against each other: of
    each the first rotary_dim / 2. Loaded models have these before the rest (models/order.py)."""

    @property
    def max_len(self) -> int:
        """The longest context these positions were scaled for: as vLLM derives it from the same keys."""
        if self.kind in ("linear", "dynamic"):
            return int(self.max_position * self.factor)
        if self.kind == "yarn":
            return max(self.max_position, int(self.original_max_position * self.factor))
        return self.max_position


def by_layer_type(config: Fields, theta: float, local_theta: float) -> tuple[Fields, Fields]:
    """Configs that have the settings of layers that see everything alone, and those of layers with a window (Gemma 3, OLMo 3).

    The old style scales the former only, and may have a key of its own for the base of the latter. Where nothing is said, the
    bases are ``theta`` and ``local_theta``.
    """
    if config.get("rope_parameters") and config.get("rope_scaling"):
        raise InputError("config.json has both rope_parameters and rope_scaling: write all of them into rope_parameters")
    given = config.get("rope_parameters") or {"full_attention": config.get("rope_scaling")}
    if not isinstance(given, Mapping) or not set(given) <= {"full_attention", "sliding_attention"}:
        raise InputError(f"config.json: rope_parameters is {given!r:.60}, expected full_attention and sliding_attention in it")
    bases = {
        "full_attention": config.number("rope_theta", default=theta, above=1),
        "sliding_attention": config.number("rope_local_base_freq", default=local_theta, above=1),
    }
    whole, local = (
        Fields({**config.values, "rope_scaling": None, "rope_parameters": given.get(kind), "rope_theta": base})
        for kind, base in bases.items()
    )
    return whole, local


def by_alpha(config: Fields, head_dim: int, theta: float) -> Fields:
    """The same where what is called dynamic has an alpha (Hunyuan): a base that was stretched by it once, for any length."""
    rope = Fields(dict(_settings(config)), "rope settings of config.json")
    if not rope.get("alpha") or (rope.get("rope_type") or rope.get("type")) != "dynamic":
        return config
    base = rope.number("rope_theta", default=config.number("rope_theta", default=theta, above=1), above=1)
    stretched = base * rope.number("alpha") ** (head_dim / (head_dim - 2))
    return Fields({**config.values, "rope_parameters": None, "rope_scaling": {"rope_type": "default", "rope_theta": stretched}})


def read_rope(
    config: Fields, head_dim: int, max_position: int, theta: float = 10000.0, whole: str = "", yarn: str = "yarn"
) -> RopeSpec:
    """``theta``: where the config says none; ``whole``: the name of a family of which all features of a head rotate; ``yarn``:
    the kind that the family calls so, as Phi-3 did its own.

    InputError, naming the key, for a kind or value that is not known, or of which no frequencies can be made.
    """
    raw = _settings(config)
    rope = Fields(dict(raw), "rope settings of config.json")
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    kind = yarn if kind == "yarn" else ALIASES.get(kind, kind)
    if kind not in KEYS or any(isinstance(value, Mapping) for value in raw.values()):
        nested = "settings by layer type" if kind in KEYS else repr(kind)
        raise InputError(f"config.json: rope type {nested} is not supported; supported are {', '.join(KEYS)}")
    unknown = sorted(set(raw) - COMMON - IDLE)
    if unknown:
        raise InputError(f"config.json: rope settings hold {unknown[0]!r}, which the {kind} kind does not know")
    theta = rope.number("rope_theta", default=config.number("rope_theta", default=theta, above=1), above=1)
    rotary = _rotary(config, rope, head_dim, "" if kind == "proportional" else whole)
    values = _scaling(kind, rope, config, rotary)
    if kind == "proportional":
        values["spread"] = head_dim
    if beta := _or_zero("llama_4_scaling_beta", rope):
        values |= {"query_beta": beta, "query_span": rope.integer("original_max_position_embeddings")}
    found = RopeSpec(kind=kind, theta=theta, rotary_dim=rotary, max_position=max_position, **values)
    _check(found)
    return found


def check_rope(kind: Architecture, rope: RopeSpec, name: str) -> None:
    """InputError for what a family, the architecture of this name, does not have."""
    if rope.query_beta and not kind.scaled_queries:
        raise InputError(f"config.json: llama_4_scaling_beta = {rope.query_beta} is not supported for {name}")
    if kind.late_qk_norm and rope.kind in ("yarn", "longrope"):  # these make what rotates larger, too
        raise InputError(f"config.json: rope type {rope.kind} is not supported for {name}")


def _rotary(config: Fields, rope: Fields, head_dim: int, whole: str) -> int:
    """How many features of a head rotate. Of a share where all do, transformers makes nothing or an error, and vLLM a share."""
    share = 1.0 if whole or config.get("rotary_dim") is None else config.integer("rotary_dim") / head_dim  # as in MiniMax M2
    partial = rope.number("partial_rotary_factor", default=config.number("partial_rotary_factor", default=share))
    if partial > 1 or (whole and partial != 1):
        expected = f"1: all features of a head rotate in a {whole}" if whole else "a positive number of at most 1"
        raise InputError(f"config.json: partial_rotary_factor is {partial}, expected {expected}")
    rotary = int(head_dim * partial)
    if rotary < 2 or rotary % 2:
        raise InputError(
            f"config.json: partial_rotary_factor {partial} of head size {head_dim} gives {rotary} rotary features, "
            "expected an even number of at least 2"
        )
    return rotary


def _settings(config: Fields) -> Mapping[str, Any]:
    """rope_scaling where a config has both, as transformers does, which then takes no theta from rope_parameters."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    for key, raw in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(raw, Mapping):
            raise InputError(f"config.json: {key} is {raw!r:.60}, expected an object or null")
    if new and old and new.get("rope_theta") is not None and old.get("rope_theta", config.get("rope_theta")) is None:
        raise InputError(
            "config.json has both rope_parameters and rope_scaling, and a rope_theta in the first only, where transformers would "
            "pass over it: write all of them into rope_parameters, and remove rope_scaling"
        )
    return old or new


def _scaling(kind: str, rope: Fields, config: Fields, rotary: int) -> dict[str, Any]:
    """The keys of one kind, checked; nothing for the default."""
    values: dict[str, Any] = {}
    max_position = config.integer("max_position_embeddings")
    for key in KEYS[kind]:
        given = rope.get(key)
        if given is None:
            if key in REQUIRED[kind]:
                raise InputError(f"config.json: rope type {kind} needs {key!r} and it is missing")
        elif key.endswith("_factor") and key.split("_")[0] in ("short", "long"):
            values[key] = _factors(key, given, rotary)
        elif key == "truncate":
            values[key] = rope.flag(key, default=True)
        elif key == "original_max_position_embeddings":
            values["original_max_position"] = rope.integer(key)
        else:
            values[key] = _or_zero(key, rope) if key.startswith("mscale") else rope.number(key)
    if "original_max_position_embeddings" in KEYS[kind]:
        # The model's own key wins over the one among the rope settings, as in transformers.
        own = config.integer("original_max_position_embeddings", default=0)
        values["original_max_position"] = own or values.get("original_max_position", max_position)
        values.setdefault("factor", max_position / values["original_max_position"])
    return values


def _or_zero(key: str, rope: Fields) -> float:
    """A number of which 0 says that there is none."""
    return 0.0 if rope.get(key) in (None, 0) else rope.number(key)


def _factors(key: str, given: Any, rotary: int) -> tuple[float, ...]:
    if not isinstance(given, list) or len(given) != rotary // 2:
        found = f"{len(given)} values" if isinstance(given, list) else repr(given)[:40]
        raise InputError(f"config.json: rope {key} has {found}, expected {rotary // 2} positive numbers")
    values = Fields({f"{key}[{place}]": one for place, one in enumerate(given)}, "rope settings of config.json")
    return tuple(values.number(name) for name in values.values)


def _check(rope: RopeSpec) -> None:
    """InputError for values that are fine each, and of which together implementations make nothing, or different things."""
    original = rope.original_max_position
    if rope.kind == "dynamic" and rope.rotary_dim < 4:
        raise InputError(f"config.json: rope type dynamic needs 4 rotary features or more, and heads have {rope.rotary_dim}")
    if rope.kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise InputError(
            f"config.json: rope type llama3 has a low_freq_factor of {rope.low_freq_factor} and a high_freq_factor of "
            f"{rope.high_freq_factor}, expected the first to be less than the second"
        )
    if rope.kind == "longrope" and original < 2:
        raise InputError(f"config.json: rope type longrope has {original} original_max_position_embeddings, expected at least 2")
    if rope.kind == "yarn":
        if rope.beta_fast < rope.beta_slow:
            raise InputError(
                f"config.json: rope type yarn has a beta_fast of {rope.beta_fast} and a beta_slow of {rope.beta_slow}, "
                "expected the first to be no less than the second"
            )
        # Beyond these the ramp between features that turn fast and those that turn slowly would run backwards.
        least = 2 * math.pi * rope.beta_slow
        most = 2 * math.pi * rope.beta_fast * rope.theta ** (2 - 2 / rope.rotary_dim)
        if not least <= original <= most:
            raise InputError(
                f"config.json: rope type yarn has {original} original_max_position_embeddings, expected {math.ceil(least)} to "
                f"{math.floor(most)} for a beta_slow of {rope.beta_slow}, a beta_fast of {rope.beta_fast} and a rope_theta of "
                f"{rope.theta}"
            )
    if rope.max_len < 1:
        raise InputError(
            f"config.json: a rope factor of {rope.factor} leaves no position of {rope.max_position} max_position_embeddings"
        )
