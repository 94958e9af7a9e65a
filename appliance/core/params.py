"""What a request may ask of the sampler: names, defaults and meaning are vLLM's SamplingParams."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any

from appliance.core.checks import RequestError as RequestError
from appliance.core.checks import check_flags as check_flags
from appliance.core.checks import check_logprobs as check_logprobs
from appliance.core.checks import check_number, entries
from appliance.core.repetition import RepetitionDetectionParams as RepetitionDetectionParams
from appliance.core.thinking import ThinkingMarks

MAX_N = 16384  # completions of a prompt
MAX_BEAMS = 256  # what a step looks at grows with their square
MAX_LENGTH_PENALTY = 10.0  # beyond that the powers of lengths are no numbers any more
MAX_WORDS, MAX_WORDS_CHARS = 1024, 32768  # of ``stop``, and of ``bad_words``: all of them are looked for at each token
FLAT = 1e6  # temperature at which all tokens are equally likely; far beyond it float32 has nothing but zeros and infinities
ALL_TOKENS = 2**31 - 1  # of top_k: more than any vocabulary has, and the most that kernels take
MAX_IDS = 2**19  # of a list of token ids: more than any vocabulary has
MAX_SCORED_IDS = 128  # of logprob_token_ids, as vLLM
# What would change the order of tokens or the end of a text: field -> values that do not.
NOT_FOR_BEAMS: dict[str, tuple[object, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "stop": ((),),
    "stop_token_ids": ((),),
    "min_tokens": (0,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None,),
    "bad_words": ((),),
    "structured_outputs": (None,),
    "logprob_token_ids": (None,),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
}
# Filled in by the text layer: from what.
MADE_FROM = {
    "bad_words_token_ids": "bad_words",
    "grammar": "structured_outputs",
    "thinking_marks": "thinking_token_budget",
}
# The grammar says when the text ends: field -> the value that does not say otherwise.
NOT_WITH_GRAMMAR = {"ignore_eos": False, "min_tokens": 0}
# Of StructuredOutputsParams: of these exactly one says what the text must be.
CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """What the answer must be, by vLLM's names: exactly one of the first five. Raises RequestError naming the field.

    Whether it can be served at all is known when it is compiled (``appliance/text/grammar.py``).
    """

    json: str | dict[str, Any] | None = None  # a JSON schema
    regex: str | None = None  # that the whole text matches
    choice: tuple[str, ...] | list[str] | None = None  # of which the text is one
    grammar: str | None = None  # EBNF as of llama.cpp (GBNF), or Lark's
    json_object: bool | None = None  # any JSON object
    disable_any_whitespace: bool = False  # between the parts of JSON
    whitespace_pattern: str | None = None  # a regular expression: what else may stand there

    def __post_init__(self) -> None:
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise RequestError(
                f"structured_outputs needs exactly one of {', '.join(CONSTRAINTS)}; found {found}", param="structured_outputs"
            )
        if isinstance(self.choice, list):
            object.__setattr__(self, "choice", tuple(self.choice))
        kinds = {"json": (str, dict), "choice": tuple, "json_object": bool}
        for name in (*given, *(["whitespace_pattern"] if self.whitespace_pattern is not None else [])):
            value = getattr(self, name)
            if not isinstance(value, kinds.get(name, str)):  # type: ignore[arg-type]
                raise RequestError(f"structured_outputs.{name}: cannot be {value!r:.80}", param=f"structured_outputs.{name}")
        if empty := [name for name in given if getattr(self, name) == ""]:
            raise RequestError(f"structured_outputs.{empty[0]} is empty: leave it out", param=f"structured_outputs.{empty[0]}")
        if self.choice is not None and not (self.choice and all(isinstance(text, str) and text for text in self.choice)):
            raise RequestError(
                "structured_outputs.choice must be a list of texts, none of them empty", param="structured_outputs.choice"
            )


@dataclass(slots=True)
class SamplingParams:
    """How to pick tokens. Raises RequestError naming the field that is out of range.

    Fields may be set later, as vLLM's may: whoever takes them looks at them again (``checked``), and goes on with a copy.
    """

    n: int = 1
    best_of: int | None = None  # so many completions are generated; the n of them with the largest sum of log-probabilities count
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str | None = None
    stop_token_ids: tuple[int, ...] | list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] | list[int] | None = None  # whose log-probabilities are told in place of the likeliest
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    bad_words: tuple[str, ...] | list[str] | None = None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()  # filled in by the text layer from bad_words
    use_beam_search: bool = False  # n beams: nothing is drawn, so temperature, top_p, top_k, min_p and seed change nothing
    structured_outputs: StructuredOutputsParams | None = None
    grammar: str = ""  # filled in by the text layer from structured_outputs: as llguidance reads it
    length_penalty: float = 1.0  # of beam search: a score is the sum of log-probabilities / tokens ** length_penalty
    thinking_token_budget: int | None = None  # so many tokens of thoughts, then their end is written; None or -1: no limit
    thinking_marks: ThinkingMarks | None = None  # filled in by the text layer, where there is a budget
    repetition_detection: RepetitionDetectionParams | None = None

    def __post_init__(self) -> None:
        self.stop = (self.stop,) if isinstance(self.stop, str) else entries("stop", self.stop, "texts")
        self.stop_token_ids = entries("stop_token_ids", self.stop_token_ids, "token ids")
        self.bad_words = entries("bad_words", self.bad_words, "texts")
        if (allowed := self.allowed_token_ids) is not None:
            self.allowed_token_ids = entries("allowed_token_ids", allowed, "token ids")
        self.logprob_token_ids = entries("logprob_token_ids", self.logprob_token_ids, "token ids") or None
        self.repetition_detection = RepetitionDetectionParams.of(self.repetition_detection)
        if self.seed == -1:  # as vLLM
            self.seed = None
        if self.thinking_token_budget == -1:
            self.thinking_token_budget = None
        if self.top_k == -1:
            self.top_k = 0
        if self.logit_bias is not None:
            self.logit_bias = _bias(self.logit_bias)
        self._check_numbers()
        check_flags(**{f.name: getattr(self, f.name) for f in fields(self) if f.type == "bool"})
        self._check_lists()
        self._check_several()
        self._check_structured()
        if self.top_k > ALL_TOKENS:
            self.top_k = ALL_TOKENS
        if self.temperature > FLAT:
            self.temperature = FLAT
        if 0 < self.temperature < 0.01:  # as vLLM: below this the division overflows half precision
            self.temperature = 0.01

    def clone(self) -> SamplingParams:
        """A copy that shares nothing that could change."""
        return deepcopy(self)

    def checked(self) -> SamplingParams:
        """A copy, of which every field was looked at. Raises RequestError, also for what the text layer alone fills in."""
        for name, source in MADE_FROM.items():
            if getattr(self, name) and getattr(self, source) in (None, ()):
                raise RequestError(f"{name} is made from {source}: give that instead", param=name)
        return replace(self)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def scored(self) -> int | tuple[int, ...] | None:
        """Beside which tokens an answer's log-probabilities are told: so many of the likeliest (-1: all), or these; None: not."""
        return self.logprobs if self.logprob_token_ids is None else tuple(self.logprob_token_ids)

    @property
    def width(self) -> int:
        """Completions that are generated."""
        return self.best_of or self.n

    def _check_numbers(self) -> None:
        beams = self.use_beam_search
        check_number("n", self.n, 1, MAX_BEAMS if beams else MAX_N, integer=True, hint="the number of beams" if beams else "")
        check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        check_number("temperature", self.temperature, 0.0, math.inf)
        check_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        check_number("top_k", self.top_k, 0, math.inf, integer=True, hint="0 or -1 keeps all tokens")
        check_number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            check_number("seed", self.seed, -(2**63), 2**64 - 1, integer=True)
        if self.max_tokens is not None:
            check_number("max_tokens", self.max_tokens, 1, math.inf, integer=True)
        check_number("min_tokens", self.min_tokens, 0, math.inf, integer=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}, more than max_tokens = {self.max_tokens}", param="min_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, -1, math.inf, integer=True, hint="-1 returns the whole vocabulary")
        if self.thinking_token_budget is not None:
            check_number("thinking_token_budget", self.thinking_token_budget, 0, math.inf, integer=True, hint="-1 is no limit")
        check_number("length_penalty", self.length_penalty, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)

    def _check_several(self) -> None:
        """What says how many completions there are."""
        if self.best_of is not None:
            check_number("best_of", self.best_of, 1, MAX_N, integer=True)
            if self.best_of < self.n:
                raise RequestError(f"best_of is {self.best_of}, less than n = {self.n}: it must be at least n", param="best_of")
        if self.use_beam_search:
            wrong = next((name for name, unused in NOT_FOR_BEAMS.items() if getattr(self, name) not in unused), None)
            if wrong is not None:
                raise RequestError(
                    f"{wrong} does not go with use_beam_search, which follows the model's own log-probabilities: leave it out",
                    param=wrong,
                )
            if self.width != self.n:
                raise RequestError(
                    f"best_of is {self.best_of}, but with use_beam_search n = {self.n} is the number of beams: leave best_of out",
                    param="best_of",
                )
        elif self.greedy and self.width > 1:
            name = "n" if self.n > 1 else "best_of"
            raise RequestError(
                f"{name} is {getattr(self, name)}, but temperature 0 gives one answer: use {name}=1 or a temperature above 0",
                param=name,
            )

    def _check_structured(self) -> None:
        structured: object = self.structured_outputs
        if structured is None:
            return
        if not isinstance(structured, StructuredOutputsParams):
            message = f"structured_outputs must be StructuredOutputsParams, got {structured!r:.80}"
            raise RequestError(message, param="structured_outputs")
        for name, value in NOT_WITH_GRAMMAR.items():
            if getattr(self, name) != value:
                message = f"{name} does not go with structured_outputs, where the grammar says when the text ends: leave it out"
                raise RequestError(message, param=name)

    def _check_lists(self) -> None:
        if any(not isinstance(s, str) or not s for s in self.stop or ()):
            raise RequestError("stop holds an empty or non-text entry: a stop string needs at least one character", param="stop")
        for name in ("stop", "bad_words"):
            words = getattr(self, name)
            size = sum(len(word) for word in words if isinstance(word, str))
            if len(words) > MAX_WORDS or size > MAX_WORDS_CHARS:
                most = f"at most {MAX_WORDS} of {MAX_WORDS_CHARS} characters in all are taken"
                raise RequestError(f"{name} has {len(words)} entries of {size} characters: {most}", param=name)
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need detokenize=True: use stop_token_ids instead", param="stop")
        if (count := len(self.logprob_token_ids or ())) > MAX_SCORED_IDS:
            message = f"logprob_token_ids has {count} entries: at most {MAX_SCORED_IDS} are taken"
            raise RequestError(message, param="logprob_token_ids")
        if count and self.logprobs not in (None, 0, count):
            message = f"logprobs is {self.logprobs} and logprob_token_ids has {count} entries: leave one out"
            raise RequestError(message, param="logprobs")
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
            ids = getattr(self, name) or ()
            if len(ids) > MAX_IDS:
                raise RequestError(f"{name} has {len(ids)} entries, more than any vocabulary has tokens", param=name)
            if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
                raise RequestError(f"{name} must be a list of token ids (integers >= 0), got {list(ids)[:5]}", param=name)
            if name != "logprob_token_ids" and ids:
                setattr(self, name, tuple(dict.fromkeys(ids)))  # each once: the work of a step grows with them
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty: no token could be sampled", param="allowed_token_ids")


