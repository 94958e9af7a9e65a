"""What the keys do and what the signs mean."""

from __future__ import annotations

from textual import events
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

KEYS = """\
[b]Requests[/b]
  s S      sort by the next column, the one before
  r        the other way round (a click on a head does both)
  /        filter by id, key, state; empty: all
  enter i  all that is known of one
  x        cancel it (asks first)

[b]Screen[/b]
  l        the log; there: / filter, v level, space pause
  p        pause, go on
  m        the next model of a server with several
  1-9 \\[ ]  the server of that number, the one before, after
  q        quit"""
REPLAY = """

[b]Replay[/b]
  space    stop, go on       < >  slower, faster
  ← →      10 s (with shift: a minute) back, on"""
SIGNS = """

[b]KV blocks[/b]
  ■ used   ◆ shared by several   □ kept for prompts that
  begin alike   · free.  Where a cell stands for several
  blocks ░▒▓█ tell how many of them are used

[b]Charts[/b]
  the newest to the right, each to its own scale; times to
  the first token: of each look the mean, in words the
  median of the last minute

[b]States[/b]
  prefill: the prompt is read; decode: the answer is
  written; swapped: it waits in host memory

escape closes this"""


class Help(ModalScreen[None]):
    def __init__(self, *, replay: bool = False) -> None:
        super().__init__()
        self.words = KEYS + (REPLAY if replay else "") + SIGNS

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="box"):
            yield Static(self.words)

    def on_key(self, event: events.Key) -> None:
        if event.key not in ("up", "down", "pageup", "pagedown", "home", "end"):
            event.stop()
            self.dismiss()
