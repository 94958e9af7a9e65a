"""Requests that follow a grammar: it is compiled beside the steps, and rules out before each draw what would leave it.

Where a completion is in its grammar is a function of its output tokens, so there is nothing to keep when it gives way.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from appliance.core.messages import Unanswerable
from appliance.core.request import Request
from appliance.text.grammar import KEPT, deep_thread, library, limits, vocabulary, walked

_NEVER = np.float32("-inf")
STEP_S, OWED_S = 0.01, 0.2  # of processor time: for a token of an answer, and what may come on top of that before it is ended
AT_ONCE = 65536  # bytes of masks that are unpacked at a time
# The library's names for why it gave up, and what they mean for whoever asked.
REASONS = {
    "NoExtension": "no token of this model can go on with the text as it must",
    "NoExtensionBias": "no token of this model can go on with the text as it must",
    "ParserTooComplex": "it is too complex to follow",
    "LexerTooComplex": "it is too complex to follow",
}


def _unanswerable(error: str) -> Unanswerable:
    """The first line of the library's words, in plain ones where they are a name."""
    line = error.partition("\n")[0]
    return Unanswerable(f"its grammar: {REASONS.get(line, line)}")


@dataclass
class Compiled:
    """A grammar for this model's tokens, of all that follow it."""

    matcher: Any  # at the beginning
    error: str  # why it cannot be followed, or not any more
    owed: float = 0.0  # seconds of processor time beyond STEP_S a token

    def took(self, seconds: float, tokens: int) -> None:
        """What is ambiguous takes longer with each token, and everybody waits for it."""
        self.owed = max(0.0, self.owed + seconds - STEP_S * tokens)
        if self.owed > OWED_S:
            self.error = self.error or f"it takes more than {STEP_S * 1e3:.0f} ms a token to follow; make it less ambiguous"


class Guide:
    """One completion's place in its grammar."""

    __slots__ = ("_compiled", "_matcher", "_taken")

    def __init__(self, compiled: Compiled) -> None:
        self._compiled, self._matcher, self._taken = compiled, compiled.matcher.deep_copy(), 0

    def allowed(self, request: Request, where: int, size: int) -> str:
        """Write a bit for each token into the ``size`` bytes at this address; what is wrong, where the grammar gave up."""
        if self._compiled.error:
            return self._compiled.error
        begun = time.thread_time()
        if fresh := request.tokens[request.prompt_len + self._taken :]:
            self._matcher.consume_tokens(fresh)
            self._taken += len(fresh)
        self._matcher.unsafe_compute_mask_ptr(where, size)
        self._compiled.took(time.thread_time() - begun, max(1, len(fresh)))
        return self._matcher.get_error()


