from __future__ import annotations

import time
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from jobguard.model import Cause, Claim, LastOutcome, Outcome
from tests.contract.conftest import SOURCE, Contract, delivery, retry_of

if TYPE_CHECKING:
    pass


def test_an_older_delivery_is_overtaken_when_a_later_one_begins(ledger: Contract) -> None:
    """A later delivery that was claimed has overtaken an older one; one that only waits has not."""
    worker = ledger.working()
    older = ledger.recorded()
    worker.start(older.token)  # otherwise the record of the next delivery would supersede it
    ledger.advance(1)
    later = ledger.recorded()
    unrelated = ledger.recorded("other")

    def overtaken() -> frozenset[UUID]:
        tokens = [older.token, later.token, unrelated.token]
        return ledger.leader.overtaken(SOURCE, tokens)

    assert overtaken() == frozenset()
    claim = worker.start(later.token)
    assert overtaken() == {older.token}
    worker.end(claim)
    assert overtaken() == {older.token}


def test_a_cancelled_delivery_overtakes_nothing(ledger: Contract) -> None:
    """A cancelled delivery overtakes no other, nor does an earlier one that ended late."""
    worker = ledger.working()
    first = ledger.recorded()
    claim = worker.start(first.token)
    ledger.advance(1)
    second = ledger.recorded()
    worker.end(claim)
    worker.start(second.token)
    ledger.advance(1)
    third = ledger.recorded()
    ledger.cancel(tokens=[third.token])

    assert ledger.leader.overtaken(SOURCE, [second.token]) == frozenset()


def test_the_last_outcome_of_a_job_id(ledger: Contract) -> None:
    """A job id is owed or not, and has the outcome of its last delivery; a retry is no outcome."""
    worker = ledger.working()
    first = worker.start(ledger.recorded("retried").token)
    retry = retry_of(first, "retried")
    assert not ledger.record(retry).refused
    assert ledger.leader.last_outcomes(SOURCE, ["retried"]) == {"retried": LastOutcome(owed=True)}
    worker.end(worker.start(retry.token), job_id="retried")
    for outcome in (Outcome.FAILED, Outcome.COMPLETED):
        worker.end(worker.start(ledger.recorded("again").token), outcome, job_id="again")
        ledger.advance(1)
    ledger.recorded("again")

    assert ledger.leader.last_outcomes(SOURCE, ["retried", "again", "never"]) == {
        "retried": LastOutcome(outcome=Outcome.COMPLETED),
        "again": LastOutcome(owed=True, outcome=Outcome.COMPLETED),
        "never": LastOutcome(),
    }
    assert ledger.leader.last_outcomes(SOURCE + 1, ["again"]) == {"again": LastOutcome()}


def test_pages_go_in_the_order_of_tokens(ledger: Contract) -> None:
    """Each page continues after the last token of the page before."""
    tokens = [ledger.recorded(f"j{n}", fresh=True).token for n in range(5)]
    after: UUID | None = None
    pages = []
    for _ in range(3):
        page = ledger.leader.page(SOURCE, after=after, limit=2)
        pages.append([row.token for row in page])
        after = pages[-1][-1]
    assert pages == [tokens[:2], tokens[2:4], tokens[4:]]
    assert ledger.leader.page(SOURCE, after=after, limit=2) == []


def test_owed_deliveries_are_counted_by_queue(ledger: Contract) -> None:
    """Owed deliveries are counted by queue; ended ones do not count."""
    for number in range(3):
        ledger.recorded(f"j{number}")
    ledger.recorded("mail", queue="mail")
    ledger.cancel(job_ids=["j0"])
    assert ledger.leader.tally(SOURCE, after=None, limit=9) == ({"default": 2, "mail": 1}, None)


def test_the_clock_is_the_databases(ledger: Contract) -> None:
    """A leader can read the clock by which ages are measured."""
    assert abs(ledger.leader.now() - time.time()) < 60


def test_an_installation_has_an_identity(ledger: Contract) -> None:
    """The id of an installation stays the same."""
    before = ledger.leader.identity()["id"]
    assert before
    assert ledger.leader.identity()["id"] == before


