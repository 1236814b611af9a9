"""A restored message equals the sent one: the same JSON, in the same list."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import celery
import pytest
import redis
from celery import chain, chord, group
from kombu.entity import Exchange, Queue

from jobguard.adapters.celery.broker import CeleryBroker
from jobguard.model import Presence, Restored
from tests.integration.celery.support import FakeTracker, bare, lists, observe, put_back

Make = Callable[..., celery.Celery]
Guard = Callable[[celery.Celery], FakeTracker]
App = Any

SOON = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


def add(app: App) -> Any:
    """Return the task."""
    return app.tasks["add"]


KINDS: dict[str, tuple[Callable[[App], object], dict[str, Any]]] = {
    "simple": (lambda app: add(app).delay(1, 2), {}),
    "unknown name": (lambda app: app.send_task("nobody.knows", (1,), {"k": 2}), {}),
    "eta and expires": (lambda app: add(app).apply_async((1, 2), eta=SOON, expires=SOON), {}),
    "countdown": (lambda app: add(app).apply_async((1, 2), countdown=3600, expires=7200), {}),
    "priority 2": (lambda app: add(app).apply_async((1, 2), priority=2), {}),
    "priority 5": (lambda app: add(app).apply_async((1, 2), priority=5), {}),
    "priority 9": (lambda app: add(app).apply_async((1, 2), priority=9), {}),
    "pickle": (lambda app: add(app).apply_async(({1, 2}, b"x"), serializer="pickle"), {}),
    "yaml": (lambda app: add(app).apply_async((1, "ü"), serializer="yaml"), {}),
    "msgpack": (lambda app: add(app).apply_async((b"\x00\xff", 2), serializer="msgpack"), {}),
    "zlib": (lambda app: add(app).apply_async(("x" * 999, 2), compression="zlib"), {}),
    "pickle and bzip2": (
        lambda app: add(app).apply_async(("x" * 999, 2), serializer="pickle", compression="bzip2"),
        {},
    ),
    "task_compression": (lambda app: add(app).delay("y" * 999, 2), {"task_compression": "gzip"}),
    "chain": (lambda app: chain(add(app).s(1, 2), add(app).s(3), add(app).s(4)).apply_async(), {}),
    "group": (lambda app: group(add(app).s(n, n) for n in range(5)).apply_async(), {}),
    "chord": (
        lambda app: chord([add(app).s(n, n) for n in range(3)])(app.tasks["total"].s()),
        {},
    ),
    "links": (
        lambda app: add(app).apply_async((1, 2), link=add(app).s(3), link_error=add(app).s(4)),
        {},
    ),
    "headers": (
        lambda app: add(app).apply_async(
            (1, 2), headers={"when": SOON, "id2": uuid.UUID(int=7), "name": 'ü"\n', "d": {"a": 1}}
        ),
        {},
    ),
    "properties": (
        lambda app: add(app).apply_async(
            (1, 2), correlation_id="mine", reply_to="there", user_id="me", extra={"a": [1]}
        ),
        {},
    ),
    "queue": (lambda app: add(app).apply_async((1, 2), queue="q1"), {}),
    "ignored": (lambda app: add(app).apply_async((1, 2), ignore_result=True), {}),
    "unicode": (lambda app: add(app).delay("grüße ☃", y="\U0001f600"), {}),
    "protocol 1": (
        lambda app: add(app).apply_async((1, 2), eta=SOON, expires=3600, retries=2),
        {"task_protocol": 1},
    ),
    "protocol 1 and pickle": (
        lambda app: add(app).apply_async((1, 2), serializer="pickle"),
        {"task_protocol": 1},
    ),
    "shadow, limits, stamps": (
        lambda app: add(app).s(1, 2).set(shadow="s", time_limit=3, soft_time_limit=2).delay(),
        {},
    ),
    "custom default queue": (
        lambda app: add(app).delay(1, 2),
        {"task_default_queue": "mine", "task_default_priority": 4},
    ),
    "routes": (
        lambda app: add(app).delay(1, 2),
        {"task_routes": {"add": {"queue": "sums", "priority": 6}}},
    ),
    "transient": (lambda app: add(app).apply_async((1, 2), delivery_mode=1), {}),
    "global_keyprefix": (
        lambda app: add(app).apply_async((1, 2), priority=9),
        {"broker_transport_options": {"global_keyprefix": "me:"}},
    ),
    "other steps": (
        lambda app: add(app).apply_async((1, 2), priority=7),
        {"broker_transport_options": {"priority_steps": list(range(10)), "sep": ":"}},
    ),
    "topic": (
        lambda app: add(app).apply_async((1, 2), queue="tq", routing_key="a.b.c"),
        {"task_queues": [Queue("tq", Exchange("t", "topic"), routing_key="a.#")]},
    ),
    "direct": (
        lambda app: add(app).apply_async((1, 2), exchange="d", routing_key="k"),
        {"task_queues": [Queue("dq", Exchange("d", "direct"), routing_key="k")]},
    ),
    "no base64": (
        lambda app: add(app).delay('"jobguard": "' + "0" * 32 + '"', 2),
        {"broker_transport_options": {"body_encoding": "utf-8"}},
    ),
}


def configured(conf: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with all content types accepted."""
    return {"accept_content": ["json", "pickle", "yaml", "msgpack"], **conf}


