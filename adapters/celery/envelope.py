"""The envelope: a message as kombu wrote it, and the list that the message went to.

Layout of version 1, big-endian: one byte of version; 4 bytes of length and a JSON header (the
``Routing``); then the message. The message is the same JSON as in Redis, except for its
``delivery_tag``: the library draws a new one at every push, and here it is the token. Nothing is
ever unpickled here.

Our headers on a message name its delivery and the worker that has taken it. ``jobguard`` is the
token in hex, written at every publish: a retry inherits the headers of the message that it comes from.
``jobguard-worker`` is only on messages that a guarded worker puts into ``unacked``: its session in hex.
Protocol 1, which has no headers of its own, carries both as well.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from uuid import UUID, uuid4

from jobguard.redis_values import inflated, json_in

VERSION = 1
_HEAD = struct.Struct(">BI")
_DEFLATED = "application/x-gzip"
"""kombu's name of zlib."""

TOKEN = "jobguard"
WORKER = "jobguard-worker"
PART = "jobguard-part"
"""On the last part of a chord that the library must count again: the part's result, in base64."""

DEAD = "jobguard-dead"
"""On the message of a dead task: its worker reports to Celery that it failed, and does not run it."""

# A quote inside of a JSON string is escaped, so a key inside of a string does not match.
_VALUE = re.compile(rb'(?<!\\)"[a-z-]+": ?"([0-9a-f]{32})"')


class UnknownEnvelope(Exception):
    """The envelope has a version that this jobguard cannot read. Upgrade the reconciler."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Where a push put the message."""

    queue: str
    step: int = 0
    """The number of the queue's list, which follows from the message's priority."""
    exchange: str = ""
    """The name of the exchange, if it has one, with the binding that led to the queue."""
    binding: str = ""


def encode(routing: Routing, message: bytes) -> bytes:
    """Return the envelope of a push."""
    return _head(routing) + message


@lru_cache(maxsize=256)
def _head(routing: Routing) -> bytes:
    fields: dict[str, object] = {"queue": routing.queue}
    if routing.step:
        fields["step"] = routing.step
    if routing.exchange:
        fields["binding"] = [routing.exchange, routing.binding]
    header = json.dumps(fields, separators=(",", ":")).encode()
    return _HEAD.pack(VERSION, len(header)) + header


def decode(envelope: bytes) -> tuple[Routing, bytes]:
    """Return the routing and the message of an envelope. Raise UnknownEnvelope."""
    if not envelope or envelope[0] != VERSION:
        raise UnknownEnvelope(f"a Celery envelope of version {envelope[:1].hex() or 'none'}")
    try:
        _, size = _HEAD.unpack_from(envelope)
        at = _HEAD.size + size
        fields = json.loads(envelope[_HEAD.size : at])
        exchange, binding = fields.get("binding", ("", ""))
        routing = Routing(str(fields["queue"]), int(fields.get("step", 0)), exchange, binding)
    except (struct.error, ValueError, TypeError, KeyError) as error:
        raise UnknownEnvelope("a damaged Celery envelope") from error
    if at >= len(envelope):
        raise UnknownEnvelope("a damaged Celery envelope")
    return routing, envelope[at:]


def fresh(message: bytes, token: UUID) -> bytes:
    """Return a message for a new push: as this delivery, and with a tag of its own.

    Two copies with one tag would share one entry in ``unacked``, and the first acknowledgement
    would remove both. The token differs from the one in the message if a person requeued the
    delivery.
    """
    before = token_in(message)
    if before is None:
        raise UnknownEnvelope("a Celery envelope without a token")
    was = UUID(hex=before.decode())
    return message.replace(str(was).encode(), str(uuid4()).encode()).replace(
        before, token.hex.encode()
    )


def renewed(envelope: bytes) -> bytes:
    """Return the envelope of a delivery that a person requeued: its count of retries starts at 0 again."""
    routing, message = decode(envelope)
    fields = json.loads(message)
    if not fields["headers"].get("retries"):
        return envelope
    fields["headers"]["retries"] = 0
    return encode(routing, json.dumps(fields).encode())


