"""Log-probabilities in OpenAI's two shapes, and vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from appliance.core.messages import TokenLogprob

if TYPE_CHECKING:
    from appliance.server.state import ServerState

FLOOR = -9999.0  # JSON has no -infinity


class Logprobs:
    """Formats tokens; ``as_ids`` writes them as "token_id:123" instead of their text."""

    def __init__(self, state: ServerState, *, as_ids: bool) -> None:
        self._bytes = state.token_bytes
        self._name = "token_id:{}".format if as_ids else state.token_name
        self._text = state.token_name

    def chat(self, scored: Sequence[TokenLogprob], top: int) -> dict[str, Any]:
        """``choice.logprobs`` of a chat answer; ``top`` most likely tokens beside each (-1: all)."""
        content = []
        for one in scored:
            entry = self._entry(one.token_id, one.logprob)
            content.append({**entry, "top_logprobs": [self._entry(t, p) for t, p in _first(one, top)]})
        return {"content": content, "refusal": None}

    def completion(
        self, token_ids: Sequence[int], scored: Sequence[TokenLogprob | None], top: int, offsets: Sequence[int]
    ) -> dict[str, Any]:
        """``choice.logprobs`` of a completion; ``offsets``: where each token begins in its text. Without a score it has nulls."""
        return {
            "text_offset": list(offsets),
            "token_logprobs": [None if s is None else max(s.logprob, FLOOR) for s in scored],
            "tokens": [self._name(t) for t in token_ids],
            "top_logprobs": [None if s is None else self._top(s, top) for s in scored],
        }

    def prompt(self, scored: Sequence[TokenLogprob | None] | None, top: int) -> list[dict[str, Any] | None] | None:
        """vLLM's prompt_logprobs: for each prompt token a dict from token id to its logprob, rank and text."""
        return None if scored is None else [None if one is None else self._ranked(one, top) for one in scored]

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
