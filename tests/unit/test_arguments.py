from __future__ import annotations

import base64
import json
import pickle
import zlib
from typing import Any

import pytest

from jobguard.adapters.celery import envelope as celery
from jobguard.adapters.dramatiq import envelope as dramatiq
from jobguard.adapters.rq import envelope as rq
from jobguard.model import new_token
from jobguard.operations.brokers import arguments_of

ARGS, KWARGS = ["a", 1], {"k": None}


def of_celery(body: Any, **more: Any) -> bytes:
    """Return the envelope of a task with this body."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    message = {
        "body": base64.b64encode(raw).decode(),
        "content-type": "application/json",
        "headers": {},
        "properties": {"body_encoding": "base64"},
    } | more
    return celery.encode(celery.Routing("mail"), json.dumps(message).encode())


def of_rq(data: bytes) -> bytes:
    """Return the envelope of a job with this data."""
    return rq.encode(rq.Routing(), {"data": data})


def of_dramatiq(data: bytes) -> bytes:
    """Return the envelope of a message."""
    return dramatiq.Envelope(new_token(), "mail", data).encode()


class Bomb:
    """Fails the test when it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("unpickled",))


JSON = json.dumps(["app.send", None, ARGS, KWARGS]).encode()
READABLE = {
    "rq": ("rq", of_rq(zlib.compress(JSON))),
    "rq, not compressed": ("rq", of_rq(JSON)),
    "celery": ("celery", of_celery([ARGS, KWARGS, {"chord": None}])),
    "celery, protocol 1": ("celery", of_celery({"args": ARGS, "kwargs": KWARGS})),
    "celery, compressed": (
        "celery",
        of_celery(
            zlib.compress(json.dumps([ARGS, KWARGS, {}]).encode()),
            headers={"compression": "application/x-gzip"},
        ),
    ),
    "dramatiq": ("dramatiq", of_dramatiq(json.dumps({"args": ARGS, "kwargs": KWARGS}).encode())),
}
PICKLED = pickle.dumps(Bomb())
UNREADABLE = {
    "rq, pickled": ("rq", of_rq(zlib.compress(PICKLED))),
    "rq, of another shape": ("rq", of_rq(zlib.compress(b"[1, 2]"))),
    "rq, nested too deep": ("rq", of_rq(zlib.compress(b"[" * 100_000))),
    "rq, damaged": ("rq", b"\x01\x00"),
    "rq, of a later version": ("rq", b"\xff"),
    "celery, pickled": (
        "celery",
        of_celery(PICKLED, **{"content-type": "application/x-python-serialize"}),
    ),
    "celery, pickled, and said to be JSON": ("celery", of_celery(PICKLED)),
    "celery, of another shape": ("celery", of_celery("text")),
    "dramatiq, pickled": ("dramatiq", of_dramatiq(PICKLED)),
    "dramatiq, of another shape": ("dramatiq", of_dramatiq(b"[]")),
    "an unknown library": ("unknown", b"x"),
}


@pytest.mark.parametrize("name", READABLE)
def test_arguments_in_json_are_read(name: str) -> None:
    """The arguments of a job are read if its message is JSON."""
    assert arguments_of(*READABLE[name]) == {"args": ARGS, "kwargs": KWARGS}


@pytest.mark.parametrize("name", UNREADABLE)
def test_everything_else_stays_unread(name: str) -> None:
    """What is not JSON, or has another shape, gives no arguments; nothing is unpickled."""
    assert arguments_of(*UNREADABLE[name]) is None


def test_a_small_body_that_inflates_to_a_large_one_is_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A body is inflated up to a bound."""
    monkeypatch.setattr("jobguard.redis_values._INFLATED", 1000)
    bomb = zlib.compress(json.dumps(["t", None, ["a" * 10_000], {}]).encode())
    assert arguments_of("rq", of_rq(bomb)) is None
