from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

from jobguard.errors import BadRow, NotLeading, StoreUnavailable
from jobguard.model import (
    Beat,
    Cause,
    Claim,
    Delivery,
    End,
    Ended,
    LastOutcome,
    Outcome,
    Parent,
    Refusal,
    Refused,
    Unknown,
    WorkerDeclaredDead,
    new_token,
    token_at,
)
from jobguard.store.protocols import Closing, LeaderStore, QueueRow, SourceRow, Void
from tests.contract.conftest import (
    CRASH_BUDGET,
    LONG,
    NAMESPACE,
    SOURCE,
    WORKER_TIMEOUT,
    Contract,
    InPostgres,
    Worker,
    delivery,
    retry_of,
)
from tests.fakes.store import MemoryLedger
from tests.support import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.contract.conftest import Together


def refused(answer: object) -> tuple[Refusal, Outcome | None]:
    """Say why a claim was refused."""
    assert isinstance(answer, Refused), answer
    return answer.reason, answer.outcome


ENDED_COMPLETED = (Refusal.ENDED, Outcome.COMPLETED)
ENDED_SUPERSEDED = (Refusal.ENDED, Outcome.SUPERSEDED)


# Sources


def test_who_registers_a_source_first_decides_its_settings(ledger: Contract) -> None:
    """A second process learns with which settings the source was made known."""
    first = SourceRow(SOURCE, NAMESPACE, "rq", "localhost:6379/0", "", None, "fence=true")
    assert ledger.store.register(first).settings == "fence=true"
    second = SourceRow(SOURCE, NAMESPACE, "rq", "localhost:6379/0", "", None, "fence=false")
    assert ledger.store.register(second).settings == "fence=true"


def test_a_leader_sees_the_sources_of_its_namespace_alone(ledger: Contract) -> None:
    """What another tenant guards is none of its business."""
    for number, namespace in ((1, NAMESPACE), (2, "others"), (3, NAMESPACE)):
        row = SourceRow(number, namespace, "rq", f"localhost:6379/{number}", "", None, "")
        ledger.store.register(row)
    assert [source.id for source in ledger.leader.sources()] == [1, 3]


def test_a_source_keeps_the_pulse_that_was_acknowledged(ledger: Contract) -> None:
    """The next leader goes on from the pulse that the last one stored."""
    ledger.store.register(SourceRow(SOURCE, NAMESPACE, "rq", "localhost:6379/0", "", None, ""))
    epoch = uuid4()
    ledger.leader.acknowledge(ledger.elected(), SOURCE, epoch, 41, run_id="run")
    (source,) = ledger.leader.sources()
    assert (source.pulse_epoch, source.pulse_n, source.run_id) == (epoch, 41, "run")


# Records


def test_what_is_recorded_is_owed(ledger: Contract) -> None:
    """A delivery is owed from its record on, with all that a look needs."""
    it = ledger.recorded(queue="mail", task="app.send", due_at=time.time() + 60, fresh=True)
    row = ledger.owed()[it.token]
    assert (row.job_id, row.queue, row.task) == ("j", "mail", "app.send")
    assert (row.crashes, row.recoveries, row.claims) == (0, 0, 0)
    assert row.claim_number is None
    assert row.suspected is None
    assert not row.expired
    assert 50 < row.due_in <= 61
    assert row.age < 50


def test_a_delivery_that_may_go_at_once_is_due(ledger: Contract) -> None:
    """Without a time set, nothing has to be waited for."""
    it = ledger.recorded()
    assert ledger.owed()[it.token].due_in <= 0


def test_a_delivery_expires(ledger: Contract) -> None:
    """Past its time to live the library would drop it, and the look says so."""
    it = ledger.recorded(expires_at=time.time() + 30)
    assert not ledger.owed()[it.token].expired
    ledger.advance(60)
    assert ledger.owed()[it.token].expired


def test_age_is_counted_from_the_record(ledger: Contract) -> None:
    """A look learns how long ago a delivery was recorded."""
    it = ledger.recorded()
    ledger.advance(100)
    assert 100 <= ledger.owed()[it.token].age < 150


@pytest.mark.parametrize("fresh", [True, False])
def test_the_same_token_again_changes_nothing(ledger: Contract, fresh: bool) -> None:
    """A record whose answer was lost can be sent once more."""
    it = ledger.recorded(fresh=fresh)
    claim = ledger.working().start(it.token)
    assert ledger.record(it).refused == frozenset()
    row = ledger.owed()[it.token]
    assert (row.claim_number, row.claim_live) == (claim.number, True)


def test_a_record_tells_whether_a_leader_leads(ledger: Contract) -> None:
    """A producer accepts without a broker only while somebody will push for it."""
    assert not ledger.record(delivery("a", fresh=True)).leader_live
    assert not ledger.record(delivery("b")).leader_live
    assert ledger.leader.elect(lease=10) is not None
    assert ledger.record(delivery("c", fresh=True)).leader_live
    assert ledger.record(delivery("d")).leader_live
    ledger.advance(11)
    assert not ledger.record(delivery("e", fresh=True)).leader_live
    assert not ledger.record(delivery("f")).leader_live


def test_what_a_leader_would_bring_back(ledger: Contract) -> None:
    """What is owed, of a trusted queue, while somebody watches its Redis; nothing that ended."""
    worker = ledger.working()
    ledger.store.register(SourceRow(SOURCE, NAMESPACE, "rq", "localhost:6379/0", "", None, ""))
    waiting, claimed, ended = (ledger.recorded(name) for name in "abc")
    worker.start(claimed.token)
    worker.end(worker.start(ended.token))
    tokens = [waiting.token, claimed.token, ended.token, new_token()]

    def recoverable() -> frozenset[UUID]:
        return ledger.store.recoverable(SOURCE, tokens)

    def watch(trusted_since: float | None) -> None:
        ledger.leader.acknowledge(term, SOURCE, uuid4(), 1, run_id=None)
        ledger.leader.trust(term, [QueueRow(SOURCE, "default", trusted_since)])

    assert recoverable() == frozenset()
    term = ledger.elected()
    assert recoverable() == frozenset(), "nobody watches this Redis"
    watch(None)
    assert recoverable() == frozenset(), "an unguarded worker may run them"
    watch(ledger.leader.now() + 1)
    assert recoverable() == frozenset(), "what was recorded before may be with one still"
    watch(ledger.leader.now() - 3600)
    assert recoverable() == {waiting.token, claimed.token}
    ledger.leader.resign(term)
    assert recoverable() == {waiting.token, claimed.token}, "another leads in a moment"
    ledger.advance(301)
    assert recoverable() == frozenset(), "it is watched no more"


def test_an_older_life_is_overtaken_when_a_later_one_begins(ledger: Contract) -> None:
    """What was recorded later and was claimed stood in its place; what only waits proves nothing."""
    worker = ledger.working()
    older = ledger.recorded()
    worker.start(older.token)  # or else the record of the next would supersede it
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


def test_a_cancelled_life_overtakes_nothing(ledger: Contract) -> None:
    """Nor does an earlier one that ended late."""
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


def test_the_fate_of_a_job_id(ledger: Contract) -> None:
    """Whether it is owed, and how its last life ended; a retry on the way there is no end."""
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


def test_a_leader_of_another_namespace_does_not_count(ledger: Contract) -> None:
    """Each namespace has a leader of its own."""
    ledger.backend.leader("others", uuid4()).elect(lease=LONG)
    assert not ledger.record(delivery()).leader_live


def test_many_deliveries_are_recorded_in_one_call(ledger: Contract) -> None:
    """A bulk of any size is owed as a whole, in the order of its tokens."""
    many = [delivery(f"j{n}", fresh=True) for n in range(600)]
    ledger.record(*many)
    assert list(ledger.owed()) == [it.token for it in many]


def test_sources_do_not_see_each_other(ledger: Contract) -> None:
    """The same job id behind another broker is another job."""
    it = ledger.recorded()
    other = delivery()
    ledger.store.record(SOURCE + 1, [other], namespace=NAMESPACE)
    assert list(ledger.owed()) == [it.token]
    assert ledger.leader.count(SOURCE + 1) == {"default": 1}
    assert ledger.cancel(job_ids=["j"]) == 1
    assert ledger.leader.count(SOURCE + 1) == {"default": 1}


@pytest.mark.parametrize("fresh", [True, False])
def test_a_row_that_postgres_refuses_is_a_bad_row(ledger: Contract, fresh: bool) -> None:
    """What is in the row is at fault; of its batch nothing is recorded."""
    good, bad = delivery("good", fresh=fresh), delivery("bad", fresh=fresh, priority=40_000)
    with pytest.raises(BadRow):
        ledger.record(good, bad)
    assert ledger.owed() == {}


def test_a_priority_out_of_range_is_a_bad_row(ledger: Contract) -> None:
    """A smallint is what the ledger keeps of it."""
    with pytest.raises(BadRow):
        ledger.record(delivery(priority=40_000))


# Supersession: by job id


def test_the_same_id_while_the_first_waits(ledger: Contract) -> None:
    """A new delivery supersedes the unclaimed ones of its job id: one body, one owed (A2)."""
    first = ledger.recorded()
    second = ledger.recorded()
    assert list(ledger.owed()) == [second.token]
    assert ledger.outcome(first.token) is Outcome.SUPERSEDED
    worker = ledger.working()
    assert refused(worker.claim(first.token)) == ENDED_SUPERSEDED
    assert worker.start(second.token).number == 1


def test_the_same_id_twice_in_one_call(ledger: Contract) -> None:
    """The order in a batch is an order of records: the last of an id is owed (A2)."""
    first, second = delivery(), delivery()
    ledger.record(first, second)
    assert list(ledger.owed()) == [second.token]
    assert ledger.outcome(first.token) is Outcome.SUPERSEDED


def test_a_claimed_delivery_is_not_superseded_by_its_id(ledger: Contract) -> None:
    """What a worker runs goes on beside the new life of its id."""
    first = ledger.recorded()
    worker = ledger.working()
    claim = worker.start(first.token)
    second = ledger.recorded()
    assert list(ledger.owed()) == [first.token, second.token]
    assert worker.end(claim) is Ended.ENDED


def test_a_fresh_delivery_looks_for_no_other(ledger: Contract) -> None:
    """A job id made for the delivery has no older life, so nobody looks for one."""
    first = ledger.recorded("a", fresh=True)
    second = ledger.recorded("b", fresh=True)
    assert list(ledger.owed()) == [first.token, second.token]


def test_counts_are_carried_through_supersession(ledger: Contract) -> None:
    """A job does not lose its crashes and recoveries by a new life; its attempt is its own."""
    term, first = ledger.elected(), ledger.recorded()
    worker = ledger.working()
    claim = worker.start(first.token)
    ledger.leader.declare_dead(term, [worker.id])
    ledger.leader.void(term, SOURCE, [Void(first.token, claim.number, charge=True, backoff=0)])
    ledger.leader.restored(term, SOURCE, [first.token])
    second = ledger.recorded()
    row = ledger.owed()[second.token]
    assert (row.crashes, row.recoveries, row.claims) == (1, 1, 0)
    ledger.leader.restored(term, SOURCE, [second.token])
    assert ledger.leader.restores(SOURCE, [second.token, new_token()]) == {second.token: 1}
    assert ledger.owed()[second.token].recoveries == 2


