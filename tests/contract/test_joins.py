"""Joins, derived tokens, sources with one body per push, and declined and released deliveries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest

from jobguard.model import (
    RAN_BEFORE_RECORD,
    Cause,
    Claim,
    Delivery,
    Ended,
    OpenJoin,
    Outcome,
    Parent,
    Part,
    Refusal,
    Refused,
    Unknown,
    derived_token,
    new_token,
)
from jobguard.store.protocols import Closing, SourceRow, Void
from tests.contract.conftest import CRASH_BUDGET, NAMESPACE, SOURCE, Contract, Worker, delivery

PLENTY = 100


@pytest.fixture
def bodies(ledger: Contract) -> Contract:
    """Give a source whose library keeps one body per push."""
    row = SourceRow(SOURCE, NAMESPACE, "celery", "localhost:6379/0", "", None, "", one_body=False)
    ledger.store.register(row)
    return ledger


def opened(ledger: Contract) -> dict[str, OpenJoin]:
    """Return the open joins by id."""
    found = ledger.leader.open_joins(SOURCE, after="", limit=PLENTY)
    return {join.id: join for join in found}


def complete(ledger: Contract, quiet: float = 10.0) -> list[str]:
    """Return the ids of the joins whose continuation is missing."""
    return [join.id for join in ledger.leader.complete_joins(SOURCE, quiet=quiet, limit=PLENTY)]


def ends(worker: Worker, member: Delivery, join: str = "g", state: bytes = b"result") -> Ended:
    """Make a member run, and end it as a part of a join."""
    return worker.end(worker.start(member.token), part=Part(join, state))


def body(join: str = "g", **more: Any) -> Delivery:
    """Return the continuation of a join."""
    return delivery("body", fresh=True, closes=join, **more)


# Joins


def test_the_ends_of_members_are_kept_with_their_envelopes(ledger: Contract) -> None:
    """The ends of members are kept in their order; a member that has not ended is no part yet."""
    ledger.store.open_join(SOURCE, "g", size=3, state=b"body", namespace=NAMESPACE)
    first, second = (ledger.recorded(id, envelope=id.encode(), queue="mail") for id in "ab")
    ledger.recorded("c")
    worker = ledger.worker()
    ends(worker, second, state=b"2")
    ledger.advance(1)
    ends(worker, first, state=b"1")

    join = opened(ledger)["g"]
    assert (join.size, join.state) == (3, b"body")
    assert [(p.token, p.job_id, p.queue, p.state, p.envelope) for p in join.parts] == [
        (second.token, "b", "mail", b"2", b"b"),
        (first.token, "a", "mail", b"1", b"a"),
    ]


def test_a_member_counts_once(ledger: Contract) -> None:
    """A member counts once, with the first report of its end."""
    ledger.store.open_join(SOURCE, "g", size=2, state=b"", namespace=NAMESPACE)
    member = ledger.recorded("a")
    worker = ledger.worker()
    claim = worker.start(member.token)
    assert worker.end(claim, part=Part("g", b"first")) is Ended.ENDED
    assert worker.end(claim, part=Part("g", b"again")) is Ended.LATE
    assert [part.state for part in opened(ledger)["g"].parts] == [b"first"]


def test_an_end_that_does_not_count_is_no_part(ledger: Contract) -> None:
    """A failure with a stale claim is no part."""
    ledger.store.open_join(SOURCE, "g", size=1, state=b"", namespace=NAMESPACE)
    member = ledger.recorded("a")
    dead, successor = ledger.working(), ledger.working()
    claim = dead.start(member.token)
    dead.leave()
    assert isinstance(successor.claim(member.token), Claim)
    assert dead.end(claim, Outcome.FAILED, part=Part("g", b"")) is Ended.LATE
    assert opened(ledger)["g"].parts == ()


def test_a_part_of_an_unrecorded_member_counts(ledger: Contract) -> None:
    """The end of an unrecorded member counts; its part has no envelope, which waits in a spool."""
    ledger.store.open_join(SOURCE, "g", size=1, state=b"", namespace=NAMESPACE)
    worker = ledger.working()
    part = Part("g", b"result")
    assert worker.end(Claim(new_token(), 0), job_id="a", queue="mail", part=part) is Ended.UNKNOWN
    (found,) = opened(ledger)["g"].parts
    assert (found.job_id, found.queue, found.state, found.envelope) == ("a", "mail", b"result", b"")


def test_a_join_is_complete_when_all_have_ended_and_it_was_quiet_for_a_while(
    ledger: Contract,
) -> None:
    """A join is complete when all members have ended and its library had some time to continue."""
    ledger.store.open_join(SOURCE, "g", size=2, state=b"", namespace=NAMESPACE)
    first, second = ledger.recorded("a"), ledger.recorded("b")
    worker = ledger.worker()
    ends(worker, first)
    ledger.advance(60)
    assert complete(ledger) == []
    ends(worker, second)
    assert complete(ledger) == []
    ledger.advance(11)
    assert complete(ledger) == ["g"]


def test_a_join_without_a_size_is_never_complete(ledger: Contract) -> None:
    """A join is never complete before it was opened with a size."""
    ends(ledger.worker(), ledger.recorded("a"))
    ledger.store.open_join(SOURCE, "other", size=1, state=b"", namespace=NAMESPACE)
    ledger.advance(60)
    assert complete(ledger) == []
    ledger.store.open_join(SOURCE, "g", size=1, state=b"s", namespace=NAMESPACE)
    assert complete(ledger) == ["g"]


def test_its_continuation_closes_a_join_once(ledger: Contract) -> None:
    """The first continuation closes a join; another one is refused, the same one may come again."""
    ledger.store.open_join(SOURCE, "g", size=1, state=b"", namespace=NAMESPACE)
    ends(ledger.worker(), ledger.recorded("a"))
    first, second = body(), body()
    assert ledger.record(first).refused == frozenset()
    assert opened(ledger) == {}
    assert ledger.record(second).refused == {second.token}
    assert ledger.record(first).refused == frozenset()
    assert set(ledger.owed()) == {first.token}
    ledger.advance(60)
    assert complete(ledger) == []


def test_of_two_continuations_in_one_call_the_first_is_taken(ledger: Contract) -> None:
    """Of two continuations in one call the first is accepted, and other deliveries are recorded."""
    first, second, other = body(), body(), delivery("x", fresh=True)
    assert ledger.record(first, second, other).refused == {second.token}
    assert set(ledger.owed()) == {first.token, other.token}


def test_a_replayed_continuation_that_comes_too_late_is_not_owed(ledger: Contract) -> None:
    """A replayed continuation is not owed if another one came first."""
    first, second = body(), body()
    ledger.record(first)
    assert ledger.record(second, replay=True).refused == frozenset()
    assert set(ledger.owed()) == {first.token}


def test_a_closed_join_takes_no_more_parts(ledger: Contract) -> None:
    """A closed join takes no more parts."""
    ledger.store.open_join(SOURCE, "g", size=1, state=b"", namespace=NAMESPACE)
    ledger.store.close_join(SOURCE, "g")
    assert opened(ledger) == {}
    ends(ledger.worker(), ledger.recorded("a"))
    ledger.advance(60)
    assert (opened(ledger), complete(ledger)) == ({}, [])
    late = body()
    assert ledger.record(late).refused == {late.token}


def test_a_closed_join_can_be_opened_again(ledger: Contract) -> None:
    """A closed join can be opened again, because an application may send one chord twice."""
    for _ in range(2):
        ledger.store.open_join(SOURCE, "g", size=1, state=b"", namespace=NAMESPACE)
        ledger.store.open_join(SOURCE, "g", size=9, state=b"not this one", namespace=NAMESPACE)
        assert opened(ledger)["g"].size == 1
        ends(ledger.worker(), ledger.recorded("a"))
        assert len(opened(ledger)["g"].parts) == 1
        it = body()
        assert ledger.record(it).refused == frozenset()
    assert len(ledger.owed()) == 2


def test_joins_are_read_by_the_page(ledger: Contract) -> None:
    """Open joins are paged in the order of their ids, only those of the given source."""
    for n in range(5):
        ledger.store.open_join(SOURCE, f"g{n}", size=1, state=b"", namespace=NAMESPACE)
    ledger.store.open_join(SOURCE + 1, "g9", size=1, state=b"", namespace=NAMESPACE)
    page = ledger.leader.open_joins(SOURCE, after="g1", limit=2)
    assert [join.id for join in page] == ["g2", "g3"]


def test_retention_drops_joins(ledger: Contract) -> None:
    """Retention drops open and closed joins."""
    ledger.store.open_join(SOURCE, "old", size=1, state=b"", namespace=NAMESPACE)
    ends(ledger.worker(), ledger.recorded("a"), join="old")
    ledger.advance(8 * 86400)
    ledger.store.open_join(SOURCE, "young", size=1, state=b"", namespace=NAMESPACE)
    ledger.leader.rotate(retention=7 * 86400)
    assert set(opened(ledger)) == {"young"}


# Messages that a run sends


def test_a_derived_token_is_that_of_its_run() -> None:
    """A derived token depends on the parent, the job id and its count in the run, and on nothing else."""
    parent = new_token()
    assert derived_token(parent, "a") == derived_token(parent, "a") > parent
    others = {
        derived_token(parent, "b"),
        derived_token(parent, "a", 1),
        derived_token(uuid4(), "a"),
    }
    assert len({derived_token(parent, "a"), *others}) == 4


def test_a_message_of_a_killed_run_is_not_owed_again(
    bodies: Contract,
) -> None:
    """A message that a killed run sent before, and that has ended, is refused when it is sent again."""
    parent = bodies.recorded("a")
    sent = delivery("b", token=derived_token(parent.token, "b"), fresh=True, derived=True)
    assert bodies.record(sent).refused == frozenset()
    assert (
        bodies.record(sent).refused == frozenset()
    )  # it waits: the fence makes one run of the two copies
    worker = bodies.worker()
    worker.end(worker.start(sent.token))
    assert bodies.record(sent).refused == {sent.token}
    assert set(bodies.owed()) == {parent.token}


# One body per push


def test_deliveries_of_one_id_do_not_touch_each_other(bodies: Contract) -> None:
    """With one body per push a delivery supersedes only its parent."""
    first, second = bodies.recorded("j"), bodies.recorded("j")
    assert set(bodies.owed()) == {first.token, second.token}
    worker = bodies.worker()
    worker.end(Claim(new_token(), 0), job_id="j")  # an end of an unrecorded delivery
    worker.start(second.token)
    assert set(bodies.owed()) == {first.token, second.token}
    assert bodies.leader.overtaken(SOURCE, [first.token]) == frozenset()


def test_a_kept_result_may_belong_to_another_delivery(bodies: Contract) -> None:
    """A kept result may belong to another delivery of the job id that is owed or has ended since.

    A job may end before its record. So an end just before the record counts as an end after it.
    """
    worker = bodies.worker()
    first, quick = bodies.recorded("j"), bodies.recorded("other")
    worker.end(worker.start(first.token), ended_at=bodies.leader.now())
    bodies.advance(RAN_BEFORE_RECORD - 0.1)
    worker.end(worker.start(quick.token), ended_at=bodies.leader.now())
    bodies.advance(0.5)
    second, other = bodies.recorded("j"), bodies.recorded("other")

    def sharing_job_id() -> frozenset[UUID]:
        found = bodies.leader.sharing_job_id(SOURCE, [first.token, second.token, other.token])
        assert other.token in found, "its predecessor ended just before its record"
        return found - {other.token}

    assert sharing_job_id() == frozenset(), "the first ended long before the second was recorded"
    third = bodies.recorded("j")
    assert sharing_job_id() == {second.token}
    bodies.advance(1)
    worker.end(worker.start(third.token), ended_at=bodies.leader.now())
    assert sharing_job_id() == {second.token}


def test_a_retry_does_not_share_its_job_id(bodies: Contract) -> None:
    """A retry does not share its job id with the attempt before, which stored no end."""
    worker, first = bodies.worker(), bodies.recorded("j")
    claim = worker.start(first.token)
    retry = delivery("j", parent=Parent(first.token, claim=claim.number, worker=worker.id))
    bodies.record(retry)
    assert bodies.leader.sharing_job_id(SOURCE, [retry.token]) == frozenset()


def test_a_late_record_stands_beside_a_younger_delivery(bodies: Contract) -> None:
    """With one body per push a late record is owed beside a younger delivery of its job id."""
    older = delivery("j")
    younger = bodies.recorded("j")
    bodies.record(older, replay=True)
    assert set(bodies.owed()) == {older.token, younger.token}


def test_a_parent_is_superseded_with_one_body_per_push(bodies: Contract) -> None:
    """A retry supersedes its parent with one body per push too."""
    first = bodies.recorded("j")
    claim = bodies.worker().start(first.token)
    retry = delivery("j", parent=Parent(first.token, claim=claim.number), fresh=True)
    assert bodies.record(retry).refused == frozenset()
    assert set(bodies.owed()) == {retry.token}
    assert bodies.outcome(first.token) is Outcome.SUPERSEDED


def test_a_retry_that_a_worker_recorded_first_takes_its_parents_place(
    bodies: Contract,
) -> None:
    """A retry that a worker recorded without its parent supersedes the parent when its record arrives."""
    first = bodies.recorded("j")
    claim = bodies.worker().start(first.token)
    retry = delivery("j", parent=Parent(first.token, claim=claim.number), fresh=True)
    bodies.record(replace(retry, parent=None), replay=True, newest=True)
    bodies.worker().start(retry.token)
    bodies.record(retry, replay=True)
    assert set(bodies.owed()) == {retry.token}
    assert bodies.outcome(first.token) is Outcome.SUPERSEDED


# Declined and released


def declined(ledger: Contract, token: UUID) -> int:
    """Decline a delivery once more."""
    return ledger.store.decline(SOURCE, token, most=2, wait=10.0, error="no such task")


def test_a_declined_delivery_waits_and_is_dead_in_the_end(ledger: Contract) -> None:
    """A declined delivery waits twice as long each time, without a crash, and is dead in the end."""
    it = ledger.recorded("j", envelope=b"kept")
    assert declined(ledger, it.token) == 1
    assert ledger.watched() == {}
    ledger.advance(11)
    row = ledger.watched()[it.token]
    assert (row.suspected, row.suspected_mark, row.crashes) == (Cause.WORKER, "", 0)

    ledger.leader.restored(ledger.elected(), SOURCE, [it.token])
    assert declined(ledger, it.token) == 0
    ledger.advance(11)
    assert ledger.watched() == {}
    ledger.advance(10)
    assert set(ledger.watched()) == {it.token}

    assert declined(ledger, it.token) == 0
    assert ledger.outcome(it.token) is Outcome.DEAD
    assert ledger.owed() == {}


def test_what_is_declined_before_its_restore_is_counted_stays_declined(ledger: Contract) -> None:
    """A worker may take and decline it between the leader's push, or inspection, and its statement."""
    it, term = ledger.recorded("j"), ledger.elected()
    declined(ledger, it.token)
    ledger.leader.restored(term, SOURCE, [it.token], causes={it.token: Cause.WORKER})
    ledger.leader.clear(term, SOURCE, [it.token])
    assert ledger.leader.restores(SOURCE, [it.token]) == {it.token: 0}, (
        "it was taken by a guarded worker"
    )
    assert ledger.watched() == {}, "it waits"
    ledger.advance(11)
    row = ledger.watched()[it.token]
    assert (row.suspected, row.suspected_mark) == (Cause.WORKER, "")
    ledger.leader.clear(term, SOURCE, [it.token])
    assert ledger.watched() == {}


