"""``appliance quantize``: an unquantized model in, a checkpoint that others load as well out."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter


def quantize(
    model: str,
    /,
    *,
    output: str,
    method: str = "awq",
    bits: int = 4,
    group_size: int = 128,
    sym: bool | None = None,
    act_order: Annotated[bool, Parameter(negative=())] = False,
    static_groups: bool = True,
    lm_head_bits: int = 16,
    embedding_bits: int = 16,
    format: str | None = None,
    calibration: str | None = None,
    calibration_samples: int = 128,
    calibration_length: int = 512,
    damping: float = 0.01,
    clip: bool = True,
    kv_scales: Annotated[bool, Parameter(negative=())] = False,
    seed: int = 0,
    target_bits: float | None = None,
    fit: str | None = None,
    context: str | None = None,
    sequences: int = 1,
    kv_cache_dtype: str = "auto",
    engine: str = "appliance",
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
        The directory to make. While work goes on it is called OUTPUT.partial.
    method
        awq, gptq, or rtn (round to nearest: no calibration, and the largest loss).
    bits
        4 (awq); 2, 3, 4 or 8 (gptq and compressed-tensors).
    group_size
        Inputs that share a scale; -1: a scale for each output.
    sym
        Symmetric around zero, without zero points. Default: with gptq.
    act_order
        With gptq: the columns that matter most are rounded first. A little better, and as fast to compute with.
    static_groups
        With act-order: groups are of neighbours all the same (actorder "static"). Without, they are of columns that follow one
        another in that order (desc_act): slower to compute with, and vLLM refuses such checkpoints.
    lm_head_bits
        Of the output head: 4 (by the method, as the layers), 8 (rounded), or 16: as it is. Not in the format awq.
    embedding_bits
        Of the embedding: 4 or 8 (rounded), or 16: as it is. In the format compressed-tensors alone.
        Where head and embedding are one table (a tied model) and either is quantized, the checkpoint gets two: other programs
        read no table of codes as both. Here such a table needs none of this: serve --lm-head-dtype keeps one in codes.
    format
        awq, gptq, gptq_v2 or compressed-tensors. Default: the method's own, where it can say what is asked for. gptq_v2 has
        other zero points: GPTQModel wants it for --no-sym.
    calibration
        Text like that for which the model will be used, or JSON lines with "text" or "messages". Default: text and code that come
        with Python.
    calibration_samples
        Pieces of that text.
    calibration_length
        Tokens of each.
    damping
        With gptq: what is added to the Hessian's diagonal, as a share of its mean.
    clip
        With awq: whether extremes are cut off where that is better.
    kv_scales
        Add scales of keys and values for a KV cache in FP8.
    seed
        Of the choice of samples.
    target_bits
        Mixed precision: more bits where they help most, so many for a weight in the mean over all linears of the decoder layers,
        with scales and zero points (what others call bits per weight). Instead of BITS: 4, 8 and 16 are used, less than 4 only
        where the target is below what 4 bits take, and smaller groups than GROUP_SIZE, down to 32, as a step between two widths.
    fit
        Mixed precision: as many bits as fit on this card ("RTX 4090"), in a memory of this size (24GB), or on this machine (cuda,
        cpu), by the planner, with its defaults. 4, 8 and 16 are used.
    context
        With fit: beside a KV cache for so many tokens (32k). Default: 8192, or the model's longest if that is less.
    sequences
        With fit: so many sequences of that length at once.
    kv_cache_dtype
        With fit: what keys and values will be stored as, see serve.
    engine
        Whose code quantizes: appliance, or autoawq: that package itself (pip install 'appliance[autoawq]'), for awq in 4 bits. It
        holds the whole model in memory, and begins anew where it was interrupted.
    device
        cpu, or cuda: a card on which one layer at a time is worked on, while all else stays in main memory. auto is cpu.
    threads
        CPU threads; default: the physical cores.
    revision
        Branch, tag or commit of a model that comes from the hub.
    """
    from appliance.quantize.options import Options
    from appliance.quantize.run import run

    options = Options(
        method=method,
        bits=bits,
        group_size=group_size,
        symmetric=sym,
        act_order=act_order,
        static_groups=static_groups,
        lm_head_bits=lm_head_bits,
        embedding_bits=embedding_bits,
        format=format,
        samples=calibration_samples,
        length=calibration_length,
        damping=damping,
        clip=clip,
        kv_scales=kv_scales,
        seed=seed,
        target_bits=target_bits,
        fit=fit,
        context=context,
        sequences=sequences,
        kv_cache_dtype=kv_cache_dtype,
        engine=engine,
    )
    return run(model, output, options.checked(), calibration=calibration, device=device, threads=threads, revision=revision)
