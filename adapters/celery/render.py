"""Make the delivery of a task that SQL or a schedule asked for: a message of protocol 2 with a JSON body.

Neither Celery nor the application is needed, and every worker that accepts JSON can read the message.
"""

from __future__ import annotations

import json
from base64 import b64encode
from bisect import bisect
from datetime import UTC, datetime
from uuid import UUID

from jobguard.adapters.celery.envelope import TOKEN, Routing, encode
from jobguard.adapters.celery.layout import Layout
from jobguard.errors import CannotRender
from jobguard.model import Delivery, Request

_HIGHEST = 9
_REPR = 1024
"""Characters of the arguments that a message shows to people, as in Celery."""


def render(request: Request, token: UUID, *, layout: Layout) -> Delivery:
    """Return the delivery; see Broker.render."""
    if request.max_attempts is not None:
        raise CannotRender(
            "a message of Celery has no limit of attempts: set max_retries on the task instead"
        )
    if not 0 <= request.priority <= _HIGHEST:
        raise CannotRender(f"priority must be 0 to {_HIGHEST}, not {request.priority}")
    if request.serializer not in ("", "json"):
        raise CannotRender(
            f"the workers of this source do not accept JSON (accept_content is {request.serializer}): "
            "add 'json' to accept_content"
        )
    due = None if request.due_at is None else datetime.fromtimestamp(request.due_at, UTC)
    headers: dict[str, object] = {
        "lang": "py",
        "task": request.task,
        "id": request.job_id,
        "shadow": None,
        "eta": None if due is None else due.isoformat(),
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": request.job_id,
        "parent_id": None,
        "argsrepr": repr(tuple(request.args))[:_REPR],
        "kwargsrepr": repr(dict(request.kwargs))[:_REPR],
        "origin": "jobguard",
        "ignore_result": False,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
        TOKEN: token.hex,
    }
    links = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
    body = json.dumps([list(request.args), dict(request.kwargs), links]).encode()
    message = {
        "body": b64encode(body).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": {
            "correlation_id": request.job_id,
            "reply_to": "",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": request.queue},
            "priority": request.priority,
            "body_encoding": "base64",
            "delivery_tag": str(token),
        },
    }
    steps = layout.priority_steps
    step = steps[bisect(steps, request.priority) - 1]
    return Delivery(
        token=token,
        job_id=request.job_id,
        queue=request.queue,
        task=request.task,
        envelope=encode(Routing(request.queue, step), json.dumps(message).encode()),
        priority=request.priority,
        due_at=request.due_at,
        key=request.key,
        fresh=True,
    )
