"""The signature of a block of thinking, which clients send back as it is.

Anthropic's says that the text is unchanged; nobody relies on that here, and what comes from elsewhere is taken. Where the client
wants no thinking shown (``display: "omitted"``) the signature is the text itself, so that it is there in the next turn.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

_HIDDEN = "thinking:"


def signature(thinking: str, *, shown: bool) -> str:
    if shown:
        return base64.b64encode(hashlib.sha256(thinking.encode()).digest()).decode()
    return _HIDDEN + base64.b64encode(thinking.encode()).decode()


def hidden(signature: str) -> str:
    """The text that a signature holds; none where it holds none."""
    if not signature.startswith(_HIDDEN):
        return ""
    try:
        return base64.b64decode(signature.removeprefix(_HIDDEN), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