def test_the_wait_of_a_declined_delivery_has_a_bound(ledger: Contract) -> None:
    """A delivery may go back any number of times; it never waits for longer than 5 minutes."""
    it, term = ledger.recorded("j"), ledger.elected()
    for _ in range(9):
        assert ledger.store.decline(SOURCE, it.token, most=32_767, wait=5.0, error="no room")
        ledger.advance(301)
        assert set(ledger.watched()) == {it.token}
        ledger.leader.restored(term, SOURCE, [it.token])


def test_a_running_delivery_is_not_declined(ledger: Contract) -> None:
    """A running, ended or unknown delivery is not declined."""
    it = ledger.recorded("j")
    ledger.worker().start(it.token)
    declined(ledger, it.token)
    declined(ledger, new_token())
    assert ledger.watched() == {}


def test_a_released_claim_is_free(ledger: Contract) -> None:
    """A released claim is no crash, and later reports with it are late."""
    it = ledger.recorded("j")
    ledger.elected()
    worker, other = ledger.working(), ledger.working()
    claim = worker.start(it.token)
    assert other.claim(it.token) == Refused(it.token, Refusal.CLAIMED)
    ledger.store.release(SOURCE, it.token, worker.id, number=claim.number)

    again = other.claim(it.token, budget=CRASH_BUDGET)
    assert again == Claim(it.token, claim.number + 1)
    assert worker.end(claim, Outcome.FAILED) is Ended.LATE
    assert other.end(again) is Ended.ENDED


