from __future__ import annotations

import inspect
from typing import Any, cast
from uuid import uuid4

import pytest

from jobguard.adapter import Session, Source, Tracker
from jobguard.errors import StoreUnavailable
from jobguard.host_safety import _Session, _Tracker, safe_tracker
from jobguard.model import Claim, Outcome, Recorded


class Interrupt(BaseException):
    """What a signal throws into a process."""


class Broken:
    """A tracker that raises whatever is asked of it."""

    source = Source("n", "rq", "a")
    push_deadline = 7.0

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        def raises(*_: object, **__: object) -> None:
            raise self._error

        return raises


def behind(error: BaseException) -> Tracker:
    """Return a tracker that would raise this."""
    return safe_tracker(cast(Tracker, Broken(error)))


def test_what_raises_answers_as_if_we_were_absent() -> None:
    """Nothing is guarded, recorded, accepted, in doubt or heard; what a worker starts runs unclaimed."""
    tracker, token = behind(RuntimeError("ours")), uuid4()

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
    claim = session.start(token, lambda: pytest.fail("nobody asks for it"))
    assert claim == Claim(token, 0)
    session.end(claim, Outcome.COMPLETED, job_id="id", queue="q", task="t")
    session.mark_superseded(claim)
    session.abandon(claim)
    session.consumes(["q"])
    session.take_over_beats(claim, lambda: False)
    session.flush()
    session.close()


@pytest.mark.parametrize(("kind", "wall"), [(Tracker, _Tracker), (Session, _Session)])
def test_there_is_an_answer_for_everything_an_adapter_may_ask(kind: type, wall: Any) -> None:
    """A method that the seam gains and the wall does not know would let through what it raises."""
    asked = {name for name, value in vars(kind).items() if inspect.isfunction(value)}
    assert {name for name in asked if not name.startswith("_")} == wall._answers.keys()


def test_what_the_user_asked_to_hear_is_heard() -> None:
    """A record that Postgres did not take, where it shall raise; from nothing else."""
    tracker = behind(StoreUnavailable())

    with pytest.raises(StoreUnavailable):
        tracker.record([])
    tracker.cancel(job_ids=["id"])


def test_the_hosts_own_interrupts_pass() -> None:
    """A signal that strikes inside of our code is the host's."""
    with pytest.raises(Interrupt):
        behind(Interrupt()).guards("q")


def test_what_does_not_raise_is_passed_through() -> None:
    """Its identity, and what it knows."""
    tracker = behind(RuntimeError())

    assert tracker.source == Broken.source
    assert tracker.push_deadline == 7.0