def as_dead(message: bytes) -> bytes:
    """Return the message of a dead task, which a worker reports as failed and does not run."""
    fields = b'"%b": "1", "%b": "' % (DEAD.encode(), TOKEN.encode())
    return message.replace(b'"%b": "' % TOKEN.encode(), fields, 1)


def as_part(message: bytes, state: bytes) -> bytes:
    """Return the message of a chord's last part, with its result: a worker counts it, without a run."""
    fields = json.dumps(b64encode(state).decode()).encode()
    return message.replace(
        b'"%b": "' % TOKEN.encode(),
        b'"%b": %b, "%b": "' % (PART.encode(), fields, TOKEN.encode()),
        1,
    )


def token_of(headers: Mapping[str, Any] | None) -> UUID | None:
    """Return the token in a message's headers; None if the push was not guarded."""
    text = (headers or {}).get(TOKEN)
    try:
        return UUID(hex=text) if isinstance(text, str) and len(text) == 32 else None
    except ValueError:
        return None


def token_in(raw: bytes) -> bytes | None:
    """Return the token in hex of a message as stored in Redis, in a list or in ``unacked``."""
    return _only(TOKEN, raw)


def holder_in(raw: bytes) -> str:
    """Return the session in hex of the guarded worker that took this message; "" without that header."""
    return (_only(WORKER, raw) or b"").decode()


def _only(name: str, raw: bytes) -> bytes | None:
    # A leader reads each message of a queue: find() needs a tenth of the time of a search for the pattern.
    key = b'"%b":' % name.encode()
    found, at = [], raw.find(key)
    while at >= 0:
        if (value := _VALUE.match(raw, at)) is not None:
            found.append(value[1])
        at = raw.find(key, at + len(key))
    if len(found) == 1:
        return found[0]
    if not found:
        return None
    # A user's own header contains another copy: only the parsed message tells the two apart.
    try:
        message = json_in(raw)
    except ValueError:
        return None
    message = message[0] if isinstance(message, list) and message else message
    headers = message.get("headers") if isinstance(message, dict) else None
    text = headers.get(name) if isinstance(headers, dict) else None
    return text.encode() if isinstance(text, str) else None


def group_of(envelope: bytes) -> tuple[str, Any] | None:
    """Return the chord that a task counts for, and its place in it; None if unknown.

    The body names the chord. It is read if it is JSON, and never unpickled.
    """
    found = _read(envelope)
    if found is None:
        return None
    headers, embedded = found
    group = headers.get("group")
    return (str(group), headers.get("group_index")) if group and embedded.get("chord") else None


def has_listeners(envelope: bytes) -> bool:
    """Return True if an error callback or a chord may wait for a failure of this task."""
    found = _read(envelope)
    return found is None or bool(found[1].get("errbacks") or found[1].get("chord"))


def arguments_in(envelope: bytes) -> dict[str, Any]:
    """Return args and kwargs of a task whose body is JSON. Raise ValueError for another one."""
    found = _body(envelope)
    if found is None:
        raise ValueError("the body is not JSON")
    body = found[1]
    if isinstance(body, dict):  # protocol 1
        return {"args": body["args"], "kwargs": body["kwargs"]}
    return {"args": body[0], "kwargs": body[1]}


def _read(envelope: bytes) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return a message's headers, and the options in its body that name other tasks; None if not JSON."""
    found = _body(envelope)
    try:
        if found is None:
            return None
        headers, (_, _, embedded) = found
        return dict(headers), dict(embedded)
    except (ValueError, TypeError):
        return None


def _body(envelope: bytes) -> tuple[dict[str, Any], Any] | None:
    """Return a message's headers and its body; None if the body is not JSON."""
    try:
        _, raw = decode(envelope)
        message = json_in(raw)
        headers = message["headers"]
        if message["content-type"] != "application/json":
            return None
        body = message["body"]
        if message["properties"].get("body_encoding") == "base64":
            body = base64.b64decode(body)
        deflated = headers.get("compression") == _DEFLATED
        return headers, json_in(inflated(body) if deflated else body)
    except (UnknownEnvelope, ValueError, KeyError, TypeError, AttributeError, zlib.error):
        return None
