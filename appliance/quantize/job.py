"""Quantizing a model from directory to directory. In memory at a time: one layer's weights, and all samples' hidden states."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from appliance.memory.agreement import check_headers
from appliance.quantize.ends import Ends
from appliance.quantize.layer import Made, Watcher, quantize_layer
from appliance.quantize.mixed import Choice, Mixer
from appliance.quantize.options import Options
from appliance.quantize.recipe import Recipe, stored_bytes
from appliance.quantize.sensitivity import measure
from appliance.quantize.shards import Shards, checked_output, noted
from models.plain import FLOATS, PlainLayer, compute_dtype, embedded, finite
from models.rope import cos_sin_table
from models.spec import ARCHITECTURES, ModelSpec
from quant.checkpoint import Checkpoint
from quant.errors import InputError
from quant.headers import CheckpointIndex, read_header
from quant.publish import check_shape, config_section, tensors_of
from quant.scheme import QuantScheme
from quant.tensor import QuantTensor

log = logging.getLogger("appliance.quantize")

TOKENS_AT_ONCE = 4096  # that go through a layer together
FIRST, SEARCH = 0.3, 0.5  # about: shares of a layer's time that looking at its inputs takes, and quantizing
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PUBLISHED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float16}  # what the rest is written in


@dataclass
class Report:
    """What came of it: mean squared error of each module's outputs where the method knows it, and seconds of each layer."""

    output: Path
    nbytes: int = 0
    losses: dict[str, float] = field(default_factory=dict)


