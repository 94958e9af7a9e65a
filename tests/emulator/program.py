"""PTX text, as Triton's compiler writes it, taken apart: parameters, registers, and instructions with their operands."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

SIZES = {"pred": 0, "b8": 1, "b16": 2, "b32": 4, "b64": 8, "b128": 16}
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_STATEMENT = re.compile(r"[^;{}]*(?:\{[^{}]*\}[^;{}]*)*;")
_INSTRUCTION = re.compile(r"^(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_REGISTERS = re.compile(r"([%\w]+)<(\d+)>")


@dataclass(frozen=True)
class Instruction:
    name: tuple[str, ...]  # "add.s32" as ("add", "s32")
    operands: tuple[str | tuple[str, ...], ...]  # a vector is a tuple; an address keeps its brackets
    guard: str = ""  # a predicate
    negated: bool = False

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.guard} " if self.guard else ""
        return f"{guard}{'.'.join(self.name)} {self.operands}"


@dataclass
class Program:
    parameters: list[tuple[str, int]] = field(default_factory=list)  # name, bytes
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of registers; 0: a predicate
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    constants: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)  # that were read: a word and a type, and its value


def parse(text: str) -> Program:
    """The only kernel in a module. ValueError for what is not understood."""
    text = _COMMENT.sub(" ", text)
    program = Program()
    program.shared.update(re.findall(r"\.shared[^;]*?(\w+)\[\]", text))
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)(.*?)\{(.*)\}", text.partition(".section")[0], re.S)
    if entry is None:
        raise ValueError("there is no kernel in this text")
    for part in entry[1].split(","):
        if part.strip():
            kind = re.search(r"\.param\s+\.(\w+)", part)
            assert kind is not None, part
            program.parameters.append((part.split()[-1], width(kind[1])))
    _body(entry[3], program)
    return program


def width(kind: str) -> int:
    """Bytes of a type such as "s32"."""
    return SIZES["pred"] if kind == "pred" else SIZES["b" + kind.lstrip("bsuf")]


def _body(text: str, program: Program) -> None:
    scopes: list[dict[str, str]] = [{}]  # blocks in braces have registers of their own
    count = 0
    while text := text.lstrip():
        if text[0] in "{}":
            if text[0] == "{":
                scopes.append({})
            else:
                scopes.pop()
            text = text[1:]
            continue
        label = re.match(r"([$\w]+):", text)
        if label:
            program.labels[label[1]] = len(program.code)
            text = text[label.end() :]
            continue
        if text.startswith(".loc"):
            text = text.partition("\n")[2]
            continue
        statement = _STATEMENT.match(text)
        if statement is None:
            raise ValueError(f"not understood: {text[:80]!r}")
        text, line = text[statement.end() :], statement[0][:-1].strip()
        if line.startswith(".reg"):
            count += 1
            _declare(line, program, scopes[-1] if len(scopes) > 1 else None, count)
        elif line and not line.startswith("."):
            program.code.append(_instruction(line, scopes))


def _declare(line: str, program: Program, scope: dict[str, str] | None, count: int) -> None:
    _, kind, names = line.split(maxsplit=2)
    for name in names.split(","):
        many = _REGISTERS.match(name.strip())
        found = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
        for one in found:
            unique = one if scope is None else f"{one}#{count}"
            if scope is not None:
                scope[one] = unique
            program.sizes[unique] = width(kind[1:])


def _instruction(line: str, scopes: list[dict[str, str]]) -> Instruction:
    def resolve(word: str) -> str:
        word = word.strip()
        bare = word.lstrip("!")
        for scope in reversed(scopes):
            if bare in scope:
                return word.replace(bare, scope[bare])
        return word

    match = _INSTRUCTION.match(line)
    if match is None:
        raise ValueError(f"not understood: {line!r}")
    operands: list[str | tuple[str, ...]] = []
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", match[4]):
        part = part.strip()
        if part[0] == "{":
            operands.append(tuple(resolve(word) for word in part[1:-1].split(",")))
        elif part[0] == "[":
            base, _, offset = part[1:-1].partition("+")
            operands.append(f"[{resolve(base)}+{offset.strip() or 0}]")
        else:
            operands.append(resolve(part))
    return Instruction(tuple(match[3].replace("::", "~").split(".")), tuple(operands), resolve(match[2] or ""), match[1] == "!")
