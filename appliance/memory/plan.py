"""What a plan of the memory is, and what a refusal. appliance/memory/fit.py makes both. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from shlex import quote

from appliance.core.ghosts import ghost_bytes
from appliance.memory.demand import LOGIT_ROWS
from appliance.memory.devices import MIB, DeviceInfo
from appliance.memory.graphs import capture_sizes
from appliance.memory.kv import KVSpec
from appliance.memory.learned import torch_version
from appliance.memory.loading import ALL_AT_ONCE, Workers
from appliance.memory.offload import NOTHING, Offload
from appliance.memory.text import plan_table
from quant.errors import InputError

RUNTIME = {"cpu": (250 if torch_version().endswith("+cpu") else 506) * MIB, "cuda": 800 * MIB}
"""The process itself, until a start has measured it. Torch's builds for CPUs: 246 MiB once steps of native kernels have run, 249
to 254 with torch's operators (torch 2.13; 238 when a server with native kernels is ready). Builds for cards have more libraries:
256 more (torch 2.11 for CUDA 13, on a machine without a card). A card's context has not been measured."""
SHORTEST_AUTO = 256
"""``auto`` does not call a context shorter than this a fit (unless the model itself is shorter)."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change with which the model would fit: that was tried, by planning again with it."""

    options: Mapping[str, object]  # of EngineConfig; none where another checkpoint is enough
    effect: str  # what it gives and what it costs, in words
    tokens: int  # that the KV cache then holds
    max_model_len: int
    instead: str = ""  # the other checkpoint, in words

    @property
    def flags(self) -> str:
        """As they are given to ``appliance serve`` and ``plan``."""
        return " ".join(flag_text(name, value) for name, value in self.options.items())

    def __str__(self) -> str:
        return f"{self.instead} with {self.flags}" if self.instead and self.options else self.flags or self.instead

    def to_dict(self) -> dict[str, object]:
        return {
            "flags": self.flags,
            "options": dict(self.options),
            "instead": self.instead,
            "effect": self.effect,
            "tokens": self.tokens,
            "max_model_len": self.max_model_len,
        }


