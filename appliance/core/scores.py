"""The log-probabilities of a long prompt, in few objects."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from appliance.core.messages import TokenLogprob


class PromptLogprobs(Sequence["TokenLogprob | None"]):
    """One for each token, None for the first; they are added as steps compute them, and made anew each time they are read.

    Four arrays: 32 bytes a token, and 16 for each of the most likely ones beside it. To pickle them is to copy these, so that a
    prompt of very many tokens holds up nobody on its way to the server: its objects take part of a second, in which nothing else
    runs there.
    """

    __slots__ = ("_ends", "_ids", "_logprobs", "_ranks")

    def __init__(self, ranks: array[int], ends: array[int], ids: array[int], logprobs: array[float]) -> None:
        """``ranks``, 0 for None; ``ends``: where each one's end in the other two, which begin with the token itself."""
        self._ranks, self._ends, self._ids, self._logprobs = ranks, ends, ids, logprobs

    @classmethod
    def of(cls, scored: Iterable[TokenLogprob | None]) -> PromptLogprobs:
        found = cls(array("q"), array("q"), array("q"), array("d"))
        found.extend(scored)
        return found

    def extend(self, scored: Iterable[TokenLogprob | None]) -> None:
        for one in scored:
            self._ranks.append(0 if one is None else one.rank)
            if one is not None:
                self._ids.append(one.token_id)
                self._logprobs.append(one.logprob)
                self._ids.extend([token for token, _ in one.top])
                self._logprobs.extend([logprob for _, logprob in one.top])
            self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ranks)

    def __iter__(self) -> Iterator[TokenLogprob | None]:
        begin = 0
        for rank, end in zip(self._ranks, self._ends):
            yield self._made(rank, begin, end)
            begin = end

    @overload
    def __getitem__(self, i: int) -> TokenLogprob | None: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[TokenLogprob | None]: ...
    def __getitem__(self, i: int | slice) -> TokenLogprob | Sequence[TokenLogprob | None] | None:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        k = range(len(self))[i]
        return self._made(self._ranks[k], self._ends[k - 1] if k else 0, self._ends[k])

    def _made(self, rank: int, begin: int, end: int) -> TokenLogprob | None:
        if begin == end:
            return None
        top = tuple(zip(self._ids[begin + 1 : end], self._logprobs[begin + 1 : end]))
        return TokenLogprob(self._ids[begin], self._logprobs[begin], rank, top)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptLogprobs) and self._arrays == other._arrays

    __hash__ = None  # type: ignore[assignment]

    @property
    def _arrays(self) -> tuple[array[Any], ...]:
        return self._ranks, self._ends, self._ids, self._logprobs

    def __reduce__(self) -> tuple[Any, ...]:
        return PromptLogprobs, self._arrays
