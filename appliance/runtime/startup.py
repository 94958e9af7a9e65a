"""From a loaded model to an engine that may say it is ready: warm-up, the measured cache, recorded steps, and what it all took.

    weights -> steps of every kind over a cache of one block -> what does the card hold? -> cache -> recorded steps -> rehearsal
               (every kernel is compiled, or comes from Triton's cache on disk)

A CPU has nothing to compile and nothing to measure: its cache is the planned one.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from appliance.adapters import spec_of
from appliance.config import EngineConfig
from appliance.memory.measure import Reading, measured, recorded
from appliance.memory.planner import MemoryPlan
from appliance.memory.settings import parse_length, records_steps
from appliance.memory.text import measured_lines, size_text
from appliance.runtime import warmup
from appliance.runtime.failures import told
from appliance.runtime.footprint import resident, settle, teach_graphs
from appliance.runtime.graphs import CudaRecorder, Recorder
from appliance.runtime.offload import Offloading
from appliance.runtime.runner import Runner
from appliance.runtime.staging import CudaLane, Lane
from kernels.ops import get_ops
from models.decoder import Decoder
from models.loader import load_model
from quant.checkpoint import Checkpoint

log = logging.getLogger("appliance.startup")


class Gauge(Protocol):
    """What a device tells of its memory. Tests have one for the CPU."""

    def begin(self) -> None:
        """Give back what nobody uses; what is held at most counts from now on."""

    def read(self) -> Reading: ...


class CudaGauge:
    """The current card."""

    def begin(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def read(self) -> Reading:
        torch.cuda.synchronize()
        free, _ = torch.cuda.mem_get_info()
        return Reading(free=free, reserved=torch.cuda.memory_reserved(), peak=torch.cuda.max_memory_reserved())


@dataclass(frozen=True)
class Tools:
    """What a device offers beside its operators; a CPU nothing of it."""

    lane: Lane | None = None
    gauge: Gauge | None = None
    recorder: Recorder | None = None

    @classmethod
    def of(cls, device: torch.device, config: EngineConfig, planned: str) -> Tools:
        """``planned``: name of the card for which memory was planned."""
        if device.type != "cuda":
            return cls()
        if (name := torch.cuda.get_device_name(device)) != planned:
            log.warning(
                "planned for %s, but CUDA's first card is %s; CUDA_DEVICE_ORDER=PCI_BUS_ID counts as nvidia-smi does",
                planned,
                name,
            )
        return cls(CudaLane(), CudaGauge(), CudaRecorder() if records_steps(config, device.type) else None)


class Timeline:
    """Seconds that the parts of a start take, one after another."""

    def __init__(self, import_s: float = 0.0) -> None:
        self.seconds: dict[str, float] = {"import": import_s} if import_s else {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    def move(self, name: str, seconds: float, source: str) -> None:
        """So much of what ``source`` took counts as a part of its own."""
        self.seconds[source] -= seconds
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())


class Stopwatch:
    """Passes calls on, from any thread, and knows for how many seconds at least one was under way."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self.work, self.seconds = work, 0.0
        self._lock, self._running, self._begun = threading.Lock(), 0, 0.0

    def __call__(self, *args: Any, **options: Any) -> Any:
        with self._lock:
            self._begun = self._begun if self._running else time.perf_counter()
            self._running += 1
        try:
            return self.work(*args, **options)
        finally:
            with self._lock:
                self._running -= 1
                self.seconds += 0.0 if self._running else time.perf_counter() - self._begun


class Watched:
    """A recorder of which is known how long it took, and how much memory."""

    def __init__(self, recorder: Recorder, gauge: Gauge) -> None:
        self.recorder, self.gauge, self.steps, self._before = recorder, gauge, 0, 0
        self.record = Stopwatch(self._record)

    def begin(self) -> None:
        self.recorder.begin()
        self.gauge.begin()

    def _record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if not self.steps:
            self.begin()
            self._before = self.gauge.read().free
        self.steps += 1
        return self.recorder.record(work)

    def taken(self) -> int:
        """Bytes that recording has taken so far."""
        return max(0, self._before - self.gauge.read().free)


class Kernels:
    """Counts Triton's kernels while it is entered: those that were compiled, and those that its cache on disk had."""

    def __init__(self, ops: str) -> None:
        self.compiled = self.cached = 0
        self._knobs: Any = None
        if ops == "triton":
            from triton import knobs

            self._knobs = knobs

    def __enter__(self) -> Kernels:
        if self._knobs is not None:
            self._before, self._knobs.compilation.listener = self._knobs.compilation.listener, self._count
        return self

    def __exit__(self, *error: object) -> None:
        if self._knobs is not None:
            self._knobs.compilation.listener = self._before

    def _count(self, *args: Any, cache_hit: bool, **facts: Any) -> None:
        self.cached += cache_hit
        self.compiled += not cache_hit
        if self.compiled == 1 and not cache_hit:
            log.info("compiling kernels, which the next start takes from %s", self._knobs.cache.dir)
        if self._before is not None:
            self._before(*args, cache_hit=cache_hit, **facts)

    def __str__(self) -> str:
        if self._knobs is None:
            return "no kernels to compile"
        return f"{self.compiled} kernels compiled, {self.cached} from {self._knobs.cache.dir}"


