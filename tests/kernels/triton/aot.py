"""Kernels compiled for cards that are not here, and what the machine code looks like.

    reports = compile_all([Compilation("kernels.triton.norm:_rms_norm", {"x": "*fp16", "n": "i32"}, {"BLOCK": 1024})])

compiles for every architecture of TARGETS and gives a Report for each pair: for each compilation, each target. It runs in a
process of its own (this module as a program, a line of JSON in and out), because kernels imported for the interpreter cannot be
compiled. To start it takes longer than most compilations, so it stays as long as this one.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

from tests.kernels.triton.cards import CARDS, Occupancy, occupancy

TARGETS = tuple(CARDS)
TRITON = tuple(map(int, version("triton").split(".")[:2]))
OLDER, OLDEST = TRITON < (3, 9), TRITON < (3, 7)  # their code is a little longer
TOOLS = ("backends", "nvidia", "bin")  # inside triton: ptxas and cuobjdump of its own
PARENT = os.getppid()
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)")


@dataclass(frozen=True)
class Compilation:
    """A kernel as one launch would compile it. Pointers and integers count as multiples of 16, as the JIT sees most of them."""

    kernel: str  # "module:function"
    types: dict[str, str]  # of run-time arguments: "*fp16", "*bf16", "*i8", "*i16", "*i32", "*i64", "*fp8e4nv", "i32", "fp32" ...
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    odd: tuple[str, ...] = ()  # integers and pointers that may be any number
    targets: tuple[int, ...] = TARGETS
    case: str = ""  # in words
    maxnreg: int | None = None  # registers of a thread, at most

    @staticmethod
    def of(fields: dict[str, Any]) -> Compilation:
        """From what JSON made of one."""
        return Compilation(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})

    @property
    def label(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel.partition(':')[2]} {constants} warps={self.num_warps} stages={self.num_stages}"


@dataclass(frozen=True)
class Report:
    """What one compilation became. ``loop``: operations and how often, of the longest loop (of all where there is none)."""

    label: str
    target: int
    warps: int
    registers: int
    stack: int  # bytes of local memory: more than 0 are spills, or arrays that did not fit registers
    shared: int  # bytes
    loop: dict[str, int] | None  # None: not asked for
    turns: bool  # whether there is a loop

    @property
    def fits(self) -> bool:
        return self.shared <= CARDS[self.target].shared_of_block

    @property
    def occupancy(self) -> Occupancy:
        return occupancy(self.target, registers=self.registers, shared=self.shared, warps=self.warps)

    def count(self, *prefixes: str) -> int:
        """Operations of the loop whose name starts with one of these."""
        assert self.loop is not None
        return sum(n for name, n in self.loop.items() if name.startswith(prefixes))

    def per_weight(self, weights: int) -> float:
        """Instructions of the loop for each of the ``weights`` that one thread handles in a turn."""
        assert self.loop is not None
        return sum(self.loop.values()) / weights


def compile_all(compilations: Sequence[Compilation], *, loops: bool = True) -> list[Report]:
    """Raises RuntimeError with the compiler's words for what does not compile.

    ``loops``: read the machine code too.
    """
    process = compiler()
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps([[asdict(one) for one in compilations], loops]) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except BaseException:  # a test's time is over: what comes then is no answer to the next one
        compiler.cache_clear()
        process.kill()
        process.wait()
        raise
    if not answer:
        compiler.cache_clear()
        raise RuntimeError(f"the compiler ended with exit code {process.wait()}")
    found = json.loads(answer)
    if isinstance(found, str):
        raise RuntimeError(found)
    return [Report(**one) for one in found]


@cache
def compiler() -> subprocess.Popen[str]:
    """Ends when this process does: nobody writes to it then, and what it is compiling is the last."""
    command, root = [sys.executable, "-m", "tests.kernels.triton.aot"], Path(__file__).parents[3]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(), cwd=root
    )


def environment() -> dict[str, str]:
    """Of a process that compiles."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def hot_loop(sass: str) -> tuple[Counter[str], bool]:
    """Operations between the farthest backward branch and its target; (all, False) where there is none."""
    code = [(int(m[1], 16), m[2], m[3]) for m in INSTRUCTION.finditer(sass)]
    best = (0, -1)
    for at, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < at and at - int(target[1], 16) > best[1] - best[0]:
            best = (int(target[1], 16), at)
    names = [name for at, name, _ in code if best[0] <= at <= best[1]] or [name for _, name, _ in code]
    return Counter(name for name in names if name != "NOP"), best[1] > 0


