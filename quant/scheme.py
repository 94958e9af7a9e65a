"""What a checkpoint's quantization settings mean, module by module (no torch, no weight read).

The settings come from config.json, from a file beside it (see BESIDE), or, without either, from the tensors themselves.
Where the headers are known (``index``), they decide which modules are quantized: the lists in configs are imprecise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quant import configs
from quant.detect import awq_layout, detect, family
from quant.errors import CheckpointError, InputError
from quant.headers import CheckpointIndex, TensorInfo, published, read_json
from quant.rules import DENSE, ONLINE, Rule, Settings, WeightScheme

__all__ = ["DENSE", "QuantScheme", "Rule", "WeightScheme", "load_configs", "read_scheme"]

ALIASES = {
    "awq": "awq", "auto_awq": "awq", "autoawq": "awq", "awq_marlin": "awq", "llm-awq": "awq",
    "gptq": "gptq", "auto_gptq": "gptq", "autogptq": "gptq", "gptq_marlin": "gptq", "gptqmodel": "gptq",
    "auto-round": "auto-round", "auto_round": "auto-round", "autoround": "auto-round", "intel/auto-round": "auto-round",
    "inc": "auto-round",  # vLLM's name for it
    "compressed-tensors": "compressed-tensors", "compressed_tensors": "compressed-tensors",
    "fp8": "fp8", "fbgemm_fp8": "fp8", "mxfp4": "mxfp4", "modelopt": "modelopt", "modelopt_fp4": "modelopt",
    "none": "none",
}  # fmt: skip
BESIDE = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Of AutoGPTQ and GPTQModel, of early versions of AutoAWQ, and of ModelOpt."""
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FLOATS = ("F16", "BF16", "F32", "F64")
TIED = [["Mistral3ForConditionalGeneration"], ["Gemma3ForConditionalGeneration"], ["Gemma4ForConditionalGeneration"]]
IN_LAYER = re.compile(r"(^|\.)\d+(\.|$)")
EXACT = ("gate", "router", "wg", "proj", "shared_expert_gate", "in_proj_a", "in_proj_b", "in_proj_ba", "kv_b_proj")
"""Small ones that are not rounded while they are loaded: what routers of mixtures choose should be what the model chose, and what
states remember should last as long. And kv_b_proj, which is kept dense whatever it was (models/latent.py)."""


