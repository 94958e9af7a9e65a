"""What a model thinks, taken apart from what it answers, as the text comes.

Line breaks beside the tags belong to the tags, as in the models' own templates: ``<think>\\nHm.\\n</think>\\n\\nYes.`` is the
reasoning "Hm." and the answer "Yes.", which may have tags of its own (``Tags.around``). Where a piece goes never depends on
how the text was cut into deltas.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from appliance.text.tools.reader import first, open_end

_EDGE = "\r\n"  # what is dropped beside a tag


@dataclass(frozen=True, slots=True)
class Tags:
    """How a model marks its reasoning."""

    start: str = "<think>"
    end: str = "</think>"
    assumed: bool = False  # it always begins with reasoning, start tag or not
    around: tuple[str, ...] = ()  # behind it a start and an end tag may stand around the answer: they are no part of that
    label: str = ""  # may stand behind the start tag, and is no part of the reasoning
    before: str = ""  # a marker that ends reasoning without an end tag, and is itself a part of what follows

    @property
    def special(self) -> tuple[str, ...]:
        """The tags that must be in the text even where they are special tokens."""
        return (self.start, self.end, *self.around)

    def opened(self, prompt: str, continued: str | None = None) -> bool:
        """Whether an answer begins within reasoning. (Where it does not, its own first characters may still begin one.)

        ``prompt`` is the rendered text, ``continued`` the text of the last message where the answer goes on with that.
        """
        if continued is not None:
            return continued.rfind(self.start) > continued.rfind(self.end)
        tail = prompt[-200:].rstrip().removesuffix(self.label.rstrip())  # templates end so; what users write is further up
        return tail.endswith(self.start) or (self.assumed and not tail.endswith(self.end))

    def closed(self, prompt: str, continued: str | None = None) -> bool:
        """Whether an answer begins behind the end of reasoning, as templates write it where none is wanted."""
        if continued is not None:
            return continued.rfind(self.end) > continued.rfind(self.start)
        return prompt[-200:].rstrip().endswith(self.end)


THINK = Tags()
GEMMA = Tags(
    "<|channel>", "<channel|>", label="thought\n", before="<|tool_call>"
)  # 4; its calls may come in place of the end tag
GRANITE = Tags(around=("<response>", "</response>"))  # 3.3, whose templates alone speak of these two in a row, and ERNIE 4.5
HUNYUAN = Tags(around=("<answer>", "</answer>"))
KIMI = Tags(before="<|tool_calls_section_begin|>")
# Of gpt-oss, where calls and reasoning are messages of one format: "Harmony" (tools/harmony.py) reads both.
HARMONY = Tags("<|channel|>analysis<|message|>", "<|end|>")
# vLLM's names of parsers whose formats are tags around the reasoning.
REASONING: dict[str, Tags] = {
    "apertus": Tags("<|inner_prefix|>", "<|inner_suffix|>", before="<|tools_prefix|>"),
    "deepseek_r1": Tags(assumed=True),
    "deepseek_v3": THINK,
    "ernie45": GRANITE,
    "gemma4": GEMMA,
    "glm45": THINK,
    "granite": Tags("Here is my thought process:", "Here is my response:"),
    "hunyuan_a13b": HUNYUAN,
    "kimi_k2": KIMI,
    "mimo": THINK,
    "minimax_m2": THINK,
    "mistral": Tags("[THINK]", "[/THINK]"),
    "nemotron_v3": THINK,
    "olmo3": THINK,
    "openai_gptoss": HARMONY,
    "qwen3": THINK,
    "seed_oss": Tags("<seed:think>", "</seed:think>"),
    "step3p5": THINK,
}


def tags_of(templates: Iterable[str]) -> Tags | None:
    """The tags that chat templates speak of."""
    source = "".join(templates)
    if HARMONY.start in source:
        return HARMONY
    if "".join(GRANITE.around) in source:
        return GRANITE
    own = {
        HUNYUAN.around[0]: HUNYUAN,
        "<|extra_0|>": HUNYUAN,
        "<｜hy_User｜>": HUNYUAN,
        KIMI.before: KIMI,
    }  # some never say <answer>
    if THINK.end in source and (tags := next((tags for mark, tags in own.items() if mark in source), None)):
        return tags
    others = (REASONING[name] for name in ("mistral", "seed_oss", "gemma4", "granite", "apertus"))
    return next((tags for tags in (*others, THINK) if tags.end in source), None)


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """What a piece of text adds."""

    reasoning: str = ""
    content: str = ""


class ReasoningParser:
    """One answer's text: reasoning at the start, or none, then content."""

    def __init__(self, tags: Tags, *, opened: bool = False) -> None:
        """``opened``: as ``Tags.opened`` says."""
        self.tags = tags
        self._held = ""  # what went nowhere yet
        self._place = "start"
        self._without_tag = "reasoning" if opened else "content"  # what a text is that does not begin with the start tag
        self._trims = opened  # line breaks come before the first text of this place
        self._framed = False
        self.ended = ""  # by this marker

    @property
    def state(self) -> Literal["none", "open", "closed"]:
        """Whether there was reasoning so far, and has come to its end."""
        if self._place in ("behind", "content"):
            return "closed" if self.ended else "none"
        return "open" if self._place == "reasoning" or self._without_tag == "reasoning" else "none"

    def push(self, text: str) -> ReasoningDelta:
        self._held += text
        if self._place == "start":
            self._place = self._begin()
        reasoning = self._reasoning() if self._place == "reasoning" else ""
        if self._place == "behind":
            self._place = self._behind()
        return ReasoningDelta(reasoning, self._content() if self._place == "content" else "")

    def finish(self) -> ReasoningDelta:
        """What was held back, now that no more comes: the beginning of a tag is text."""
        if self._place == "start" and self._held.lstrip().startswith(self.tags.start):  # with a part of its label
            self._place, self._held = "reasoning", ""
        place = self._without_tag if self._place == "start" else self._place
        if self._framed and (frame := self._held.rstrip()).endswith(self.tags.around[1]):
            self._held = frame.removesuffix(self.tags.around[1]).rstrip(_EDGE)
        rest = self._give(len(self._held))
        return ReasoningDelta(reasoning=rest) if place == "reasoning" else ReasoningDelta(content=rest)

    def parse(self, text: str) -> ReasoningDelta:
        """A whole text at once."""
        now, last = self.push(text), self.finish()
        return ReasoningDelta(now.reasoning + last.reasoning, now.content + last.content)

    def _begin(self) -> str:
        begun, label = self._held.lstrip(), self.tags.label
        if not begun.startswith(self.tags.start):
            return "start" if self.tags.start.startswith(begun) else self._without_tag
        thought = begun[len(self.tags.start) :]
        if thought != label and label.startswith(thought):
            return "start"
        self._held, self._trims = thought.removeprefix(label), True
        return "reasoning"

    def _reasoning(self) -> str:
        marks = (self.tags.end, self.tags.before) if self.tags.before else (self.tags.end,)
        found = first(self._held, marks)
        if found is None:
            n = len(self._held) - open_end(self._held, marks)
            return self._give(len(self._held[:n].rstrip(_EDGE)))
        end, self.ended = found
        text = self._give(len(self._held[:end].rstrip(_EDGE)))
        self._held = self._held[self._held.find(self.ended) :].removeprefix(self.tags.end)
        self._place, self._trims = "behind" if self.tags.around else "content", True
        return text

    def _behind(self) -> str:
        begun, tag = self._held.lstrip(), self.tags.around[0]
        if not begun.startswith(tag):
            return "behind" if tag.startswith(begun) else "content"
        self._held, self._framed = begun[len(tag) :], True
        return "content"

    def _content(self) -> str:
        """What cannot belong to the end tag around it."""
        if not self._framed:
            return self._give(len(self._held))
        tag, text = self.tags.around[1], self._held.rstrip()
        n = len(text) - len(tag) if text.endswith(tag) else len(self._held) - open_end(self._held, (tag,))
        return self._give(len(self._held[:n].rstrip(_EDGE)))

    def _give(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        if self._trims:
            text = text.lstrip(_EDGE)
            self._trims = not text
        return text


def tokens_until(end: str, tokens: Iterable[bytes]) -> int:
    """How many tokens it takes to write this, which they do: ``tokens`` are the bytes of each. All of them where they do not."""
    mark, tail, count = end.encode(), b"", 0
    for one in tokens:
        count += 1
        if mark in (tail := tail + one):
            break
        tail = tail[-len(mark) :]
    return count
