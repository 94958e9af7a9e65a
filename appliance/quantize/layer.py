"""One decoder layer: what its linears read is looked at, its weights are scaled where the method does that, and quantized."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from appliance.quantize.options import Options
from appliance.quantize.recipe import Recipe
from models.plain import INPUTS, PlainLayer, finite
from quant.algorithms.awq import Outputs, Tie, search_cuts, search_scales
from quant.algorithms.gptq import Factor, Hessian, factored, sweep
from quant.algorithms.grid import Quantized, round_to_nearest
from quant.errors import InputError

log = logging.getLogger("appliance.quantize")

LOOKED_AT = 1024  # inputs of each linear that AWQ's searches compare outputs for
TOGETHER = 128  # of them that attention sees together: the first ones of a sequence
COARSE = 4  # bits: by 8 a block's outputs change less than bfloat16 rounds them by, and that would choose
OUT_OF_RANGE = "its inputs hold numbers that are not finite: the calibration text drives the model out of range"
UNCUT = ("q_proj", "k_proj", "qkv_proj")  # AutoAWQ leaves their extremes: queries and keys meet in a product


@dataclass
class Seen:
    """What was seen of the inputs of linears that read the same."""

    size: Tensor  # float64 [K]: sum of magnitudes
    rows: int = 0
    some: list[Tensor] = field(default_factory=list)  # [.., K]
    sequences: list[Tensor] = field(default_factory=list)  # [B, T, K], of what attention reads
    hessian: Hessian | None = None

    def mean(self) -> Tensor:
        return (self.size / max(self.rows, 1)).float()


class Watcher:
    """Gathers what a method needs of a layer's inputs, while batches go through it."""

    def __init__(self, method: str, batches: int, kv_scales: bool) -> None:
        self.method, self.kv_scales = method, kv_scales
        self.each = max(1, -(-LOOKED_AT // max(batches, 1)))  # inputs taken of a batch
        self.seen: dict[str, Seen] = {}
        self.largest = {"keys": 0.0, "values": 0.0}

    def __call__(self, name: str, x: Tensor) -> None:
        if name in self.largest:
            self.largest[name] = max(self.largest[name], float(x.abs().max())) if self.kv_scales else 0.0
            return
        if self.method == "rtn":
            return
        flat = x.reshape(-1, x.shape[-1])
        seen = self.seen.setdefault(name, Seen(torch.zeros(flat.shape[1], dtype=torch.float64, device=flat.device)))
        if self.method == "gptq":
            seen.hessian = seen.hessian or Hessian(flat.shape[1], flat.device)
            seen.hessian.add(flat)
            return
        seen.size += flat.abs().sum(0, dtype=torch.float32)
        seen.rows += flat.shape[0]
        stride = max(1, flat.shape[0] // self.each)
        seen.some.append(flat[stride // 2 :: stride][: self.each].clone())
        if name == "attention":
            count = -(-self.each // min(x.shape[1], TOGETHER))
            seen.sequences.append(x[:: max(1, x.shape[0] // count), :TOGETHER][:count].clone())


@dataclass(frozen=True)
class Made:
    """A quantized layer: its modules by name, and the mean squared error of each module's outputs where it is known."""

    modules: dict[str, Quantized | Tensor]  # a module that is left as it is: its weight, which may be scaled
    losses: dict[str, float]


def quantize_layer(
    layer: PlainLayer,
    watcher: Watcher,
    options: Options,
    recipe: Recipe,
    published: torch.dtype,
    progress: Callable[[float], None] = lambda done: None,
) -> Made:
    """Quantize every linear. ``layer`` is changed: norms and weights are scaled (AWQ), weights become the quantized ones.

    ``published``: the type in which norms will be written. ``progress`` is told the share that is done, 0 to 1.

    Raises InputError naming the module that cannot be quantized.
    """
    progress(0.0)
    scaled = dict(_scale(layer, watcher, recipe, published)) if options.method == "awq" else {}
    made = Made({}, {})
    modules = list(layer.spec.layer_modules())
    factors = _Factors(layer, watcher, options)
    for k, module in enumerate(modules):
        progress(k / len(modules))
        name = module.name
        grid = recipe.grid(layer.full(name))
        if grid is None:
            made.modules[name] = layer.weights[name] = layer.weights[name].to(published)  # as it will be read again
            continue
        weight, seen = layer.weights[name].float(), watcher.seen.get(INPUTS[name])
        if options.method == "gptq":
            found = sweep(weight, factors.of(name), grid, static_groups=options.static)
            quantized, made.losses[name] = found.weight, found.loss
        else:
            shrink: Tensor | float = 1.0
            if options.method == "awq" and options.clip and name.rpartition(".")[2] not in UNCUT:
                assert seen is not None
                shrink = search_cuts(weight, _some(seen).float() / scaled.get(INPUTS[name], 1.0), grid)
            quantized = round_to_nearest(weight, grid, shrink)
        made.modules[name] = quantized.cpu()
        layer.weights[name] = quantized.dequantize().to(layer.compute)
    return made


class _Factors:
    """GPTQ's factors, one at a time: modules that read the same share it, and it takes the memory of the Hessian."""

    def __init__(self, layer: PlainLayer, watcher: Watcher, options: Options) -> None:
        self.layer, self.watcher, self.options = layer, watcher, options
        self.inputs = ""
        self.factor: Factor | None = None

    def of(self, module: str) -> Factor:
        """Raises InputError naming the module."""
        before, self.inputs = self.inputs, INPUTS[module]
        if self.factor is None or before != self.inputs:
            self.factor, name = None, self.layer.full(module)
            hessian = self.watcher.seen.pop(self.inputs).hessian
            assert hessian is not None
            order, damping = self.options.act_order, hessian.damping(self.options.damping)
            if damping > self.options.damping and self.layer.number == 0:
                said = "%s: %d tokens of calibration say little of %d inputs: damped by %.2g; give more --calibration-samples"
                log.warning(said, name, hessian.rows, hessian.sum.shape[0], damping)
            self.factor = factored(hessian.taken(), act_order=order, damping=damping, name=name)
        return self.factor


def _some(seen: Seen) -> Tensor:
    return torch.cat(seen.some)


def _scale(layer: PlainLayer, watcher: Watcher, recipe: Recipe, published: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Fold AWQ's scales into the layer; what each kind of inputs is divided by from then on, by its name. Raises InputError."""
    # Elsewhere what is before them takes no scales.
    normed = ("attention", "mlp") if layer.spec.pre_norm else ()
    for inputs in (*normed, "heads", *(() if layer.spec.ungated else ("inner",))):
        names = [module.name for module in layer.spec.layer_modules() if INPUTS[module.name] == inputs]
        grid, seen = recipe.grid(layer.full(names[0])), watcher.seen[inputs]
        if grid is None:
            continue
        if not finite(seen.size):
            raise InputError(f"{layer.full(names[0])}: {OUT_OF_RANGE}")
        weights = [layer.weights[name].float() for name in names]
        tie = _tie(layer) if inputs == "heads" else None
        outputs = _outputs(layer, inputs, names, seen) if grid.bits <= COARSE else None
        found = search_scales(weights, _some(seen), seen.mean(), grid, tie, outputs)
        if found.loss >= found.before:
            continue
        scales = _fold(layer, inputs, found.scales, published)
        for name, weight in zip(names, weights, strict=True):
            layer.weights[name] = weight.mul_(scales)
        yield inputs, scales


def _outputs(layer: PlainLayer, inputs: str, names: Sequence[str], seen: Seen) -> Outputs | None:
    """What scales are compared by: what attention or the MLP adds to the hidden states. None: the linears' own outputs are that.

    AutoAWQ does so, too. Errors of keys matter only as far as they move attention, those of gates where ups are large: by the
    linears' own outputs, what is best for one calibration is worse for the next.
    """
    if inputs not in ("attention", "mlp"):
        return None
    x = torch.cat(seen.sequences) if inputs == "attention" else _some(seen)

    def outputs(weights: Sequence[Tensor]) -> Tensor:
        tried = replace(layer, weights={**layer.weights, **dict(zip(names, weights, strict=True))})
        return tried.attention(x) if inputs == "attention" else tried.mlp(x)

    return outputs


def _fold(layer: PlainLayer, inputs: str, scales: Tensor, published: torch.dtype) -> Tensor:
    """Divide what computes these inputs by ``scales``; returns by what they are divided exactly, as the parts are rounded."""
    spec = layer.spec
    if inputs in ("attention", "mlp"):
        name = {"attention": spec.input_norm, "mlp": spec.norms[1]}[inputs]
        before = layer.norms[name] + spec.norm_offset
        largest = torch.finfo(published).max
        layer.norms[name] = (before / scales - spec.norm_offset).clamp(-largest, largest).to(published).float()
        after = layer.norms[name] + spec.norm_offset
        return torch.where(after != 0, before / torch.where(after != 0, after, 1.0), scales)
    name, rows = {
        "heads": ("self_attn.qkv_proj" if spec.fused_qkv else "self_attn.v_proj", spec.kv_size),
        "inner": ("mlp.gate_up_proj" if spec.fused_gate_up else "mlp.up_proj", spec.intermediate),
    }[inputs]
    own = scales if inputs == "inner" else _untied(layer, scales)
    layer.weights[name] = layer.weights[name].float()
    layer.weights[name][-rows:] /= own.unsqueeze(1)
    if name in layer.biases:
        layer.biases[name][-rows:] /= own
    return scales


def _tie(layer: PlainLayer) -> Tie:
    """Heads of queries that share values share their scales: the mean of what each would have."""
    repeat, size = layer.spec.heads // layer.spec.kv_heads, layer.spec.head_dim

    def tie(scales: Tensor) -> Tensor:
        heads = scales.view(-1, repeat, size)
        return heads.log().mean(1, keepdim=True).exp().expand_as(heads).reshape(-1)

    return tie


def _untied(layer: PlainLayer, scales: Tensor) -> Tensor:
    """[heads * head size] -> [KV heads * head size]."""
    repeat, size = layer.spec.heads // layer.spec.kv_heads, layer.spec.head_dim
    return scales.view(-1, repeat, size)[:, 0].reshape(-1)