@dataclass(frozen=True)
class QuantScheme:
    """The quantization of a whole checkpoint."""

    method: str  # awq, gptq, auto-round, compressed-tensors, fp8, mxfp4, modelopt, none; int8, int4: rounded while it is loaded
    rules: tuple[Rule, ...] = ()  # the first that matches decides
    default: WeightScheme = DENSE  # for modules of decoder layers that no rule names
    source: str = "config.json has no quantization_config"
    index: CheckpointIndex | None = field(default=None, repr=False, compare=False)
    dense: WeightScheme = DENSE  # what weights of layers that are published in a float dtype become

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], quantize_config: Mapping[str, Any] | None = None, index: CheckpointIndex | None = None
    ) -> QuantScheme:
        """Read config.json's settings (and quantize_config.json's); with ``index``, check and complete them by the tensors.

        Raises CheckpointError for a method, bit width, version, strategy or format that is not known, or that the tensors belie.
        """
        section, source = _section(config, quantize_config)
        if section is not None:
            settings = configs.parse(section, source)
        elif index is not None:
            settings = detect(index)
        else:
            settings = Settings("none", (), DENSE, cls.source)
        found = family(index) if index is not None else None
        if found is not None and found[0] != settings.default.layout.partition("-")[0]:
            raise CheckpointError(
                f"{settings.source} says {settings.method!r}, but the tensors are laid out as {found[0]!r}: {found[1]}"
            )
        return cls(settings.method, settings.rules, settings.default, settings.source, index)

    def as_stated(self, quantization: str | None) -> QuantScheme:
        """The scheme under ``--quantization``: this one, or, of an unquantized checkpoint, what it is rounded to.

        Raises InputError where another method is named than the checkpoint has.
        """
        if quantization is None:
            return self
        name = quantization.lower()
        if name in ONLINE and self.method == "none":
            return replace(self, method=f"int{ONLINE[name].bits}", dense=ONLINE[name])
        stated = name if name in ONLINE else ALIASES.get(name)
        if stated is None:
            known = ", ".join(dict.fromkeys(ALIASES.values()))
            raise InputError(
                f"quantization: {quantization!r} is not known; one of {known} is, and int8 or int4 for unquantized checkpoints"
            )
        if stated != self.method:
            instead = f"leave the option out or give {self.method!r}"
            if self.method == "none":
                instead += "; 'int8' or 'int4' rounds it while it is loaded"
            raise InputError(
                f"quantization: {quantization!r} was stated, but the checkpoint is {self.method!r} ({self.source}); {instead}"
            )
        return self

    def for_module(self, name: str) -> WeightScheme:
        """The scheme of a module, such as model.layers.0.self_attn.q_proj or lm_head.

        A fused name (qkv_proj, gate_up_proj) that the checkpoint and the rules do not have takes the scheme its parts share.
        """
        head, _, last = name.rpartition(".")
        if last not in FUSED or self._has(name) or any(rule.kind != "class" and self._names(rule, name) for rule in self.rules):
            return self._one(name)
        schemes = {self._one(f"{head}.{part}") for part in FUSED[last]}
        if len(schemes) > 1:
            raise CheckpointError(f"{name}: its parts {', '.join(FUSED[last])} are quantized in different ways")
        return schemes.pop()

    def _has(self, name: str) -> bool:
        suffixes = ("weight", "qweight", "weight_packed", "blocks")
        return self.index is not None and any(f"{name}.{suffix}" in self.index.tensors for suffix in suffixes)

    def _one(self, name: str) -> WeightScheme:
        stated = self._stated(name)
        if self.index is None:
            return stated
        tensors = self.index.tensors
        names = (f"{name}.{suffix}" for suffix in ("qweight", "weight_packed", "blocks", "weight"))
        found = next((tensors[full] for full in names if full in tensors), None)
        if found is None:
            return stated  # tied or fused away
        if found.name.endswith(".weight") and found.dtype in FLOATS:
            rounded = IN_LAYER.search(name) and name.rpartition(".")[2] not in EXACT
            return self.dense if rounded else DENSE
        if not stated.quantized:
            stated = self._fallback(name, found)
        if stated.layout.startswith("awq"):
            layout = awq_layout(name, tensors)
            if layout is None:
                raise CheckpointError(
                    f"{name}: qweight {found} and scales {tensors.get(name + '.scales')} fit no packing of AWQ: "
                    "gemm [in, out/8] and [groups, out], gemv [out, in/8] and [out, groups], gemv_fast [out/4, in], [groups, out]"
                )
            return stated if stated.layout == layout else replace(stated, layout=layout)
        return stated

    def _stated(self, name: str) -> WeightScheme:
        for rule in self.rules:
            if self._names(rule, name):
                return rule.scheme
        return self.default if IN_LAYER.search(name) else DENSE

    def _names(self, rule: Rule, name: str) -> bool:
        """Whether a rule is for a module, by any of its names; in a model that reads pictures, too, these are more."""
        found = any(map(rule.matches, published(name)))
        if found or self.index is None or not self.index.beside_text:
            return found
        inner = name.removeprefix("model.")
        return any(map(rule.matches, (f"language_model.{name}", *([f"model.language_model.{inner}"] if inner != name else []))))

    def _fallback(self, name: str, found: TensorInfo) -> WeightScheme:
        """The settings for a module that the config calls unquantized and whose tensors say otherwise."""
        schemes = {self.default} if self.default.quantized else {rule.scheme for rule in self.rules if rule.scheme.quantized}
        if len(schemes) != 1:
            raise CheckpointError(f"{name}: {found.name} is {found}, which is quantized, but nothing says how ({self.source})")
        return schemes.pop()


def load_configs(directory: str | Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """config.json, and the first of BESIDE where there is one; ModelOpt's as if it stood in config.json."""
    directory = Path(directory)
    config = read_json(directory / "config.json")
    name = next((name for name in BESIDE if (directory / name).is_file()), None)
    if name is None:
        return config, None
    beside = read_json(directory / name)
    settings = beside.get("quantization") if name == BESIDE[-1] else None
    return config, {"quant_method": "modelopt", **settings} if isinstance(settings, dict) else beside


def read_scheme(index: CheckpointIndex, quantization: str | None = None) -> tuple[dict[str, Any], QuantScheme]:
    """(config.json, the scheme) of an opened checkpoint, as ``--quantization`` says."""
    config, quantize_config = load_configs(index.directory)
    scheme = QuantScheme.from_config(config, quantize_config, index).as_stated(quantization)
    if _section(config, None)[0] is None and scheme.method == "modelopt":  # what it says of the cache is asked for later
        config = {**config, "quantization_config": quantize_config}
    return _as_stored(config, index), scheme


def _as_stored(config: dict[str, Any], index: CheckpointIndex) -> dict[str, Any]:
    """With what transformers takes for said of heads: the classes TIED are, unless text part and tensors both say otherwise.

    So they are in all that it saves, whatever the checkpoint was.
    """
    text, key, head = config.get("text_config"), "tie_word_embeddings", any(name.startswith("lm_head.") for name in index.tensors)
    if isinstance(text, Mapping) and text.get(key) is False and head:
        return {**config, key: False}
    unsaid = config.get(key) is None and config.get("architectures") in TIED
    return {**config, key: True} if unsaid and not head else config


def _section(config: Mapping[str, Any], quantize_config: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, str]:
    """The quantization settings and where they stand; config.json wins, the file beside it fills in what is missing."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            section = place.get(key)
            if section is None:
                continue
            if not isinstance(section, Mapping):
                raise CheckpointError(f"config.json: {key} is {type(section).__name__}, expected an object")
            return {**(quantize_config or {}), **section}, f"config.json's {key}"
    if quantize_config is not None:
        return dict(quantize_config), BESIDE[-1] if "quant_algo" in quantize_config else BESIDE[0]
    return None, ""
