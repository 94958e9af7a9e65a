"""Log-probabilities in OpenAI's two shapes, and vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from appliance.core.messages import TokenLogprob
from appliance.server.beside import Pace
from appliance.server.errors import as_json

if TYPE_CHECKING:
    from appliance.server.state import ServerState

TOGETHER = 64  # tokens
FLOOR = -9999.0  # JSON has no -infinity


class Logprobs:
    """Formats tokens; ``as_ids`` writes them as "token_id:123" instead of their text.

    A token's alternatives are given as JSON (bytes) at once: those of a long answer would be very many objects.
    """

    def __init__(self, state: ServerState, pace: Pace, *, as_ids: bool) -> None:
        self._bytes = state.token_bytes
        self._name = "token_id:{}".format if as_ids else state.token_name
        self._text = state.token_name
        self._pace = pace

    async def chat(self, scored: Sequence[TokenLogprob], top: int) -> dict[str, Any]:
        """``choice.logprobs`` of a chat answer; ``top`` most likely tokens beside each (-1: all)."""
        return {"content": [as_json(entry) async for entry in self.entries(scored, top)], "refusal": None}

    async def entries(self, scored: Sequence[TokenLogprob], top: int) -> AsyncIterator[dict[str, Any]]:
        """The tokens of a chat answer's logprobs."""
        for one in scored:
            entry = self._entry(one.token_id, one.logprob)
            yield {**entry, "top_logprobs": [self._entry(t, p) for t, p in _first(one, top)]}
            await self._pace()

    async def completion(
        self, token_ids: Sequence[int], scored: Iterable[TokenLogprob | None], top: int, offsets: Sequence[int]
    ) -> dict[str, Any]:
        """``choice.logprobs`` of a completion; ``offsets``: where each token begins in its text. Without a score it has nulls."""
        own: list[float | None] = []

        def form(one: TokenLogprob | None) -> dict[str, float] | None:
            own.append(None if one is None else max(one.logprob, FLOOR))
            return None if one is None else self._top(one, top)

        tops = await self._each(scored, form)
        return {
            "text_offset": list(offsets),
            "token_logprobs": own,
            "tokens": [self._name(t) for t in token_ids],
            "top_logprobs": tops,
        }

    async def prompt(self, scored: Sequence[TokenLogprob | None] | None, top: int) -> list[bytes] | None:
        """vLLM's prompt_logprobs: for each prompt token a dict from token id to its logprob, rank and text."""
        if scored is None:
            return None
        return await self._each(scored, lambda one: None if one is None else self._ranked(one, top))

    async def _each(
        self, scored: Iterable[TokenLogprob | None], form: Callable[[TokenLogprob | None], dict[str, Any] | None]
    ) -> list[bytes]:
        """JSON values, some in one with commas between them."""
        found: list[bytes] = []
        some: list[bytes] = []
        for k, one in enumerate(scored, 1):
            some.append(as_json(form(one)))
            if not k % TOGETHER:
                found.append(b",".join(some))
                some.clear()
            await self._pace()
        return [*found, b",".join(some)] if some else found

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._name(token), "logprob": max(logprob, FLOOR), "bytes": self._bytes(token)}

    def _top(self, one: TokenLogprob, top: int) -> dict[str, float]:
        """The token itself and the most likely ones; of tokens with the same text the likelier one counts."""
        found = {self._name(one.token_id): max(one.logprob, FLOOR)}
        for token, logprob in _first(one, top):
            found.setdefault(self._name(token), max(logprob, FLOOR))
        return found

    def _ranked(self, one: TokenLogprob, top: int) -> dict[str, Any]:
        entries = {one.token_id: (one.logprob, one.rank)}
        for rank, (token, logprob) in enumerate(_first(one, top), 1):
            entries.setdefault(token, (logprob, rank))
        return {
            str(token): {"logprob": max(logprob, FLOOR), "rank": rank, "decoded_token": self._text(token)}
            for token, (logprob, rank) in entries.items()
        }


def _first(one: TokenLogprob, top: int) -> Sequence[tuple[int, float]]:
    """The ``top`` most likely tokens (-1: all): a request may have asked for more of them in another place."""
    return one.top if top < 0 else one.top[:top]
