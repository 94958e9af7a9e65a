"""The arithmetic of memory: integers in, a plan or an explained refusal out. Nothing is loaded or measured, and no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from appliance.memory.demand import LOGIT_ROWS, Demand
from appliance.memory.devices import MIB, DeviceInfo
from appliance.memory.graphs import capture_sizes, graph_bytes
from appliance.memory.inputs import input_bytes
from appliance.memory.settings import Settings
from appliance.memory.text import plan_table, size_text
from kernels.layout import kv_nbytes
from quant.errors import InputError

RUNTIME = {"cpu": 300 * MIB, "cuda": 800 * MIB}
"""The process itself. Measured with torch 2.13 for CPUs: 219 MiB after ``import torch``, 230 after its first products, 250 with
the tokenizer libraries; the rest is for what the allocator keeps (a process of 1.5 GiB is 1 % below its plan when it is fresh and
1.6 % above after half an hour of mixed load). A card's context takes 300 to 600 MiB (not measured here)."""
SHORTEST_AUTO = 256
"""``auto`` does not call a context shorter than this a fit (unless the model itself is shorter)."""


class PlanError(InputError):
    """The model does not fit. The message has the numbers; ``remedies`` the flags that, each by itself, would make it fit."""

    def __init__(self, message: str, remedies: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.remedies = remedies


@dataclass(frozen=True)
class KVSpec:
    """Shape of the cached keys and values."""

    layers: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: str  # of the cache: that of the activations, or a quantized one (kernels.layout.SCALED_CACHES)

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * kv_nbytes(self.dtype, self.head_dim)

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_size

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a card said before the cache was made (appliance/memory/measure.py), beside what had been planned."""

    held: int  # bytes of weights, workspace and runtime
    planned: int  # bytes of the same
    planned_blocks: int
    planned_len: int
    graphs: int | None = None  # bytes taken while decode steps were recorded


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """All sizes in bytes. ``total`` <= ``budget``."""

    model: str
    architecture: str
    quantization: str
    device: DeviceInfo
    dtype: str
    head: str  # what the output head is stored as, in words
    budget: int
    budget_source: str  # in words
    weights: dict[str, int]  # embedding, attention, mlp, head, norms
    scratch: dict[str, int]  # activations, logits, products, positions, inputs
    graphs: dict[str, int]  # see appliance.memory.graphs; empty where no steps are recorded
    runtime: int
    kv: KVSpec
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    measured: Measured | None = None  # None: nothing was yet, or it is no card

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def workspace(self) -> int:
        return sum(self.scratch.values())

    @property
    def graph_bytes(self) -> int:
        return sum(self.graphs.values())

    @property
    def decode_sizes(self) -> tuple[int, ...]:
        """Sequences of the decode steps that are recorded, where any are."""
        return decode_sizes(self.max_num_seqs, self.max_num_batched_tokens)

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.kv.block_bytes

    @property
    def total(self) -> int:
        return self.weight_bytes + self.workspace + self.graph_bytes + self.runtime + self.kv_bytes

    @property
    def logit_rows(self) -> int:
        """Rows of logits that exist at a time."""
        return min(LOGIT_ROWS, self.max_num_batched_tokens)

    @property
    def tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_blocks * self.kv.block_size

    def sequences(self, length: int) -> float:
        """How many sequences of ``length`` tokens the KV cache holds at once."""
        return self.num_blocks / self.kv.blocks(length)

    def lengths(self) -> list[int]:
        """Lengths to show: powers of two from 512 up to the longest, which is always there."""
        powers = [2**i for i in range(9, 31) if 2**i < self.max_model_len]
        return [*powers, self.max_model_len]

    def table(self) -> str:
        """The plan for people, in fixed width."""
        return plan_table(self)

    def to_dict(self) -> dict[str, object]:
        """The plan for programs: plain JSON values under stable keys."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "quantization": self.quantization,
            "device": asdict(self.device),
            "dtype": self.dtype,
            "lm_head": self.head,
            "budget_bytes": self.budget,
            "budget_source": self.budget_source,
            "total_bytes": self.total,
            "weights_bytes": {**self.weights, "total": self.weight_bytes},
            "workspace_bytes": {**self.scratch, "total": self.workspace},
            "graphs_bytes": {**self.graphs, "total": self.graph_bytes},
            "runtime_bytes": self.runtime,
            "kv_cache": {
                **asdict(self.kv),
                "token_bytes": self.kv.token_bytes,
                "block_bytes": self.kv.block_bytes,
                "num_blocks": self.num_blocks,
                "tokens": self.tokens,
                "bytes": self.kv_bytes,
            },
            "measured": None if self.measured is None else asdict(self.measured),
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_concurrency": self.sequences(self.max_model_len),
            "sequences": {str(length): self.sequences(length) for length in self.lengths()},
        }


def decode_sizes(max_seqs: int, max_tokens: int) -> tuple[int, ...]:
    """Each sequence of a decode step takes one of the step's tokens."""
    return capture_sizes(min(max_seqs, max_tokens))


