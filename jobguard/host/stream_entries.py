"""The bytes of a spool entry in the stream: what processes of several versions write and read.

Layout of version 1, big-endian: one byte of version; 4 bytes of length and a JSON header with the
kind and the short fields; then the one long field (an envelope, or the state of a join), unchanged.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from jobguard.host.spool import Adoptable, Cancelled, Entry, JoinOpened, Released, Unsent
from jobguard.model import Delivery, End, Outcome, Parent, Part
from jobguard.store.protocols import ClaimRequest

VERSION = 1
_HEAD = struct.Struct(">BI")


class UnknownEntry(ValueError):
    """An entry that this version of jobguard cannot read. Upgrade the reconciler."""


def encode(entry: Entry) -> bytes:
    """Return the bytes of an entry."""
    kind, fields, long = _FIELDS[type(entry)](entry)
    short = {name: value for name, value in fields.items() if value is not None}
    header = json.dumps({"kind": kind, **short}, separators=(",", ":")).encode()
    return b"".join((_HEAD.pack(VERSION, len(header)), header, long))


def decode(raw: bytes) -> Entry:
    """Return the entry. Raises UnknownEntry."""
    if not raw or raw[0] != VERSION:
        raise UnknownEntry(f"an entry of version {raw[:1].hex() or 'none'}")
    try:
        _, size = _HEAD.unpack_from(raw)
        fields = json.loads(raw[_HEAD.size : _HEAD.size + size])
        return _ENTRIES[fields.pop("kind")](fields, raw[_HEAD.size + size :])
    except (struct.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnknownEntry(f"a damaged entry, or one of a later version: {error!r}") from error


_Written = tuple[str, dict[str, Any], bytes]


def _of_delivery(entry: Delivery) -> _Written:
    parent = entry.parent
    fields = {
        "token": entry.token.hex,
        "job_id": entry.job_id,
        "queue": entry.queue,
        "task": entry.task,
        "priority": entry.priority or None,
        "attempt": entry.attempt,
        "due_at": entry.due_at,
        "expires_at": entry.expires_at,
        "key": entry.key,
        "trace": entry.trace,
        "recover": entry.recover,
        "parent": None if parent is None else _of_parent(parent),
        "fresh": entry.fresh or None,
        "derived": entry.derived or None,
        "closes": entry.closes,
    }
    return "record", fields, entry.envelope


def _delivery(fields: dict[str, Any], envelope: bytes) -> Delivery:
    parent = fields.pop("parent", None)
    if parent is not None:
        parent = _parent(parent)
    token = UUID(fields.pop("token"))
    return Delivery(token=token, envelope=envelope, parent=parent, **fields)


def _of_parent(parent: Parent) -> list[Any]:
    worker = parent.worker and parent.worker.hex
    return [parent.token.hex, parent.claim, parent.outcome.value, worker, parent.error]


def _parent(values: Sequence[Any]) -> Parent:
    token, claim, outcome, worker, error = values
    return Parent(UUID(token), claim, Outcome(outcome), worker and UUID(worker), error)


def encode_parent(parent: Parent) -> bytes:
    """Return the note of a record that replaces this delivery."""
    return json.dumps(_of_parent(parent)).encode()


def decode_parent(note: bytes) -> Parent | None:
    """Return the delivery that a record replaces; None: the note is damaged or of a later version."""
    try:
        return _parent(json.loads(note))
    except (ValueError, TypeError):
        return None


def _of_end(entry: End) -> _Written:
    fields = {
        "token": entry.token.hex,
        "number": entry.number,
        "outcome": entry.outcome.value,
        "worker": entry.worker.hex,
        "job_id": entry.job_id,
        "queue": entry.queue,
        "task": entry.task,
        "ended_at": entry.ended_at,
        "error": entry.error,
        "join": entry.part.join if entry.part is not None else None,
    }
    return "end", fields, entry.part.state if entry.part is not None else b""


def _end(fields: dict[str, Any], state: bytes) -> End:
    join = fields.pop("join", None)
    return End(
        token=UUID(fields.pop("token")),
        outcome=Outcome(fields.pop("outcome")),
        worker=UUID(fields.pop("worker")),
        part=None if join is None else Part(join, state),
        **fields,
    )


def _of_cancelled(entry: Cancelled) -> _Written:
    fields = {
        "tokens": [token.hex for token in entry.tokens],
        "job_ids": list(entry.job_ids),
        "queue": entry.queue,
        "until": entry.until.hex,
    }
    return "cancel", fields, b""


def _cancelled(fields: dict[str, Any], _: bytes) -> Cancelled:
    """Return the cancel; its ids and queue mean deliveries with tokens up to ``until``.

    The records that were in the stream before it are written just before it, so that the time of a
    record does not show whether the cancel means it.
    """
    return Cancelled(
        tokens=[UUID(token) for token in fields["tokens"]],
        job_ids=[str(id) for id in fields["job_ids"]],
        queue=fields.get("queue"),
        made_at=math.inf,
        until=UUID(fields["until"]),
    )


def _of_join(entry: JoinOpened) -> _Written:
    fields = {"join": entry.join, "size": entry.size, "closed": entry.closed or None}
    return "join", fields, entry.state


def _of_adoptable(entry: Adoptable) -> _Written:
    fields = {"token": entry.token.hex, "job_id": entry.job_id, "queue": entry.queue}
    return "reference", fields, b""


def _of_claim(entry: ClaimRequest) -> _Written:
    fields = {
        "token": entry.token.hex,
        "nonce": entry.nonce.hex,
        "worker": entry.worker.hex,
        "pid": entry.pid,
        "namespace": entry.namespace,
        "worker_timeout": entry.worker_timeout,
        "crash_budget": entry.crash_budget,
    }
    return "claim", fields, b""


def _claim(fields: dict[str, Any], _: bytes) -> ClaimRequest:
    ids = {name: UUID(fields.pop(name)) for name in ("token", "nonce", "worker")}
    return ClaimRequest(**{**fields, **ids})


def _of_released(entry: Released) -> _Written:
    fields = {
        "token": entry.token.hex,
        "worker": entry.worker.hex,
        "number": entry.number,
        "interrupted": entry.interrupted or None,
    }
    return "release", fields, b""


_FIELDS: dict[type, Callable[[Any], _Written]] = {
    Delivery: _of_delivery,
    End: _of_end,
    Cancelled: _of_cancelled,
    JoinOpened: _of_join,
    Adoptable: _of_adoptable,
    ClaimRequest: _of_claim,
    Released: _of_released,
    Unsent: lambda entry: ("unsent", {"tokens": [token.hex for token in entry.tokens]}, b""),
}
_ENTRIES: dict[str, Callable[[dict[str, Any], bytes], Entry]] = {
    "record": _delivery,
    "end": _end,
    "cancel": _cancelled,
    "join": lambda fields, state: JoinOpened(state=state, **fields),
    "reference": lambda fields, _: Adoptable(UUID(fields.pop("token")), **fields),
    "unsent": lambda fields, _: Unsent([UUID(token) for token in fields["tokens"]]),
    "claim": _claim,
    "release": lambda fields, _: Released(
        UUID(fields.pop("token")), UUID(fields.pop("worker")), **fields
    ),
}
