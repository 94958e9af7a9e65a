"""What a step is: a value, decided before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from appliance.core.request import Request
from appliance.core.store import Copy


class Chunk(NamedTuple):
    """Compute tokens ``start : start + length`` of a request; its blocks already hold room for them."""

    request: Request
    start: int
    length: int
    samples: bool  # the chunk reaches the last known token: its last row's logits give the next one
    draft: tuple[int, ...] = ()  # guesses of the tokens behind that one, the last of ``length``; each row of theirs samples, too

    @property
    def wanted(self) -> int:
        """Of how many of its tokens the hidden states behind the last layer are looked at: of the last ones."""
        if self.request.params.prompt_logprobs is not None:
            return self.length
        return 1 + len(self.draft) if self.samples else 0


class Return(NamedTuple):
    """What it takes that a request goes on that had given way, and whom it shares the device with."""

    start: int  # tokens start : end are computed again
    end: int
    copied: int  # blocks come from host memory
    running: int  # requests, itself among them
    used: int  # blocks that they hold


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: first the copies, one after another, then the chunks together: single tokens, then what is left of prompts."""

    chunks: tuple[Chunk, ...]
    preempted: tuple[Request, ...] = ()
    copies: tuple[Copy, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)
