"""From the engine's events to text: detokenizing, stop strings, and nothing shown that would have to be taken back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    """Finds the stop string that is complete first, however the text is cut into pieces.

    Text that could be the beginning of one is held back (unless stop strings are kept in the output anyway).
    """

    def __init__(self, stops: Sequence[str], *, keep: bool) -> None:
        self.found: str | None = None
        self._stops, self._keep = tuple(stops), keep
        self._reach = max((len(s) for s in self._stops), default=1) - 1  # how far back a match may begin
        self._recent = ""  # the last _reach characters
        self._held = 0  # how many of them are held back

    def push(self, piece: str, *, seek: bool) -> str:
        """The text that may be shown now that ``piece`` has come. Only with ``seek`` may a match end within it."""
        if not self._stops or not piece:
            return piece
        text = self._recent + piece
        shown = len(self._recent) - self._held
        match = self._first_match(text, len(self._recent)) if seek else None
        if match is not None:
            start, end = match
            self.found = text[start:end]
            return text[shown : end if self._keep else start]
        self._held = 0 if self._keep else self._open_end(text)
        self._recent = text[max(0, len(text) - self._reach) :]
        return text[shown : len(text) - self._held]

    def release(self) -> str:
        """What is still held back."""
        held, self._held = self._held, 0
        return self._recent[len(self._recent) - held :]

    def _first_match(self, text: str, old: int) -> tuple[int, int] | None:
        """(start, end) of the match that ends first, of several the longest; it ends after the ``old`` first characters."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop, max(0, old - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < (best[1], best[0])):
                best = (start, start + len(stop))
        return best

    def _open_end(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        for n in range(min(self._reach, len(text)), 0, -1):
            if any(len(stop) > n and stop.startswith(text[len(text) - n :]) for stop in self._stops):
                return n
        return 0
