"""The hook on every push of a task: ``AMQP.send_task_message`` calls ``producer.publish``.

Our producer replaces the one that this function gets, and calls the real one. It acts after all
receivers of ``before_task_publish``, so the recorded message equals the sent message, byte for
byte.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from uuid import UUID

from celery.utils.imports import instantiate

from jobguard.adapters.celery import lookup
from jobguard.adapters.celery.backend import sends_a_group
from jobguard.adapters.celery.envelope import DEAD, PART, TOKEN, WORKER
from jobguard.adapters.celery.message import Target, Wire, target_of
from jobguard.adapters.celery.push import BROKER_DOWN, TaskPush
from jobguard.adapters.celery.run import Run, closes, current_run
from jobguard.host_safety import contain_errors
from jobguard.model import derived_token, new_token

if TYPE_CHECKING:
    from jobguard.adapter import Tracker


_SENDER = "send_task_message"
_ARGUMENTS = frozenset(
    (
        *("routing_key", "delivery_mode", "mandatory", "immediate", "priority", "content_type"),
        *("content_encoding", "serializer", "headers", "compression", "exchange", "retry"),
        *("retry_policy", "declare", "expiration", "timeout", "confirm_timeout"),
    )
)
"""Arguments that kombu's ``Producer.publish`` takes itself: all others are message properties."""


class GuardedAMQP:
    """Make an app's AMQP as before, when the app first needs one, and put our sender into it.

    It is the app's ``amqp_cls``, so that the app's configuration is not read too early. It can be
    pickled with the app, for example to a spawned worker.
    """

    is_hooked = True

    def __init__(self, before: Any) -> None:
        self.before = before

    def __call__(self, app: Any) -> Any:
        """Make the AMQP."""
        amqp = instantiate(self.before, app=app)
        hook_amqp(amqp)
        return amqp


def hook_app(app: Any) -> None:
    """Route everything that this app publishes through us; a second call changes nothing."""
    if not isinstance(app.amqp_cls, GuardedAMQP):
        app.amqp_cls = GuardedAMQP(app.amqp_cls)
    if "amqp" in vars(app):
        hook_amqp(app.amqp)


def unhook_app(app: Any) -> None:
    """Restore the app as it was."""
    if isinstance(app.amqp_cls, GuardedAMQP):
        app.amqp_cls = app.amqp_cls.before
    state = vars(vars(app)["amqp"]) if "amqp" in vars(app) else {}
    sender = state.get(_SENDER)
    if isinstance(sender, Sender):
        del state[_SENDER]
        if sender.original is not None:
            state[_SENDER] = sender.original


def hook_amqp(amqp: Any) -> None:
    """Put our sender where the library would cache its own."""
    before = vars(amqp).get(_SENDER)
    if not isinstance(before, Sender):
        vars(amqp)[_SENDER] = Sender(amqp, before)


class Sender:
    """``AMQP.send_task_message`` of one app."""

    def __init__(self, amqp: Any, original: Callable[..., Any] | None) -> None:
        self._amqp = amqp
        self.original = original

    def __call__(self, producer: Any, name: str, message: Any, *args: Any, **options: Any) -> Any:
        """Send a task's message by a producer that records it first."""
        app = self._amqp.app
        tracker = _tracker_for(app, producer)
        if self.original is None:
            self.original = _library_sender(self._amqp)
        if tracker is not None:
            body = message[2]
            producer = Producer(producer, tracker, app, body, options.get("exchange_type"))
        elif options.get("headers"):
            options["headers"] = _without_ours(options["headers"])
        return self.original(producer, name, message, *args, **options)


