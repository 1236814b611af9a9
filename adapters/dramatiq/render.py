"""Make the delivery of a message that SQL or a schedule asked for, as Dramatiq's JSON encoder writes it."""

from __future__ import annotations

import json
from uuid import UUID

from jobguard.adapters.dramatiq.envelope import Envelope
from jobguard.errors import CannotRender
from jobguard.model import Delivery, Request


def render(request: Request, token: UUID) -> Delivery:
    """Return the delivery; see Broker.render."""
    if request.priority:
        raise CannotRender(
            "a message of Dramatiq has no priority: set it on the actor, or use another queue"
        )
    if request.serializer not in ("", "json"):
        raise CannotRender(
            f"the processes of this source encode messages with {request.serializer}: only messages of "
            "Dramatiq's JSONEncoder can be rendered"
        )
    options: dict[str, object] = {"redis_message_id": str(token)}
    due = request.due_at
    if due is not None:
        options["eta"] = int(due * 1000)
    if request.max_attempts is not None:
        options["max_retries"] = request.max_attempts - 1
    queue = request.queue if due is None else f"{request.queue}.DQ"
    message = {
        "queue_name": queue,
        "actor_name": request.task,
        "args": list(request.args),
        "kwargs": dict(request.kwargs),
        "options": options,
        "message_id": request.job_id,
        "message_timestamp": int(request.requested_at * 1000),
    }
    data = json.dumps(message, separators=(",", ":")).encode()
    return Delivery(
        token=token,
        job_id=request.job_id,
        queue=request.queue,
        task=request.task,
        envelope=Envelope(token, queue, data).encode(),
        due_at=due,
        key=request.key,
        fresh=True,
    )
