"""The command's work: each model in turn, beside the base where there is one; a table, JSON and a plot."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from appliance.config import EngineConfig
from appliance.eval.picture import picture
from appliance.eval.questions import ask, read_questions
from appliance.eval.rows import Row
from appliance.eval.scoring import Model, Piece, score, windows, with_room
from appliance.eval.sizes import read_sizes
from appliance.eval.speed import measure
from appliance.eval.tables import tables
from appliance.eval.variants import Variant, labels, read_variant
from appliance.memory.early import check_options
from appliance.memory.planner import make_plan
from appliance.quantize.calibration import read_text, text_ids
from appliance.text.tokenizer import Tokenizer
from models.spec import ModelSpec
from quant.errors import InputError
from quant.headers import read_json

LENGTH, INPUT_LEN, OUTPUT_LEN = 512, 512, 128  # where contexts are long enough
UNQUANTIZED = {"quantization": None, "kv_cache_dtype": "auto", "lm_head_dtype": "model", "embedding_dtype": "model"}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The command's own options; see appliance/eval/command.py."""

    text: str | None
    base: str | None
    questions: str | None
    length: int | None
    stride: int | None
    windows: int | None
    max_tokens: int
    speed: bool
    batch_size: tuple[int, ...]
    input_len: int | None
    output_len: int | None
    plot: Path | None
    json: bool

    def check(self) -> None:
        """Raises InputError naming the flag."""
        if self.text is None and self.questions is None:
            raise InputError("nothing to measure: give --text FILE, --questions FILE, or both")
        if self.base is not None and self.text is None:
            raise InputError("--base is what models are compared with over a text: give --text FILE, too")
        least = {"length": 2, "windows": 1, "stride": 1, "max_tokens": 1, "input_len": 1, "output_len": 4}
        for name, number in least.items():
            value = getattr(self, name)
            if value is not None and value < number:
                raise InputError(f"--{name.replace('_', '-')} is {value}: at least {number} is needed")
        if self.length is not None:
            _check_stride(self.stride, self.length)
        if min(self.batch_size, default=1) < 1:
            raise InputError(f"--batch-size is {min(self.batch_size)}: at least 1 is needed")
        if self.plot is not None and self.plot.suffix != ".svg":
            raise InputError(f"--plot {self.plot}: pictures are SVG, a name that ends in .svg is needed")
        if self.plot is not None and not self.plot.absolute().parent.is_dir():
            raise InputError(f"--plot {self.plot}: there is no directory {self.plot.parent}")


@dataclass(frozen=True)
class Setup:
    """What is the same for all models."""

    pieces: tuple[tuple[Piece, ...], ...]  # by model; they differ where tokenizers do
    length: int  # tokens of a window, with the start token
    requests: tuple[int, int]  # how many at once, of how many tokens; (0, 0): speed is not asked for
    output_len: int
    tokenizers_differ: bool


def run(models: Sequence[str], config: EngineConfig, asked: Asked) -> int:
    """Returns the exit code. Raises InputError."""
    asked.check()
    variants = [read_variant(model, config) for model in models]
    base = None if asked.base is None else read_variant(asked.base, _unquantized(config))
    questions = None if asked.questions is None else read_questions(asked.questions)
    text = None if asked.text is None else read_text(asked.text)
    for one in [*variants, *([] if base is None else [base])]:
        check_options(one.config)
    variants, base = [one.located() for one in variants], None if base is None else base.located()
    rows = [Row(one, label) for one, label in zip(variants, labels(variants), strict=True)]
    setup = _setup(variants, base, asked, text)
    _measure(rows, base, setup, asked)
    for row in rows:
        if questions is not None:
            row.answers = ask(row.variant.config, questions, asked.max_tokens)
    if asked.plot is not None:
        asked.plot.write_text(picture([row.to_dict() for row in rows]))
    if asked.json:
        print(json.dumps([row.to_dict() for row in rows], indent=2))
        return 0
    console = Console()
    console = console if console.is_terminal else Console(width=200)  # a file or a pipe folds nothing
    for table in tables(rows, _caption(setup, asked)):
        console.print(table)
    return 0


def _unquantized(config: EngineConfig) -> EngineConfig:
    """Whatever the models are measured with: the base is what they are held against."""
    known = {f.name for f in fields(EngineConfig)}
    return replace(config, **{name: value for name, value in UNQUANTIZED.items() if name in known})  # type: ignore[arg-type]


