"""From logits to tokens. Each row is worked on by itself, with the same operations whoever its neighbours are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from appliance.core.door import hash_u64
from appliance.core.messages import TokenLogprob, Unanswerable
from appliance.core.params import SamplingParams
from appliance.core.request import Request
from appliance.runtime.beam import Row
from appliance.runtime.penalties import adjust, touches_logits
from kernels import reference
from kernels.ops import ArgMax, KthLargest

_NEVER = np.float32("-inf")
NOT_FINITE = "the model produced logits that are not finite numbers"
_LIKELY = 512  # tokens in which a nucleus is looked for first
_AT_ONCE = 1 << 15  # logits of rows that are worked on together: of so few torch adds up each row as if it were alone
_BLOCK = 128  # probabilities summed together, so that a draw needs no cumulative sum over the whole vocabulary


@dataclass(frozen=True, slots=True)
class Sampled:
    """A drawn token, its log-probability where asked for, or why none could be drawn (the token is -1 then)."""

    token: int
    logprob: TokenLogprob | None = None
    error: str | None = None
    likely: Row | None = None  # of a beam: what is looked at; the token is the first of it

    @classmethod
    def of(cls, token: int) -> Sampled:
        """Of a token that was drawn on the device: -1 is none."""
        return cls(token, error=NOT_FINITE if token < 0 else None)


def sample(
    logits: Tensor,
    requests: Sequence[Request],
    *,
    argmax: ArgMax = reference.argmax,
    kth: KthLargest = reference.kth_largest,
) -> list[Sampled]:
    """Draw the next token of each request from its row of ``logits``, float32 [R, V], which is overwritten.

    Log-probabilities are those of the row, before penalties, masks of the request's and temperature (vLLM's ``raw_logprobs``);
    tokens that a grammar ruled out, whose logit is -inf, are not among the most likely. A random draw
    depends on the row, the request's seed and its number of tokens, and on nothing else. Among equal logits greedy takes the
    lowest id. Workspace: a few vectors of V, whatever R is. ``argmax`` and ``kth`` are the device's (see Ops).
    """
    easy = [_is_plain_greedy(r) for r in requests]
    found = argmax(logits) if any(easy) else (logits.amax(dim=-1),)  # the values alone are quicker to find
    best, picks = found[0].tolist(), found[-1].tolist()
    out = []
    for i, request in enumerate(requests):
        if math.isnan(best[i]) or best[i] == math.inf:
            out.append(Sampled(-1, error=NOT_FINITE))
        elif easy[i] and best[i] > -math.inf:
            out.append(Sampled(picks[i]))
        else:
            out.append(_sample_row(logits[i], request, kth))
    return out


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], top: int, *, kth: KthLargest = reference.kth_largest
) -> list[TokenLogprob]:
    """Log-probability and rank of ``token_ids[i]`` in row i of ``logits`` float32 [R, V], and its ``top`` most likely tokens.

    ``top`` -1 gives the whole vocabulary. Rank is 1 + the number of tokens with a larger logit. Equal tokens come by id. The host
    waits for the device twice, however many rows there are; workspace: as ``sample`` has it.
    """
    size = logits.shape[1]
    if top == -1 or min(top, size) > _LIKELY:
        return [_row_logprob(row, token, top, kth) for row, token in zip(logits.unbind(), token_ids, strict=True)]
    own = logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    count = min(top, size)
    more = min(count + 1, size)  # the one behind them says whether an equal one was left out
    at_once = max(1, _AT_ONCE // size)
    norms, larger, values, ids = [], [], [], []
    for part, mine in zip(logits.split(at_once), own.split(at_once), strict=True):
        norms.append(part.logsumexp(1, keepdim=True))
        larger.append((part > mine).sum(1, keepdim=True))
        best = part.topk(more, dim=1)
        values.append(best.values)
        ids.append(best.indices)
    norm, (found, order) = torch.cat(norms), _by_id(torch.cat(values), torch.cat(ids))
    doubtful = found[:, max(0, count - 1) : more - 1] == found[:, count:more]  # none where count is 0 or all of them
    told = torch.cat((own, found[:, :count]), 1).sub_(norm).tolist()
    whole = torch.cat((torch.cat(larger), (found[:, :count] > -math.inf).sum(1, keepdim=True), order[:, :count], doubtful), 1)
    out = []
    for i, (rank, likely, *rest) in enumerate(whole.tolist()):
        if any(rest[count:]):
            out.append(_row_logprob(logits[i], token_ids[i], top, kth))
        else:
            best_ones = tuple(zip(rest[:likely], told[i][1 : 1 + likely], strict=True))
            out.append(TokenLogprob(token_ids[i], told[i][0], 1 + rank, best_ones))
    return out


def _by_id(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Values [R, k] and their ids, the largest first, equal ones by id."""
    ids, order = ids.sort(dim=1)
    values, again = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, again)