@pytest.mark.parametrize("number", [2, 0])
def test_only_its_worker_releases_a_claim(ledger: Contract, number: int) -> None:
    """Only the claim's own worker releases it, by its number or by 0."""
    it = ledger.recorded("j")
    worker, other = ledger.working(), ledger.working()
    worker.start(it.token)
    ledger.store.release(SOURCE, it.token, other.id, number=0)
    ledger.store.release(SOURCE, it.token, worker.id, number=number)
    stands = ledger.owed()[it.token].claim_number
    assert stands == (1 if number else None)


def test_a_host_reads_outcomes(ledger: Contract) -> None:
    """A host can read the outcomes of ended deliveries."""
    done, owed = ledger.recorded("a"), ledger.recorded("b")
    worker = ledger.worker()
    worker.end(worker.start(done.token), Outcome.FAILED)
    asked = [done.token, owed.token, new_token()]
    assert ledger.store.tombstones(SOURCE, asked) == {done.token: Outcome.FAILED}


def test_a_late_end_adds_its_part(ledger: Contract) -> None:
    """A late end adds its part to a join if the delivery has completed."""
    ledger.store.open_join(SOURCE, "g", size=2, state=b"", namespace=NAMESPACE)
    done, failed = ledger.recorded("a", queue="mail"), ledger.recorded("b")
    worker = ledger.worker()
    first, second = worker.start(done.token), worker.start(failed.token)
    worker.leave()
    term = ledger.elected()
    closings = [Closing(done.token, Outcome.COMPLETED), Closing(failed.token, Outcome.FAILED)]
    assert len(ledger.leader.close_owed(term, SOURCE, closings)) == 2
    assert worker.end(first, part=Part("g", b"late")) is Ended.LATE
    assert worker.end(second, part=Part("g", b"no")) is Ended.LATE
    assert [(p.job_id, p.queue, p.state) for p in opened(ledger)["g"].parts] == [
        ("a", "mail", b"late")
    ]


