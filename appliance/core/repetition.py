"""Answers that say the same again and again, and are ended for it: vLLM's ``repetition_detection``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from appliance.core.checks import RequestError, check_number

MAX_PATTERN = 1024  # tokens of a pattern: the work at each token grows with it
_NAME = "repetition_detection"


@dataclass(frozen=True, slots=True)
class RepetitionDetectionParams:
    """An answer ends where its last tokens say the same ``min_count`` times: from min_pattern_size to max_pattern_size tokens.

    Names and meaning are vLLM's: a max_pattern_size of 0 looks for nothing, a min_pattern_size of 0 is 1. Raises RequestError.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        most = MAX_PATTERN
        check_number(f"{_NAME}.max_pattern_size", self.max_pattern_size, 0, most, integer=True, hint="0 looks for nothing")
        check_number(f"{_NAME}.min_pattern_size", self.min_pattern_size, 0, self.max_pattern_size, integer=True, hint="0 is 1")
        check_number(f"{_NAME}.min_count", self.min_count, 2 if self.max_pattern_size else 0, float("inf"), integer=True)

    @classmethod
    def of(cls, given: Any) -> RepetitionDetectionParams | None:
        """Of what a request says: these, or a mapping with their names. None where nothing is looked for."""
        if isinstance(given, dict):
            if unknown := given.keys() - {"max_pattern_size", "min_pattern_size", "min_count"}:
                told = f"{_NAME} has {min(map(str, unknown))!r:.60}: max_pattern_size, min_pattern_size and min_count are known"
                raise RequestError(told, param=_NAME)
            given = cls(**given)
        if given is not None and not isinstance(given, cls):
            raise RequestError(f"{_NAME} must be RepetitionDetectionParams, got {given!r:.80}", param=_NAME)
        return given if given is not None and given.max_pattern_size else None


@dataclass(slots=True)
class Repetition:
    """Counts along with one answer: of each distance at which its last tokens say the same, how many of them do."""

    params: RepetitionDetectionParams
    runs: dict[int, int] = field(default_factory=dict)

    def found(self, tokens: list[int], begin: int) -> bool:
        """Asked once for each token of ``tokens[begin:]``, the last one: whether that makes a pattern complete."""
        nearest, count = max(1, self.params.min_pattern_size), self.params.min_count
        end = len(tokens) - 1
        window = tokens[max(begin, end - self.params.max_pattern_size) : max(begin, end - nearest + 1)]
        runs, place = {}, -1
        for _ in range(window.count(tokens[end])):
            place = window.index(tokens[end], place + 1)
            distance = len(window) - place + nearest - 1
            runs[distance] = self.runs.get(distance, 0) + 1
        self.runs = runs
        return any(run >= distance * (count - 1) for distance, run in runs.items())
