"""A question that y answers."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static


class Confirm(ModalScreen[bool]):
    """Dismissed with True by y or enter, with False by n or escape."""

    BINDINGS = [  # noqa: RUF012  (textual's own convention)
        ("y", "answer(True)"),
        ("enter", "answer(True)"),
        ("n", "answer(False)"),
        ("escape", "answer(False)"),
        ("q", "answer(False)"),
    ]

    def __init__(self, question: str, yes: str, no: str) -> None:
        super().__init__()
        self.question, self.yes, self.no = question, yes, no

    def compose(self) -> ComposeResult:
        keys = Content.assemble(("y", "bold $text-accent"), f"  {self.yes}      ", ("n", "bold $text-accent"), f"  {self.no}")
        yield Static(Content.assemble(self.question, "\n\n", keys), id="box")

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)
