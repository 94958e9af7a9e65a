"""From structured outputs to a grammar that is known to compile, and from a tokenizer to what grammars are matched against.

The library is llguidance. It is imported on first use: everything else works without it. Grammars come from strangers: their
length, the work to compile one and the work of a step are bounded. They are tried in a process of their own (compiler.py). The
library walks them recursively, so all that builds one runs in a thread with a stack that is deep enough for the longest.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, lru_cache, partial
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any

from appliance.core.params import RequestError, StructuredOutputsParams
from appliance.text.compiler import Compiler, Task
from appliance.text.schema import constraining
from appliance.text.wide import wide_parts

if TYPE_CHECKING:
    from appliance.text.tokenizer import Tokenizer

MAX_CHARS = 65536  # of a schema, regular expression, grammar, or all choices
MAX_OWN_CHARS = 3 * MAX_CHARS  # of a grammar that the server itself makes of many tools
STACK_BYTES = (
    256 * 2**20
)  # of address space: a chain of as many rules as fit into MAX_CHARS takes up to 80 MiB, of MAX_OWN_CHARS 240
WHITESPACE = r" |\r?\n[ \t]{0,24}"  # between the parts of JSON; without a bound a small model goes on for ever
WALK = 24  # tokens of an answer that are tried
PARTS_S = 0.5  # of processor time, after which no further wide place is tried
ROOM = {"max_items_in_row": 2, "step_max_items": 4}  # times the limits, in an answer: what was before a place may go on, too
KEPT = 64  # grammars that are not tried again
_BEFORE = "\x02"  # a text that no token joins with what follows it
LIMITS = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,  # about 20 ms
    "step_lexer_fuel": 200_000,  # about 14 ms
    "step_max_items": 50_000,  # about 3 ms
    "max_lexer_states": 50_000,  # 1 to 2 kB each
    "max_grammar_size": 200_000,
}
_compiler = Compiler()


def plain(words: str) -> str:
    """The library's words, without the mark for what it leaves out; others for a name and an option that it has for itself."""
    if words.startswith("NoExtension"):
        return "it leads to a place where no text can go on"
    if words.startswith("oneOf constraints"):
        return "oneOf is understood where its alternatives exclude each other: use anyOf"
    return words.replace("<non-verbose/>", "")


def library() -> Any:
    """llguidance. Raises RequestError where it is not installed."""
    try:
        import llguidance
    except ImportError as error:
        message = (
            f"structured_outputs need the package llguidance, which cannot be imported here ({error}): pip install llguidance"
        )
        raise RequestError(message, param="structured_outputs", code="unsupported_parameter") from None
    return llguidance


@cache
def limits(*, answering: bool = False) -> Any:
    """For grammars that are tried, and with ``ROOM`` for those that are followed."""
    found = {name: value * (ROOM.get(name, 1) if answering else 1) for name, value in LIMITS.items()}
    return library().LLParserLimits(verbose_errors=False, **found)


@cache
def deep_thread() -> ThreadPoolExecutor:
    """The one thread that compiles."""
    pool, before = ThreadPoolExecutor(1, thread_name_prefix="grammar"), threading.stack_size(STACK_BYTES)
    try:
        pool.submit(int).result()  # its thread starts now
    finally:
        threading.stack_size(before)
    return pool


def compile_grammar(
    structured: StructuredOutputsParams, around: str = "", *, ours: bool = False, parts: Mapping[str, str] | None = None
) -> str:
    """As llguidance reads it. Raises RequestError naming the field, with the library's words, where it cannot be served.

    ``around``: the grammar (Lark) of the whole text, in which ``@answer`` is what ``structured`` says. In it, and where
    ``structured`` is ``ours``, special tokens may stand by their ids. ``parts``: tools' names, and JSON schemas in a grammar that
    is ours, tried by themselves; the error is about tools then. Takes up to some tenths of a second where this one was not seen
    lately.
    """
    if around:
        compile_grammar(structured)
    kind, text = _source(structured)
    made = ours or bool(around)
    field, most = ("tools", MAX_OWN_CHARS) if parts else (f"structured_outputs.{kind}", MAX_OWN_CHARS if made else MAX_CHARS)
    if (size := len(text) + len(around)) > most:
        message = f"{field} has {size} characters: at most {most} are taken"
        if parts:
            message = f"tools: the grammar of their calls {message.removeprefix(field)[1:]}"
        raise RequestError(message, param=field)
    library()  # or say that it is missing
    whitespace = _whitespace(structured)
    tried = tuple((parts or {}).items())
    tight = structured.disable_any_whitespace or structured.whitespace_pattern == ""
    grammar, wrong = _checked(kind, text, tight, whitespace, around, made, tried)
    if wrong:
        raise RequestError(f"{field}{wrong}", param=field)
    return grammar


def _source(structured: StructuredOutputsParams) -> tuple[str, str]:
    """(field, text)."""
    if structured.json_object:
        return "json_object", '{"type": "object"}'
    if structured.choice is not None:
        # As one terminal, which becomes an automaton: of rules, thousands would be tried one by one in each step.
        return "choice", "start: CHOICE\nCHOICE: " + " | ".join(map(_quoted, structured.choice))
    if isinstance(structured.json, dict):
        try:
            return "json", json.dumps(constraining(structured.json, formats=True), ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"structured_outputs.json is no JSON ({error})", param="structured_outputs.json") from None
    kind = next(name for name in ("json", "regex", "grammar") if getattr(structured, name) is not None)
    return kind, getattr(structured, kind)


