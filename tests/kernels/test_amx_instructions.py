"""The AMX kernels as they were compiled, on a processor without AMX: a trap does each tile instruction that it refuses.

Whether the trap is right is the matter of tests/amx_trap/test_trap.py.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch

from kernels.cpu import backend
from tests.amx_trap import library
from tests.amx_trap.library import AMX_LEAF7, AMX_XCR0, KINDS, run, run_script
from tests.kernels.native import native_ops
from tests.kernels.weights import random_weight

reason = library.missing_for_extension()
trapped = pytest.mark.skipif(reason is not None, reason=reason or "")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = library.prepare(tmp_path_factory.mktemp("trap"))
    if not library.load(found).tiles:
        pytest.skip("the compiler that built the extension does not know AMX")
    return found


@trapped
def test_the_extension_has_only_instructions_that_the_trap_knows(built: Path) -> None:
    code = library.load(built)
    assert set(code.tiles) == set(KINDS)
    assert code.asks and len(code.slots) == 1


@trapped
@pytest.mark.parametrize(
    ("options", "chosen", "tried"),
    [
        ({}, True, True),
        *(({"leaf7": AMX_LEAF7 & ~(1 << bit)}, False, False) for bit in (22, 24, 25)),
        *(({"xcr0": AMX_XCR0 & ~(1 << bit)}, False, False) for bit in (17, 18)),
        ({"permits": False}, False, False),
        ({"broken": "tdpbsud"}, False, True),
        ({"broken": "tdpbf16ps"}, False, True),
    ],
    ids=str,
)
def test_when_tiles_are_chosen(built: Path, options: dict[str, object], chosen: bool, tried: bool) -> None:
    """Where processor and system have them, and their products are right."""
    script = f"trap.take_over(load(library), **{options!r})\nprint(json.dumps([backend.available(), trap.counts()]))"
    done = run_script(script, built)
    assert done.returncode == 0, done.stderr
    available, counts = json.loads(done.stdout)
    assert available[:2] == ["amx", "avx512_bf16"] if chosen else available[0] == "avx512_bf16"
    assert (counts["tdpbsud"] > 0) == tried and counts["configured"] == 0


@pytest.mark.skipif("amx" not in backend.available(), reason="for processors with AMX, and for what test_the_kernels starts")
def test_tiles_are_plain_loops() -> None:
    """Integers bit by bit, bfloat16 but for the order of sums; odd shapes, three threads."""
    rng = random.Random(0)
    both = [native_ops(isa, 3) for isa in ("amx", "amx_emulated")]
    for case in range(12):
        group, bits, gated = rng.choice([32, 64, 96, 128, 256]), rng.choice([4, 8]), rng.random() < 0.5
        N, K, rows = 2 * rng.randint(1, 70), rng.randint(group, 520), rng.choice([8, 15, 16, 17, 31, 32, 33, 48, 63])
        options = {"asymmetric": rng.random() < 0.5, "act_order": rng.random() < 0.3, "seed": case}
        weight = random_weight(N, K, bits=bits, group_size=group, **options)  # type: ignore[arg-type]
        x, bias = torch.randn(rows, K).bfloat16(), torch.randn(N)
        for activation in ("int8", "bf16"):
            packed = [ops.pack(weight, dtype=x.dtype, bias=bias, gated=gated, activation=activation) for ops in both]
            found, expected = (ops.matmul(x, one).float() for ops, one in zip(both, packed, strict=True))
            limit = 0.0 if activation == "int8" else 2**-7 * float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=0, atol=limit, msg=lambda m, c=case: f"{c}: {m}")


@trapped
@pytest.mark.timeout(600)  # ten seconds on a core of its own
def test_the_kernels(built: Path) -> None:
    """Their own tests, on what the compiler made of the tile code: all of it is reached."""
    options = ("-q", "-p", "tests.amx_trap.plugin", "-p", "no:cacheprovider", "-p", "no:xdist")
    files = ("tests/kernels/test_native_products.py", "tests/kernels/test_mixture.py", "tests/models/test_bind.py", __file__)
    chosen = "(amx and not emulated and not instructions) or any_number_of_threads or plain_loops"
    done = run(["-m", "pytest", *options, *files, "-k", chosen], built, seconds=580)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"^(\d+) passed", done.stdout.splitlines()[-1])
    assert passed is not None and int(passed[1]) >= 60 and "skipped" not in done.stdout, done.stdout
    counts = json.loads(done.stdout.split("tile instructions: ")[1].splitlines()[0])
    assert counts["unvisited"] == [] and all(counts[kind] > 0 for kind in KINDS)
    assert counts["threads"] > 16 and counts["configured"] == 0, counts
    assert counts["ldtilecfg"] == counts["tilerelease"], "tiles that are not released cost the system time"
