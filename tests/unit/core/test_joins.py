from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from uuid import UUID

import pytest

from jobguard.job import Fate, Join, Outcome, Presence, Sighting, new_token
from jobguard.reconciler.joins import Joins, Met, met
from tests.support import newly_owed
from tests.unit.core.fakes import Clock

GRACE, PATIENCE = 10.0, 60.0
ENDED = {outcome: Fate(outcome=outcome) for outcome in Outcome}


@pytest.mark.parametrize(
    ("fates", "failure_will_do", "answer"),
    [
        ({}, False, Met.YES),
        ({"a": ENDED[Outcome.COMPLETED]}, False, Met.YES),
        ({"a": ENDED[Outcome.COMPLETED], "b": ENDED[Outcome.COMPLETED]}, False, Met.YES),
        ({"a": ENDED[Outcome.COMPLETED], "b": Fate(owed=True)}, False, Met.NOT_YET),
        ({"a": Fate(owed=True, outcome=Outcome.COMPLETED)}, False, Met.NOT_YET),
        ({"a": ENDED[Outcome.FAILED]}, False, Met.NOT_YET),
        ({"a": ENDED[Outcome.FAILED]}, True, Met.YES),
        ({"a": ENDED[Outcome.DEAD]}, False, Met.NOT_YET),
        ({"a": ENDED[Outcome.DEAD]}, True, Met.YES),
        ({"a": ENDED[Outcome.CANCELLED]}, True, Met.NOT_YET),
        ({"a": Fate()}, False, Met.UNKNOWN),
        ({"a": Fate(), "b": ENDED[Outcome.COMPLETED]}, False, Met.UNKNOWN),
        ({"a": Fate(), "b": Fate(owed=True)}, False, Met.NOT_YET),
        ({"a": Fate(), "b": ENDED[Outcome.FAILED]}, False, Met.NOT_YET),
    ],
)
def test_what_is_waited_for(fates: Mapping[str, Fate], failure_will_do: bool, answer: Met) -> None:
    """A job goes on when all have ended as it wants; one that is to come, or ended badly, holds it."""
    assert met(Join(tuple(fates), failure_will_do), fates, {}) is answer


@pytest.mark.parametrize(
    ("outcome", "answer"),
    [(Outcome.COMPLETED, Met.YES), (Outcome.FAILED, Met.NOT_YET), (None, Met.NOT_YET)],
)
def test_what_the_library_takes_for_running(outcome: Outcome | None, answer: Met) -> None:
    """A parent that Redis shows as running or failed has completed only if the ledger says so of it."""
    token = new_token()
    ended = {} if outcome is None else {token: outcome}
    assert met(Join(doubtful=(token,)), {}, ended) is answer


class Stage:
    """Jobs that wait, and a ledger that knows of others."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.fates: dict[str, Fate] = {}
        self.asked: list[Sequence[str]] = []
        self.joins = Joins(
            self._ask, lambda _: {}, grace=GRACE, patience=PATIENCE, clock=self.clock
        )

    def _ask(self, job_ids: Sequence[str]) -> Mapping[str, Fate]:
        self.asked.append(job_ids)
        return {job_id: self.fates.get(job_id, Fate()) for job_id in job_ids}

    def look(
        self, token: UUID, join: Join | None, *, judgeable: bool = True, recoveries: int = 0
    ) -> bool:
        """See one of them, and tell whether it goes on."""
        owed = replace(newly_owed(token, job_id="child", queue="q"), recoveries=recoveries)
        seen = Sighting(Presence.SCHEDULED, "deferred", joins=join)
        return list(self.joins.over([(owed, seen)], judgeable=judgeable)) == [token]


def test_two_looks_a_grace_apart() -> None:
    """The library needs a moment for the move itself."""
    stage, token, join = Stage(), new_token(), Join(("parent",))
    stage.fates["parent"] = ENDED[Outcome.COMPLETED]

    assert not stage.look(token, join)
    assert stage.joins.pending
    stage.clock.advance(GRACE / 2)
    assert not stage.look(token, join)
    stage.clock.advance(GRACE / 2)
    assert stage.look(token, join)
    assert not stage.joins.pending


def test_what_moved_on_begins_anew() -> None:
    """One that the library has to wait for again was not seen to wait in vain."""
    stage, token, join = Stage(), new_token(), Join(("parent",))
    stage.fates["parent"] = ENDED[Outcome.COMPLETED]

    assert not stage.look(token, join)
    stage.clock.advance(GRACE)
    assert not stage.look(token, None)
    assert not stage.look(token, join)
    stage.clock.advance(GRACE)
    stage.fates["parent"] = Fate(owed=True)
    assert not stage.look(token, join)
    stage.fates["parent"] = ENDED[Outcome.COMPLETED]
    assert not stage.look(token, join)
    stage.clock.advance(GRACE)
    assert stage.look(token, join)


def test_the_unknown_needs_patience_and_drained_reports() -> None:
    """What nobody ever heard of counts as ended after a sweep in which nothing was left to be told."""
    stage, token, join = Stage(), new_token(), Join(("stranger",))

    assert not stage.look(token, join)
    assert not stage.joins.pending, "one pass does not wait for it"
    stage.clock.advance(PATIENCE / 2)
    assert not stage.look(token, join, judgeable=False)
    stage.clock.advance(PATIENCE / 2)
    assert not stage.look(token, join)
    stage.clock.advance(PATIENCE)
    assert stage.look(token, join)


def test_the_unknown_may_be_lost_with_what_was_put_back(caplog: pytest.LogCaptureFixture) -> None:
    """A job must not run without another that was never recorded, and never ran. One line says so."""
    stage, token, join = Stage(), new_token(), Join(("stranger", "parent"))
    stage.fates["parent"] = ENDED[Outcome.COMPLETED]

    for _ in range(4):
        assert not stage.look(token, join, recoveries=1)
        stage.clock.advance(PATIENCE)
    (said,) = [record for record in caplog.records if "nobody recorded" in record.getMessage()]
    assert "stranger" in said.getMessage() and "parent" not in said.getMessage()
    stage.fates["stranger"] = ENDED[Outcome.COMPLETED]
    assert not stage.look(token, join, recoveries=1)
    stage.clock.advance(GRACE)
    assert stage.look(token, join, recoveries=1)


def test_nothing_is_asked_of_those_that_wait_rightly() -> None:
    """The ledger is asked only for what the library has forgotten."""
    stage = Stage()
    stage.look(new_token(), None)
    stage.look(new_token(), Join(()))

    assert stage.asked == []