class Grammars:
    """Compiles in a thread of its own, one grammar after another; requests wait until then, and the others go on."""

    def __init__(self, directory: str, vocab: int, ends: tuple[int, ...]) -> None:
        """``directory``: of the tokenizer, read for ``prepare`` or the first grammar. ``ends``: tokens that end a text."""
        self._directory, self._vocab, self._ends = directory, vocab, ends
        self._vocabulary: Any = None
        self._compiled: OrderedDict[str, Compiled] = OrderedDict()  # by grammar, those used last behind
        self._prepared: Future[None] | None = None
        self._begun: list[list[Request]] = []  # since the last ``settle``
        self._pending: deque[tuple[Future[Any], list[Request]]] = deque()  # in order of their turn

    def prepare(self) -> None:
        """Have the vocabulary read, which keeps everybody waiting for up to a second: before there is anybody, if it can be."""
        if self._ends:
            self._prepared = deep_thread().submit(self._read)  # what is wrong with its files is told with the first grammar

    def begin(self, requests: list[Request]) -> None:
        """Have the grammar of these completions of one request compiled, from the next ``settle`` on."""
        self._begun.append(requests)

    @property
    def reading(self) -> bool:
        """Whether the vocabulary is being read, or will be from the next ``settle`` on: it may take seconds in one go."""
        prepares = self._prepared is not None and not self._prepared.done()
        return self._vocabulary is None and (prepares or bool(self._begun or self._pending))

    def settle(self, seconds: float) -> list[tuple[Request, str]]:
        """The requests whose grammar has been compiled since, each with the reason why it cannot go on, or "".

        Waits for up to ``seconds`` where all are still being compiled.
        """
        for requests in self._begun:
            self._pending.append((deep_thread().submit(self._compile, requests[0].params.grammar), requests))
        self._begun.clear()
        if self._pending:
            wait([self._pending[0][0]], seconds)
        settled = []
        while self._pending and self._pending[0][0].done():
            future, requests = self._pending.popleft()
            try:
                compiled, error = future.result(), ""
                if compiled.error:
                    error = _unanswerable(compiled.error)
            except Exception as problem:  # of the library or the tokenizer's files: it is the request's, not the engine's
                error = f"the grammar cannot be compiled for this model: {problem}"
            for request in requests:
                if not error:
                    request.guide = Guide(compiled)
                settled.append((request, error))
        return settled

    def _compile(self, grammar: str) -> Compiled:
        """In the thread that compiles, one after another."""
        self._read()
        compiled = self._compiled.pop(grammar, None)
        if compiled is None:
            error = walked(self._vocabulary, grammar)
            matcher = library().LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits(answering=True))
            compiled = Compiled(matcher, error or matcher.get_error())
        self._compiled[grammar] = compiled
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return compiled

    def _read(self) -> None:
        if self._vocabulary is None:
            from appliance.text.tokenizer import Tokenizer

            self._vocabulary = vocabulary(Tokenizer.load(self._directory), self._vocab, self._ends)


@dataclass(frozen=True)
class Masks:
    """What grammars allow in one step."""

    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # those that follow a grammar, ascending
    bits: np.ndarray = field(
        default_factory=lambda: np.zeros((0, 0), np.uint8)
    )  # of each, a bit a token, the lowest first; 1: allowed
    errors: dict[Request, str] = field(default_factory=dict)  # whose grammar has become too complex

    @classmethod
    def of(cls, requests: Sequence[Request], vocab: int) -> Masks:
        """Of the requests that sample, in the order of their rows; on the host, so it may be done while the device works.

        In this thread: a row takes a hundredth of a millisecond, and to wake another takes several.
        """
        guided = [(row, request) for row, request in enumerate(requests) if request.guide is not None]
        if not guided:
            return cls()
        bits = np.zeros((len(guided), 4 * -(-vocab // 32)), dtype=np.uint8)
        where, size = bits.ctypes.data, bits.shape[1]
        found = [request.guide.allowed(request, where + k * size, size) for k, (_, request) in enumerate(guided)]
        errors: dict[Request, str] = {
            request: _unanswerable(error) for (_, request), error in zip(guided, found, strict=True) if error
        }
        return cls(np.array([row for row, _ in guided]), bits, errors)

    def __bool__(self) -> bool:
        return bool(len(self.rows))

    def rule_out(self, logits: Tensor, first: int) -> None:
        """Logits float32 [R, V] of the rows from ``first`` on: -inf where a grammar forbids the token.

        Workspace: V bytes, or AT_ONCE if that is more.
        """
        count, vocab = logits.shape
        begin, end = np.searchsorted(self.rows, (first, first + count))
        stride = max(1, AT_ONCE // vocab)
        for k in range(begin, end, stride):
            rows = self.rows[k : min(k + stride, end)] - first
            banned = np.unpackbits(~self.bits[k : k + len(rows)], axis=1, count=vocab, bitorder="little").view(np.bool_)
            if logits.device.type != "cpu":
                for row, mask in zip(rows.tolist(), torch.from_numpy(banned).to(logits.device)):
                    logits[row].masked_fill_(mask, float("-inf"))
            elif rows[-1] - rows[0] + 1 == len(rows):  # numpy takes a fraction of what calling torch does
                np.copyto(logits.numpy()[rows[0] : rows[-1] + 1], _NEVER, where=banned)
            else:
                values = logits.numpy()
                for row, mask in zip(rows.tolist(), banned):
                    np.copyto(values[row], _NEVER, where=mask)
