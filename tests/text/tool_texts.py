"""Texts for parsers: calls as each format writes them, and what models make of formats on bad days."""

import json
import random

from appliance.text.tools.formats import Granite, Hermes, Hunyuan, Llama3Json, Mistral, Phi4Mini
from appliance.text.tools.forms import FORMS
from appliance.text.tools.gemma import FunctionGemma
from appliance.text.tools.marked import DeepSeekV3, SolarOpen
from appliance.text.tools.pythonic import Lfm2
from appliance.text.tools.tags import MiniMaxM2, Qwen3Coder

KINDS = (Hermes, Llama3Json, Mistral)
ALL_KINDS = (*KINDS, Granite)
# Those whose grammars differ from that of another format by their words alone, which need not be tried at length.
ALIKE = (Hunyuan, Phi4Mini, FunctionGemma, DeepSeekV3, SolarOpen, Qwen3Coder, MiniMaxM2, Lfm2)
GRAMMARS = [(kind, form) for kind, forms in FORMS.items() for form in forms if kind not in ALIKE]
SCRAPS = [
    *(
        "<tool_call>",
        "</tool_call>",
        "<|python_tag|>",
        "<|tool_call|>",
        "[TOOL_CALLS]",
        "[CALL_ID]",
        "[ARGS]",
        "<think>",
        "</think>",
    ),
    *("<tool_", "call>", "</", "[TOOL", "_CALLS]", "<|py", "<", "["),
    *("{", "}", "]", '"', "\\", '\\"', ":", ",", ";", "; ", " ", "\n", "\n\n", "\t", "\r\n"),
    *('{"name": "f", ', '"name": "f"', '"arguments": {', '"parameters": {"a": 1}', '"id": "abcdefghi"', '"type": "function"'),
    *(
        '{"name": "f", "arguments": {"x": "',
        '{"name": "g", "parameters": {}}',
        '"arguments": "{\\"a\\": 1}"',
        '"arguments": null',
    ),
    *(
        "f",
        "get_weather",
        "Hello",
        "1",
        "-2.5e3",
        "true",
        "null",
        "None",
        "\\u00e9",
        "\\ud83d",
        "ü",
        "日本",
        "😀",
        "\u2028",
        "\x00",
    ),
]


def nonsense(rng, most=25):
    return "".join(rng.choice(SCRAPS) for _ in range(rng.randrange(most)))


def cuts(rng, text):
    """The text in pieces."""
    size = rng.choice([1, 2, 4, 20, 1000])
    pieces = []
    while text:
        n = rng.randint(1, size)
        pieces.append(text[:n])
        text = text[n:]
    return pieces


def value(rng, depth=0):
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind == 0:
        return nonsense(rng, 6)
    if kind < 5:
        return [rng.randrange(-999, 999), rng.random() * 1e9, True, None][kind - 1]
    if kind == 5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {nonsense(rng, 4): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def arguments(rng):
    """An object as JSON text, in one of the ways it can be written."""
    one = {nonsense(rng, 4): value(rng) for _ in range(rng.randrange(4))}
    spelling = rng.choice([{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}])
    return json.dumps(one, **spelling)


def calls(rng):
    return [(rng.choice(["f", "get_weather", "a.b-c:d"]), arguments(rng)) for _ in range(rng.randint(1, 4))]


def written(rng, kind, some):
    return rng.choice(FORMS[kind]).write(some)


def spoiled(rng, text):
    """The text with a few characters lost, doubled or exchanged."""
    for _ in range(rng.randrange(4)):
        i = rng.randrange(len(text) + 1)
        text = text[:i] + rng.choice(["", "", rng.choice(SCRAPS)]) + text[i + rng.randrange(3) :]
    return text


def any_text(rng):
    """Anything from nonsense to proper calls between words."""
    if rng.random() < 0.3:
        return nonsense(rng)
    parts = [rng.choice(["", "Sure: ", "\n", nonsense(rng, 4)])]
    for _ in range(rng.randint(1, 3)):
        parts += [
            spoiled(rng, written(rng, rng.choice(ALL_KINDS), calls(rng))),
            rng.choice(["", " ", "\n", "and", nonsense(rng, 3)]),
        ]
    text = "".join(parts)
    return text[: rng.randrange(len(text) + 1)] if rng.random() < 0.3 else text


def seeded(count, seed):
    return [random.Random(f"{seed}-{i}") for i in range(count)]
