"""Parse values of Redis, where any program may have written any value."""

from __future__ import annotations

import json
import zlib
from typing import Any

UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError)
"""What code raises that reads a value of another form than it expects."""
_LONGEST = 200
_MOST = (1 << 63) - 1
_INFLATED = 64 << 20
"""Bytes that a compressed body may have: a small one may inflate to any size."""


def number_in(raw: object) -> int | None:
    """Return the value as an integer that Postgres can store; None: it is no such integer."""
    try:
        number = int(raw)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        return None
    return number if -_MOST <= number <= _MOST else None


def json_in(raw: bytes | str) -> Any:
    """Parse JSON. Raises ValueError if the text is no JSON or is nested too deep."""
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deep") from None


def inflated(raw: bytes) -> bytes:
    """Decompress a body. Raises zlib.error if it is not compressed, ValueError if it is too large."""
    stream = zlib.decompressobj()
    body = stream.decompress(raw, _INFLATED)
    if stream.unconsumed_tail:
        raise ValueError("too large")
    return body


def name_in(raw: bytes | str) -> str:
    """Return the name cut, and with characters replaced that logs and Postgres cannot store."""
    text = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
    return text[:_LONGEST].replace("\x00", "\ufffd").encode(errors="replace").decode()


def database_of(address: str) -> str:
    """Return the number of the database of an address."""
    return address.rpartition("/")[2]
