"""``appliance quantize``: an unquantized model in, a checkpoint that others load as well out."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from appliance.quantize.options import Options

USUAL = Options()


def quantize(
    model: str,
    /,
    *,
    output: str | None = None,
    calibration: str | None = None,
    options: Annotated[Options, Parameter(name="*")] = USUAL,
    device: str = "auto",
    threads: int | None = None,
    revision: str | None = None,
) -> int:
    """Quantize a model, one layer in memory at a time. A job that was interrupted goes on with the layer that it had reached.

    Parameters
    ----------
    model
        A directory with an unquantized Hugging Face checkpoint, or a name on the hub.
    output
        The directory to make. While work goes on it is called OUTPUT.partial. Default: the model's name with the method and the
        bits behind it, in the current directory.
    calibration
        Text like that for which the model will be used, or JSON lines with "text" or "messages". Default: text and code that come
        with Python.
    device
        cpu, or cuda: a card on which one layer at a time is worked on, while all else stays in main memory. auto is cpu.
    threads
        CPU threads; default: the physical cores.
    revision
        Branch, tag or commit of a model that comes from the hub.
    """
    from appliance.quantize.run import run

    return run(model, output, options.checked(), calibration=calibration, device=device, threads=threads, revision=revision)
