"""Embeddings: what a request for one takes of a step's hidden states."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import normalize

from appliance.core.request import Request
from appliance.memory.planner import LOGIT_ROWS


def embeddings(hidden: Tensor, requests: Sequence[Request]) -> dict[Request, bytes]:
    """Of those that want theirs: their rows of ``hidden`` [R, hidden], on any device, as float32 (see Event.embedding).

    Normalized as sentence-transformers does it: divided by the root of the sum of squares. Waits for the device where it works
    by itself, once for LOGIT_ROWS requests.
    """
    rows = [row for row, request in enumerate(requests) if request.pooling is not None]
    found: dict[Request, bytes] = {}
    for first in range(0, len(rows), LOGIT_ROWS):
        some = rows[first : first + LOGIT_ROWS]
        for row, vector in zip(some, hidden[some].float().cpu(), strict=True):
            request, pooling = requests[row], requests[row].pooling
            assert pooling is not None
            kept = vector[: pooling.dimensions]
            found[request] = (normalize(kept, dim=0) if pooling.normalize else kept).numpy().astype("<f4").tobytes()
    return found
