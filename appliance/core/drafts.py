"""Tokens that a sequence may go on with, computed together with its next one: what followed the last time it said the same.

A step that computes a few rows reads the weights as often as a step of one, so guesses cost little, and those that are right
spare a step each. A row is drawn from as if the guesses before it were known, and is used only if they were right: so an answer
has the tokens that it would have without guesses (Leviathan et al. 2023, with a draft that is certain of itself).
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from appliance.core.request import Request
from appliance.core.step import Chunk
from appliance.core.store import Store
from quant.errors import InputError

ROWS = 16
"""So many rows, at most, a step has with guesses: beyond, products take longer with each row."""
MOST = 15  # tokens of a draft: with the one that they follow, as many rows
_SIZE = array("i").itemsize
_FLAG = "--speculative-config"
_EXAMPLE = '{"method": "ngram", "num_speculative_tokens": 5}'
_KEYS = {  # of numbers: the least and the most
    "num_speculative_tokens": (1, MOST),
    "prompt_lookup_min": (1, 1024),
    "prompt_lookup_max": (1, 1024),
    "disable_by_batch_size": (1, 2**31),
}


@dataclass(eq=False, slots=True)
class Said:
    """A request's tokens, as they are searched, and how many guesses it is worth."""

    hope: int
    text: bytearray = field(default_factory=bytearray)  # of all its tokens, four bytes each


@dataclass(eq=False)
class Drafts:
    """Prompt lookup (n-grams). Counters: drafts made, their tokens, and those of them that were right."""

    tokens: int  # of a draft, at most
    shortest: int  # so many tokens, at least, must have been said before to know what follows
    longest: int  # and so many are looked for first
    sequences: int | None = None  # steps of more than so many go without drafts
    made: int = 0
    guessed: int = 0
    right: int = 0

    @classmethod
    def of(cls, given: str | None, device_kind: str) -> Drafts | None:
        """Of --speculative-config, with vLLM's keys and defaults. InputError naming the key that does not do, or the device."""
        if given is None:
            return None
        try:
            found = json.loads(given)
        except ValueError as error:
            raise InputError(f"{_FLAG} is {given!r:.80}: JSON is needed, as {_EXAMPLE}") from error
        if not isinstance(found, dict) or found.get("method", "ngram") != "ngram" or found.get("model") not in (None, "ngram"):
            raise InputError(f"{_FLAG} is {given:.80}: only drafts from the text itself are supported, as {_EXAMPLE}")
        for key, value in found.items():
            if key in ("method", "model"):
                continue
            if key not in _KEYS:
                raise InputError(f"{_FLAG}: {key!r:.60} is not supported; supported are method, {', '.join(_KEYS)}")
            least, most = _KEYS[key]
            if type(value) is not int or not least <= value <= most:
                raise InputError(f"{_FLAG}: {key} is {value!r:.60}: a whole number from {least} to {most} is needed")
        shortest, longest = found.get("prompt_lookup_min"), found.get("prompt_lookup_max")
        shortest, longest = shortest or longest or 5, longest or shortest or 5
        if shortest > longest:
            raise InputError(f"{_FLAG}: prompt_lookup_min is {shortest}, more than prompt_lookup_max, which is {longest}")
        if device_kind != "cpu":
            raise InputError(f"{_FLAG} works on a CPU only until now: leave it out, or use --device cpu")
        return cls(found.get("num_speculative_tokens", 5), shortest, longest, found.get("disable_by_batch_size"))

    @property
    def counters(self) -> dict[str, int]:
        """As appliance.core.messages.Stats names them."""
        return {"drafts": self.made, "drafted": self.guessed, "drafts_right": self.right}

    def lengthen(self, chunks: Sequence[Chunk], store: Store, *, budget: int, reserve: int) -> list[Chunk]:
        """The chunks of a step, with guesses behind those that decode, as far as ``budget`` and the pool have room for them.

        No block is taken that others have asked for or that ``reserve`` keeps.
        """
        spare = min(budget, ROWS - sum(chunk.length for chunk in chunks))
        asking = [place for place, chunk in enumerate(chunks) if _can_guess(chunk)]
        longer = list(chunks)
        if self.sequences is not None and len(chunks) > self.sequences:
            return longer
        for left, place in zip(range(len(asking), 0, -1), asking):
            if spare > 0 and (draft := self._draft(chunks[place], store, -(-spare // left), reserve)):
                longer[place] = chunks[place]._replace(length=1 + len(draft), draft=draft)
                spare -= len(draft)
        return longer

    def _draft(self, chunk: Chunk, store: Store, most: int, reserve: int) -> tuple[int, ...]:
        request, end = chunk.request, chunk.start + chunk.length
        here = len(request.blocks) * store.pool.block_size - end  # in blocks that it holds already
        more = max(0, store.pool.free - reserve) * store.pool.block_size
        draft = self.guess(request, min(most, request.max_total - len(request.tokens) - 1, here + more))
        if not draft or not store.extend(request, end + len(draft)):
            return ()
        request.computed += len(draft)
        request.ahead += len(draft)
        return draft

    def guess(self, request: Request, most: int) -> tuple[int, ...]:
        """At most ``most`` tokens: those that followed the last place that says what the request says last, if there is one."""
        said = request.said = request.said or Said(self.tokens)
        text = said.text
        text += array("i", request.tokens[len(text) // _SIZE :]).tobytes()
        most = min(most, said.hope)
        for count in range(min(self.longest, len(request.tokens) - 1), self.shortest - 1, -1) if most > 0 else ():
            size = count * _SIZE
            place = text.rfind(text[-size:], 0, len(text) - _SIZE)
            while place % _SIZE and place >= 0:  # it lies across tokens
                place = text.rfind(text[-size:], 0, place + size - 1)
            if place >= 0:
                follow = request.tokens[place // _SIZE + count :][:most]
                return tuple(follow[i % len(follow)] for i in range(most))  # what repeats itself goes on doing so
        return ()

    def take(self, chunk: Chunk, tokens: Sequence[int], store: Store) -> int:
        """Append what came of a chunk with a draft: tokens that were guessed, and the one after them, until one ends the request.

        What was computed beyond these was for nothing. Returns how many of the request's tokens are in the cache now.
        """
        request, known = chunk.request, len(chunk.request.tokens)
        for token in tokens:
            if not request.finished:
                request.append(token)
        taken = len(request.tokens) - known
        guessed, right = len(chunk.draft), taken - 1
        self.made, self.guessed, self.right = self.made + 1, self.guessed + guessed, self.right + right
        request.said.hope = min(self.tokens, max(request.said.hope, 2 * guessed)) if right == guessed else max(1, right)
        request.ahead -= guessed
        if request.running:
            request.computed -= chunk.length - taken
            surplus = request.blocks[store.blocks(request.known) :]
            store.pool.release(surplus)
            del request.blocks[len(request.blocks) - len(surplus) :]
        return chunk.start + taken


def _can_guess(chunk: Chunk) -> bool:
    """Beams are chosen by their group; a grammar, and who counts thoughts, must have seen a token before the next is drawn."""
    request = chunk.request
    thinks = request.thinking is not None and not request.thinking.over
    return chunk.samples and chunk.length == 1 and not (request.beam or request.params.grammar or thinks)
