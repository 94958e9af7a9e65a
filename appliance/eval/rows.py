"""All that was found of one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from appliance.eval.questions import Answers
from appliance.eval.score import Score
from appliance.eval.sizes import Sizes
from appliance.eval.speed import Speed
from appliance.eval.variants import Variant


@dataclass
class Row:
    """A model with its options; None for what was not asked for."""

    variant: Variant
    label: str
    quantization: str = ""
    sizes: Sizes | None = None
    score: Score | None = None
    speed: Speed | None = None
    answers: Answers | None = None

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"model": self.variant.text, "label": self.label, "options": self.variant.options}
        found["quantization"] = self.quantization
        for part in (self.sizes, self.score, self.speed, self.answers):
            found |= {} if part is None else part.to_dict()
        return found