@dataclass(slots=True)
class BeamSearchParams:
    """vLLM's, for ``LLM.beam_search``. Raises RequestError naming the field that is out of range."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0  # changes nothing: beams are ranked by the model's own log-probabilities
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        check_number("beam_width", self.beam_width, 1, MAX_BEAMS, integer=True)

    def sampling(self) -> SamplingParams:
        """The same for the engine."""
        return SamplingParams(
            n=self.beam_width,
            use_beam_search=True,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            length_penalty=self.length_penalty,
            include_stop_str_in_output=self.include_stop_str_in_output,
        )


@dataclass(slots=True)
class PoolingParams:
    """vLLM's, for ``LLM.embed``. Raises RequestError naming the field that is out of range."""

    dimensions: int | None = None  # the first so many numbers of each embedding; None: all
    normalize: bool | None = None  # to length 1; None: as the model says

    def __post_init__(self) -> None:
        if self.dimensions is not None:
            check_number("dimensions", self.dimensions, 1, math.inf, integer=True)
        if self.normalize is not None:
            check_flags(normalize=self.normalize)


def _bias(bias: dict[Any, Any]) -> dict[int, float]:
    try:
        if any(isinstance(token, float | bool) for token in bias):
            raise ValueError  # int() would cut it off
        clean = {int(token): float(value) for token, value in bias.items()}
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise RequestError(f"logit_bias must map token ids to numbers, got {bias!r:.80}", param="logit_bias") from None
    for token, value in clean.items():
        if token < 0 or not -100.0 <= value <= 100.0:
            raise RequestError(f"logit_bias[{token}] is {value}: ids are >= 0 and values in [-100, 100]", param="logit_bias")
    return clean
