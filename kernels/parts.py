"""What the layers of a model are made of: norms, weights, MLPs, and mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from kernels.scores import SOFTMAX, Scores


class Norm(NamedTuple):
    """What an RMS norm needs: x * (weight + offset) / sqrt(mean(x^2) + eps)."""

    weight: Tensor  # [size of the last dimension]
    eps: float
    offset: float = 0.0


class Clamp(NamedTuple):
    """gpt-oss's gated product: (u + 1) * g * sigmoid(slope * g), where g is gate up to the limit, and u is up within it."""

    limit: float
    slope: float


class Weight(Protocol):
    """A weight in the layout a device wants; made by ``Ops.pack`` and understood only by the same Ops."""

    @property
    def N(self) -> int:
        """Outputs of the product: half the rows that were packed where the weight is gated."""

    @property
    def K(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


Linear = tuple[Weight, ...]  # several where the parts of a fused projection cannot be one weight; outputs are joined


@dataclass(frozen=True)
class MLP:
    """down(silu(gate(x)) * up(x)), or what else the gated weight was packed for."""

    gate_up: Linear  # one gated weight, or gate and up
    down: Weight

    @property
    def weights(self) -> tuple[Weight, ...]:
        return (*self.gate_up, self.down)

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)


@dataclass(frozen=True)
class Mixture:
    """MLPs of which a router gives each token a few: their sum, weighted with the router's shares."""

    router: Weight  # [experts, hidden]
    experts: tuple[MLP, ...]  # or one, whose weights have all of them (Ops.join_experts)
    active: int  # experts that a token goes through
    normalized: bool  # whether the shares of these are made to add up to 1
    scores: Scores = SOFTMAX
    correction: Tensor | None = None  # float32 [experts]: added to scores for the choice, not for the shares
    shared: MLP | None = None  # that every token goes through, too
    shared_gate: Weight | None = None  # [1, hidden]: the sigmoid of its product is the share of that; None: 1
    norm: Tensor | None = None  # [hidden]: of what the router reads; None: it reads what the experts do
    gains: Tensor | None = None  # float32 [experts]: shares are multiplied by them at last
    gelu: bool = False  # where gate and up are weights of their own

    @property
    def weights(self) -> tuple[Weight, ...]:
        gate = () if self.shared_gate is None else (self.shared_gate,)
        shared = () if self.shared is None else self.shared.weights
        return (self.router, *gate, *shared, *(weight for expert in self.experts for weight in expert.weights))

    @property
    def nbytes(self) -> int:
        small = (self.correction, self.norm, self.gains)
        return sum(weight.nbytes for weight in self.weights) + sum(one.nbytes for one in small if one is not None)


@dataclass(frozen=True)
class Beside:
    """A mixture beside an MLP: what both make of the same hidden states is normalized, each by itself, and added up."""

    mixture: Mixture
    norm: Tensor  # [hidden]: of what the experts read
    mixture_norm: Tensor  # of what they give
    mlp_norm: Tensor  # of what the MLP gives

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in (self.mixture, self.norm, self.mixture_norm, self.mlp_norm))


@dataclass(frozen=True)
class Told:
    """What a layer makes of what it is told of each token, x [size]: norm(down(gelu(gate(hidden)) * x)) is added at last."""

    gate: Weight  # [size, hidden]
    down: Weight  # [hidden, size]
    norm: Tensor  # [hidden]

    @property
    def weights(self) -> tuple[Weight, ...]:
        return (self.gate, self.down)

    @property
    def nbytes(self) -> int:
        return self.gate.nbytes + self.down.nbytes + self.norm.nbytes
