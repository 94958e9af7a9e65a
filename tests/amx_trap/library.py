"""The trap for tile instructions (tiles.c, trap.c) as a library, and what the native extension's code says of itself."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kernels.cpu import backend

HERE = Path(__file__).resolve().parent
KINDS = ("ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbsud", "tdpbf16ps")
AMX_LEAF7 = 1 << 22 | 1 << 24 | 1 << 25  # bf16, tile, int8
AMX_XCR0 = 3 << 17  # the system saves tiles


class State(ctypes.Structure):
    """struct tile_state: of the thread that asks."""

    _fields_ = (
        ("palette", ctypes.c_uint8),
        ("start_row", ctypes.c_uint8),
        ("rows", ctypes.c_uint8 * 8),
        ("bytes", ctypes.c_uint16 * 8),
        ("data", ctypes.c_uint8 * 1024 * 8),
    )


class Instruction(ctypes.Structure):
    """struct tile_instruction."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "length", "tile", "left", "right")),
        *((name, ctypes.c_uint64) for name in ("address", "stride")),
    )


@dataclass(frozen=True)
class Code:
    """What objdump finds in the extension: where tile instructions are, where it asks what runs it, and what it calls."""

    path: str
    tiles: dict[str, list[int]]
    asks: list[int]  # CPUID and XGETBV
    slots: list[int]  # of libc's syscall()


def missing() -> str | None:
    """Why nothing can be assembled and tried here; None where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "tile instructions are those of x86-64, and the trap is written for Linux"
    found = [name for name in ("cc", "objdump") if shutil.which(name) is None]
    return f"no {' and no '.join(found)} here" if found else None


def missing_for_extension() -> str | None:
    """Why the installed extension's tile code cannot be trapped here."""
    if (reason := missing()) is not None:
        return reason
    available = backend.available()
    if "amx" in available:
        return "this processor has AMX: the tests of the native kernels run its instructions themselves"
    if "avx512_bf16" not in available:
        return "the rest of the AMX kernels needs AVX-512 BF16, or the native extension is not built"
    return None


def build(folder: Path) -> Path:
    """``folder``/trap.so, compiled for this processor."""
    library = folder / "trap.so"
    flags = ["-O3", "-march=native", "-ffp-contract=off", "-Wall", "-Wextra", "-fPIC", "-shared"]
    subprocess.run(["cc", *flags, "-o", str(library), *(str(HERE / name) for name in ("tiles.c", "trap.c"))], check=True)
    return library


def read_code() -> Code:
    """The extension's, disassembled."""
    module = backend.native()
    assert module is not None and module.__file__ is not None
    path = module.__file__
    tiles: dict[str, list[int]] = {}
    asks = []
    command = ["objdump", "-d", "--no-show-raw-insn", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as objdump:
        assert objdump.stdout is not None
        for line in objdump.stdout:
            address, _, text = line.partition(":\t")
            name = text.split(maxsplit=1)[0] if text.strip() else ""
            if "%tmm" in text or "tile" in name:
                tiles.setdefault(name, []).append(int(address, 16))
            elif name in ("cpuid", "xgetbv"):
                asks.append(int(address, 16))
    assert objdump.returncode == 0
    relocations = subprocess.run(["objdump", "-R", path], check=True, capture_output=True, text=True).stdout
    slots = [int(address, 16) for address in re.findall(r"^(\w+) R_X86_64_(?:JUMP_SLOT|GLOB_DAT) +syscall\b", relocations, re.M)]
    return Code(path, tiles, asks, slots)


class Trap:
    """One process's: ``take_over`` cannot be taken back."""

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))
        self.lib.tile_decode.restype = self.lib.tile_execute.restype = ctypes.c_char_p
        self.lib.tile_state.restype = ctypes.POINTER(State)
        self.lib.trap_place.argtypes = self.lib.trap_visited.argtypes = self.lib.trap_syscall.argtypes = (ctypes.c_void_p,)

    @property
    def state(self) -> State:
        return self.lib.tile_state().contents

    def decode(self, code: bytes, registers: list[int]) -> tuple[str | None, Instruction]:
        """(why it is refused or None, what it is); ``registers``: rax rcx rdx rbx rsp rbp rsi rdi r8 .. r15 rip."""
        found = Instruction()
        reason = self.lib.tile_decode(code.ljust(16, b"\0"), (ctypes.c_uint64 * 17)(*registers), ctypes.byref(found))
        return reason and reason.decode(), found

    def step(self, code: bytes, registers: list[int]) -> str | None:
        """Does one instruction; what a processor would refuse it for."""
        reason, instruction = self.decode(code, registers)
        if reason is None:
            reason = (done := self.lib.tile_execute(ctypes.byref(instruction))) and done.decode()
        return reason

    def take_over(
        self, code: Code, *, leaf7: int = AMX_LEAF7, xcr0: int = AMX_XCR0, permits: bool = True, broken: str | None = None
    ) -> None:
        """From here on the extension finds AMX, or the part of it that the arguments leave. ``broken``: what computes wrongly."""
        module = backend.native()
        assert module is not None and module.__file__ == code.path
        with open("/proc/self/maps") as maps:
            fields = [line.split() for line in maps if line.rstrip().endswith(os.path.realpath(code.path))]
        base = self.base = next(int(field[0].split("-")[0], 16) for field in fields if int(field[2], 16) == 0)
        assert self.lib.trap_install(leaf7, xcr0, int(permits), 0) == 0
        for address in code.asks:
            assert self.lib.trap_place(base + address) == 0, hex(address)
        for address in code.slots:
            assert self.lib.trap_syscall(base + address) == 0
        self.lib.tile_break(KINDS.index(broken) if broken else -1)

    def unvisited(self, code: Code) -> list[str]:
        """Tile instructions of the extension that were never done."""
        sites = ((name, at) for name, all_of_it in code.tiles.items() for at in all_of_it)
        return [f"{name} at 0x{at:x}" for name, at in sites if not self.lib.trap_visited(self.base + at)]

    def counts(self) -> dict[str, int]:
        """Instructions done by kind; the threads that did any, and those whose tiles are configured still."""
        kinds, threads, configured = (ctypes.c_uint64 * len(KINDS))(), ctypes.c_uint64(), ctypes.c_int64()
        self.lib.tile_counts(kinds, ctypes.byref(threads), ctypes.byref(configured))
        return dict(zip(KINDS, kinds)) | {"threads": threads.value, "configured": configured.value}


def prepare(folder: Path) -> Path:
    """The trap built, and beside it what processes that it is for need to know of the extension."""
    library = build(folder)
    library.with_suffix(".json").write_text(json.dumps(asdict(read_code())))
    return library


def load(library: Path) -> Code:
    return Code(**json.loads(library.with_suffix(".json").read_text()))


def run(arguments: Sequence[str], library: Path, *, seconds: float = 100) -> subprocess.CompletedProcess[str]:
    """Python with ``arguments`` in a process of its own, which AMX_TRAP tells of ``library``, and which may choose all it has."""
    environment = {name: value for name, value in os.environ.items() if name != "APPLIANCE_CPU_ISA"} | {"AMX_TRAP": str(library)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=HERE.parents[1], env=environment)


def run_script(script: str, library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same with a script that finds ``trap`` and this module's names."""
    begin = "from tests.amx_trap.library import *\nimport sys\nlibrary = Path(os.environ['AMX_TRAP'])\ntrap = Trap(library)\n"
    return run(["-c", begin + script, *arguments], library)
