"""Mixtures of experts: what their modules are called, which layers have one, and how experts are chosen. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kernels.scores import MOST_GROUPS, SOFTMAX, Scores
from models.architectures import EXPERTS
from models.family import Architecture
from models.fields import Fields
from models.module import ModuleShape
from quant.errors import InputError


@dataclass(frozen=True)
class Mixture:
    """Many MLPs in place of one, of which a router gives each token a few."""

    experts: int
    active: int  # experts that a token goes through
    normalized: bool  # whether the shares of these are made to add up to 1
    name: str  # within a layer; empty: router and experts stand in it by themselves
    router: str  # within that
    expert: tuple[str, ...]  # names of gate, up and down within an expert, or of one that has gate and up in turns, and of down
    bias: bool = False  # of router and experts
    clamp: tuple[float, float] | None = None  # limit and slope of kernels.ops.Clamp, in place of silu(gate) * up
    scores: Scores = SOFTMAX
    correction: str = ""  # the tensor, within a layer, that is added to scores for the choice; empty: there is none
    shared: int = 0  # features of an MLP of all tokens beside the experts; 0: there is none
    shared_name: str = ""  # within the mixture
    shared_gate: str = ""  # the same of what is [1, hidden] and says how much of it; empty: it counts whole
    dense_layers: tuple[int, ...] = ()  # that have one MLP in its place
    dense: int = 0  # features of that, or of the MLP beside it
    beside: tuple[str, ...] = ()  # as in Architecture; empty: there is no MLP beside it
    router_norm: str = ""  # the tensor, within a layer; empty: there is none
    gains: str = ""  # the same

    @property
    def prefix(self) -> str:
        """Of names within a layer."""
        return f"{self.name}." if self.name else ""

    def small_tensors(self, hidden: int) -> list[tuple[str, int]]:
        """(name within a layer, size): corrections and factors of experts, and norms."""
        found = [(name, self.experts) for name in (self.correction, self.gains)]
        found += [(name, hidden) for name in (self.router_norm, *(f"{norm}.weight" for norm in self.beside))]
        return [(name, size) for name, size in found if name]

    def modules(self, hidden: int, inner: int) -> Iterator[ModuleShape]:
        """The router, what all tokens go through, then expert by expert."""
        *gates, down = self.expert
        yield ModuleShape(f"{self.prefix}{self.router}", self.experts, hidden, "router", self.bias)
        if self.shared_gate:
            yield ModuleShape(f"{self.name}.{self.shared_gate}", 1, hidden, "router", False)
        if self.shared:
            prefix = f"{self.name}.{self.shared_name}"
            for gate in gates:
                yield ModuleShape(f"{prefix}.{gate}", self.shared, hidden, "mlp", False)
            yield ModuleShape(f"{prefix}.{down}", hidden, self.shared, "mlp", False)
        for number in range(self.experts):
            prefix = f"{self.prefix}experts.{number}"
            for gate in gates:
                yield ModuleShape(f"{prefix}.{gate}", 2 * inner // len(gates), hidden, "experts", self.bias)
            yield ModuleShape(f"{prefix}.{down}", hidden, inner, "experts", self.bias)


def read_mixture(kind: Architecture, fields: Fields, layers: int) -> Mixture | None:
    """That of a family; None where no layer has one."""
    dense = dense_layers(kind, fields, layers)
    if not kind.mixture or len(dense) == layers:
        return None
    keys = (kind.expert_count, *EXPERTS)
    experts = fields.count(next((key for key in keys if fields.get(key) is not None), kind.expert_count))
    active = fields.integer(kind.expert_choice)
    if active > experts:
        raise InputError(f"config.json: {kind.expert_choice} is {active}, but there are {experts} experts")
    clamp = (fields.number("swiglu_limit", default=7.0), fields.number("swiglu_alpha", default=1.702)) if kind.clamped else None
    normalized = kind.normalized if isinstance(kind.normalized, bool) else fields.flag(kind.normalized, default=False)
    shared = 0
    if kind.shared_count:
        shared = fields.integer(kind.expert_size) * fields.integer(kind.shared_count, minimum=0)
    elif kind.shared:
        shared = fields.integer("shared_expert_intermediate_size")
    return Mixture(
        experts=experts,
        active=active,
        normalized=normalized,
        name="" if kind.beside else kind.mixture,
        router=kind.router,
        expert=kind.expert,
        bias=kind.expert_bias,
        clamp=clamp,
        scores=_scores(kind, fields, experts, active),
        correction=f"{kind.mixture}.{kind.correction}" if kind.correction else "",
        shared=shared,
        shared_name=kind.shared,
        shared_gate=kind.shared_gate,
        dense_layers=dense,
        dense=fields.integer(kind.inner) if dense or kind.beside else 0,
        beside=kind.beside,
        router_norm=kind.router_norm,
        gains=kind.gains,
    )


def dense_layers(kind: Architecture, fields: Fields, layers: int) -> tuple[int, ...]:
    """The layers that have one MLP in place of a mixture."""
    if kind.sparse == "step":
        given, step = fields.get("mlp_only_layers") or [], fields.integer("decoder_sparse_step", default=1)
        if not isinstance(given, list) or not all(type(one) is int for one in given):
            raise InputError(f"config.json: mlp_only_layers is {given!r:.60}, expected a list of numbers of layers")
        return tuple(layer for layer in range(layers) if layer in given or (layer + 1) % step)
    if kind.sparse == "types" and (types := fields.get("mlp_layer_types")) is not None:
        if not isinstance(types, list) or len(types) != layers or not all(one in ("dense", "sparse") for one in types):
            raise InputError(f"config.json: mlp_layer_types must name dense or sparse for each of {layers} layers")
        return tuple(layer for layer, one in enumerate(types) if one == "dense")
    if kind.sparse in ("from", "types"):
        return tuple(range(min(fields.integer(kind.dense_count, default=1, minimum=0), layers)))
    if kind.sparse == "range":
        first = fields.integer("moe_layer_start_index", default=1, minimum=0)
        last = fields.integer("moe_layer_end_index", default=-1, minimum=-1)
        step, last = fields.integer("moe_layer_interval", default=1), layers - 1 if last == -1 else last
        return tuple(layer for layer in range(layers) if not first <= layer <= last or (layer + 1) % step)
    off = kind.sparse == "switched" and not fields.flag("enable_moe_block", default=False)
    return () if kind.mixture and not off else tuple(range(layers))


def _scores(kind: Architecture, fields: Fields, experts: int, active: int) -> Scores:
    if not kind.sigmoid and not kind.by_largest:
        return Scores(least=fields.number("moe_norm_min", default=1e-12)) if kind.correction else SOFTMAX
    grouped = kind.sigmoid or fields.get("topk_method") == "group_limited_greedy"
    groups, chosen = (fields.integer(key, default=1) if grouped else 1 for key in ("n_group", "topk_group"))
    size, rest = divmod(experts, groups)
    if rest or (groups > 1 and size < 2) or groups > MOST_GROUPS:
        raise InputError(
            f"config.json: n_group is {groups}, expected at most {MOST_GROUPS} groups of equally many of the {experts} experts, "
            "two or more"
        )
    if chosen > groups or chosen * size < active:
        raise InputError(
            f"config.json: topk_group is {chosen} of {groups} groups of {size} experts, expected as many as have the {active} "
            "experts that a token goes through"
        )
    scale, least = fields.number("routed_scaling_factor", default=1.0), 1e-20 if kind.sigmoid else 0.0
    least = least if kind.share_least is None else kind.share_least
    return Scores(kind.sigmoid, groups, chosen, 1 if kind.by_largest else 2, least, scale)