# Supersession: by parent


def test_a_retry_takes_the_place_of_its_parent(ledger: Contract) -> None:
    """Parent and child are never both owed, and never both not."""
    parent = ledger.recorded()
    worker = ledger.working()
    claim = worker.start(parent.token)
    child = retry_of(claim)
    assert ledger.record(child).refused == frozenset()
    assert list(ledger.owed()) == [child.token]
    assert ledger.owed()[child.token].claim_number is None
    assert ledger.outcome(parent.token) is Outcome.SUPERSEDED
    assert refused(worker.claim(parent.token)) == ENDED_SUPERSEDED
    assert worker.end(claim, Outcome.FAILED) is Ended.LATE


def test_a_job_that_repeats_itself_completes_its_parent(ledger: Contract) -> None:
    """The outcome of the parent is what its new delivery says."""
    parent = ledger.recorded()
    claim = ledger.working().start(parent.token)
    child = delivery(parent=Parent(claim.token, claim.number, Outcome.COMPLETED))
    assert ledger.record(child).refused == frozenset()
    assert ledger.outcome(parent.token) is Outcome.COMPLETED
    assert list(ledger.owed()) == [child.token]


def test_a_retry_carries_the_counts_of_its_parent(ledger: Contract) -> None:
    """A poison job is not reborn innocent by the library's own retry."""
    term, parent = ledger.elected(), ledger.recorded()
    dead, alive = ledger.working(), ledger.working()
    dead.start(parent.token)
    ledger.leader.declare_dead(term, [dead.id])
    claim = alive.start(parent.token)
    child = retry_of(claim)
    ledger.record(child)
    assert ledger.owed()[child.token].crashes == 1


def test_a_move_takes_the_place_of_an_unclaimed_parent(ledger: Contract) -> None:
    """A delay queue's move speaks for a delivery that nobody runs."""
    parent = ledger.recorded("a")
    child = delivery("b", parent=Parent(parent.token))
    assert ledger.record(child).refused == frozenset()
    assert list(ledger.owed()) == [child.token]


def test_a_move_is_refused_while_the_parent_runs(ledger: Contract) -> None:
    """Without a claim nobody speaks for a delivery that another holds and lists."""
    parent = ledger.recorded("a")
    worker = ledger.working()
    claim = worker.start(parent.token)
    child = delivery("b", parent=Parent(parent.token))
    assert ledger.record(child).refused == {child.token}
    assert list(ledger.owed()) == [parent.token]
    assert worker.end(claim) is Ended.ENDED


def test_a_move_takes_the_place_of_a_parent_whose_holder_is_dead(ledger: Contract) -> None:
    """A claim that is not live holds nothing."""
    parent = ledger.recorded("a")
    worker = ledger.working()
    worker.start(parent.token)
    worker.leave()
    child = delivery("b", parent=Parent(parent.token))
    assert ledger.record(child).refused == frozenset()
    assert list(ledger.owed()) == [child.token]


def test_a_retry_in_the_name_of_another_claim_is_refused(ledger: Contract) -> None:
    """A zombie's retry changes nothing of its successor's run (B2)."""
    parent = ledger.recorded()
    zombie, successor = ledger.working(), ledger.working()
    stale = zombie.start(parent.token)
    zombie.leave()
    claim = successor.start(parent.token)
    child = retry_of(stale)
    assert ledger.record(child).refused == {child.token}
    assert list(ledger.owed()) == [parent.token]
    assert isinstance(successor.claim(child.token), Unknown)
    assert successor.end(claim) is Ended.ENDED


def test_a_retry_in_the_name_of_a_voided_claim_is_refused(ledger: Contract) -> None:
    """Once its claim is taken away a worker speaks for nothing, also before somebody else does."""
    term, parent = ledger.elected(), ledger.recorded()
    zombie = ledger.working()
    stale = zombie.start(parent.token)
    ledger.leader.void(term, SOURCE, [Void(parent.token, stale.number, charge=True, backoff=0)])
    child = retry_of(stale)
    assert ledger.record(child).refused == {child.token}
    assert list(ledger.owed()) == [parent.token]


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.FAILED])
def test_a_retry_of_an_ended_delivery_is_refused(ledger: Contract, outcome: Outcome) -> None:
    """What has ended is not forked: the library's own recovery came too late."""
    parent = ledger.recorded()
    worker = ledger.working()
    claim = worker.start(parent.token)
    worker.end(claim, outcome)
    child = retry_of(claim)
    assert ledger.record(child).refused == {child.token}
    assert ledger.owed() == {}


def test_a_cancelled_delivery_is_not_retried(ledger: Contract) -> None:
    """The worker that runs it learns by its retry that it was cancelled."""
    parent = ledger.recorded()
    claim = ledger.working().start(parent.token)
    ledger.cancel(tokens=[parent.token])
    child = retry_of(claim)
    assert ledger.record(child).refused == {child.token}
    assert ledger.owed() == {}


def test_a_parent_has_one_child(ledger: Contract) -> None:
    """A second delivery of the same parent is a fork, and refused."""
    parent = ledger.recorded()
    claim = ledger.working().start(parent.token)
    first, second = retry_of(claim), retry_of(claim)
    ledger.record(first)
    assert ledger.record(second).refused == {second.token}
    assert list(ledger.owed()) == [first.token]


@pytest.mark.parametrize("outcome", [Outcome.SUPERSEDED, Outcome.COMPLETED])
def test_a_retry_recorded_twice_is_taken_twice(ledger: Contract, outcome: Outcome) -> None:
    """The repeat of a record whose answer was lost is not taken for a fork of its parent."""
    parent = ledger.recorded()
    claim = ledger.working().start(parent.token)
    child = delivery(parent=Parent(claim.token, claim.number, outcome))
    assert ledger.record(child).refused == frozenset()
    assert ledger.record(child).refused == frozenset()
    assert list(ledger.owed()) == [child.token]


def test_a_retry_whose_parent_nobody_knows(ledger: Contract) -> None:
    """The parent's record waits in a spool: the retry is taken, the parent stays out (A4)."""
    parent = delivery()
    child = delivery(parent=Parent(parent.token, claim=1), attempt=2)
    assert ledger.record(child).refused == frozenset()
    assert list(ledger.owed()) == [child.token]
    assert ledger.outcome(parent.token) is Outcome.SUPERSEDED
    assert ledger.record(parent, replay=True).refused == frozenset()
    assert list(ledger.owed()) == [child.token]
    assert refused(ledger.working().claim(parent.token)) == ENDED_SUPERSEDED


def test_a_chain_in_one_call(ledger: Contract) -> None:
    """A spool is replayed in order: of a delivery and its retry, the retry is owed."""
    parent = delivery()
    child = delivery(parent=Parent(parent.token))
    assert ledger.record(parent, child, replay=True).refused == frozenset()
    assert list(ledger.owed()) == [child.token]
    assert ledger.outcome(parent.token) is Outcome.SUPERSEDED


def test_a_refused_delivery_supersedes_nothing(ledger: Contract) -> None:
    """Neither its parent nor any other delivery of its job id is touched."""
    ended = ledger.recorded()
    worker = ledger.working()
    claim = worker.start(ended.token)
    worker.end(claim)
    waiting = ledger.recorded()
    child = retry_of(claim)
    assert ledger.record(child).refused == {child.token}
    assert list(ledger.owed()) == [waiting.token]


def test_a_refusal_does_not_stop_the_rest_of_its_call(ledger: Contract) -> None:
    """One answer names those that must not be pushed; all others are owed."""
    gone = ledger.recorded()
    ledger.cancel(tokens=[gone.token])
    bad, good = delivery(parent=Parent(gone.token)), delivery("other")
    assert ledger.record(bad, good).refused == {bad.token}
    assert list(ledger.owed()) == [good.token]


def test_a_redelivered_parent_is_skipped(ledger: Contract) -> None:
    """Superseded is not unknown: a library that redelivers the old push gets no claim (A3)."""
    parent = ledger.recorded()
    claim = ledger.working().start(parent.token)
    child = retry_of(claim)
    ledger.record(child)
    other = ledger.working()
    assert refused(other.claim(parent.token)) == ENDED_SUPERSEDED
    assert other.start(child.token).number == 1


# Replay


def test_a_replay_of_what_has_ended_is_not_owed(ledger: Contract) -> None:
    """A record that waited in a spool does not revive what ran meanwhile (A3)."""
    it = delivery()
    worker = ledger.working()
    assert worker.end(Claim(it.token, 0)) is Ended.UNKNOWN
    assert ledger.record(it, replay=True).refused == frozenset()
    assert ledger.owed() == {}
    assert refused(worker.claim(it.token)) == ENDED_COMPLETED


def test_what_ended_before_it_was_recorded_supersedes_its_parent_all_the_same(
    ledger: Contract,
) -> None:
    """Its end was faster than the spool that held its record; the parent must not stay owed."""
    parent = ledger.recorded()
    child = delivery(parent=Parent(parent.token))
    worker = ledger.working()
    assert worker.end(Claim(child.token, 0)) is Ended.UNKNOWN
    ledger.record(child, replay=True)
    assert ledger.owed() == {}
    assert ledger.outcome(parent.token) is Outcome.SUPERSEDED
    assert ledger.outcome(child.token) is Outcome.COMPLETED
    ledger.record(parent, replay=True)
    assert ledger.owed() == {}


def test_what_ended_before_it_was_recorded_keeps_a_parent_out_that_is_later_still(
    ledger: Contract,
) -> None:
    """The parent waits in another spool, and is known to nobody yet."""
    parent = delivery(fresh=True)
    child = delivery(parent=Parent(parent.token))
    ledger.working().end(Claim(child.token, 0))
    ledger.record(child, replay=True)
    ledger.record(parent, replay=True)
    assert ledger.owed() == {}


@pytest.mark.parametrize("first", ["the end", "the parent"])
def test_what_ended_and_was_never_recorded_supersedes_what_is_older(
    ledger: Contract, first: str
) -> None:
    """A retry whose record died with its horse: its end alone tells of it, early or late."""
    parent, child = delivery(fresh=True), delivery()
    worker = ledger.working()
    if first == "the parent":
        ledger.record(parent, replay=True)
    worker.end(Claim(child.token, 0), job_id="j")
    if first == "the end":
        ledger.record(parent, replay=True)

    assert ledger.owed() == {}
    assert ledger.outcome(parent.token) is Outcome.SUPERSEDED
    assert ledger.outcome(child.token) is Outcome.COMPLETED
    assert refused(worker.claim(parent.token)) == ENDED_SUPERSEDED


def test_a_retry_whose_worker_has_a_slower_clock_is_no_old_news(ledger: Contract) -> None:
    """Its token may sort before its parent's: what it came from is not what took its place."""
    parent = ledger.recorded()
    claim = ledger.working().start(parent.token)
    child = retry_of(claim, token=token_at(1.0))
    ledger.record(child, replay=True)
    assert list(ledger.owed()) == [child.token]


