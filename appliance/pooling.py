"""Whether a model is to make embeddings, and how: by --runner, and by what sentence-transformers keeps beside its weights."""

from __future__ import annotations

import json
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.core.params import SamplingParams
from models.architectures import headless
from quant.errors import InputError
from quant.headers import read_json

MODULES = "modules.json"
LAST, SWITCH = "lasttoken", "pooling_mode_"


@dataclass(frozen=True)
class Pooler:
    """The last token's hidden state is the embedding of a text; ``normalize``: divided by its length."""

    normalize: bool = True


def read_pooler(directory: Path | None, runner: str) -> Pooler | None:
    """How the model of a directory makes embeddings; None where it generates text.

    By ``runner``; "auto": where its files say that it is made for embeddings. Raises InputError where they say how, and that is
    not by the last token.
    """
    if runner == "generate" or directory is None:
        return None
    if (directory / MODULES).is_file():
        return _of_modules(directory)
    alone = (directory / "config.json").is_file() and headless(read_json(directory / "config.json"))
    return Pooler() if runner == "pooling" or alone else None


def embedding_params() -> SamplingParams:
    """What the engine is asked for beside a Pooling: one token, which nobody is told."""
    return SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)


def numbers(vector: bytes) -> list[float]:
    """Those of an Event's embedding."""
    found = array("f", vector)
    if sys.byteorder == "big":
        found.byteswap()
    return found.tolist()


def _of_modules(directory: Path) -> Pooler:
    path = directory / MODULES
    try:
        modules = json.loads(path.read_bytes())
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        where = [directory / str(module["path"]) for module in modules]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a list of modules with their types and paths ({error}); fetch the file again") from None
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise InputError(
            f"{path}: the modules are {', '.join(kinds) or 'none'}: embeddings are made of Transformer, Pooling and Normalize "
            "alone here (--runner generate leaves the file aside)"
        )
    config = read_json(where[1] / "config.json")
    if (modes := _modes(config)) != [LAST]:
        raise InputError(
            f"{where[1] / 'config.json'}: the pooling is {' and '.join(modes) or 'none'}: only {LAST} is supported "
            "(--runner generate leaves the file aside)"
        )
    return Pooler(normalize=len(kinds) > 2)


def _modes(config: dict[str, Any]) -> list[str]:
    """The ways to make one vector of a text's: by a switch for each, or, in newer files, by name."""
    if isinstance(named := config.get("pooling_mode"), str):
        return [named]
    return [
        name.removeprefix(SWITCH).removesuffix("_tokens") for name, on in config.items() if name.startswith(SWITCH) and on is True
    ]
