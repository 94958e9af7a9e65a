"""How clients find servers, and whom they trust: there are certificates that no public authority has signed."""

from __future__ import annotations

import ssl
import urllib.request
from urllib.parse import urlsplit

from quant.errors import InputError


def base_url(url: str, flag: str = "--url") -> str:
    """``url`` with a scheme, without /v1 and a trailing slash. Raises InputError where it is none."""
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise InputError(f"{flag} {url!r} is not the address of a server: it looks like http://127.0.0.1:8000")
    return full.rstrip("/").removesuffix("/v1")


def trust(ca_certs: str | None, *, insecure: bool = False) -> ssl.SSLContext:
    """What --ssl-ca-certs (PEM) and --insecure say. Raises InputError where the file does not do."""
    try:
        context = ssl.create_default_context(cafile=ca_certs)
    except OSError as error:  # SSLError is one
        reason = getattr(error, "reason", None) or error.strerror or error
        raise InputError(f"--ssl-ca-certs {ca_certs}: {str(reason).replace('_', ' ').lower()}") from None
    if insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def opener(url: str, ca_certs: str | None, *, insecure: bool = False) -> urllib.request.OpenerDirector:
    """Asks the server itself, never a proxy. Raises InputError, as ``trust``."""
    tls = [urllib.request.HTTPSHandler(context=trust(ca_certs, insecure=insecure))] if url.startswith("https:") else []
    return urllib.request.build_opener(urllib.request.ProxyHandler({}), *tls)


def no_answer(url: str, error: OSError) -> str:
    """Why ``url`` could not be asked, in a line."""
    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        hint = "--ssl-ca-certs FILE says whose certificates are trusted, --insecure takes any"
        return f"the certificate of {url} is not trusted ({reason.verify_message}): {hint}"
    return f"no answer from {url}: {getattr(reason, 'strerror', None) or reason}"
