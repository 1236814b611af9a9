"""The envelope: the bytes of a delivery as RQ wrote them, and the routing of its push.

Layout of version 1, big-endian: one byte of version; 4 bytes of length and a JSON header (the
``Routing``); then the fields of the hash, each as 2 bytes of length and the name, 4 bytes of length
and the value, exactly as RQ sent them to Redis. This module never unpickles anything.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple

from jobguard.redis_values import inflated, json_in

VERSION = 1
_HEAD = struct.Struct(">BI")
_NAME = struct.Struct(">H")
_VALUE = struct.Struct(">I")


class UnknownEnvelope(Exception):
    """Report an envelope that this version of jobguard cannot read. Upgrade the reconciler."""


class Mode(StrEnum):
    """Where a push writes the job."""

    QUEUED = "queued"
    SCHEDULED = "scheduled"
    DEFERRED = "deferred"
    RATE_LIMITED = "rate_limited"


class Routing(NamedTuple):
    """The changes of a push besides the hash."""

    mode: Mode = Mode.QUEUED
    at_front: bool = False
    score: str = ""
    """The score in the sorted set of the mode."""
    parents: tuple[str, ...] = ()
    """The ids of the jobs that this job waits for."""
    allow_failure: bool = False
    group: str = ""
    rate_key: str = ""
    rate_concurrency: int = 0


_PLAIN = Routing()
_DEFAULT = _PLAIN._asdict()


def encode(routing: Routing, fields: Mapping[str, bytes]) -> bytes:
    """Return the envelope of a push."""
    header = b"{}" if routing == _PLAIN else _header(routing)
    parts = [_HEAD.pack(VERSION, len(header)), header]
    for name, value in fields.items():
        parts += (_named(name), _VALUE.pack(len(value)), value)
    return b"".join(parts)


def _header(routing: Routing) -> bytes:
    unusual = {
        name: value for name in _DEFAULT if (value := getattr(routing, name)) != _DEFAULT[name]
    }
    return json.dumps(unusual, separators=(",", ":")).encode()


@lru_cache(maxsize=256)  # RQ has about forty names
def _named(name: str) -> bytes:
    raw = name.encode()
    return _NAME.pack(len(raw)) + raw


def amended(envelope: bytes, fields: Mapping[str, bytes]) -> bytes:
    """Return the envelope with new values of these fields; return it unchanged if it is unreadable."""
    try:
        routing, before = decode(envelope)
    except UnknownEnvelope:
        return envelope
    return encode(routing, {**{name.decode(): value for name, value in before.items()}, **fields})


def decode(envelope: bytes) -> tuple[Routing, dict[bytes, bytes]]:
    """Return the routing and the fields of an envelope; raise UnknownEnvelope if it is unreadable."""
    if not envelope or envelope[0] != VERSION:
        raise UnknownEnvelope(f"an RQ envelope of version {envelope[:1].hex() or 'none'}")
    try:
        return _decode(envelope)
    except (struct.error, ValueError, TypeError, KeyError) as error:
        raise UnknownEnvelope("a damaged RQ envelope") from error


def _decode(envelope: bytes) -> tuple[Routing, dict[bytes, bytes]]:
    _, size = _HEAD.unpack_from(envelope)
    at = _HEAD.size + size
    header = {**_DEFAULT, **json.loads(_slice(envelope, _HEAD.size, at))}
    header.update(mode=Mode(header["mode"]), parents=tuple(header["parents"]))
    fields: dict[bytes, bytes] = {}
    while at < len(envelope):
        (size,) = _NAME.unpack_from(envelope, at)
        name = _slice(envelope, at := at + _NAME.size, at := at + size)
        (size,) = _VALUE.unpack_from(envelope, at)
        fields[name] = _slice(envelope, at := at + _VALUE.size, at := at + size)
    return Routing(**header), fields


def _slice(envelope: bytes, start: int, end: int) -> bytes:
    if end > len(envelope):
        raise ValueError("cut short")
    return envelope[start:end]


def arguments_in(envelope: bytes) -> dict[str, Any]:
    """Return args and kwargs of a job with a JSON serializer. Raise ValueError or UnknownEnvelope.

    Pickled data is no JSON, and stays unread.
    """
    data = decode(envelope)[1].get(b"data", b"")
    with suppress(zlib.error):  # RQ before 1.0 did not compress it
        data = inflated(data)
    _, _, args, kwargs = json_in(data)
    return {"args": args, "kwargs": kwargs}
