"""Checks host names of servers."""

from __future__ import annotations

import ipaddress
import re


def is_loopback(host: str) -> bool:
    """True if the address is reachable from this host alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(text: str) -> str:
    """Normalise a name or address to the form of the header `Host`, without a port.

    Raises:
        ValueError: it has a scheme, a port or a path.
    """
    try:
        return str(ipaddress.ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        name = text.encode("idna").decode().lower()
    if not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", name):
        raise ValueError(f"{text!r} is not a host name")
    return name
