"""Questions with checkable answers, and the split into those that are trained on and those that are held out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from demo_model import words

HELD_OUT_SHARE = 10  # one in so many
TOP = 30  # the largest number to add or to take away from


@dataclass(frozen=True)
class Question:
    category: str
    key: str  # what decides whether it is held out
    text: str
    answer: str


def all_questions() -> list[Question]:
    """Every question the generator knows, without variations of spelling and courtesy."""
    return [q for source in (_sums, _opposites, _calendar, _letters, _counting, _facts, _talk) for q in source()]


def held_out(question: Question) -> bool:
    """Small talk is never held out: each has its own words, and nothing else would teach them."""
    if question.category in ("talk", "unknown"):
        return False
    return hashlib.sha256(question.key.encode()).digest()[0] % HELD_OUT_SHARE == 0


def _ask(
    category: str, content: str, templates: list[str], answer: str, *, by_content: bool = False, **slots: object
) -> Iterator[Question]:
    for number, template in enumerate(templates):
        key = f"{category}:{content}" if by_content else f"{category}:{content}:{number}"
        yield Question(category, key, template.format(**slots), answer)


def _sums() -> Iterator[Question]:
    plus = ["What is {a} plus {b}?", "What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.", "How much is {a} plus {b}?"]
    minus = ["What is {a} minus {b}?", "What is {a} - {b}?", "{a} - {b} = ?", "Take {b} from {a}.", "How much is {a} minus {b}?"]
    for a in range(TOP + 1):
        for b in range(TOP + 1):
            yield from _ask("sums", f"{a}+{b}", plus, f"{a} plus {b} is {a + b}.", by_content=True, a=a, b=b)
            if a >= b:
                yield from _ask("differences", f"{a}-{b}", minus, f"{a} minus {b} is {a - b}.", by_content=True, a=a, b=b)


def _opposites() -> Iterator[Question]:
    templates = [
        "What is the opposite of {w}?", "Tell me the opposite of {w}.", "Which word is the opposite of {w}?", "Opposite of {w}?",
        "Name the opposite of {w}.", "What is the contrary of {w}?",
    ]  # fmt: skip
    seen = set()
    for one, other in words.pairs(words.OPPOSITES, " "):
        for w, x in ((one, other), (other, one)):
            if w not in seen:
                seen.add(w)
                yield from _ask("opposites", w, templates, f"The opposite of {w} is {x}.", w=w)


def _calendar() -> Iterator[Question]:
    for kind, names in (("day", words.DAYS), ("month", words.MONTHS)):
        for i, name in enumerate(names):
            after, before = names[(i + 1) % len(names)], names[i - 1]
            follow = [
                "What {k} comes after {n}?",
                "Which {k} comes after {n}?",
                "What {k} follows {n}?",
                "Which {k} is after {n}?",
                "What is the {k} after {n}?",
            ]
            precede = [
                "What {k} comes before {n}?",
                "Which {k} comes before {n}?",
                "Which {k} is before {n}?",
                "What is the {k} before {n}?",
            ]
            yield from _ask("calendar", f"after {name}", follow, f"{after} comes after {name}.", k=kind, n=name)
            yield from _ask("calendar", f"before {name}", precede, f"{before} comes before {name}.", k=kind, n=name)
    for i, day in enumerate(words.DAYS):
        tomorrow = [
            "If today is {n}, what day is tomorrow?",
            "Today is {n}. What day is tomorrow?",
            "It is {n} today. What is tomorrow?",
        ]
        yield from _ask("calendar", f"tomorrow {day}", tomorrow, f"Tomorrow is {words.DAYS[(i + 1) % 7]}.", n=day)
    for month, days in zip(words.MONTHS, words.MONTH_DAYS, strict=True):
        length = ["How many days are in {n}?", "How many days does {n} have?", "How long is {n}?", "{n} has how many days?"]
        yield from _ask("calendar", f"length {month}", length, f"{month} has {days} days.", n=month)


def _letters() -> Iterator[Question]:
    spell = ["Spell the word {w}.", "Spell {w}.", "How do you spell {w}?", "Can you spell {w}?", "Please spell the word {w}."]
    count = [
        "How many letters are in {w}?",
        "How many letters does {w} have?",
        "Count the letters in {w}.",
        "Count the letters of the word {w}.",
    ]
    first = [
        "What is the first letter of {w}?",
        "Which letter does {w} start with?",
        "{w} starts with which letter?",
        "First letter of {w}?",
    ]
    last = [
        "What is the last letter of {w}?",
        "Which letter does {w} end with?",
        "{w} ends with which letter?",
        "Last letter of {w}?",
    ]
    for w in words.WORDS.split():
        yield from _ask("spelling", w, spell, f"{w} is spelled {'-'.join(w)}.", w=w)
        yield from _ask("letters", f"count {w}", count, f"{w} has {len(w)} letters.", w=w)
        yield from _ask("letters", f"first {w}", first, f"The first letter of {w} is {w[0]}.", w=w)
        yield from _ask("letters", f"last {w}", last, f"The last letter of {w} is {w[-1]}.", w=w)


def _counting() -> Iterator[Question]:
    templates = [
        "Count from {a} to {b}.",
        "Please count from {a} to {b}.",
        "Can you count from {a} to {b}?",
        "Say the numbers from {a} to {b}.",
    ]
    following = ["What number comes after {a}?", "Which number comes after {a}?", "What is the next number after {a}?"]
    for a in range(21):
        for b in range(a + 2, min(a + 8, 25)):
            numbers = ", ".join(str(i) for i in range(a, b + 1))
            yield from _ask("counting", f"{a}..{b}", templates, f"{numbers}.", a=a, b=b)
    for a in range(99):
        yield from _ask("counting", f"after {a}", following, f"{a + 1} comes after {a}.", a=a)


def _facts() -> Iterator[Question]:
    capital = [
        "What is the capital of {w}?",
        "Which city is the capital of {w}?",
        "Name the capital of {w}.",
        "Tell me the capital of {w}.",
        "Capital of {w}?",
    ]
    country = ["{w} is the capital of which country?", "Which country has {w} as its capital?", "In which country is {w}?"]
    color = ["What color is {w}?", "Which color is {w}?", "Tell me the color of {w}.", "What is the color of {w}?"]
    legs = ["How many legs does {w} have?", "How many legs are on {w}?", "Tell me how many legs {w} has."]
    sound = ["What sound does a {w} make?", "What does a {w} say?", "Which sound does a {w} make?", "How does a {w} sound?"]
    young = [
        "What is a young {w} called?",
        "What do you call a young {w}?",
        "What is the name of a young {w}?",
        "What is a baby {w} called?",
    ]
    for w, city in words.pairs(words.CAPITALS, " "):
        yield from _ask("facts", f"capital {w}", capital, f"The capital of {w} is {city}.", w=w)
        yield from _ask("facts", f"country {w}", country, f"{city} is the capital of {w}.", w=city)
    sources: list[tuple[str, list[str], str, Callable[[str, str], str]]] = [
        ("color", color, words.COLORS, lambda w, x: f"{w[0].upper()}{w[1:]} is {x}."),
        ("legs", legs, words.LEGS, lambda w, x: f"{w[0].upper()}{w[1:]} has {x} legs."),
        ("sound", sound, words.SOUNDS, lambda w, x: f"A {w} says {x}."),
        ("young", young, words.YOUNG, lambda w, x: f"A young {w} is called a {x}."),
    ]
    for name, templates, table, answer in sources:
        for w, x in words.pairs(table, ":"):
            yield from _ask("facts", f"{name} {w}", templates, answer(w, x), w=w)


def _talk() -> Iterator[Question]:
    for answer, questions in words.SMALL_TALK.items():
        for question in questions:
            yield Question("talk", question, question, answer)
    for line in words.UNKNOWN.replace("\n", "|").split("|"):
        yield Question("unknown", line, line, words.UNKNOWN_ANSWER)


def vary(text: str, rng: random.Random) -> str:
    """The same question as people type it: lower case, without its stop, or with a word of courtesy."""
    if rng.random() < 0.25 and len(text) > 1 and text[1].islower():
        text = text[0].lower() + text[1:]
    if rng.random() < 0.2:
        text = text.rstrip(".?!")
    elif text[-1].isalnum() and rng.random() < 0.4:
        text += rng.choice("!.")
    return rng.choice(["Please tell me: ", "Hello! ", "Hi, ", "OK. ", "And "]) + text if rng.random() < 0.08 else text


# How often each category is drawn; within one, all questions alike.
WEIGHTS = {
    "sums": 26, "differences": 22, "opposites": 8, "calendar": 9, "spelling": 9, "letters": 12, "counting": 9, "facts": 8,
    "talk": 4, "unknown": 4,
}  # fmt: skip
SYSTEMS = ["You are a helpful assistant.", "Answer in one short sentence.", "You are a friendly teacher."]


class Conversations:
    """An endless stream of conversations of one to three questions that are not held out."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.by_category: dict[str, list[Question]] = {name: [] for name in WEIGHTS}
        for question in all_questions():
            if not held_out(question):
                self.by_category[question.category].append(question)

    def next(self) -> list[dict[str, str]]:
        rng, messages = self.rng, []
        if rng.random() < 0.15:
            messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
        for category in rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=rng.choice([1, 1, 1, 2, 3])):
            question = rng.choice(self.by_category[category])
            messages += [
                {"role": "user", "content": vary(question.text, rng)},
                {"role": "assistant", "content": question.answer},
            ]
        return messages


def held_out_sample(number: int, seed: int) -> list[Question]:
    """Held-out questions, as many of each category as their weights say."""
    rng = random.Random(seed)
    pool: dict[str, list[Question]] = {}
    for question in all_questions():
        if held_out(question):
            pool.setdefault(question.category, []).append(question)
    total = sum(WEIGHTS[name] for name in pool)
    found = []
    for name, questions in pool.items():
        found += rng.sample(questions, min(len(questions), round(number * WEIGHTS[name] / total)))
    return found
