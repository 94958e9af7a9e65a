"""Short convolutions of several sequences at once against torch's own, sequence by sequence; and the memory they take."""

from __future__ import annotations

import pytest
import torch

from kernels.conv import short_conv
from kernels.layout import CONV_ROWS, conv_nbytes
from kernels.ops import PagedBatch
from kernels.states import StateCache


def batch_of(sequences: list[tuple[int, int]], places: torch.Tensor | None) -> PagedBatch:
    """Of (tokens before, tokens now) of each sequence."""
    rows, ends = [now for _, now in sequences], [before + now for before, now in sequences]
    nothing, starts = torch.zeros(0, dtype=torch.int64), torch.tensor([0, *rows]).cumsum(0).int()
    return PagedBatch(nothing, nothing, starts, torch.tensor(ends).int(), nothing, max(rows), max(ends), states=places)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [2, 3, 7])
@pytest.mark.parametrize(
    "sequences",
    [
        [(0, 1)],
        [(4, 1)],
        [(1, 1), (0, 1), (9, 1)],
        [(0, 2), (5, 1), (3, CONV_ROWS), (0, 1), (0, CONV_ROWS + 1), (2, 2 * CONV_ROWS + 3), (8, 1)],
        [(1 if i % 3 else 0, 1) for i in range(CONV_ROWS + 2)],
    ],
    ids=["first", "next", "decode", "mixed", "many"],
)
def test_each_sequence_by_itself(sequences: list[tuple[int, int]], kernel: int, dtype: torch.dtype) -> None:
    channels, count = 13, len(sequences) + 2
    places, weight = torch.randperm(count)[:-2].int(), torch.randn(kernel, channels)
    cache = StateCache(torch.full((count, kernel - 1, channels), float("nan")), torch.empty(count, 0))
    before = {place: torch.randn(kernel - 1, channels) for place, (old, _) in zip(places.tolist(), sequences, strict=True) if old}
    for place, kept in before.items():
        cache.conv[place] = kept
    x = torch.randn(sum(now for _, now in sequences), 3 * channels + 5).to(dtype)[:, 2:-3]
    found, row = short_conv(x, weight, cache, batch_of(sequences, places)), 0
    assert found.shape == (len(x), channels) and found.dtype == dtype
    for place, (_, now) in zip(places.tolist(), sequences, strict=True):
        b, c, value = x[row : row + now].float().chunk(3, dim=1)
        seen = torch.cat((before.get(place, torch.zeros(kernel - 1, channels)), b * value))
        expected = c * torch.nn.functional.conv1d(seen.t()[None], weight.t()[:, None].contiguous(), groups=channels)[0].t()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found[row : row + now].float(), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(cache.conv[place], seen[now:])
        row += now
    assert all(cache.conv[place].isnan().all() for place in set(range(count)) - set(places.tolist())), "others are left alone"


def test_no_tokens() -> None:
    empty = torch.zeros(0, dtype=torch.int32)
    batch = PagedBatch(empty, empty, torch.zeros(1, dtype=torch.int32), empty, empty, 0, 0, states=empty)
    assert short_conv(
        torch.zeros(0, 12), torch.zeros(3, 4), StateCache(torch.zeros(2, 2, 4), torch.zeros(2, 0)), batch
    ).shape == (0, 4)


def test_a_batch_that_does_not_say_where_states_are() -> None:
    with pytest.raises(ValueError, match="does not say where the states"):
        short_conv(
            torch.zeros(1, 3), torch.zeros(3, 1), StateCache(torch.zeros(1, 2, 1), torch.zeros(1, 0)), batch_of([(0, 1)], None)
        )


@pytest.mark.parametrize("sequences", [[(0, 3 * CONV_ROWS)], [(5, 1)] * 3 * CONV_ROWS], ids=["prompt", "decode"])
def test_memory(sequences: list[tuple[int, int]]) -> None:
    """At most what the plan counts, and not much less, beside the result; with single tokens also what their places hold."""
    channels, kernel = 512, 3
    cache = StateCache(torch.zeros(len(sequences), kernel - 1, channels), torch.zeros(len(sequences), 0))
    x = torch.randn(3 * CONV_ROWS, 3 * channels).bfloat16()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        short_conv(x, torch.randn(kernel, channels), cache, batch_of(sequences, torch.arange(len(sequences)).int()))
    alive = most = 0
    for event in trace.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    bound = conv_nbytes(channels, kernel)
    assert bound / 2 < most - len(x) * channels * 2 <= bound, (most - len(x) * channels * 2, bound)
