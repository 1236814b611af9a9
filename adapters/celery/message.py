"""A message as it will stand in Redis, and the delivery that it is, made before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu.utils.encoding import str_to_bytes
from kombu.utils.json import dumps

from jobguard.adapters.celery.connection import on_paper
from jobguard.adapters.celery.envelope import Routing, encode
from jobguard.adapters.celery.header import DEAD, PART, TOKEN, WORKER
from jobguard.model import Delivery

if TYPE_CHECKING:
    from jobguard.model import Parent


@dataclass(frozen=True, slots=True)
class Target:
    """The one queue that a message goes to, and the way there."""

    queue: str
    exchange: str = ""
    routing_key: str = ""
    binding: str = ""


@dataclass(slots=True)
class Wire:
    """A message, serialised and compressed, with all that the library sends with it."""

    app: Any
    connection: Any
    task: Mapping[str, Any]
    """Where the library has the task's id, name and times: its headers, or with protocol 1 its body."""
    data: Any
    content_type: str
    content_encoding: str
    headers: dict[str, Any]
    properties: dict[str, Any]
    priority: int | None = 0

    @property
    def job_id(self) -> str:
        """The task's id."""
        return str(self.task["id"])

    @property
    def in_base64(self) -> bool:
        """Whether the body stands in Redis as base64: a transport option says otherwise."""
        paper: Any = on_paper(self.connection)
        return bool(paper.body_encoding == "base64")

    def delivery(
        self,
        token: UUID,
        target: Target,
        *,
        parent: Parent | None = None,
        derived: bool = False,
        closes: str | None = None,
    ) -> Delivery:
        """Return the record of this message, sent as this delivery to this queue."""
        for name in (TOKEN, WORKER, PART, DEAD):  # a retry inherits them; ours stands last
            self.headers.pop(name, None)
        self.headers[TOKEN] = token.hex
        paper: Any = on_paper(self.connection)
        message = paper.prepare_message(
            self.data,
            self.priority,
            self.content_type,
            self.content_encoding,
            dict(self.headers),
            {**self.properties, "delivery_info": {}},
        )
        paper._inplace_augment_message(message, target.exchange, target.routing_key or target.queue)
        message["properties"]["delivery_tag"] = str(token)
        urgency = paper._get_message_priority(message, reverse=False)
        routing = Routing(target.queue, paper.priority(urgency), target.exchange, target.binding)
        return Delivery(
            token=token,
            job_id=self.job_id,
            queue=target.queue,
            task=str(self.task.get("task") or ""),
            envelope=encode(routing, str_to_bytes(dumps(message))),
            priority=urgency,
            attempt=int(self.task.get("retries") or 0) + 1,
            due_at=_epoch(self.app, self.task.get("eta")),
            # What has expired is the worker's to revoke: it tells the result, and the chord.
            expires_at=None,
            parent=parent,
            fresh=True,
            derived=derived,
            closes=closes,
        )


def describe(
    app: Any,
    headers: Mapping[str, Any],
    body: Any,
    content_type: str,
    content_encoding: str,
    properties: Mapping[str, Any],
    *,
    queue: str,
    priority: int,
    token: UUID,
) -> Delivery:
    """Return the record of a message that a worker was given and nobody recorded."""
    info = properties.get("delivery_info") or {}
    wire = Wire(
        app=app,
        connection=app.connection_for_write(),
        task=headers,
        data=body,
        content_type=content_type,
        content_encoding=content_encoding,
        headers=dict(headers),
        properties={k: v for k, v in properties.items() if k not in _CHANNELS_OWN},
        priority=priority,
    )
    exchange = str(info.get("exchange") or "")
    key = str(info.get("routing_key") or queue) if exchange else queue
    return wire.delivery(token, Target(queue, exchange, key))


_CHANNELS_OWN = ("delivery_info", "delivery_tag", "body_encoding")


def _epoch(app: Any, when: Any) -> float | None:
    """Return when that is, as the worker will read it; None: at once, or never."""
    if not when:
        return None
    try:
        aware: datetime = maybe_make_aware(maybe_iso8601(when), app.conf.timezone)
        return aware.timestamp()
    except (TypeError, ValueError, OverflowError):
        return None  # the worker will refuse it, and say so