def fit(demand: Demand, settings: Settings, device: DeviceInfo) -> MemoryPlan:
    """The plan for known demands: pure arithmetic. More memory never gives less cache or a shorter context."""
    if settings.max_len is not None and settings.max_len > demand.max_len:
        raise InputError(
            f"--max-model-len is {settings.max_len}, but the model was made for at most {demand.max_len} tokens: "
            f"give at most {demand.max_len}, or auto"
        )
    if settings.max_len is not None:
        return _checked(_plan(demand, settings, device, settings.max_len))
    longest = _plan(demand, settings, device, demand.max_len)
    if _holds_one(longest):
        return _checked(longest)
    low, high = 0, longest.kv.blocks(demand.max_len)  # in blocks: 0 always fits, ``high`` does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = _holds_one(_plan(demand, settings, device, middle * settings.block_size))
        low, high = (middle, high) if fits else (low, middle)
    least = min(SHORTEST_AUTO, demand.max_len)
    return _checked(_plan(demand, settings, device, max(low * settings.block_size, least)))


def _plan(demand: Demand, settings: Settings, device: DeviceInfo, max_len: int) -> MemoryPlan:
    """What is left after weights, workspace and runtime becomes blocks, but no more than max_seqs sequences can ever fill."""
    kv = KVSpec(demand.layers, demand.kv_heads, demand.head_dim, settings.block_size, settings.kv_dtype or demand.dtype)
    scratch = {
        "activations": demand.token_bytes * settings.max_tokens,
        "logits": demand.logits_row_bytes * min(LOGIT_ROWS, settings.max_tokens),
        "products": demand.slab,
        "positions": demand.position_bytes * max_len,
        "inputs": input_bytes(settings.max_tokens, settings.max_seqs, kv.blocks(max_len)) if device.kind == "cuda" else 0,
    }
    graphs = graph_bytes(
        decode_sizes(settings.max_seqs, settings.max_tokens) if settings.graphs else (),
        layers=demand.layers,
        token_bytes=demand.token_bytes,
        slab=demand.layer_slab,
        hidden_bytes=demand.hidden_bytes,
        block_bytes=kv.block_bytes,
    )
    runtime = RUNTIME[device.kind]
    budget, source = _budget(settings, device)
    left = budget - sum(demand.weights.values()) - sum(scratch.values()) - sum(graphs.values()) - runtime
    if settings.kv_bytes is not None:
        left = settings.kv_bytes
    return MemoryPlan(
        model=demand.model,
        architecture=demand.architecture,
        quantization=demand.quantization,
        device=device,
        dtype=demand.dtype,
        head=demand.head,
        budget=budget,
        budget_source=source,
        weights=demand.weights,
        scratch=scratch,
        graphs=graphs,
        runtime=runtime,
        kv=kv,
        num_blocks=min(max(0, left) // kv.block_bytes, settings.max_seqs * kv.blocks(max_len)),
        max_model_len=max_len,
        max_num_seqs=settings.max_seqs,
        max_num_batched_tokens=settings.max_tokens,
    )


def _budget(settings: Settings, device: DeviceInfo) -> tuple[int, str]:
    """Bytes that may be taken, and why so many."""
    total, available = device.total, device.available
    if settings.kv_bytes is not None:
        return available, f"all that is available, since --kv-cache-memory-bytes {settings.kv_bytes} is given"
    share = int(settings.utilization * (available if device.kind == "cpu" else total))
    if device.kind == "cpu":
        return share, f"{settings.utilization:g} of {size_text(available)} available"
    if share > available:  # other programs hold memory of the card: what they hold cannot be taken
        return available, f"the {size_text(available)} that are free of {size_text(total)}"
    return share, f"{settings.utilization:g} of {size_text(total)}"


def _holds_one(plan: MemoryPlan) -> bool:
    """Whether one sequence of the longest length can run (a --kv-cache-memory-bytes that is too much is another matter)."""
    return plan.total - plan.kv_bytes <= plan.budget and plan.kv.blocks(plan.max_model_len) <= plan.num_blocks


def _shortage(plan: MemoryPlan) -> str | None:
    """Why a plan is none: the numbers, in words."""
    graphs = f"CUDA graphs {size_text(plan.graph_bytes)} ({plan.max_num_seqs} sequences), " if plan.graphs else ""
    parts = (
        f"weights {size_text(plan.weight_bytes)}, workspace {size_text(plan.workspace)} "
        f"({plan.max_num_batched_tokens} tokens a step), {graphs}runtime {size_text(plan.runtime)}"
    )
    budget = f"the budget is {size_text(plan.budget)} ({plan.budget_source})"
    fixed = plan.total - plan.kv_bytes
    if fixed > plan.budget:
        return f"{parts} make {size_text(fixed)}, but {budget}"
    if plan.total > plan.budget:  # only with --kv-cache-memory-bytes
        return f"{parts} and a KV cache of {size_text(plan.kv_bytes)} make {size_text(plan.total)}, but {budget}"
    need = plan.kv.blocks(plan.max_model_len)
    if need > plan.num_blocks:
        return (
            f"one sequence of {plan.max_model_len} tokens needs {need} KV blocks of {plan.kv.block_size} tokens "
            f"({size_text(need * plan.kv.block_bytes)}), but there is room for {plan.num_blocks} ({size_text(plan.kv_bytes)}): "
            f"{budget}, of which {parts} are taken"
        )
    return None


def _checked(plan: MemoryPlan) -> MemoryPlan:
    reason = _shortage(plan)
    if reason is not None:
        raise PlanError(f"{plan.model} does not fit: {reason}")
    return plan
