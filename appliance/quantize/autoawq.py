"""``--engine autoawq``: AutoAWQ's own quantizer makes the layers; what it is given, and what becomes of them, is ours.

AutoAWQ 0.2.9 is its last release, made for transformers 4.51. What it is helped with here, without touching its search:

- It loads models with options that transformers 5 has no more, runs code that lies beside them, and opens a dataset on the hub.
  It is handed a model that is loaded already, and token ids.
- It computes in the type of the file. Half precision is slow on a CPU and coarse, so a layer becomes float32 when its turn comes.
- It puts weights aside before each trial with ``.cpu()``, which is no copy on a CPU: what it restores afterwards has been scaled
  in place, 20 times over, so that the model is damaged. There it gets copies.
- It keeps all samples in one batch, and what transformers made for that batch (positions, mask). These are cut to a single row,
  which is right for any part of the batch: no sample is padded.
- It takes a card by itself wherever torch sees one, draws its own progress bar and sets Python's filter of warnings for good.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from appliance.quantize.job import TOKENS_AT_ONCE, Job, Report
from appliance.quantize.layer import UNCUT
from appliance.quantize.options import Options
from models.spec import ModelSpec
from quant.errors import InputError
from quant.headers import read_json

VERSION = "0.2.9"
OURS = "leave --engine autoawq out"
# What an option may be, by its flag; those of no account here (text, group size, clipping) are not named.
TAKES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "method": ("--method", ("awq",)),
    "bits": ("--bits", (4,)),
    "format": ("--format", (None, "awq")),
    "sym": ("--sym", (None, False)),
}
FREE = ("engine", "group_size", "clip", "calibration_samples", "calibration_length", "seed")
ROWS = 64  # outputs: AutoAWQ's clipping goes through so many at a time, and knows no rest


def check_options(options: Options) -> None:
    """Raises InputError for what AutoAWQ cannot be asked for, and where the package is absent."""
    for one in fields(options):
        value, flag, allowed = getattr(options, one.name), "--" + one.name.replace("_", "-"), (one.default,)
        if one.name in FREE:
            continue
        flag, allowed = TAKES.get(one.name, (flag, allowed))
        if value not in allowed:
            said = f"{flag} {value}" if not isinstance(value, bool) else flag if value else f"--no-{flag[2:]}"
            raise InputError(f"{said}: --engine autoawq does awq in 4 bits with zero points, --format awq, and no more; {OURS}")
    if options.group_size < 1:
        raise InputError(f"--group-size {options.group_size}: AutoAWQ's search needs groups, 128 or 64 or 32; or {OURS}")
    _check_package()


def _check_package() -> None:
    try:
        found = metadata.version("autoawq")
    except metadata.PackageNotFoundError:
        raise InputError("--engine autoawq needs the package autoawq: pip install 'appliance[autoawq]'") from None
    if found != VERSION:
        raise InputError(
            f"--engine autoawq: autoawq {found} is installed, but {VERSION} is what works: pip install autoawq=={VERSION}"
        )


def check_model(spec: ModelSpec, kind: str, options: Options, length: int) -> None:
    """Raises InputError for models that AutoAWQ does not know, or makes something wrong of.

    ``kind``: config.json's model_type; ``length``: tokens of a sample.
    """
    known = _package("awq.models.auto").AWQ_CAUSAL_LM_MODEL_MAP
    if kind not in known:
        raise InputError(f"config.json: AutoAWQ {VERSION} does not know model_type {kind!r}; {OURS}")
    if spec.fused_qkv and spec.kv_heads != spec.heads:
        raise InputError(
            f"AutoAWQ divides rows of the keys by scales meant for values where {spec.heads} query heads share {spec.kv_heads} "
            f"in one qkv_proj: the model would be broken; {OURS}"
        )
    for module in spec.layer_modules():
        if options.clip and module.N % ROWS and module.name.rpartition(".")[2] not in UNCUT[:2]:
            raise InputError(
                f"{module.name} has {module.N} outputs: AutoAWQ's clipping needs a multiple of {ROWS}; add --no-clip, or {OURS}"
            )
    shortest = min((window for window in spec.windows if window is not None), default=length)
    if len(set(spec.windows)) > 1 and length > shortest:
        raise InputError(
            f"--calibration-length {length}: AutoAWQ shows all layers the first one's mask, and some here see {shortest} tokens "
            f"only; take --calibration-length {shortest}, or {OURS}"
        )


class AutoAWQJob(Job):
    """The same, done by AutoAWQ. The whole model is in memory, in the type of its file; no interrupted job is gone on with."""

    def __init__(
        self, source: Path, output: Path, options: Options, ids: Tensor | None, device: torch.device | str = "cpu"
    ) -> None:
        """As ``Job``. Raises InputError for what AutoAWQ cannot quantize, too."""
        assert ids is not None
        check_options(options)
        config = read_json(source / "config.json")
        self.kind = str(config.get("model_type"))
        check_model(ModelSpec.from_config(config), self.kind, options, ids.shape[1])
        super().__init__(source, output, options, ids, device)

    def _forget(self) -> None:
        """Nothing that was begun is of use to a later job."""
        shutil.rmtree(self.shards.folder, ignore_errors=True)

    def run(self, progress: Callable[[float], None] = lambda done: None) -> Report:
        """Quantize. ``progress`` is told the layers done, and shares of one. Raises InputError, and leaves nothing then."""
        try:
            return super().run(progress)
        except BaseException:
            self._forget()
            raise

    def _run(self, progress: Callable[[float], None]) -> Report:
        assert self.ids is not None
        model = self._loaded()
        with _helped(self.device):
            quantize(model, self.kind, self.ids, self.options, progress)
        for number, layer in enumerate(model.model.layers):
            prefix = f"model.layers.{number}"
            self.shards.write(
                number, {f"{prefix}.{name}": self._kept(f"{prefix}.{name}", t) for name, t in layer.state_dict().items()}
            )
        self.shards.write(self.spec.layers, self._ends())
        self._finish()
        return Report(self.output, sum(path.stat().st_size for path in self.output.glob("*.safetensors")))

    def _kept(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.cpu()
        return self._publish(name, tensor) if tensor.is_floating_point() else tensor

    def _loaded(self) -> Any:
        """The model as transformers has it, in the type of its file. Raises InputError for weights that are not numbers."""
        import transformers

        before = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                self.source,
                dtype=getattr(torch, self.spec.dtype),
                use_cache=False,
                local_files_only=True,
                trust_remote_code=False,
            )
        finally:
            transformers.logging.set_verbosity(before)
            transformers.logging.enable_progress_bar()
        for name, weight in model.named_parameters():
            if not bool(torch.isfinite(weight).all()):
                raise InputError(f"{name.removesuffix('.weight')}: some of its values are not finite numbers")
        return model.eval()


def quantize(model: Any, kind: str, ids: Tensor, options: Options, progress: Callable[[float], None] = lambda done: None) -> None:
    """AutoAWQ's quantizer on a model of transformers, whose linears become AutoAWQ's. Raises InputError where it fails.

    ``kind``: its model_type; ``ids`` int64 [samples, length]: what it is shown, token by token.
    """
    wrapped = _package("awq.models.auto").AWQ_CAUSAL_LM_MODEL_MAP[kind](model, kind, False, model.config, None, None)
    wanted = {"zero_point": True, "q_group_size": options.group_size, "w_bit": 4, "version": "gemm"}
    reached = 0.0

    def tell(done: float) -> None:
        nonlocal reached
        reached = done
        progress(done)

    try:
        with torch.no_grad():
            wrapped.quantize(
                None,
                wanted,
                calib_data=ids.tolist(),
                apply_clip=options.clip,
                max_calib_samples=ids.shape[0],
                max_calib_seq_len=ids.shape[1],
                n_parallel_calib_samples=max(1, TOKENS_AT_ONCE // ids.shape[1]),
                quantizer_cls=_quantizer(),
                tell=tell,
            )
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        why = str(error).partition("\n")[0] or "a check of its own found values that are not numbers"
        raise InputError(f"AutoAWQ failed at model.layers.{int(reached)}: {why}; {OURS}") from error


def _quantizer() -> Any:
    """AutoAWQ's class, which sees float32 and says how far it is."""
    base: Any = _package("awq.quantize.quantizer").AwqQuantizer

    class Quantizer(base):
        def __init__(self, *args: Any, tell: Callable[[float], None], **more: Any) -> None:
            self.tell, self.layer, self.steps, self.taken = tell, -1, 1, 0
            super().__init__(*args, **more)

        def init_quant(self, *args: Any, **more: Any) -> tuple[Any, dict[str, Any], Tensor]:
            """Layers, what a layer is called with, and the first one's inputs."""
            layers, called_with, inputs = super().init_quant(*args, **more)
            called_with.pop("position_embeddings", None)  # made by AutoAWQ itself from the inputs, then in float32
            for name in ("position_ids", "attention_mask"):
                if isinstance(called_with.get(name), Tensor):
                    called_with[name] = called_with[name][:1]
            return layers, called_with, inputs.float()

        def _get_input_feat(self, layer: Any, linears: dict[str, Any]) -> Any:
            """The first that is done with a layer: its inputs, by linear."""
            self.layer, self.taken, self.steps = self.layer + 1, 0, 5 + (len(linears) if self.apply_clip else 0)
            self.tell(self.layer)
            return super()._get_input_feat(layer.float(), linears)

        def _step(self) -> None:
            self.taken += 1
            self.tell(self.layer + min(0.99, self.taken / self.steps))

        def _compute_best_scale(self, x: Any, w: Any, size: Any, looked_at: Any, *args: Any, **more: Any) -> Any:
            """``looked_at``: the module whose outputs are compared. It gets its weights back after each trial."""
            self._step()
            handle = looked_at.register_state_dict_post_hook(_copied)
            try:
                return super()._compute_best_scale(x, w, size, looked_at, *args, **more)
            finally:
                handle.remove()

        def _compute_best_clip(self, *args: Any, **more: Any) -> Any:
            self._step()
            return super()._compute_best_clip(*args, **more)

    return Quantizer


def _copied(module: Any, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """What AutoAWQ puts aside is put aside."""
    for name, tensor in state.items():
        state[name] = tensor.clone()


def _package(name: str) -> Any:
    """A module of AutoAWQ, imported without its farewell on the user's screen. Raises InputError."""
    with warnings.catch_warnings(record=True):
        try:
            return import_module(name)
        except ImportError as error:
            raise InputError(f"--engine autoawq: autoawq {VERSION} cannot be imported here: {error}") from None


@contextmanager
def _helped(device: torch.device) -> Iterator[None]:
    """On ``device`` alone, and without a bar of its own."""
    quantizer = _package("awq.quantize.quantizer")
    with ExitStack() as stack:
        stack.enter_context(_instead(quantizer, "tqdm", lambda items, **_: items))
        if device.type == "cpu":
            for module in (torch.cuda, torch.xpu, torch.backends.mps):
                stack.enter_context(_instead(module, "is_available", lambda: False))
        yield


@contextmanager
def _instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
