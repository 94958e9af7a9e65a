"""``plan --check``: the engine is loaded for real, runs its largest steps, and what it then takes is held against the plan."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from appliance.config import EngineConfig
from appliance.core.params import RequestError, SamplingParams
from appliance.memory.devices import MIB, cpu_threads
from appliance.memory.learned import code_words, record_steps
from appliance.memory.measure import categories
from appliance.memory.plan import MemoryPlan
from appliance.memory.planner import make_plan
from appliance.memory.report import CheckReport, Row
from appliance.runtime import warmup
from appliance.runtime.failures import told
from appliance.runtime.footprint import footprint, resident
from appliance.runtime.options import choose_device
from appliance.runtime.runner import Runner
from appliance.runtime.startup import CudaGauge, Timeline, Tools, load_decoder, make_runner
from appliance.text.grammar import library, limits, vocabulary
from kernels.ops import MLP, Mixture
from models.decoder import Decoder
from quant.errors import InputError

CPU_SHARE = 0.02
CARD_SHARE, CARD_BYTES = 0.01, 100 * MIB
"""What a process may be off: 2 % on a CPU; on a card 1 %, or 100 MiB where that is more."""


def check(directory: Path, config: EngineConfig) -> CheckReport:
    """Load the checkpoint in this process, run steps of the largest sizes, and compare. Raises what Engine.load raises.

    Of a CPU the whole process is compared: checking should be all that it does, with no more in it than a server's engine has
    (check_process.py).
    """
    config = replace(config, model=str(directory))
    torch.set_num_threads(cpu_threads(config.threads))
    device, planned, timeline = choose_device(config.device), make_plan(Path(directory), config), Timeline()
    meter = Meter(device, planned.device.available)
    with told(planned):
        decoder, _ = load_decoder(config, planned, device, timeline, None)
    loading = Row("loading, at most", planned.load_peak, meter.peak(), below=True)
    tools = Tools.of(device, config, planned.device.name)
    runner, plan = make_runner(decoder, planned, config, tools, timeline, device=device, alone=True)
    if decoder.ops.name == "cpu-native":
        torch.set_num_threads(1)  # as the engine does
    steps = warmup.run(runner, meter.over(largest(plan, scores=config.reference_ops)), plan.max_model_len)
    if device.type == "cpu":
        record_steps(plan.device, decoder.ops.name, code_words(plan.quantization, plan.dtype), meter.code)
    share, least = (CPU_SHARE, 0) if device.type == "cpu" else (CARD_SHARE, CARD_BYTES)
    later = plan.grammar_bytes if device.type == "cpu" else 0  # comes with the first answer that follows one
    later += plan.weights.get("adapters", 0)  # and these when they are loaded
    allowed = max(int(share * (plan.total - later)), least)
    total = Row("all, while the largest steps run", plan.total - later, meter.peak(), allowed)
    after = Row("all, after them", plan.total - later, meter.now(), allowed, below=True)
    grammars, unchecked = _vocabulary(directory, config, decoder, plan)
    return CheckReport(plan, (*_parts(plan, runner), loading, total, after, *grammars), steps, unchecked)


def _vocabulary(directory: Path, config: EngineConfig, decoder: Decoder, plan: MemoryPlan) -> tuple[list[Row], str]:
    """What the first answer that follows a grammar brings into the process; and why that was not looked at, where none can."""
    if not plan.grammars:
        return [], ""
    source, before, spec = Path(config.tokenizer or directory), resident().total, decoder.spec
    from appliance.text.files import check_tokenizer  # no engine has these before its vocabulary is read
    from appliance.text.tokenizer import Tokenizer

    try:
        check_tokenizer(source)
        lib = library()
    except (InputError, RequestError) as error:
        return [], f"what answers that follow a grammar take: {error}"
    words = vocabulary(Tokenizer.load(source), spec.vocab, spec.eos_token_ids or (0,))
    matcher = lib.LLMatcher(words, lib.LLMatcher.grammar_from_json_schema('{"type": "object"}'), log_level=0, limits=limits())
    matcher.compute_bitmask()
    return [Row("vocabulary for grammars", plan.grammars["vocabulary"], resident().total - before, below=True)], ""


def largest(plan: MemoryPlan, *, scores: bool = False) -> Iterator[warmup.Trial]:
    """Steps that take the most: of the most tokens, of the most sequences, of the longest ones, with every way to draw.

    ``scores``: whether those of each token with all before it are there at once, so that a prompt's last tokens take the most.
    """
    tokens, longest = plan.max_num_batched_tokens, plan.max_model_len
    sequences = min(plan.max_num_seqs, tokens)
    yield warmup.full(plan)
    yield from (warmup.decodes(sequences, params) for params in (warmup.GREEDY, *warmup.DRAWS, *warmup.ON_HOST))
    yield warmup.Trial(((longest - 1, 1),) * max(1, min(sequences, int(plan.sequences(longest)))))
    yield warmup.Trial(((0, min(longest, tokens)),), SamplingParams(prompt_logprobs=2))
    if scores and longest > tokens:
        yield warmup.Trial(((longest - tokens, tokens),))


def weights_by_part(decoder: Decoder) -> dict[str, int]:
    """Bytes of the loaded weights, by the parts of a plan."""
    layers = decoder.layers
    linears: dict[str, int] = {}
    for layer in layers:
        kind = "delta" if layer.delta is not None else "conv" if layer.conv is not None else "attention"
        beside = () if layer.latents is None else layer.latents.weights
        linears[kind] = linears.get(kind, 0) + sum(weight.nbytes for weight in (*layer.qkv, layer.o, *beside))
    mixtures = [one for layer in layers for one in (layer.mlp, layer.beside and layer.beside.mixture) if isinstance(one, Mixture)]
    if mixtures:
        linears["router"] = sum(
            weight.nbytes for one in mixtures for weight in (one.router, one.shared_gate) if weight is not None
        )
        linears["experts"] = sum(mlp.nbytes for one in mixtures for mlp in one.experts)
    alone = [layer.mlp for layer in layers if isinstance(layer.mlp, MLP)]
    if of_all := [*alone, *(one.shared for one in mixtures if one.shared is not None)]:
        linears["mlp"] = sum(one.nbytes for one in of_all)
    norms = decoder.norm.nbytes
    if (inputs := decoder.inputs) is not None:
        linears["per_layer"] = sum(weight.nbytes for layer in layers if layer.told is not None for weight in layer.told.weights)
        norms += inputs.norm.nbytes
    norms += sum(layer.nbytes for layer in layers) - sum(linears.values())
    if inputs is not None:
        linears["per_layer_embedding"] = inputs.nbytes - inputs.norm.nbytes
    return {
        "embedding": decoder.embedding.nbytes,
        **linears,
        "head": 0 if decoder.tied else decoder.head.nbytes,
        "norms": norms,
    }


def _parts(plan: MemoryPlan, runner: Runner) -> Iterator[Row]:
    """What must be as planned to the byte."""
    measured = footprint(plan, runner, None)
    if not plan.offload.layers:  # what is streamed in has no place of its own
        for part, size in weights_by_part(runner.decoder).items():
            yield Row(f"weights: {part}", plan.weights[part], size)
    for name in ("weights", "rotary table", "KV cache", "states", "swap space"):
        if name in measured:
            yield Row(name, categories(plan)[name], measured[name])


class Meter:
    """What a CPU's process, or a card, has in use.

    Of a process, what is its own with all code that has been in memory: the system takes pages of files away at any time.
    """

    def __init__(self, device: torch.device, available: int) -> None:
        """``available``: bytes of the card that were free before this process took any."""
        self.device, self.available = device, available
        self.code = 0  # bytes, the most so far
        self._own = 0  # bytes that were the process's own at most, of steps that were watched
        self.begin()

    def begin(self) -> None:
        """The peak begins anew, where the system can do that."""
        if self.device.type == "cuda":
            CudaGauge().begin()
            return
        with contextlib.suppress(OSError):  # not Linux
            Path("/proc/self/clear_refs").write_text("5")

    def over(self, steps: Iterable[warmup.Trial]) -> Iterator[warmup.Trial]:
        """The steps: what each takes is looked at when the next one is asked for. The peak is theirs then."""
        self.begin()
        for step in steps:
            yield step
            if self.device.type == "cpu":
                self._look()
                self.begin()

    def _look(self) -> None:
        """Code comes with steps, so that there is most of it behind one, unless the system has taken some."""
        highest, found = self.highest(), resident()
        self.code, self._own = max(self.code, found.code), max(self._own, highest - found.code)

    def now(self) -> int:
        if self.device.type == "cuda":
            return self.available - CudaGauge().read().free
        return resident().own + self.code

    def peak(self) -> int:
        """The most since ``begin``, or of the steps."""
        if self.device.type == "cuda":
            reading = CudaGauge().read()
            return reading.held(self.available)
        return max(self._own + self.code, self.highest())

    def highest(self) -> int:
        """The most that this process had in memory since ``begin``."""
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:  # not Linux
            return resident().total
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
