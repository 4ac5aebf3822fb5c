"""Whether the host of an address is this machine, or of a private network. Pure: names are not resolved."""

from __future__ import annotations

import ipaddress
import re
import unicodedata

NUMBER = re.compile(r"0[xX][0-9a-fA-F]*|[0-9]+")
PRIVATE = ("localhost", "local", "internal")  # the last parts of names that no public server answers for


def is_near(host: str) -> bool:
    """Whether a host's name or address is this machine's, or of a private network.

    Whatever ends in a number is an address, in any of the ways that the C library reads one: ``127.1``, ``0x7f.1`` and
    ``2130706433`` are 127.0.0.1. One that it cannot read is near too: no public name looks like that.
    """
    # as clients make names plain: full-width digits and dots are digits and dots
    plain = unicodedata.normalize("NFKC", host).replace("\u3002", ".").rstrip(".").lower()
    if ":" in plain:
        address = _version6(plain)
        return address is None or _private(address.ipv4_mapped or address)
    parts = plain.split(".")
    if NUMBER.fullmatch(parts[-1]):
        value = _version4(parts)
        return value is None or _private(ipaddress.IPv4Address(value))
    return parts[-1] in PRIVATE


def _private(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return not address.is_global or address.is_reserved or address.is_multicast


def _version6(text: str) -> ipaddress.IPv6Address | None:
    try:
        return ipaddress.IPv6Address(text)
    except ValueError:
        return None


def _version4(parts: list[str]) -> int | None:
    """The number that one to four parts are, octal, decimal or hexadecimal: the last fills all bytes that are left."""
    if len(parts) > 4 or not all(NUMBER.fullmatch(part) for part in parts):
        return None
    try:
        *first, last = (_number(part) for part in parts)
    except ValueError:  # 08, 0x
        return None
    if any(value > 255 for value in first) or last >= 256 ** (4 - len(first)):
        return None
    return sum(value << (24 - 8 * at) for at, value in enumerate(first)) + last


def _number(part: str) -> int:
    if part.startswith("0x"):
        return int(part[2:], 16)
    return int(part, 8 if part.startswith("0") else 10)
