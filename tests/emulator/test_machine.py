"""The emulator itself, on kernels written by hand."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.emulator import warp
from tests.emulator.arithmetic import meaning
from tests.emulator.instructions import build
from tests.emulator.machine import Blocks, EmulatorError, Ranges
from tests.emulator.numbers import decode, encode
from tests.emulator.program import parse

HEAD = """
.version 8.4
.target sm_80
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 x, .param .u64 .ptr .global .align 1 y, .param .u32 n)
{
    .reg .pred %p<9>;
    .reg .b32 %r<20>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [x];
    ld.param.b64 %rd2, [y];
    ld.param.b32 %r1, [n];
    mov.u32 %r2, %tid.x;
    mul.wide.u32 %rd3, %r2, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
"""


def run(body: str, x: np.ndarray, n: int = 0) -> np.ndarray:
    """y of a kernel of 64 threads; x and y int32 [64]."""
    program = parse(HEAD + body + "ret;\n}\n")
    y = np.full(64, -1, dtype=np.int32)
    values = {"x": x.ctypes.data, "y": y.ctypes.data, "n": n}
    ranges = Ranges([(a.ctypes.data, a.ctypes.data + a.nbytes) for a in (x, y)])
    options = {"threads": 64, "places": [(0, 0, 0)], "grid": (1, 1, 1), "shared": 1024, "ranges": ranges}
    Blocks(program, build(program), values, **options).run()  # type: ignore[arg-type]
    return y


def numbers() -> np.ndarray:
    return np.array([random.randrange(-(2**31), 2**31) for _ in range(64)], dtype=np.int32)


def test_threads_part_and_meet_again() -> None:
    """Each goes round a loop as often as its number says; a shuffle behind it needs them all."""
    body = """
        ld.global.b32 %r3, [%rd4];
        mov.b32 %r4, 0;
    $again:
        setp.ge.s32 %p1, %r4, %r3;
        @%p1 bra $out;
        add.s32 %r4, %r4, 1;
        bra.uni $again;
    $out:
        bar.sync 0;
        shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1;
        st.global.b32 [%rd5], %r5;
    """
    x = np.array([random.randrange(9) for _ in range(64)], dtype=np.int32)
    assert (run(body, x) == x.reshape(-1, 2)[:, ::-1].reshape(-1)).all()


def test_guards_and_early_ends() -> None:
    body = """
        setp.ge.u32 %p1, %r2, %r1;
        @%p1 ret;
        ld.global.b32 %r3, [%rd4];
        setp.lt.s32 %p2, %r3, 0;
        @%p2 neg.s32 %r3, %r3;
        @!%p2 add.s32 %r3, %r3, 1;
        st.global.b32 [%rd5], %r3;
    """
    x = np.arange(-32, 32, dtype=np.int32)
    expected = np.where(np.arange(64) < 40, np.where(x < 0, -x, x + 1), -1)
    assert (run(body, x, 40) == expected).all()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ld.global.b32 %r3, [%rd4+4];", "leave the kernel's tensors"),
        ("st.global.b32 [%rd5+-4], %r3;", "leave the kernel's tensors"),
        ("add.s64 %rd6, %rd1, 2; ld.global.b32 %r3, [%rd6];", "not multiples of 4"),
        ("ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd4];", "not multiples of 16"),
        ("mov.b32 %r4, 2048; ld.shared.b32 %r3, [%r4];", "outside of shared memory"),
        ("setp.eq.s32 %p1, %r2, 5; @%p1 bra $on; shfl.sync.bfly.b32 %r5, %r2, 1, 31, -1; $on:", "not by whole warps"),
    ],
)
def test_what_a_card_would_not_do(line: str, words: str) -> None:
    with pytest.raises(EmulatorError, match=words):
        run(line, numbers())


def test_copies_arrive_when_they_are_waited_for() -> None:
    body = """
        shl.b32 %r3, %r2, 2;
        mov.b32 %r4, global_smem;
        add.s32 %r4, %r4, %r3;
        cp.async.ca.shared.global [%r4], [%rd4], 0x4;
        cp.async.commit_group;
        {wait}
        ld.shared.b32 %r5, [%r4];
        st.global.b32 [%rd5], %r5;
    """
    x = numbers()
    assert (run(body.replace("{wait}", "cp.async.wait_group 0;"), x) == x).all()
    assert (run(body.replace("{wait}", "cp.async.wait_group 1;"), x) == -1).all(), "garbage until then"


@pytest.mark.parametrize(
    ("name", "compute"),
    [
        ("prmt.b32", lambda a, b, c: int.from_bytes([((b << 32 | a) >> 8 * (c >> 4 * i & 7)) & 255 for i in range(4)], "little")),
        ("popc.b32", lambda a, b, c: a.bit_count()),
        ("bfe.u32", lambda a, b, c: a >> min(b & 255, 32) & ((1 << (c & 31)) - 1)),
        ("shr.s32", lambda a, b, _: (a - (a >> 31 << 32)) >> min(b, 31) & 0xFFFFFFFF),
        ("mul.hi.u32", lambda a, b, _: a * b >> 32),
        ("div.s32", lambda a, b, _: int((a - (a >> 31 << 32)) / (b - (b >> 31 << 32))) & 0xFFFFFFFF),
    ],
)
def test_integers(name: str, compute: Callable[[int, int, int], int]) -> None:
    known = meaning(name.split("."))
    for _ in range(300):
        a, b, c = (random.randrange(2**32) for _ in range(3))
        if name == "prmt.b32":
            c &= 0x7777
        elif name in ("bfe.u32", "shr.s32"):
            b, c = random.randrange(32), random.randrange(32)
        given = [np.array([one], dtype="u4") for one in (a, b, c)][: len(known.inputs)]
        found = encode(known.compute(*(decode(raw, kind) for raw, kind in zip(given, known.inputs, strict=True))), known.output)
        assert int(found[0]) == compute(a, b, c), (name, a, b, c)


def test_every_function_of_three_bits() -> None:
    a, b, c = (np.array([one, ~one & 0xFFFFFFFF], dtype="u4") for one in (0xF0F00FF0, 0xCCCC3C3C, 0xAAAAAA55))
    for table in range(256):
        found = meaning(("lop3", "b32"), 3, table).compute(a, b, c)
        for at in range(32):
            i, j, k = (one >> np.uint32(at) & np.uint32(1) for one in (a, b, c))
            assert ((found >> np.uint32(at) & np.uint32(1)) == (table >> (4 * i + 2 * j + k).astype(int) & 1)).all(), table


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16), ("f32", torch.float32)])
def test_floats_are_rounded_once(kind: str, dtype: torch.dtype) -> None:
    wide = torch.randn(2000, dtype=torch.float64) * 10.0 ** torch.randint(-9, 9, (2000,))
    expected = wide.float().to(dtype) if kind == "bf16" else wide.to(dtype)
    with np.errstate(over="ignore"):
        found = encode(wide.numpy(), kind)
    signed = torch.from_numpy(found.view(f"i{found.itemsize}").copy()).view(dtype)
    assert torch.equal(signed, expected)
    assert np.array_equal(decode(found, kind), expected.double().numpy())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
def test_every_number_of_a_descriptor_has_a_place_of_its_own(swizzle: int, transposed: bool) -> None:
    span = {1: 128, 2: 64, 3: 32, 0: 16}[swizzle]
    outer, depth = (64, 16) if transposed else (64, max(16, span // 2))
    rows, along = (depth, outer) if transposed else (outer, depth)
    leading = rows // 8 * 8 * span  # atoms side by side, each as high as the matrix
    descriptor = swizzle << 62 | (8 * span >> 4) << 32 | (leading >> 4) << 16 | 4096 >> 4
    places = warp.descriptor_places(descriptor, outer, depth, 2, transposed)
    assert len(np.unique(places)) == places.size and places.min() == 4096
    assert places.max() == 4096 + 2 * rows * along - 2
