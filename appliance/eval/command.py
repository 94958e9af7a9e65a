"""``appliance eval``: what quantizing has cost."""

from __future__ import annotations

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
    length: int = 512,
    windows: int | None = None,
    max_tokens: int = 64,
    json: bool = False,
    engine: Annotated[EngineConfig, Parameter(name="*")] = ENGINE,
) -> int:
    """Measure models side by side: perplexity, divergence from an unquantized one, exact match on questions.

    Parameters
    ----------
    models
        Directories with Hugging Face checkpoints, or names on the hub.
    text
        Perplexity on this file: pieces of LENGTH tokens that do not overlap, each behind the start token.
    base
        With --text: the unquantized model; the mean KL divergence from it, and how often both find the same token most likely.
    questions
        JSON lines with "question" and "answer": how many answers are exactly right, at temperature 0, by the chat template.
    length
        Tokens of a piece of text.
    windows
        Pieces at most; default: all.
    max_tokens
        Tokens of an answer at most.
    json
        Print JSON instead of a table.
    """
    from appliance.eval.run import Asked, run

    asked = Asked(text=text, base=base, questions=questions, length=length, windows=windows, max_tokens=max_tokens, json=json)
    return run(models, engine, asked)
