from __future__ import annotations

import inspect
import signal
from collections.abc import Callable
from functools import partial
from typing import Any, cast
from uuid import uuid4

import pytest

from jobguard.adapter import Session, Source, Tracker
from jobguard.errors import StoreUnavailable
from jobguard.host_safety import _Session, _Tracker, contain_errors, safe_tracker
from jobguard.model import Claim, Outcome, Recorded


class Interrupt(BaseException):
    """An exception that a signal handler raises."""


class Broken:
    """A tracker whose methods all raise."""

    source = Source("n", "rq", "a")
    push_deadline = 7.0

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        def raises(*_: object, **__: object) -> None:
            raise self._error

        return raises


class Interrupted(Broken):
    """A tracker whose methods are interrupted by a signal."""

    def __init__(self) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_: signal.raise_signal(signal.SIGUSR1)


def broken_tracker(error: BaseException) -> Tracker:
    """Return a tracker whose methods raise this error, behind its proxy."""
    return safe_tracker(cast(Tracker, Broken(error)))


def test_methods_that_raise_return_neutral_values() -> None:
    """If jobguard fails, nothing is guarded, recorded or accepted, and a start runs without a claim."""
    tracker, token = broken_tracker(RuntimeError("ours")), uuid4()

    assert tracker.guards("q") is False
    assert tracker.record([]) == Recorded(lost=True)
    assert tracker.broker_in_doubt() is False
    assert tracker.accepts_without_broker(Recorded()) is False
    assert tracker.heartbeat("id") is False
    tracker.cancel(job_ids=["id"])
    tracker.withdraw([])
    tracker.leave_to_outbox([token])
    tracker.broker_failed()
    tracker.drain_spool()
    assert tracker.recovers([token]) == frozenset()
    tracker.inherit_session(uuid4(), 1, name="w", queues=["q"]).flush()
    session = tracker.open_session(name="w", queues=["q"])
    claim = session.start(token, lambda: pytest.fail("must not be called"))
    assert claim == Claim(token, 0)
    session.end(claim, Outcome.COMPLETED, job_id="id", queue="q", task="t")
    session.mark_superseded(claim)
    session.abandon(claim)
    session.consumes(["q"])
    session.take_over_beats(claim, lambda: False)
    session.flush()
    session.close()


FOR_ONCE = {
    *("begin_effect", "finish_effect", "forget_effect", "effect_values"),
    *("seal_result", "unseal_result", "installation_id"),
}
"""Methods of jobguard.once, whose errors the user's own code asks for."""


@pytest.mark.parametrize(("kind", "proxy"), [(Tracker, _Tracker), (Session, _Session)])
def test_the_proxy_knows_every_method_of_the_protocol(kind: type, proxy: Any) -> None:
    """The proxy would let through the errors of a method that it does not know."""
    asked = {name for name, value in vars(kind).items() if inspect.isfunction(value)}
    asked = {name for name in asked if not name.startswith("_")} - FOR_ONCE
    assert asked == proxy._answers.keys()


def test_only_record_raises_store_unavailable() -> None:
    """The user may ask for an error if Postgres does not take a record; no other method raises it."""
    tracker = broken_tracker(StoreUnavailable())

    with pytest.raises(StoreUnavailable):
        tracker.record([])
    tracker.cancel(job_ids=["id"])


def test_the_hosts_own_interrupts_pass() -> None:
    """An exception of the host's signal handler passes through the proxy."""
    with pytest.raises(Interrupt):
        broken_tracker(Interrupt()).guards("q")


class TimeLimit(TimeoutError):
    """A time limit of an application, which jobguard does not know."""


def _raise_time_limit(number: int, frame: object) -> None:
    raise TimeLimit


class _Handler:
    def method(self, number: int, frame: object) -> None:
        """Raise a time limit, by another function."""
        _raise_time_limit(number, frame)

    __call__ = method


@pytest.mark.parametrize(
    "handler",
    [_raise_time_limit, _Handler(), _Handler().method, partial(partial(_raise_time_limit))],
    ids=["function", "object", "method", "partial"],
)
def test_any_exception_of_a_signal_handler_passes(handler: Callable[[int, object], None]) -> None:
    """A time limit made of a signal reaches the application; the same error of another origin does not."""
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(TimeLimit), contain_errors("interrupted"):
            signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(TimeLimit):
            safe_tracker(cast(Tracker, Interrupted())).guards("q")
        with contain_errors("not interrupted"):
            raise TimeLimit
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_attributes_pass_through_the_proxy() -> None:
    """The proxy returns the attributes of the tracker unchanged."""
    tracker = broken_tracker(RuntimeError())

    assert tracker.source == Broken.source
    assert tracker.push_deadline == 7.0


class TestContainErrors:
    """contain_errors() keeps an error of jobguard away from the host."""

    def test_an_error_is_logged_and_contained(self, caplog: pytest.LogCaptureFixture) -> None:
        """The code after the block runs and can see that the block failed."""
        with contain_errors("claim") as contained:
            raise ValueError("no such thing")
        assert contained.failed
        assert "no such thing" in caplog.text and "claim" in caplog.text

    def test_errors_that_the_user_asked_for_pass(self) -> None:
        """Errors of ``let_pass`` pass, and so do exceptions that are no errors."""
        with pytest.raises(StoreUnavailable), contain_errors("record", let_pass=StoreUnavailable):
            raise StoreUnavailable("away")
        with pytest.raises(KeyboardInterrupt), contain_errors("record"):
            raise KeyboardInterrupt