def declare(app: App) -> None:
    """Declare the queues, as a worker does at its start: a named exchange needs its bindings."""
    with app.connection_for_write() as connection:
        for queue in app.amqp.queues.values():
            queue(connection.default_channel).declare()


@pytest.mark.parametrize("kind", KINDS)
def test_restored_is_identical(
    kind: str, make_app: Make, guard: Guard, client: redis.Redis
) -> None:
    """After a FLUSHALL and a restore, every message is in its place again, unchanged."""
    send, conf = KINDS[kind]
    app = make_app(**configured(conf))
    tracker = guard(app)
    declare(app)
    send(app)
    before = lists(client)
    assert sum(map(len, before.values())) == len(tracker.recorded) > 0
    broker = CeleryBroker(tracker.source, client)
    for delivery in tracker.recorded:
        assert observe(broker, delivery).presence is Presence.WAITING

    client.flushdb()
    for delivery in tracker.recorded:
        assert observe(broker, delivery).presence is Presence.ABSENT
    assert set(put_back(broker, *tracker.recorded)) == {Restored.RESTORED}
    assert lists(client) == before
    for delivery in tracker.recorded:
        assert observe(broker, delivery).presence is Presence.WAITING


_UNLIKE = (
    "id",
    "root_id",
    "correlation_id",
    "origin",
    "eta",
    "expires",
    "reply_to",
    "group",
    "expiration",
)


@pytest.mark.parametrize("kind", KINDS)
def test_guarded_sends_what_unguarded_sends(
    kind: str, make_app: Make, guard: Guard, client: redis.Redis
) -> None:
    """Apart from our header, a message is the same as without jobguard."""
    send, conf = KINDS[kind]

    def sent() -> list[Any]:
        messages = bare(lists(client))
        client.flushdb()
        return [
            (
                key,
                list(message),
                {k: v for k, v in message["headers"].items() if k not in _UNLIKE},
                list(message["headers"]),
                {k: v for k, v in message["properties"].items() if k not in _UNLIKE},
                list(message["properties"]),
                message["content-type"],
                message["content-encoding"],
            )
            for key, several in messages.items()
            for message in several
        ]

    app = make_app(**configured(conf))
    declare(app)
    send(app)
    plain = sent()
    guarded_app = make_app(**configured(conf))
    guard(guarded_app)
    declare(guarded_app)
    send(guarded_app)
    assert sent() == plain


def test_the_record(make_app: Make, guard: Guard) -> None:
    """The record of a delivery has all fields that the ledger needs."""
    app = make_app()
    tracker = guard(app)
    before = datetime.now(UTC)
    result = add(app).apply_async(
        (1, 2), countdown=60, expires=before + timedelta(hours=1), queue="q", priority=5, retries=3
    )
    (delivery,) = tracker.recorded
    assert delivery.job_id == result.id
    assert (delivery.queue, delivery.task) == ("q", "add")
    assert (delivery.priority, delivery.attempt) == (5, 4)
    assert delivery.due_at == pytest.approx(before.timestamp() + 60, abs=5)
    assert delivery.expires_at is None  # the worker revokes an expired task, and informs its chord
    assert delivery.fresh and not delivery.derived and delivery.parent is None
