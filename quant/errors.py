"""Errors about what the user gave us. The command line prints them as one line and exits with 2."""

ADAPTER = "adapter_config.json"
MERGE = f"an adapter ({ADAPTER}), no model: serve its model with --lora-modules NAME=ADAPTER, or merge it into the model first"
"""What is said where a directory, or a repository on the hub, has that file instead of a config.json."""


class InputError(ValueError):
    """The input is wrong. The message names the thing, what was found and what would work."""


class CheckpointError(InputError):
    """A checkpoint on disk is incomplete, damaged, contradictory or of a kind that is not supported."""
