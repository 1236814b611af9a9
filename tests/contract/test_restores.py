from __future__ import annotations

import time
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from jobguard.model import Cause, Claim, Ended, Outcome, new_token
from jobguard.store.protocols import Closing, QueueRow, SourceRow, Void
from tests.contract.conftest import NAMESPACE, SOURCE, Contract, delivery, taken_over

if TYPE_CHECKING:
    pass


def test_recoverable_deliveries(ledger: Contract) -> None:
    """An owed delivery of a trusted queue is recoverable while its Redis is watched."""
    worker = ledger.working()
    ledger.store.register(SourceRow(SOURCE, NAMESPACE, "rq", "localhost:6379/0", "", None, ""))
    waiting, claimed, ended = (ledger.recorded(name) for name in "abc")
    worker.start(claimed.token)
    worker.end(worker.start(ended.token))
    tokens = [waiting.token, claimed.token, ended.token, new_token()]

    def recoverable() -> frozenset[UUID]:
        return ledger.store.recoverable(SOURCE, tokens)

    def watch(trusted_since: float | None) -> None:
        (source,) = ledger.leader.sources()
        known = source.pulse_epoch, source.pulse_n
        ledger.leader.acknowledge(term, SOURCE, known, (uuid4(), 1), run_id=None)
        ledger.leader.trust(term, [QueueRow(SOURCE, "default", trusted_since)])

    assert recoverable() == frozenset()
    term = ledger.elected()
    assert recoverable() == frozenset(), "this Redis is not watched"
    watch(None)
    assert recoverable() == frozenset(), "an unguarded worker may run them"
    watch(ledger.leader.now() + 1)
    assert recoverable() == frozenset(), "an unguarded worker may still have older ones"
    ledger.advance(10)
    watch(ledger.leader.now() - 1)
    assert recoverable() == {claimed.token}, "it runs under a guarded worker"
    watch(ledger.leader.now() - 3600)
    assert recoverable() == {waiting.token, claimed.token}
    ledger.leader.resign(term)
    assert recoverable() == {waiting.token, claimed.token}, "another leader takes over soon"
    ledger.advance(301)
    assert recoverable() == frozenset(), "it is not watched any more"


def test_an_envelope_is_amended(ledger: Contract) -> None:
    """The envelope of an owed delivery can be changed, claimed or not; that of an ended one cannot."""
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


def test_an_envelope_comes_back_as_it_was_given(ledger: Contract) -> None:
    """An envelope comes back byte for byte, with its times, in the given order."""
    due, expires = float(int(time.time()) + 60), float(int(time.time()) + 120)
    envelope = bytes(range(256))
    first = ledger.recorded(
        "a", envelope=envelope, queue="mail", due_at=due, expires_at=expires, trace="00-a"
    )
    second = ledger.recorded("b", envelope=b"")
    two, one = ledger.leader.envelopes(SOURCE, [second.token, first.token, new_token()])
    assert (one.token, two.token) == (first.token, second.token)
    assert (one.job_id, one.queue, one.envelope) == ("a", "mail", envelope)
    assert (one.due_at, one.expires_at, one.trace) == (due, expires, "00-a")
    assert (two.envelope, two.due_at, two.expires_at) == (b"", None, None)


def test_envelopes_are_bounded_in_bytes(ledger: Contract) -> None:
    """Envelopes are returned up to a limit in bytes, but at least one."""
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
    """A delivery that is both owed and ended is not restored, and keeps its outcome."""
    it = delivery(fresh=True)
    worker = ledger.working()
    worker.end(Claim(it.token, 0))
    ledger.record(it)  # a producer's record that came after the end and did not check history
    term = ledger.elected()
    assert list(ledger.owed()) == [it.token]
    assert ledger.outcome(it.token) is Outcome.COMPLETED
    assert ledger.leader.envelopes(SOURCE, [it.token]) == []
    assert ledger.leader.close_owed(term, SOURCE, [Closing(it.token, Outcome.DEAD)]) == [it.token]
    assert ledger.owed() == {}
    assert ledger.outcome(it.token) is Outcome.COMPLETED


def test_a_restore_is_counted(ledger: Contract) -> None:
    """A restored delivery is counted, and is neither suspect nor in the outbox."""
    term, it = ledger.elected(), delivery()
    ledger.record(it, outbox=True)
    ledger.leader.suspect(term, SOURCE, [(it.token, Cause.INCIDENT, "")])
    ledger.leader.restored(term, SOURCE, [it.token, new_token()])
    assert ledger.watched() == {}
    row = ledger.owed()[it.token]
    assert (row.recoveries, row.crashes, row.suspected) == (1, 0, None)


def test_a_dead_workers_claim_is_taken_away(ledger: Contract) -> None:
    """A voided claim makes its delivery free, charged, suspect, and delayed by the backoff."""
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


def test_a_delivery_in_its_backoff_is_not_watched(ledger: Contract) -> None:
    """A delivery is not watched during its backoff."""
    term, it = ledger.elected(), ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    worker.leave()
    ledger.leader.void(term, SOURCE, [Void(it.token, claim.number, charge=True, backoff=30)])
    assert ledger.watched() == {}
    ledger.advance(31)
    assert list(ledger.watched()) == [it.token]


def test_an_announced_shutdown_is_not_charged(ledger: Contract) -> None:
    """A void without a charge adds no crash."""
    term, it = ledger.elected(), ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    worker.leave()
    ledger.leader.void(term, SOURCE, [Void(it.token, claim.number, charge=False, backoff=0)])
    row = ledger.owed()[it.token]
    assert (row.crashes, row.claims) == (0, 1)


def test_a_claim_that_was_taken_over_is_not_voided(ledger: Contract) -> None:
    """Only the claim with the given number is voided, and only once."""
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
    """A void replaces an earlier suspicion."""
    term, it = ledger.elected(), ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    ledger.leader.suspect(term, SOURCE, [(it.token, Cause.TOPOLOGY, "before")])
    ledger.leader.declare_dead(term, [worker.id])
    ledger.leader.void(term, SOURCE, [Void(it.token, claim.number, charge=True, backoff=0)])
    row = ledger.watched()[it.token]
    assert (row.suspected, row.suspected_mark) == (Cause.WORKER, "")


def test_a_restore_that_a_death_explains_is_not_counted(ledger: Contract) -> None:
    """After a restore a worker of the queue died that ran a job: it may have had the delivery beside it."""
    term, waits = ledger.elected(), ledger.recorded("waits")

    def restore() -> None:
        ledger.leader.restored(term, SOURCE, [waits.token], causes={waits.token: Cause.WORKER})
        ledger.advance(1)

    def die(queue: str, *, runs: bool = True) -> None:
        worker = ledger.worker()
        beside = ledger.recorded(str(uuid4()), queue=queue).token
        worker.beat(queues=(queue,), claims={waits.token, beside})
        claim = worker.start(beside) if runs else None
        ledger.advance(1)
        ledger.leader.declare_dead(term, [worker.id])
        if claim is not None:
            ledger.leader.void(term, SOURCE, [Void(beside, claim.number, charge=True, backoff=0)])
        ledger.advance(1)

    def counted() -> int:
        return ledger.leader.restores(SOURCE, [waits.token])[waits.token]

    die("default")
    restore()
    assert counted() == 1, "the worker died before the restore"
    die("other")
    die("default", runs=False)
    assert counted() == 1, "the delivery itself may have caused the death"
    restore()
    assert counted() == 2
    die("default")
    assert counted() == 1
    die("default")
    restore()
    assert counted() == 2, "one restore is explained, by two deaths"
    assert ledger.owed()[waits.token].recoveries == 3