def test_a_delivery_closed_by_observation_is_a_part(ledger: Contract) -> None:
    """A delivery that is closed by observation adds its part to its join."""
    ledger.store.open_join(SOURCE, "g", size=1, state=b"", namespace=NAMESPACE)
    done = ledger.recorded("a", envelope=b"kept")
    closing = Closing(done.token, Outcome.COMPLETED, part=Part("g", b"result"))
    ledger.leader.close_owed(ledger.elected(), SOURCE, [closing])
    (part,) = opened(ledger)["g"].parts
    assert (part.token, part.state, part.envelope) == (done.token, b"result", b"kept")


def test_a_record_that_comes_late_fills_in_the_envelope_of_a_part(ledger: Contract) -> None:
    """A late record adds the envelope to a part, which is needed to report it to the library again."""
    ledger.store.open_join(SOURCE, "g", size=1, state=b"", namespace=NAMESPACE)
    late = delivery("a", envelope=b"late")
    worker = ledger.working()
    worker.end(Claim(late.token, 0), job_id="a", part=Part("g", b""))
    ledger.record(late, replay=True)
    assert [part.envelope for part in opened(ledger)["g"].parts] == [b"late"]
    assert ledger.owed() == {}


def test_a_retry_of_a_voided_claim_counts_until_another_is_granted(
    bodies: Contract,
) -> None:
    """A replayed retry with a voided claim is accepted while no other worker has claimed the delivery."""
    for started_again in (False, True):
        first = bodies.recorded(f"j{started_again}")
        worker, other = bodies.working(), bodies.working()
        claim = worker.start(first.token)
        worker.leave()
        term = bodies.elected()
        void = Void(first.token, claim.number, charge=False, backoff=0)
        assert bodies.leader.void(term, SOURCE, [void]) == [first.token]
        if started_again:
            other.start(first.token)
        parent = Parent(first.token, claim=claim.number)
        retry = delivery(f"j{started_again}", parent=parent, fresh=True)
        refused = bodies.record(retry, replay=True).refused
        assert refused == ({retry.token} if started_again else set())
        bodies.leader.resign(term)


