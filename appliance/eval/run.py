"""The command's work: each model in turn, beside the base where there is one; a table, JSON and a plot."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from appliance.config import EngineConfig
from appliance.eval.questions import Answers, ask, read_questions
from appliance.eval.scoring import Model, Score, score, windows
from appliance.hub import resolve
from appliance.memory.text import size_text
from appliance.quantize.calibration import text_ids
from appliance.text.tokenizer import Tokenizer
from quant.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Asked:
    text: str | None
    base: str | None
    questions: str | None
    length: int
    windows: int | None
    max_tokens: int
    json: bool


@dataclass
class Row:
    """What was found of one model."""

    model: str
    quantization: str = ""
    nbytes: int = 0
    score: Score | None = None
    prefill: float = 0.0  # tokens of text a second, one piece at a time
    answers: Answers | None = None
    kl: bool = False

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"model": self.model, "quantization": self.quantization, "weights_bytes": self.nbytes}
        if self.score:
            known = self.score.perplexity
            found |= {"perplexity": known if math.isfinite(known) else None, "tokens": self.score.tokens}
            found |= {"text_tokens_per_s": self.prefill} if self.prefill else {}
            if self.kl:
                found |= {"kl": self.score.kl / self.score.tokens, "top1_agreement": self.score.agree / self.score.tokens}
        if self.answers:
            one = self.answers
            found |= {"exact_match": one.share, "questions": one.of, "answer_tokens_per_s": one.tokens / one.seconds}
        return found


def run(models: Sequence[str], config: EngineConfig, asked: Asked) -> int:
    """Returns the exit code. Raises InputError."""
    if asked.text is None and asked.questions is None:
        raise InputError("nothing to measure: give --text FILE, --questions FILE, or both")
    if asked.length < 2 or (asked.windows is not None and asked.windows < 1):
        raise InputError(f"--length is {asked.length} and --windows {asked.windows}: at least 2 and 1 are needed")
    questions = None if asked.questions is None else read_questions(asked.questions)
    rows = [Row(model) for model in models]
    if asked.text is not None:
        _read_text(rows, config, asked)
    for row in rows:
        if questions is not None:
            row.answers = ask(_config(config, row.model), questions, asked.max_tokens)
    if asked.json:
        print(json.dumps([row.to_dict() for row in rows], indent=2))
    else:
        Console().print(table(rows))
    return 0


def _config(config: EngineConfig, model: str) -> EngineConfig:
    directory = str(resolve(model, config.revision))
    return replace(config, model=directory, tokenizer=config.tokenizer or directory)


def _read_text(rows: Sequence[Row], config: EngineConfig, asked: Asked) -> None:
    base, expected = None, None
    if asked.base is not None:  # whatever the models are measured with, it is what the others are held against
        own = replace(_config(config, asked.base), kv_cache_dtype="auto", lm_head_dtype="model", quantization=None)
        base, expected = Model(own, asked.length + 1), text_ids(asked.text, Tokenizer.load(str(own.tokenizer)))
    for row in rows:
        own = _config(config, row.model)
        tokenizer = Tokenizer.load(str(own.tokenizer))
        first = next(iter(tokenizer.encode("")), None)  # what it puts before every text
        ids = text_ids(asked.text, tokenizer)
        if expected is not None and ids != expected:
            raise InputError(f"--base {asked.base} has another tokenizer than {row.model}: what they say cannot be compared")
        pieces = windows(ids, asked.length, asked.windows, first if first == tokenizer.bos_token_id else None)
        model, begun = Model(own, asked.length + 1), time.perf_counter()
        row.quantization, row.nbytes, row.kl = model.info.quantization, model.nbytes, base is not None
        for sums in tqdm(score(model, pieces, base), desc=row.model, total=len(pieces), unit="window", disable=None):
            row.score = sums
        row.prefill = 0.0 if base else sums.tokens / (time.perf_counter() - begun)
        del model  # before the next one is loaded


def table(rows: Sequence[Row]) -> Table:
    """For people."""
    found = Table()
    heads = ["model", "quantization", "weights"]
    text, asked = any(row.score for row in rows), any(row.answers for row in rows)
    heads += ["perplexity"] + (["KL from base", "same top token"] if any(row.kl for row in rows) else []) if text else []
    heads += ["exact match", "answer tokens/s"] if asked else []
    for k, head in enumerate(heads):
        found.add_column(head, justify="left" if k < 2 else "right", overflow="fold")
    for row in rows:
        cells = [Path(row.model).name or row.model, row.quantization, size_text(row.nbytes) if row.nbytes else ""]
        if row.score:
            cells.append(f"{row.score.perplexity:.3f}")
            cells += [f"{row.score.kl / row.score.tokens:.5f}", f"{row.score.agree / row.score.tokens:.1%}"] if row.kl else []
        if row.answers:
            cells += [f"{row.answers.share:.1%} of {row.answers.of}", f"{row.answers.tokens / row.answers.seconds:.1f}"]
        found.add_row(*cells)
    return found
