"""Files that a message names by @."""

from __future__ import annotations

import os
import re
from pathlib import Path

from quant.errors import InputError

FILE = re.compile(r"(?<!\S)@(\S+)")
MOST_FILE = 10 * 1024**2  # bytes


def with_files(text: str) -> str:
    """``text`` with the files below it that it names by @. A word like that which is no file stays a word. Raises InputError."""
    added = []
    for name in dict.fromkeys(FILE.findall(text)):
        path = Path(os.path.expanduser(name))
        if not os.path.isfile(path):  # pathlib's raises where a name is too long, or its directory is somebody else's
            continue
        try:
            if path.stat().st_size > MOST_FILE:
                raise InputError(f"@{name} is longer than {MOST_FILE} bytes")
            content = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"@{name} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError(f"@{name} is not text in UTF-8") from None
        added.append(f"\n\n{name}:\n```\n{content.rstrip()}\n```")
    return text + "".join(added)
