"""How help looks in a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cyclopts.help import ColumnSpec, DefaultFormatter, HelpEntry
from cyclopts.help.specs import NameRenderer, get_default_parameter_columns

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions


def columns(console: Console, options: ConsoleOptions, entries: list[HelpEntry]) -> tuple[ColumnSpec, ...]:
    """Cyclopts' own, with two fifths of the width for names: the longest would not be in one piece in a third of 80."""
    wide = math.ceil(console.width * 0.4)
    found = get_default_parameter_columns(console, options, entries)
    return tuple(
        one.copy(renderer=NameRenderer(max_width=wide), max_width=wide) if isinstance(one.renderer, NameRenderer) else one
        for one in found
    )


FORMATTER = DefaultFormatter(column_specs=columns)
