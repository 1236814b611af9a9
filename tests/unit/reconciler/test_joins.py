from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from uuid import UUID

import pytest

from jobguard.model import Join, LastOutcome, Observation, Outcome, Presence, new_token
from jobguard.reconciler.joins import Joins, Met, met
from tests.fakes.world import Clock
from tests.support import newly_owed

GRACE, PATIENCE = 10.0, 60.0
ENDED = {outcome: LastOutcome(outcome=outcome) for outcome in Outcome}


@pytest.mark.parametrize(
    ("last_outcomes", "failure_will_do", "answer"),
    [
        ({}, False, Met.YES),
        ({"a": ENDED[Outcome.COMPLETED]}, False, Met.YES),
        ({"a": ENDED[Outcome.COMPLETED], "b": ENDED[Outcome.COMPLETED]}, False, Met.YES),
        ({"a": ENDED[Outcome.COMPLETED], "b": LastOutcome(owed=True)}, False, Met.NOT_YET),
        ({"a": LastOutcome(owed=True, outcome=Outcome.COMPLETED)}, False, Met.NOT_YET),
        ({"a": ENDED[Outcome.FAILED]}, False, Met.NOT_YET),
        ({"a": ENDED[Outcome.FAILED]}, True, Met.YES),
        ({"a": ENDED[Outcome.DEAD]}, False, Met.NOT_YET),
        ({"a": ENDED[Outcome.DEAD]}, True, Met.YES),
        ({"a": ENDED[Outcome.CANCELLED]}, True, Met.NOT_YET),
        ({"a": LastOutcome()}, False, Met.UNKNOWN),
        ({"a": LastOutcome(), "b": ENDED[Outcome.COMPLETED]}, False, Met.UNKNOWN),
        ({"a": LastOutcome(), "b": LastOutcome(owed=True)}, False, Met.NOT_YET),
        ({"a": LastOutcome(), "b": ENDED[Outcome.FAILED]}, False, Met.NOT_YET),
    ],
)
def test_what_is_waited_for(
    last_outcomes: Mapping[str, LastOutcome], failure_will_do: bool, answer: Met
) -> None:
    """A job is released when all dependencies have ended as it requires, and not before."""
    assert met(Join(tuple(last_outcomes), failure_will_do), last_outcomes, {}) is answer


@pytest.mark.parametrize(
    ("outcome", "answer"),
    [(Outcome.COMPLETED, Met.YES), (Outcome.FAILED, Met.NOT_YET), (None, Met.NOT_YET)],
)
def test_what_the_library_takes_for_running(outcome: Outcome | None, answer: Met) -> None:
    """A dependency that Redis shows as running or failed has completed only if the ledger says so."""
    token = new_token()
    ended = {} if outcome is None else {token: outcome}
    assert met(Join(doubtful=(token,)), {}, ended) is answer


class Stage:
    """Waiting jobs, and a ledger that knows of other jobs."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.last_outcomes: dict[str, LastOutcome] = {}
        self.asked: list[Sequence[str]] = []
        self.joins = Joins(
            self._ask, lambda _: {}, grace=GRACE, patience=PATIENCE, clock=self.clock
        )

    def _ask(self, job_ids: Sequence[str]) -> Mapping[str, LastOutcome]:
        self.asked.append(job_ids)
        return {job_id: self.last_outcomes.get(job_id, LastOutcome()) for job_id in job_ids}

    def observe(
        self, token: UUID, join: Join | None, *, reports_complete: bool = True, recoveries: int = 0
    ) -> bool:
        """Inspect one of them, and return True if it is released."""
        owed = replace(newly_owed(token, job_id="child", queue="q"), recoveries=recoveries)
        seen = Observation(Presence.SCHEDULED, "deferred", joins=join)
        return list(self.joins.over([(owed, seen)], reports_complete=reports_complete)) == [token]


def test_two_inspections_a_grace_apart() -> None:
    """A job is released after two inspections a grace apart, because the library needs a moment itself."""
    stage, token, join = Stage(), new_token(), Join(("parent",))
    stage.last_outcomes["parent"] = ENDED[Outcome.COMPLETED]

    assert not stage.observe(token, join)
    assert stage.joins.pending
    stage.clock.advance(GRACE / 2)
    assert not stage.observe(token, join)
    stage.clock.advance(GRACE / 2)
    assert stage.observe(token, join)
    assert not stage.joins.pending


def test_a_job_that_moved_on_starts_again() -> None:
    """A job that the library has moved meanwhile must be seen twice again."""
    stage, token, join = Stage(), new_token(), Join(("parent",))
    stage.last_outcomes["parent"] = ENDED[Outcome.COMPLETED]

    assert not stage.observe(token, join)
    stage.clock.advance(GRACE)
    assert not stage.observe(token, None)
    assert not stage.observe(token, join)
    stage.clock.advance(GRACE)
    stage.last_outcomes["parent"] = LastOutcome(owed=True)
    assert not stage.observe(token, join)
    stage.last_outcomes["parent"] = ENDED[Outcome.COMPLETED]
    assert not stage.observe(token, join)
    stage.clock.advance(GRACE)
    assert stage.observe(token, join)


def test_the_unknown_needs_patience_and_drained_reports() -> None:
    """A dependency that was never recorded counts as ended after a sweep with all reports written."""
    stage, token, join = Stage(), new_token(), Join(("unknown",))

    assert not stage.observe(token, join)
    assert not stage.joins.pending, "one pass does not wait for it"
    stage.clock.advance(PATIENCE / 2)
    assert not stage.observe(token, join, reports_complete=False)
    stage.clock.advance(PATIENCE / 2)
    assert not stage.observe(token, join)
    stage.clock.advance(PATIENCE)
    assert stage.observe(token, join)


def test_an_unknown_dependency_of_a_restored_job_may_be_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A restored job does not run before a dependency that was never recorded, and one log line says so."""
    stage, token, join = Stage(), new_token(), Join(("unknown", "parent"))
    stage.last_outcomes["parent"] = ENDED[Outcome.COMPLETED]

    for _ in range(4):
        assert not stage.observe(token, join, recoveries=1)
        stage.clock.advance(PATIENCE)
    (line,) = [
        fields
        for record in caplog.records
        if (fields := vars(record)["jobguard"])["event"] == "job_waits_for_unknown"
    ]
    assert line["waits_for"] == ["unknown"]
    stage.last_outcomes["unknown"] = ENDED[Outcome.COMPLETED]
    assert not stage.observe(token, join, recoveries=1)
    stage.clock.advance(GRACE)
    assert stage.observe(token, join, recoveries=1)


def test_jobs_that_wait_rightly_cost_no_query() -> None:
    """The ledger is only asked about dependencies that the library has forgotten."""
    stage = Stage()
    stage.observe(new_token(), None)
    stage.observe(new_token(), Join(()))

    assert stage.asked == []
