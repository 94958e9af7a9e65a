"""What ``plan --check`` found: each category as planned and as measured. appliance/runtime/check.py measures. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from appliance.memory.plan import MemoryPlan
from appliance.memory.text import columns, size_text


@dataclass(frozen=True)
class Row:
    """One category: bytes planned, bytes measured, and how far they may be apart."""

    name: str
    planned: int
    measured: int
    allowed: int = 0  # bytes, either way
    below: bool = False  # whether less than planned is fine too: an upper bound

    @property
    def difference(self) -> int:
        return self.measured - self.planned

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed and (self.below or -self.difference <= self.allowed)

    def to_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "planned_bytes": self.planned,
            "measured_bytes": self.measured,
            "difference_bytes": self.difference,
            "allowed_bytes": self.allowed,
            "upper_bound": self.below,
            "holds": self.holds,
        }


@dataclass(frozen=True)
class CheckReport:
    """What was planned, and what it was."""

    plan: MemoryPlan  # as the engine had it when it was ready
    rows: tuple[Row, ...]
    steps: int  # that were run
    unchecked: str = ""  # what was not looked at, and why, in words

    @property
    def holds(self) -> bool:
        return all(row.holds for row in self.rows)

    def to_dict(self) -> dict[str, object]:
        rows = [row.to_dict() for row in self.rows]
        told = {"holds": self.holds, "steps": self.steps, "rows": rows, "unchecked": self.unchecked or None}
        return {**told, "plan": self.plan.to_dict()}

    def table(self) -> str:
        """For people, in fixed width."""
        cells = []
        for row in self.rows:
            off = row.difference
            share = f" ({off / row.planned:+.1%})" if off and row.planned else ""
            difference = f"{'-' if off < 0 else '+'}{size_text(abs(off))}{share}" if off else "none"
            limit = f"at most {size_text(row.allowed)} off" if row.allowed else "exact"
            words = f"at most as planned, and {size_text(row.allowed)}" if row.below and row.allowed else limit
            words = "at most as planned" if row.below and not row.allowed else words
            cells.append(
                (row.name, size_text(row.planned), size_text(row.measured), difference, words, "yes" if row.holds else "NO")
            )
        lines = columns(("", "planned", "measured", "difference", "wanted", "holds"), cells)
        if not self.plan.learned and not self.holds:
            runtime = size_text(self.plan.runtime)
            lines.append(f"  The process itself was estimated at {runtime}; now it is known: check again, and the plan has it.")
        if self.unchecked:
            lines.append(f"  Not checked: {self.unchecked}.")
        return "\n".join(lines)
