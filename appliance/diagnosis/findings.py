"""What is told of a machine beside its facts: each with what it costs and how to mend it."""

from __future__ import annotations

from dataclasses import dataclass

SEVERITIES = ("problem", "slow", "note")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """``problem``: the server does not run; ``slow``: it runs below what this machine could do; ``note``: good to know."""

    severity: str
    name: str  # for scripts
    what: str
    costs: str
    remedy: str

    def lines(self) -> list[str]:
        return [f"{self.severity:8} {self.what}: {self.costs}", f"{'':8} -> {self.remedy}"]


def problem(name: str, what: str, costs: str, remedy: str) -> Finding:
    return Finding(severity="problem", name=name, what=what, costs=costs, remedy=remedy)


def slow(name: str, what: str, costs: str, remedy: str) -> Finding:
    return Finding(severity="slow", name=name, what=what, costs=costs, remedy=remedy)


def note(name: str, what: str, costs: str, remedy: str) -> Finding:
    return Finding(severity="note", name=name, what=what, costs=costs, remedy=remedy)
