"""The models as Anthropic's clients want them told: those that say ``anthropic-version``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any


def model_info(card: Mapping[str, Any]) -> dict[str, Any]:
    """Of one of OpenAI's cards. ``max_input_tokens`` and ``max_tokens`` are both the context's length."""
    return {
        "type": "model",
        "id": card["id"],
        "display_name": card["id"],
        "created_at": datetime.fromtimestamp(card["created"], UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": card["max_model_len"],
        "max_tokens": card["max_model_len"],
    }


def models_page(cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All of them are one page."""
    first, last = (cards[i]["id"] for i in (0, -1)) if cards else (None, None)
    return {"data": [model_info(card) for card in cards], "has_more": False, "first_id": first, "last_id": last}