def compile_one(one: Compilation, target: int) -> tuple[bytes, int]:
    """What the card is given, and bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, function = one.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), function)
    constants = {
        name: getattr(triton.language, v[3:]) if isinstance(v, str) and v.startswith("tl.") else v
        for name, v in one.constants.items()
    }
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else one.types[name]
        if name in one.types and name not in one.odd and (one.types[name].startswith("*") or one.types[name] in ("i32", "i64")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": one.num_warps, "num_stages": one.num_stages, "maxnreg": one.maxnreg}
    try:
        made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:
        raise RuntimeError(f"{one.label} for sm_{target}: {error}") from error
    return made.asm["cubin"], made.metadata.shared


def report(one: Compilation, target: int, cubin: bytes, shared: int, code: str | None) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = run_tool("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    loop, turns = (None, False) if code is None else hot_loop(code)
    return Report(
        one.label, target, one.num_warps, int(found[1]), int(found[2]), shared, None if loop is None else dict(loop), turns
    )


def run_tool(name: str, *arguments: str) -> str:
    """What one of Triton's own tools says."""
    import triton

    tool = Path(triton.__file__).parent.joinpath(*TOOLS) / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def disassembled(cubins: Sequence[bytes], target: int) -> list[str]:
    """Instructions of kernels for an architecture. Kept beside Triton's own cache.

    The disassembler takes a quarter of a second to begin, and little for a kernel: those that are new are one image for it.
    """
    import triton
    from triton.runtime.cache import get_cache_manager

    places = {cubin: get_cache_manager(sha256(cubin + f"code {triton.__version__}".encode()).hexdigest()) for cubin in cubins}
    new = [cubin for cubin, place in places.items() if not place.get_file("code")]
    if new:
        parts = [instructions(cubin) for cubin in new]
        starts = list(accumulate(map(len, parts), initial=0))
        lines: list[list[str]] = [[] for _ in new]
        with tempfile.NamedTemporaryFile(suffix=".bin") as file:
            file.write(b"".join(parts))
            file.flush()
            told = run_tool("nvdisasm", "--binary", f"SM{target}{'a' * (target >= 90)}", file.name)
        for line in told.splitlines():
            if at := re.match(r"\s*/\*([0-9a-f]{4,})\*/", line):
                lines[bisect(starts, int(at[1], 16)) - 1].append(line)
        for cubin, own in zip(new, lines, strict=True):
            places[cubin].put(zlib.compress("\n".join(own).encode(), 1), "code")
    return [zlib.decompress(Path(str(places[cubin].get_file("code"))).read_bytes()).decode() for cubin in cubins]


def instructions(cubin: bytes) -> bytes:
    """The only section .text.* of an ELF file of 64 bits."""
    (begin,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HHH", cubin, 0x3A)
    # Of each section: name, type, flags, address, offset, size.
    heads = [struct.unpack_from("<IIQQQQ", cubin, begin + i * size) for i in range(count)]
    (found,) = (head for head in heads if cubin.startswith(b".text.", heads[names][4] + head[0]))
    return cubin[found[4] : found[4] + found[5]]


def for_somebody(one: Compilation, target: int) -> tuple[bytes, int]:
    """A compilation, as long as the process is there that asked for it."""
    if os.getppid() != PARENT:
        sys.exit("nobody waits for this any more")
    return compile_one(one, target)


def answer(line: str) -> str:
    """Reports, or the words of what went wrong, in JSON."""
    given, loops = json.loads(line)
    try:
        pairs = [(one, target) for one in map(Compilation.of, given) for target in one.targets]
        made = [for_somebody(*pair) for pair in pairs]
        codes: list[str | None] = [None] * len(pairs)
        for wanted in {target for _, target in pairs} if loops else ():
            places = [i for i, (_, target) in enumerate(pairs) if target == wanted]
            for i, code in zip(places, disassembled([made[i][0] for i in places], wanted), strict=True):
                codes[i] = code
        reports = [report(*pair, *one, code) for pair, one, code in zip(pairs, made, codes, strict=True)]
        return json.dumps([asdict(one) for one in reports])
    except Exception as error:
        return json.dumps(f"{type(error).__name__}: {error}"[-4000:])


if __name__ == "__main__":
    out, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed is no answer
    for line in sys.stdin:
        print(answer(line), file=out, flush=True)
