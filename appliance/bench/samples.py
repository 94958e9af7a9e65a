"""What is asked: prompts with the lengths of their answers, and for a trace when they come."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from appliance.config import BenchConfig
from quant.errors import InputError

WORDS = (  # one token each in most vocabularies, with the space before it
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state", "family"),
    *("country", "problem", "hand", "part", "place", "case", "week", "company", "system", "program", "question", "work", "room"),
    *("night", "point", "home", "water", "mother", "area", "money", "story", "fact", "month", "lot", "right", "study", "book"),
    *("eye", "job", "word", "business", "issue", "side", "kind", "head", "house", "service", "friend", "father", "power", "hour"),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. ``arrival`` in seconds from the begin, where the data set has times."""

    prompt: str | list[int] | list[dict[str, Any]]
    output_tokens: int | None
    prompt_tokens: int | None = None  # as far as it is known before the server counts
    arrival: float | None = None


class Writer:
    """Makes prompts of a length: of ids that the server has shown to be tokens, else of words that are mostly one token each."""

    def __init__(self, ids: Sequence[int] | None, seed: int) -> None:
        self._ids, self._seed = ids, seed

    def tokens(self, count: int, *key: object) -> list[Any]:
        """The same ones for the same ``key``."""
        rng = random.Random(f"{self._seed}/{'/'.join(map(str, key))}")
        return rng.choices(self._ids or WORDS, k=count)

    def prompt(self, tokens: list[Any]) -> str | list[int]:
        return tokens if self._ids else " ".join(tokens)


def load(config: BenchConfig, writer: Writer) -> list[Sample]:
    """The requests in their order. Raises InputError that names the flag."""
    if config.num_prompts < 1:
        raise InputError(f"--num-prompts is at least 1, got {config.num_prompts}")
    kinds = {"random": _random, "sharegpt": _sharegpt, "custom": _custom, "text": _text, "timed_trace": _trace}
    if config.dataset_name not in kinds:
        raise InputError(f"--dataset-name {config.dataset_name}: there are {', '.join(kinds)}")
    if config.dataset_name != "random" and config.dataset_path is None:
        raise InputError(f"--dataset-name {config.dataset_name} needs --dataset-path FILE")
    if config.speedup <= 0 or config.scale_lengths <= 0:
        raise InputError("--speedup and --scale-lengths are above 0")
    samples = kinds[config.dataset_name](config, writer)
    if not samples:
        raise InputError(f"--dataset-path {config.dataset_path}: there is no request in it")
    return samples


def _random(config: BenchConfig, writer: Writer) -> list[Sample]:
    ratio, rng = config.random_range_ratio, random.Random(config.seed)
    if not 0 <= ratio < 1:
        raise InputError(f"--random-range-ratio is at least 0 and below 1, got {ratio:g}")
    into, out = config.input_len or config.random_input_len, config.output_len or config.random_output_len
    if min(into, out) < 1 or config.random_prefix_len < 0:
        raise InputError("--random-input-len and --random-output-len are at least 1, --random-prefix-len at least 0")
    prefix, samples = writer.tokens(config.random_prefix_len, "prefix"), []
    for i in range(config.num_prompts):
        count, answer = (max(1, rng.randint(int(n * (1 - ratio)), int(n * (1 + ratio)))) for n in (into, out))
        tokens = prefix + writer.tokens(count, "random", i)
        samples.append(Sample(writer.prompt(tokens), answer, len(tokens)))
    return samples


