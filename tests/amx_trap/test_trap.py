"""The trap for tile instructions does what Intel's manual says: addresses against the assembler, products against torch."""

from __future__ import annotations

import ctypes
import itertools
import random
import re
import subprocess
from pathlib import Path

import pytest
import torch

from kernels.cpu import backend
from tests.amx_trap import library
from tests.amx_trap.library import KINDS, Trap, run_script

if (reason := library.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{i}" for i in range(8, 16)), "rip")
VALUES = [0x0123_4567_89AB_CDEF * (2 * i + 3) % 2**64 for i in range(len(NAMES))]
PRODUCTS = {"tdpbsud": 1, "tdpbf16ps": 2}  # bytes of an input


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return library.build(tmp_path_factory.mktemp("trap"))


@pytest.fixture(scope="module")
def trap(built: Path) -> Trap:
    return Trap(built)


def assemble(folder: Path, lines: list[str]) -> list[bytes]:
    """What the assembler makes of each."""
    source, object_file = folder / "lines.s", folder / "lines.o"
    source.write_text("\n".join(lines) + "\n")
    subprocess.run(["cc", "-c", "-o", str(object_file), str(source)], check=True)
    text = subprocess.run(
        ["objdump", "-d", "--insn-width=16", str(object_file)], check=True, capture_output=True, text=True
    ).stdout
    codes = [bytes.fromhex(found) for found in re.findall(r"^ *[0-9a-f]+:\t([0-9a-f ]+?) *\t", text, re.M)]
    assert len(codes) == len(lines)
    return codes


class Core:
    """Instructions by their text, on this thread's tiles. Operands in memory are at rax, rows rcx bytes apart."""

    def __init__(self, trap: Trap, folder: Path) -> None:
        each = ("tileloadd (%rax,%rcx,1), %tmm{}", "tilestored %tmm{}, (%rax,%rcx,1)", "tilezero %tmm{}")
        texts = ["ldtilecfg (%rax)", "tilerelease", *(text.format(t) for text in each for t in range(8))]
        texts += [f"{name} %tmm2, %tmm1, %tmm0" for name in PRODUCTS]
        self.trap = trap
        self.codes = dict(zip(texts, assemble(folder, texts), strict=True))

    def do(self, text: str, address: int = 0, stride: int = 0) -> str | None:
        """Why it is refused; None where it is done."""
        return self.trap.step(self.codes[text], [address, stride] + [0] * 15)

    def configure(self, shapes: dict[int, tuple[int, int]], **changes: int) -> str | None:
        """``shapes``: tile -> (rows, bytes); ``changes``: further bytes, by ``at<number>``."""
        config = bytearray(64)
        config[0] = 1
        for tile, (rows, width) in shapes.items():
            config[16 + 2 * tile : 18 + 2 * tile] = width.to_bytes(2, "little")
            config[48 + tile] = rows
        for name, value in changes.items():
            config[int(name.removeprefix("at"))] = value
        buffer = ctypes.create_string_buffer(bytes(config), 64)
        return self.do("ldtilecfg (%rax)", ctypes.addressof(buffer))

    def tile(self, t: int) -> torch.Tensor:
        """uint8 [16, 64]"""
        return torch.frombuffer(bytearray(self.trap.state.data[t]), dtype=torch.uint8).view(16, 64)


@pytest.fixture
def core(trap: Trap, tmp_path: Path) -> Core:
    core = Core(trap, tmp_path)
    core.do("tilerelease")
    return core


def test_operands_are_what_the_assembler_meant(trap: Trap, tmp_path: Path) -> None:
    """Every pair of a base and an index, with all kinds of displacements."""
    rng, cases = random.Random(0), []
    for base in (*NAMES[:16], ""):
        for index in (*(name for name in NAMES[:16] if name != "rsp"), ""):
            for away in (0, 0x7F, -0x80, rng.randint(0x80, 2**31 - 1), -rng.randint(0x81, 2**31)):
                if base or index or away > 0:
                    cases.append(
                        (rng.choice(["tileloadd", "tilestored", "ldtilecfg"]), base, index, rng.choice([1, 2, 4, 8]), away)
                    )
    lines, expected = [], []
    for name, base, index, scale, away in cases:
        tile = rng.randrange(8)
        memory = f"{away}({'%' + base if base else ''}{f',%{index},{scale}' if index else ''})" if base or index else f"{away}"
        at = (VALUES[NAMES.index(base)] if base else 0) + away
        step = VALUES[NAMES.index(index)] * scale % 2**64 if index else 0
        if name == "ldtilecfg":
            lines.append(f"ldtilecfg {memory}")
            expected.append((name, 0, 0, 0, (at + step) % 2**64, 0))
        else:
            lines.append(f"{name} {memory}, %tmm{tile}" if name == "tileloadd" else f"{name} %tmm{tile}, {memory}")
            expected.append((name, tile, 0, 0, at % 2**64, step))
    for name in PRODUCTS:
        for c, a, b in itertools.permutations(range(8), 3):
            lines.append(f"{name} %tmm{b}, %tmm{a}, %tmm{c}")
            expected.append((name, c, a, b, 0, 0))
    lines += [f"tilezero %tmm{t}" for t in range(8)] + ["tilerelease"]
    expected += [("tilezero", t, 0, 0, 0, 0) for t in range(8)] + [("tilerelease", 0, 0, 0, 0, 0)]
    codes = assemble(tmp_path, [*lines, "ldtilecfg 0x1234(%rip)"])
    expected.append(("ldtilecfg", 0, 0, 0, (VALUES[16] + len(codes[-1]) + 0x1234) % 2**64, 0))
    for line, bytes_, wanted in zip([*lines, "rip"], codes, expected, strict=True):
        reason, i = trap.decode(bytes_, VALUES)
        assert reason is None, line
        assert (KINDS[i.kind], i.tile, i.left, i.right, i.address, i.stride) == wanted, line
        assert i.length == len(bytes_), line


def test_what_is_no_tile_instruction_that_is_known(trap: Trap, tmp_path: Path) -> None:
    others = ["tdpbssd %tmm1, %tmm2, %tmm3", "tdpbusd %tmm1, %tmm2, %tmm3", "tdpbuud %tmm1, %tmm2, %tmm3", "sttilecfg (%rax)"]
    others += [
        "tileloaddt1 (%rax,%rcx,1), %tmm0",
        "ud2",
        "nop",
        "vpdpbusd %zmm1, %zmm2, %zmm3",
        "vfmadd231ps %ymm1, %ymm2, %ymm3",
    ]
    for line, bytes_ in zip(others, assemble(tmp_path, others), strict=True):
        assert trap.decode(bytes_, VALUES)[0] is not None, line
    (zero,) = assemble(tmp_path, ["tilezero %tmm3"])
    for place, bit in ((1, 0x80), (2, 0x80), (2, 0x40), (2, 0x04)):  # R, W, one of vvvv, L
        spoilt = bytearray(zero)
        spoilt[place] ^= bit
        assert "#UD" in (trap.decode(bytes(spoilt), VALUES)[0] or ""), (place, bit)


@pytest.mark.parametrize("name", list(PRODUCTS))
def test_products(core: Core, name: str) -> None:
    """Random shapes; sums that float32 holds exactly. Beyond the shape there are zeros, whatever was there."""
    for seed in range(60):
        torch.manual_seed(seed)
        M, N, K4 = (int(torch.randint(1, 17, ())) for _ in range(3))
        K = K4 * 4 // PRODUCTS[name]
        if name == "tdpbsud":
            a, b = torch.randint(-128, 128, (M, K), dtype=torch.int8), torch.randint(0, 256, (K, N), dtype=torch.uint8)
            c = torch.randint(-(2**31), 2**31 - 1, (M, N), dtype=torch.int32)
            expected = (c.long() + a.long() @ b.long() + 2**31) % 2**32 - 2**31  # it wraps
            together = 4
        else:
            a, b = (torch.randint(-16, 17, shape).bfloat16() for shape in ((M, K), (K, N)))
            c = torch.randint(-999, 1000, (M, N)).float()
            expected = c.double() + a.double() @ b.double()
            together = 2
        right = b.view(K4, together, N).transpose(1, 2).contiguous()  # [K4, N, together]
        assert core.configure({0: (M, 4 * N), 1: (M, 4 * K4), 2: (K4, 4 * N)}) is None
        for t, operand in enumerate((c, a, right)):
            ctypes.memset(ctypes.addressof(core.trap.state.data[t]), 0xA5, 1024)
            flat = operand.flatten(1).view(torch.uint8)
            spread = torch.full((flat.shape[0], 100), 0x5A, dtype=torch.uint8)
            spread[:, : flat.shape[1]] = flat
            assert core.do(f"tileloadd (%rax,%rcx,1), %tmm{t}", spread.data_ptr(), 100) is None
            held = core.tile(t)
            assert torch.equal(held[: flat.shape[0], : flat.shape[1]], flat)
            held[: flat.shape[0], : flat.shape[1]] = 0
            assert not held.any()
        ctypes.memset(ctypes.addressof(core.trap.state.data[0]) + 64 * M, 0xA5, 1024 - 64 * M)
        assert core.do(f"{name} %tmm2, %tmm1, %tmm0") is None
        assert not core.tile(0)[M:].any() and not core.tile(0)[:, 4 * N :].any()
        out = torch.full((M, 70), 7, dtype=torch.int32)
        assert core.do("tilestored %tmm0, (%rax,%rcx,1)", out.data_ptr(), 280) is None
        assert (out[:, N:] == 7).all()
        found = out[:, :N].contiguous()
        assert torch.equal((found if name == "tdpbsud" else found.view(torch.float32)).to(expected.dtype), expected), (M, N, K)


@pytest.mark.parametrize(
    ("c", "pairs", "expected"),
    [
        (1.0, [(2.0**12, 2.0**12), (2.0**12, -(2.0**12))], 1.0),  # both sums of a pair meet before the destination
        (0.0, [(2.0**12, 2.0**12), (0, 0), (1, 1), (0, 0), (-(2.0**12), 2.0**12), (0, 0)], 0.0),  # in turn: the one was lost
        (0.0, [(2.0**12, 2.0**12), (1, 1), (-(2.0**12), 2.0**12), (0, 0)], 1.0),  # the other of a pair has a sum of its own
        (2.0**-130, [(0, 0)], 0.0),
        (0.0, [(2.0**-130, 2.0**30)], 0.0),
        (0.0, [(2.0**-70, 2.0**-70), (2.0**-70, 2.0**-60)], 0.0),
        (0.0, [(2.0**-60, 2.0**-60), (2.0**-126, -1.0)], 2.0**-120 - 2.0**-126),
    ],
)
def test_order_and_rounding_of_bfloat16_sums(core: Core, c: float, pairs: list[tuple[float, float]], expected: float) -> None:
    """tmm0 [1, 1] of what is one row times one column, denormals being zeros."""
    pairs = pairs + [(0, 0)] * (len(pairs) % 2)
    K4 = len(pairs) // 2
    assert core.configure({0: (1, 4), 1: (1, 4 * K4), 2: (K4, 4)}) is None
    left, right = (torch.tensor(side).bfloat16() for side in zip(*pairs, strict=True))
    sums = torch.tensor([c])
    for t, (operand, stride) in enumerate(((sums, 4), (left, 4), (right, 4))):
        assert core.do(f"tileloadd (%rax,%rcx,1), %tmm{t}", operand.data_ptr(), stride) is None
    assert core.do("tdpbf16ps %tmm2, %tmm1, %tmm0") is None
    assert core.do("tilestored %tmm0, (%rax,%rcx,1)", sums.data_ptr(), 4) is None
    assert sums.item() == expected


def test_refusals(core: Core) -> None:
    good = {0: (16, 64), 1: (16, 64), 2: (16, 64)}
    buffer = torch.zeros(16, 64, dtype=torch.uint8)
    for text in core.codes:
        if text not in ("tilerelease", "ldtilecfg (%rax)"):
            assert core.do(text, buffer.data_ptr(), 64) == "#UD: this thread has not configured tiles", text
    assert core.configure(good, at0=2) == "#GP: palette 2"
    for at in (2, 15, 32, 47, 56, 63):
        assert core.configure(good, **{f"at{at}": 9}) == f"#GP: the reserved byte {at} is 9"
    for shape in ((17, 64), (16, 65), (0, 64), (16, 0)):
        assert core.configure(good | {5: shape}) == f"#GP: tile 5 has {shape[0]} rows of {shape[1]} bytes"
    assert core.trap.state.palette == 0, "what was refused has changed nothing"
    assert core.configure(good) is None
    assert core.do("tilezero %tmm3") == "#UD: tile 3 is not configured"
    for name in PRODUCTS:  # the assembler makes no such thing
        same = bytearray(core.codes[f"{name} %tmm2, %tmm1, %tmm0"])
        same[4] &= 0xF8
        assert core.trap.step(bytes(same), [0] * 17) == "#UD: the tiles 0, 0 and 2 must differ"
    for wrong in ({0: (15, 64)}, {0: (16, 60)}, {1: (15, 64)}, {1: (16, 60)}, {2: (15, 64)}, {2: (16, 60)}):
        assert core.configure(good | wrong) is None
        for name in PRODUCTS:
            assert "times" in (core.do(f"{name} %tmm2, %tmm1, %tmm0") or ""), wrong
    assert core.configure({0: (16, 62)}) is None
    for text in ("tileloadd (%rax,%rcx,1), %tmm0", "tilestored %tmm0, (%rax,%rcx,1)"):
        assert core.do(text, buffer.data_ptr(), 64) == "#UD: tile 0 has rows of 62 bytes"
    assert core.configure({0: (4, 64)}, at1=4) is None
    assert core.do("tileloadd (%rax,%rcx,1), %tmm0", buffer.data_ptr(), 64) == "#UD: start_row is 4, tile 0 has 4 rows"
    assert core.configure({0: (4, 64)}, at1=3) is None and core.do("tilezero %tmm0") is None
    assert core.trap.state.start_row == 0
    core.do("tilerelease")
    assert core.do("tilezero %tmm0") == "#UD: this thread has not configured tiles"
    assert core.configure(good, at0=0) is None and core.trap.state.palette == 0, "palette 0 releases"


@pytest.mark.skipif("amx" in backend.available(), reason="this processor has AMX: nothing is refused")
@pytest.mark.parametrize(
    ("line", "permitted", "said"),
    [
        ("tilezero %tmm0", False, "tilezero at .*one.so.*: #NM: the system was not asked for tiles"),
        ("tilezero %tmm0", True, "tilezero at .*: #UD: this thread has not configured tiles; bytes c4 e2 7b 49 c0"),
        ("tdpbssd %tmm1, %tmm2, %tmm3", True, "an instruction at .*: no tile instruction that is known here"),
        ("ud2", True, "an instruction at .*: no tile instruction; bytes 0f 0b"),
    ],
)
def test_what_is_refused_ends_the_process(built: Path, tmp_path: Path, line: str, permitted: bool, said: str) -> None:
    source = tmp_path / "one.s"
    source.write_text(f".globl one\none:\n {line}\n ret\n.section .note.GNU-stack\n")
    subprocess.run(["cc", "-shared", "-o", str(tmp_path / "one.so"), str(source)], check=True)
    script = f"trap.lib.trap_install(0, 0, 1, {int(permitted)}); ctypes.CDLL(sys.argv[1]).one(); print('came back')"
    done = run_script(script, built, str(tmp_path / "one.so"))
    assert done.returncode == -6 and "came back" not in done.stdout
    assert re.search("amx_trap: " + said, done.stderr), done.stderr
