"""A ledger in memory that behaves like the real one, for tests of an adapter alone."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from jobguard.adapter import Broker, Session, Source
from jobguard.host import batch as batches
from jobguard.model import (
    Beside,
    Claim,
    Delivery,
    Observation,
    Outcome,
    Owed,
    Part,
    Recorded,
    Refusal,
    Refused,
    Restorable,
    Restored,
)
from tests.support import newly_owed


class FakeSession:
    """A session that grants claims from the ledger of its tracker."""

    def __init__(self, tracker: FakeTracker, name: str, queues: Sequence[str]):
        self.id = uuid4()
        self.tracker, self.name, self.queues = tracker, name, list(queues)
        self.deferred: set[UUID] = set()
        self.closed = False

    def start(self, token: UUID, describe: Callable[[], Delivery], **_: Any) -> Claim | Refused:
        """Grant an owed delivery, record an unknown one, refuse an ended one."""
        ledger = self.tracker
        ledger.note("start", token.hex)
        if token in ledger.live_elsewhere:
            return Refused(token, Refusal.CLAIMED)
        if token in ledger.ended:
            return Refused(token, Refusal.ENDED, ledger.ended[token])
        if token not in ledger.owed:
            ledger.owed[token] = describe()
            ledger.note("adopt", token.hex)
        self.deferred.add(token)
        return Claim(token, ledger.number(token))

    def end(
        self,
        claim: Claim,
        outcome: Outcome,
        *,
        job_id: str,
        queue: str,
        task: str,
        error: str | None = None,
        part: Part | None = None,
    ) -> None:
        """End the claim with an outcome."""
        self.tracker.note("end", job_id, outcome.value, error or "")
        self.tracker.close(claim.token, outcome)
        self.deferred.discard(claim.token)

    def mark_superseded(self, claim: Claim) -> None:
        """Drop the claim."""
        self.tracker.note("release", claim.token.hex)
        self.deferred.discard(claim.token)

    def decline(self, token: UUID, *, job_id: str, error: str, **_: Any) -> bool:
        """Decline the claim, if a leader restores it."""
        if token not in self.tracker.recovers([token], began=False):
            return False
        self.tracker.note("decline", job_id, error)
        return True

    def give_back(self, claim: Claim, *, job_id: str, error: str) -> None:
        """Note it."""
        self.tracker.note("give_back", job_id, error)

    def release(self, claim: Claim, *, interrupted: bool = False) -> None:
        """Drop the claim."""
        self.tracker.note("give_back", claim.token.hex)
        self.deferred.discard(claim.token)

    def abandon(self, claim: Claim) -> None:
        """Give up the claim, as for a dead worker."""
        self.tracker.note("abandon", claim.token.hex)
        self.deferred.discard(claim.token)

    def consumes(self, queues: Sequence[str]) -> None:
        """Note the queues of the worker."""
        self.queues = list(queues)

    def take_over_beats(self, claim: Claim, gone: Callable[[], bool]) -> None:
        """Note when the worker is gone."""

        def wait() -> None:
            if gone():
                self.tracker.note("orphaned", claim.token.hex)

        threading.Thread(target=wait, daemon=True).start()

    def flush(self) -> None:
        """Note the call."""
        self.tracker.note("flush")

    def close(self, *, running: bool = False) -> None:
        """Close the session."""
        self.tracker.note("close")
        self.closed = True


class FakeTracker:
    """A tracker whose ledger is two dicts, and which also writes its calls to a file.

    With the file, a test can read the calls of a forked horse.
    """

    def __init__(self, source: Source, log: Path, queues: frozenset[str] | None = None):
        self.source = source
        self.client: Callable[[], Any] | None = None
        self._log = log
        self._queues = queues
        self.owed: dict[UUID, Delivery] = {}
        self.ended: dict[UUID, Outcome] = {}
        self.live_elsewhere: set[UUID] = set()
        self.push_deadline = 5.0
        self.numbers: dict[UUID, int] = {}
        self.batches: list[list[Delivery]] = []
        self.outbox: list[UUID] = []
        self.withdrawn: list[Delivery] = []
        self.cancelled: list[tuple[tuple[UUID, ...], tuple[str, ...], str | None]] = []
        self.sessions: list[FakeSession] = []
        self.in_doubt = False
        self.away = False
        self.accepting = True
        self.led = False
        self.refusing: set[str] = set()
        self.before_record: Callable[[], None] = lambda: None

    def predecessor(self, token: UUID) -> UUID | None:
        """Return no predecessor."""
        return None

    def lock(self, name: str, claim: Claim) -> bool:
        """Grant every lock."""
        return True

    def unlock(self, name: str, claim: Claim) -> None:
        """Release no lock, because none is kept."""

    def begin_effect(
        self, name: str, job_id: str | None, claim: Claim, *, again: bool
    ) -> tuple[str, str | None]:
        """Begin every effect."""
        return "first", None

    def finish_effect(self, name: str, claim: Claim, result: str | None) -> None:
        """Keep nothing."""

    def forget_effect(self, name: str, claim: Claim) -> None:
        """Keep nothing."""

    def effect_values(self, name: str, job_id: str | None, claim: Claim) -> dict[str, str]:
        """Return no parameters: no connection of an application is used."""
        return {}

    def seal_result(self, result: str | None) -> str | None:
        """Return the result unchanged."""
        return result

    unseal_result = seal_result

    def installation_id(self) -> str:
        """Return an identity."""
        return "fake"

    # The members that tests read.

    @property
    def recorded(self) -> list[Delivery]:
        """Return every delivery that this process recorded."""
        return [delivery for batch in self.batches for delivery in batch]

    def note(self, *words: str) -> None:
        """Append a call to the file, from any process."""
        with self._log.open("a") as log:
            log.write(json.dumps([os.getpid(), *words]) + "\n")

    def notes(self, verb: str) -> list[list[str]]:
        """Return the calls of one kind, of all processes, without their pids."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        calls = [json.loads(line)[1:] for line in lines]
        return [call[1:] for call in calls if call[0] == verb]

    def pids(self, verb: str) -> list[int]:
        """Return the processes that made the calls of one kind."""
        calls = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [call[0] for call in calls if call[1] == verb]

    def number(self, token: UUID) -> int:
        """Return the number of the next claim of a delivery."""
        self.numbers[token] = self.numbers.get(token, 0) + 1
        return self.numbers[token]

    def close(self, token: UUID, outcome: Outcome) -> None:
        """Write a tombstone, unless there is one."""
        self.owed.pop(token, None)
        self.ended.setdefault(token, outcome)

    # The Tracker protocol.

    def guards(self, queue: str) -> bool:
        """Return True if this queue is guarded."""
        return self._queues is None or queue in self._queues

    def record(self, deliveries: Sequence[Delivery], *, outbox: bool = False) -> Recorded:
        """Record these deliveries, supersede their parents, refuse those with an ended parent."""
        self.before_record()
        self.batches.append(list(deliveries))
        refused = set()
        for delivery in deliveries:
            parent = delivery.parent
            self.note(
                "record",
                delivery.job_id,
                delivery.token.hex,
                parent.token.hex if parent else "",
                str(parent.claim) if parent else "",
                parent.outcome.value if parent else "",
                str(delivery.attempt),
            )
            if delivery.job_id in self.refusing or (parent and parent.token in self.ended):
                refused.add(delivery.token)
                continue
            if parent:
                self.close(parent.token, parent.outcome)
            if not delivery.fresh:
                for older in [o for o in self.owed.values() if o.job_id == delivery.job_id]:
                    if not any(older.token in session.deferred for session in self.sessions):
                        self.close(older.token, Outcome.SUPERSEDED)
            self.owed[delivery.token] = delivery
            if outbox:
                self.outbox.append(delivery.token)
        return Recorded(refused=frozenset(refused), leader_live=True)

    def withdraw(self, deliveries: Sequence[Delivery]) -> None:
        """Withdraw these records."""
        self.withdrawn += deliveries
        for delivery in deliveries:
            self.owed.pop(delivery.token, None)

    def forget_spooled(self, tokens: Sequence[UUID]) -> bool:
        """Have no spool."""
        return False

    def leave_to_outbox(self, tokens: Sequence[UUID]) -> None:
        """Note the deliveries that the leader must push."""
        self.note("outbox", *(token.hex for token in tokens))
        self.outbox += tokens

    def defer(
        self, deliveries: Sequence[Delivery], push: Callable[[Recorded], None]
    ) -> Callable[[], None] | None:
        """Keep these deliveries inside a batch."""
        return batches.defer(self.source.id, deliveries, push)

    def batch(self, **how: Any) -> AbstractContextManager[None]:
        """Collect the deliveries that are sent inside the block."""
        return batches.batch(self.source.id, self, **how)

    def open_join(self, join: str, size: int, state: bytes = b"") -> Recorded:
        """Note the call."""
        self.note("open_join", join, str(size))
        return Recorded()

    def close_join(self, join: str) -> None:
        """Note the call."""
        self.note("close_join", join)

    @property
    def mends_library(self) -> bool:
        """Return True: faults of the library may be worked around."""
        return True

    def broker_in_doubt(self) -> bool:
        """Return the value that the test has set."""
        return self.in_doubt

    def broker_error(self) -> Exception | None:
        """Return None: the fake cannot know it."""
        return None

    def record_beside(self, deliveries: Sequence[Delivery]) -> Beside | None:
        """Return None: the tests of adapters rely on the order of record and push."""
        return None

    def broker_answered(self) -> None:
        """Do nothing."""

    def broker_failed(self) -> None:
        """Note that Redis failed in the host."""
        self.note("broker_failed")

    def accepts_without_broker(self, recorded: Recorded) -> bool:
        """Return the value that the test has set."""
        return self.accepting

    def cancel(
        self,
        *,
        tokens: Sequence[UUID] = (),
        job_ids: Sequence[str] = (),
        queue: str | None = None,
    ) -> None:
        """Write tombstones for the matching deliveries."""
        self.cancelled.append((tuple(tokens), tuple(job_ids), queue))
        for delivery in list(self.owed.values()):
            if delivery.token in tokens or delivery.job_id in job_ids or delivery.queue == queue:
                self.close(delivery.token, Outcome.CANCELLED)

    def amend(self, token: UUID, change: Callable[[bytes], bytes]) -> bool:
        """Change the envelope of an owed delivery."""
        self.note("amend", token.hex)
        if token not in self.owed:
            return False
        it = self.owed[token]
        self.owed[token] = replace(it, envelope=change(it.envelope))
        return True

    def heartbeat(self, job_id: str, **fields: object) -> bool:
        """Accept the progress of a job."""
        return True

    def recovers(self, tokens: Sequence[UUID], *, began: bool = True) -> frozenset[UUID]:
        """Return the owed ones of these, if the test has set a leader."""
        return frozenset(tokens) & self.owed.keys() if self.led else frozenset()

    def tombstones(self, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome] | None:
        """Return the ends of these; None while the test has the ledger away."""
        if self.away:
            return None
        return {token: self.ended[token] for token in tokens if token in self.ended}

    def drain_spool(self) -> None:
        """Do nothing, because there is no spool."""

    def inherit_session(
        self, worker: UUID, pid: int, *, name: str, queues: Sequence[str]
    ) -> Session:
        """Open a session with the id of the parent's."""
        self.note("inherit", worker.hex)
        session = FakeSession(self, name, queues)
        session.id = worker
        return session

    def open_session(
        self,
        *,
        name: str,
        queues: Sequence[str],
        lists: Callable[[], Iterable[UUID]] | None = None,
        apart: bool = False,
        serves: bool = False,
    ) -> Session:
        """Open a session."""
        self.note("open", name)
        self.sessions.append(FakeSession(self, name, queues))
        return self.sessions[-1]


def owed(delivery: Delivery) -> Owed:
    """Return a delivery in the form that an inspection needs."""
    return newly_owed(
        delivery.token, job_id=delivery.job_id, queue=delivery.queue, task=delivery.task
    )


def lost(delivery: Delivery, **changes: Any) -> Restorable:
    """Return a delivery in the form that a restore needs."""
    given: dict[str, Any] = {
        "token": delivery.token,
        "job_id": delivery.job_id,
        "queue": delivery.queue,
        "envelope": delivery.envelope,
        "due_at": delivery.due_at,
        "expires_at": delivery.expires_at,
    }
    return Restorable(**(given | changes))


def restore(broker: Broker, *deliveries: Restorable) -> list[Restored]:
    """Restore these, with a deadline that is far away."""
    done = broker.restore(deliveries, deadline=time.time() + 60)
    return [done[delivery.token] for delivery in deliveries]


def observe(broker: Broker, delivery: Delivery) -> Observation:
    """Inspect one delivery."""
    return broker.presence([owed(delivery)])[delivery.token]
