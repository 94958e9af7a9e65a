"""``appliance eval``: what quantizing has cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from appliance.config import EngineConfig

ENGINE = EngineConfig()


def evaluate(
    models: Annotated[list[str], Parameter(negative=())],
    /,
    *,
    text: str | None = None,
    base: str | None = None,
    questions: str | None = None,
    length: int | None = None,
    stride: int | None = None,
    windows: int | None = None,
    max_tokens: int = 64,
    speed: bool = True,
    batch_size: Annotated[tuple[int, ...], Parameter(negative=(), consume_multiple=True)] = (1, 8),
    input_len: int | None = None,
    output_len: int | None = None,
    plot: Path | None = None,
    json: bool = False,
    engine: Annotated[EngineConfig, Parameter(name="*")] = ENGINE,
) -> int:
    """Measure models side by side: size, perplexity, divergence from an unquantized one, exact match on questions, speed.

    Parameters
    ----------
    models
        Directories with Hugging Face checkpoints, or names on the hub; behind an @ options that one has for itself, as in
        DIR@lm_head_dtype=int4,kv_cache_dtype=fp8, so that a model stands beside itself.
    text
        Perplexity on this file: pieces of LENGTH tokens that do not overlap, each behind the start token.
    base
        With --text: the unquantized model; how far the others' predictions are from its own (KL divergence), and how often both
        find the same token most likely.
    questions
        JSON lines with "question" and "answer": how many answers are exactly right, at temperature 0, by the chat template.
    length
        Tokens of a piece of text; default: 512, or as many as all models have room for.
    stride
        Read windows of LENGTH tokens that begin so many tokens apart, in which only tokens count that no window had before.
    windows
        Pieces at most; default: all.
    max_tokens
        Tokens of an answer at most.
    speed
        Measure tokens a second, too: of one prompt, and while answers are written.
    batch_size
        How many answers are written at once while speed is measured; several numbers are several columns.
    input_len
        Tokens of the prompts by which speed is measured; default: 512, where contexts have room for them.
    output_len
        Tokens of the answers by which speed is measured; default: 128, or a quarter of a shorter context.
    plot
        Draw size, quality and speed into this file (SVG).
    json
        Print JSON instead of tables.
    """
    from appliance.eval.run import Asked, run

    asked = Asked(
        text=text,
        base=base,
        questions=questions,
        length=length,
        stride=stride,
        windows=windows,
        max_tokens=max_tokens,
        speed=speed,
        batch_size=batch_size,
        input_len=input_len,
        output_len=output_len,
        plot=plot,
        json=json,
    )
    return run(models, engine, asked)
