"""API keys: who may ask, until when, and how much. Only hashes are kept, here and in the file.

A key of ``appliance key`` is 256 random bits, so one SHA-256 is enough: there is nothing to guess, which is all that a slow hash
makes dear, and every request would pay for it.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, date, datetime
from datetime import time as day_time
from hashlib import sha256
from pathlib import Path
from typing import Any

from appliance.core.params import RequestError
from appliance.server.limits import Account, Limits
from appliance.server.redact import keyrings
from appliance.server.usage import Usage
from quant.errors import InputError

log = logging.getLogger("appliance.server")

LIMITS = tuple(f.name for f in fields(Limits))
MADE = 46  # characters of a key that ``make_key`` makes


@dataclass(frozen=True)
class Key:
    name: str
    digest: bytes = field(repr=False)  # SHA-256 of the key
    limits: Limits = field(default_factory=Limits)
    expires: float | None = None  # time.time()


class Keyring:
    """All keys that are valid now. ``required`` is False where none were ever given: then everybody may ask."""

    def __init__(self, api_keys: Sequence[str] = (), file: str | None = None, usage: str | None = None) -> None:
        """``usage``: the file of what keys have used. Raises InputError for keys that cannot be sent, or read."""
        self._given = tuple(_given(i, key) for i, key in enumerate(api_keys))
        self._file = Path(file) if file else None
        self._kept: tuple[Key, ...] = ()
        self.digests = {key.digest for key in self._given}
        self.accounts: dict[str, Account] = {}  # of the keys that have asked, by their names
        self.usage = Usage(Path(usage)) if usage else None
        self.required = bool(self._given or file)
        self.lengths = frozenset([*map(len, api_keys), *([MADE] if file else [])])  # of keys, as far as known
        keyrings.add(self)
        if self._file:
            try:
                self._seen = _stamp(self._file)
                self._keep(read_keys(self._file))
            except OSError as error:
                raise InputError(f"--api-key-file {file}: {error.strerror}; `appliance key NAME >> {file}` makes one") from None
            self._resume()
            if not self._kept and not self._given:
                log.warning("%s holds no key: every request is refused until one is added", file)

    def _resume(self) -> None:
        """Go on with the days that an earlier server kept."""
        days = self.usage.read() if self.usage else {}
        for key in self._kept:
            if key.name in days:
                self.accounts[key.name] = account = Account(key.limits)
                account.resume(*days[key.name])

    def find(self, headers: Sequence[tuple[bytes, bytes]]) -> tuple[Key, Account]:
        """The key that a request brings, and what it has used. Raises RequestError (401)."""
        self._reread()
        presented = _presented(headers)
        if presented is None:
            raise _refused("an API key is needed: send it as `Authorization: Bearer KEY` (or `x-api-key: KEY`)")
        digest, found = sha256(presented).digest(), None
        for key in (*self._given, *self._kept):  # all of them, always: the time tells nothing
            if hmac.compare_digest(digest, key.digest):
                found = key
        if found is None:
            raise _refused("the API key is not one of this server's")
        if found.expires is not None and time.time() >= found.expires:
            raise _refused(f"the API key {found.name!r} has expired")
        self.lengths |= {len(presented)}
        return found, self.accounts.setdefault(found.name, Account(found.limits))

    def _reread(self) -> None:
        """Take over the file when it has changed. One that cannot be read changes nothing, and is told once."""
        if self._file is None:
            return
        try:
            stamp = _stamp(self._file)
            if stamp == self._seen:
                return
            self._seen = stamp
            self._keep(read_keys(self._file))
        except FileNotFoundError:
            if self._seen is not None:
                log.error("%s is gone; the keys that it held stay valid", self._file)
            self._seen = None
        except (OSError, InputError) as error:
            log.error("%s; the keys read before stay valid", error)
        else:
            log.info("%s has changed: %d keys", self._file, len(self._kept))

    def _keep(self, keys: tuple[Key, ...]) -> None:
        taken = {part for key in self._given for part in (key.name, key.digest)}
        if twice := next((key.name for key in keys if {key.name, key.digest} & taken), None):
            raise InputError(f"--api-key-file {self._file}: the name or the key of {twice!r} is taken by --api-key")
        self._kept = keys
        self.digests = {key.digest for key in (*self._given, *keys)}
        for key in keys:
            if account := self.accounts.get(key.name):
                account.change(key.limits)


def _stamp(file: Path) -> tuple[int, ...] | None:
    found = file.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _refused(message: str) -> RequestError:
    return RequestError(message, code="invalid_api_key", status=401)


def _presented(headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    """OpenAI's header, else Anthropic's. Where one comes twice and differs, somebody else may have looked at the other."""
    given = {header: {value for name, value in headers if name == header} for header in (b"authorization", b"x-api-key")}
    if any(len(values) > 1 for values in given.values()):
        return None
    scheme, _, value = next(iter(given[b"authorization"]), b"").partition(b" ")
    if scheme.lower() == b"bearer" and value.strip():
        return value.strip()
    return next(iter(given[b"x-api-key"]), b"").strip() or None


def _given(i: int, key: str) -> Key:
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError("--api-key is empty, or has characters that a header cannot carry")
    return Key(f"api-key-{i + 1}", sha256(key.encode()).digest())


def read_keys(file: Path) -> tuple[Key, ...]:
    """The keys of a TOML or JSON file: name -> {sha256, expires, limits}. Raises OSError, or InputError that names the key."""
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        table = json.loads(text) if text.lstrip()[:1] == "{" else tomllib.loads(text)
    except ValueError as error:
        why = " ".join(str(error).split())
        if "overwrite" in why:
            raise InputError(f"--api-key-file {file} has a name twice ({why}): give each key one of its own") from None
        message = f"--api-key-file {file} is neither TOML nor JSON: {why}"
        raise InputError(f"{message}; `appliance key NAME` makes its lines") from None
    keys: list[Key] = []
    for name, row in table.items():
        try:
            keys.append(_key(name, row))
        except ValueError as error:
            raise InputError(f"--api-key-file {file}: key {name!r}: {error}") from None
    if len({key.digest for key in keys}) < len(keys):
        raise InputError(f"--api-key-file {file}: two names have the same sha256")
    return tuple(keys)


def _key(name: str, row: Any) -> Key:
    if not isinstance(row, Mapping):
        raise ValueError('expected { sha256 = "...", ... }')
    if strange := sorted(row.keys() - {"sha256", "expires", *LIMITS}):
        raise ValueError(f"there is no field {strange[0]!r}: they are sha256, expires, {', '.join(LIMITS)}")
    digest = row.get("sha256")
    if not isinstance(digest, str) or len(digest) != 64 or set(digest.lower()) - set("0123456789abcdef"):
        raise ValueError("sha256 must be 64 hexadecimal digits")  # what stands there may be a secret, pasted by mistake
    for limit in LIMITS:
        if limit in row and (type(row[limit]) is not int or row[limit] < 1):
            raise ValueError(f"{limit} must be an integer at least 1, got {row[limit]!r:.40}")
    expires = None if "expires" not in row else expiry(row["expires"])
    return Key(name, bytes.fromhex(digest), Limits(**{limit: row.get(limit) for limit in LIMITS}), expires)


def expiry(when: Any) -> float:
    """Seconds since 1970 of a TOML date or time, or of one as text (JSON). Raises ValueError.

    A key with a date is valid to the end of that day; UTC where nothing else is said.
    """
    if isinstance(when, str):
        try:
            when = date.fromisoformat(when) if len(when) == 10 else datetime.fromisoformat(when)
        except ValueError:
            raise ValueError(f"expires must be a date, as 2027-01-31, or a date and time, got {when!r:.40}") from None
    if isinstance(when, datetime):
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    if isinstance(when, date):
        return datetime.combine(when, day_time.min, UTC).timestamp() + 86400
    raise ValueError(f"expires must be a date, as 2027-01-31, or a date and time, got {when!r:.40}")


def make_key(name: str, limits: Limits, expires: str | None) -> tuple[str, str]:
    """A new key, and its line for the file. Raises InputError."""
    key = f"sk-{secrets.token_urlsafe(32)}"
    parts = [f'sha256 = "{sha256(key.encode()).hexdigest()}"']
    row: dict[str, Any] = {k: v for k, v in asdict(limits).items() if v is not None}
    if expires is not None:
        row["expires"] = expires
        parts.append(f"expires = {expires}")
    parts += [f"{limit} = {row[limit]}" for limit in LIMITS if limit in row]
    bare = name.replace("-", "").replace("_", "")
    if not (bare.isascii() and bare.isalnum()):
        raise InputError(f"a key's name has letters, digits, - and _, got {name!r}")
    try:
        made = _key(name, {"sha256": sha256(key.encode()).hexdigest(), **row})
        tomllib.loads("\n".join(parts))  # as the server will read it
    except ValueError as error:
        raise InputError(f"key {name!r}: {error}") from None
    if made.expires is not None and made.expires <= time.time():
        raise InputError(f"key {name!r}: expires is {expires}, and that is over")
    return key, f"{name} = {{ {', '.join(parts)} }}"
