"""Answers in the format of gpt-oss: as they should be, and as models spoil them; and a template of that format."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from appliance.text.tools.harmony import CALL, END, MARKERS, RETURN, START
from tests.text.test_strict_tools import SCHEMA
from tests.text.tool_texts import arguments, nonsense

TEMPLATE = """<|start|>system<|message|>Reasoning: {{ reasoning_effort or 'medium' }}<|end|>\
{% if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}\
{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}\
{% if m.content and m.thinking %}{{ raise_exception('both content and thinking') }}{% endif %}\
{% if m.content or m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.content or m.thinking }}<|end|>{% endif %}\
<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>\
{{ m.tool_calls[0].function.arguments | tojson }}<|call|>\
{% elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}\
{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}\
{% elif m.role == 'tool' %}<|start|>functions.f to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>\
{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|start|>assistant{% endif %}"""
THOUGHT, SAID, FINAL = "<|channel|>analysis<|message|>", "<|channel|>commentary<|message|>", "<|channel|>final<|message|>"
CALLS = (
    "<|channel|>commentary to=functions.%s <|constrain|>json<|message|>",
    " to=functions.%s<|channel|>commentary json<|message|>",
    " to=functions.%s<|channel|>commentary <|constrain|>json<|message|>",
    "<|channel|>commentary to=functions.%s<|message|>",
    "<|channel|>analysis to=%s code<|message|>",
)
TEXTS = (SAID, FINAL, "<|message|>", "<|channel|>final <|constrain|>JSON<|message|>")
NEXT, CALL_OF_F = f"{END}{START}assistant", CALLS[0] % "f"
TOOL = {"type": "function", "function": {"name": "f", "description": "F", "parameters": SCHEMA}}
SCRAPS = [
    *(*MARKERS, *MARKERS, THOUGHT, SAID, FINAL, NEXT, CALL_OF_F, CALLS[1] % "g"),
    *("assistant", "analysis", "commentary", "final", "to=functions.f", " to=f", "json", "<|chan", "nel|>", "<|", "<", "|>"),
    *(" ", "\n", "Hello", '{"a": 1}', "{", "ü", "日本"),
]


@dataclass
class Written:
    """An answer, and what it says."""

    text: str = ""
    thoughts: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    thinking: list[str] = field(default_factory=list)  # all of the messages that are thoughts, markers included

    def add(self, rng: random.Random, last: bool) -> None:
        begun, kind = f"{START}assistant" * bool(self.text), rng.choice("tsc")
        text = rng.choice(["Hm. ", "ü"]) + nonsense(rng, 8)
        if kind == "t":
            whole = begun + THOUGHT + text + END * (not last)
            self.thoughts.append(text)
            self.thinking.append(whole)
        elif kind == "s":
            whole = begun + rng.choice(TEXTS) + text + (rng.choice(["", RETURN]) if last else END)
            self.texts.append(text)
        else:
            name, text = rng.choice(["f", "get_weather", "a.b-c:d"]), arguments(rng)
            whole = begun + rng.choice(CALLS) % name + text + (rng.choice(["", CALL]) if last else rng.choice([END, CALL]))
            self.calls.append((name, text))
        self.text += whole


def answer(rng: random.Random) -> Written:
    made, count = Written(), rng.randint(1, 5)
    for i in range(count):
        made.add(rng, i == count - 1)
    return made


def any_answer(rng: random.Random) -> str:
    """Anything from nonsense to a proper answer."""
    if rng.random() < 0.4:
        return "".join(rng.choices(SCRAPS, k=rng.randrange(20)))
    text = answer(rng).text
    for _ in range(rng.randrange(4)):
        i = rng.randrange(len(text) + 1)
        text = text[:i] + rng.choice(["", "", rng.choice(SCRAPS)]) + text[i + rng.randrange(3) :]
    return text[: rng.randrange(len(text) + 1)] if rng.random() < 0.3 else text


def tokens(text: str) -> list[str]:
    """As the model's tokenizer has them: markers are one each."""
    return [part for part in re.split(f"({'|'.join(map(re.escape, MARKERS))}|.)", text, flags=re.DOTALL) if part]
