"""The envelope: the bytes of a message as Dramatiq encoded it, and its list.

Layout of version 1, big-endian: one byte of version; 16 bytes, the id under which the message was
pushed; 2 bytes of length and the name of the list (``mail``, or ``mail.DQ`` for a delayed message);
then the message, exactly as it went to Redis. Nothing is decoded here, because the encoder belongs
to the user.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from jobguard.redis_values import json_in

VERSION = 1
_HEAD = struct.Struct(">B16sH")


class UnknownEnvelope(Exception):
    """This jobguard cannot read an envelope of this version. Upgrade the reconciler."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """The content of one push."""

    rid: UUID
    queue: str
    """The list; its name ends in .DQ for a delayed message."""
    data: bytes

    def encode(self) -> bytes:
        """Return the envelope as bytes."""
        name = self.queue.encode()
        return _HEAD.pack(VERSION, self.rid.bytes, len(name)) + name + self.data

    def data_for(self, token: UUID) -> bytes:
        """Return the message under another id: the id of a delivery that a person requeued.

        The id is a part of the message, and a worker acknowledges the id that it reads there. Raise
        UnknownEnvelope if the encoder hides the id.
        """
        if token == self.rid:
            return self.data
        old = str(self.rid).encode()
        if old not in self.data:
            raise UnknownEnvelope("the id of a message cannot be found in its bytes")
        return self.data.replace(old, str(token).encode())

    def renewed(self, token: UUID) -> Envelope:
        """Return this message as a new delivery, with all its retries.

        The number of retries is a part of the message. It stays if the user's encoder wrote the
        message, unless the format is JSON. Raise ValueError if no worker would find the id.
        """
        try:
            data = self.data_for(token)
        except UnknownEnvelope:
            raise ValueError(
                "its encoder hides the id of the message, under which a worker acknowledges it; "
                "send the job again from the application"
            ) from None
        try:
            message = json.loads(data)
            spent = {"retries", "requeue_timestamp", "traceback"} & message["options"].keys()
        except (ValueError, TypeError, KeyError, AttributeError):
            spent = set()
        if spent:
            message["options"] = {k: v for k, v in message["options"].items() if k not in spent}
            data = json.dumps(message, separators=(",", ":")).encode()
        return Envelope(token, self.queue, data)


def decode(envelope: bytes) -> Envelope:
    """Return the content of an envelope; raise UnknownEnvelope."""
    if not envelope or envelope[0] != VERSION:
        raise UnknownEnvelope(f"a Dramatiq envelope of version {envelope[:1].hex() or 'none'}")
    try:
        _, rid, size = _HEAD.unpack_from(envelope)
        end = _HEAD.size + size
        if end > len(envelope):
            raise ValueError("cut short")
        return Envelope(UUID(bytes=rid), envelope[_HEAD.size : end].decode(), envelope[end:])
    except (struct.error, ValueError) as error:
        raise UnknownEnvelope("a damaged Dramatiq envelope") from error


def arguments_in(envelope: bytes) -> dict[str, Any]:
    """Return args and kwargs of a message in JSON, Dramatiq's usual encoder. Raise ValueError."""
    message = json_in(decode(envelope).data)
    return {"args": message["args"], "kwargs": message["kwargs"]}
