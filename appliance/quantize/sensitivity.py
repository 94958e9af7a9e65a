"""What it costs to round each unit of a model: all units and widths at once, with one pass forward and one back.

For a small change D of a weight W the divergence KL(p || p') of what follows a token is 1/2 vec(D)^T F vec(D), where F, Fisher's
information, is the mean of g g^T, g the gradient of log p(y) by W for y drawn from the model itself (Kullback 1959; Martens
2020). Errors of rounding know nothing of each other nor of the gradients, and their mean is 0: what is left is the diagonal,

    cost = 1/2 sum(D^2 * E[g^2])

as in Optimal Brain Damage (LeCun et al. 1990) and SqueezeLLM (Kim et al. 2024), whose gradients are of the text's own tokens.
Nothing need be drawn: logits' gradients sqrt(p) * x - p * (sqrt(p) . x) with random signs x have the same second moment
diag(p) - p p^T, without the noise of rare tokens. Signs of all tokens of a sample are independent, so one pass back serves all.

Why this one: against the true divergence with one unit alone rounded (4 bits, groups of 32, text that was not measured on), the
rank correlation on TinyStories-656K, the demo model and 12 random layers with outliers was

    this                                                      1.00  0.98  0.99
    the sum before it is squared, E[(D . g)^2]                0.93  0.94  0.99  few samples make it noisy
    change of the residual stream behind the layer            0.98  0.74  0.91
    relative error of the modules' own outputs                0.55  0.29  0.28

and its sum over all units is 0.99 and 1.23 of the true one on the first two. (Random layers at 4 bits are far beyond the range
of small changes: there it overrates all, but in the right order.) Costs are those of rounding to nearest. Where GPTQ or AWQ
round the unit the same numbers still give the order: 0.86 and 0.95 on TinyStories-656K in groups of 128, 0.90 and 0.97 on the
demo model at 3 bits, 0.98 and 1.00 on 12 milder random layers. The share of the loss that GPTQ makes good could be foretold
from its factor (0.91, 0.89, 1.00), but only with as many tokens as there are inputs several times over.

Operations: 8 for each weight and token (forward; then again, by inputs, by weights), whatever the number of widths: for TOKENS
tokens an eighth of what goes through the model when GPTQ is given 128 samples of 512.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from appliance.quantize.recipe import units
from models.plain import FLOATS, PlainLayer, embedded
from models.rope import cos_sin_table
from models.spec import ModelSpec
from quant.algorithms.grid import Grid
from quant.checkpoint import Checkpoint
from quant.errors import InputError

TOKENS, LEAST = 4096, 4  # of the calibration that are looked at, and samples at least
ROWS = 64  # tokens whose logits exist at a time
SLAB = 1 << 24  # weights that are rounded at a time
FORWARD = 0.25  # of the time, about
Costs = dict[str, dict[int, float]]


def measure(
    source: Path,
    spec: ModelSpec,
    ids: Tensor,
    grids: Mapping[int, Grid],
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: Callable[[float], None] = lambda done: None,
) -> Costs:
    """By unit (appliance.quantize.recipe.units) and grid: the mean divergence of a token's successor, about, in nats.

    ``ids`` int64 [samples, length], of which the first are looked at; ``grids`` by any number. In memory at a time: a layer in
    float32 with its gradients, and the hidden states of those samples before every layer. ``progress`` is told shares of 1.
    Raises InputError where the model's numbers are not finite.
    """
    ids = ids[: max(LEAST, TOKENS // ids.shape[1])]
    place = torch.device(device)
    with torch.inference_mode(False), torch.no_grad(), Checkpoint.open(source) as checkpoint:
        tables = {rope: cos_sin_table(rope, ids.shape[1]) for rope in spec.ropes}

        def layer(number: int) -> PlainLayer:
            return PlainLayer.read(checkpoint, spec, number, tables[spec.rope_of(number)], torch.float32).to(place)

        states = [embedded(_table(checkpoint, spec), ids, spec)]
        for number in range(spec.layers):
            progress(FORWARD * number / spec.layers)
            now = layer(number)
            there = [now.forward(one[None].to(place).float())[0].to(states[0].device, states[0].dtype) for one in states[-1]]
            states.append(torch.stack(there))
        gradients = _at_the_end(checkpoint, spec, states.pop(), place, seed)
        costs: Costs = {}
        for number in reversed(range(spec.layers)):
            progress(1 - (1 - FORWARD) * (number + 1) / spec.layers)
            now = layer(number)
            seconds = _second_moments(now, states.pop(), gradients)
            costs = _costs(now, seconds, grids, ids.numel()) | costs
    progress(1.0)
    return {unit: costs[unit] for unit in units(spec)}


def _table(checkpoint: Checkpoint, spec: ModelSpec, *, head: bool = False) -> Tensor:
    """Embedding or head [vocab, hidden]: either may stand for both."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    first, other = names if head else names[::-1]
    return checkpoint.take(first if checkpoint.has(first) else other, dtypes=FLOATS, shape=(spec.vocab, spec.hidden))


