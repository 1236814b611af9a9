"""The messages that wait in Redis, as deliveries to record; no body is unpickled here."""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from jobguard.adapters.celery.envelope import TOKEN, Routing, encode, token_of
from jobguard.adapters.celery.layout import Layout
from jobguard.model import Backlog, Delivery, new_token
from jobguard.redis_values import UNREADABLE, json_in
from jobguard.scripts import Script
from jobguard.walk import following, position

if TYPE_CHECKING:
    import redis


class BacklogReader:
    """Reads the waiting messages of one Celery broker, page by page."""

    def __init__(self, client: redis.Redis, layout: Layout) -> None:
        self._client = cast(Any, client)
        self._layout = layout
        self._mark = Script(client, __package__, "mark.lua")

    def page(self, queues: Collection[str], *, after: str, limit: int, mark: bool) -> Backlog:
        """Return a page, read from the head, where messages are pushed; see Broker.backlog."""
        steps = self._layout.priority_steps
        places = {f"{step} {queue}": (queue, step) for queue in queues for step in steps}
        now = position(places, after)
        if now is None:
            return Backlog()
        queue, step = places[now.place]
        key = self._layout.list_of(queue, step)
        raws: list[bytes] = self._client.lrange(key, now.cursor, now.cursor + limit - 1)
        read = [_read(raw) for raw in raws]
        unmarked = [
            at
            for at, message in enumerate(read)
            if message is not None and token_of(message["headers"]) is None
        ]
        marked: dict[int, bytes] = {}
        if mark:
            marked = self._marked(key, now.cursor, [(at, raws[at], read[at]) for at in unmarked])
            for at, raw in marked.items():
                raws[at] = raw
        bindings = _Bindings(self._client, self._layout)
        made = [
            _delivery(raw, message, queue, step, bindings)
            for at, (raw, message) in enumerate(zip(raws, read, strict=True))
            if message is not None and (at in marked or at not in unmarked)
        ]
        deliveries = [delivery for delivery in made if delivery is not None]
        left = len(unmarked) - len(marked)
        return Backlog(
            deliveries=deliveries,
            unmarked=left,
            unreadable=len(raws) - len(deliveries) - left,
            after=following(places, now, now.cursor + limit if len(raws) == limit else None),
        )

    def _marked(
        self, key: str, first: int, unmarked: Sequence[tuple[int, bytes, dict[str, Any] | None]]
    ) -> dict[int, bytes]:
        """Replace each of these messages by itself with a token, where it still is in the list."""
        after = {}
        calls: list[tuple[list[Any], list[Any]]] = []
        for at, raw, message in unmarked:
            assert message is not None
            message["headers"][TOKEN] = new_token().hex
            after[at] = json.dumps(message).encode()
            calls.append(([key], [first + at, raw, after[at]]))
        answers = self._mark.run(calls) if calls else []
        return {at: after[at] for at, answer in zip(after, answers, strict=True) if answer == 1}


class _Bindings:
    """The rows that lead from an exchange to a queue, each exchange read once."""

    def __init__(self, client: Any, layout: Layout) -> None:
        self._client, self._layout = client, layout
        self._rows: dict[str, list[str]] = {}

    def __call__(self, exchange: str, queue: str) -> str:
        """Return the row for this queue; empty if Redis has none."""
        if not exchange:
            return ""
        if exchange not in self._rows:
            rows = self._client.smembers(self._layout.binding(exchange))
            self._rows[exchange] = sorted(row.decode(errors="replace") for row in rows)
        ending = f"{self._layout.sep}{queue}"
        return next((row for row in self._rows[exchange] if row.endswith(ending)), "")


def _read(raw: bytes) -> dict[str, Any] | None:
    """Return the message; None if it is no task."""
    try:
        message = json_in(raw)
        headers, properties = message["headers"], message["properties"]
    except UNREADABLE:
        return None
    if not isinstance(headers, dict) or not isinstance(properties, dict):
        return None
    return dict(message) if _task(message) is not None else None


def _task(message: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the mapping with the task's name and id: the headers, or with protocol 1 the body."""
    headers = message["headers"]
    if "task" in headers:
        return headers if "id" in headers else None
    if message.get("content-type") != "application/json":
        return None
    try:
        body = message["body"]
        if message["properties"].get("body_encoding") == "base64":
            body = base64.b64decode(body)
        found = json_in(body)
    except UNREADABLE:
        return None
    return found if isinstance(found, dict) and {"task", "id"} <= found.keys() else None


def _delivery(
    raw: bytes, message: Mapping[str, Any], queue: str, step: int, bindings: _Bindings
) -> Delivery | None:
    properties = message["properties"]
    tag = properties.get("delivery_tag")
    try:
        token, task = token_of(message["headers"]), _task(message)
        if token is None or task is None or not isinstance(tag, str) or not tag:
            return None
        exchange = str((properties.get("delivery_info") or {}).get("exchange") or "")
        routing = Routing(queue, step, exchange, bindings(exchange, queue))
        return Delivery(
            token=token,
            job_id=str(task["id"]),
            queue=queue,
            task=str(task["task"] or ""),
            envelope=encode(routing, raw.replace(tag.encode(), str(token).encode())),
            priority=int(properties.get("priority") or 0),
            attempt=int(task.get("retries") or 0) + 1,
            due_at=_epoch(task.get("eta")),
            fresh=True,
        )
    except UNREADABLE:
        return None


def _epoch(when: object) -> float | None:
    """Return this time; a time without a zone counts as UTC, as Celery writes it by default."""
    if not isinstance(when, str):
        return None
    try:
        at = datetime.fromisoformat(when)
    except ValueError:
        return None
    return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()
