"""The places in JSON schemas where very much may go on at once: each is tried as if an answer began with it.

The library bounds how many rules may go on at one place, and finds out there; a walk from the beginning passes few of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

WIDE = 64  # properties and alternatives; each takes 4 to 6 of the library's items, of which a place has 2,000
MOST = 32  # places that are tried of a schema, the widest first
_EITHER = ("anyOf", "oneOf", "allOf")
_DATA = ("enum", "const", "default", "examples")
_MARK = "%json"

Json = dict[str, Any]


def wide_parts(grammar: str) -> list[str]:
    """Grammars, as llguidance reads them, of the wide places of one in each JSON schema that it holds, without its beginning."""
    found: list[tuple[int, str]] = []
    for root in _schemas(grammar):
        if isinstance(root, dict):
            found += _parts(root)
    widest = dict.fromkeys(part for _, part in sorted(found, key=lambda one: -one[0]))
    return [json.dumps({"grammars": [{"json_schema": json.loads(part)}]}) for part in [*widest][:MOST]]


def _schemas(grammar: str) -> Iterator[Any]:
    """A list of grammars has them as values, Lark behind a word; a text may hold that word, too."""
    if grammar.startswith("{"):
        for one in json.loads(grammar)["grammars"]:
            yield one.get("json_schema")
            yield from _schemas(f" {one.get('lark_grammar') or ''}")
        return
    at = grammar.find(_MARK)
    while at >= 0:
        at += len(_MARK)
        try:
            schema, at = json.JSONDecoder().raw_decode(grammar, at + len(grammar[at:]) - len(grammar[at:].lstrip()))
            yield schema
        except ValueError:
            pass
        at = grammar.find(_MARK, at)


def _parts(root: Json) -> Iterator[tuple[int, str]]:
    """(width, a schema that says the same as a wide part of ``root``)."""
    options = {name: root[name] for name in ("$schema", "x-guidance") if name in root}
    widths: dict[int, int] = {}
    moved: Any = None
    for part in _within(root):
        if part is not root and (width := _width(part, root, widths)) >= WIDE:
            moved = moved or _moved(root)
            yield width, json.dumps({**options, "$defs": {"root": moved, "part": _moved(part)}, "$ref": "#/$defs/part"})


def _within(value: Any) -> Iterator[Json]:
    """All objects that may be schemas, from the outermost on."""
    if isinstance(value, dict):
        yield value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        if name not in _DATA:
            yield from _within(child)


def _width(schema: Any, root: Json, widths: dict[int, int]) -> int:
    """How many rules may go on at its beginning, about; of one that refers to itself one more."""
    if not isinstance(schema, dict):
        return 1
    if (known := widths.get(id(schema))) is None:
        widths[id(schema)] = 1
        known = len(schema["properties"]) if isinstance(schema.get("properties"), dict) else 0
        either = [one for name in _EITHER if isinstance(schema.get(name), list) for one in schema[name]]
        if isinstance(ref := schema.get("$ref"), str) and ref.startswith("#"):
            either.append(_target(root, ref))
        widths[id(schema)] = known = max(1, known + sum(_width(one, root, widths) for one in either))
    return known


def _target(root: Json, ref: str) -> Any:
    found: Any = root
    for name in ref[1:].split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _moved(value: Any) -> Any:
    """A copy whose references say where ``root`` is now."""
    if isinstance(value, list):
        return [_moved(one) for one in value]
    if not isinstance(value, dict):
        return value
    copy = {name: _moved(child) for name, child in value.items() if name not in ("$id", "x-guidance")}
    if isinstance(ref := value.get("$ref"), str) and ref.startswith("#"):
        copy["$ref"] = f"#/$defs/root{ref[1:]}"
    return copy