def load_decoder(
    config: EngineConfig,
    plan: MemoryPlan,
    device: torch.device,
    timeline: Timeline,
    progress: Callable[[int, int], None] | None,
) -> tuple[Decoder, str]:
    """The planned model, and how it is quantized."""
    assert config.model is not None
    offloading = Offloading(plan.offload, device) if plan.offload.layers else None
    with timeline.part("load"):
        checkpoint = Checkpoint.open(Path(config.model), config.quantization)
        try:
            ops = get_ops(device.type, reference=config.reference_ops, threads=config.threads)
            spec = spec_of(checkpoint.config, config)
            packing = Stopwatch(ops.pack)
            decoder = load_model(
                checkpoint,
                spec,
                replace(ops, pack=packing),
                dtype=getattr(torch, plan.dtype),
                max_len=plan.max_model_len,
                lm_head_dtype=config.lm_head_dtype,
                embedding_dtype=config.embedding_dtype,
                activation=config.activation_dtype,
                progress=progress,
                take=None if offloading is None else offloading.take,
                workers=plan.workers.count,
                ends_first=plan.workers.ends_first,
            )
            if offloading is not None:
                decoder = offloading.finish(decoder)
        finally:
            checkpoint.close()
    timeline.move("pack", packing.seconds, "load")
    return decoder, checkpoint.scheme.method


def make_runner(
    decoder: Decoder,
    plan: MemoryPlan,
    config: EngineConfig,
    tools: Tools,
    timeline: Timeline,
    *,
    device: torch.device,
    alone: bool,
) -> tuple[Runner, MemoryPlan]:
    """A runner that has done what it will do, and the plan as it is now known. PlanError where the card's memory is too small.

    ``alone``: whether this process has nothing but the engine, so that what it takes is a lesson for the next plan.
    """
    loaded = resident() if alone else None
    with Kernels(decoder.ops.name) as kernels, told(plan):
        if tools.gauge is None:
            with timeline.part("cache"):
                runner = Runner(decoder, plan, device=device, lane=tools.lane)
            return runner, settle(plan, runner, loaded)
        with timeline.part("warm-up"):
            reading = _measure(decoder, plan, tools, tools.gauge, device)
        runner, plan = _filled(decoder, plan, reading, config, tools, tools.gauge, timeline, device)
        with timeline.part("warm-up"):
            runner.rehearse_copies(plan)
            warmup.run(runner, warmup.rehearsal(plan), plan.max_model_len)
    recorded = 0 if tools.recorder is None else len(plan.decode_sizes)
    log.info("warmed up: %s; %d sizes of decode steps recorded", kernels, recorded)
    for line in measured_lines(plan):
        log.info("%s", line.strip())
    return runner, settle(plan, runner, loaded)


def _measure(decoder: Decoder, plan: MemoryPlan, tools: Tools, gauge: Gauge, device: torch.device) -> Reading:
    """Run steps of every kind over a cache of one block: what is held then."""
    gauge.begin()
    one_block = replace(plan, num_blocks=1, swap_blocks=0)
    runner = Runner(decoder, one_block, device=device, lane=tools.lane)
    log.debug("%d steps of warm-up", warmup.run(runner, warmup.trials(plan), plan.max_model_len))
    return gauge.read()


def _filled(
    decoder: Decoder,
    plan: MemoryPlan,
    reading: Reading,
    config: EngineConfig,
    tools: Tools,
    gauge: Gauge,
    timeline: Timeline,
    device: torch.device,
) -> tuple[Runner, MemoryPlan]:
    """A runner with the cache that the reading leaves and, where steps are recorded, these, all within the budget."""
    while True:
        found = measured(plan, reading, auto_length=parse_length(config.max_model_len) is None)
        recorder = None if tools.recorder is None else Watched(tools.recorder, gauge)
        gauge.begin()  # else the cache would lie in what steps, or the cache before it, have left, and keep all of that
        with timeline.part("cache"):
            runner = Runner(decoder, found, device=device, lane=tools.lane, recorder=recorder)
        if recorder is None or found.measured is None:
            return runner, found
        timeline.move("graphs", recorder.record.seconds, "cache")
        found = replace(found, measured=replace(found.measured, graphs=recorder.taken()))
        teach_graphs(found, runner)
        if (more := recorded(plan, found)) is None:
            return runner, found
        log.warning(
            "recorded decode steps took %s, not %s as planned, and with them all would be more than the budget of %s: "
            "they and a smaller cache are made once more",
            *map(size_text, (more.graph_bytes, plan.graph_bytes, plan.budget)),
        )
        plan = more
        del runner, recorder
        gc.collect()  # a runner and its recorded steps refer to each other
