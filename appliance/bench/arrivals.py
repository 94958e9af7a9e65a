"""When requests begin."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from appliance.bench.samples import Sample
from appliance.config import BenchConfig
from quant.errors import InputError


def arrivals(samples: Sequence[Sample], config: BenchConfig) -> list[float]:
    """Seconds from the begin for each request; all 0 where --request-rate is inf. Raises InputError that names the flag.

    Gaps between requests are drawn from a gamma distribution of mean 1 / rate and shape ``burstiness`` (1: a Poisson process),
    and then scaled so that the last request comes when the rate says: few requests would miss it by chance.
    """
    timed = all(sample.arrival is not None for sample in samples)
    if config.self_timed is True and not timed:
        raise InputError(f"--self-timed: the data set {config.dataset_name} has no times")
    if timed and config.self_timed is not False:
        return [sample.arrival or 0.0 for sample in samples]
    if config.request_rate <= 0 or math.isnan(config.request_rate):
        raise InputError(f"--request-rate is above 0 (inf: all at once), got {config.request_rate:g}")
    if config.burstiness <= 0:
        raise InputError(f"--burstiness is above 0, got {config.burstiness:g}")
    rates = _rates(len(samples), config)
    if math.isinf(rates[0]):
        return [0.0] * len(samples)
    rng, at, times = random.Random(f"arrivals/{config.seed}"), 0.0, []
    for rate in rates:
        times.append(at)
        at += rng.gammavariate(config.burstiness, 1 / (rate * config.burstiness))
    meant = sum(1 / rate for rate in rates[:-1])
    scale = meant / times[-1] if times[-1] > 0 else 1.0
    return [time * scale for time in times]


def _rates(count: int, config: BenchConfig) -> list[float]:
    """The rate behind each request."""
    low, high, kind = config.ramp_up_start_rps, config.ramp_up_end_rps, config.ramp_up_strategy
    if kind is None:
        return [config.request_rate] * count
    if kind not in ("linear", "exponential"):
        raise InputError(f"--ramp-up-strategy is linear or exponential, got {kind}")
    if low is None or high is None or min(low, high) <= 0 or not math.isinf(config.request_rate):
        raise InputError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps above 0, and no --request-rate")
    shares = [i / max(1, count - 1) for i in range(count)]
    return [low + (high - low) * s if kind == "linear" else low * (high / low) ** s for s in shares]