def _sharegpt(config: BenchConfig, writer: Writer) -> list[Sample]:
    """The first turn of each conversation, asked anew; as long an answer as it had (by four letters a token), or as asked for."""
    try:
        rows = json.loads(_read(config))
    except ValueError as error:
        raise InputError(f"--dataset-path {config.dataset_path} is not JSON: {error}") from None
    found = []
    for row in rows if isinstance(rows, list) else []:
        turns = [turn.get("value") or "" for turn in row.get("conversations") or ()]
        prompt, answer = row.get("prompt") or (turns or [""])[0], row.get("response") or (turns + ["", ""])[1]
        length = config.output_len or config.sharegpt_output_len or row.get("response_tokens") or max(1, len(answer) // 4)
        if prompt and (answer or row.get("response_tokens")):
            found.append(Sample(prompt, length, row.get("prompt_tokens")))
    return _taken(found, config)


def _custom(config: BenchConfig, writer: Writer) -> list[Sample]:
    """JSON lines with ``prompt`` (text or token ids) or ``messages``, and perhaps ``output_tokens``."""
    found = []
    for number, line in enumerate(_read(config).splitlines(), 1):
        row = _line(config, number, line)
        prompt = row.get("prompt", row.get("messages"))
        if not isinstance(prompt, str | list) or not prompt:
            raise InputError(f"--dataset-path {config.dataset_path}: line {number} has neither prompt nor messages")
        length = config.output_len or row.get("output_tokens") or config.custom_output_len
        found.append(Sample(prompt, length if length > 0 else None, len(prompt) if isinstance(prompt[0], int) else None))
    return _taken(found, config)


def _text(config: BenchConfig, writer: Writer) -> list[Sample]:
    """Cuts from a text, each as many words as --random-input-len says, from anywhere in it."""
    words, rng = _read(config).split(), random.Random(config.seed)
    count = min(config.input_len or config.random_input_len, len(words))
    starts = [rng.randint(0, len(words) - count) for _ in range(config.num_prompts)] if words else []
    return [Sample(" ".join(words[s : s + count]), config.output_len or config.random_output_len) for s in starts]


def _trace(config: BenchConfig, writer: Writer) -> list[Sample]:
    """Arrivals and lengths of a real service: Azure's CSV, or JSON lines as Mooncake's, whose equal ids are equal prefixes."""
    path, scale = str(config.dataset_path), config.scale_lengths
    rows = _azure(config) if path.lower().endswith(".csv") else _mooncake(config)
    samples, begun = [], rows[0][0] if rows else 0.0
    for number, (at, into, out, blocks) in enumerate(rows):
        count, answer = (max(1, round(n * scale)) for n in (into, out))
        size = max(1, round(config.timed_trace_chunk_hash_size * scale))
        tokens = [token for block in blocks for token in writer.tokens(size, "block", block)][:count]
        tokens += writer.tokens(count - len(tokens), "trace", number)
        samples.append(Sample(writer.prompt(tokens), answer, count, (at - begun) / config.speedup))
    return samples


Row = tuple[float, int, int, Sequence[int]]  # seconds, prompt tokens, answer tokens, ids of the prompt's blocks


def _azure(config: BenchConfig) -> list[Row]:
    def row(r: dict[str, str]) -> Row:
        return datetime.fromisoformat(r["TIMESTAMP"][:26]).timestamp(), int(r["ContextTokens"]), int(r["GeneratedTokens"]), ()

    lines = list(csv.DictReader(_read(config).splitlines()))[: config.num_prompts]
    return [_checked(config, number, row, line) for number, line in enumerate(lines, 2)]


def _mooncake(config: BenchConfig) -> list[Row]:
    def row(r: dict[str, Any]) -> Row:
        at = r["timestamp"] * config.timed_trace_sec_multiplier
        return at, int(r["input_length"]), int(r["output_length"]), r.get("hash_ids") or ()

    lines = _read(config).splitlines()[: config.num_prompts]
    return [_checked(config, number, row, _line(config, number, line)) for number, line in enumerate(lines, 1)]


def _checked(config: BenchConfig, number: int, make: Callable[[Any], Row], row: Any) -> Row:
    try:
        return make(row)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"--dataset-path {config.dataset_path}: line {number}: {type(error).__name__} {error}") from None


def _taken(found: list[Sample], config: BenchConfig) -> list[Sample]:
    """As many as are asked for, in random order, again from the first one where there are too few."""
    if not config.disable_shuffle:
        random.Random(config.seed).shuffle(found)
    if config.no_oversample:
        return found[: config.num_prompts]
    return [found[i % len(found)] for i in range(config.num_prompts)] if found else []


def _read(config: BenchConfig) -> str:
    try:
        return Path(str(config.dataset_path)).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise InputError(f"--dataset-path {config.dataset_path}: {getattr(error, 'strerror', None) or error}") from None


def _line(config: BenchConfig, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(f"--dataset-path {config.dataset_path}: line {number} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"--dataset-path {config.dataset_path}: line {number} is no JSON object")
    return found