def test_several_claims_are_asked_for_in_one_call(ledger: Contract) -> None:
    """Several claims in one call have an answer each; of two claims of one delivery one is granted."""
    ledger.elected()
    owed, gone = ledger.recorded("a"), ledger.recorded("b")
    worker = ledger.working()
    worker.end(worker.start(gone.token))
    requests = [
        worker.request(token) for token in (owed.token, gone.token, owed.token, new_token())
    ]
    answers = ledger.store.claims(SOURCE, requests)
    assert [answers[request.nonce] for request in requests[1::2]] == [
        Refused(gone.token, Refusal.ENDED, Outcome.COMPLETED),
        Unknown(requests[3].token),
    ]
    copies = [answers[request.nonce] for request in requests[0:3:2]]
    assert sorted(type(answer) is Claim for answer in copies) == [False, True]


@pytest.mark.parametrize("recorded", [True, False])
def test_a_late_cancel_means_what_came_of_its_job(bodies: Contract, *, recorded: bool) -> None:
    """A late cancel ends the retry of its job that was recorded since, and spares a new job.

    Also if the job itself had no record when it was moved.
    """
    first, until = delivery("j"), new_token()
    if recorded:
        bodies.record(first)
    bodies.advance(20)
    moved = delivery("j", parent=Parent(first.token))
    again = delivery("j", parent=Parent(moved.token))
    other = delivery("j")
    bodies.record(moved)
    bodies.record(again)
    bodies.record(other)
    assert bodies.cancel(job_ids=["j"], ago=10, until=until) == 1
    assert set(bodies.owed()) == {other.token}
    assert bodies.outcome(again.token) is Outcome.CANCELLED
