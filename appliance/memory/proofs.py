"""Which cards have computed what the reference does (appliance/runtime/trial.py), and so what --device auto is. No torch.

Kept in a small file in the user's cache (appliance/memory/learned.py says where).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from appliance.memory.devices import DeviceInfo, this_device, torch_cuda
from appliance.memory.learned import cache_file
from quant.errors import InputError

log = logging.getLogger("appliance.memory")

FILE, MOST = "cards.json", 256
OLDEST = 75  # capability of a card that the kernels are made for
SEPARATOR = " | "


def device_kind(choice: str) -> str:
    """What --device asks for: cpu or cuda; auto: a card that has been right once, else the CPU. InputError for another word."""
    if choice == "auto":
        card = usable_card()
        return "cuda" if card is not None and proved(card) else "cpu"
    if choice not in ("cpu", "cuda"):
        raise InputError(f"--device {choice!r} is not known; auto, cpu and cuda are")
    return choice


def untried() -> str | None:
    """What to say where a card is there that auto does not take yet; None where there is none, or it is taken."""
    card = usable_card()
    if card is None or proved(card):
        return None
    return (
        f"{card.name} is not used: it has not computed anything yet that was held against the reference. --device cuda does that "
        "(once, with some minutes of compiling), and where it was right, it is taken from then on"
    )


def usable_card() -> DeviceInfo | None:
    """The first card, where this torch and the kernels can use it."""
    if torch_cuda() is None:
        return None
    try:
        card = this_device("cuda")
    except InputError:  # none, or a hidden one
        return None
    return card if (card.capability or 0) >= OLDEST else None


def card_key(card: DeviceInfo) -> str:
    """Card, driver, compiler and the kernels' text."""
    return SEPARATOR.join([card.name, _driver(), str(torch_cuda()), _version("triton"), _version("torch"), _kernels()])


def proved(card: DeviceInfo) -> bool:
    """Whether some model has been right on it."""
    begin = card_key(card) + SEPARATOR
    return any(name.startswith(begin) for name in known())


def known() -> list[str]:
    """What ``remember`` kept; nothing where it cannot be read."""
    path = cache_file(FILE)
    try:
        found = json.loads(path.read_text()) if path else []
    except (OSError, ValueError):
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def remember(name: str) -> None:
    """``name`` begins with the card's key. Says so where it cannot be kept, and goes on."""
    path = cache_file(FILE)
    if path is None:
        return
    scratch = path.with_name(f"{FILE}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps([*known(), name][-MOST:]))
        os.replace(scratch, path)
    except OSError as error:
        log.info("that this card was right is not kept: %s", error)


@cache
def _kernels() -> str:
    """A hash of the text of all kernels."""
    spec, text = importlib.util.find_spec("kernels"), hashlib.sha256()
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).rglob("*.py")):
            text.update(path.read_bytes())
    return text.hexdigest()


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return "unknown driver"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"