def test_what_a_worker_holds_is_the_newest_life(ledger: Contract) -> None:
    """An id enqueued again from a machine with a slower clock, and recorded by who popped it."""
    worker = ledger.working()
    worker.end(worker.start(ledger.recorded().token))
    again = delivery(token=token_at(1.0))
    ledger.record(again, replay=True, newest=True)
    assert list(ledger.owed()) == [again.token]


def test_what_ended_unknown_leaves_a_younger_and_a_running_one_alone(ledger: Contract) -> None:
    """Only what is older and claimed by nobody has surely been replaced."""
    running = ledger.recorded()
    ledger.working().start(running.token)
    ended = delivery()
    younger = ledger.recorded()

    ledger.working().end(Claim(ended.token, 0), job_id="j")

    assert set(ledger.owed()) == {running.token, younger.token}


def test_what_ended_before_it_was_recorded_takes_nobody_elses_claim(ledger: Contract) -> None:
    """The parent was recovered and is being run: it is its new holder's to end."""
    parent = ledger.recorded()
    ledger.working().start(parent.token)
    child = delivery(parent=Parent(parent.token))
    ledger.working().end(Claim(child.token, 0))
    assert ledger.record(child, replay=True).refused == frozenset()
    assert list(ledger.owed()) == [parent.token]


def test_a_replay_of_what_nobody_knows_is_owed(ledger: Contract) -> None:
    """A record that waited in a spool is taken late."""
    it = delivery()
    ledger.record(it, replay=True)
    assert list(ledger.owed()) == [it.token]


def test_a_replay_of_what_is_owed_changes_nothing(ledger: Contract) -> None:
    """A spool may hold what Postgres had taken after all."""
    it = ledger.recorded()
    ledger.working().start(it.token)
    ledger.record(it, replay=True)
    assert ledger.owed()[it.token].claim_live


def test_a_replay_is_checked_one_by_one(ledger: Contract) -> None:
    """What has ended is left out, what has not is taken, in one call."""
    ended, open_ = delivery("a", fresh=True), delivery("b", fresh=True)
    ledger.cancel(tokens=[ended.token])
    ledger.record(ended, open_, replay=True)
    assert list(ledger.owed()) == [open_.token]


def test_an_ended_job_runs_again_as_a_new_delivery_alone(ledger: Contract) -> None:
    """A requeue mints a new delivery; the old one is neither owed again nor put back (A10)."""
    old = ledger.recorded()
    worker = ledger.working()
    worker.end(worker.start(old.token), Outcome.FAILED)
    ledger.record(old, replay=True)
    assert ledger.owed() == {}
    assert ledger.leader.envelopes(SOURCE, [old.token]) == []
    assert refused(worker.claim(old.token)) == (Refusal.ENDED, Outcome.FAILED)
    new = ledger.recorded()
    assert worker.start(new.token).number == 1
    assert ledger.outcome(old.token) is Outcome.FAILED


# Outbox and withdrawal


def test_a_push_can_be_left_to_the_leader_with_the_record(ledger: Contract) -> None:
    """What is recorded for the outbox is watched until its push is cleared."""
    it, plain = delivery("a"), delivery("b")
    ledger.record(it, outbox=True)
    ledger.record(plain)
    assert list(ledger.watched()) == [it.token]
    assert ledger.watched()[it.token].suspected is Cause.PUSH
    ledger.leader.clear(ledger.elected(), SOURCE, [it.token])
    assert ledger.watched() == {}
    assert set(ledger.owed()) == {it.token, plain.token}


def test_a_fresh_delivery_can_go_to_the_outbox(ledger: Contract) -> None:
    """Neither road of a record forgets the outbox."""
    it = delivery(fresh=True)
    ledger.record(it, outbox=True)
    assert list(ledger.watched()) == [it.token]


def test_a_push_can_be_left_to_the_leader_afterwards(ledger: Contract) -> None:
    """A push that failed after its record goes the same way; the unknown is not made up."""
    it = ledger.recorded()
    for _ in range(2):
        ledger.store.outbox(SOURCE, [it.token, new_token()])
    assert list(ledger.watched()) == [it.token]


def test_a_refused_delivery_is_not_put_into_the_outbox(ledger: Contract) -> None:
    """What must not be pushed is not left to the leader either."""
    gone = ledger.recorded()
    ledger.cancel(tokens=[gone.token])
    child = delivery(parent=Parent(gone.token))
    assert ledger.record(child, outbox=True).refused == {child.token}
    assert ledger.watched() == {}


def test_what_was_never_pushed_can_be_withdrawn(ledger: Contract) -> None:
    """It leaves no tombstone: nobody ever knew of it."""
    it = delivery()
    ledger.record(it, outbox=True)
    ledger.store.withdraw(SOURCE, [it.token])
    assert (ledger.owed(), ledger.watched()) == ({}, {})
    assert ledger.outcome(it.token) is None
    assert isinstance(ledger.working().claim(it.token), Unknown)


def test_what_is_claimed_is_not_withdrawn(ledger: Contract) -> None:
    """A claim proves that it was pushed."""
    it = ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    ledger.store.withdraw(SOURCE, [it.token])
    assert worker.end(claim) is Ended.ENDED


# Claims


def test_the_first_claim_has_number_one(ledger: Contract) -> None:
    """Claims of a delivery are numbered from the first start on."""
    it = ledger.recorded()
    worker = ledger.working()
    assert worker.claim(it.token) == Claim(it.token, 1, crashes=0)
    row = ledger.owed()[it.token]
    assert (row.claim_number, row.claim_worker, row.claim_live) == (1, worker.id, True)


def test_a_claim_of_what_nobody_recorded_is_unknown(ledger: Contract) -> None:
    """Unknown is neither finished nor moved: the worker records it and claims again."""
    it = delivery()
    worker = ledger.working()
    assert worker.claim(it.token) == Unknown(it.token)
    ledger.record(it, replay=True)
    assert worker.start(it.token).number == 1


def test_no_claim_is_granted_to_the_dead(ledger: Contract) -> None:
    """It would be taken away at once; what has ended has ended all the same."""
    it, done, more = (ledger.recorded(job_id) for job_id in "abc")
    worker, other = ledger.working(), ledger.working()
    other.end(other.start(done.token))
    ledger.leader.declare_dead(ledger.elected(), [worker.id])
    requests = [worker.request(it.token), worker.request(done.token), other.request(more.token)]
    answers = ledger.store.claims(SOURCE, requests)
    assert answers[requests[0].nonce] == worker.claim(it.token) == WorkerDeclaredDead(it.token)
    assert refused(answers[requests[1].nonce]) == (Refusal.ENDED, Outcome.COMPLETED)
    assert answers[requests[2].nonce] == Claim(more.token, 1)
    assert other.start(it.token).number == 1


def test_what_another_holds_is_refused_to_the_dead_as_well(ledger: Contract) -> None:
    """A child of a worker that was declared dead skips what a living one runs."""
    it, dead, living = ledger.recorded(), ledger.working(), ledger.working()
    ledger.leader.declare_dead(ledger.elected(), [dead.id])
    living.start(it.token)
    assert refused(dead.claim(it.token)) == (Refusal.CLAIMED, None)


def test_who_asks_again_in_a_new_name_has_its_claim_in_that_name(ledger: Contract) -> None:
    """The answer was lost, then the worker was declared dead: else its claim would be nobody's."""
    it, worker, nonce = ledger.recorded(), ledger.working(), uuid4()
    worker.claim(it.token, nonce=nonce)
    ledger.leader.declare_dead(ledger.elected(), [worker.id])
    assert worker.claim(it.token, nonce=nonce) == WorkerDeclaredDead(it.token)
    reborn = ledger.working()
    assert reborn.claim(it.token, nonce=nonce) == Claim(it.token, 1)
    row = ledger.owed()[it.token]
    assert (row.claim_worker, row.claim_live) == (reborn.id, True)


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.FAILED])
def test_a_claim_of_what_has_ended_is_refused(ledger: Contract, outcome: Outcome) -> None:
    """An ended delivery never runs again, and the refusal says how it ended."""
    it = ledger.recorded()
    worker = ledger.working()
    worker.end(worker.start(it.token), outcome)
    assert refused(worker.claim(it.token)) == (Refusal.ENDED, outcome)


def test_a_live_claim_is_not_shared(ledger: Contract) -> None:
    """One worker runs a delivery; the other skips it, and nothing of the run is touched."""
    it = ledger.recorded()
    first, second = ledger.working(), ledger.working()
    claim = first.start(it.token)
    assert refused(second.claim(it.token)) == (Refusal.CLAIMED, None)
    assert ledger.watched() == {}
    assert ledger.owed()[it.token].claim_worker == first.id
    assert first.end(claim) is Ended.ENDED


def test_a_worker_does_not_get_its_own_running_delivery_again(ledger: Contract) -> None:
    """Two threads of one worker are two starts: another nonce is another start."""
    it = ledger.recorded()
    worker = ledger.working()
    worker.start(it.token)
    worker.beat()
    assert refused(worker.claim(it.token)) == (Refusal.CLAIMED, None)


def test_the_same_nonce_is_the_same_claim(ledger: Contract) -> None:
    """A claim whose answer was lost does not conflict with itself (B1)."""
    it = ledger.recorded()
    worker = ledger.working()
    nonce = uuid4()
    assert worker.claim(it.token, nonce=nonce) == Claim(it.token, 1)
    assert worker.claim(it.token, nonce=nonce) == Claim(it.token, 1)
    assert ledger.owed()[it.token].crashes == 0


def test_the_same_nonce_after_a_takeover_is_another_start(ledger: Contract) -> None:
    """Who asks again for a claim that was taken over gets nothing of its successor's."""
    it = ledger.recorded()
    slow, quick = ledger.working(), ledger.working()
    nonce = uuid4()
    slow.claim(it.token, nonce=nonce)
    slow.leave()
    quick.start(it.token)
    assert refused(slow.claim(it.token, nonce=nonce)) == (Refusal.CLAIMED, None)


def test_a_claim_that_a_beating_worker_does_not_list_is_taken_over(ledger: Contract) -> None:
    """The child was killed, the parent beats: its own successor is not fenced (B1)."""
    it = ledger.recorded()
    worker = ledger.working()
    worker.start(it.token)
    worker.forget_by_beats(it.token)
    assert not ledger.owed()[it.token].claim_live
    assert worker.start(it.token) == Claim(it.token, 2, crashes=1)


def test_a_claim_younger_than_the_last_two_beats_is_live(ledger: Contract) -> None:
    """The beat after a claim may have been begun before it: only the one after that speaks (B1)."""
    it = ledger.recorded()
    worker, other = ledger.working(), ledger.working()
    ledger.advance(1)
    worker.start(it.token)
    ledger.advance(1)
    worker.beat(claims=set())
    assert ledger.owed()[it.token].claim_live
    assert refused(other.claim(it.token)) == (Refusal.CLAIMED, None)
    ledger.advance(1)
    worker.beat(claims=set())
    assert not ledger.owed()[it.token].claim_live
    assert other.start(it.token).number == 2


