"""Three hundred JSON schemas of assorted difficulty: what people write, what cannot be, and what no grammar can say."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import jsonschema

Schema = dict[str, Any]

KEYS = (
    "id",
    "name",
    "age",
    "tags",
    "größe",
    "名前",
    "first name",
    "x-y",
    "a.b",
    'quo"te',
    "back\\slash",
    "emoji😀",
    "",
    "$ref_like",
)
WORDS = ("red", "green", "blue", "öl", "日本", 'say "hi"', "a\\b", "tab\there", "ok", "", "very long value indeed", "😀")
PATTERNS = (
    r"^[A-Z]{2}\d{3}$",
    r"^a+b*$",
    r"^(cat|dog)s?$",
    r"\d",
    r"^[^\s@]{1,8}@[a-z]{2,6}\.(com|org)$",
    r"^\w{3,5}$",
    r"^.{0,4}$",
)
FORMATS = ("date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "uri", "hostname", "duration")

FORMATS_CHECKED = jsonschema.FormatChecker()  # with what jsonschema itself can only check where more packages are there
_TIME = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?([Zz]|[+-]([01]\d|2[0-3]):[0-5]\d)"  # RFC 3339, leap seconds included


@FORMATS_CHECKED.checks("time")
def _is_time(value: object) -> bool:
    return not isinstance(value, str) or re.fullmatch(_TIME, value) is not None


@FORMATS_CHECKED.checks("date-time")
def _is_date_time(value: object) -> bool:
    return (
        not isinstance(value, str)
        or re.fullmatch(rf"\d{{4}}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])[Tt ]{_TIME}", value) is not None
    )


@FORMATS_CHECKED.checks("uri")
def _is_uri(value: object) -> bool:
    return not isinstance(value, str) or re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s\"<>\\^`{|}]*", value) is not None


@FORMATS_CHECKED.checks("duration")
def _is_duration(value: object) -> bool:
    return not isinstance(value, str) or re.fullmatch(r"P(?!$)(\d+[YMWD])*(T(\d+[HMS])+)?", value) is not None


def boolean(_: random.Random, __: int) -> Schema:
    return {"type": "boolean"}


def null(_: random.Random, __: int) -> Schema:
    return {"type": "null"}


def text(rng: random.Random, _: int) -> Schema:
    low = rng.randrange(4)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(9)}


def pattern(rng: random.Random, _: int) -> Schema:
    return {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 30}


def formatted(rng: random.Random, _: int) -> Schema:
    return {"type": "string", "format": rng.choice(FORMATS)}


def integer(rng: random.Random, _: int) -> Schema:
    low = rng.randrange(-1000, 1000)
    kinds: list[Schema] = [
        {"minimum": low, "maximum": low + rng.randrange(500)},
        {"exclusiveMinimum": low, "exclusiveMaximum": low + 2 + rng.randrange(50)},
        {"minimum": 0, "maximum": 100, "multipleOf": rng.choice((2, 5, 7))},
        {"minimum": -5},
        {},
    ]
    return {"type": "integer", **rng.choice(kinds)}


def number(rng: random.Random, _: int) -> Schema:
    low = round(rng.uniform(-50, 50), 2)
    kinds: list[Schema] = [
        {"minimum": low, "maximum": round(low + rng.uniform(0.5, 20), 2)},
        {"exclusiveMinimum": 0, "maximum": 1},
        {"minimum": 0},
        {},
    ]
    return {"type": "number", **rng.choice(kinds)}


def enum(rng: random.Random, _: int) -> Schema:
    return {"enum": rng.sample([*WORDS, 1, -2.5, True, None, [1, "a"], {"k": []}], rng.randrange(1, 6))}


def const(rng: random.Random, _: int) -> Schema:
    return {"const": rng.choice([*WORDS, 17, 0.25, False, None, [None, "x"], {"deep": {"er": [1, 2]}}])}


def union(rng: random.Random, depth: int) -> Schema:
    if rng.random() < 0.3:
        return {"type": rng.sample(["null", "boolean", "integer", "array"], 2), "maxItems": 3}
    return {"anyOf": [some(rng, depth - 1) for _ in range(rng.randrange(2, 4))]}


def one_of(rng: random.Random, depth: int) -> Schema:
    """Told apart by a constant, as generators of schemas write unions of classes."""
    several = [
        {
            "type": "object",
            "properties": {"kind": {"const": kind}, "value": some(rng, depth - 1)},
            "required": ["kind", "value"],
            "additionalProperties": False,
        }
        for kind in rng.sample(("circle", "square", "line", "dot"), rng.randrange(2, 4))
    ]
    return {"oneOf": several}


def array(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(3)
    return {"type": "array", "items": some(rng, depth - 1), "minItems": low, "maxItems": low + rng.randrange(4)}


def row(rng: random.Random, depth: int) -> Schema:
    items = [some(rng, depth - 1) for _ in range(rng.randrange(1, 4))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def record(rng: random.Random, depth: int) -> Schema:
    keys = rng.sample(KEYS, rng.randrange(1, 5))
    return {
        "type": "object",
        "properties": {key: some(rng, depth - 1) for key in keys},
        "required": keys if rng.random() < 0.5 else keys[: rng.randrange(len(keys) + 1)],
        "additionalProperties": False,
    }


def mapping(rng: random.Random, depth: int) -> Schema:
    kinds: list[Schema] = [
        {"additionalProperties": some(rng, depth - 1), "maxProperties": 2},
        {
            "patternProperties": {"^n[0-9]{1,2}$": some(rng, 0)},
            "additionalProperties": False,
            "minProperties": 1,
            "maxProperties": 2,
        },
        {"properties": {"id": integer(rng, 0)}, "required": ["id"], "additionalProperties": boolean(rng, 0), "maxProperties": 3},
    ]
    return {"type": "object", **rng.choice(kinds)}


def merged(rng: random.Random, depth: int) -> Schema:
    return {
        "allOf": [
            {"type": "object", "properties": {"a": some(rng, depth - 1)}, "required": ["a"]},
            {"properties": {"b": some(rng, 0)}, "required": ["b"], "maxProperties": 2},
        ]
    }


def referred(rng: random.Random, depth: int) -> Schema:
    return {
        "$defs": {"point": record(rng, depth - 1), "größe": some(rng, 0)},
        "type": "object",
        "properties": {
            "from": {"$ref": "#/$defs/point"},
            "to": {"$ref": "#/$defs/point"},
            "all": {"type": "array", "items": {"$ref": "#/$defs/gr%C3%B6%C3%9Fe"}, "maxItems": 2},
        },
        "required": ["from", "all"],
        "additionalProperties": False,
    }


def recursive(rng: random.Random, _: int) -> Schema:
    node = {
        "type": "object",
        "properties": {"value": some(rng, 0), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/definitions/node"}]}},
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    return {"definitions": {"node": node}, "$ref": "#/definitions/node"}


def loose(rng: random.Random, _: int) -> Schema:
    """Much is open: any value, other keys, strings without a bound."""
    kinds: list[Schema] = [
        {},
        {"type": "object"},
        {"type": "array"},
        {"type": "string"},
        {"type": "object", "properties": {"a": {}}, "required": ["a"]},
        {"type": "array", "items": {}, "maxItems": 2},
        {"title": "T", "description": "d", "default": 3, "examples": [1], "$comment": "c", "type": ["integer", "string"]},
    ]
    return rng.choice(kinds)


FLAT: tuple[Callable[[random.Random, int], Schema], ...] = (
    boolean, null, text, text, pattern, formatted, integer, integer, number, number, enum, const,
)  # fmt: skip
NESTED: tuple[Callable[[random.Random, int], Schema], ...] = (
    union, one_of, array, row, record, record, mapping, merged, referred, recursive, loose,
)  # fmt: skip
SERVED = (text, pattern, formatted, integer, number, enum, const, *NESTED)


def some(rng: random.Random, depth: int) -> Schema:
    """Any schema that needs no definitions of its own."""
    kinds = FLAT if depth <= 0 else (*FLAT, union, one_of, array, row, record, mapping)
    return rng.choice(kinds)(rng, depth)


# What no answer can satisfy, what is no schema, and what the library does not know: these must be refused.
REFUSED: tuple[Schema, ...] = (
    {"type": "string", "minLength": 5, "maxLength": 2},
    {"type": "integer", "minimum": 5, "maximum": 3},
    {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4},
    {"type": "array", "items": {"type": "null"}, "minItems": 4, "maxItems": 3},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"enum": []},
    {"type": "object", "properties": {"a": False}, "required": ["a"]},
    {"type": "object", "required": ["b"], "properties": {"a": {}}, "additionalProperties": False},
    {"anyOf": [{"type": "integer", "minimum": 2, "maximum": 1}]},
    {"type": "object", "minProperties": 3, "maxProperties": 2},
    {"type": "text"},
    {"type": ["string", "bogus"]},
    {"properties": []},
    {"required": "a"},
    {"items": 3},
    {"enum": "a"},
    {"type": "string", "pattern": 3},
    {"type": "string", "minLength": -1},
    {"type": "integer", "minimum": "1"},
    {"type": "string", "pattern": "(unclosed"},
    {"type": "string", "pattern": "(?=look)ahead"},
    {"type": "string", "pattern": r"(a)\1"},
    {"type": "string", "format": "no-such-format"},
    {"$ref": "#/$defs/missing"},
    {"$ref": "https://example.com/schema.json"},
    {"not": {"type": "string"}},
    {"if": {"type": "string"}, "then": {"minLength": 2}},
    {"type": "array", "uniqueItems": True},
    {"type": "array", "contains": {"type": "integer"}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"type": "object", "propertyNames": {"pattern": "^a"}},
    {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False},
    {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    {"x-guidance": {"lenient": True}, "not": {}},
)


def schemas(total: int = 300) -> Iterator[tuple[str, Schema]]:
    """(name, schema), the same each time: those of REFUSED, then of each kind in turn, deeper and deeper."""
    yield from ((f"refused-{i}", schema) for i, schema in enumerate(REFUSED))
    for i, number_ in zip(range(total - len(REFUSED)), count()):
        kind = SERVED[i % len(SERVED)]
        yield f"{kind.__name__}-{number_}", kind(random.Random(i), 1 + i // 100)