def flag_text(name: str, value: object) -> str:
    """An option of EngineConfig as a flag, for a shell."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} " + (f"{value:g}" if isinstance(value, float) else quote(str(value)))


class PlanError(InputError):
    """The model does not fit. The message has the numbers; ``remedies`` what would make it fit, the mildest first."""

    def __init__(self, message: str, remedies: tuple[Remedy, ...] = ()) -> None:
        super().__init__(message)
        self.remedies = remedies


@dataclass(frozen=True)
class Limit:
    """Why the cache is smaller than what is left for it."""

    blocks: int
    why: str  # in words


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a card said before the cache was made (appliance/memory/measure.py), beside what had been planned."""

    held: int  # bytes of weights, workspace, states and runtime
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
    vocab_size: int  # ids
    device: DeviceInfo
    dtype: str
    head: str  # what the output head is stored as, in words
    embedding: str  # the same of the embedding
    budget: int
    budget_source: str  # in words
    weights: dict[str, int]  # embedding, attention, mlp (or router, experts), head, norms; staging, for those in host memory
    scratch: dict[str, int]  # activations, logits, products, positions, inputs, transfers
    graphs: dict[str, int]  # see appliance.memory.graphs; empty where no steps are recorded
    runtime: int
    grammars: dict[str, int]  # of the host: see appliance.memory.grammars; empty where no answer can follow one
    kv: KVSpec
    num_blocks: int
    max_model_len: int
    max_num_seqs: int  # that run together: no more than a step has tokens
    max_num_batched_tokens: int
    sequence_bytes: int = 0  # states of one sequence, whatever its length: of layers that have no keys and values
    kept_states: int = 0  # places for states of sequences that need not run, beside one for each that may
    free: int = 0  # what the budget can be at most: what is free less the margin and --gpu-memory-reserve
    swap_blocks: int = 0  # of host memory, each as large as one of the cache; on a CPU they are in the same memory
    limit: Limit | None = None  # of the cache; None: it has all that is left for it, or what was given
    learned: bool = False  # whether ``runtime`` is what earlier starts on this device had
    workers: Workers = ALL_AT_ONCE  # that load the weights
    load_peak: int = 0  # of the device, at most, while they do
    host: dict[str, int] = field(default_factory=dict)  # of host memory, where that is another: see appliance.memory.host
    host_peak: int = 0  # at most, while weights are loaded, or later
    host_budget: int | None = None  # None: nothing was asked about the host
    offload: Offload = NOTHING  # the layers whose weights stay in host memory
    measured: Measured | None = None  # None: nothing was yet, or it is no card
    found: dict[str, int] = field(default_factory=dict)  # bytes by category, as they were when the engine was ready

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
    def grammar_bytes(self) -> int:
        """Of host memory."""
        return sum(self.grammars.values())

    @property
    def decode_sizes(self) -> tuple[int, ...]:
        """Sequences of the decode steps that are recorded, where any are."""
        return capture_sizes(self.max_num_seqs)

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.kv.block_bytes

    @property
    def state_places(self) -> int:
        """Seats of sequences that may run, and places where states are kept."""
        return self.max_num_seqs + self.kept_states

    @property
    def state_bytes(self) -> int:
        return self.state_places * self.sequence_bytes

    @property
    def swap_bytes(self) -> int:
        """Of host memory."""
        return self.swap_blocks * self.kv.block_bytes

    @property
    def ghost_bytes(self) -> int:
        """Of host memory: what is remembered of blocks that left the cache, for swap space."""
        return ghost_bytes(self.swap_blocks)

    @property
    def fixed(self) -> int:
        """All that the device has beside the KV cache; on a CPU swap space and grammars are in the same memory."""
        host = self.swap_bytes + self.ghost_bytes + self.grammar_bytes if self.device.kind == "cpu" else 0
        return self.weight_bytes + self.workspace + self.graph_bytes + self.state_bytes + self.runtime + host

    @property
    def total(self) -> int:
        """Of the device."""
        return self.fixed + self.kv_bytes

    @property
    def logit_rows(self) -> int:
        """Rows of logits that exist at a time."""
        return min(LOGIT_ROWS, self.max_num_batched_tokens)

    @property
    def tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_blocks * self.kv.block_size

    @property
    def limited(self) -> str:
        """Why the cache has no more blocks, in words; empty where it has all that is left for it, or what was given."""
        return self.limit.why if self.limit is not None and self.limit.blocks == self.num_blocks else ""

    def sequences(self, length: int) -> float:
        """How many sequences of ``length`` tokens the KV cache holds at once; no more than have a place for their states."""
        held = self.num_blocks / self.kv.blocks(length)
        return min(held, self.max_num_seqs) if self.sequence_bytes else held

    def longest(self, sequences: int) -> int:
        """Tokens that each of so many sequences can have at once; 0 where there are not even blocks for all."""
        return min(self.num_blocks // sequences * self.kv.block_size, self.max_model_len)

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
            "embedding": self.embedding,
            "budget_bytes": self.budget,
            "budget_source": self.budget_source,
            "total_bytes": self.total,
            "weights_bytes": {**self.weights, "total": self.weight_bytes},
            "workspace_bytes": {**self.scratch, "total": self.workspace},
            "graphs_bytes": {**self.graphs, "total": self.graph_bytes},
            "runtime_bytes": self.runtime,
            "grammars_bytes": {**self.grammars, "total": self.grammar_bytes},
            "kv_cache": {
                **asdict(self.kv),
                "token_bytes": self.kv.token_bytes,
                "block_bytes": self.kv.block_bytes,
                "num_blocks": self.num_blocks,
                "tokens": self.tokens,
                "bytes": self.kv_bytes,
                "limit": self.limited or None,
            },
            "states": {
                "sequence_bytes": self.sequence_bytes,
                "places": self.state_places,
                "kept": self.kept_states,
                "bytes": self.state_bytes,
            },
            "runtime_learned": self.learned,
            "loading": {**asdict(self.workers), "peak_bytes": self.load_peak},
            "host_bytes": {**self.host, "total": sum(self.host.values()), "peak": self.host_peak, "budget": self.host_budget},
            "swap": {"num_blocks": self.swap_blocks, "bytes": self.swap_bytes, "ghosts_bytes": self.ghost_bytes},
            "offload": {**asdict(self.offload), "saved": self.offload.saved},
            "measured": None if self.measured is None else asdict(self.measured),
            "found_bytes": dict(self.found),
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_concurrency": self.sequences(self.max_model_len),
            "sequences": {str(length): self.sequences(length) for length in self.lengths()},
        }