def test_a_claim_that_is_listed_is_live_however_old(ledger: Contract) -> None:
    """A job whose worker beats and lists it may run for hours."""
    it = ledger.recorded()
    worker, other = ledger.working(), ledger.working()
    claim = worker.start(it.token)
    for _ in range(3):
        ledger.advance(3600)
        worker.beat()
    assert refused(other.claim(it.token)) == (Refusal.CLAIMED, None)
    assert worker.end(claim) is Ended.ENDED


def test_a_silent_holder_is_dead_while_nobody_leads(ledger: Contract) -> None:
    """Without a leader to judge it, the silence by the database's clock decides."""
    it = ledger.recorded()
    silent, other = ledger.working(), ledger.working()
    silent.start(it.token)
    ledger.advance(WORKER_TIMEOUT - 5)
    assert refused(other.claim(it.token)) == (Refusal.CLAIMED, None)
    ledger.advance(10)
    assert other.start(it.token) == Claim(it.token, 2, crashes=1)


def test_a_silent_holder_is_alive_until_the_leader_says_otherwise(ledger: Contract) -> None:
    """While a leader leads it alone declares workers dead; the skipped push is not forgotten."""
    term, it = ledger.elected(), ledger.recorded()
    silent, other = ledger.working(), ledger.working()
    silent.start(it.token)
    ledger.advance(WORKER_TIMEOUT + 1)
    assert refused(other.claim(it.token)) == (Refusal.CLAIMED, None)
    assert ledger.watched()[it.token].suspected is Cause.WORKER
    ledger.leader.declare_dead(term, [silent.id])
    assert other.start(it.token) == Claim(it.token, 2, crashes=1)


def test_a_claim_of_a_worker_that_left_is_taken_over_for_free(ledger: Contract) -> None:
    """An announced shutdown is no crash, and its claims are nobody's at once (D6)."""
    it = ledger.recorded()
    leaving, other = ledger.working(), ledger.working()
    leaving.start(it.token)
    leaving.leave()
    row = ledger.owed()[it.token]
    assert (row.claim_live, row.claim_announced) == (False, True)
    assert other.start(it.token) == Claim(it.token, 2, crashes=0)


def test_a_claim_of_a_worker_that_never_beat_is_taken_over(ledger: Contract) -> None:
    """A claim whose worker has no row is judged dead at once, not overlooked (D6)."""
    it = ledger.recorded()
    unseen, other = ledger.worker(), ledger.working()
    assert isinstance(unseen.claim(it.token), Claim)
    assert not ledger.owed()[it.token].claim_live
    assert list(ledger.watched()) == [it.token]
    assert other.start(it.token) == Claim(it.token, 2, crashes=1)


def test_a_spent_crash_budget_buries_the_delivery(ledger: Contract) -> None:
    """The last death that the budget allows, whoever redelivers: the job is dead, and kept."""
    term, it = ledger.elected(), ledger.recorded()
    for crashes in range(CRASH_BUDGET):
        victim = ledger.working()
        assert victim.start(it.token) == Claim(it.token, crashes + 1, crashes=crashes)
        ledger.leader.declare_dead(term, [victim.id])
    other = ledger.working()
    assert refused(other.claim(it.token))[0] is Refusal.SPENT
    assert ledger.owed() == {}
    assert ledger.watched() == {}
    assert refused(other.claim(it.token)) == (Refusal.ENDED, Outcome.DEAD)


def test_a_claim_after_a_void_has_the_next_number(ledger: Contract) -> None:
    """Numbers go on, so that a voided claim is never taken for its successor."""
    term, it = ledger.elected(), ledger.recorded()
    first, second = ledger.working(), ledger.working()
    stale = first.start(it.token)
    ledger.leader.declare_dead(term, [first.id])
    ledger.leader.void(term, SOURCE, [Void(it.token, stale.number, charge=True, backoff=0)])
    assert second.start(it.token) == Claim(it.token, 2, crashes=1)


def test_two_claims_at_once(ledger: Contract, together: Together) -> None:
    """Of many workers that start one delivery in the same moment, one is granted it."""
    for _ in range(5):
        it = ledger.recorded(fresh=True)
        asked = []
        for _ in range(8):
            worker, host = ledger.working(), ledger.backend.host()
            asked.append(together.call(host.claim, SOURCE, worker.request(it.token)))
        together.wait()
        answers = [answer for (answer,) in asked]
        granted = [answer for answer in answers if isinstance(answer, Claim)]
        assert granted == [Claim(it.token, 1)]
        held = [refused(answer) for answer in answers if not isinstance(answer, Claim)]
        assert held == [(Refusal.CLAIMED, None)] * 7


def test_a_claim_that_races_an_uncommitted_end(
    ledger_in_postgres: Contract, together: Together
) -> None:
    """A redelivery that starts while the end commits waits for it, and is refused (M5)."""
    ledger = ledger_in_postgres
    assert isinstance(ledger.backend, InPostgres)
    it = ledger.recorded()
    runner, other = ledger.working(), ledger.working()
    claim = runner.start(it.token)
    end = End(it.token, claim.number, Outcome.COMPLETED, runner.id)
    with ledger.backend.commits_held_back() as waiting:
        ends = together.call(ledger.backend.host().end, SOURCE, [end])
        eventually(lambda: waiting() >= 1)
        answers = together.call(ledger.backend.host().claim, SOURCE, other.request(it.token))
        eventually(lambda: waiting() >= 2 or answers)
        assert not answers, "the claim did not wait for the end"
    together.wait()
    assert ends == [[Ended.ENDED]]
    assert refused(answers[0]) == ENDED_COMPLETED


def test_a_record_that_races_an_uncommitted_retry(
    ledger_in_postgres: Contract, together: Together
) -> None:
    """Of two retries of one delivery recorded in the same moment, one is taken."""
    ledger = ledger_in_postgres
    assert isinstance(ledger.backend, InPostgres)
    parent = ledger.recorded()
    claim = ledger.working().start(parent.token)
    children = [retry_of(claim), retry_of(claim)]
    with ledger.backend.commits_held_back() as waiting:
        answers = []
        for child in children:
            host = ledger.backend.host()
            record = partial(host.record, SOURCE, [child], namespace=NAMESPACE)
            answers.append(together.call(record))
            eventually(lambda: waiting() == len(answers))
    together.wait()
    assert [answer[0].refused for answer in answers] == [frozenset(), {children[1].token}]
    assert list(ledger.owed()) == [children[0].token]


def test_an_end_that_races_an_uncommitted_replay(
    ledger_in_postgres: Contract, together: Together
) -> None:
    """Recorded while the end waited to write an unknown one: it ends like any other."""
    ledger = ledger_in_postgres
    assert isinstance(ledger.backend, InPostgres)
    parent = ledger.recorded()
    it = delivery(parent=Parent(parent.token))
    runner = ledger.working()
    with ledger.backend.commits_held_back() as waiting:
        record = partial(
            ledger.backend.host().record, SOURCE, [it], namespace=NAMESPACE, replay=True
        )
        together.call(record)
        eventually(lambda: waiting() >= 1)
        end = End(it.token, 0, Outcome.COMPLETED, runner.id, job_id="j")
        ends = together.call(ledger.backend.host().end, SOURCE, [end])
        eventually(lambda: waiting() >= 2 or ends)
        assert not ends, "the end did not wait for the record"
    together.wait()
    assert ends == [[Ended.ENDED]]
    assert ledger.owed() == {}
    assert ledger.outcome(it.token) is Outcome.COMPLETED


# Ends


def test_an_end_moves_a_delivery_from_owed_to_history(ledger: Contract) -> None:
    """After its end a delivery is neither owed nor watched, and remembered."""
    term, it = ledger.elected(), delivery()
    ledger.record(it, outbox=True)
    worker = ledger.working()
    claim = worker.start(it.token)
    ledger.leader.suspect(term, SOURCE, [(it.token, Cause.INCIDENT, "")])
    assert worker.end(claim, Outcome.FAILED, error="boom") is Ended.ENDED
    assert (ledger.owed(), ledger.watched()) == ({}, {})
    assert ledger.outcome(it.token) is Outcome.FAILED


def test_the_first_of_two_ends_stands(ledger: Contract) -> None:
    """Completed, then failed by a late acknowledgement: the second changes nothing (C3)."""
    it = ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    assert worker.end(claim) is Ended.ENDED
    assert worker.end(claim, Outcome.FAILED) is Ended.LATE
    assert ledger.outcome(it.token) is Outcome.COMPLETED


def test_two_ends_of_one_delivery_in_one_call(ledger: Contract) -> None:
    """A batch is taken in its order, with one answer an end (C3)."""
    it, stranger = ledger.recorded(), new_token()
    worker = ledger.working()
    claim = worker.start(it.token)
    answers = ledger.store.end(
        SOURCE,
        [
            End(it.token, claim.number, Outcome.COMPLETED, worker.id),
            End(stranger, 1, Outcome.COMPLETED, worker.id),
            End(it.token, claim.number, Outcome.FAILED, worker.id),
        ],
    )
    assert list(answers) == [Ended.ENDED, Ended.UNKNOWN, Ended.LATE]
    assert ledger.outcome(it.token) is Outcome.COMPLETED


def test_no_ends_are_no_answers(ledger: Contract) -> None:
    """An empty batch is nothing."""
    assert list(ledger.store.end(SOURCE, [])) == []


def test_an_end_of_what_nobody_recorded_leaves_a_tombstone(ledger: Contract) -> None:
    """The record that comes later finds that its job is done (C3)."""
    it = delivery()
    worker = ledger.working()
    said: dict[str, Any] = {"job_id": it.job_id, "queue": it.queue, "task": it.task}
    assert worker.end(Claim(it.token, 0), **said) is Ended.UNKNOWN
    assert worker.end(Claim(it.token, 0), **said) is Ended.LATE
    assert ledger.outcome(it.token) is Outcome.COMPLETED
    ledger.record(it, replay=True)
    assert ledger.owed() == {}


def taken_over(ledger: Contract) -> tuple[Delivery, Worker, Claim, Worker, Claim]:
    """Let a worker sleep through its own funeral, and another run its job."""
    it = ledger.recorded()
    zombie, successor = ledger.working(), ledger.working()
    stale = zombie.start(it.token)
    ledger.advance(WORKER_TIMEOUT + 1)
    successor.beat()
    return it, zombie, stale, successor, successor.start(it.token)


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.FAILED])
def test_a_zombies_end_does_not_end_its_successors_run(ledger: Contract, outcome: Outcome) -> None:
    """A stale number changes nothing: the successor's claim stands, and its end counts (B2)."""
    it, zombie, stale, successor, claim = taken_over(ledger)
    assert zombie.end(stale, outcome) is Ended.LATE
    row = ledger.owed()[it.token]
    assert (row.claim_number, row.claim_worker) == (claim.number, successor.id)
    assert ledger.outcome(it.token) is None
    assert successor.end(claim, Outcome.FAILED) is Ended.ENDED
    assert ledger.outcome(it.token) is Outcome.FAILED


