"""What a model's generation_config.json says of sampling, for requests that leave it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from appliance.core.params import SamplingParams
from quant.errors import InputError

FROM_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def model_defaults(directory: Path | None, choice: str) -> dict[str, Any]:
    """Those of its generation_config.json; none where it has none or ``choice`` is "appliance".

    ``choice`` may be another directory, whose file is read then. Raises InputError where there is none, or it is damaged.
    """
    if not isinstance(choice, str) or not choice:
        told = "auto, appliance, or a directory with a generation_config.json, is needed"
        raise InputError(f"--generation-config is {choice!r:.80}: {told}")
    if choice in ("appliance", "vllm"):  # "vllm" is what vLLM's users write for "not the model's"
        return {}
    if choice != "auto":
        directory = Path(choice)
        if not (directory / "generation_config.json").is_file():
            told = f"--generation-config is 'auto' or 'appliance', got {choice!r}"
            raise InputError(f"{told}, which is no directory with a generation_config.json either")
    path = directory / "generation_config.json" if directory else None
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
        defaults = {name: found[name] for name in FROM_MODEL if found.get(name) is not None}
        SamplingParams(**defaults)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: {error} (--generation-config appliance leaves this file aside)") from None
    return defaults