def _whitespace(structured: StructuredOutputsParams) -> str:
    """What may stand between the parts of JSON. Raises RequestError that names this field, and not the schema."""
    if not structured.whitespace_pattern:
        return WHITESPACE
    if wrong := _checked("regex", structured.whitespace_pattern, False, WHITESPACE, "", False, ())[1]:
        field = "structured_outputs.whitespace_pattern"
        raise RequestError(f"{field}{wrong}", param=field)
    return structured.whitespace_pattern


def _quoted(text: str) -> str:
    """As a string in Lark, whose lexer takes no DEL as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


@lru_cache(KEPT)
def _checked(
    kind: str, text: str, tight: bool, whitespace: str, around: str, specials: bool, parts: tuple[tuple[str, str], ...]
) -> tuple[str, str]:
    """(the grammar, or else what is wrong with it)."""
    # What stands in the schema under "x-guidance" may not say otherwise.
    options = {"whitespace_flexible": not tight, "whitespace_pattern": None if tight else whitespace, "lenient": False}
    options |= {"coerce_one_of": False, "item_separator": ",", "key_separator": ":"}
    try:
        text.encode()
        grammar, wrong, words, part = _compiler.run(Task(kind, text, options, around, parts))
    except UnicodeEncodeError:
        return "", " holds an unpaired surrogate (half of a \\ud83d\\ude00 pair)"
    except TimeoutError as error:
        return "", f" cannot be served: {error}"
    if wrong:
        reason = " ".join(map(plain, words))
        if parts:  # the library shows the grammar below its words, which is none that anybody sent
            reason = re.split(r"\n\s*\d+ \| ", reason)[0]
        where = "" if part is None else f": the parameters of {part!r:.80}"
        return "", f"{where} cannot be served: {' '.join(reason.split())[:500]}"
    if not specials and any(word.startswith("no tokenizer") for word in words):
        return "", ": names of special tokens, <|...|> and <[...]>, are not understood in grammars"
    return grammar, ""


def within(around: str, made: str) -> str:
    """Both as one: llguidance takes a list of grammars that name each other, and begins with the first."""
    first, *rest = json.loads(made)["grammars"] if made.startswith("{") else [{"lark_grammar": made}]
    return json.dumps({"grammars": [{"lark_grammar": around}, {**first, "name": "answer"}, *rest]})


def walked(tokenizer: Any, grammar: str) -> str:
    """What is wrong with a grammar for an LLTokenizer behind the first tokens that it allows, or at a wide place further on.

    Some limits show there alone, and some depend on the tokens. Returns "" where nothing is.
    """
    begun, known = time.thread_time(), library().LLMatcher
    parts = takewhile(lambda _: time.thread_time() - begun < PARTS_S, wide_parts(grammar))
    valid = (one for one in parts if not known.validate_grammar(one, limits=limits()))  # else it cannot be moved
    first, late = ([ids[0] for ids in map(tokenizer.tokenize_str, some) if len(ids) == 1] for some in ('"[{:,', " \t\r\n"))
    walk = partial(_walked, tokenizer, first, late)
    return next(filter(None, map(walk, chain([grammar], valid))), "")


def _walked(tokenizer: Any, first: Sequence[int], late: Collection[int], grammar: str) -> str:
    """``first``: tokens that are taken where they are allowed, in this order; ``late``: where nothing else is."""
    matcher = library().LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
    for _ in range(WALK):
        bias = matcher.compute_logit_bias()  # a byte a token: 0, or 200 where it is allowed
        if matcher.get_error() or matcher.is_stopped():
            break
        allowed = (match.start() for match in re.finditer(b"[^\0]", bias))
        others = chain((i for i in allowed if i not in late), late)
        token = next((i for i in chain(first, others) if bias[i]), None)
        if token is None or not matcher.consume_token(token):
            break
    return str(matcher.get_error() or "")


def vocabulary(tokenizer: Tokenizer, size: int, ends: tuple[int, ...]) -> Any:
    """An LLTokenizer of ``size`` tokens, as the detokenizer spells them; ``ends`` end a text. Takes up to a second.

    The tokenizer reads no special tokens in texts from now on: a grammar's text that looks like one is text.
    """
    tokenizer.spell_specials()
    lib, found = library(), _Vocabulary(tokenizer, size, ends[0])
    return lib.LLTokenizer(lib.TokenizerWrapper(found), eos_token=list(ends))


class _Vocabulary:
    """What llguidance asks of a tokenizer. Tokens that a model has and its tokenizer has not are empty, and never allowed."""

    def __init__(self, tokenizer: Tokenizer, size: int, end: int) -> None:
        self.eos_token_id, self.bos_token_id = end, None
        self.tokens = [tokenizer.spell(token) or b"" for token in range(size)]
        self.special_token_ids = [token for token in tokenizer.special_ids if token < size]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """Tokens that spell exactly this, as they stand within a text: many tokenizers put a space before what begins one."""
        wanted = text.encode()
        for before in ("", _BEFORE):
            ids = self._tokenizer.encode(before + text, add_special_tokens=False)
            for first in range(3 * len(before) + 1):
                if b"".join([self.tokens[token] for token in ids[first:] if token < len(self.tokens)]) == wanted:
                    return ids[first:]
        return self._greedy(wanted)

    def _greedy(self, wanted: bytes) -> list[int]:
        """The longest token each time; only so far as there are tokens."""
        ids, at, most = [], 0, max(map(len, self._ids), default=0)
        while found := next((end for end in range(min(len(wanted), at + most), at, -1) if wanted[at:end] in self._ids), 0):
            ids.append(self._ids[wanted[at:found]])
            at = found
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {token: i for i, token in enumerate(self.tokens) if token and i not in special}
