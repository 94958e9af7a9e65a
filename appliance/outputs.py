"""What LLM answers with, and a prompt on its way there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from appliance.core.messages import Event, Submit, TokenLogprob
from appliance.core.params import RequestError
from appliance.pooling import numbers
from appliance.text.output import OutputStream, best_of
from appliance.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One answer. ``logprobs`` holds, for each token, a dict from token id to Logprob."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None  # with finish_reason "error": why it could not be answered, or not to its end


@dataclass
class RequestOutput:
    """A prompt and its ``n`` answers. The first entry of ``prompt_logprobs`` is None: nothing comes before it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0


@dataclass
class EmbeddingOutput:
    embedding: list[float]


@dataclass
class EmbeddingRequestOutput:
    """A prompt and its embedding."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0


@dataclass
class BeamSearchSequence:
    """What a beam became. ``tokens`` (and ``text``) begin with the prompt's; ``logprobs`` are of the answer's tokens."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None  # as CompletionOutput's


@dataclass
class BeamSearchOutput:
    """Of one prompt: ``beam_width`` sequences, the best first."""

    sequences: list[BeamSearchSequence]


@dataclass
class Job:
    """A prompt on its way."""

    prompt: str | None
    submit: Submit
    tokenizer: Tokenizer | None
    streams: list[OutputStream]
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None
    cached_tokens: int = 0
    vector: bytes = b""  # of a job for an embedding
    errors: dict[OutputStream, str] = field(default_factory=dict)  # of those that ended by one

    @property
    def finished(self) -> bool:
        return all(s.finish_reason is not None for s in self.streams)

    def take(self, event: Event) -> bool:
        """Returns True when a stop string ended a completion that the engine is still working on."""
        if event.finish_reason == "error":
            self.errors[self.streams[event.index]] = event.error or "the engine failed to compute this request"
        self.vector = event.embedding or self.vector
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        if event.index == 0:  # the others share what this one computes
            self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        return self.streams[event.index].push(event).abort

    def output(self) -> RequestOutput:
        scores = self.prompt_logprobs
        return RequestOutput(
            request_id=self.submit.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.submit.prompt_token_ids),
            prompt_logprobs=None if scores is None else [None if s is None else self._shown(s) for s in scores],
            outputs=[self._completion(i, s) for i, s in enumerate(self._best())],
            finished=self.finished,
            num_cached_tokens=self.cached_tokens,
        )

    def embedding(self) -> EmbeddingRequestOutput:
        """Raises RequestError where it could not be computed: no list of numbers says so."""
        for error in self.errors.values():
            raise RequestError(f"no embedding of {self.prompt or self.submit.prompt_token_ids!r:.80}: {error}")
        return EmbeddingRequestOutput(
            request_id=self.submit.request_id,
            outputs=EmbeddingOutput(numbers(self.vector)),
            prompt_token_ids=list(self.submit.prompt_token_ids),
            num_cached_tokens=self.cached_tokens,
        )

    def beams(self) -> BeamSearchOutput:
        """The answer to a beam search, in vLLM's form."""
        prompt, sequences = list(self.submit.prompt_token_ids), []
        for stream in self.streams:
            tokens = prompt + stream.token_ids
            sequences.append(
                BeamSearchSequence(
                    tokens=tokens,
                    logprobs=[self._shown(s) for s in stream.logprobs],
                    cum_logprob=sum(s.logprob for s in stream.logprobs),
                    text=None if self.tokenizer is None else self.tokenizer.decode(tokens, skip_special_tokens=False),
                    finish_reason=stream.finish_reason,
                    stop_reason=stream.stop_reason,
                    error=self.errors.get(stream),
                )
            )
        return BeamSearchOutput(sequences)

    def _best(self) -> list[OutputStream]:
        """Those that count: one that ended by an error only where there are no others."""
        n = self.submit.params.n
        if not self.errors or len(self.streams) <= n:
            return best_of(self.streams, n)
        return [*best_of([one for one in self.streams if one not in self.errors], n), *self.errors][:n]

    def _completion(self, index: int, stream: OutputStream) -> CompletionOutput:
        asked, scored = self.submit.params.scored is not None, stream.logprobs
        return CompletionOutput(
            index=index,
            text=stream.text,
            token_ids=list(stream.token_ids),
            cumulative_logprob=sum(s.logprob for s in scored) if asked or scored else None,
            logprobs=[self._shown(s) for s in scored] if asked else None,
            finish_reason=stream.finish_reason,
            stop_reason=stream.stop_reason,
            error=self.errors.get(stream),
        )

    def _shown(self, scored: TokenLogprob) -> dict[int, Logprob]:
        """The token itself first, then the most likely ones, or those that were asked for: up to k + 1 entries."""
        entries = {scored.token_id: Logprob(scored.logprob, scored.rank, self._text(scored.token_id))}
        ranked = self.submit.params.logprob_token_ids is None
        for rank, (token, logprob) in enumerate(scored.top, 1):
            entries.setdefault(token, Logprob(logprob, rank if ranked else None, self._text(token)))
        return entries

    def _text(self, token: int) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.token_str(token)
