"""NVIDIA cards by name: what the driver reports of each, and what it is sold with. Facts alone, no card needed.

Memory is what ``nvidia-smi`` reports as the total (with the default of ECC), as people paste it in public bug reports: a
"24 GB" RTX 4090 says 24564 MiB. Bandwidth, multiprocessors and PCIe are those of the vendor's product pages and data sheets. The
rate is of dense products of float16 with sums in float32, from data sheets and the appendices of the architecture white papers;
for a GeForce it is half of that with sums in float16, and a sheet that gives "AI TOPS" means 16 times this rate (RTX 50: FP4,
sparse) or 8 times (RTX 40: FP8, sparse). Laptops: the rate at the highest power that the vendor states.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from appliance.memory.devices import MIB, DeviceInfo
from quant.errors import InputError

MOST = 64  # cards that are planned at once
PCIE = {3: 0.985e9, 4: 1.969e9, 5: 3.938e9}  # bytes a second and lane, one way
RESERVED = (400 * MIB, 0.0025)
"""What a driver keeps of a card: so much, and this share. Recorded: ``nvidia-smi -q`` has 408 MiB of an RTX 2080 SUPER,
434 of an RTX 4080 SUPER, 464 of an RTX 5070, 479 of an H100, 609 of an L40S and 614 of an H200."""


@dataclass(frozen=True)
class Card:
    """One product."""

    name: str  # as the driver has it, without "NVIDIA"; memory behind it where one name has several sizes
    memory: int  # MiB
    bandwidth: int  # 10^9 bytes a second
    capability: int  # 75, 80, 86, 89, 90, 100, 120
    processors: int  # multiprocessors
    rate: float  # 10^12 operations a second: float16, dense, sums in float32
    pcie: tuple[int, int] = (4, 16)  # generation, lanes
    also: tuple[str, ...] = ()  # other names

    @property
    def half_sums(self) -> float:
        """10^12 operations a second with sums in float16: twice as many on a GeForce."""
        return self.rate * (2 if self.name.startswith("GeForce") else 1)

    @property
    def int8(self) -> float:
        """10^12 operations a second of dense products in int8, with sums in int32."""
        return 2 * self.half_sums

    @property
    def fp8(self) -> float | None:
        """10^12 operations a second of dense products in FP8 with sums in float32; None where there are none."""
        return 2 * self.rate if self.capability >= 89 else None

    @property
    def link(self) -> float:
        """Bytes a second over PCIe, one way."""
        return PCIE[self.pcie[0]] * self.pcie[1]

    def device(self) -> DeviceInfo:
        """The card with nothing on it but its driver."""
        total = self.memory * MIB
        kept = RESERVED[0] + int(RESERVED[1] * total)
        return DeviceInfo("cuda", f"NVIDIA {self.name}", total, total - kept, self.capability)


CARDS = (
    # GeForce, Blackwell
    Card("GeForce RTX 5090", 32607, 1792, 120, 170, 209.5, (5, 16)),
    Card("GeForce RTX 5080", 16303, 960, 120, 84, 112.6, (5, 16)),
    Card("GeForce RTX 5070 Ti", 16303, 896, 120, 70, 87.9, (5, 16)),
    Card("GeForce RTX 5070", 12227, 672, 120, 48, 61.7, (5, 16)),
    Card("GeForce RTX 5060 Ti 16GB", 16311, 448, 120, 36, 47.4, (5, 8)),
    Card("GeForce RTX 5060 Ti 8GB", 8151, 448, 120, 36, 47.4, (5, 8)),
    Card("GeForce RTX 5060", 8151, 448, 120, 30, 38.4, (5, 8)),
    Card("GeForce RTX 5090 Laptop GPU", 24463, 896, 120, 82, 114.0, (5, 16)),
    Card("GeForce RTX 5080 Laptop GPU", 16303, 896, 120, 60, 83.4, (5, 16)),
    Card("GeForce RTX 5070 Ti Laptop GPU", 12227, 672, 120, 46, 62.0, (5, 16)),
    Card("GeForce RTX 5070 Laptop GPU", 8151, 384, 120, 36, 49.9, (5, 8)),
    # GeForce, Ada
    Card("GeForce RTX 4090", 24564, 1008, 89, 128, 165.2),
    Card("GeForce RTX 4080 SUPER", 16376, 736, 89, 80, 104.4),
    Card("GeForce RTX 4080", 16376, 717, 89, 76, 97.5),
    Card("GeForce RTX 4070 Ti SUPER", 16376, 672, 89, 66, 88.2),
    Card("GeForce RTX 4070 Ti", 12282, 504, 89, 60, 80.2),
    Card("GeForce RTX 4070 SUPER", 12282, 504, 89, 56, 71.0),
    Card("GeForce RTX 4070", 12282, 504, 89, 46, 58.3),
    Card("GeForce RTX 4060 Ti 16GB", 16380, 288, 89, 34, 44.1, (4, 8)),
    Card("GeForce RTX 4060 Ti 8GB", 8188, 288, 89, 34, 44.1, (4, 8)),
    Card("GeForce RTX 4060", 8188, 272, 89, 24, 30.2, (4, 8)),
    Card("GeForce RTX 4090 Laptop GPU", 16376, 576, 89, 76, 85.7),
    Card("GeForce RTX 4080 Laptop GPU", 12282, 432, 89, 58, 67.7),
    Card("GeForce RTX 4070 Laptop GPU", 8188, 256, 89, 36, 40.1, (4, 8)),
    Card("GeForce RTX 4060 Laptop GPU", 8188, 256, 89, 24, 29.1, (4, 8)),
    Card("GeForce RTX 4050 Laptop GPU", 6141, 192, 89, 20, 24.2, (4, 8)),
    # GeForce, Ampere
    Card("GeForce RTX 3090 Ti", 24564, 1008, 86, 84, 80.0),
    Card("GeForce RTX 3090", 24576, 936, 86, 82, 71.2),
    Card("GeForce RTX 3080 Ti", 12288, 912, 86, 80, 68.2),
    Card("GeForce RTX 3080", 10240, 760, 86, 68, 59.5),
    Card("GeForce RTX 3080 12GB", 12288, 912, 86, 70, 61.3),
    Card("GeForce RTX 3070 Ti", 8192, 608, 86, 48, 43.5),
    Card("GeForce RTX 3070", 8192, 448, 86, 46, 40.6),
    Card("GeForce RTX 3060 Ti", 8192, 448, 86, 38, 32.4),
    Card("GeForce RTX 3060", 12288, 360, 86, 28, 25.5),
    Card("GeForce RTX 3060 Laptop GPU", 6144, 336, 86, 30, 26.2),
    # GeForce and Titan, Turing
    Card("TITAN RTX", 24576, 672, 75, 72, 130.5, (3, 16)),
    Card("GeForce RTX 2080 Ti", 11264, 616, 75, 68, 53.8, (3, 16)),
    Card("GeForce RTX 2080 SUPER", 8192, 496, 75, 48, 44.6, (3, 16)),
    Card("GeForce RTX 2080", 8192, 448, 75, 46, 40.3, (3, 16)),
    Card("GeForce RTX 2070 SUPER", 8192, 448, 75, 40, 36.3, (3, 16)),
    Card("GeForce RTX 2070", 8192, 448, 75, 36, 29.9, (3, 16)),
    Card("GeForce RTX 2060", 6144, 336, 75, 30, 25.8, (3, 16)),
    # workstations
    Card("RTX PRO 6000 Blackwell Workstation Edition", 97887, 1792, 120, 188, 503.8, (5, 16), ("RTX PRO 6000",)),
    Card("RTX PRO 5000 Blackwell", 48935, 1344, 120, 110, 258.0, (5, 16)),
    Card("RTX 6000 Ada Generation", 49140, 960, 89, 142, 364.2),
    Card("RTX 5000 Ada Generation", 32760, 576, 89, 100, 261.1),
    Card("RTX 4500 Ada Generation", 24570, 432, 89, 60, 158.5),
    Card("RTX 4000 Ada Generation", 20475, 360, 89, 48, 106.9),
    Card("RTX 2000 Ada Generation", 16380, 224, 89, 22, 48.0, (4, 8)),
    Card("RTX A6000", 49140, 768, 86, 84, 154.8),
    Card("RTX A5000", 24564, 768, 86, 64, 111.1),
    Card("RTX A4500", 20470, 640, 86, 56, 94.6),
    Card("RTX A4000", 16376, 448, 86, 48, 76.7),
    Card("RTX A2000 12GB", 12282, 288, 86, 26, 31.9),
    Card("Quadro RTX 8000", 49152, 672, 75, 72, 130.5, (3, 16), ("RTX 8000",)),
    Card("Quadro RTX 6000", 24576, 672, 75, 72, 130.5, (3, 16)),
    # data centres
    Card("B200", 183359, 8000, 100, 148, 2250.0, (5, 16)),
    Card("H200", 143771, 4800, 90, 132, 989.4, (5, 16), ("H200 SXM",)),
    Card("H100 80GB HBM3", 81559, 3350, 90, 132, 989.4, (5, 16), ("H100 SXM", "H100 SXM5")),
    Card("H100 PCIe", 81559, 2039, 90, 114, 756.0, (5, 16)),
    Card("H100 NVL", 95830, 3938, 90, 132, 835.5, (5, 16)),
    Card("L40S", 46068, 864, 89, 142, 362.1),
    Card("L40", 46068, 864, 89, 142, 181.1),
    Card("L4", 23034, 300, 89, 58, 121.0),
    Card("A100-SXM4-80GB", 81920, 2039, 80, 108, 311.9, (4, 16), ("A100 80GB SXM", "A100 SXM 80GB")),
    Card("A100 80GB PCIe", 81920, 1935, 80, 108, 311.9, (4, 16), ("A100 PCIe 80GB",)),
    Card("A100-SXM4-40GB", 40960, 1555, 80, 108, 311.9, (4, 16), ("A100 40GB SXM", "A100 SXM 40GB")),
    Card("A100-PCIE-40GB", 40960, 1555, 80, 108, 311.9, (4, 16), ("A100 40GB PCIe", "A100 PCIe 40GB")),
    Card("A40", 46068, 696, 86, 84, 149.7),
    Card("A30", 24576, 933, 80, 56, 165.2),
    Card("A10", 23028, 600, 86, 72, 125.0),
    Card("A10G", 23028, 600, 86, 80, 70.0),
    Card("A2", 15356, 200, 86, 10, 18.1, (4, 8)),
    Card("Tesla T4", 15360, 320, 75, 40, 65.1, (3, 16), ("T4",)),
)  # fmt: skip

_COUNTED = re.compile(r"(\d{1,3})\s*[x*×]\s*(.*\S)|(.*\S)\s+[x*×]\s*(\d{1,3})")
_SILENT = re.compile(r"nvidia|geforce|tesla|generation|edition|gpu|\(r\)|\(tm\)|[^a-z0-9]")


def find_card(name: str, flag: str = "--gpu") -> Card:
    """The card of that name: capitals, spaces, NVIDIA, GeForce and RTX may be left out, GB added. InputError with the nearest."""
    wanted = _key(name)
    for card in CARDS:
        if wanted in _keys(card):
            return card
    begins = [card for card in CARDS if wanted and any(key.startswith(wanted) for key in _keys(card))]
    if len(begins) == 1:
        return begins[0]
    if begins:
        raise InputError(f"{flag} {name!r} is one of several: {', '.join(card.name for card in begins[:6])}; say which")
    near = get_close_matches(wanted, {key: card for card in CARDS for key in _keys(card)}, n=8, cutoff=0.6)
    names = list(dict.fromkeys(card.name for key in near for card in CARDS if key in _keys(card)))[:4]
    hint = f"nearest: {', '.join(names)}" if names else "as in RTX 4090"
    any_card = "--device cuda --memory SIZE plans for any" if flag == "--gpu" else "a size, as in 24GB, stands for any"
    raise InputError(f"{flag} {name!r} is not in the table of {len(CARDS)} NVIDIA cards ({hint}); {any_card}")


def find_cards(names: list[str], flag: str = "--gpu") -> list[Card]:
    """Those of --gpu, which may be repeated, separated by commas and counted: "2x RTX 3090"."""
    found: list[Card] = []
    for name in (part.strip() for given in names for part in given.split(",")):
        match = _COUNTED.fullmatch(name)
        count, one = (int(match[1] or match[4]), match[2] or match[3]) if match else (1, name)
        if not 1 <= count <= MOST:
            raise InputError(f"{flag} {name!r}: between 1 and {MOST} cards are needed")
        found += [find_card(one, flag)] * count
    return found


def known_card(device: DeviceInfo) -> Card | None:
    """The card that a driver's name and memory stand for; None for one that is not in the table."""
    if device.kind != "cuda":
        return None
    key = _key(device.name)
    same = [card for card in CARDS if key in _keys(card) or re.sub(r"\d+gb$", "", _key(card.name)) == key]
    return min(same, key=lambda card: abs(card.memory * MIB - device.total), default=None)


def _key(name: str) -> str:
    return _SILENT.sub("", name.lower().replace("mobile", "laptop"))


def _keys(card: Card) -> set[str]:
    """Every way to write its name."""
    keys = {_key(name) for name in (card.name, *card.also)}
    keys |= {key.removeprefix("rtx") for key in keys}
    sizes = range(card.memory // 1024, int(1.08 * card.memory / 1024) + 1)  # a driver reports up to 7 % less than is sold
    return keys | {f"{key}{size}gb" for key in keys if not key.endswith("gb") for size in sizes}
