"""What was found at each token of a text, and what can be said of it: perplexity, divergence, and how far both are to be trusted.

Tokens that stand together are alike: what a window's first sentences are about decides how hard all of it is. So standard errors
take windows, not tokens, as drawn by chance (the cluster-robust variance of a mean; one window alone has none).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """What was found in one window: a value for each token that counts, [n]. The last three where there is a base."""

    nll: Values  # negative log-probability of the text's token
    base_nll: Values | None = None  # by the base
    kl: Values | None = None  # D(base || model) of what may stand there
    agree: NDArray[np.bool_] | None = None  # whether both find the same token most likely


@dataclass
class Score:
    """A text's windows, as far as they were read."""

    windows: list[Window] = field(default_factory=list)

    def _all(self, name: str) -> list[Values]:
        return [np.asarray(getattr(one, name), np.float64) for one in self.windows]

    @property
    def compared(self) -> bool:
        return bool(self.windows) and self.windows[0].kl is not None

    @property
    def tokens(self) -> int:
        return sum(len(one.nll) for one in self.windows)

    @property
    def nll(self) -> float:
        """Sum over tokens, like the two below."""
        return float(sum(one.sum() for one in self._all("nll")))

    @property
    def kl(self) -> float:
        return float(sum(one.sum() for one in self._all("kl")))

    @property
    def agree(self) -> int:
        return int(sum(one.sum() for one in self._all("agree")))

    @property
    def perplexity(self) -> float:
        return _exp(self.nll / self.tokens)

    @property
    def perplexity_error(self) -> float | None:
        """By the delta method: of exp(m) it is exp(m) times that of m."""
        return _times(self.perplexity, standard_error(self._all("nll")))

    @property
    def ratio(self) -> float:
        """Perplexity by the base's."""
        return _exp(float(np.concatenate(self._differences()).mean()))

    @property
    def ratio_error(self) -> float | None:
        """Of the differences: what both find hard is not in it, so it is far smaller than those of the two perplexities."""
        return _times(self.ratio, standard_error(self._differences()))

    def _differences(self) -> list[Values]:
        return [own - base for own, base in zip(self._all("nll"), self._all("base_nll"), strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; None for what no number says."""
        found: dict[str, float | int | None] = {"perplexity": self.perplexity, "perplexity_error": self.perplexity_error}
        if self.compared:
            kl, base = np.concatenate(self._all("kl")), np.concatenate(self._all("base_nll"))
            median, most_90, most_99, most_999 = np.quantile(kl, (0.5, 0.9, 0.99, 0.999))
            moved = np.exp(-np.concatenate(self._all("nll"))) - np.exp(-base)
            found |= {"base_perplexity": _exp(base.mean()), "ratio": self.ratio, "ratio_error": self.ratio_error}
            found |= {"kl": kl.mean(), "kl_error": standard_error(self._all("kl"))}
            found |= {"kl_median": median, "kl_90": most_90, "kl_99": most_99, "kl_99.9": most_999, "kl_max": kl.max()}
            found |= {"top1_agreement": self.agree / self.tokens, "top1_error": standard_error(self._all("agree"))}
            found |= {"rms_delta_p": np.sqrt(np.square(moved).mean())}
        plain = {name: None if value is None or not math.isfinite(value) else float(value) for name, value in found.items()}
        return {**plain, "tokens": self.tokens, "windows": len(self.windows)}


def standard_error(clusters: Sequence[Values]) -> float | None:
    """Of the mean of all values, where the clusters were drawn and not the values.

    Var = k/(k-1) / n^2 * sum over clusters of (sum of (value - mean))^2: the linearized variance of a ratio of sums, as in
    Cochran, Sampling Techniques (1977), 6.3. None for fewer than two clusters.
    """
    k = len(clusters)
    if k < 2:
        return None
    n, mean = sum(map(len, clusters)), float(np.concatenate(list(clusters)).mean())
    return math.sqrt(k / (k - 1) * sum(float((one - mean).sum()) ** 2 for one in clusters)) / n


def _times(factor: float, error: float | None) -> float | None:
    return None if error is None else factor * error


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf
