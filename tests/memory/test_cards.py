"""The table of cards: every entry against what its architecture can do, some against sheets, and names as people write them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from appliance.memory.cards import CARDS, Card, find_card, find_cards, known_card
from appliance.memory.devices import MIB, DeviceInfo
from quant.errors import InputError

# Dense operations of float16 that a multiprocessor does in a clock: the architecture white papers.
PER_CLOCK = {75: 1024, 80: 2048, 86: 1024, 89: 1024, 90: 4096, 100: 8192, 120: 1024}
HALVED = {"L40", "A10G"}  # data centre cards whose sheets give half of what their processors do
# The sheets' "AI TOPS": sparse FP4 (RTX 50 and RTX PRO) or sparse FP8 (RTX 40, Ada workstations), counted with sums in float16.
AI_TOPS = {
    "RTX 5090": 3352, "RTX 5080": 1801, "RTX 5070 Ti": 1406, "RTX 5070": 988, "RTX 5060 Ti 16GB": 759, "RTX 5060": 614,
    "RTX 5090 Laptop GPU": 1824, "RTX 4090": 1321, "RTX 4080 SUPER": 836, "RTX 4080": 780, "RTX 4070 Ti SUPER": 706,
    "RTX 4070 Ti": 641, "RTX 4070 SUPER": 568, "RTX 4070": 466, "RTX 4060 Ti 8GB": 353, "RTX 4060": 242,
    "RTX 5080 Laptop GPU": 1334, "RTX 5070 Ti Laptop GPU": 992, "RTX 5070 Laptop GPU": 798, "RTX 4050 Laptop GPU": 194,
    "RTX 4090 Laptop GPU": 686, "RTX 4080 Laptop GPU": 542, "RTX 4070 Laptop GPU": 321, "RTX 4060 Laptop GPU": 233,
}  # fmt: skip


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_does_what_its_processors_can(card: Card) -> None:
    full = card.half_sums * (2 if card.name in HALVED else 1)
    clock = full * 1e12 / card.processors / PER_CLOCK[card.capability]
    assert 1.1e9 < clock < 2.75e9, "no boost clock of an NVIDIA card"
    assert 3 <= card.pcie[0] <= 5 and card.pcie[1] in (8, 16)
    assert (card.fp8 is not None) == (card.capability >= 89)
    assert find_card(card.name) == find_card(f"NVIDIA {card.name}".lower()) == card
    assert known_card(card.device()) == card


@pytest.mark.parametrize(("name", "tops"), AI_TOPS.items())
def test_rates_are_those_of_the_sheets(name: str, tops: int) -> None:
    card = find_card(name)
    assert card.rate == pytest.approx(tops / (16 if card.capability == 120 else 8), rel=0.005)


@pytest.mark.parametrize(
    ("name", "tops"), [("RTX PRO 6000", 4030), ("RTX PRO 5000 Blackwell", 2064), ("RTX 6000 Ada", 1457), ("RTX 4000 Ada", 428)]
)
def test_rates_of_workstations_are_not_halved(name: str, tops: int) -> None:
    """Sparse FP4 has 8 times the operations of float16, sparse FP8 4 times."""
    card = find_card(name)
    assert card.rate == pytest.approx(tops / (8 if card.capability == 120 else 4), rel=0.005) and card.half_sums == card.rate


def test_what_the_white_papers_say() -> None:
    ampere, ada, turing, hopper = (find_card(name) for name in ("RTX 3090", "RTX 4090", "T4", "H100 SXM"))
    assert (ampere.rate, ampere.half_sums, ampere.int8) == (71.2, 142.4, 284.8)
    assert (ada.half_sums, ada.int8, ada.fp8) == (330.4, 660.8, 330.4)
    assert (turing.int8, turing.fp8) == (130.2, None)
    assert (hopper.half_sums, hopper.int8, hopper.fp8) == (989.4, 1978.8, 1978.8)
    assert find_card("RTX 4060").link == pytest.approx(15.75e9, rel=0.001) and find_card("5090").link == pytest.approx(
        63e9, rel=0.001
    )


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("RTX 4090", "GeForce RTX 4090"),
        ("4090", "GeForce RTX 4090"),
        ("rtx4090", "GeForce RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
        ("rtx-4090 24 GB", "GeForce RTX 4090"),
        ("4090 mobile", "GeForce RTX 4090 Laptop GPU"),
        ("RTX 4090 Laptop", "GeForce RTX 4090 Laptop GPU"),
        ("5070ti", "GeForce RTX 5070 Ti"),
        ("4060 Ti 16GB", "GeForce RTX 4060 Ti 16GB"),
        ("3080", "GeForce RTX 3080"),
        ("rtx 3080 12gb", "GeForce RTX 3080 12GB"),
        ("4080 super", "GeForce RTX 4080 SUPER"),
        ("6000 Ada", "RTX 6000 Ada Generation"),
        ("A6000", "RTX A6000"),
        ("RTX 6000", "RTX 6000 Ada Generation"),
        ("Quadro RTX 6000", "Quadro RTX 6000"),
        ("rtx 8000", "Quadro RTX 8000"),
        ("RTX PRO 6000", "RTX PRO 6000 Blackwell Workstation Edition"),
        ("T4", "Tesla T4"),
        ("a10", "A10"),
        ("A10 24GB", "A10"),
        ("H200 141GB", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("A100 SXM 40GB", "A100-SXM4-40GB"),
        ("H200", "H200"),
    ],
)
def test_names_as_people_write_them(written: str, name: str) -> None:
    assert find_card(written).name == name


def test_names_that_mean_no_card_or_several() -> None:
    with pytest.raises(InputError, match=r"'RTX 9090' is not in the table .*GeForce RTX 4090"):
        find_card("RTX 9090")
    with pytest.raises(InputError, match=r"one of several: A100-SXM4-80GB, A100 80GB PCIe, .*say which"):
        find_card("A100")
    with pytest.raises(InputError, match="RTX 4060 Ti 16GB, GeForce RTX 4060 Ti 8GB"):
        find_card("4060 Ti")
    for name in ("", "radeon", "???"):
        with pytest.raises(InputError, match="not in the table"):
            find_card(name)


def test_several_cards() -> None:
    def names(*given: str) -> list[str]:
        return [card.name.removeprefix("GeForce RTX ") for card in find_cards(list(given))]

    assert names("2x RTX 3090") == names("2 × 3090") == names("3090 x2") == names("3090,3090") == names("3090", "3090")
    assert names("2x3090", "4090") == ["3090", "3090", "4090"]
    for bad in ("0x 3090", "999x 3090"):
        with pytest.raises(InputError, match="between 1 and 64 cards"):
            find_cards([bad])


def test_a_card_as_a_device() -> None:
    device = find_card("4090").device()
    assert (device.kind, device.name, device.capability) == ("cuda", "NVIDIA GeForce RTX 4090", 89)
    assert device.total == 24564 * MIB and 24000 * MIB < device.available < 24207 * MIB  # torch sees 23.64 GiB of it


def test_the_card_that_a_driver_names() -> None:
    one = DeviceInfo("cuda", "NVIDIA GeForce RTX 4060 Ti", 8188 * MIB, 8000 * MIB, 89)
    assert known_card(one) == find_card("4060 Ti 8GB")
    assert known_card(replace(one, total=16380 * MIB)) == find_card("4060 Ti 16GB")
    assert known_card(replace(one, name="NVIDIA A800-SXM4-80GB")) is None
    assert known_card(replace(one, kind="cpu", name="NVIDIA GeForce RTX 4090")) is None
