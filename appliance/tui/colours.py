"""Colours of the theme for widgets that are drawn by rich, which does not know textual's variables."""

from __future__ import annotations

from textual.app import App

_known: dict[str, dict[str, str]] = {}  # of each theme; textual makes them anew each time, which takes a millisecond


def colour(app: App[None], name: str) -> str:
    """Of a variable such as text-warning; "" where the theme has none of that name."""
    if not name:
        return ""
    if app.theme not in _known:
        _known[app.theme] = app.theme_variables
    return _known[app.theme].get(name, "")
