"""The gated delta rule: the reference against transformers' functions, native kernels against the reference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels import delta as plain
from kernels.cpu import backend
from kernels.cpu.native_ops import NativeOps
from kernels.layout import DELTA_OPS, DELTA_ROWS, delta_nbytes
from kernels.ops import PagedBatch, get_ops
from kernels.states import DeltaRule, StateCache
from tests.kernels.native import instruction_sets, native_ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}
native = pytest.mark.skipif(backend.native() is None, reason="the native extension is not built")
SHAPES = [  # key heads, value heads, key_dim, value_dim, kernel
    (1, 1, 16, 16, 4), (2, 6, 48, 20, 4), (2, 2, 128, 128, 4), (1, 3, 5, 130, 2), (3, 6, 12, 64, 5), (2, 4, 33, 1, 3),
]  # fmt: skip
STEPS = [  # (tokens before, tokens of this step) of each sequence
    [(0, 1)], [(7, 1)], [(0, 3), (2, 1), (0, 1)], [(9, 1), (1, 1), (4, 2), (0, 40), (33, 70)], [(3, 0), (5, 2)],
]  # fmt: skip


def make(
    shape: Sequence[int], sequences: Sequence[tuple[int, int]], dtype: torch.dtype
) -> tuple[Tensor, DeltaRule, StateCache, PagedBatch]:
    """Random inputs: rows of a wider tensor. Places that hold nothing of a sequence's past are NaN."""
    key_heads, value_heads, key_dim, value_dim, kernel = shape
    values = value_heads * value_dim
    channels = 2 * key_heads * key_dim + values
    rule = DeltaRule(
        key_heads,
        torch.randn(kernel, channels) / 2,
        torch.exp(torch.randn(value_heads) * 2 - 2),
        torch.randn(value_heads) * 3,
        1 + torch.randn(value_dim) / 4,
        1e-6,
    )
    places, count = torch.randperm(len(sequences) + 2)[: len(sequences)].int(), len(sequences) + 2
    cache = StateCache(
        torch.full((count, kernel - 1, channels), float("nan")),
        torch.full((count, value_heads, key_dim, value_dim), float("nan")),
    )
    for place, (before, _) in zip(places.tolist(), sequences, strict=True):
        if before:
            cache.conv[place], cache.state[place] = torch.randn_like(cache.conv[0]), torch.randn_like(cache.state[0])
    rows, ends = [now for _, now in sequences], [before + now for before, now in sequences]
    starts = torch.tensor([0, *rows]).cumsum(0).int()
    x = torch.randn(sum(rows), channels + values + 2 * value_heads + 9).to(dtype)[:, 4:-5]
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = PagedBatch(nothing, nothing, starts, torch.tensor(ends).int(), nothing, max(rows), max(ends), states=places)
    return x, rule, cache, batch


def copied(cache: StateCache) -> StateCache:
    return StateCache(*(one.clone() for one in cache))