def test_a_zombies_heartbeat_is_not_its_successors(ledger: Contract) -> None:
    """Progress is noted in the name of the claim that stands (B2)."""
    _, zombie, stale, successor, claim = taken_over(ledger)
    assert not zombie.heartbeat(stale)
    assert successor.heartbeat(claim)


def test_a_zombies_completion_closes_what_nobody_else_runs(ledger: Contract) -> None:
    """It did complete; where no other claim contradicts it, it is not run again (B2)."""
    term, it = ledger.elected(), ledger.recorded()
    zombie = ledger.working()
    stale = zombie.start(it.token)
    ledger.leader.declare_dead(term, [zombie.id])
    ledger.leader.void(term, SOURCE, [Void(it.token, stale.number, charge=True, backoff=0)])
    assert zombie.end(stale, Outcome.FAILED) is Ended.LATE
    assert list(ledger.owed()) == [it.token]
    assert zombie.end(stale, Outcome.COMPLETED) is Ended.ENDED
    assert (ledger.owed(), ledger.watched()) == ({}, {})


def test_a_start_while_postgres_was_away_ends_its_delivery(ledger: Contract) -> None:
    """Number 0 speaks for a delivery that nobody has claimed, however it ended."""
    first, second = ledger.recorded("a"), ledger.recorded("b")
    worker = ledger.working()
    assert worker.end(Claim(first.token, 0), Outcome.FAILED) is Ended.ENDED
    assert worker.end(Claim(second.token, 0), Outcome.COMPLETED) is Ended.ENDED
    assert ledger.outcome(first.token) is Outcome.FAILED


def test_a_start_while_postgres_was_away_and_a_late_claim_are_one(ledger: Contract) -> None:
    """Number 0 speaks for the claim that the same worker took when Postgres was back."""
    it = ledger.recorded()
    worker = ledger.working()
    worker.start(it.token)
    assert worker.end(Claim(it.token, 0), Outcome.FAILED) is Ended.ENDED


def test_a_start_while_postgres_was_away_does_not_end_anothers_run(ledger: Contract) -> None:
    """Number 0 is stale where another worker has claimed the delivery meanwhile."""
    it = ledger.recorded()
    unclaimed, holder = ledger.working(), ledger.working()
    claim = holder.start(it.token)
    for outcome in (Outcome.FAILED, Outcome.COMPLETED):
        assert unclaimed.end(Claim(it.token, 0), outcome) is Ended.LATE
    assert holder.end(claim) is Ended.ENDED


# Cancelling


def test_what_is_cancelled_stays_cancelled(ledger: Contract) -> None:
    """Neither a replay, nor a claim, nor a retry, nor an end brings it back."""
    it = ledger.recorded()
    worker = ledger.working()
    assert ledger.cancel(tokens=[it.token]) == 1
    ledger.record(it, replay=True)
    child = delivery(parent=Parent(it.token))
    assert ledger.record(child).refused == {child.token}
    assert refused(worker.claim(it.token)) == (Refusal.ENDED, Outcome.CANCELLED)
    assert worker.end(Claim(it.token, 1)) is Ended.LATE
    assert ledger.owed() == {}
    assert ledger.outcome(it.token) is Outcome.CANCELLED


def test_a_claimed_delivery_can_be_cancelled(ledger: Contract) -> None:
    """Its heartbeat finds no claim, and a failure of its run comes late."""
    it = ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    assert ledger.cancel(job_ids=["j"]) == 1
    assert not worker.heartbeat(claim)
    assert worker.end(claim, Outcome.FAILED) is Ended.LATE
    assert ledger.outcome(it.token) is Outcome.CANCELLED


def test_what_was_cancelled_while_it_ran_has_completed_if_it_ran_to_its_end(
    ledger: Contract,
) -> None:
    """By the word of the very run that was cancelled, and of no other; it is never run again."""
    it = ledger.recorded()
    worker, other = ledger.working(), ledger.working()
    claim = worker.start(it.token)
    ledger.cancel(job_ids=["j"])
    assert worker.end(Claim(it.token, claim.number + 1)) is Ended.LATE
    assert other.end(claim) is Ended.LATE
    assert ledger.outcome(it.token) is Outcome.CANCELLED

    assert worker.end(claim) is Ended.ENDED
    assert ledger.outcome(it.token) is Outcome.COMPLETED
    assert worker.end(claim, Outcome.CANCELLED) is Ended.LATE
    assert ledger.outcome(it.token) is Outcome.COMPLETED
    assert refused(worker.claim(it.token)) == (Refusal.ENDED, Outcome.COMPLETED)


def test_an_envelope_is_amended(ledger: Contract) -> None:
    """What is owed comes back as it is now, claimed or not; what has ended is left alone."""
    it, other = ledger.recorded("a"), ledger.recorded("b")
    asked: list[bytes] = []

    def change(envelope: bytes) -> bytes:
        asked.append(envelope)
        return envelope + b" changed"

    assert ledger.store.amend(SOURCE, it.token, change)
    worker = ledger.working()
    claim = worker.start(it.token)
    assert ledger.store.amend(SOURCE, it.token, change)
    assert asked == [it.envelope, it.envelope + b" changed"]
    found = ledger.leader.envelopes(SOURCE, [it.token, other.token])
    assert {one.token: one.envelope for one in found} == {
        it.token: it.envelope + b" changed changed",
        other.token: other.envelope,
    }

    worker.end(claim)
    assert not ledger.store.amend(SOURCE, it.token, change)
    assert not ledger.store.amend(SOURCE, new_token(), change)
    assert len(asked) == 2


def test_every_delivery_of_a_job_id_is_cancelled(ledger: Contract) -> None:
    """The one that runs and the one that waits, and no other job."""
    first = ledger.recorded("a")
    ledger.working().start(first.token)
    ledger.recorded("a")
    other = ledger.recorded("b")
    assert ledger.cancel(job_ids=["a"]) == 2
    assert list(ledger.owed()) == [other.token]


def test_a_cancellation_can_come_before_the_record(ledger: Contract) -> None:
    """The tombstone of what nobody knows yet keeps its record out when it comes."""
    it = delivery()
    assert ledger.cancel(tokens=[it.token]) == 0
    ledger.record(it, replay=True)
    assert ledger.owed() == {}
    assert ledger.outcome(it.token) is Outcome.CANCELLED


def test_a_cancellation_does_not_rewrite_history(ledger: Contract) -> None:
    """What had ended before keeps its outcome."""
    it = ledger.recorded()
    worker = ledger.working()
    worker.end(worker.start(it.token))
    assert ledger.cancel(tokens=[it.token], job_ids=["j"]) == 0
    assert ledger.outcome(it.token) is Outcome.COMPLETED


def test_a_purge_spares_what_runs(ledger: Contract) -> None:
    """Of a queue only what waits is cancelled; other queues are left alone."""
    waiting, running = ledger.recorded("a"), ledger.recorded("b")
    elsewhere = ledger.recorded("c", queue="mail")
    ledger.working().start(running.token)
    assert ledger.cancel(queue="default") == 1
    assert set(ledger.owed()) == {running.token, elsewhere.token}
    assert ledger.outcome(waiting.token) is Outcome.CANCELLED


_BY = pytest.mark.parametrize("by", [{"job_ids": ["j"]}, {"queue": "default"}], ids=["id", "queue"])


@_BY
def test_a_cancellation_told_late_spares_what_was_recorded_since(
    ledger: Contract, by: dict[str, Any]
) -> None:
    """It is old news: what came after it, from whomever, is a new life, whatever its token says."""
    before, since = delivery(fresh=True), delivery(fresh=True)
    ledger.record(before)
    ledger.advance(20)
    ledger.record(since)
    assert ledger.cancel(**by, ago=10, until=new_token()) == 1
    assert list(ledger.owed()) == [since.token]
    assert ledger.outcome(before.token) is Outcome.CANCELLED


@_BY
def test_a_cancellation_told_late_spares_what_its_process_sent_since(
    ledger: Contract, by: dict[str, Any]
) -> None:
    """A process knows its own order by its tokens, more exactly than any clock does."""
    before, until = ledger.recorded(fresh=True), new_token()
    since = ledger.recorded(fresh=True)
    assert ledger.cancel(**by, ago=0, until=until) == 1
    assert list(ledger.owed()) == [since.token]
    assert ledger.outcome(before.token) is Outcome.CANCELLED


@_BY
def test_a_cancellation_told_late_finds_what_waited_for_its_record(
    ledger: Contract, by: dict[str, Any]
) -> None:
    """What stood in the spool then was sent before, and is cancelled if it is meant."""
    waited, until = delivery(), new_token()
    other = delivery("other", queue="mail")
    ledger.record(waited, other, replay=True)
    waiting = [waited.token, other.token]
    assert ledger.cancel(**by, ago=10, until=until) == 0
    assert ledger.cancel(**by, ago=10, until=until, waiting=waiting) == 1
    assert list(ledger.owed()) == [other.token]
    assert ledger.outcome(waited.token) is Outcome.CANCELLED


def test_a_purge_told_late_spares_what_runs(ledger: Contract) -> None:
    """Also of what waited in the spool: by now a worker has it."""
    running = ledger.recorded()
    ledger.working().start(running.token)
    waiting = [running.token]
    assert ledger.cancel(queue="default", ago=0, waiting=waiting) == 0
    assert list(ledger.owed()) == [running.token]


def test_a_cancelled_token_is_cancelled_whenever_it_is_recorded(ledger: Contract) -> None:
    """A token means one delivery: it has no new life that could be taken for it."""
    until = new_token()
    since, unknown = ledger.recorded("a"), delivery("b")
    tokens = [since.token, unknown.token]
    assert ledger.cancel(tokens=tokens, ago=10, until=until) == 1
    ledger.record(unknown, replay=True)
    assert ledger.owed() == {}
    assert {ledger.outcome(token) for token in tokens} == {Outcome.CANCELLED}


@_BY
def test_a_cancellation_that_waits_spares_what_is_recorded_meanwhile(
    ledger_in_postgres: Contract, together: Together, by: dict[str, Any]
) -> None:
    """Whoever cancelled may have given up waiting, and enqueued anew."""
    ledger = ledger_in_postgres
    assert isinstance(ledger.backend, InPostgres)
    ended, before = ledger.recorded(fresh=True), ledger.recorded(fresh=True)
    runner = ledger.working()
    end = End(ended.token, runner.start(ended.token).number, Outcome.COMPLETED, runner.id)
    with ledger.backend.commits_held_back() as waiting:
        together.call(ledger.backend.host().end, SOURCE, [end])
        eventually(lambda: waiting() >= 1)
        host = ledger.backend.host()
        cancel = partial(host.cancel, SOURCE, **by, meant=host.now())
        answers = together.call(cancel)
        eventually(lambda: waiting() >= 2)
        since = ledger.recorded(fresh=True)
    together.wait()
    assert answers == [1]
    assert list(ledger.owed()) == [since.token]
    assert ledger.outcome(before.token) is Outcome.CANCELLED


