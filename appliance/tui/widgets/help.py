"""What the keys do and what the signs mean."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.screen import ModalScreen
from textual.widgets import Static

TEXT = """\
[b]Keys[/b]
  q  quit                 p  pause, go on
  s  sort requests        ?  this help
  up, down, page keys scroll the requests

[b]KV blocks[/b]  ■ or █ used, □ kept for prompts that begin
alike, · blank; where a cell stands for several blocks,
░▒▓ tell how many are used

[b]Throughput[/b]  tokens a second between two looks;
the newest to the right, each chart to its own scale

[b]Requests[/b]  prefill: the prompt is being read;
decode: the answer is being written; swapped: it waits
in host memory; preempted: how often it gave its blocks
to another request

any key closes this"""


class Help(ModalScreen[None]):
    def compose(self) -> ComposeResult:
        yield Static(TEXT, id="help")

    def on_key(self) -> None:
        self.dismiss()
