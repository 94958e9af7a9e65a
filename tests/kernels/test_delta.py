"""The gated delta rule in plain torch against transformers' functions, and the memory it takes."""

from __future__ import annotations

import pytest
import torch

from kernels import delta as plain
from kernels.cpu import backend
from kernels.layout import DELTA_ROWS, delta_nbytes
from kernels.ops import PagedBatch
from tests.kernels.native import instruction_sets, native_ops
from tests.kernels.states import SHAPES, make


def their_rule() -> object:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_what_transformers_computes(shape: tuple[int, ...]) -> None:
    """In chunks there, token by token here; by way of a convolution over the whole there."""
    (x, gates, rule, cache, batch), heads = make(shape, [(6, 150)], torch.float32), shape[1]
    place = int(batch.states[0])  # type: ignore[index]
    state, kept = cache.state[place].clone(), cache.conv[place].clone()
    keys, values = rule.key_heads * rule.key_dim, heads * rule.value_dim
    (mixed, z), (b, a) = x.split([2 * keys + values, values], dim=1), gates.chunk(2, dim=1)
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
    found = plain.delta(x, gates, rule, cache, batch)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(cache.state[place], last[0], rtol=2e-4, atol=2e-4)
    assert torch.equal(cache.conv[place], torch.cat((kept, x[:, : kept.shape[1]]))[-len(kept) :])


def test_a_batch_that_does_not_say_where_states_are() -> None:
    x, gates, rule, cache, batch = make(SHAPES[0], [(0, 2)], torch.float32)
    lost = PagedBatch(*(getattr(batch, name) for name in list(batch.__dataclass_fields__)[:7]))
    for name in ("auto", "torch"):
        ops = native_ops(instruction_sets()[0]) if name == "auto" and backend.native() is not None else None
        with pytest.raises(ValueError, match="does not say where the states"):
            (ops.delta if ops else plain.delta)(x, gates, rule, cache, lost)


@pytest.mark.parametrize("shape", [(2, 6, 48, 20, 4), (4, 4, 16, 64, 4)], ids=str)
def test_memory_of_torchs_operators(shape: tuple[int, ...]) -> None:
    """At most what the plan counts, and not much less: tensors that are alive at once, in pieces of a long prompt."""
    x, gates, rule, cache, batch = make(shape, [(0, 3 * DELTA_ROWS)], torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        plain.delta(x, gates, rule, cache, batch)
    alive = most = 0
    for event in trace.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    _, value_heads, key_dim, value_dim, _ = shape
    result = len(x) * value_heads * value_dim * 2
    bound = delta_nbytes(ops="cpu", channels=rule.conv.shape[1], value_heads=value_heads, key_dim=key_dim, value_dim=value_dim)
    assert bound / 2 < most - result <= bound, (most - result, bound)
