"""The dashboard's keys."""

from __future__ import annotations

from textual.binding import Binding, BindingType

BINDINGS: list[BindingType] = [
    Binding("q", "quit", "Quit"),
    Binding("p", "pause", "Pause"),
    Binding("s", "sort(1)", "Sort"),
    Binding("S", "sort(-1)", show=False),
    Binding("r", "reverse", show=False),
    Binding("slash", "filter", "Filter", key_display="/", priority=True),  # what is typed behind it is no key any more
    Binding("i", "inspect", "Inspect"),
    Binding("x", "cancel", "Cancel"),
    Binding("l", "log", "Log", priority=True),  # so that a slash behind it is for the log
    Binding("question_mark", "help", "Help", key_display="?"),
    Binding("m", "model", show=False),
    Binding("v", "level", show=False),
    Binding("space", "space", show=False),
    Binding("escape", "escape", show=False, priority=True),
    Binding("ctrl+c", "quit", show=False),
    Binding("left_square_bracket", "other(-1)", show=False),
    Binding("right_square_bracket", "other(1)", show=False),
    *(Binding(str(number), f"server({number - 1})", show=False) for number in range(1, 10)),
    Binding("less_than_sign", "faster(-1)", show=False),
    Binding("greater_than_sign", "faster(1)", show=False),
    Binding("left", "seek(-10)", show=False, priority=True),
    Binding("right", "seek(10)", show=False, priority=True),
    Binding("shift+left", "seek(-60)", show=False, priority=True),
    Binding("shift+right", "seek(60)", show=False, priority=True),
]

# what does nothing while a question, the help or a request is on the screen
OF_THE_BASE = {"sort", "reverse", "filter", "inspect", "cancel", "log", "help", "space", "server", "other", "level", "model"}
