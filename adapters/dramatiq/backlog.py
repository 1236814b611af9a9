"""The messages that wait in Redis, as deliveries to record.

The id of a message in Redis is its token, also if its push was not guarded: Dramatiq draws a random
UUID at every push. So no message needs a mark.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

from jobguard.adapters.dramatiq.envelope import Envelope
from jobguard.adapters.dramatiq.layout import Layout, token_of
from jobguard.model import Backlog, Delivery
from jobguard.redis_values import UNREADABLE, json_in
from jobguard.walk import following, position

if TYPE_CHECKING:
    import redis

_MOST = 1e15
"""A number from here on is no count, and no milliseconds of a date that PostgreSQL has."""


class BacklogReader:
    """Reads the waiting messages of one RedisBroker, page by page."""

    def __init__(self, client: redis.Redis, layout: Layout) -> None:
        self._client = cast(Any, client)
        self._layout = layout

    def page(self, queues: Collection[str], *, after: str, limit: int, mark: bool) -> Backlog:
        """Return a page; see Broker.backlog."""
        places = [name for queue in queues for name in (queue, f"{queue}.DQ")]
        now = position(places, after)
        if now is None:
            return Backlog()
        key = f"{self._layout.key(now.place)}.msgs"
        cursor, found = self._client.hscan(key, now.cursor, count=limit)
        made = [_delivery(now.place, id, data) for id, data in found.items()]
        deliveries = [delivery for delivery in made if delivery is not None]
        return Backlog(
            deliveries=deliveries,
            unreadable=len(made) - len(deliveries),
            after=following(places, now, int(cursor) or None),
        )


def _delivery(name: str, id: bytes, data: bytes) -> Delivery | None:
    """Return the record of a message; the fields that the user's own encoder hides stay unknown."""
    token = token_of(id.decode(errors="replace"))
    if token is None:
        return None
    try:
        message = json_in(data)
        options = message["options"]
        known = {"id": str(message["message_id"]), "task": str(message["actor_name"])}
    except UNREADABLE:
        options, message, known = {}, {}, {"id": str(token), "task": ""}
    delayed = name.endswith(".DQ")
    eta, retries, age = (_number(options, field) for field in ("eta", "retries", "max_age"))
    sent = _number(message, "message_timestamp")
    return Delivery(
        token=token,
        job_id=known["id"],
        queue=name.removesuffix(".DQ") if delayed else name,
        task=known["task"],
        envelope=Envelope(token, name, data).encode(),
        attempt=1 + int(retries or 0),
        due_at=eta / 1000 if eta is not None and delayed else None,
        expires_at=(sent + age) / 1000 if sent is not None and age else None,
        fresh=True,
    )


def _number(fields: Mapping[str, Any], name: str) -> float | None:
    value = fields.get(name) if isinstance(fields, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MOST:
        return None
    return value