def draws_on_device(request: Request) -> bool:
    """Whether the request's row of logits, as it is, and a few numbers (kernels.ops.Sample) are all that its next token needs."""
    return request.params.scored is None and not touches_logits(request)


def _is_plain_greedy(request: Request) -> bool:
    return request.params.greedy and draws_on_device(request)


def _sample_row(row: Tensor, request: Request, kth: KthLargest) -> Sampled:
    wanted = request.params.scored
    raw = row
    if touches_logits(request):
        raw = row.clone() if wanted is not None else row
        adjust(row, request)
    best = row.amax().item()
    if best == -math.inf:
        beside = "" if request.guide is None else ", beside its grammar"
        why = f"every token is ruled out (by allowed_token_ids, bad_words or min_tokens{beside})"
        return Sampled(-1, error=Unanswerable(why))
    if best == math.inf:
        why = f"repetition_penalty {request.params.repetition_penalty} makes a logit infinite: use one nearer to 1"
        return Sampled(-1, error=Unanswerable(why))
    if request.beam:
        likely = _beam_row(row, request.params, kth)
        return Sampled(int(likely.ids[0]), likely=likely)
    if request.params.greedy:
        token = int(row.argmax())
    elif request.guide is not None:
        token = _draw_left(row, best, request, kth)
    else:
        token = _draw(row, best, request, kth)
    return Sampled(token, None if wanted is None else _row_logprob(raw, token, wanted, kth))


def _draw(row: Tensor, best: float, request: Request, kth: KthLargest) -> int:
    """One draw from softmax(row / temperature), cut by top_k, min_p and top_p. ``best`` is the largest logit.

    The order of the cuts is vLLM's: min_p and top_k are thresholds (so they commute; ties at top_k's stay in), and top_p is a
    share of what they leave.
    """
    params, ids = request.params, None
    if 0 < params.top_k < row.numel():
        ids = (row >= kth(row, params.top_k)).nonzero().view(-1)
        row = row[ids]
    weights = ((row - best) / params.temperature).exp_()  # the largest is 1: min_p compares with it as it stands
    if params.min_p > 0:
        weights, ids = _keep((weights >= params.min_p).nonzero().view(-1), weights, ids)
    if params.top_p < 1:
        weights, ids = _nucleus(weights, ids, params.top_p, kth)
    pick = _inverse_cdf(weights, uniform(request.seed, len(request.tokens)))
    return pick if ids is None else int(ids[pick])


