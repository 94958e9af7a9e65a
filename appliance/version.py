"""The installed version."""

from importlib import metadata


def version() -> str:
    """As the package's metadata has it; "0+source" where the code runs without being installed."""
    try:
        return metadata.version("appliance")
    except metadata.PackageNotFoundError:
        return "0+source"
