"""The version, said once: pyproject.toml reads it from here."""

__version__ = "0.1.0"


def version() -> str:
    return __version__
