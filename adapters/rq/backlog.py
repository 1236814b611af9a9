"""The jobs that wait in Redis, as deliveries to record; nothing is unpickled here."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from jobguard.adapters.rq.envelope import Mode, Routing, encode
from jobguard.adapters.rq.layout import ATTEMPT_FIELD, FIELD, TASK_FIELD, Layout
from jobguard.model import Backlog, Delivery, new_token
from jobguard.redis_values import UNREADABLE, json_in
from jobguard.scripts import Script
from jobguard.walk import following, position

if TYPE_CHECKING:
    import redis

_SETS = {"scheduled": Mode.SCHEDULED, "deferred": Mode.DEFERRED}
"""The sorted sets of waiting jobs, which are also the statuses of the jobs in them."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    job_id: str
    queue: str
    mode: Mode
    score: float | None = None


class BacklogReader:
    """Reads the waiting jobs of one RQ, page by page."""

    def __init__(self, client: redis.Redis, layout: Layout) -> None:
        self._client = cast(Any, client)
        self._layout = layout
        self._mark = Script(client, __package__, "mark.lua")

    def page(self, queues: Collection[str], *, after: str, limit: int, mark: bool) -> Backlog:
        """Return a page; see Broker.backlog."""
        places = [f"{place} {queue}" for queue in queues for place in ("queued", *_SETS)]
        now = position(places, after)
        if now is None:
            return Backlog()
        place, _, queue = now.place.partition(" ")
        if place == "queued":
            waiting, cursor = self._list(queue, now.cursor, limit)
        else:
            waiting, cursor = self._set(place, queue, now.cursor, limit)
        hashes = self._hashes(waiting)
        unmarked = [at for at, fields in enumerate(hashes) if fields and _token(fields) is None]
        marked = self._marked([(waiting[at], hashes[at]) for at in unmarked]) if mark else {}
        for at in unmarked:
            token = marked.get(waiting[at].job_id)
            if token is not None:
                hashes[at][FIELD.encode()] = token.hex.encode()
        found = [_delivery(*each) for each in zip(waiting, hashes, strict=True) if each[1]]
        deliveries = [delivery for delivery in found if delivery is not None]
        return Backlog(
            deliveries=deliveries,
            unmarked=len(unmarked) - len(marked),
            unreadable=len(found) - len(deliveries) - (len(unmarked) - len(marked)),
            after=following(places, now, cursor),
        )

    def _list(self, queue: str, done: int, limit: int) -> tuple[list[_Waiting], int | None]:
        """Read from the tail: workers take from the head, so that no job is skipped."""
        ids = self._client.lrange(self._layout.queue(queue), -done - limit, -done - 1)
        waiting = [_Waiting(_text(id), queue, Mode.QUEUED) for id in reversed(ids)]
        return waiting, done + limit if len(ids) == limit else None

    def _set(
        self, place: str, queue: str, cursor: int, limit: int
    ) -> tuple[list[_Waiting], int | None]:
        key = f"{self._layout.base}:{place}:{queue}"
        cursor, found = self._client.zscan(key, cursor, count=limit)
        waiting = [_Waiting(_text(id), queue, _SETS[place], score) for id, score in found]
        return waiting, int(cursor) or None

    def _hashes(self, waiting: Sequence[_Waiting]) -> list[dict[bytes, bytes]]:
        """Return the fields of these jobs; none for one that does not wait there any more."""
        with self._client.pipeline(transaction=False) as pipe:
            for one in waiting:
                pipe.hgetall(self._layout.job(one.job_id))
            answers = pipe.execute(raise_on_error=False)
        return [
            dict(fields)
            if isinstance(fields, dict)
            and b"data" in fields
            and fields.get(b"status") == one.mode.value.encode()
            else {}
            for one, fields in zip(waiting, answers, strict=True)
        ]

    def _marked(
        self, unmarked: Sequence[tuple[_Waiting, Mapping[bytes, bytes]]]
    ) -> dict[str, UUID]:
        """Write a token into each of these hashes, unless the job was pushed again or has moved on."""
        tokens = {one.job_id: new_token() for one, _ in unmarked}
        calls: list[tuple[list[Any], list[Any]]] = [
            (
                [self._layout.job(one.job_id)],
                [fields.get(FIELD.encode(), b""), one.mode.value, tokens[one.job_id].hex],
            )
            for one, fields in unmarked
        ]
        answers = self._mark.run(calls) if calls else []
        return {
            one.job_id: tokens[one.job_id]
            for (one, _), answer in zip(unmarked, answers, strict=True)
            if answer == 1
        }


def _token(fields: Mapping[bytes, bytes]) -> UUID | None:
    """Return the token; None also for a spent one: an unguarded program has pushed the job again."""
    text = _text(fields.get(FIELD.encode(), b""))
    try:
        return UUID(hex=text) if len(text) == 32 else None
    except ValueError:
        return None


def _delivery(waiting: _Waiting, fields: Mapping[bytes, bytes]) -> Delivery | None:
    token = _token(fields)
    if token is None:
        return None
    try:
        routing = Routing(
            mode=waiting.mode,
            score="" if waiting.score is None else repr(waiting.score),
            parents=tuple(_parents(fields)) if waiting.mode is Mode.DEFERRED else (),
            allow_failure=fields.get(b"allow_dependency_failures") == b"1",
            group=_text(fields.get(b"group_id", b"")),
            rate_key=_text(fields.get(b"rate_limit_key", b"")),
            rate_concurrency=int(fields.get(b"rate_limit_concurrency") or 0),
        )
        return Delivery(
            token=token,
            job_id=waiting.job_id,
            queue=waiting.queue,
            task=_task(fields),
            envelope=encode(routing, {name.decode(): value for name, value in fields.items()}),
            attempt=int(fields.get(ATTEMPT_FIELD.encode()) or 1),
            due_at=waiting.score if waiting.mode is Mode.SCHEDULED else None,
            expires_at=_expires_at(waiting, fields),
        )
    except UNREADABLE:
        return None


def _parents(fields: Mapping[bytes, bytes]) -> Iterator[str]:
    listed = fields.get(b"dependency_ids")
    if listed:
        yield from map(str, json_in(listed))
    elif b"dependency_id" in fields:
        yield _text(fields[b"dependency_id"])


def _task(fields: Mapping[bytes, bytes]) -> str:
    """Return the function's name, which stands at the start of RQ's usual description."""
    named = fields.get(TASK_FIELD.encode())
    if named is not None:
        return _text(named)
    name, bracket, _ = _text(fields.get(b"description", b"")).partition("(")
    return name if bracket and not set(name) - _NAME else ""


_NAME = frozenset(chain("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789_."))


def _expires_at(waiting: _Waiting, fields: Mapping[bytes, bytes]) -> float | None:
    """Return when RQ drops the job: its ttl after the push; a job that waits for its time has none."""
    ttl = fields.get(b"ttl")
    pushed = _text(fields.get(b"enqueued_at") or fields.get(b"created_at") or b"")
    if not ttl or waiting.mode is not Mode.QUEUED or not pushed:
        return None
    at = datetime.fromisoformat(pushed.rstrip("Z")).replace(tzinfo=UTC)
    return at.timestamp() + int(ttl)


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")