def test_a_cancelled_delivery_is_watched_no_more(ledger: Contract) -> None:
    """Nobody puts it back: its suspicion and its push are gone with it."""
    it = delivery()
    ledger.record(it, outbox=True)
    ledger.leader.suspect(ledger.elected(), SOURCE, [(it.token, Cause.EVICTION, "")])
    ledger.cancel(tokens=[it.token])
    assert ledger.watched() == {}
    assert ledger.leader.envelopes(SOURCE, [it.token]) == []


# Beats


def test_a_beat_makes_a_worker_known(ledger: Contract) -> None:
    """A leader reads who works, what it has not yet reported, and which pulse it sees."""
    worker, pulse = ledger.worker(host="here"), (uuid4(), 5)
    beat = Beat(
        worker=worker.id,
        counter=1,
        claims=[],
        name="rq.1",
        host="here",
        pid=42,
        queues=["default", "mail"],
        unflushed_since=1_700_000_000.0,
        pulse=pulse,
    )
    reply = ledger.store.beat(SOURCE, beat, namespace=NAMESPACE)
    assert (reply.dead, reply.leader_live) == (False, False)
    (row,) = ledger.leader.workers(SOURCE)
    assert (row.id, row.name, row.host, row.pid, row.beat) == (worker.id, "rq.1", "here", 42, 1)
    assert list(row.queues) == ["default", "mail"]
    assert (row.unflushed_since, row.pulse) == (1_700_000_000.0, pulse)
    assert (row.left, row.dead, row.claims) == (False, False, 0)


def test_a_later_beat_replaces_the_one_before(ledger: Contract) -> None:
    """The counter moves on, what was unflushed no longer is, and the queues are those of now."""
    worker = ledger.worker()
    worker.beat(unflushed_since=1_700_000_000.0, queues=["mail"])
    worker.beat(queues=["bulk", "mail"])
    (row,) = ledger.leader.workers(SOURCE)
    assert (row.beat, row.unflushed_since) == (2, None)
    assert list(row.queues) == ["bulk", "mail"]


def test_a_beat_that_a_network_kept_changes_nothing(ledger: Contract) -> None:
    """Its list is old: what was claimed since would seem to be let go of, for two beats have come."""
    it, worker = ledger.recorded(), ledger.working()
    claim = worker.claim(it.token)
    worker.beat()
    worker.beats = 0
    assert not worker.beat(claims=set()).dead
    (row,) = ledger.leader.workers(SOURCE)
    assert (row.beat, list(row.lists)) == (2, [it.token])
    assert claim == Claim(it.token, 1)
    assert ledger.owed()[it.token].claim_live


def test_beats_of_a_worker_and_its_stand_in_have_one_order(ledger: Contract) -> None:
    """A stand-in's beat that comes after the worker's next one is old, and changes nothing."""
    it, worker = ledger.recorded(), ledger.working()
    step = 1 << 20
    for count, claims in ((step, set()), (step + 1, set()), (2 * step, {it.token})):
        worker.beats = count - 1
        worker.beat(claims=claims)
    worker.beats = step + 1
    worker.beat(claims=set())
    (row,) = ledger.leader.workers(SOURCE)
    assert (row.beat, list(row.lists)) == (2 * step, [it.token])


def test_a_beat_tells_whether_a_leader_leads(ledger: Contract) -> None:
    """A worker knows whether its skipped jobs are somebody's care."""
    worker = ledger.worker()
    assert not worker.beat().leader_live
    ledger.elected()
    assert worker.beat().leader_live


def test_a_worker_that_was_declared_dead_learns_it_by_its_beat(ledger: Contract) -> None:
    """Its beat is not taken, so its claims stay nobody's."""
    term, it = ledger.elected(), ledger.recorded()
    worker = ledger.working()
    worker.start(it.token)
    ledger.leader.declare_dead(term, [worker.id])
    assert worker.beat().dead
    (row,) = ledger.leader.workers(SOURCE)
    assert (row.beat, row.dead) == (1, True)
    assert not ledger.owed()[it.token].claim_live


def test_a_goodbye_is_final(ledger: Contract) -> None:
    """A beat that overtakes the goodbye does not bring the worker back."""
    it = ledger.recorded()
    worker = ledger.working()
    worker.start(it.token)
    worker.leave()
    worker.beat()
    (row,) = ledger.leader.workers(SOURCE)
    assert (row.left, row.claims) == (True, 1)
    assert not ledger.owed()[it.token].claim_live


def test_the_goodbye_of_an_unknown_worker_is_nothing(ledger: Contract) -> None:
    """A worker that never beat has nothing to take leave of."""
    ledger.store.leave(uuid4())
    assert ledger.leader.workers(SOURCE) == []


def test_a_worker_is_forgotten_once_it_is_gone_and_holds_nothing(ledger: Contract) -> None:
    """Not one that beats, nor one whose claims still stand, nor one that went a moment ago."""
    term, it = ledger.elected(), ledger.recorded()
    alive, left, dead, holding = (ledger.working() for _ in range(4))
    claim = holding.start(it.token)
    for worker in (left, holding):
        worker.leave()
    ledger.leader.declare_dead(term, [dead.id])
    everyone = [worker.id for worker in (alive, left, dead, holding)]
    ledger.leader.forget(term, everyone)
    assert len(ledger.leader.workers(SOURCE)) == 4  # the library's registry still names them
    ledger.advance(1000)
    alive.beat()
    ledger.leader.forget(term, everyone)
    assert {row.id: row.claims for row in ledger.leader.workers(SOURCE)} == {
        alive.id: 0,
        holding.id: 1,
    }
    holding.end(claim)
    ledger.leader.forget(term, everyone)
    assert [row.id for row in ledger.leader.workers(SOURCE)] == [alive.id]


# Heartbeats of jobs


def test_what_was_ever_started_is_not_withdrawn(ledger: Contract) -> None:
    """Its claim was voided, but somebody has had it in hand: it was pushed, whatever one believes."""
    term, it = ledger.elected(), ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    ledger.leader.declare_dead(term, [worker.id])
    ledger.leader.void(term, SOURCE, [Void(it.token, claim.number, charge=True, backoff=0)])
    ledger.store.withdraw(SOURCE, [it.token])
    assert it.token in ledger.owed()


def test_a_heartbeat_is_taken_for_a_claim_that_stands(ledger: Contract) -> None:
    """By token and number, or by the job id alone; of anything else it says False."""
    it = ledger.recorded()
    worker = ledger.working()
    assert not ledger.store.heartbeat(SOURCE, job_id="j", progress=0.1)
    claim = worker.start(it.token)
    assert worker.heartbeat(claim)
    assert ledger.store.heartbeat(SOURCE, job_id="j", progress=0.9)
    assert not ledger.store.heartbeat(SOURCE, job_id="unknown", progress=0.9)
    worker.end(claim)
    assert not worker.heartbeat(claim)


# The lease


def test_one_leader_leads(ledger: Contract) -> None:
    """The lease is one holder's until it ends; each holder gets a later term."""
    other = ledger.backend.leader(NAMESPACE, uuid4())
    first = ledger.leader.elect(lease=10)
    assert first is not None
    assert other.elect(lease=10) is None
    ledger.advance(11)
    second = other.elect(lease=10)
    assert second is not None
    assert second > first
    with pytest.raises(NotLeading):
        ledger.leader.renew(first, lease=10)


def test_a_renewed_lease_lasts(ledger: Contract) -> None:
    """The lease is counted from its renewal."""
    other = ledger.backend.leader(NAMESPACE, uuid4())
    term = ledger.leader.elect(lease=10)
    assert term is not None
    ledger.advance(8)
    brake = ledger.leader.renew(term, lease=10)
    assert not brake.paused
    assert not brake.holds(SOURCE, "default")
    ledger.advance(8)
    assert other.elect(lease=10) is None


def test_who_resigns_makes_room_at_once(ledger: Contract) -> None:
    """The next leader does not wait for the end of the lease."""
    other = ledger.backend.leader(NAMESPACE, uuid4())
    first = ledger.elected()
    ledger.leader.resign(first)
    assert not ledger.record(delivery()).leader_live
    second = other.elect(lease=LONG)
    assert second is not None
    assert second > first


def test_an_old_leader_does_not_resign_for_the_new_one(ledger: Contract) -> None:
    """Resigning, too, names the term."""
    old_term = ledger.elected()
    ledger.leader.resign(old_term)
    new_leader = ledger.backend.leader(NAMESPACE, uuid4())
    term = new_leader.elect(lease=LONG)
    assert term is not None
    with contextlib.suppress(NotLeading):
        ledger.leader.resign(old_term)
    assert ledger.record(delivery()).leader_live
    new_leader.renew(term, lease=LONG)


def test_namespaces_are_led_apart(ledger: Contract) -> None:
    """Two tenants have two leaders."""
    ledger.elected()
    assert ledger.backend.leader("others", uuid4()).elect(lease=LONG) is not None


_TOKEN = new_token()
_WORKER = uuid4()
_WRITES: dict[str, Callable[[LeaderStore, int], object]] = {
    "renew": lambda leader, term: leader.renew(term, lease=LONG),
    "brake": lambda leader, term: leader.brake(term),
    "acknowledge": lambda leader, term: leader.acknowledge(term, SOURCE, uuid4(), 9, run_id=None),
    "open_incident": lambda leader, term: leader.open_incident(
        term, SOURCE, Cause.INCIDENT, "flushed", None
    ),
    "progress": lambda leader, term: leader.progress(term, 1, missing=1, restored=1, close=True),
    "declare_dead": lambda leader, term: leader.declare_dead(term, [_WORKER]),
    "forget": lambda leader, term: leader.forget(term, [_WORKER]),
    "suspect": lambda leader, term: leader.suspect(term, SOURCE, [(_TOKEN, Cause.TOPOLOGY, "")]),
    "clear": lambda leader, term: leader.clear(term, SOURCE, [_TOKEN]),
    "restored": lambda leader, term: leader.restored(term, SOURCE, [_TOKEN]),
    "void": lambda leader, term: leader.void(
        term, SOURCE, [Void(_TOKEN, 1, charge=True, backoff=0)]
    ),
    "close_owed": lambda leader, term: leader.close_owed(
        term, SOURCE, [Closing(_TOKEN, Outcome.DEAD)]
    ),
    "trust": lambda leader, term: leader.trust(term, [QueueRow(SOURCE, "default", 1.0)]),
    "hold": lambda leader, term: leader.hold(term, SOURCE, "default", "too many"),
}