class Producer:
    """A producer for one task's message; other messages, such as events, pass unchanged."""

    def __init__(
        self, producer: Any, tracker: Tracker, app: Any, body: Any, exchange_type: str | None
    ) -> None:
        self._producer = producer
        self._tracker = tracker
        self._app = app
        self._body = body
        self._exchange_type = exchange_type
        self._push: TaskPush | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def publish(self, body: Any, **options: Any) -> Any:
        """Record the message, and have the real producer publish it."""
        if body is not self._body:
            return self._producer.publish(body, **options)
        if self._push is None:
            options["headers"] = _without_ours(options.get("headers") or {})
            wire = self._serialised(body, options)
            self._push = self._prepared(wire, options)
        if self._push is None:
            return self._producer.publish(body, **options)
        if self._push.begun:  # the library tries the same message again
            return self._push.send()
        return self._push.make()

    def _serialised(self, body: Any, options: dict[str, Any]) -> Wire:
        """Serialise the body as the real producer would, with the same exceptions."""
        real, headers = self._producer, options["headers"]
        data, content_type, content_encoding = real._prepare(
            body,
            options.get("serializer"),
            options.get("content_type"),
            options.get("content_encoding"),
            real.compression if options.get("compression") is None else options["compression"],
            headers,
        )
        _, delivery_mode = real._delivery_details(
            options.get("exchange") or real.exchange, options.get("delivery_mode")
        )
        properties = {k: v for k, v in options.items() if k not in _ARGUMENTS}
        properties["delivery_mode"] = delivery_mode
        if options.get("expiration") is not None:
            properties["expiration"] = str(int(options["expiration"] * 1000))
        return Wire(
            app=self._app,
            connection=real.connection,
            task=body if isinstance(body, dict) else headers,  # protocol 1 or 2
            data=data,
            content_type=content_type,
            content_encoding=content_encoding,
            headers=headers,
            properties=properties,
            priority=options.get("priority", 0),
        )

    def _prepared(self, wire: Wire, options: dict[str, Any]) -> TaskPush | None:
        """Return the prepared push; None if this message is not guarded."""
        with contain_errors("record a task", job_id=wire.task.get("id")):
            target = target_of(
                self._app,
                options.get("exchange") or self._producer.exchange,
                options.get("routing_key"),
                exchange_type=self._exchange_type,
                declare=options.get("declare"),
                channel=self._channel(options),
            )
            if target is None or not self._tracker.guards(target.queue):
                return None
            target.queue.encode()  # else kombu raises after the record
            return self._recorded_first(wire, target, options)
        wire.headers.pop(TOKEN, None)
        return None

    def _recorded_first(self, wire: Wire, target: Target, options: dict[str, Any]) -> TaskPush:
        run = current_run()
        if run is not None and run.tracker.source.id != self._tracker.source.id:
            run = None  # a task of another broker
        moving = run if run is not None and run.job_id == wire.job_id else None
        delivery = wire.delivery(
            new_token() if run is None else _token_of_next(run, wire.job_id),
            target,
            parent=moving.parent() if moving is not None else None,
            derived=run is not None,
            closes=closes(wire.job_id),
        )
        encoded = {
            **options,
            "content_type": wire.content_type,
            "content_encoding": wire.content_encoding,
            "compression": "",  # it is compressed already
        }
        # If the text is not to be base64, kombu would make bytes of it and keep those: pass the
        # original.
        unencoded = isinstance(wire.data, str) and not wire.in_base64
        data, sent = (self._body, options) if unencoded else (wire.data, encoded)
        return TaskPush(
            tracker=self._tracker,
            app=self._app,
            delivery=delivery,
            publish=lambda producer, **options: producer.publish(data, **{**sent, **options}),
            producer=self._producer,
            run=moving,
            alone=sends_a_group() and not (wire.task.get("group") or wire.task.get("taskset")),
            retry=bool(options.get("retry")),
            policy=options.get("retry_policy"),
        )

    def _channel(self, options: dict[str, Any]) -> Any:
        """Return the channel that knows the bindings, with its queues declared; None if Redis is away."""
        exchange = options.get("exchange")
        if not getattr(exchange, "name", exchange) or self._tracker.broker_in_doubt():
            return None
        try:
            for entity in options.get("declare") or ():
                self._producer.maybe_declare(entity)
            return self._producer.channel
        except BROKER_DOWN:
            self._tracker.broker_failed()
            return None


def _token_of_next(run: Run, job_id: str) -> UUID:
    return derived_token(run.claim.token, job_id, run.next_nth(job_id))


def _without_ours(headers: dict[str, Any]) -> dict[str, Any]:
    """Return a message's headers without those inherited from the message of a guarded run."""
    return {
        name: value for name, value in headers.items() if name not in (TOKEN, WORKER, PART, DEAD)
    }


def _tracker_for(app: Any, producer: Any) -> Tracker | None:
    with contain_errors("find the broker of a task, which is sent unrecorded"):
        return lookup.tracker_for_push(app, producer.connection)
    return None


def _library_sender(amqp: Any) -> Callable[..., Any]:
    """Return the sender that the library would use."""
    made = inspect.getattr_static(type(amqp), _SENDER)
    make = getattr(made, "func", None) or getattr(made, "fget", None)
    sender: Callable[..., Any] = make(amqp) if make is not None else made.__get__(amqp)
    return sender
