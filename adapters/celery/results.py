"""Where the results of tasks are, if in the Redis that is guarded; read as JSON, never unpickled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, cast

import redis

from jobguard.clients import address_of
from jobguard.model import Presence
from jobguard.redis_values import json_in

_FINAL = {
    "SUCCESS": Presence.FINISHED,
    "FAILURE": Presence.FAILED,
    "REVOKED": Presence.CANCELLED,
}
_KILLED = "WorkerLostError"
"""What Celery stores for a worker that was killed: for the ledger to decide, who is told of it too."""
_A_CALL = 1_000


@dataclass(frozen=True, slots=True)
class Results:
    """The results of one app, in a db of the same Redis server."""

    db: int
    tasks: str
    """What the key of a task's result begins with."""
    groups: str
    """And that of a chord."""
    ordered: bool = True
    """A chord's results are a zset, by their place in the header; else a list."""
    expires: int = 0
    """Seconds for which a chord's keys are kept; 0: for ever."""
    json: bool = True

    def as_fields(self) -> dict[str, object]:
        """Return it as JSON can say it."""
        return asdict(self)

    @classmethod
    def from_fields(cls, fields: object) -> Results | None:
        """Return what ``told`` said; None: nothing that we understand."""
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
    """Return where a Redis backend keeps its results; None: on another server than the broker's."""
    fields = backend.__dict__.get("_jobguard_results")
    if fields is None or fields[0] != broker:
        fields = backend.__dict__["_jobguard_results"] = (broker, _find(backend, broker))
    found: Results | None = fields[1]
    return found


def _find(backend: Any, broker: str) -> Results | None:
    if not isinstance(backend.client, redis.Redis):
        return None  # a user's double
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
    """Return how these tasks ended, of those whose result says so.

    ``wanted``: by id, the time before which a result is that of an earlier life of the id.
    """
    metas = read(client, results, list(wanted))
    ends = ((id, _end_in(meta, wanted[id])) for id, meta in metas.items())
    return {id: end for id, end in ends if end is not None}


def read(client: redis.Redis, results: Results, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what is stored of these tasks, as far as it is JSON. Raises RedisError."""
    found: dict[str, dict[str, Any]] = {}
    for some in _chunks(ids) if results.json else ():
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
    """Return when a stored result says that its task ended; what cannot be read is long ago."""
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return float("-inf")
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _chunks(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for at in range(0, len(ids), _A_CALL):
        yield ids[at : at + _A_CALL]