def _at_the_end(checkpoint: Checkpoint, spec: ModelSpec, hidden: Tensor, place: torch.device, seed: int) -> Tensor:
    """Gradients by the last hidden states [samples, length, hidden], float32: their second moments are Fisher's information."""
    head = _table(checkpoint, spec, head=True).to(place).float()
    norm = checkpoint.take("model.norm.weight", dtypes=FLOATS, shape=(spec.hidden,)).to(place).float() + spec.norm_offset
    signs = torch.Generator().manual_seed(seed)
    found = torch.empty(hidden.shape, dtype=torch.float32)
    for k, sample in enumerate(hidden):
        for first in range(0, len(sample), ROWS):
            with torch.enable_grad():
                x = sample[first : first + ROWS].to(place).float().requires_grad_()
                logits = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.eps) * norm) @ head.t() / spec.logit_divisor
                logits = logits if spec.logit_cap is None else spec.logit_cap * torch.tanh(logits / spec.logit_cap)
            likely = logits.detach().softmax(-1)
            drawn = torch.randint(0, 2, likely.shape, generator=signs, dtype=torch.int8).to(place).float().mul_(2).sub_(1)
            drawn *= likely.sqrt()
            back = drawn - likely * drawn.sum(-1, keepdim=True)
            found[k, first : first + ROWS] = torch.autograd.grad(logits, x, back)[0].cpu()
    return found


def _second_moments(layer: PlainLayer, states: Tensor, gradients: Tensor) -> dict[str, Tensor]:
    """Of each weight's gradients, summed over samples: float32 [N, K] by module. ``gradients`` become those before the layer."""
    for weight in layer.weights.values():
        weight.requires_grad_()
    names, place = list(layer.weights), layer.cos_sin.device
    seconds = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in layer.weights.items()}
    for state, gradient in zip(states, gradients, strict=True):
        with torch.enable_grad():
            x = state[None].to(place).float().requires_grad_()
            y = layer.forward(x)
        before, *own = torch.autograd.grad(y, [x, *layer.weights.values()], gradient[None].to(place))
        gradient.copy_(before[0])
        for name, one in zip(names, own, strict=True):
            seconds[name].addcmul_(one, one)
    return seconds


def _costs(layer: PlainLayer, seconds: Mapping[str, Tensor], grids: Mapping[int, Grid], tokens: int) -> Costs:
    found: Costs = {}
    prefix = layer.full("")
    own_units = {unit: modules for unit, modules in units(layer.spec).items() if unit.startswith(prefix)}
    for unit, modules in own_units.items():
        found[unit] = {}
        for bits, grid in grids.items():
            lost = 0.0
            for name in modules:
                short = name.removeprefix(prefix)
                weight, second = layer.weights[short].detach(), seconds[short]
                rows = max(1, SLAB // weight.shape[1])
                for part, own in zip(weight.split(rows), second.split(rows), strict=True):
                    lost += float(((grid.rounded(part) - part).square_() * own).sum(dtype=torch.float64))
            found[unit][bits] = lost / 2 / tokens
            if not lost < float("inf"):
                raise InputError(
                    f"{unit}: its gradients are not finite numbers: the calibration text drives the model out of range"
                )
    return found
