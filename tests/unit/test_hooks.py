from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest

import jobguard
from jobguard import hooks
from jobguard.adapter import hears_dead, report_dead, running_job
from jobguard.errors import (
    ConfigurationError,
    NoRights,
    NotEnded,
    NotMigrated,
    StoreUnavailable,
    WorkersDied,
)
from jobguard.guard import JobGuard
from jobguard.hooks import JobEvent
from jobguard.model import Claim, Outcome
from jobguard.settings import Settings
from tests.support import SLOWEST

SOURCE, OTHER = 7, 8


class Ledger:
    """Answers how a job ended, one answer after the other."""

    def __init__(self, *answers: Outcome | Exception | None) -> None:
        self.answers = list(answers)

    def end_of(self, source: int, job_id: str) -> Outcome | None:
        """Return the next answer; the last one stays."""
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def tracker(source: int = SOURCE) -> Any:
    """Return what a run needs of a tracker."""
    return SimpleNamespace(source=SimpleNamespace(id=source), heartbeat=lambda *_, **__: True)


@pytest.fixture
def guard() -> Iterator[JobGuard]:
    """Give a guard of the source."""
    made: Any = JobGuard(Settings(), tracker=tracker())
    yield made
    hooks.remove_all(SOURCE)


def watch(guard: JobGuard) -> list[hooks.JobEvent]:
    """Collect all events of the guard."""
    seen: list[hooks.JobEvent] = []
    for event in hooks.EVENTS:
        guard.on(event)(seen.append)
    return seen


def test_the_events_of_a_run_come_in_their_order(guard: JobGuard) -> None:
    """A run starts, reports and finishes; a function of another source is not called."""
    seen = watch(guard)
    with running_job(tracker(), Claim(uuid4(), 1), "j", attempt=3, limit=60):
        job = jobguard.current()
        assert job.progress(0.5, row=1)
        assert (job.attrs, job.previous_attempts) == ({"row": 1}, 2)
        assert job.deadline is not None
    with running_job(tracker(OTHER), Claim(uuid4(), 1), "other", attempt=1):
        pass
    assert [event.name for event in seen] == ["start", "heartbeat", "update", "finish"]
    assert {event.job.id for event in seen} == {"j"}
    assert (seen[2].progress, seen[2].attrs) == (0.5, {"row": 1})


def test_a_failed_run_has_its_error_and_a_repeated_one_is_recovered(guard: JobGuard) -> None:
    """The error reaches the library as before; a run after a worker's death is announced first."""
    seen = watch(guard)
    wrong = ValueError("wrong")
    run = running_job(tracker(), Claim(uuid4(), 2, crashes=1), "j", attempt=1)
    with pytest.raises(ValueError, match="wrong"), run:
        raise wrong
    assert [event.name for event in seen] == ["recovered", "start", "error"]
    assert seen[-1].error is wrong


def test_the_error_of_a_hook_reaches_neither_the_job_nor_the_next_hook(
    guard: JobGuard, caplog: pytest.LogCaptureFixture
) -> None:
    """A function that fails is logged, and the others are called."""

    @guard.on("start")
    def fails(event: hooks.JobEvent) -> None:
        raise RuntimeError("a wrong hook")

    seen = watch(guard)
    with caplog.at_level(logging.ERROR), running_job(tracker(), Claim(uuid4(), 1), "j", attempt=1):
        pass
    assert [event.name for event in seen] == ["start", "finish"]
    assert "a wrong hook" in caplog.text


def test_an_unknown_event_is_an_error(guard: JobGuard) -> None:
    """A typing error in the name of an event is found where it is written, also with an inert guard."""
    for each in (guard, JobGuard(Settings(), inert="a test")):
        with pytest.raises(ConfigurationError, match="no event 'begin'"):
            each.on("begin")(print)
        with pytest.raises(ConfigurationError, match="JOBGUARD_NOTIFY_URL"):
            each.on("held")(print)


def test_a_hook_that_would_not_run_is_an_error(guard: JobGuard) -> None:
    """`on` refuses a coroutine function, because nothing awaits its coroutine."""

    async def later(event: JobEvent) -> None:
        raise AssertionError

    class Later:
        async def __call__(self, event: JobEvent) -> None:
            raise AssertionError

    for wrong in (later, Later(), "no function"):
        with pytest.raises(ConfigurationError, match="give a plain function"):
            guard.on("finish")(cast(Any, wrong))


def test_a_dead_job_is_reported_to_its_source_alone(guard: JobGuard) -> None:
    """The functions of "dead" get the id and the error that the library gets; errors are contained."""

    @guard.on("dead")
    def fails(event: hooks.JobEvent) -> None:
        raise RuntimeError("a wrong hook")

    seen = watch(guard)
    assert hears_dead(tracker())
    assert not hears_dead(tracker(OTHER))
    report_dead(tracker(OTHER), "other", attempt=1)
    report_dead(tracker(), "j", attempt=2)
    assert [(event.name, event.job.id, event.job.attempt) for event in seen] == [("dead", "j", 2)]
    assert isinstance(seen[0].error, WorkersDied)


def test_a_wait_ends_with_the_outcome(guard: JobGuard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait goes on while the job is owed and while Postgres is away, also for asyncio."""
    for wait in (guard.wait, lambda *given: asyncio.run(guard.await_job(*given))):
        ledger = Ledger(None, StoreUnavailable(), Outcome.COMPLETED)
        monkeypatch.setattr(guard, "_ledger", lambda ledger=ledger: ledger)
        assert wait("j", 30) is Outcome.COMPLETED


def test_a_wait_ends_at_once_where_no_wait_helps(
    guard: JobGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ledger that is not migrated, or that the role may not read, is the error itself."""
    ledger = Ledger(NoRights("no right"), NotMigrated("no table"))
    monkeypatch.setattr(guard, "_ledger", lambda: ledger)
    with pytest.raises(NoRights):
        guard.wait("j", timeout=SLOWEST)
    with pytest.raises(NotMigrated):
        asyncio.run(guard.await_job("j", timeout=SLOWEST))


def test_a_wait_has_a_deadline(guard: JobGuard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that does not end in time is a TimeoutError that names the job."""
    ledger = Ledger(None)
    monkeypatch.setattr(guard, "_ledger", lambda: ledger)
    with pytest.raises(TimeoutError, match="job j has not ended"):
        guard.wait("j", 0.01)
    with pytest.raises(NotEnded):
        asyncio.run(guard.await_job("j", 0.01))
