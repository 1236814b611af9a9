"""What Celery counts of a chord, put back from what the ledger knows of its parts."""

from __future__ import annotations

import base64
import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobguard.adapters.celery.envelope import UnknownEnvelope, as_part, decode, fresh
from jobguard.adapters.celery.layout import Layout
from jobguard.adapters.celery.results import Results
from jobguard.model import EndedPart, OpenJoin, Part
from jobguard.redis_values import json_in
from jobguard.scripts import Script

if TYPE_CHECKING:
    import redis

log = logging.getLogger("jobguard")

_A_TRIP = 50
_DEFLATED = "application/x-gzip"
"""What kombu calls zlib's."""


class Rejoin:
    """Puts back the chords of one broker."""

    def __init__(self, client: redis.Redis, layout: Layout, *, db: int) -> None:
        self._script = Script(client, __package__, "rejoin.lua")
        self._layout = layout
        self._db = db

    def __call__(self, joins: Sequence[OpenJoin], *, finish: bool, deadline: float) -> None:
        """Put back what is missing of these; ``finish``: have the last part of each told again."""
        calls = []
        for join in joins:
            try:
                call = self._call(join, finish=finish, deadline=deadline)
            except (UnknownEnvelope, ValueError, KeyError, TypeError) as error:
                log.warning(
                    "what Celery counted of chord %s cannot be put back: %s", join.id, error
                )
                continue
            if call is not None:
                calls.append(call)
        for at in range(0, len(calls), _A_TRIP):
            for answer in self._script.run(calls[at : at + _A_TRIP]):
                if isinstance(answer, Exception):
                    raise answer

    def _call(
        self, join: OpenJoin, *, finish: bool, deadline: float
    ) -> tuple[list[Any], list[Any]] | None:
        results = Results.from_fields(json.loads(join.state)) if join.state else None
        if results is None or not join.size:
            return None  # nobody opened it who could say where it is
        parts = list(join.parts)
        again, where = b"", ""
        if finish:
            last = next((part for part in reversed(parts) if part.envelope), None)
            if last is None:
                return None
            parts.remove(last)
            parts.append(last)
            routing, message = decode(last.envelope)
            again = as_part(fresh(message, last.token), last.state)
            where = self._layout.list_of(routing.queue, routing.step)
        keys = [f"{results.groups}{join.id}{suffix}" for suffix in (".s", ".j", ".d", ".c", ".t")]
        return [*keys, where], [
            repr(deadline),
            results.db,
            self._db,
            max(join.size, len(parts)) if finish else join.size,
            results.expires,
            int(results.ordered),
            again,
            *(field for part in parts for field in _fields(part)),
        ]


def group_of(envelope: bytes) -> tuple[str, Any] | None:
    """Return the chord that a task counts for, and its place in it; None: for none that can be read.

    Whether it counts for one stands in its body, which is read if it is JSON, and not unpickled.
    """
    found = _read(envelope)
    if found is None:
        return None
    headers, embedded = found
    group = headers.get("group")
    return (str(group), headers.get("group_index")) if group and embedded.get("chord") else None


def is_heard_of(envelope: bytes) -> bool:
    """Whether an error callback or a chord would hear of a failure of this task, as far as is known."""
    found = _read(envelope)
    return found is None or bool(found[1].get("errbacks") or found[1].get("chord"))


def _read(envelope: bytes) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the headers of a message, and what its body says of other tasks; None: it is no JSON."""
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
        _, _, embedded = json_in(zlib.decompress(body) if deflated else body)
        return dict(headers), dict(embedded)
    except (UnknownEnvelope, ValueError, KeyError, TypeError, AttributeError, zlib.error):
        return None


def part_of(group: str, place: Any, job_id: str, meta: Mapping[str, Any]) -> Part | None:
    """Return what a completed task left to its chord, from its stored result."""
    if meta.get("status") != "SUCCESS" or "result" not in meta:
        return None
    line = json.dumps([group, job_id, place])
    member = json.dumps([1, job_id, "SUCCESS", meta["result"]])
    return Part(group, f"{line}\n{member}".encode())


def _fields(part: EndedPart) -> tuple[str, str, bytes]:
    """Return a part as the script takes it: who it is of, its place in the header, and its result."""
    line, result = part.state.split(b"\n", 1)
    *_, job_id, place = json.loads(line)
    score = "+inf" if place is None else str(place)
    return f"{job_id}:{score}", score, result