def test_an_equal_observation_keeps_the_time_of_the_first(ledger: Contract) -> None:
    """A suspect keeps the time of its first inspection while the observation does not change."""
    term, it = ledger.elected(), ledger.recorded()
    ledger.leader.suspect(term, SOURCE, [(it.token, Cause.TOPOLOGY, "gone")])
    ledger.advance(10)
    ledger.leader.suspect(term, SOURCE, [(it.token, Cause.INCIDENT, "gone")])
    row = ledger.watched()[it.token]
    assert (row.suspected, row.suspected_mark) == (Cause.INCIDENT, "gone")
    assert 10 <= row.suspected_for < 20
    assert ledger.owed()[it.token].suspected is Cause.INCIDENT
    ledger.leader.suspect(term, SOURCE, [(it.token, Cause.INCIDENT, "gone, else")])
    row = ledger.watched()[it.token]
    assert row.suspected_mark == "gone, else"
    assert row.suspected_for < 10


@pytest.mark.parametrize("cause", [Cause.WORKER, Cause.UNTRUSTED])
def test_a_suspicion_that_decides_is_kept(ledger: Contract, cause: Cause) -> None:
    """A later and weaker cause does not replace a worker's death or distrust."""
    term, it = ledger.elected(), ledger.recorded()
    ledger.leader.suspect(term, SOURCE, [(it.token, cause, "a")])
    ledger.leader.suspect(term, SOURCE, [(it.token, Cause.UNEXPLAINED, "b")])
    row = ledger.owed()[it.token]
    assert (row.suspected, row.suspected_mark) == (cause, "b")


def test_a_delivery_that_is_in_its_place_is_cleared(ledger: Contract) -> None:
    """A cleared delivery is neither suspect nor in the outbox, and is still owed."""
    term, it = ledger.elected(), delivery()
    ledger.record(it, outbox=True)
    ledger.leader.suspect(term, SOURCE, [(it.token, Cause.INCIDENT, "")])
    ledger.leader.clear(term, SOURCE, [it.token])
    assert ledger.watched() == {}
    assert ledger.owed()[it.token].suspected is None


def test_an_untrusted_delivery_is_not_watched(ledger: Contract) -> None:
    """An untrusted delivery is not watched, because it is never recovered."""
    term, it = ledger.elected(), ledger.recorded()
    ledger.leader.suspect(term, SOURCE, [(it.token, Cause.UNTRUSTED, "")])
    assert ledger.watched() == {}
    assert ledger.owed()[it.token].suspected is Cause.UNTRUSTED


def test_a_suspicion_goes_before_a_missing_push(ledger: Contract) -> None:
    """A suspect in the outbox has the cause of its suspicion."""
    it = delivery()
    ledger.record(it, outbox=True)
    ledger.leader.suspect(ledger.elected(), SOURCE, [(it.token, Cause.INCIDENT, "")])
    assert ledger.watched()[it.token].suspected is Cause.INCIDENT


def test_claims_of_gone_workers_are_watched(ledger: Contract) -> None:
    """Claims of workers that died, exited, or never beat are watched; those of a live worker are not."""
    term = ledger.elected()
    dead, left, alive = ledger.working(), ledger.working(), ledger.working()
    unknown = ledger.worker()
    tokens = {}
    for worker in (dead, left, alive, unknown):
        tokens[worker.id] = ledger.recorded(str(worker.id)).token
        assert isinstance(worker.claim(tokens[worker.id]), Claim)
    ledger.leader.declare_dead(term, [dead.id])
    left.leave()
    watched = ledger.watched()
    assert set(watched) == {tokens[worker.id] for worker in (dead, left, unknown)}
    assert {row.claim_worker: row.claim_announced for row in watched.values()} == {
        dead.id: False,
        left.id: True,
        unknown.id: False,
    }
    assert not any(row.claim_live for row in watched.values())


def test_a_claim_that_its_worker_no_longer_lists_is_watched(ledger: Contract) -> None:
    """A dead attempt of a live worker is watched like the claim of a dead worker."""
    it = ledger.recorded()
    worker = ledger.working()
    worker.start(it.token)
    assert ledger.watched() == {}
    worker.forget_by_beats(it.token)
    assert list(ledger.watched()) == [it.token]


def test_watched_deliveries_are_paged(ledger: Contract) -> None:
    """The watched deliveries are paged in the order of their tokens."""
    them = [delivery(f"j{n}") for n in range(4)]
    tokens = [it.token for it in them]
    ledger.record(*them, outbox=True)
    first = ledger.leader.watched(SOURCE, limit=3)
    assert [row.token for row in first] == tokens[:3]
    rest = ledger.leader.watched(SOURCE, limit=3, after=tokens[2])
    assert [row.token for row in rest] == tokens[3:]
