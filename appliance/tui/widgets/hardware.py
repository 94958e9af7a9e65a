"""What the machine does: processor and cards, how busy, how warm, at what power."""

from __future__ import annotations

from typing import Any

from textual.content import Content
from textual.widget import Widget

from appliance.tui.feed import Feed, View
from appliance.tui.text import MUTED, chart, percent, segments, size

HOT_C = 85.0


def facts(hardware: dict[str, Any]) -> list[tuple[str, float | None, list[tuple[str, str]]]]:
    """A device each: its name, its share of busy time, and what else is known, as (text, style)."""
    found: list[tuple[str, float | None, list[tuple[str, str]]]] = []
    cpu = hardware.get("cpu") or {}
    if cpu:
        load = cpu.get("load") or []
        more = [_warmth(cpu.get("temperature_c"))]
        more += [(f"load {load[0]:.1f}" + (f" on {cpu['threads']}" if cpu.get("threads") else ""), "")] if load else []
        found.append(("CPU", _number(cpu.get("utilization")), [one for one in more if one[0]]))
    for card in hardware.get("gpus") or []:
        more = [_warmth(card.get("temperature_c")), (_power(card), "")]
        if card.get("memory_total_bytes"):
            more.append((f"{size(card.get('memory_used_bytes') or 0)} of {size(card['memory_total_bytes'])}", ""))
        slowed = [one for one in card.get("throttle_reasons") or [] if one != "sw_power_cap"]
        more += [(f"slowed: {', '.join(slowed)}", "$text-error")] if slowed else []
        found.append((f"GPU {card.get('index', '')}".strip(), _number(card.get("utilization")), [one for one in more if one[0]]))
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _warmth(celsius: Any) -> tuple[str, str]:
    if not isinstance(celsius, int | float):
        return ("", "")
    return (f"{celsius:.0f} °C", "$text-error" if celsius >= HOT_C else "")


def _power(card: dict[str, Any]) -> str:
    drawn, limit = card.get("power_w"), card.get("power_limit_w")
    if drawn is None:
        return ""
    return f"{drawn:.0f} of {limit:.0f} W" if limit else f"{drawn:.0f} W"


def memory_line(hardware: dict[str, Any]) -> str:
    """The machine's memory."""
    memory = hardware.get("memory") or {}
    total, available = memory.get("total_bytes"), memory.get("available_bytes")
    if not total or available is None:
        return ""
    return f"RAM {size(total - available)} of {size(total)}"


def processes_line(hardware: dict[str, Any]) -> str:
    """How many cores our processes keep busy."""
    known = {name: one.get("cpu_cores") for name, one in (hardware.get("processes") or {}).items()}
    words = [f"{name} {cores:.1f}" for name, cores in sorted(known.items()) if isinstance(cores, int | float)]
    return f"busy cores: {', '.join(words)}" if words else ""


def summary(view: View | None) -> str:
    """One line, for small screens: ``CPU 43 %, 61 °C · GPU 0 87 %, 64 °C, 410 of 700 W``."""
    if view is None:
        return ""
    words = []
    for name, share, more in facts(view.hardware):
        rest = [text for text, _ in more if not text.startswith("load")]
        words.append(", ".join([f"{name} {'-' if share is None else percent(share, 1)}", *rest]))
    return " · ".join(words)


def hardware(feed: Feed, width: int, height: int) -> Content:
    """A line a device: a gauge, or a chart of the device that computes; then the machine's memory."""
    if feed.view is None or not feed.view.hardware:
        return Content("this server does not tell" if feed.view else "")
    devices = facts(feed.view.hardware)
    computes = len(devices) > 1 and (feed.view.info is None or not feed.view.info.device.startswith("cpu"))
    lines = [_line(feed, *one, width, chart_it=(at == int(computes))) for at, one in enumerate(devices)]
    lines += [Content(words) for words in (memory_line(feed.view.hardware), processes_line(feed.view.hardware)) if words]
    return Content("\n").join(lines[:height])


def _line(feed: Feed, name: str, share: float | None, more: list[tuple[str, str]], width: int, *, chart_it: bool) -> Content:
    room = max(min(width // 4, 24), 6)
    if chart_it:
        picture = Content.assemble((chart([one.busy for one in feed.history], room, 1, 1.0)[0], "$text-success"))
    else:
        filled = segments([share or 0.0], room, 1.0)[0]
        picture = Content.assemble(("▪" * filled, "$text-success"), ("·" * (room - filled), MUTED))
    parts = [Content.assemble(f"{name:6}", (f"{'-' if share is None else percent(share, 1):>5} ", "bold"), picture)]
    for text, style in more:
        if sum(part.cell_length + 2 for part in parts) + len(text) > width:
            break
        parts.append(Content.assemble((text, style)))
    return Content("  ").join(parts)


class HardwarePanel(Widget):
    BORDER_TITLE = "Machine"
    feed: Feed | None = None

    def show(self, feed: Feed) -> None:
        self.feed = feed
        cards = (feed.view.hardware.get("gpus") or []) if feed.view else []
        self.border_title = f"Machine · {cards[0]['name']}" if cards and cards[0].get("name") else "Machine"
        self.refresh()

    def render(self) -> Content:
        return hardware(self.feed, *self.content_size) if self.feed else Content("")
