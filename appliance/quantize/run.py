"""The command's work: find the model and the text, show progress, say what came of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from appliance.hub import resolve
from appliance.memory.devices import cpu_threads
from appliance.memory.text import size_text
from appliance.quantize.calibration import calibration_ids, read_text
from appliance.quantize.job import Job, check_kind
from appliance.quantize.options import Options
from appliance.quantize.recipe import KEPT
from appliance.quantize.shards import check_free
from appliance.runtime.options import choose_device
from appliance.text.tokenizer import Tokenizer
from models.spec import ModelSpec
from quant.errors import InputError
from quant.headers import has_tokenizer, read_json

BAR = "{desc}: layer {n:.1f} of {total} |{bar}| {percentage:.0f} %, {elapsed} gone, {remaining} left"
SHARE = "{desc} |{bar}| {percentage:.0f} %, {elapsed} gone, {remaining} left"


def run(
    model: str,
    output: str | None,
    options: Options,
    *,
    calibration: str | None,
    device: str,
    threads: int | None,
    revision: str | None,
) -> int:
    """Returns the exit code. Raises InputError for what cannot be done."""
    torch.set_num_threads(cpu_threads(threads))
    where = choose_device("cpu" if device == "auto" else device)
    output = output or usual_output(model, options)
    check_free(Path(output))
    text = read_text(calibration) if options.calibrated and calibration is not None else None
    source, begun, ids = resolve(model, revision), time.monotonic(), None
    if options.calibrated:
        config = read_json(source / "config.json")
        spec = ModelSpec.from_config(config)
        check_kind(source, spec)
        if not has_tokenizer(source):
            raise InputError(f"{source} has no tokenizer, and calibration needs it: put its files there, or take --method rtn")
        tokenizer = Tokenizer.load(source)
        samples, length = options.calibration_samples, min(options.calibration_length, spec.max_len)
        if length < options.calibration_length:
            print(f"--calibration-length: {length} tokens, for which the model was made", file=sys.stderr)
        given = {"samples": samples, "length": length, "vocab": spec.vocab, "seed": options.seed}
        ids = calibration_ids(calibration, tokenizer, text=text, **given)
    job = _kind(options)(source, Path(output), options, ids, where)
    if options.mixed:
        with tqdm(total=100, desc="Measuring", bar_format=SHARE, disable=None) as bar, torch.inference_mode():

            def measured(done: float) -> None:
                bar.update(100 * done - bar.n)

            chosen = job.choose(measured)
        print(chosen, flush=True)
    if (done := sum(map(job.shards.has, range(job.spec.layers)))) > 0:
        print(f"going on with {job.shards.folder}: {done} of {job.spec.layers} layers are done", file=sys.stderr)
    with tqdm(total=job.spec.layers, desc="Quantizing", bar_format=BAR, disable=None) as bar, torch.inference_mode(), _kept(job):

        def tell(done: float) -> None:
            bar.update(done - bar.n)

        report = job.run(tell)
    if (told := job.ends.told()) is not None:
        print(told)
    worst = sorted(report.losses.items(), key=lambda item: -item[1])[:3]
    bits = "mixed" if options.mixed else options.bits
    size, seconds = size_text(job.checkpoint.index.total_bytes), time.monotonic() - begun
    print(f"{output}: {size_text(report.nbytes)}, of {size}, in {seconds:.0f} s, {bits} bits by {_maker(options)}")
    if (said := unread(options)) is not None:
        print(said, file=sys.stderr)
    if worst:
        print("largest mean squared errors of outputs: " + ", ".join(f"{name} {loss:.3g}" for name, loss in worst))
    print(f"try it: appliance serve {output}", file=sys.stderr)
    return 0


def usual_output(model: str, options: Options) -> str:
    """Where a checkpoint goes that nobody has named: Llama-3.2-1B-awq-4bit, Llama-3.2-1B-gptq-4.5bit, Llama-3.2-1B-awq-fit."""
    bits = "fit" if options.fit is not None else f"{options.target_bits or options.bits:g}bit"
    return f"{Path(model).expanduser().resolve().name or 'model'}-{options.method}-{bits}"


def unread(options: Options) -> str | None:
    """What GPTQModel (7.7) or transformers (5.23, with compressed-tensors 0.20) make of it, where that is not what it is."""
    if options.format == "gptq" and not options.sym:
        return "GPTQModel refuses zero points in a version 1 that it did not make (--format gptq_v2, or --sym)"
    if options.format in ("gptq", "gptq_v2") and (options.mixed or options.lm_head_bits != KEPT):
        return "transformers does not load it: of this format it knows one width, and no head in codes (GPTQModel does)"
    if options.format != "compressed-tensors":
        return None
    uneven = options.mixed or options.lm_head_bits != KEPT or options.embedding_bits != KEPT
    if options.sym and options.embedding_bits == KEPT:
        return "transformers: not with dequantize=True, which reads all widths as one" if uneven else None
    why = "an embedding in codes" if options.sym else "zero points packed so (--sym has none)"
    return f"transformers does not load {why}{', and with dequantize=True reads all widths as one' if uneven else ''}"


@contextmanager
def _kept(job: Job) -> Iterator[None]:
    """Says what there is when somebody interrupts."""
    try:
        yield
    except KeyboardInterrupt:
        done = any(map(job.shards.has, range(job.spec.layers)))
        kept = f": what is done is kept in {job.shards.folder}, and the same command goes on with it" if done else ""
        print(f"\nappliance: interrupted{kept}", file=sys.stderr)
        raise


def _kind(options: Options) -> type[Job]:
    if options.engine == "appliance":
        return Job
    from appliance.quantize.autoawq import AutoAWQJob

    return AutoAWQJob


def _maker(options: Options) -> str:
    return options.method if options.engine == "appliance" else f"{options.method} ({options.engine})"