def _draw_left(row: Tensor, best: float, request: Request, kth: KthLargest) -> int:
    """The same among the tokens that a grammar has left: mostly few, often one alone, and exp takes a CPU long for -inf."""
    params = request.params
    if row.device.type != "cpu":  # a row of another length would take kernels of its own, which nobody has compiled
        return _draw(row, best, request, kth)
    if params.top_k > 0 or params.min_p > 0 or params.top_p < 1:
        left = (row > -math.inf).nonzero().view(-1)
        return int(left[_draw(row[left], best, request, kth)])
    values = row.numpy()  # for a few numbers calling torch takes several times as long
    found = (values > _NEVER).nonzero()[0]
    if len(found) == 1:
        return int(found[0])
    sums = np.exp((values[found] - np.float32(best)) / np.float32(params.temperature)).cumsum(dtype=np.float64)
    first = sums.searchsorted(uniform(request.seed, len(request.tokens)) * sums[-1], side="right")
    return int(found[min(first, sums.searchsorted(sums[-1]))])  # the last place where it grows, should rounding leave none


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) for the token at this position: 53 bits of a hash, so that it needs no state."""
    return (hash_u64(seed, position) >> 11) * 2.0**-53


def _keep(index: Tensor, weights: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    return weights[index], index if ids is None else ids[index]


def _nucleus(weights: Tensor, ids: Tensor | None, top_p: float, kth: KthLargest = reference.kth_largest) -> tuple[Tensor, Tensor]:
    """The fewest most likely tokens whose share reaches ``top_p`` (Holtzman et al. 2020), by id; equal ones enter by id.

    Mostly the few hundred most likely tokens reach it, and nothing else need be looked at. Otherwise: tokens under
    (1 - top_p) / n of the mass cannot reach the nucleus, as all of them together weigh less than what it leaves out. They are
    peeled off, again and again, while that at least halves what has to be sorted.
    """
    total = weights.sum(dtype=torch.float64).item()
    spare = (1 - top_p) * total
    if weights.numel() > 2 * _LIKELY and (ids is None or weights.device.type == "cpu"):  # as in ``_draw_left``
        index = (weights >= kth(weights, _LIKELY)).nonzero().view(-1)
        rest = total - weights[index].sum(dtype=torch.float64).item()
        if rest <= spare:
            weights, ids = _keep(index, weights, ids)
            spare -= rest
    while True:
        index = (weights >= spare / weights.numel()).nonzero().view(-1)
        if 2 * index.numel() > weights.numel():
            break
        before = weights.sum(dtype=torch.float64).item()
        weights, ids = _keep(index, weights, ids)
        spare -= before - weights.sum(dtype=torch.float64).item()
    values, order = weights.sort(descending=True, stable=True)
    reached = values.cumsum(0, dtype=torch.float64)
    goal = reached[-1].item() - spare
    count = int(torch.searchsorted(reached, goal)) + 1  # the token that reaches the goal is in
    return _keep(order[:count].sort().values, weights, ids)


def _inverse_cdf(weights: Tensor, u: float) -> int:
    """The first index at which the running sum of ``weights`` (float32 [n], >= 0, not all 0) exceeds ``u`` of their total.

    Sums are float64. A weight of 0 is never picked.
    """
    blocks = pad(weights, (0, -weights.numel() % _BLOCK)).view(-1, _BLOCK)
    sums = blocks.sum(dim=1, dtype=torch.float64).cumsum(0)
    target = u * sums[-1].item()
    block = _first_above(sums, target)
    before = sums[block - 1].item() if block else 0.0
    return block * _BLOCK + _first_above(blocks[block].cumsum(0, dtype=torch.float64), target - before)


def _first_above(sums: Tensor, target: float) -> int:
    """The first place where the running sum is above ``target``; the last place where it grows, should rounding leave none."""
    first = int(torch.searchsorted(sums, target, right=True))
    return min(first, int(torch.searchsorted(sums, sums[-1].item())))


def _row_logprob(row: Tensor, token: int, others: int | tuple[int, ...], kth: KthLargest) -> TokenLogprob:
    """``others``: as SamplingParams.scored says."""
    norm = row.logsumexp(0)
    logprob = (row[token] - norm).item()
    rank = 1 + int((row > row[token]).count_nonzero())
    if isinstance(others, tuple):
        told = (row[torch.tensor(others, device=row.device)] - norm).tolist()
        return TokenLogprob(token, logprob, rank, tuple(zip(others, told, strict=True)))
    count = row.numel() if others == -1 else min(others, row.numel())
    ids, values = _most_likely(row, norm, count, kth)
    return TokenLogprob(token, logprob, rank, tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _beam_row(row: Tensor, params: SamplingParams, kth: KthLargest) -> Row:
    count = row.numel() if params.logprobs is None or params.logprobs == -1 else min(params.logprobs, row.numel())
    ids, values = _most_likely(row, row.logsumexp(0), count, kth)
    return Row(ids.cpu().numpy(), values.double().cpu().numpy())


def _most_likely(row: Tensor, norm: Tensor, k: int, kth: KthLargest) -> tuple[Tensor, Tensor]:
    """The ``k`` most likely tokens, the first ones first, and their log-probabilities; fewer where only so many are possible."""
    if k == 0:
        return torch.empty(0, dtype=torch.int64), row[:0]
    ids = (row >= kth(row, k)).nonzero().view(-1) if k < row.numel() else torch.arange(k, device=row.device)
    values, order = row[ids].sort(descending=True, stable=True)
    k = min(k, int((values > -math.inf).count_nonzero()))
    return ids[order[:k]], values[:k] - norm
