"""The names by which a server is called."""

from __future__ import annotations

import ipaddress
import re


def is_loopback(host: str) -> bool:
    """True if only this host can reach what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(text: str) -> str:
    """A name or an address as browsers write it into the header `Host`, without a port.

    Raises:
        ValueError: it is none, but has a scheme, a port or a path.
    """
    try:
        return str(ipaddress.ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        name = text.encode("idna").decode().lower()
    if not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", name):
        raise ValueError(f"{text!r} is no name of a host")
    return name
