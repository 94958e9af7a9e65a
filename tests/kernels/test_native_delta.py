"""The native kernel of the gated delta rule against the reference, under every instruction set that runs here."""

from __future__ import annotations

import pytest
import torch

from kernels import delta as plain
from kernels.cpu import backend
from kernels.cpu.native_ops import NativeOps
from kernels.ops import PagedBatch
from tests.kernels.native import instruction_sets, native_ops
from tests.kernels.states import SHAPES, copied, make

if backend.native() is None:
    pytest.skip("the native extension is not built", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}
STEPS = [  # (tokens before, tokens of this step) of each sequence
    [(0, 1)], [(7, 1)], [(0, 3), (2, 1), (0, 1)], [(9, 1), (1, 1), (4, 2), (0, 40), (33, 70)], [(3, 0), (5, 2)],
]  # fmt: skip


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_kernels_compute_the_same(isa: str, shape: tuple[int, ...]) -> None:
    ops: NativeOps = native_ops(isa)
    for sequences in STEPS:
        for dtype in DTYPES:
            x, gates, rule, cache, batch = make(shape, sequences, dtype)
            theirs = copied(cache)
            expected = plain.delta(x.float(), gates.float(), rule, theirs, batch)
            found = ops.delta(x, gates, rule, cache, batch)
            assert found.dtype == dtype and found.shape == expected.shape
            torch.testing.assert_close(found.float(), expected, rtol=EPS[dtype], atol=EPS[dtype])
            assert torch.equal(cache.conv.nan_to_num(7.0), theirs.conv.nan_to_num(7.0))
            torch.testing.assert_close(cache.state, theirs.state, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("alike", [False, True])
def test_any_number_of_tokens(isa: str, alike: bool) -> None:
    """Whole pieces and what is left over, where all keys are alike, too, and hardly anything is forgotten."""
    ops = native_ops(isa)
    for count in range(1, 36):
        x, gates, rule, cache, batch = make((1, 2, 20, 50, 2), [(count % 2, count)], torch.float32)
        if alike:
            x, gates = x.clone(), gates.clone()
            x[:, :40] = torch.rand(40)
            gates[:, :2], gates[:, 2:] = 8, -8
        theirs = copied(cache)
        expected = plain.delta(x, gates, rule, theirs, batch)
        torch.testing.assert_close(ops.delta(x, gates, rule, cache, batch), expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(cache.state, theirs.state, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("isa", instruction_sets())
def test_cuts_move_last_bits_and_company_none(isa: str) -> None:
    """A prompt at once, in odd pieces beside others, and by another number of threads. Cuts where pieces end move no bit."""
    ops, length = native_ops(isa), 75
    x, gates, rule, cache, batch = make((2, 4, 48, 36, 4), [(0, length)], torch.bfloat16)
    whole = copied(cache)
    expected = ops.delta(x, gates, rule, whole, batch)
    assert torch.equal(native_ops(isa, 1).delta(x, gates, rule, copied(cache), batch), expected)
    for pieces in ([1] * 5 + [33, 37], [32, 32, 11], [16, 59], [length - 1, 1], [1] * length):
        mine, lone, found, start = copied(cache), copied(cache), [], 0
        for count in pieces:
            others, other_gates, _, _, _ = make((2, 4, 48, 36, 4), [(0, 3), (0, 1)], torch.bfloat16)
            step = PagedBatch(
                batch.positions,
                batch.slots,
                torch.tensor([0, 3, 3 + count, 4 + count]).int(),
                torch.tensor([3, start + count, 1]).int(),
                batch.block_tables,
                count,
                start + count,
                states=torch.tensor([(int(batch.states[0]) + i) % 3 for i in (1, 0, 2)]).int(),  # type: ignore[index]
            )
            rows = torch.cat((others[:3], x[start : start + count], others[3:]))
            opened = torch.cat((other_gates[:3], gates[start : start + count], other_gates[3:]))
            found.append(ops.delta(rows, opened, rule, mine, step)[3:-1])
            by_itself = ops.delta(x[start : start + count], gates[start : start + count], rule, lone, only(step, 1))
            assert torch.equal(found[-1], by_itself)
            start += count
        place = int(batch.states[0])  # type: ignore[index]
        assert torch.equal(mine.state[place], lone.state[place]) and torch.equal(mine.conv[place], whole.conv[place])
        same = all(count % 16 == 0 for count in pieces[:-1])
        eps = 0.0 if same else 2e-5
        torch.testing.assert_close(mine.state[place], whole.state[place], rtol=eps, atol=eps)
        eps = 0.0 if same else EPS[torch.bfloat16]
        torch.testing.assert_close(torch.cat(found), expected, rtol=eps, atol=eps)


def test_extremes_are_those_of_the_reference() -> None:
    """Gates that are wide open or shut, states forgotten at once, rows of zeros; a NaN stays in its head and sequence."""
    ops = native_ops(instruction_sets()[0])
    x, gates, rule, cache, batch = make((1, 2, 16, 32, 4), [(0, 6), (0, 6)], torch.float32)
    x, gates = x.contiguous(), gates.contiguous()
    x[1] = gates[1] = 0
    gates[2] = torch.tensor([80.0, -80, 200, -200])
    gates[3] = torch.tensor([-1e4, 1e4, -1e4, 1e4])
    expected = plain.delta(x, gates, rule, copied(cache), batch)
    torch.testing.assert_close(ops.delta(x, gates, rule, copied(cache), batch), expected, rtol=2e-5, atol=2e-5)
    x[0, 64] = float("nan")  # a value of the second head of the first sequence
    found = ops.delta(x, gates, rule, cache, batch)
    alone = ops.delta(x[6:], gates[6:], rule, copied(cache), only(batch, 1))
    assert found[0, 32:].isnan().all() and torch.equal(found[6:], alone)
    torch.testing.assert_close(found[:, :32], expected[:, :32], rtol=2e-5, atol=2e-5)
    x[9, 64] = float("nan")  # of a later token of the other: what comes before knows nothing of it
    later = ops.delta(x[6:], gates[6:], rule, copied(cache), only(batch, 1))
    assert later[3:, 32:].isnan().all() and torch.equal(later[:3], alone[:3])


def only(batch: PagedBatch, number: int) -> PagedBatch:
    """One sequence of a batch, whose rows are there alone."""
    assert batch.states is not None
    starts, one = batch.query_starts[number : number + 2], slice(number, number + 1)
    return PagedBatch(
        batch.positions, batch.slots, starts - starts[0], batch.seq_lens[one], batch.block_tables, 0, 0, states=batch.states[one]
    )