def their_rule() -> object:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_what_transformers_computes(shape: tuple[int, ...]) -> None:
    """In chunks there, token by token here; by way of a convolution over the whole there."""
    (x, rule, cache, batch), heads = make(shape, [(6, 150)], torch.float32), shape[1]
    place = int(batch.states[0])  # type: ignore[index]
    state, kept = cache.state[place].clone(), cache.conv[place].clone()
    keys, values = rule.key_heads * rule.key_dim, heads * rule.value_dim
    mixed, z, b, a = x.split([2 * keys + values, values, heads, heads], dim=1)
    whole = torch.cat((kept, mixed)).t().unsqueeze(0)
    mixed = torch.nn.functional.silu(
        torch.nn.functional.conv1d(whole, rule.conv.t().unsqueeze(1).contiguous(), groups=whole.shape[1])
    )
    q, k, v = (
        part.unflatten(-1, (count, -1)).contiguous()
        for part, count in zip(
            mixed.transpose(1, 2).split([keys, keys, values], dim=-1), (rule.key_heads, rule.key_heads, heads), strict=True
        )
    )
    g = -rule.rate * torch.nn.functional.softplus(a + rule.dt_bias)
    out, last = their_rule()(  # type: ignore[operator]
        q,
        k,
        v,
        g=g[None],
        beta=b.sigmoid()[None],
        initial_state=state[None],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    normed = torch.nn.functional.rms_norm(out[0], (rule.value_dim,), rule.norm, rule.eps)
    expected = normed.flatten(1) * torch.nn.functional.silu(z)
    found = plain.delta(x, rule, cache, batch)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(cache.state[place], last[0], rtol=2e-4, atol=2e-4)
    assert torch.equal(cache.conv[place], torch.cat((kept, x[:, : kept.shape[1]]))[-len(kept) :])


@native
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_kernels_compute_the_same(isa: str, shape: tuple[int, ...]) -> None:
    ops: NativeOps = native_ops(isa)
    for sequences in STEPS:
        for dtype in DTYPES:
            x, rule, cache, batch = make(shape, sequences, dtype)
            theirs = copied(cache)
            expected = plain.delta(x.float(), rule, theirs, batch)
            found = ops.delta(x, rule, cache, batch)
            assert found.dtype == dtype and found.shape == expected.shape
            torch.testing.assert_close(found.float(), expected, rtol=EPS[dtype], atol=EPS[dtype])
            assert torch.equal(cache.conv.nan_to_num(7.0), theirs.conv.nan_to_num(7.0))
            torch.testing.assert_close(cache.state, theirs.state, rtol=2e-5, atol=2e-5, equal_nan=True)


@native
@pytest.mark.parametrize("isa", instruction_sets())
def test_pieces_and_company_change_no_bit(isa: str) -> None:
    """A prompt at once, in odd pieces beside others, and by another number of threads."""
    ops, length = native_ops(isa), 75
    x, rule, cache, batch = make((2, 4, 48, 36, 4), [(0, length)], torch.bfloat16)
    whole = copied(cache)
    expected = ops.delta(x, rule, whole, batch)
    assert torch.equal(native_ops(isa, 1).delta(x, rule, copied(cache), batch), expected)
    for pieces in ([1] * 5 + [33, 37], [32, 32, 11], [length - 1, 1]):
        mine, found, start = copied(cache), [], 0
        for count in pieces:
            others, _, _, _ = make((2, 4, 48, 36, 4), [(0, 3), (0, 1)], torch.bfloat16)
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
            found.append(ops.delta(rows, rule, mine, step)[3:-1])
            start += count
        place = int(batch.states[0])  # type: ignore[index]
        assert torch.equal(torch.cat(found), expected)
        assert torch.equal(mine.state[place], whole.state[place]) and torch.equal(mine.conv[place], whole.conv[place])


@native
def test_extremes_are_those_of_the_reference() -> None:
    """Gates that are wide open or shut, states forgotten at once, rows of zeros; a NaN stays in its head and sequence."""
    ops = native_ops(instruction_sets()[0])
    x, rule, cache, batch = make((1, 2, 16, 32, 4), [(0, 6), (0, 6)], torch.float32)
    x = x.contiguous()
    x[1] = 0
    x[2, -4:] = torch.tensor([80.0, -80, 200, -200])
    x[3, -4:] = torch.tensor([-1e4, 1e4, -1e4, 1e4])
    expected = plain.delta(x, rule, copied(cache), batch)
    torch.testing.assert_close(ops.delta(x, rule, copied(cache), batch), expected, rtol=2e-5, atol=2e-5)
    x[0, 64] = float("nan")  # a value of the second head of the first sequence
    found = ops.delta(x, rule, cache, batch)
    assert found[0, 32:].isnan().all() and torch.equal(found[6:], ops.delta(x[6:], rule, copied(cache), only(batch, 1)))
    torch.testing.assert_close(found[:, :32], expected[:, :32], rtol=2e-5, atol=2e-5)


def only(batch: PagedBatch, number: int) -> PagedBatch:
    """One sequence of a batch, whose rows are there alone."""
    assert batch.states is not None
    starts, one = batch.query_starts[number : number + 2], slice(number, number + 1)
    return PagedBatch(
        batch.positions, batch.slots, starts - starts[0], batch.seq_lens[one], batch.block_tables, 0, 0, states=batch.states[one]
    )


def test_who_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in ("auto", "torch"):
        monkeypatch.setenv("APPLIANCE_CPU_ISA", isa)
        for reference in (True, False):
            ops = get_ops("cpu", reference=reference)
            assert (ops.delta is not None) == (ops.name in DELTA_OPS)


def test_a_batch_that_does_not_say_where_states_are() -> None:
    x, rule, cache, batch = make(SHAPES[0], [(0, 2)], torch.float32)
    lost = PagedBatch(*(getattr(batch, name) for name in list(batch.__dataclass_fields__)[:7]))
    for name in ("auto", "torch"):
        ops = native_ops(instruction_sets()[0]) if name == "auto" and backend.native() is not None else None
        with pytest.raises(ValueError, match="does not say where the states"):
            (ops.delta if ops else plain.delta)(x, rule, cache, lost)


@pytest.mark.parametrize("shape", [(2, 6, 48, 20, 4), (4, 4, 16, 64, 4)], ids=str)
def test_memory_of_torchs_operators(shape: tuple[int, ...]) -> None:
    """At most what the plan counts, and not much less: tensors that are alive at once, in pieces of a long prompt."""
    x, rule, cache, batch = make(shape, [(0, 3 * DELTA_ROWS)], torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        plain.delta(x, rule, cache, batch)
    alive = most = 0
    for event in trace.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    _, value_heads, key_dim, value_dim, _ = shape
    result = len(x) * value_heads * value_dim * 2
    bound = delta_nbytes(ops="cpu", channels=rule.conv.shape[1], value_heads=value_heads, key_dim=key_dim, value_dim=value_dim)
    assert bound / 2 < most - result <= bound, (most - result, bound)