@pytest.mark.parametrize("write", _WRITES)
def test_a_leader_of_an_older_term_changes_nothing(ledger: Contract, write: str) -> None:
    """Every write names its term; the term of a predecessor is refused."""
    ledger.store.register(SourceRow(SOURCE, NAMESPACE, "rq", "localhost:6379/0", "", None, ""))
    ledger.record(delivery(token=_TOKEN), outbox=True)
    worker = Worker(ledger, id=_WORKER)
    worker.start(_TOKEN)
    worker.leave()
    old_term = ledger.elected()
    incident = ledger.leader.open_incident(old_term, SOURCE, Cause.TOPOLOGY, "", None)
    assert incident == 1
    ledger.leader.suspect(old_term, SOURCE, [(_TOKEN, Cause.EVICTION, "seen")])
    ledger.leader.resign(old_term)
    new_leader = ledger.backend.leader(NAMESPACE, uuid4())
    term = new_leader.elect(lease=LONG)
    assert term is not None
    with pytest.raises(NotLeading):
        _WRITES[write](ledger.leader, old_term)
    (source,) = new_leader.sources()
    assert source.pulse_n is None
    assert [(i.id, i.missing) for i in new_leader.incidents(SOURCE)] == [(incident, 0)]
    assert [(w.id, w.dead) for w in new_leader.workers(SOURCE)] == [(_WORKER, False)]
    row = ledger.watched()[_TOKEN]
    assert (row.suspected, row.suspected_mark) == (Cause.EVICTION, "seen")
    assert (row.claim_number, row.crashes, row.recoveries) == (1, 0, 0)
    assert new_leader.queues(SOURCE) == []
    assert not new_leader.renew(term, lease=LONG).holds(SOURCE, "default")


def test_a_leader_that_never_led_changes_nothing(ledger: Contract) -> None:
    """No term, no write."""
    with pytest.raises(NotLeading):
        ledger.leader.hold(1, SOURCE, "default", "too many")


# The leader's looks


def test_pages_go_in_the_order_of_tokens(ledger: Contract) -> None:
    """Each page goes on after the last token of the one before."""
    tokens = [ledger.recorded(f"j{n}", fresh=True).token for n in range(5)]
    after: UUID | None = None
    pages = []
    for _ in range(3):
        page = ledger.leader.page(SOURCE, after=after, limit=2)
        pages.append([row.token for row in page])
        after = pages[-1][-1]
    assert pages == [tokens[:2], tokens[2:4], tokens[4:]]
    assert ledger.leader.page(SOURCE, after=after, limit=2) == []


def test_what_is_owed_is_counted_by_queue(ledger: Contract) -> None:
    """Ended deliveries no longer count."""
    for number in range(3):
        ledger.recorded(f"j{number}")
    ledger.recorded("mail", queue="mail")
    ledger.cancel(job_ids=["j0"])
    assert ledger.leader.count(SOURCE) == {"default": 2, "mail": 1}


def test_the_clock_is_the_databases(ledger: Contract) -> None:
    """A leader can read the time that ages are measured by."""
    assert abs(ledger.leader.now() - time.time()) < 60


def test_an_installation_has_an_identity(ledger: Contract) -> None:
    """It stays the same, also after it was accepted where it is."""
    before = ledger.leader.identity()["id"]
    assert before
    ledger.leader.accept_move()
    assert ledger.leader.identity()["id"] == before


def test_the_same_sight_again_keeps_the_time_of_the_first(ledger: Contract) -> None:
    """A suspect is only acted on if what is seen did not change since it was seen first."""
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
    """A worker's death, and distrust, are not overwritten by a later and weaker cause."""
    term, it = ledger.elected(), ledger.recorded()
    ledger.leader.suspect(term, SOURCE, [(it.token, cause, "a")])
    ledger.leader.suspect(term, SOURCE, [(it.token, Cause.UNEXPLAINED, "b")])
    row = ledger.owed()[it.token]
    assert (row.suspected, row.suspected_mark) == (cause, "b")


def test_what_is_where_it_belongs_is_cleared(ledger: Contract) -> None:
    """Neither suspect nor to be pushed, and still owed."""
    term, it = ledger.elected(), delivery()
    ledger.record(it, outbox=True)
    ledger.leader.suspect(term, SOURCE, [(it.token, Cause.INCIDENT, "")])
    ledger.leader.clear(term, SOURCE, [it.token])
    assert ledger.watched() == {}
    assert ledger.owed()[it.token].suspected is None


def test_the_untrusted_is_not_watched(ledger: Contract) -> None:
    """What an unguarded worker may have run is never recovered, so nobody looks each time."""
    term, it = ledger.elected(), ledger.recorded()
    ledger.leader.suspect(term, SOURCE, [(it.token, Cause.UNTRUSTED, "")])
    assert ledger.watched() == {}
    assert ledger.owed()[it.token].suspected is Cause.UNTRUSTED


def test_a_suspicion_is_told_before_a_missing_push(ledger: Contract) -> None:
    """A delivery in the outbox that is also suspect says of what it is suspected."""
    it = delivery()
    ledger.record(it, outbox=True)
    ledger.leader.suspect(ledger.elected(), SOURCE, [(it.token, Cause.INCIDENT, "")])
    assert ledger.watched()[it.token].suspected is Cause.INCIDENT


def test_claims_of_the_gone_are_watched(ledger: Contract) -> None:
    """Of workers that died, left, or never beat; a live worker's claims are left alone."""
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
    """A dead attempt of a live worker is found as quickly as a dead worker (B1)."""
    it = ledger.recorded()
    worker = ledger.working()
    worker.start(it.token)
    assert ledger.watched() == {}
    worker.forget_by_beats(it.token)
    assert list(ledger.watched()) == [it.token]


def test_what_is_watched_is_bounded(ledger: Contract) -> None:
    """As many as asked for, in the order of tokens, and the next of them after the last."""
    them = [delivery(f"j{n}") for n in range(4)]
    tokens = [it.token for it in them]
    ledger.record(*them, outbox=True)
    first = ledger.leader.watched(SOURCE, limit=3)
    assert [row.token for row in first] == tokens[:3]
    rest = ledger.leader.watched(SOURCE, limit=3, after=tokens[2])
    assert [row.token for row in rest] == tokens[3:]


# Putting back


def test_an_envelope_comes_back_as_it_was_given(ledger: Contract) -> None:
    """Byte for byte, with its time, in the given order."""
    due, expires = float(int(time.time()) + 60), float(int(time.time()) + 120)
    envelope = bytes(range(256))
    first = ledger.recorded("a", envelope=envelope, queue="mail", due_at=due, expires_at=expires)
    second = ledger.recorded("b", envelope=b"")
    two, one = ledger.leader.envelopes(SOURCE, [second.token, first.token, new_token()])
    assert (one.token, two.token) == (first.token, second.token)
    assert (one.job_id, one.queue, one.envelope) == ("a", "mail", envelope)
    assert (one.due_at, one.expires_at) == (due, expires)
    assert (two.envelope, two.due_at, two.expires_at) == (b"", None, None)


def test_envelopes_are_bounded_in_bytes(ledger: Contract) -> None:
    """As many as fit, in the given order; one that does not fit by itself comes alone."""
    jobs = [ledger.recorded(str(n), envelope=bytes(size)) for n, size in enumerate((100, 50, 900))]
    tokens = [jobs[1].token, jobs[0].token, jobs[2].token]

    def within(most: int) -> list[int]:
        found = ledger.leader.envelopes(SOURCE, tokens, most_bytes=most)
        return [len(one.envelope) for one in found]

    assert within(10_000) == [50, 100, 900]
    assert within(1049) == [50, 100]
    assert within(149) == [50]
    assert within(1) == [50]
    assert [len(one.envelope) for one in ledger.leader.envelopes(SOURCE, tokens)] == [50, 100, 900]


def test_history_wins(ledger: Contract) -> None:
    """What stands in both is not put back, and goes before any verdict (M6)."""
    it = delivery(fresh=True)
    worker = ledger.working()
    worker.end(Claim(it.token, 0))
    ledger.record(it)  # a producer's record that came after the end and did not look
    term = ledger.elected()
    assert list(ledger.owed()) == [it.token]
    assert ledger.outcome(it.token) is Outcome.COMPLETED
    assert ledger.leader.envelopes(SOURCE, [it.token]) == []
    assert ledger.leader.close_owed(term, SOURCE, [Closing(it.token, Outcome.DEAD)]) == [it.token]
    assert ledger.owed() == {}
    assert ledger.outcome(it.token) is Outcome.COMPLETED


def test_a_restore_is_counted(ledger: Contract) -> None:
    """What was put back is suspected no longer, and its push is done."""
    term, it = ledger.elected(), delivery()
    ledger.record(it, outbox=True)
    ledger.leader.suspect(term, SOURCE, [(it.token, Cause.INCIDENT, "")])
    ledger.leader.restored(term, SOURCE, [it.token, new_token()])
    assert ledger.watched() == {}
    row = ledger.owed()[it.token]
    assert (row.recoveries, row.crashes, row.suspected) == (1, 0, None)


def test_a_dead_workers_claim_is_taken_away(ledger: Contract) -> None:
    """The delivery is free again, charged, suspect, and waits for its backoff."""
    term, it = ledger.elected(), ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    ledger.leader.declare_dead(term, [worker.id])
    void = Void(it.token, claim.number, charge=True, backoff=30)
    assert list(ledger.leader.void(term, SOURCE, [void])) == [it.token]
    row = ledger.owed()[it.token]
    assert (row.claim_number, row.claims, row.crashes) == (None, 1, 1)
    assert (row.suspected, row.suspected_mark) == (Cause.WORKER, "")
    assert 20 < row.backoff <= 30
    ledger.advance(40)
    assert ledger.owed()[it.token].backoff <= 0
    assert list(ledger.watched()) == [it.token]


def test_the_worker_of_a_voided_claim_is_known_to_the_next_run(ledger: Contract) -> None:
    """Nothing is known of one that was never voided, nor of what nobody recorded."""
    term, it = ledger.elected(), ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    assert ledger.store.predecessor(SOURCE, it.token) is None
    ledger.leader.void(term, SOURCE, [Void(it.token, claim.number, charge=True, backoff=0)])
    assert ledger.store.predecessor(SOURCE, it.token) == worker.id
    assert ledger.store.predecessor(SOURCE, new_token()) is None


def locked(ledger: Contract, claim: Claim, name: str = "import") -> bool:
    """Take a lock in the name of a claim."""
    return ledger.store.lock(SOURCE, name, token=claim.token, number=claim.number)


def test_a_lock_excludes_every_other_live_claim(ledger: Contract) -> None:
    """One claim has it, as often as it asks, until it lets go; another name is another lock."""
    one = ledger.working().start(ledger.recorded("a").token)
    two = ledger.working().start(ledger.recorded("b").token)
    assert locked(ledger, one) and locked(ledger, one)
    assert not locked(ledger, two)
    assert locked(ledger, two, "another")
    ledger.store.unlock(SOURCE, "import", token=two.token)
    assert not locked(ledger, two)
    ledger.store.unlock(SOURCE, "import", token=one.token)
    assert locked(ledger, two)
    assert not locked(ledger, one)


@pytest.mark.parametrize("how", ["ended", "voided", "dead", "left", "given back"])
def test_a_lock_dies_with_its_claim(ledger: Contract, how: str) -> None:
    """Whatever becomes of the claim: it never outlives the run."""
    term, it = ledger.elected(), ledger.recorded("a")
    worker, other = ledger.working(), ledger.working()
    claim = worker.start(it.token)
    assert locked(ledger, claim)
    next_ = other.start(ledger.recorded("b").token)
    assert not locked(ledger, next_)
    if how == "ended":
        worker.end(claim)
    elif how == "voided":
        ledger.leader.void(term, SOURCE, [Void(it.token, claim.number, charge=True, backoff=0)])
    elif how == "dead":
        ledger.leader.declare_dead(term, [worker.id])
    elif how == "left":
        worker.leave()
    else:
        ledger.store.release(SOURCE, it.token, worker.id, number=claim.number)
    assert locked(ledger, next_)
    assert not locked(ledger, claim)


