"""Records, claims, ends, supersessions, replays, voids and cancels in any order.

The model is not a second ledger. It stores the answers of the ledger, and checks later answers against
them: an end is final, a claim belongs to one worker, and a lost claim number changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jobguard.errors import NotLeading
from jobguard.model import (
    Cause,
    Claim,
    Delivery,
    End,
    Ended,
    Outcome,
    Owed,
    Parent,
    Refusal,
    Refused,
    Unknown,
    WorkerDeclaredDead,
)
from jobguard.store.protocols import ClaimRequest, Closing, Void
from tests.contract.conftest import (
    CRASH_BUDGET,
    LONG,
    WORKER_TIMEOUT,
    Contract,
    InMemory,
    Worker,
    delivery,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

JOBS = st.sampled_from(["a", "b", "c"])
"""Few ids, so that several deliveries share one."""
WORKERS = st.integers(0, 2)
ANY = st.integers(0, 9)
"""The position in a list: even numbers select owed deliveries, and 0 is the latest."""

Seen = dict[UUID, tuple[Any, ...]]


@dataclass(frozen=True)
class Grant:
    """A granted claim and its worker."""

    token: UUID
    number: int
    worker: Worker
    request: ClaimRequest

    @property
    def claim(self) -> Claim:
        """Return the claim as its worker reports it."""
        return Claim(self.token, self.number)


@dataclass
class Reported:
    """The answers of the ledger so far, which are final."""

    deliveries: dict[UUID, Delivery] = field(default_factory=dict)
    ended: dict[UUID, Outcome] = field(default_factory=dict)
    grants: list[Grant] = field(default_factory=list)
    revived: set[UUID] = field(default_factory=set)
    """Recorded after their end by a producer that did not check history, until the next inspection."""


class Model(RuleBasedStateMachine):
    """Several workers, a leader and its predecessor, on one ledger."""

    def __init__(self, ledger: Contract) -> None:
        super().__init__()
        self.ledger = ledger
        self.reported = Reported()

    @initialize()
    def begin(self) -> None:
        """Start with an empty source, three workers, and a leader of the second term."""
        self.ledger.source += 1
        self.ledger.namespace = f"model-{self.ledger.source}"
        self.store = self.ledger.store
        self.leader = self.ledger.leader = self.ledger.backend.leader(
            self.ledger.namespace, uuid4()
        )
        old_term = self.leader.elect(lease=1)
        assert old_term is not None
        self.old_term = old_term
        self.leader.resign(old_term)
        self.ledger.advance(2)
        self.term = self.ledger.elected()
        self.workers = [self.ledger.working(host=f"host-{n}") for n in range(3)]

    def teardown(self) -> None:
        """Let the leader make a last inspection."""
        if hasattr(self, "term"):
            self.observe()
            self.leader.close()

    # The current answers of the ledger

    def owed(self) -> dict[UUID, Owed]:
        """Return all owed deliveries."""
        return self.ledger.owed()

    def history(self) -> dict[UUID, Outcome]:
        """Return all outcomes."""
        return dict(self.leader.tombstones(self.ledger.source, list(self.reported.deliveries)))

    def seen(self) -> tuple[Seen, dict[UUID, Outcome]]:
        """Return everything that an inspection shows, except what changes only with time."""
        rows = {
            token: (
                row.job_id,
                row.queue,
                row.crashes,
                row.recoveries,
                row.claims,
                row.claim_number,
                row.claim_worker,
                row.claim_live,
                row.suspected,
                row.suspected_mark,
            )
            for token, row in self.owed().items()
        }
        return rows, self.history()

    def some_token(self, which: int) -> UUID:
        """Return an owed delivery, or any recorded one."""
        owed = sorted(self.owed())
        tokens = owed if owed and which % 2 == 0 else list(self.reported.deliveries)
        return tokens[-1 - which // 2 % len(tokens)]

    def some_grant(self, which: int) -> Grant:
        """Return a claim of an owed delivery, or any granted one."""
        owed = self.owed()
        ours = [grant for grant in self.reported.grants if grant.token in owed]
        grants = ours if ours and which % 2 == 0 else self.reported.grants
        return grants[-1 - which // 2 % len(grants)]

    def stands(self, grant: Grant) -> bool:
        """Return True if a granted claim is still current."""
        row = self.owed().get(grant.token)
        return row is not None and row.claim_number == grant.number

    # Producers and retries

    def record(self, it: Delivery, **how: Any) -> bool:
        """Record a delivery; return False if it is refused, and check that nothing changed then."""
        before = self.seen()
        self.reported.deliveries[it.token] = it
        if self.ledger.record(it, **how).refused:
            assert self.seen() == before, "a refused delivery changed something"
            return False
        return True

    @rule(job=JOBS, outbox=st.booleans())
    def push(self, job: str, outbox: bool) -> None:
        """A producer records a delivery of a job id that may have older ones."""
        it, before = delivery(job), self.owed()
        assert self.record(it, outbox=outbox)
        claimed = {token for token, row in before.items() if row.claim_number is not None}
        others = {token for token, row in before.items() if row.job_id != job}
        assert set(self.owed()) == {it.token} | claimed | others

    @rule()
    def push_fresh(self) -> None:
        """A producer records a delivery whose job id was created for it."""
        it = delivery(str(uuid4()), fresh=True)
        assert self.record(it)
        assert it.token in self.owed()

    @precondition(lambda self: self.reported.grants)
    @rule(which=ANY, outcome=st.sampled_from([Outcome.SUPERSEDED, Outcome.COMPLETED]))
    def retry(self, which: int, outcome: Outcome) -> None:
        """A worker retries or repeats its job, with a claim that may be lost."""
        self.retry_with(self.some_grant(which), outcome)

    def retry_with(self, grant: Grant, outcome: Outcome) -> None:
        """Retry, and check that it is refused unless the claim is current."""
        stood = self.stands(grant)
        parent = Parent(grant.token, grant.number, outcome)
        child = delivery(self.reported.deliveries[grant.token].job_id, parent=parent)
        assert self.record(child) == stood
        assert (child.token in self.owed()) == stood
        if stood:
            grant.worker.holds.discard(grant.token)
            assert self.history()[grant.token] is outcome

    @precondition(lambda self: self.reported.deliveries)
    @rule(which=ANY)
    def move(self, which: int) -> None:
        """A delay queue moves a delivery, without a claim."""
        token = self.some_token(which)
        row, ended = self.owed().get(token), token in self.history()
        child = delivery(self.reported.deliveries[token].job_id, parent=Parent(token))
        taken = self.record(child)
        assert taken == (not row.claim_live if row is not None else not ended)

    @rule(job=JOBS)
    def retry_of_the_unknown(self, job: str) -> None:
        """A worker retries a delivery that is not recorded yet: its record waits in a spool."""
        parent = delivery(job)
        self.reported.deliveries[parent.token] = parent
        assert self.record(delivery(job, parent=Parent(parent.token, claim=1)))
        assert self.history()[parent.token] is Outcome.SUPERSEDED

    @precondition(lambda self: self.reported.deliveries)
    @rule(which=ANY)
    def replay(self, which: int) -> None:
        """A spool is replayed, at any time."""
        token = self.some_token(which)
        ended = token in self.history() and token not in self.owed()
        before = self.seen()
        self.record(self.reported.deliveries[token], replay=True)
        if ended:
            assert self.seen() == before, "a replay of an ended delivery changed something"

    @precondition(lambda self: self.reported.deliveries)
    @rule(which=ANY)
    def record_again(self, which: int) -> None:
        """A record whose answer was lost is sent again."""
        token = self.some_token(which)
        if token in self.owed() and token not in self.reported.revived:
            before = self.seen()
            assert self.record(self.reported.deliveries[token])
            assert self.seen() == before

    @precondition(lambda self: self.reported.ended)
    @rule(which=ANY)
    def revive(self, which: int) -> None:
        """A record arrives together with the end of its own delivery, and is owed beside the tombstone."""
        token = list(self.reported.ended)[which % len(self.reported.ended)]
        if token not in self.owed():
            job_id = self.reported.deliveries[token].job_id
            self.ledger.record(delivery(job_id, token=token, fresh=True))
            self.reported.revived.add(token)

    @precondition(lambda self: self.reported.deliveries)
    @rule(which=ANY)
    def withdraw(self, which: int) -> None:
        """A producer withdraws a delivery that it did not push."""
        token = self.some_token(which)
        row = self.owed().get(token)
        self.store.withdraw(self.ledger.source, [token])
        started = row is not None and (row.claim_number is not None or row.claims > 0)
        assert (token in self.owed()) == started
        self.reported.revived.discard(token)

    # Workers

    @precondition(lambda self: self.reported.deliveries)
    @rule(which=ANY, who=WORKERS)
    def claim(self, which: int, who: int) -> None:
        """A worker starts a delivery that it found in Redis, in any state."""
        self.claim_by(self.workers[who], self.some_token(which))

    def claim_by(self, worker: Worker, token: UUID) -> None:
        """Claim, and check that the claim is granted if and only if no rule refuses it."""
        if token in self.reported.revived:
            return
        row, outcome = self.owed().get(token), self.history().get(token)
        request = worker.request(token)
        answer = self.store.claim(self.ledger.source, request)
        if outcome is not None:
            assert answer == Refused(token, Refusal.ENDED, outcome)
        elif row is None:
            assert answer == Unknown(token)
        elif row.claim_live:
            assert answer == Refused(token, Refusal.CLAIMED)
        elif any(
            seen.dead for seen in self.leader.workers(self.ledger.source) if seen.id == worker.id
        ):
            assert answer == WorkerDeclaredDead(token)
        elif isinstance(answer, Refused):
            assert answer.reason is Refusal.SPENT
            assert row.claim_number is not None
            assert row.crashes >= CRASH_BUDGET - 1
            assert self.history()[token] is Outcome.DEAD
        else:
            assert isinstance(answer, Claim)
            self.granted(Grant(token, answer.number, worker, request))

    def granted(self, grant: Grant) -> None:
        """Store a claim: its number is new, and it is the current one."""
        numbers = [other.number for other in self.reported.grants if other.token == grant.token]
        assert grant.number > max(numbers, default=0)
        row = self.owed()[grant.token]
        assert (row.claim_number, row.claim_worker) == (grant.number, grant.worker.id)
        grant.worker.holds.add(grant.token)
        self.reported.grants.append(grant)

    @precondition(lambda self: self.reported.grants)
    @rule(which=ANY)
    def claim_again(self, which: int) -> None:
        """The answer to a claim was lost, and the worker asks again."""
        grant = self.some_grant(which)
        if self.stands(grant):
            before = self.seen()
            answer = self.store.claim(self.ledger.source, grant.request)
            assert isinstance(answer, Claim)
            assert answer.number == grant.number
            assert self.seen() == before

    @precondition(lambda self: self.reported.grants)
    @rule(which=ANY, outcome=st.sampled_from([Outcome.COMPLETED, Outcome.FAILED]))
    def end(self, which: int, outcome: Outcome) -> None:
        """A worker reports an end, with a claim that may be lost."""
        self.end_with(self.some_grant(which), outcome)

    def end_with(self, grant: Grant, outcome: Outcome) -> None:
        """End, and check that only a current claim, or a completion without another claim, counts."""
        row = self.owed().get(grant.token)
        unclaimed = row is not None and row.claim_number is None
        believed = self.stands(grant) or (unclaimed and outcome is Outcome.COMPLETED)
        if grant.token in self.reported.revived or (row is None and not self.known(grant.token)):
            return
        before = self.seen()
        answer = grant.worker.end(grant.claim, outcome)
        grant.worker.holds.discard(grant.token)
        assert answer is (Ended.ENDED if believed else Ended.LATE)
        if believed:
            assert self.history()[grant.token] is outcome
        else:
            assert self.seen() == before, "a stale end changed something"

    def known(self, token: UUID) -> bool:
        """Return True if a delivery is owed or in history."""
        return token in self.owed() or token in self.history()

    @precondition(lambda self: self.reported.deliveries)
    @rule(which=ANY, who=WORKERS)
    def end_what_was_never_claimed(self, which: int, who: int) -> None:
        """A worker that started while PostgreSQL was away reports the end."""
        token, worker = self.some_token(which), self.workers[who]
        if token in self.reported.revived:
            return
        row, ended = self.owed().get(token), token in self.history()
        (answer,) = self.store.end(
            self.ledger.source, [End(token, 0, Outcome.FAILED, worker.id, job_id="a")]
        )
        if row is None:
            assert answer is (Ended.LATE if ended else Ended.UNKNOWN)
        else:
            mine = row.claim_number is None or row.claim_worker == worker.id
            assert answer is (Ended.ENDED if mine else Ended.LATE)

    @precondition(lambda self: self.reported.grants)
    @rule(which=ANY)
    def heartbeat(self, which: int) -> None:
        """A job reports its progress, with a claim that may be lost."""
        grant = self.some_grant(which)
        job_id = self.reported.deliveries[grant.token].job_id
        assert grant.worker.heartbeat(grant.claim, job_id=job_id) == self.stands(grant)

    @rule(who=WORKERS, lists=st.booleans())
    def beat(self, who: int, lists: bool) -> None:
        """A worker beats, and may have lost the runs of its children."""
        worker = self.workers[who]
        if not lists:
            worker.holds.clear()
        if worker.beat().dead:
            self.workers[who] = self.ledger.working(host=worker.host)

    @precondition(lambda self: self.reported.grants)
    @rule(
        which=ANY,
        who=WORKERS,
        voided=st.booleans(),
        says=st.sampled_from(["nothing", "end", "retry", "void", "heartbeat"]),
        outcome=st.sampled_from([Outcome.COMPLETED, Outcome.FAILED]),
    )
    def zombie(self, which: int, who: int, voided: bool, says: str, outcome: Outcome) -> None:
        """A worker is declared dead, its job continues without it, and then it reports late."""
        grant = self.some_grant(which)
        self.leader.declare_dead(self.term, [grant.worker.id])
        self.workers = [
            self.ledger.working() if worker is grant.worker else worker for worker in self.workers
        ]
        if voided:
            self.void_the(grant, charge=True)
        else:
            self.claim_by(self.workers[who], grant.token)
        if says == "end":
            self.end_with(grant, outcome)
        elif says == "retry":
            self.retry_with(grant, Outcome.SUPERSEDED)
        elif says == "void":
            self.void_the(grant, charge=False)
        elif says == "heartbeat":
            job_id = self.reported.deliveries[grant.token].job_id
            assert grant.worker.heartbeat(grant.claim, job_id=job_id) == self.stands(grant)

    @rule(who=WORKERS)
    def leave(self, who: int) -> None:
        """A worker exits regularly, and another one starts in its place."""
        self.workers[who].leave()
        self.workers[who] = self.ledger.working()

    # People

    @precondition(lambda self: self.reported.deliveries)
    @rule(which=ANY)
    def cancel(self, which: int) -> None:
        """A person cancels a delivery, known or not."""
        token = self.some_token(which)
        was_owed = token in self.owed()
        assert self.ledger.cancel(tokens=[token]) == was_owed
        assert token not in self.owed()
        assert token in self.history()

    @rule(job=JOBS, queue=st.booleans())
    def cancel_many(self, job: str, queue: bool) -> None:
        """A person cancels every delivery of a job id, or all that waits in the queue."""
        if queue:
            self.purge()
            return
        them = {token for token, row in self.owed().items() if row.job_id == job}
        assert self.ledger.cancel(job_ids=[job]) == len(them)
        assert not them & set(self.owed())
        self.reported.revived -= them

    def purge(self) -> None:
        """Empty the queue, and check that only claimed deliveries are left."""
        claimed = {token for token, row in self.owed().items() if row.claim_number is not None}
        self.ledger.cancel(queue="default")
        assert set(self.owed()) == claimed

    # The leader

    @rule(who=WORKERS)
    def declare_dead(self, who: int) -> None:
        """The leader declares a worker dead, which may learn this late."""
        self.leader.declare_dead(self.term, [self.workers[who].id])

    @precondition(lambda self: self.reported.grants)
    @rule(which=ANY, charge=st.booleans())
    def void(self, which: int, charge: bool) -> None:
        """The leader voids a dead worker's claim, if its number is still current."""
        self.void_the(self.some_grant(which), charge)

    def void_the(self, grant: Grant, charge: bool) -> None:
        """Void, and check that only a claim with that number changes."""
        row = self.owed().get(grant.token)
        if row is not None and row.claim_live:
            return
        stood, before = self.stands(grant), self.seen()
        void = Void(grant.token, grant.number, charge=charge, backoff=0)
        voided = list(self.leader.void(self.term, self.ledger.source, [void]))
        if not stood:
            assert voided == []
            assert self.seen() == before, "a stale number was voided"
            return
        assert row is not None
        assert voided == [grant.token]
        after = self.owed()[grant.token]
        assert (after.claim_number, after.claims) == (None, grant.number)
        assert after.crashes == row.crashes + charge

    @precondition(lambda self: self.reported.deliveries)
    @rule(which=ANY, mark=st.sampled_from(["", "gone"]))
    def suspect(self, which: int, mark: str) -> None:
        """The leader saw a delivery absent."""
        seen = [(self.some_token(which), Cause.TOPOLOGY, mark)]
        self.leader.suspect(self.term, self.ledger.source, seen)

    @precondition(lambda self: self.reported.deliveries)
    @rule(which=ANY)
    def restore(self, which: int) -> None:
        """The leader restores a delivery, if it is still owed."""
        token = self.some_token(which)
        found = self.leader.envelopes(self.ledger.source, [token])
        assert [it.token for it in found] == (
            [token] if token in self.owed() and token not in self.history() else []
        )
        self.leader.restored(self.term, self.ledger.source, [it.token for it in found])

    @precondition(lambda self: self.reported.deliveries)
    @rule(which=ANY)
    def give_up(self, which: int) -> None:
        """The leader closes a delivery, unless a worker runs it."""
        token = self.some_token(which)
        row = self.owed().get(token)
        closed = self.leader.close_owed(
            self.term, self.ledger.source, [Closing(token, Outcome.DEAD, "given up")]
        )
        assert list(closed) == ([token] if row is not None and not row.claim_live else [])

    @rule()
    def observe(self) -> None:
        """The leader closes the deliveries that are also in history."""
        ended = [
            Closing(token, outcome)
            for token, outcome in self.history().items()
            if token in self.owed()
        ]
        self.leader.close_owed(self.term, self.ledger.source, ended)
        assert not set(self.owed()) & set(self.history())
        self.reported.revived.clear()

    @precondition(lambda self: self.reported.deliveries)
    @rule(which=ANY)
    def stale_leader(self, which: int) -> None:
        """A leader of an older term wakes up and changes nothing."""
        before, token = self.seen(), self.some_token(which)
        source = self.ledger.source
        with pytest.raises(NotLeading):
            self.leader.close_owed(self.old_term, source, [Closing(token, Outcome.DEAD)])
        with pytest.raises(NotLeading):
            self.leader.suspect(self.old_term, source, [(token, Cause.EVICTION, "old")])
        with pytest.raises(NotLeading):
            self.leader.renew(self.old_term, lease=LONG)
        assert self.seen() == before

    @rule(seconds=st.sampled_from([1, 5, WORKER_TIMEOUT + 1]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.ledger.advance(seconds)

    # Invariants

    @invariant()
    def an_end_is_an_end(self) -> None:
        """An ended delivery keeps its outcome, so a cancelled one stays cancelled."""
        history = self.history()
        assert {token: history.get(token) for token in self.reported.ended} == self.reported.ended
        self.reported.ended = history

    @invariant()
    def owed_or_ended(self) -> None:
        """Only a delivery that was recorded without a check of history can be both owed and ended."""
        self.reported.revived &= set(self.owed())
        assert set(self.owed()) & set(self.reported.ended) <= self.reported.revived

    @invariant()
    def one_of_a_chain(self) -> None:
        """A parent and its child are never both owed."""
        owed = set(self.owed()) - self.reported.revived
        for token in owed:
            parent = self.reported.deliveries[token].parent
            assert parent is None or parent.token not in owed

    @invariant()
    def one_live_claim(self) -> None:
        """A delivery has at most one claim, of the last worker that was granted one."""
        last = {grant.token: grant for grant in self.reported.grants}
        for token, row in self.owed().items():
            if row.claim_number is not None:
                assert row.claim_number == last[token].number
                assert row.claim_worker == last[token].worker.id


@pytest.fixture
def limits(ledger: Contract) -> Iterator[settings]:
    """Give the limits of a run: long in memory, short where each step is a round trip."""
    memory = isinstance(ledger.backend, InMemory)
    yield settings(
        max_examples=150 if memory else 20,
        stateful_step_count=50 if memory else 20,
        deadline=None,
        database=None,
        derandomize=True,  # the same code gives the same result
        suppress_health_check=list(HealthCheck),
    )


def test_no_order_of_events_breaks_the_ledger(ledger: Contract, limits: settings) -> None:
    """In any order of events an end is final, and one worker at a time runs an owed delivery."""
    made = cast(type[Model], partial(Model, ledger))  # a partial is enough to make a machine
    run_state_machine_as_test(made, settings=limits)
