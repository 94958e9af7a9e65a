"""Exact match on questions from a file, greedy, through the chat template; and how fast the answers came."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.config import EngineConfig
from quant.errors import InputError

FIELDS = (("question", "prompt", "input"), ("answer", "target", "output"))


def read_questions(file: str) -> list[tuple[str, str]]:
    """JSON lines with "question" and "answer" (or prompt and target, or input and output). Raises InputError."""
    try:
        lines = Path(file).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise InputError(f"--questions {file}: {error.strerror}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)
                question, answer = (value[min(set(names) & value.keys(), key=names.index)] for names in FIELDS)
                found.append((str(question), str(answer)))
            except (ValueError, TypeError, AttributeError):
                raise InputError(f'--questions {file}, line {number}: JSON with "question" and "answer" is needed') from None
    if not found:
        raise InputError(f"--questions {file} has no questions")
    return found


@dataclass(frozen=True)
class Answers:
    right: int
    of: int
    tokens: int  # generated
    seconds: float

    @property
    def share(self) -> float:
        return self.right / self.of

    def to_dict(self) -> dict[str, Any]:
        return {
            "exact_match": self.share,
            "questions": self.of,
            "answer_tokens_per_s": self.tokens / self.seconds,
        }


def ask(config: EngineConfig, questions: Sequence[tuple[str, str]], max_tokens: int) -> Answers:
    """All at once, as a server would get them. An answer is right if it is the one expected, but for white space around it."""
    from appliance.core.params import SamplingParams
    from appliance.llm import LLM

    options = {name: value for name, value in vars(config).items() if name != "model" and value is not None}
    llm = LLM(str(config.model), **options)
    begun = time.perf_counter()
    chats = [[{"role": "user", "content": question}] for question, _ in questions]
    outputs = llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=max_tokens))
    taken = time.perf_counter() - begun
    found = [output.outputs[0] for output in outputs]
    if failed := [one.error for one in found if one.error]:
        raise RuntimeError(f"{len(failed)} of {len(found)} questions could not be answered: {failed[0]}")
    right = sum(one.text.strip() == answer.strip() for one, (_, answer) in zip(found, questions, strict=True))
    return Answers(right, len(questions), sum(len(one.token_ids) for one in found), taken)
