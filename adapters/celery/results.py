"""The results of tasks and the counters of chords, if they are in the guarded Redis.

Results are read as JSON, and never unpickled. The counters of a chord that Redis lost are restored from
the chord's parts in the ledger.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, cast

import redis

from jobguard.adapters.celery.envelope import UnknownEnvelope, as_part, decode, fresh
from jobguard.adapters.celery.layout import Layout
from jobguard.clients import address_of
from jobguard.log import log_event
from jobguard.model import EndedPart, OpenJoin, Part, Presence
from jobguard.redis_values import json_in
from jobguard.scripts import Script, chunks

_FINAL = {
    "SUCCESS": Presence.FINISHED,
    "FAILURE": Presence.FAILED,
    "REVOKED": Presence.CANCELLED,
}
_KILLED = "WorkerLostError"
"""The error that Celery stores for a killed worker: the ledger decides whether the task has failed."""
_A_CALL = 1_000
_A_TRIP = 50


@dataclass(frozen=True, slots=True)
class Results:
    """The results of one app, in a db of the same Redis server."""

    db: int
    tasks: str
    """The prefix of the key of a task's result."""
    groups: str
    """The prefix of the key of a chord."""
    ordered: bool = True
    """True: a chord's results are a zset, by their place in the header. False: a list."""
    expires: int = 0
    """Seconds for which a chord's keys are kept; 0 stands for ever."""
    json: bool = True

    def as_fields(self) -> dict[str, object]:
        """Return the fields in a form that JSON can store."""
        return asdict(self)

    @classmethod
    def from_fields(cls, fields: object) -> Results | None:
        """Return the results that these fields describe; None if they cannot be understood."""
        if not isinstance(fields, Mapping):
            return None
        try:
            return cls(
                db=int(fields["db"]),
                tasks=str(fields["tasks"]),
                groups=str(fields["groups"]),
                ordered=bool(fields["ordered"]),
                expires=int(fields["expires"]),
                json=bool(fields["json"]),
            )
        except (KeyError, TypeError, ValueError):
            return None


def results_of(backend: Any, broker: str) -> Results | None:
    """Return where a Redis backend keeps its results; None if not on the broker's server."""
    fields = backend.__dict__.get("_jobguard_results")
    if fields is None or fields[0] != broker:
        fields = backend.__dict__["_jobguard_results"] = (broker, _find(backend, broker))
    found: Results | None = fields[1]
    return found


def _find(backend: Any, broker: str) -> Results | None:
    if not isinstance(backend.client, redis.Redis):
        return None  # a user's test double
    address = address_of(backend.client)
    server, _, db = address.rpartition("/")
    if server != broker.rpartition("/")[0]:
        return None
    expires = getattr(backend, "chord_expires", None) or backend.expires or 0
    return Results(
        db=int(db),
        tasks=_text(backend.get_key_for_task("-"))[:-1],
        groups=_text(backend.get_key_for_group("-"))[:-1],
        ordered=bool(getattr(backend, "_chord_zset", True)),
        expires=int(expires),
        json=backend.serializer == "json" and not getattr(backend, "compression", None),
    )


def _text(key: Any) -> str:
    return key.decode() if isinstance(key, bytes) else str(key)


def ends_of(
    client: redis.Redis, results: Results, wanted: Mapping[str, float]
) -> dict[str, Presence]:
    """Return how these tasks ended, for those with a final result.

    ``wanted``: by id, the time before which a result belongs to an earlier life of the id.
    """
    metas = read(client, results, list(wanted))
    ends = ((id, _end_in(meta, wanted[id])) for id, meta in metas.items())
    return {id: end for id, end in ends if end is not None}


def read(client: redis.Redis, results: Results, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the stored results of these tasks, if they are JSON. Raise RedisError."""
    found: dict[str, dict[str, Any]] = {}
    for some in chunks(ids, _A_CALL) if results.json else ():
        values: Any = cast(Any, client).mget([results.tasks + id for id in some])
        for id, raw in zip(some, values, strict=True):
            try:
                meta = json_in(raw or b"null")
            except ValueError:
                continue
            if isinstance(meta, dict):
                found[id] = meta
    return found


def _end_in(meta: Mapping[str, Any], since: float) -> Presence | None:
    if done_at(meta.get("date_done")) < since:
        return None
    result = meta.get("result")
    if isinstance(result, dict) and result.get("exc_type") == _KILLED:
        return None
    return _FINAL.get(str(meta.get("status")))


def done_at(text: object) -> float:
    """Return the time at which a stored result ended; -inf if it cannot be read."""
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return float("-inf")
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


class Rejoin:
    """Restore the chords of one broker."""

    def __init__(self, client: redis.Redis, layout: Layout, *, db: int) -> None:
        self._script = Script(client, __package__, "rejoin.lua")
        self._layout = layout
        self._db = db

    def __call__(self, joins: Sequence[OpenJoin], *, finish: bool, deadline: float) -> None:
        """Put back the missing counters of these; ``finish``: have the last part of each counted again."""
        calls = []
        for join in joins:
            try:
                call = self._call(join, finish=finish, deadline=deadline)
            except (UnknownEnvelope, ValueError, KeyError, TypeError) as error:
                log_event("join_unreadable", join=join.id, error=error)
                continue
            if call is not None:
                calls.append(call)
        for some in chunks(calls, _A_TRIP):
            for answer in self._script.run(some):
                if isinstance(answer, Exception):
                    raise answer

    def _call(
        self, join: OpenJoin, *, finish: bool, deadline: float
    ) -> tuple[list[Any], list[Any]] | None:
        results = Results.from_fields(json.loads(join.state)) if join.state else None
        if results is None or not join.size:
            return None  # the process that opened it did not report where its results are
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


def part_of(group: str, place: Any, job_id: str, meta: Mapping[str, Any]) -> Part | None:
    """Return the part that a completed task added to its chord, from its stored result."""
    if meta.get("status") != "SUCCESS" or "result" not in meta:
        return None
    line = json.dumps([group, job_id, place])
    member = json.dumps([1, job_id, "SUCCESS", meta["result"]])
    return Part(group, f"{line}\n{member}".encode())


def _fields(part: EndedPart) -> tuple[str, str, bytes]:
    """Return a part as the script takes it: its member, its place in the header, and its result."""
    line, result = part.state.split(b"\n", 1)
    *_, job_id, place = json.loads(line)
    score = "+inf" if place is None else str(place)
    return f"{job_id}:{score}", score, result