def test_no_lock_without_a_claim(ledger: Contract) -> None:
    """An unclaimed run has none, nor a stale claim; number 0 means the claim that stands by now."""
    it = ledger.recorded("a")
    assert not locked(ledger, Claim(it.token, 0))
    claim = ledger.working().start(it.token)
    assert not locked(ledger, Claim(it.token, claim.number + 1))
    assert locked(ledger, Claim(it.token, 0))


def test_a_delivery_in_its_backoff_is_not_watched(ledger: Contract) -> None:
    """Nothing is to be done before its wait is over."""
    term, it = ledger.elected(), ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    worker.leave()
    ledger.leader.void(term, SOURCE, [Void(it.token, claim.number, charge=True, backoff=30)])
    assert ledger.watched() == {}
    ledger.advance(31)
    assert list(ledger.watched()) == [it.token]


def test_an_announced_shutdown_is_not_charged(ledger: Contract) -> None:
    """The leader says whether a claim that it takes away was a crash."""
    term, it = ledger.elected(), ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    worker.leave()
    ledger.leader.void(term, SOURCE, [Void(it.token, claim.number, charge=False, backoff=0)])
    row = ledger.owed()[it.token]
    assert (row.crashes, row.claims) == (0, 1)


def test_a_claim_that_was_taken_over_is_not_voided(ledger: Contract) -> None:
    """Only the very claim that was seen dead is taken away, and only once."""
    it, _, stale, successor, claim = taken_over(ledger)
    term = ledger.elected()
    void = Void(it.token, stale.number, charge=True, backoff=0)
    assert list(ledger.leader.void(term, SOURCE, [void])) == []
    row = ledger.owed()[it.token]
    assert (row.claim_number, row.crashes) == (claim.number, 1)
    assert row.suspected is None
    assert successor.end(claim) is Ended.ENDED
    assert list(ledger.leader.void(term, SOURCE, [void])) == []


def test_a_void_begins_a_new_suspicion(ledger: Contract) -> None:
    """What was seen of the delivery before the claim was taken away does not count after it."""
    term, it = ledger.elected(), ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    ledger.leader.suspect(term, SOURCE, [(it.token, Cause.TOPOLOGY, "before")])
    ledger.leader.declare_dead(term, [worker.id])
    ledger.leader.void(term, SOURCE, [Void(it.token, claim.number, charge=True, backoff=0)])
    row = ledger.watched()[it.token]
    assert (row.suspected, row.suspected_mark) == (Cause.WORKER, "")


def test_a_leader_ends_what_nobody_runs(ledger: Contract) -> None:
    """Closed from observation, or because its budget is spent; the unknown is not counted."""
    term, it, other = ledger.elected(), delivery("a"), ledger.recorded("b")
    ledger.record(it, outbox=True)
    ledger.leader.suspect(term, SOURCE, [(it.token, Cause.WORKER, "")])
    closings = [
        Closing(it.token, Outcome.DEAD, "killed three workers"),
        Closing(new_token(), Outcome.COMPLETED),
    ]
    assert ledger.leader.close_owed(term, SOURCE, closings) == [it.token]
    assert list(ledger.owed()) == [other.token]
    assert ledger.watched() == {}
    assert ledger.outcome(it.token) is Outcome.DEAD
    assert refused(ledger.working().claim(it.token)) == (Refusal.ENDED, Outcome.DEAD)


def test_a_leader_does_not_end_what_is_running(ledger: Contract) -> None:
    """A live claim contradicts whatever was observed; a dead one does not."""
    term, it = ledger.elected(), ledger.recorded()
    worker = ledger.working()
    worker.start(it.token)
    assert ledger.leader.close_owed(term, SOURCE, [Closing(it.token, Outcome.COMPLETED)]) == []
    assert list(ledger.owed()) == [it.token]
    ledger.leader.declare_dead(term, [worker.id])
    assert ledger.leader.close_owed(term, SOURCE, [Closing(it.token, Outcome.COMPLETED)]) == [
        it.token
    ]
    assert ledger.owed() == {}


def test_tombstones_are_told_of_those_that_have_ended(ledger: Contract) -> None:
    """The owed and the unknown are left out."""
    ended, owed = ledger.recorded("a"), ledger.recorded("b")
    ledger.cancel(tokens=[ended.token])
    asked = [ended.token, owed.token, new_token()]
    assert ledger.leader.tombstones(SOURCE, asked) == {ended.token: Outcome.CANCELLED}
    assert ledger.leader.tombstones(SOURCE, []) == {}


# Incidents, queues, the brake, retention


def test_an_incident_stays_open_until_it_is_closed(ledger: Contract) -> None:
    """Whoever leads next finds it, with what was done so far."""
    term = ledger.elected()
    first = ledger.leader.open_incident(term, SOURCE, Cause.INCIDENT, "flushed", uuid4())
    second = ledger.leader.open_incident(term, SOURCE, Cause.TOPOLOGY, "failover", None)
    ledger.leader.progress(term, first, missing=3, restored=1, close=False)
    ledger.leader.progress(term, first, missing=1, restored=2, close=False)
    one, two = ledger.leader.incidents(SOURCE)
    assert (one.id, one.cause, one.detail) == (first, Cause.INCIDENT, "flushed")
    assert (one.missing, one.restored) == (4, 3)
    assert (two.id, two.cause, two.missing) == (second, Cause.TOPOLOGY, 0)
    assert ledger.leader.incidents(SOURCE + 1) == []
    ledger.leader.progress(term, first, missing=0, restored=1, close=True)
    assert [incident.id for incident in ledger.leader.incidents(SOURCE)] == [second]


def test_what_is_known_of_a_queue_is_kept(ledger: Contract) -> None:
    """Since when all its consumers are guarded outlives the workers."""
    term = ledger.elected()
    row = QueueRow(SOURCE, "default", 1000.0, 2000.0, ("rq:worker:old",), 3000.0)
    ledger.leader.trust(term, [row, QueueRow(SOURCE, "mail")])
    kept, other = ledger.leader.queues(SOURCE)
    assert (kept.queue, kept.trusted_since, kept.clean_since) == ("default", 1000.0, 2000.0)
    assert (list(kept.unguarded), kept.unguarded_at) == (["rq:worker:old"], 3000.0)
    assert (other.queue, other.trusted_since, list(other.unguarded)) == ("mail", None, [])
    ledger.leader.trust(term, [QueueRow(SOURCE, "default")])
    assert ledger.leader.queues(SOURCE)[0].trusted_since is None
    assert ledger.leader.queues(SOURCE + 1) == []


def test_a_held_queue_is_held_by_the_next_leader_too(ledger: Contract) -> None:
    """The brake stands in the lease: whoever renews it sees it."""
    term = ledger.elected()
    ledger.leader.hold(term, SOURCE, "default", "101 unexplained")
    brake = ledger.leader.renew(term, lease=LONG)
    assert brake.holds(SOURCE, "default")
    assert not brake.holds(SOURCE, "mail")
    assert brake.held[f"{SOURCE}/default"]["reason"] == "101 unexplained"
    assert ledger.leader.brake(term) == brake
    ledger.leader.resign(term)
    other = ledger.backend.leader(NAMESPACE, uuid4())
    next_term = other.elect(lease=LONG)
    assert next_term is not None
    assert other.renew(next_term, lease=LONG).holds(SOURCE, "default")


def test_what_ended_long_ago_is_forgotten(ledger: Contract) -> None:
    """Memory of ended deliveries lasts for the retention, and what is owed for ever."""
    old, owed = ledger.recorded("a"), ledger.recorded("b")
    ledger.cancel(tokens=[old.token])
    ledger.leader.rotate(retention=7 * 86400)
    assert ledger.outcome(old.token) is Outcome.CANCELLED
    ledger.advance(9 * 86400)
    recent = ledger.recorded("c")
    ledger.cancel(tokens=[recent.token])
    ledger.leader.rotate(retention=7 * 86400)
    assert ledger.outcome(old.token) is None
    assert ledger.outcome(recent.token) is Outcome.CANCELLED
    assert list(ledger.owed()) == [owed.token]


def test_one_namespaces_retention_drops_nothing_of_anothers(ledger: Contract) -> None:
    """History is shared: what somebody wants to remember stays, as long as they want it."""
    ledger.elected()
    ledger.leader.rotate(retention=30 * 86400)
    other = ledger.backend.leader("staging", uuid4())
    assert other.elect(lease=LONG) is not None
    it = ledger.recorded()
    ledger.cancel(tokens=[it.token])
    ledger.advance(9 * 86400)
    other.rotate(retention=3600)
    assert ledger.outcome(it.token) is Outcome.CANCELLED
    ledger.leader.rotate(retention=2 * 86400)
    other.rotate(retention=3600)
    assert ledger.outcome(it.token) is None


def test_a_namespace_that_never_said_what_it_wants_to_remember_has_a_week(
    ledger: Contract,
) -> None:
    """Its hosts write, and no reconciler has run yet."""
    row = SourceRow(SOURCE, NAMESPACE, "rq", "localhost:6379/0", "", None, "fence=true")
    ledger.store.register(row)
    it = ledger.recorded()
    ledger.cancel(tokens=[it.token])
    ledger.advance(5 * 86400)
    ledger.backend.leader("staging", uuid4()).rotate(retention=3600)
    assert ledger.outcome(it.token) is Outcome.CANCELLED
    ledger.advance(5 * 86400)
    ledger.backend.leader("staging", uuid4()).rotate(retention=3600)
    assert ledger.outcome(it.token) is None


def test_a_vacuum_can_always_be_asked_for(ledger: Contract) -> None:
    """With nothing to do it names no table."""
    assert list(ledger.leader.vacuum()) == []


def test_a_store_can_be_closed_twice(ledger: Contract) -> None:
    """Letting go of what was let go of is nothing."""
    for _ in range(2):
        ledger.store.close()
        ledger.leader.close()


# What the ledger in memory has for tests


def test_the_ledger_in_memory_can_be_down() -> None:
    """Every call raises StoreUnavailable until the outage is over, and nothing is forgotten."""
    ledger = MemoryLedger()
    host, leader = ledger.host(), ledger.leader(NAMESPACE, uuid4())
    it = delivery()
    host.record(SOURCE, [it], namespace=NAMESPACE)
    ledger.down = True
    assert ledger.down
    with pytest.raises(StoreUnavailable):
        host.record(SOURCE, [delivery()], namespace=NAMESPACE)
    with pytest.raises(StoreUnavailable):
        leader.elect(lease=10)
    with pytest.raises(StoreUnavailable):
        leader.page(SOURCE, after=None, limit=10)
    ledger.down = False
    assert [row.token for row in leader.page(SOURCE, after=None, limit=10)] == [it.token]
