"""From the engine's events to text: detokenizing, stop strings, and nothing shown that would have to be taken back."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from appliance.core.messages import Event, TokenLogprob
from appliance.core.params import SamplingParams
from appliance.text.detokenizer import MARK, Detokenizer
from appliance.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Delta:
    """What one event adds to a completion."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per token, where asked for
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    abort: bool = False  # a stop string ended it: the engine does not know yet and must be told


class OutputStream:
    """One completion as its client sees it; ``text``, ``token_ids`` and ``logprobs`` are the sums of all deltas."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        *,
        shown: Mapping[int, str] | None = None,
    ) -> None:
        """``tokenizer`` None: token ids alone, the text stays empty. Of the prompt only whether it shows any text counts.

        ``shown``: special tokens that are text even where special tokens are skipped, and which text.
        """
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._params = params
        self._parts: list[str] = []
        self._marked = any(text.startswith(MARK) for text in (shown or {}).values())
        self._stop = _StopStrings(params.stop or (), keep=params.include_stop_str_in_output)
        self._detokenizer = None
        if tokenizer is not None and params.detokenize:
            hidden = tokenizer.special_ids if params.skip_special_tokens else frozenset()
            self._detokenizer = Detokenizer(
                tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                follows_text=any(token not in hidden for token in prompt_token_ids),
                shown=shown,
            )

    @property
    def text(self) -> str:
        """All text given out so far, without marks."""
        text = "".join(self._parts)
        return text.replace(MARK, "") if self._marked else text

    def push(self, event: Event) -> Delta:
        """Take news from the engine. After the end there is no more: such events give an empty delta."""
        if self.finish_reason is not None:
            return Delta()
        pieces: list[str] = []
        used = 0
        for token in event.token_ids:
            used += 1
            self.token_ids.append(token)
            ends_it = event.finish_reason == "stop" and used == len(event.token_ids)
            if ends_it and not self._params.include_stop_str_in_output:
                break  # the stop token itself is not text
            pieces.append(self._take(token))
            if self._stop.found is not None:
                break
        if event.finish_reason is not None and self._stop.found is None:
            pieces.append(self._finish())
        return self._delta(event, used, "".join(pieces))

    def _take(self, token: int) -> str:
        if self._detokenizer is None:
            return ""
        return self._stop.push(self._detokenizer.push(token), seek=len(self.token_ids) > self._params.min_tokens)

    def _finish(self) -> str:
        """The last bytes as they are, and what was held back."""
        if self._detokenizer is None:
            return ""
        last = self._stop.push(self._detokenizer.finish(), seek=len(self.token_ids) > self._params.min_tokens)
        return last if self._stop.found is not None else last + self._stop.release()

    def _delta(self, event: Event, used: int, text: str) -> Delta:
        found = self._stop.found
        self.finish_reason, self.stop_reason = ("stop", found) if found is not None else (event.finish_reason, event.stop_reason)
        logprobs = None if event.logprobs is None else event.logprobs[:used]
        self.logprobs += logprobs or ()
        self._parts.append(text)
        return Delta(
            text=text,
            token_ids=event.token_ids[:used],
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            abort=found is not None and event.finish_reason is None,
        )


def best_of(outputs: Sequence[OutputStream], n: int) -> list[OutputStream]:
    """The ``n`` with the largest sums of log-probabilities, the best first; all as they are where there are no more than that."""
    if len(outputs) <= n:
        return list(outputs)
    return sorted(outputs, key=lambda output: -sum(one.logprob for one in output.logprobs))[:n]


class _StopStrings:
    """Finds the stop string that is complete first, of several the longest, however the text is cut into pieces.

    Text that could be the beginning of one is held back (unless stop strings are kept in the output anyway). Of each stop string
    it is known how much of it the text ends with (Knuth, Morris and Pratt), so that a character costs the same behind any text.
    """

    def __init__(self, stops: Sequence[str], *, keep: bool) -> None:
        self.found: str | None = None
        self._borders, self._firsts = _prepared(tuple(stops))
        self._keep = keep
        self._begun: dict[str, int] = {}  # of those that the text may end with a part of: how many characters
        self._held = ""  # what is held back

    def push(self, piece: str, *, seek: bool) -> str:
        """The text that may be shown now that ``piece`` has come. Only with ``seek`` may a match end within it."""
        if not self._firsts or not (self._begun or any(c in self._firsts for c in piece)):
            return piece  # nothing is held back either
        text = self._held + piece
        for end, character in enumerate(piece, len(self._held) + 1):
            if (stop := self._step(character)) is not None and seek:
                self.found = stop
                return text[: end if self._keep else end - len(stop)]
        held = 0 if self._keep else max(self._begun.values(), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def release(self) -> str:
        """What is still held back."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> str | None:
        """Take one more character. The longest stop string that ends with it."""
        found = None
        begun: dict[str, int] = {}
        for stop in {**self._begun, **self._firsts.get(character, {})}:
            n, borders = self._begun.get(stop, 0), self._borders[stop]
            while n and stop[n] != character:
                n = borders[n]
            n += stop[n] == character
            if n == len(stop):
                found = stop if found is None or n > len(found) else found
                n = borders[n]
            if n:
                begun[stop] = n
        self._begun = begun
        return found


@lru_cache(32)  # all completions of a request have the same
def _prepared(stops: tuple[str, ...]) -> tuple[dict[str, array[int]], dict[str, dict[str, int]]]:
    """(of each stop string its borders; those that begin with a character, by that character).

    ``borders[n]``: how many of its first characters the first n end with, other than all of them.
    """
    borders, firsts = {}, dict[str, dict[str, int]]()
    for stop in stops:
        borders[stop] = found = array("H", [0, 0])  # at most MAX_WORDS_CHARS
        for character in stop[1:]:
            n = found[-1]
            while n and stop[n] != character:
                n = found[n]
            found.append(n + (stop[n] == character))
        firsts.setdefault(stop[0], {})[stop] = 0
    return borders, firsts