def _setup(variants: Sequence[Variant], base: Variant | None, asked: Asked, text: str | None) -> Setup:
    """Everything that can be wrong with models is found here, before any is loaded. Raises InputError. ``text``: of --text."""
    every = [*variants, *([] if base is None else [base])]
    specs = [ModelSpec.from_config(read_json(Path(str(one.config.model)) / "config.json")) for one in every]
    limit = min(spec.max_len for spec in specs)
    pieces, length, differ = [], 0, False
    if text is not None:
        read = cache(partial(_text, str(asked.text), text))  # a model beside itself has one tokenizer
        texts = [read(str(one.config.tokenizer), spec.vocab) for one, spec in zip(every, specs, strict=True)]
        if base is not None:
            _check_same(variants, specs, texts, base)
        differ = any(one != texts[0] for one in texts)
        room = limit - any(start is not None for _, start in texts)
        length = min(LENGTH, room) if asked.length is None else asked.length
        if length > room:
            raise InputError(f"--length is {length}, but the models have room for {room} tokens (and a start token, if any)")
        _check_stride(asked.stride, length)
        pieces = [tuple(windows(ids, length, asked.windows, start, asked.stride)) for ids, start in texts[: len(variants)]]
        length = max(len(ids) for one in pieces for ids, _ in one)
    requests, output_len = _requests(asked, limit)
    for one in every:
        make_plan(Path(str(one.config.model)), with_room(one.config, length or sum(requests), *requests))
    return Setup(tuple(pieces), length, requests, output_len, differ)


def _check_stride(stride: int | None, length: int) -> None:
    if stride is not None and stride > length:
        raise InputError(f"--stride is {stride}: windows of --length {length} would leave tokens out")


def _text(file: str, text: str, directory: str, vocab: int) -> tuple[list[int], int | None]:
    """(a text's token ids, the token that the tokenizer puts before every text)."""
    tokenizer = Tokenizer.load(directory)
    ids, first = text_ids(file, tokenizer, text), next(iter(tokenizer.encode("")), None)
    if ids and max(ids) >= vocab:
        raise InputError(f"the tokenizer in {directory} makes token {max(ids)} of {file}, but the model has {vocab} tokens")
    return ids, first if first == tokenizer.bos_token_id else None


def _check_same(variants: Sequence[Variant], specs: Sequence[ModelSpec], texts: Sequence[Any], base: Variant) -> None:
    for one, spec, text in zip(variants, specs, texts, strict=False):
        if text != texts[-1]:
            raise InputError(f"--base {base.text} has another tokenizer than {one.text}: what they say cannot be compared")
        if spec.vocab != specs[-1].vocab:
            raise InputError(f"--base {base.text} has {specs[-1].vocab} tokens, and {one.text} has {spec.vocab}")


def _requests(asked: Asked, limit: int) -> tuple[tuple[int, int], int]:
    """(how many requests at once, and tokens of each), tokens of an answer."""
    if not asked.speed or not asked.batch_size:
        return (0, 0), 0
    output_len = min(OUTPUT_LEN, limit // 4) if asked.output_len is None else asked.output_len
    input_len = min(INPUT_LEN, limit - output_len) if asked.input_len is None else asked.input_len
    if input_len + output_len > limit:
        raise InputError(
            f"--input-len {input_len} and --output-len {output_len}, but the models have room for {limit} tokens: take less"
        )
    return (max(asked.batch_size), input_len + output_len), output_len


def _measure(rows: Sequence[Row], base: Variant | None, setup: Setup, asked: Asked) -> None:
    against = None if base is None else Model(base.config, setup.length)
    for k, row in enumerate(rows):
        own, length = row.variant.config, setup.length or sum(setup.requests)
        plan = make_plan(Path(str(own.model)), with_room(own, length, *setup.requests))
        row.sizes, row.quantization = read_sizes(Path(str(own.model)), plan.to_dict()), plan.quantization
        if not setup.pieces and not setup.requests[0]:
            continue
        model = Model(own, length, setup.requests)
        if setup.pieces:
            pieces = setup.pieces[k]
            for found in tqdm(score(model, pieces, against), desc=row.label, total=len(pieces), unit="window", disable=None):
                row.score = found
        if setup.requests[0]:
            input_len = setup.requests[1] - setup.output_len
            row.speed = measure(model.engine, asked.batch_size, input_len=input_len, output_len=setup.output_len)
        del model  # before the next one is loaded; its parts know each other
        gc.collect()


def _caption(setup: Setup, asked: Asked) -> str:
    """What was measured, in words."""
    parts = []
    if setup.pieces:
        count = len(setup.pieces[0])
        step = "" if asked.stride is None else f", {asked.stride} apart"
        parts.append(f"{count} window{'s' * (count > 1)} of {setup.length} tokens of {Path(str(asked.text)).name}{step}")
        parts += [] if asked.base is None else [f"base: {Path(asked.base).name}"]
        parts += ["tokenizers differ: perplexities cannot be compared"] * setup.tokenizers_differ
    if asked.questions is not None:
        parts.append(f"questions: {Path(asked.questions).name}")
    return "; ".join(parts)
