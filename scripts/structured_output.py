"""Structured output, held against its promises: 300 schemas on the demo model, and what it costs the other requests of a batch.

    python scripts/structured_output.py [--model DIRECTORY [--tokenizer DIRECTORY]] [--write docs/benchmarks/structured-output.md]

``--model``: where steps are measured too, beside the demo model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jsonschema  # noqa: E402
import llguidance  # noqa: E402

from appliance import LLM, SamplingParams, StructuredOutputsParams  # noqa: E402
from appliance.config import EngineConfig  # noqa: E402
from appliance.core.messages import Submit  # noqa: E402
from appliance.core.params import RequestError  # noqa: E402
from appliance.hub import demo_model  # noqa: E402
from appliance.runtime.engine import Engine  # noqa: E402
from appliance.runtime.grammar import Masks  # noqa: E402
from appliance.text.grammar import compile_grammar  # noqa: E402
from tests.schemas import FORMATS_CHECKED, schemas  # noqa: E402

BATCH, STEPS, WARM = 16, 20, 5
ENDLESS = {  # what keeps a guided request busy: objects, free text, numbers, choices
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "age": {"type": "integer"},
            "kind": {"enum": ["a", "b", "c"]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    },
}


@dataclass
class Proof:
    outcomes: Counter[str]
    refusals: list[tuple[str, str]]
    invalid: list[str]
    unfinished: list[str]
    compile_ms: list[float]


def prove(completions: int) -> Proof:
    """Every schema asked for: refused with a reason, or each answer that ends is valid JSON under it."""
    llm = LLM(str(demo_model()), max_model_len=512, max_num_seqs=16, kv_cache_memory_bytes=64 << 20)
    proof, served = Proof(Counter(), [], [], [], []), []
    for name, schema in schemas():
        begun = time.perf_counter()
        try:
            compile_grammar(StructuredOutputsParams(json=schema))
        except RequestError as error:
            proof.refusals.append((json.dumps(schema, ensure_ascii=False), str(error)))
            proof.outcomes["refused" if name.startswith("refused") else "refused, though it should be served"] += 1
            continue
        proof.compile_ms.append(1e3 * (time.perf_counter() - begun))
        proof.outcomes["served"] += 1
        served.append((name, schema))
    asked = [
        SamplingParams(structured_outputs=StructuredOutputsParams(json=s), temperature=1.0, max_tokens=480, n=completions, seed=1)
        for _, s in served
    ]
    outputs = llm.generate(["Say it as data: "] * len(served), asked)
    for (name, schema), output in zip(served, outputs, strict=True):
        ended = [one.text for one in output.outputs if one.finish_reason == "stop"]
        proof.outcomes["answers"] += len(output.outputs)
        proof.outcomes["answers that ended"] += len(ended)
        if not ended:
            proof.unfinished.append(name)
        validator = jsonschema.Draft202012Validator(schema, format_checker=FORMATS_CHECKED)
        for text in ended:
            try:
                validator.validate(json.loads(text))
                proof.outcomes["valid"] += 1
            except (ValueError, jsonschema.ValidationError) as error:
                proof.invalid.append(f"{name}: {text!r:.200}: {str(error).splitlines()[0]}")
    return proof


def steps(engine: Engine, guided: int) -> list[float]:
    """Seconds of each step of a batch of which so many rows follow a grammar."""
    grammar = compile_grammar(StructuredOutputsParams(json=ENDLESS))
    for i in range(BATCH):
        params: dict[str, Any] = {"ignore_eos": True}
        if i < guided:
            params = {"structured_outputs": StructuredOutputsParams(json=ENDLESS), "grammar": grammar}
        settings = SamplingParams(temperature=0.8, seed=i, max_tokens=200, **params)
        prompt = [3 + (7 * i + 13 * k) % 500 for k in range(16)]
        engine.submit(Submit(f"r{i}", tuple(prompt), settings, arrival=time.time()))
    while len(engine.scheduler.running) < BATCH or any(r.output_len < WARM for r in engine.scheduler.running):
        engine.step()
    seconds = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        events = engine.step()
        seconds.append(time.perf_counter() - begun)
        assert not any(event.finish_reason for event in events), "a request ended while steps were measured"
    for i in range(BATCH):
        engine.abort(f"r{i}")
    return seconds


def masks_alone(engine: Engine) -> float:
    """Milliseconds that masks take for one row: computed and applied. Measured within the steps by wrapping both."""
    spent = [0.0, 0]
    of, rule_out = Masks.of.__func__, Masks.rule_out  # type: ignore[attr-defined]

    def timed_of(cls: type[Masks], requests: Any, vocab: int) -> Masks:
        begun = time.perf_counter()
        found = of(cls, requests, vocab)
        spent[0] += time.perf_counter() - begun
        spent[1] += len(found.rows)
        return found

    def timed_out(self: Masks, logits: Any, first: int) -> None:
        begun = time.perf_counter()
        rule_out(self, logits, first)
        spent[0] += time.perf_counter() - begun

    try:
        Masks.of, Masks.rule_out = classmethod(timed_of), timed_out  # type: ignore[assignment, method-assign]
        steps(engine, BATCH)
    finally:
        Masks.of, Masks.rule_out = classmethod(of), rule_out  # type: ignore[assignment, method-assign]
    return 1e3 * spent[0] / spent[1]


def measure(model: str, tokenizer: str | None, repeats: int, threads: int | None = None) -> tuple[list[str], str]:
    """Rows of a table, over all steps of rounds that take turns; what masks take."""
    options = {"max_model_len": 256, "max_num_seqs": BATCH, "kv_cache_memory_bytes": 256 << 20, "threads": threads}
    engine = Engine.load(EngineConfig(model=model, tokenizer=tokenizer, **options))  # type: ignore[arg-type]
    found: dict[int, list[float]] = {0: [], 4: [], 8: [], 16: []}
    steps(engine, BATCH)  # the tokenizer is read, the grammar compiled
    for _ in range(repeats):
        for guided, seconds in found.items():
            seconds += steps(engine, guided)
    tenth = {guided: statistics.quantiles(s, n=10)[0] for guided, s in found.items()}
    median = {guided: statistics.median(s) for guided, s in found.items()}
    rows = [
        f"| {guided} | {1e3 * tenth[guided]:.2f} | {100 * (tenth[guided] / tenth[0] - 1):+.1f} % "
        f"| {1e3 * median[guided]:.2f} | {100 * (median[guided] / median[0] - 1):+.1f} % |"
        for guided in found
    ]
    return rows, f"{masks_alone(engine):.3f} ms a row; vocabulary {engine.info.vocab_size:,}, {engine.info.kernels} kernels"


def report(proof: Proof, tables: list[tuple[str, list[str], str]], command: str) -> str:
    count = proof.outcomes
    ms = sorted(proof.compile_ms)
    lines = [
        "# Structured output",
        f"`{command}`; {platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"llguidance {llguidance.__version__}.",
        "",
        "## 300 schemas on the demo model",
        "The schemas are those of `tests/schemas.py`: types, enums, constants, required and optional keys (also of other",
        "alphabets, empty, with quotes), nested objects, arrays with bounds, tuples, `$ref` and `$defs`, recursion, `anyOf`,",
        "`oneOf`, `allOf`, patterns, formats, ranges, multiples, additional and pattern properties; and those that cannot be",
        "satisfied, are no schemas, or use keywords that no grammar can follow. Answers are validated by `jsonschema` (draft",
        "2020-12, with its format checker, and RFC 3339 for times).",
        "",
        "| | |",
        "|---|---|",
        f"| schemas | {count['served'] + count['refused'] + count['refused, though it should be served']} |",
        f"| refused, as they should be | {count['refused']} |",
        f"| refused, though they should be served | {count['refused, though it should be served']} |",
        f"| served | {count['served']} |",
        f"| answers | {count['answers']} |",
        f"| of these, ended by themselves (the others met `max_tokens`) | {count['answers that ended']} |",
        f"| of these, valid | {count['valid']} |",
        f"| schemas none of whose answers ended | {len(proof.unfinished)} ({', '.join(proof.unfinished) or 'none'}) |",
        f"| compiling one at the door | median {statistics.median(ms):.1f} ms, most {ms[-1]:.1f} ms |",
        "",
        *(f"- **not valid**: {one}" for one in proof.invalid),
        "## What the other requests of a batch pay",
        f"Decode steps of {BATCH} sequences at temperature 0.8, of which so many follow a grammar (arrays of objects that do",
        "not end). Rounds of each kind take turns within one run. The machine is shared, and the work of others lengthens",
        "most steps: the quickest tenth says more of the engine than the median does.",
        "",
        "A row that follows a grammar costs its mask, and saves most of its draw, as few tokens are left.",
        "",
    ]
    for name, rows, alone in tables:
        lines += [f"### {name}", f"Masks computed and applied: {alone}.", ""]
        lines += [
            "| rows with a grammar | steps, quickest tenth, ms | against none | median, ms | against none |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    lines += ["## Refusals", "| schema | what the client is told |", "|---|---|"]
    lines += [
        f"| `{schema.replace('|', chr(92) + '|')}` | {words.replace('|', chr(92) + '|')} |" for schema, words in proof.refusals
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a model whose steps are measured too")
    parser.add_argument("--tokenizer", help="its tokenizer's directory")
    parser.add_argument("--title", help="what the report calls it")
    parser.add_argument("--completions", type=int, default=3, help="of each schema")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of each batch")
    parser.add_argument("--write", type=Path, help="the report's file")
    options = parser.parse_args()
    proof = prove(options.completions)
    tables = [("The demo model, one thread", *measure(str(demo_model()), None, 3 * options.repeats, 1))]
    if options.model:
        tables.append((options.title or Path(options.model).name, *measure(options.model, options.tokenizer, options.repeats, 1)))
    text = report(proof, tables, "python scripts/structured_output.py" + (" --model DIRECTORY" if options.model else ""))
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    sys.exit(1 if proof.invalid or proof.outcomes["refused, though it should be served"] else 0)


if __name__ == "__main__":
    main()