class Job:
    """One quantization. ``ids``: the calibration's tokens int64 [samples, length]; None where the method takes none."""

    def __init__(
        self, source: Path, output: Path, options: Options, ids: Tensor | None, device: torch.device | str = "cpu"
    ) -> None:
        """``device``: cpu or cuda, where a layer is worked on. InputError for what cannot be quantized so, or has no room."""
        self.source, self.options, self.ids, self.device = source, options, ids, torch.device(device)
        self.output = output = checked_output(output, source)
        self.checkpoint = Checkpoint.open(source)
        if self.checkpoint.scheme.method != "none":
            raise InputError(f"{source} is quantized already ({self.checkpoint.scheme.method}): give the original model")
        self.spec = ModelSpec.from_config(self.checkpoint.config)
        check_kind(source, self.spec)
        if ids is not None and ids.shape[1] > self.spec.max_len:
            raise InputError(f"--calibration-length is {ids.shape[1]}, but the model was made for {self.spec.max_len} tokens")
        self._check_tensors()
        self.published = torch.float16 if options.format == "awq" else PUBLISHED[self.spec.dtype]
        self.recipe = Recipe(options.grid(self.published))
        self.ends = Ends(self.spec, options, self.recipe.default)
        for module in self.spec.layer_modules() if not options.mixed else ():
            check_shape(str(options.format), module.name, module.N, module.K, self.recipe.default)
        self.mixer = Mixer(options, self.spec, self.recipe.default, self._config, noted(output)) if options.mixed else None
        self.chosen: Choice | None = None
        self.shards = Shards(output, self._fingerprint(), self.spec.layers + 1, self.expected_bytes())
        if self.mixer is not None and not self.shards.resumed:
            self.mixer.forget()
        length = 1 if ids is None else ids.shape[1]
        self.tables = {rope: cos_sin_table(rope, max(length, 1)) for rope in self.spec.ropes}

    def _check_tensors(self) -> None:
        """Raises InputError for tensors that are missing or have another shape, and for those that would get lost."""
        modules, checkpoint = self.spec.modules(), self.checkpoint
        check_headers(checkpoint.index, self.spec, checkpoint.scheme)
        known = {f"{module.name}.weight" for module in modules} | {name for name, _ in self.spec.small_tensors()}
        biases = {f"{module.name}.bias" for module in modules if module.bias}
        if missing := sorted(name for name in biases if not checkpoint.has(name)):
            raise InputError(f"{self.source}: {len(missing)} tensors are missing: {', '.join(missing[:5])}")
        known |= biases
        checkpoint.consumed |= known | {HEAD}
        if rest := checkpoint.leftover():
            kind = self.spec.architecture
            raise InputError(f"{self.source}: {len(rest)} tensors have no place in a {kind}: {', '.join(rest[:5])}")

    def expected_bytes(self) -> int:
        """Of the new checkpoint, about: codes, scales and zero points, and what stays as it is."""
        if self.mixer is not None:
            return self.ends.nbytes + self.mixer.room
        grid, form = self.recipe.default, str(self.options.format)
        each = sum(stored_bytes(module.N, module.K, grid, form) for module in self.spec.layer_modules())
        return self.ends.nbytes + self.spec.layers * each

    def _fingerprint(self) -> dict[str, Any]:
        """What must be the same for a job to be gone on with."""
        tensors = sorted((name, info.dtype, *info.shape) for name, info in self.checkpoint.index.tensors.items())
        text = hashlib.sha256(b"" if self.ids is None else self.ids.numpy().tobytes()).hexdigest()
        made_of = hashlib.sha256(repr(tensors).encode()).hexdigest()
        files = {info.file for info in self.checkpoint.index.tensors.values()}
        return {
            "source": str(self.source.resolve()),
            "config": self.checkpoint.config,
            "files": sorted([path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files),
            "tensors": made_of,
            "options": asdict(self.options),
            "text": text,
        }

    def run(self, progress: Callable[[float], None] = lambda done: None) -> Report:
        """Quantize. ``progress`` is told the layers done, and shares of one. Raises InputError; what is done by then is kept."""
        try:
            return self._run(progress)
        finally:
            self.shards.let_go()

    def _run(self, progress: Callable[[float], None]) -> Report:
        report = Report(self.output)
        self._check_ends()
        if self.mixer is not None and self.chosen is None:
            self.choose()
        looked_at = self.ids is not None and (self.options.method != "rtn" or self.options.kv_scales)
        hidden = self._embedded(self.ids) if self.ids is not None and looked_at else None
        for number in range(self.spec.layers):
            progress(number)
            last = number == self.spec.layers - 1 and not self.ends.calibrated  # whose outputs nobody looks at
            if self.shards.has(number):
                if hidden is not None and not last:
                    self._go_through(number, hidden)
                continue
            layer = self._read(number)
            made, extra = self._layer(layer, hidden, last, progress)
            report.losses |= {f"model.layers.{number}.{name}": loss for name, loss in made.losses.items()}
            self._write(number, {**self._tensors(layer, made), **extra})
        progress(self.spec.layers)
        if not self.shards.has(self.spec.layers):
            self._write(self.spec.layers, self._ends(hidden))
        self._finish()
        report.nbytes = sum(path.stat().st_size for path in self.output.glob("*.safetensors"))
        return report

    def choose(self, progress: Callable[[float], None] = lambda done: None) -> str:
        """Mixed precision: take the bits that this job began with, or measure what they are worth. Returns them in words.

        ``progress`` is told shares of 1. Raises InputError.
        """
        assert self.mixer is not None and self.ids is not None
        note = self.mixer.chosen
        if note is None:
            grids, seed = self.mixer.grids, self.options.seed
            costs = measure(self.source, self.spec, self.ids, grids, device=self.device, seed=seed, progress=progress)
            note = self.mixer.choose(costs)
            self.shards.keep(note)
        progress(1.0)
        self.chosen, self.recipe = note, self.mixer.recipe(note)
        return self.mixer.told(note)

    def _layer(
        self, layer: PlainLayer, hidden: Tensor | None, last: bool, progress: Callable[[float], None]
    ) -> tuple[Made, dict[str, Tensor]]:
        """Quantize one layer; (what was made, its scales of keys and values). ``hidden`` becomes what it is behind the layer."""
        batches = [] if hidden is None else list(self._batches(hidden))
        gptq, kv_scales = self.options.method == "gptq", self.options.kv_scales
        again = kv_scales or (gptq and not last)  # GPTQ's later layers make good what this one lost
        watcher, after = Watcher(self.options.method, len(batches), False), []
        for k, batch in enumerate(batches):
            progress(layer.number + FIRST * k / len(batches))
            if gptq or last:  # what the layer makes of it is not needed, or not yet
                layer.look(batch.to(self.device).float(), watcher)
                continue
            there = layer.forward(batch.to(self.device).float(), watcher)
            if again:
                after.append(there.to(batch.device, batch.dtype))
            else:
                batch.copy_(there)

        def tell(done: float) -> None:
            progress(layer.number + FIRST + SEARCH * done)

        made = quantize_layer(layer, watcher, self.options, self.recipe, self.published, tell)
        del watcher  # and the Hessians in it
        largest = Watcher("rtn", 0, kv_scales)
        for k, batch in enumerate(batches if again else ()):
            progress(layer.number + FIRST + SEARCH + (1 - FIRST - SEARCH) * k / len(batches))
            there = layer.forward(batch.to(self.device).float(), largest)
            if not last:
                batch.copy_(there if gptq else after[k])
        return made, self._kv_scales(layer.number, largest.largest) if kv_scales else {}

    def _read(self, number: int) -> PlainLayer:
        """One layer of the model, its weights as published: they are made wider where they are worked on."""
        compute = compute_dtype(self.spec.dtype, self.device)
        cos_sin = self.tables[self.spec.rope_of(number)]
        return PlainLayer.read(self.checkpoint, self.spec, number, cos_sin, None, compute).to(self.device)

    def _kv_scales(self, number: int, largest: Mapping[str, float]) -> dict[str, Tensor]:
        """What keys and values are divided by in a cache of FP8."""
        found = {}
        for short, name in (("k", "keys"), ("v", "values")):
            scale = max(largest[name] / torch.finfo(torch.float8_e4m3fn).max, 1e-6)
            found[f"model.layers.{number}.self_attn.{short}_scale"] = torch.tensor([scale], dtype=torch.float32)
        return found

    def _go_through(self, number: int, hidden: Tensor) -> None:
        """Take hidden states behind a layer that is done: as it is now (GPTQ), or as it was."""
        layer = self._read(number)
        if self.options.method == "gptq":
            layer.weights = {name: weight.to(self.device, layer.compute) for name, weight in self._written(number)}
        for batch in self._batches(hidden):
            batch.copy_(layer.forward(batch.to(self.device).float()))

    def _written(self, number: int) -> Iterator[tuple[str, Tensor]]:
        """The quantized weights of a layer that is done, float32, by module."""
        index = CheckpointIndex(self.shards.folder, read_header(self.shards.path(number)))
        config = {**self.checkpoint.config, "quantization_config": self._section(self.recipe)}
        with Checkpoint(index, config, QuantScheme.from_config(config, None, index)) as done:
            for module in self.spec.layer_modules():
                weight = done.weight(f"model.layers.{number}.{module.name}", expect=(module.N, module.K))
                yield module.name, weight.dequantize() if isinstance(weight, QuantTensor) else weight.float()

    def _batches(self, hidden: Tensor) -> Iterator[Tensor]:
        return iter(hidden.split(max(1, TOKENS_AT_ONCE // hidden.shape[1])))

    def _embedded(self, ids: Tensor) -> Tensor:
        """Hidden states [samples, length, hidden] in the model's own type: all of them stay in memory."""
        name = EMBEDDING if self.checkpoint.has(EMBEDDING) else HEAD
        table = self.checkpoint.take(name, dtypes=FLOATS, shape=(self.spec.vocab, self.spec.hidden))
        return embedded(table, ids, self.spec)

    def _tensors(self, layer: PlainLayer, made: Made) -> dict[str, Tensor]:
        prefix, form = f"model.layers.{layer.number}", str(self.options.format)
        found = {f"{prefix}.{name}.weight": norm for name, norm in layer.norms.items()}
        found |= {f"{prefix}.{name}.bias": bias for name, bias in layer.biases.items()}
        found = {name: self._publish(name, tensor) for name, tensor in found.items()}
        for name, weight in made.modules.items():
            full = f"{prefix}.{name}"
            if isinstance(weight, Tensor):
                found[f"{full}.weight"] = self._publish(full, weight)
            else:
                found |= {f"{full}.{key}": tensor for key, tensor in tensors_of(form, weight).items()}
        return found

    def _ends(self, hidden: Tensor | None = None) -> dict[str, Tensor]:
        """Embedding, head and the last norm. ``hidden``: from the last layer."""
        batches = self._batches(hidden) if hidden is not None and self.ends.calibrated else None
        return self.ends.tensors(self.checkpoint, batches, self._publish, self.device)

    def _publish(self, name: str, tensor: Tensor) -> Tensor:
        """In the type of the file. Raises InputError where that cannot hold it."""
        return _held(name, tensor.to(self.published))

    def _check_ends(self) -> None:
        """Before the layers: hours later would be late to say so. Raises InputError for numbers that the file cannot hold."""
        for name in () if self.shards.has(self.spec.layers) else (EMBEDDING, HEAD, "model.norm.weight"):
            if self.checkpoint.has(name):
                self._publish(name, self.checkpoint.take(name, dtypes=FLOATS))

    def _write(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Raises InputError for numbers that the file cannot hold, such as the scales of very large weights."""
        self.shards.write(number, {name: _held(name, tensor) for name, tensor in tensors.items()})

    def _section(self, recipe: Recipe) -> dict[str, Any]:
        options, others = self.options, {**recipe.others, **self.ends.grids}
        said = {"act_order": options.act_order, "static_groups": options.static, "kv_scales": options.kv_scales}
        return config_section(str(options.format), recipe.default, others, **said, more=options.told())

    def _config(self, recipe: Recipe | None) -> dict[str, Any]:
        """config.json of what a recipe makes, or of the same in the published type alone."""
        left_out = ("torch_dtype", "dtype", "auto_map")  # the last one speaks of files that are not copied
        config = {key: value for key, value in self.checkpoint.config.items() if key not in left_out}
        config["torch_dtype"] = str(self.published).removeprefix("torch.")
        if self.ends.untied:
            config["tie_word_embeddings"] = False
        return config if recipe is None else {**config, "quantization_config": self._section(recipe)}

    def _finish(self) -> None:
        config = self._config(self.recipe)
        beside = {"quantize_config.json": config["quantization_config"]} if str(self.options.format).startswith("gptq") else {}
        self.shards.finish(self.source, config, beside)


def _held(name: str, tensor: Tensor) -> Tensor:
    """The same. Raises InputError where it holds numbers that are not finite."""
    if tensor.is_floating_point() and not finite(tensor):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{name}: some of its values are not finite numbers in {kind}; take another --format, or mend it")
    return tensor


def check_kind(source: Path, spec: ModelSpec) -> None:
    """Raises InputError for models that are served and not quantized here."""
    if spec.delta is not None:
        raise InputError(
            f"{source} is a {spec.architecture}: its layers of the gated delta rule are served and not quantized here"
        )
    if spec.v_norm or spec.conv is not None:
        raise InputError(f"{source} is a {spec.architecture}, whose layers this version serves and does not quantize")
    if spec.latent is not None:
        raise InputError(f"{source} is a {spec.architecture}: its attention over latents is served and not quantized here")
    if spec.mixture is not None:
        raise InputError(f"{source}: {spec.architecture} is a mixture of experts, and this version quantizes none")
    if spec.ungated == "xielu" or ARCHITECTURES[spec.architecture].hybrid:
        raise InputError(f"{source} is a {spec.architecture}, whose layers this version serves and does not quantize")
    if ARCHITECTURES[spec.architecture].text_part:
        raise InputError(f"{source} is a {spec.architecture}: only its text part is known here; give that as a model of its own")
