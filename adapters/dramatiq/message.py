"""Make the delivery of a message: the record of one push."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from dramatiq.middleware import AgeLimit

from jobguard.adapters.dramatiq.envelope import Envelope
from jobguard.adapters.dramatiq.layout import canonical
from jobguard.job_keys import rule_of
from jobguard.model import Delivery, Parent
from jobguard.tracing import current_trace

if TYPE_CHECKING:
    from dramatiq import Actor, Message
    from dramatiq.brokers.redis import RedisBroker


_MOST = 32_767
"""The largest priority that the ledger stores."""


def deliver(
    broker: RedisBroker,
    message: Message[Any],
    *,
    rid: UUID,
    queue: str,
    data: bytes,
    parent: Parent | None = None,
    derived: bool = False,
    closes: str | None = None,
) -> Delivery:
    """Return the record of these bytes in that list."""
    actor = broker.actors.get(message.actor_name)
    eta = message.options.get("eta") if queue != canonical(queue) else None
    return Delivery(
        token=rid,
        job_id=message.message_id,
        queue=canonical(queue),
        task=message.actor_name,
        envelope=Envelope(rid, queue, data).encode(),
        priority=_priority(actor),
        attempt=_attempt(message),
        due_at=eta / 1000 if isinstance(eta, int | float) else None,
        expires_at=expires_at(broker, message),
        trace=current_trace(),
        parent=parent,
        fresh=True,
        derived=derived,
        closes=closes,
        rule=rule_of(message.options),
    )


def expires_at(broker: RedisBroker, message: Message[Any]) -> float | None:
    """Return when Dramatiq would drop the message unrun, in seconds since the epoch; None for never."""
    limit = next((each for each in broker.middleware if isinstance(each, AgeLimit)), None)
    if limit is None:
        return None
    actor = broker.actors.get(message.actor_name)
    usual = actor.options.get("max_age", limit.max_age) if actor else limit.max_age
    age = message.options.get("max_age") or usual
    if not age or not isinstance(age, int | float):  # Dramatiq logs an error, and runs the message
        return None
    return (message.message_timestamp + age) / 1000


def _priority(actor: Actor[Any, Any] | None) -> int:
    """Return the actor's priority, for the order of restores; Dramatiq compares any numbers."""
    priority = getattr(actor, "priority", 0)
    if not isinstance(priority, int | float) or priority != priority:
        return 0
    return int(max(-_MOST, min(_MOST, priority)))


def _attempt(message: Message[Any]) -> int:
    retries = message.options.get("retries")
    return 1 + retries if isinstance(retries, int) else 1
