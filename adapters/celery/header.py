"""The headers that we put on a message: which delivery it is, and which worker has taken it.

``jobguard`` is the token in hex, written anew at every publish: retries inherit the headers of the
message that they come from. ``jobguard-worker`` stands only in what a guarded worker puts into
``unacked``: its session in hex. Protocol 1, which has no headers of its own, carries both as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from jobguard.redis_values import json_in

TOKEN = "jobguard"
WORKER = "jobguard-worker"
PART = "jobguard-part"
"""On the last part of a chord that is told to the library again: what it left, in base64."""

DEAD = "jobguard-dead"
"""On a message that is dead: its worker tells Celery that it has failed, and does not run it."""

# A quote inside of a JSON string is escaped: what stands there is no key.
_TOKEN = re.compile(rb'(?<!\\)"jobguard": ?"([0-9a-f]{32})"')
_WORKER = re.compile(rb'(?<!\\)"jobguard-worker": ?"([0-9a-f]{32})"')


def token_of(headers: Mapping[str, Any] | None) -> UUID | None:
    """Return the token that a message's headers carry; None: nobody guarded that push."""
    text = (headers or {}).get(TOKEN)
    try:
        return UUID(hex=text) if isinstance(text, str) and len(text) == 32 else None
    except ValueError:
        return None


def token_in(raw: bytes) -> bytes | None:
    """Return the token in hex of a message as it stands in Redis, in a list or in ``unacked``."""
    return _only(_TOKEN, TOKEN, raw)


def holder_in(raw: bytes) -> str:
    """Return the session in hex of the guarded worker that has taken this message; "": none says so."""
    return (_only(_WORKER, WORKER, raw) or b"").decode()


def _only(pattern: re.Pattern[bytes], name: str, raw: bytes) -> bytes | None:
    found = pattern.findall(raw)
    if len(found) == 1:
        return bytes(found[0])
    if not found:
        return None
    # A user's own header of headers holds another one: only the parsed message tells them apart.
    try:
        message = json_in(raw)
    except ValueError:
        return None
    message = message[0] if isinstance(message, list) and message else message
    headers = message.get("headers") if isinstance(message, dict) else None
    text = headers.get(name) if isinstance(headers, dict) else None
    return text.encode() if isinstance(text, str) else None
