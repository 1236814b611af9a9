"""The steps of a guarded broker for every message that goes to Redis.

``enqueue`` shows which message is sent, and from which delivery it comes. ``before_enqueue`` of our
middleware is the place to choose its id. ``do_enqueue`` pushes the bytes, after all changes that
other middleware made to the message.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any
from uuid import UUID

from dramatiq import Message

from jobguard.adapters.dramatiq.layout import Layout, canonical, token_of
from jobguard.adapters.dramatiq.message import deliver
from jobguard.adapters.dramatiq.push import MessagePush
from jobguard.adapters.dramatiq.run import Run, current_run, derive
from jobguard.host_safety import contain_errors
from jobguard.model import Delivery, Parent, derived_token, new_token, token_at
from jobguard.scripts import text_of

if TYPE_CHECKING:
    from dramatiq.brokers.redis import RedisBroker

    from jobguard.adapter import Tracker
    from jobguard.adapters.dramatiq.consumer import InFlightMessages

Enqueue = Callable[..., Any]


@dataclass(slots=True)
class _Draft:
    """One call of enqueue, from its start to the push."""

    origin: UUID | None
    """The delivery from which the message comes: its retry, or its move from the delay queue."""
    run: Run | None
    message: Message[Any] | None = None
    """The message as it will be encoded."""
    token: UUID | None = None
    parent: Parent | None = None
    supersedes: bool = False
    """True if the message supersedes the run that sends it."""
    derived: bool = False
    closes: str | None = None


_draft: ContextVar[_Draft | None] = ContextVar("jobguard_dramatiq_draft", default=None)


@dataclass(slots=True)
class _Join:
    id: str
    sent: int = 0
    """Number of messages that continue the group. All are recorded at once, and the first one closes it."""


_closing: ContextVar[_Join | None] = ContextVar("jobguard_dramatiq_closing", default=None)


@contextmanager
def continuing(join: str) -> Iterator[None]:
    """Mark all messages that are sent inside as continuations of that group."""
    before = _closing.set(_Join(join))
    try:
        yield
    finally:
        _closing.reset(before)


class Producer:
    """The producer half of one guarded broker."""

    def __init__(
        self, tracker: Tracker, broker: RedisBroker, in_flight: InFlightMessages, worker: Any
    ) -> None:
        self._tracker = tracker
        self._broker = broker
        self._in_flight = in_flight
        self._worker = worker
        self._layout = Layout(broker.namespace)
        self._push = broker.client.register_script(text_of(__package__, "push.lua"))

    def enqueue(self, original: Enqueue) -> Enqueue:
        """Wrap RedisBroker.enqueue, which every message passes."""

        @wraps(original)
        def hook(message: Message[Any], *, delay: int | None = None) -> Any:
            run = current_run()
            draft = _Draft(token_of(message.options.get("redis_message_id")), run)
            before = _draft.set(draft)
            try:
                return original(message, delay=delay)
            except BaseException:
                if run is not None and run.after:
                    run.broken = True  # Dramatiq suppresses this error, and acknowledges the job
                raise
            finally:
                _draft.reset(before)

        return hook

    def before_enqueue(self, message: Message[Any]) -> None:
        """Give the message that is about to be pushed one of our tokens as its id."""
        draft = _draft.get()
        if draft is None or not self._tracker.guards(canonical(message.queue_name)):
            return
        self._derive_token(draft, message)
        draft.message = message
        message.options["redis_message_id"] = str(draft.token)

    def do_enqueue(self, original: Enqueue) -> Enqueue:
        """Wrap RedisBroker.do_enqueue, which sends the bytes to Redis."""

        @wraps(original)
        def hook(queue_name: str, rid: str, data: bytes) -> Any:
            push = None  # without it, the message is not recorded
            with contain_errors("do_enqueue", token=rid):
                push = self._prepare(queue_name, rid, data)
            if push is None:
                return original(queue_name, rid, data)
            return push.make()

        return hook

    def _derive_token(self, draft: _Draft, message: Message[Any]) -> None:
        """Find the origin of the message, and derive its token from that."""
        run, origin, join = draft.run, draft.origin, _closing.get()
        id, sent_at = message.message_id, message.message_timestamp / 1000
        if join is not None:
            # It is the same delivery, whichever member completes the group, and however often.
            draft.token = derived_token(token_at(sent_at), f"{join.id}\x00{id}", join.sent)
            draft.derived, draft.closes = True, None if join.sent else join.id
            join.sent += 1
        elif run is not None and origin == run.token and run.after and run.error is not None:
            if not run.superseded:
                draft.parent, draft.supersedes = run.parent(), True
            draft.token, draft.derived = run.derive(id), True
        elif run is None and origin is not None and self._is_moving(origin):
            # Dramatiq moves it from the delay queue, or retries a message that failed before its
            # claim.
            session = self._worker.session
            draft.parent = Parent(origin, worker=session.id if session is not None else None)
            draft.token, draft.derived = derive(origin, id, 0, sent_at=sent_at), True
        elif run is not None:
            draft.token, draft.derived = run.derive(id), True
        else:
            draft.token = new_token()

    def _is_moving(self, origin: UUID) -> bool:
        """Return True if Dramatiq sends a message that this process has fetched.

        An application that sends the same message again, in another thread, means a further job.
        """
        kinds = type(threading.current_thread()).__mro__
        theirs = any(kind.__module__ == "dramatiq.worker" for kind in kinds)
        return theirs and str(origin) in self._in_flight

    def _prepare(self, queue_name: str, rid: str, data: bytes) -> MessagePush | None:
        token = token_of(rid)
        if token is None or not self._tracker.guards(canonical(queue_name)):
            return None
        draft = _draft.get()
        if draft is None or draft.message is None or draft.token != token:
            draft = _Draft(None, None, Message.decode(data))  # the application pushes by hand
        return MessagePush(
            self._tracker,
            self._delivery(draft, token, queue_name, data),
            self._broker.client,
            enqueue=lambda: self._send(queue_name, rid, data),
            run=draft.run,
            supersedes=draft.supersedes,
        )

    def _delivery(self, draft: _Draft, token: UUID, queue: str, data: bytes) -> Delivery:
        assert draft.message is not None
        return deliver(
            self._broker,
            draft.message,
            rid=token,
            queue=queue,
            data=data if isinstance(data, bytes) else str(data).encode(),
            parent=draft.parent,
            derived=draft.derived,
            closes=draft.closes,
        )

    def _send(self, queue_name: str, rid: str, data: bytes) -> None:
        list_ = self._layout.key(queue_name)
        self._push(keys=[list_, f"{list_}.msgs"], args=[rid, data])
