"""Values as they stand in Redis, where anything may have written anything."""

from __future__ import annotations

import json
from typing import Any

_LONGEST = 200
_MOST = (1 << 63) - 1


def number_in(raw: object) -> int | None:
    """Return the number that Postgres could hold; None: it is none."""
    try:
        number = int(raw)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        return None
    return number if -_MOST <= number <= _MOST else None


def json_in(raw: bytes | str) -> Any:
    """Parse JSON. Raises ValueError for whatever is none, or nested too deep."""
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deep") from None


def name_in(raw: bytes | str) -> str:
    """Return a name that logs and Postgres can take: cut, without what cannot be encoded."""
    text = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
    return text[:_LONGEST].replace("\x00", "\ufffd").encode(errors="replace").decode()
