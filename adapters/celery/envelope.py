"""The envelope: a message as kombu wrote it, and the list that it went to.

Layout of version 1, big-endian: one byte of version; 4 bytes of length and a JSON header (the
``Routing``); then the message, the very JSON that stands in Redis, but that its ``delivery_tag``,
which the library draws anew at every push, is the token. Nothing is ever unpickled here.
"""

from __future__ import annotations

import json
import struct
from base64 import b64encode
from dataclasses import dataclass
from uuid import UUID, uuid4

from jobguard.adapters.celery.header import DEAD, PART, TOKEN, token_in

VERSION = 1
_HEAD = struct.Struct(">BI")


class UnknownEnvelope(Exception):
    """This envelope is of a version that this jobguard cannot read. Upgrade the reconciler."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Where a push put the message."""

    queue: str
    step: int = 0
    """Which of the queue's lists, by the priority that it is for."""
    exchange: str = ""
    """Named, if it was not the anonymous one: then the binding by which it found the queue."""
    binding: str = ""


def encode(routing: Routing, message: bytes) -> bytes:
    """Return the envelope of a push."""
    fields: dict[str, object] = {"queue": routing.queue}
    if routing.step:
        fields["step"] = routing.step
    if routing.exchange:
        fields["binding"] = [routing.exchange, routing.binding]
    header = json.dumps(fields, separators=(",", ":")).encode()
    return b"".join((_HEAD.pack(VERSION, len(header)), header, message))


def decode(envelope: bytes) -> tuple[Routing, bytes]:
    """Return what an envelope says; raises UnknownEnvelope."""
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
    """Return a message as it is pushed anew: as this delivery, and with a tag of its own.

    Two copies of one tag would be one entry in ``unacked``, and the first to be acked would take the
    other with it. The token differs from the one in the message where a person had it requeued.
    """
    before = token_in(message)
    if before is None:
        raise UnknownEnvelope("a Celery envelope without a token")
    was = UUID(hex=before.decode())
    return message.replace(str(was).encode(), str(uuid4()).encode()).replace(
        before, token.hex.encode()
    )


def renewed(envelope: bytes) -> bytes:
    """Return the envelope of what a person has requeued: its retries are before it again."""
    routing, message = decode(envelope)
    fields = json.loads(message)
    if not fields["headers"].get("retries"):
        return envelope
    fields["headers"]["retries"] = 0
    return encode(routing, json.dumps(fields).encode())


def as_dead(message: bytes) -> bytes:
    """Return the message of a dead task, to be told as failed and not run."""
    fields = b'"%b": "1", "%b": "' % (DEAD.encode(), TOKEN.encode())
    return message.replace(b'"%b": "' % TOKEN.encode(), fields, 1)


def as_part(message: bytes, state: bytes) -> bytes:
    """Return the message of a chord's last part, to be counted and not run, with what it left."""
    fields = json.dumps(b64encode(state).decode()).encode()
    return message.replace(
        b'"%b": "' % TOKEN.encode(),
        b'"%b": %b, "%b": "' % (PART.encode(), fields, TOKEN.encode()),
        1,
    )
