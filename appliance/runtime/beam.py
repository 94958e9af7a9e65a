"""Beam search: which beams go on, with which tokens, and what is best in the end. Numbers in, decisions out.

The rules are vLLM's. Each step looks at the 2 * width most likely tokens after each beam. One that ends the text makes a
hypothesis, which is put aside; of the others the ``width`` with the largest sums of log-probabilities are the next beams. In the
end, hypotheses and beams together are ordered by

    sum of log-probabilities / length ** length_penalty          (length: prompt and answer, without the token that ends the text)

The search ends after ``max_tokens``, and before that once no beam can come to be among the best any more (vLLM goes on, and finds
the same). Equal sums come in the order of their beams, then of their tokens' rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from appliance.core.door import beam_candidates
from appliance.core.messages import Event, TokenLogprob
from appliance.core.params import SamplingParams
from appliance.core.request import Request


class Row(NamedTuple):
    """What may follow a beam, most likely first. As arrays: a step of 256 beams looks at more than a hundred thousand tokens."""

    ids: np.ndarray  # int64 [k]
    logprobs: np.ndarray  # float64 [k]

    def pairs(self, count: int | None) -> tuple[tuple[int, float], ...]:
        """The first so many; None: all."""
        return tuple(zip(self.ids[:count].tolist(), self.logprobs[:count].tolist(), strict=True))


@dataclass(frozen=True, eq=False, slots=True)
class Beam:
    """A sequence of tokens, as the last of them and a beam that has the others. The first has none."""

    cum_logprob: float = 0.0
    length: int = 0
    last: TokenLogprob | None = None
    parent: Beam | None = None
    ended: bool = False  # its last token ends the text

    @property
    def scored(self) -> tuple[TokenLogprob, ...]:
        """All its tokens."""
        found = []
        beam: Beam | None = self
        while beam is not None and beam.last is not None:
            found.append(beam.last)
            beam = beam.parent
        return tuple(reversed(found))


class BeamSearch:
    """``beams`` go on, the best first; ``ended`` are the best hypotheses, at most ``width``: no other can come back."""

    def __init__(self, width: int, *, prompt_len: int, max_tokens: int, length_penalty: float, eos: frozenset[int]) -> None:
        self.width, self.prompt_len, self.max_tokens, self.length_penalty, self.eos = (
            width,
            prompt_len,
            max_tokens,
            length_penalty,
            eos,
        )
        self.beams: list[Beam] = [Beam()]
        self.ended: list[Beam] = []

    def step(self, rows: Sequence[Row], shown: int = 0) -> list[int]:
        """``rows[i]`` are the tokens after beam i. Returns of each of the next beams which of the old ones it goes on from.

        ``shown``: with how many of the most likely tokens a chosen one is noted (-1: all).
        """
        most = beam_candidates(self.width, len(self.eos))
        totals = np.concatenate([beam.cum_logprob + row.logprobs[:most] for beam, row in zip(self.beams, rows, strict=True)])
        ends = np.isin(np.concatenate([row.ids[:most] for row in rows]), list(self.eos))
        firsts = np.cumsum([0, *(len(row.ids[:most]) for row in rows)])  # candidates of beam i begin at firsts[i]

        def grown(chosen: np.ndarray) -> tuple[list[int], list[Beam]]:
            parents = np.searchsorted(firsts, chosen, side="right") - 1
            each = zip(parents.tolist(), (chosen - firsts[parents]).tolist(), totals[chosen].tolist(), strict=True)
            return parents.tolist(), [self._grown(rows[i], self.beams[i], place, total, shown) for i, place, total in each]

        self.ended = self._best([*self.ended, *grown(np.flatnonzero(ends))[1]])
        parents, self.beams = grown(_largest(totals, np.flatnonzero(~ends), self.width))
        return parents

    def _grown(self, row: Row, beam: Beam, place: int, total: float, shown: int) -> Beam:
        token, logprob = int(row.ids[place]), float(row.logprobs[place])
        rank = 1 + int(np.count_nonzero(row.logprobs[:place] > logprob))
        last = TokenLogprob(token, logprob, rank, row.pairs(None if shown == -1 else shown))
        return Beam(total, beam.length + 1, last, beam, token in self.eos)

    @property
    def over(self) -> bool:
        """Whether ``best`` is final."""
        if self.beams[0].length >= self.max_tokens:
            return True
        if len(self.ended) < self.width:
            return False
        # Log-probabilities only add losses; these weigh the least in the longest text (the shortest, where length is punished).
        length = self.prompt_len + (self.max_tokens if self.length_penalty > 0 else self.beams[0].length)
        return bool(self.beams[0].cum_logprob / length**self.length_penalty <= self.score(self.ended[-1]))

    def score(self, beam: Beam) -> float:
        return float(beam.cum_logprob / (self.prompt_len + beam.length - beam.ended) ** self.length_penalty)

    def best(self) -> list[Beam]:
        """The ``width`` best of all, the best first."""
        return self._best([*self.ended, *self.beams])

    def _best(self, beams: list[Beam]) -> list[Beam]:
        return sorted(beams, key=self.score, reverse=True)[: self.width]


def _largest(values: np.ndarray, among: np.ndarray, count: int) -> np.ndarray:
    """Of the indices ``among``, which ascend, those of the ``count`` largest values; these first, equal ones in their order."""
    if len(among) > count:  # to sort all of them would take most of a step
        among = among[values[among] >= np.partition(values[among], -count)[-count]]
    return among[np.argsort(-values[among], kind="stable")[:count]]


class BeamGroup:
    """The completions of one request that search together: each computes what follows one beam, and waits for the others."""

    def __init__(self, requests: Sequence[Request], params: SamplingParams) -> None:
        """``params`` as they were submitted. ``requests[0]`` computes the prompt, and at first its row is everybody's."""
        first = requests[0]
        self.leader, self.shown = first, params.logprobs or 0
        self.members = list(requests)  # members[i] is at beam i
        self.search = BeamSearch(
            len(requests),
            prompt_len=first.prompt_len,
            max_tokens=first.max_total - first.prompt_len,
            length_penalty=params.length_penalty,
            eos=first.eos_token_ids,
        )
        self._rows: dict[Request, Row] = {}

    def take(self, request: Request, row: Row) -> bool:
        """What may follow the tokens of one member. True: all have come, and ``decide`` is next."""
        self._rows[request] = row
        return len(self._rows) == len(self.members)

    def decide(self) -> list[tuple[Request, Request, int]]:
        """Take a step: for each member the one that it goes on from, and with which token (Scheduler.branch); none at the end.

        Where it can, a member goes on from itself.
        """
        old = self.members
        rows = [self._rows[member] for member in old[: len(self.search.beams)]]
        parents = [old[i] for i in self.search.step(rows, self.shown)]
        self._rows = {}
        if self.search.over:
            return []
        own = dict(zip(reversed(parents), reversed(range(len(parents))), strict=True))  # the first beam that goes on from each
        others = [member for member in old if member not in own]
        self.members = [parent if own[parent] == i else others.pop() for i, parent in enumerate(parents)]
        tokens = [beam.last.token_id for beam in self.search.beams if beam.last is not None]
        return list(zip(self.members, parents, tokens, strict=True))

    def events(self, prompt_logprobs: Sequence[TokenLogprob | None] | None) -> list[Event]:
        """The answers, the best first."""
        return [
            Event(
                request_id=self.leader.request_id,
                index=index,
                token_ids=tuple(one.token_id for one in beam.scored),
                logprobs=beam.scored,
                prompt_logprobs=None if index else prompt_logprobs,
                finish_reason="stop" if beam.ended else "length",
                preemptions=max(member.preemptions for member in self.members),
                cached_tokens=self.leader.cached,
            )
            for index, beam in enumerate(self.search.best())
        ]
