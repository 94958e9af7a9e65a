"""Tables of measured launches in the folder beside: a file a card, made by scripts/tune on it, read at the first product.

::

    nvidia-h200.json   {"card": "NVIDIA H200", "capability": 90, "multiprocessors": 132, "torch": "2.11.0", "triton": "3.6.0",
                        "launches": {"w4 fp16": {"6144x4096": {"16": {"block_m": 16, .., "microseconds": 4.2}, ..}, ..}, ..}}

Keys are the kind of weight and the activations' type, outputs x inputs, and the largest number of rows that a launch is for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from kernels.layout import TRITON_SPLIT_OUTPUTS, TRITON_SPLIT_ROWS
from quant.errors import InputError

FOLDER = Path(__file__).parent / "configs"
KINDS = ("w4 fp16", "w4 bf16", "w8 fp16", "w8 bf16")
ALLOWED = {
    "block_m": (16, 32, 64, 128),
    "block_n": (32, 64, 128),  # no more than a tile has: larger ones would read beyond the last
    "warps": (1, 2, 4, 8, 16),
    "group": (0, 1, 2, 4, 8, 16, 32),
}
ALLOWED |= {"split": tuple(range(1, 9)), "stages": tuple(range(1, 9)), "slab": (False, True), "half": (False, True)}
NEEDED = ("block_m", "block_n", "split", "warps", "stages")


@dataclass(frozen=True)
class Launch:
    """Rows and outputs of a program, parts into which the inputs are cut, warps of a program, loads under way."""

    block_m: int
    block_n: int
    split: int
    warps: int
    stages: int
    group: int = 0
    """Tiles of rows that a tile of the weight meets before the next tile is read (kernels/triton/many.py); 0: as they come."""
    half: bool = False
    """A group's sum is added up in float16 where it provably fits: twice as fast on GeForce cards."""
    slab: bool = False
    """The weight is expanded, a slab of outputs at a time, for torch's product; blocks are those of the expansion."""


@dataclass(frozen=True)
class Table:
    """``launches``: by kind and shape, ascending in rows."""

    card: str
    capability: int
    launches: Mapping[tuple[str, int, int], tuple[tuple[int, Launch], ...]]

    def find(self, kind: str, outputs: int, inputs: int, rows: int) -> Launch | None:
        """The launch of the nearest number of rows that is not smaller; None for what was not measured."""
        for most, launch in self.launches.get((kind, outputs, inputs), ()):
            if rows <= most:
                return launch
        return None


def file_name(card: str) -> str:
    """Of the table of a card that the driver calls so."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ".json"


@cache
def table(card: str) -> Table | None:
    """Of the card with this name, None where it was never measured. InputError names the file and the field that is wrong."""
    path = FOLDER / file_name(card)
    if not path.is_file():
        return None
    found = read(path)
    if found.card != card:
        raise InputError(f"{path}: card is {found.card!r}: a table of {card!r} is needed here")
    return found


def tables() -> Iterator[Table]:
    """All there are, by name of their file."""
    for path in sorted(FOLDER.glob("*.json")):
        yield read(path)


def read(path: Path) -> Table:
    """A table from its file. InputError names the file and the field that is wrong."""
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no table of launches can be read from it: {error}") from error
    fields = _Fields(path, given)
    launches = {}
    for kind, shapes in fields.get("launches", dict).items():
        if kind not in KINDS:
            fields.refuse(f"launches.{kind}", f"one of {', '.join(KINDS)} is needed")
        for shape, sizes in fields.checked(f"launches.{kind}", shapes, dict).items():
            at = f"launches.{kind}.{shape}"
            size = re.fullmatch(r"(\d+)x(\d+)", shape)
            if size is None:
                fields.refuse(at, "OUTPUTSxINPUTS is needed")
            found = [
                fields.launch(f"{at}.{rows}", int(size[1]), rows, one) for rows, one in fields.checked(at, sizes, dict).items()
            ]
            launches[kind, int(size[1]), int(size[2])] = tuple(sorted(found, key=lambda one: one[0]))
    return Table(fields.get("card", str), fields.get("capability", int), launches)


@dataclass(frozen=True)
class _Fields:
    """What a file says, and how to complain about it."""

    path: Path
    given: Any

    def refuse(self, field: str, why: str) -> NoReturn:
        raise InputError(f"{self.path}: {field}: {why} (scripts/tune makes the file anew)")

    def checked(self, field: str, value: Any, kind: type) -> Any:
        if type(value) is not kind:
            self.refuse(field, f"{value!r} is no {kind.__name__}")
        return value

    def get(self, field: str, kind: type) -> Any:
        top = self.checked("the file", self.given, dict)
        if field not in top:
            self.refuse(field, "is missing")
        return self.checked(field, top[field], kind)

    def launch(self, at: str, outputs: int, rows: str, given: Any) -> tuple[int, Launch]:
        """(the most rows, their launch)."""
        if not re.fullmatch(r"[1-9]\d*", rows):
            self.refuse(at, "a number of rows is needed")
        values = {name: value for name, value in self.checked(at, given, dict).items() if name in ALLOWED}
        for name in NEEDED:
            if name not in values:
                self.refuse(f"{at}.{name}", "is missing")
        for name, value in values.items():
            if value not in ALLOWED[name] or isinstance(value, bool) != (name in ("slab", "half")):
                self.refuse(f"{at}.{name}", f"{value!r} is none of {', '.join(map(str, ALLOWED[name]))}")
        launch = Launch(**values)
        fits = launch.split * int(rows) <= TRITON_SPLIT_ROWS and outputs < TRITON_SPLIT_OUTPUTS  # the memory plan has no more
        if launch.split > 1 and (not fits or launch.group or launch.slab):
            self.refuse(
                f"{at}.split",
                f"{launch.split}: parts times rows are at most {TRITON_SPLIT_ROWS}, and only small tiles are split, of weights "
                f"with fewer than {TRITON_SPLIT_OUTPUTS} outputs",
            )
        return int(rows), launch
