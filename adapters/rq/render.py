"""Make the delivery of a job that SQL or a schedule asked for, with the bytes that RQ would write.

The function is named by its import path, and its arguments are plain JSON values. RQ serializes the
call with pickle by default. A pickle of plain values needs neither the application nor RQ, and nothing
is unpickled here.
"""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import chain
from typing import Any
from uuid import UUID

from jobguard.adapters.rq.envelope import Mode, Routing, encode
from jobguard.adapters.rq.layout import FIELD, TASK_FIELD, TIMESTAMP
from jobguard.errors import CannotRender
from jobguard.model import Delivery, Request

_TIMEOUT = 180
"""Seconds that a job may run: RQ's own default."""
_PROTOCOL = 4
"""The newest pickle protocol that every Python with RQ 2 can read."""
_DUMPS: dict[str, Callable[[Any], bytes]] = {
    "pickle": lambda call: pickle.dumps(call, protocol=_PROTOCOL),
    "json": lambda call: json.dumps(call).encode(),
}


def render(request: Request, token: UUID) -> Delivery:
    """Return the delivery; see Broker.render."""
    if request.priority:
        raise CannotRender("RQ has no priorities: send the job to another queue")
    dumps = _DUMPS.get(request.serializer or "pickle")
    if dumps is None:
        raise CannotRender(
            f"the queues of this source use the serializer {request.serializer}: only RQ's own "
            "serializers, pickle and json, can be rendered"
        )
    asked = datetime.fromtimestamp(request.requested_at, UTC).strftime(TIMESTAMP)
    mode = Mode.QUEUED if request.due_at is None else Mode.SCHEDULED
    # RQ counts the delay in whole seconds; a job never starts early.
    score = "" if request.due_at is None else str(-int(-request.due_at // 1))
    call = (request.task, None, tuple(request.args), dict(request.kwargs))
    fields: dict[str, object] = {
        "created_at": asked,
        "data": zlib.compress(dumps(call)),
        **dict.fromkeys(("success_callback_name", "failure_callback_name"), ""),
        **dict.fromkeys(("stopped_callback_name", "started_at", "ended_at"), ""),
        **dict.fromkeys(("last_heartbeat", "worker_name", "group_id"), ""),
        "origin": request.queue,
        "description": _description(request),
        "timeout": _TIMEOUT,
        "status": mode.value,
        FIELD: token.hex,
        TASK_FIELD: request.task,
    }
    if mode is Mode.QUEUED:
        fields["enqueued_at"] = asked
    if request.max_attempts is not None and request.max_attempts > 1:
        fields["number_of_retries"] = 0
        fields["retries_left"] = request.max_attempts - 1
        fields["retry_intervals"] = "[0]"
    return Delivery(
        token=token,
        job_id=request.job_id,
        queue=request.queue,
        task=request.task,
        envelope=encode(Routing(mode=mode, score=score), {k: _bytes(v) for k, v in fields.items()}),
        due_at=float(score) if score else None,
        key=request.key,
        fresh=True,
    )


def _description(request: Request) -> str:
    named = (f"{name}={value!r}" for name, value in request.kwargs.items())
    return f"{request.task}({', '.join(chain(map(repr, request.args), named))})"


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
