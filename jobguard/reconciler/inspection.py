"""Inspect a page of owed deliveries: where Redis has them, what to do, and what to record.

``restore`` pushes to Redis. Every write to Postgres names the term of the leader, and every push
carries a deadline in the clock of Redis. Therefore a leader that was stopped between the inspection
and the push does neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

import redis

from jobguard import failpoint
from jobguard.adapter import Broker
from jobguard.errors import JobguardError
from jobguard.log import log_event
from jobguard.model import (
    DROPPED_BY_LIVE_WORKER,
    Cause,
    Observation,
    Outcome,
    Owed,
    Presence,
    RecoverRule,
)
from jobguard.pulse import hears_dead_key
from jobguard.reconciler.bypass import Bypass
from jobguard.reconciler.context import ConfirmedPushes, InspectionContext
from jobguard.reconciler.decision import ENDS, Action, Decision, Holder, Situation, decide
from jobguard.reconciler.restore import Restorer
from jobguard.reconciler.result import LOSSES, Lost, PassResult, reported_absent
from jobguard.reconciler.trust import Trust
from jobguard.reconciler.workers import Workers
from jobguard.redis_refusal import RedisRefuses, refusal_of
from jobguard.settings import Settings
from jobguard.store.protocols import Closing, LeaderStore, SourceRow, Void

_DEADLINE = 5.0
"""Seconds of the Redis clock from the inspection to the push, at most."""
_IN_PLACE = (Presence.WAITING, Presence.SCHEDULED)
_UNDECIDED = Decision(Action.WAIT, "not decided yet")


@dataclass(slots=True)
class Inspected:
    """One delivery in one inspection: where it is, why, and what to do about it."""

    owed: Owed
    seen: Observation
    known_cause: Cause
    """Why it may be absent, as far as the ledger and the state of the source show."""
    taken_by: str = ""
    """The worker that took it and did not start it, if that worker is dead or has left."""
    replaces: UUID | None = None
    """An older delivery of its id that is in its place and has ended."""
    takeover: bool = False
    """No live worker lists that older delivery."""
    replaced_by_unrecorded: bool = False
    in_flight: bool = False
    """A live worker lists it, with or without a claim."""
    tombstone: Outcome | None = None
    recover: RecoverRule | None = None
    decision: Decision = _UNDECIDED

    @property
    def cause(self) -> Cause:
        """Why it is absent, if it is absent."""
        return Cause.WORKER if self.taken_by else self.known_cause

    def to_restore(self) -> Lost:
        """Return the delivery with all that is needed to restore it."""
        reported_by_worker = reported_absent(self.owed) and self.owed.suspected is Cause.WORKER
        return Lost(
            self.owed,
            self.cause,
            replaces=self.replaces,
            takeover=self.takeover or reported_by_worker,
            taken_by=self.taken_by,
        )


@dataclass(slots=True)
class Inspection:
    """An inspected page whose lost deliveries are still to be restored."""

    result: PassResult
    deadline: float = 0.0
    """The end of the time for pushes, in the Redis clock."""
    lost: list[Lost] = field(default_factory=list)

    def unexplained(self) -> dict[str, list[Owed]]:
        """Return the lost deliveries without a known cause, by queue."""
        found: dict[str, list[Owed]] = {}
        for one in self.lost:
            if one.cause is Cause.UNEXPLAINED:
                found.setdefault(one.owed.queue, []).append(one.owed)
        return found

    def hold(self, queue: str) -> None:
        """Do not restore the lost deliveries of this queue."""
        kept = [one for one in self.lost if one.owed.queue != queue]
        self.result.held += len(self.lost) - len(kept)
        self.lost = kept


class Inspector:
    """Inspects pages of one source's deliveries and applies the decisions."""

    def __init__(
        self,
        client: redis.Redis,
        broker: Broker,
        store: LeaderStore,
        source: SourceRow,
        settings: Settings,
        workers: Workers,
        trust: Trust,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._broker = broker
        self._store = store
        self._source = source.id
        self._address = source.address
        self._settings = settings
        self._workers = workers
        self._trust = trust
        self._confirmed = ConfirmedPushes(settings)
        self.bypass = Bypass(store, source.id)
        self.restorer = Restorer(broker, store, source.id, settings, clock, source.address)

    def inspect(self, term: int, page: Sequence[Owed], now: InspectionContext) -> Inspection:
        """Inspect these deliveries and apply the decisions, except for the restores.

        Raises NotLeading, StoreUnavailable, RedisError.
        """
        result = PassResult(inspected=len(page))
        if not page:
            return Inspection(result)
        deadline = self._redis_time() + _DEADLINE
        rows, now = self._classify(page, now)
        result.failed += len(page) - len(rows)
        for row in rows:
            row.decision = decide(self._situation(row, now))
        self._apply(term, rows, now, deadline, result)
        lost = [row.to_restore() for row in rows if row.decision.action is Action.RESTORE]
        return Inspection(result, deadline, self.bypass.without(term, lost, result))

    def restore(self, term: int, inspection: Inspection) -> PassResult:
        """Restore the lost deliveries of an inspection. Raises as ``inspect`` does."""
        self.restorer.restore_lost(term, inspection.lost, inspection.deadline, inspection.result)
        return inspection.result

    # -- classify ------------------------------------------------------------------------------

    def _classify(
        self, page: Sequence[Owed], now: InspectionContext
    ) -> tuple[list[Inspected], InspectionContext]:
        """Read where these are, in Redis and in the ledger. Unreadable ones are left out.

        The second result is the context with what the workers' beats say now.
        """
        seen = self._presence(page)
        there = [owed for owed in page if owed.token in seen]
        rows = [
            Inspected(
                owed,
                seen[owed.token],
                now.cause_of(
                    owed,
                    self._settings,
                    pushed=seen[owed.token].pushed or owed.token in self._confirmed,
                ),
            )
            for owed in there
        ]
        self._confirmed.add(
            (owed for owed in there if seen[owed.token].presence in _IN_PLACE), now.at
        )
        if self._find_listed(rows):
            now = replace(now, reports_complete=False)
        self._find_taken(rows, now)
        self._find_shared_ends(rows)
        self._find_older(rows)
        self._find_unrecorded(rows)
        self._find_tombstones(rows)
        self._find_rules(rows)
        return rows, now

    def _find_taken(self, rows: Sequence[Inspected], now: InspectionContext) -> None:
        """Find deliveries that a dead or departed worker took: no other worker will run them."""
        for row in rows:
            holder = row.seen.taken_by
            if not holder or not self._workers.gone(holder):
                continue
            # A worker that dropped the delivery is alive, and may have run it: then its report is
            # still to come.
            if holder != DROPPED_BY_LIVE_WORKER or now.reports_complete:
                row.taken_by = holder
                row.seen = Observation(Presence.ABSENT, f"taken by {holder}")

    def _find_shared_ends(self, rows: Sequence[Inspected]) -> None:
        """Find ends that may belong to another job with the same id: they do not count."""
        ends = [row.owed.token for row in rows if row.seen.presence in ENDS and row.seen.by_id]
        shared = self._store.sharing_job_id(self._source, ends)
        for row in rows:
            if row.owed.token in shared:
                row.seen = Observation(Presence.ABSENT, "end of a job with the same id")

    def _find_listed(self, rows: Sequence[Inspected]) -> bool:
        """Find deliveries that live workers list: these may run, with or without a claim.

        Those are not asked for whose place or claim decides without it. Return True if a worker has
        reports that are not written yet. One statement reads both: a beat that lists a delivery no more
        says whether its end is still to come.
        """
        doubtful = [
            row
            for row in rows
            if not row.owed.claim_live
            and (
                row.owed.claim_number is not None
                or row.seen.taken_by
                or row.seen.presence not in _IN_PLACE
            )
        ]
        if not doubtful:
            return False
        listed, unflushed = self._store.listed(self._source, [row.owed.token for row in doubtful])
        for row in doubtful:
            row.in_flight = row.owed.token in listed
        return unflushed

    def _find_older(self, rows: Sequence[Inspected]) -> None:
        """Find deliveries whose place is taken by an older delivery of their id that has ended.

        A younger delivery is never replaced, even if it has ended by now.
        """
        older = [
            (row, row.seen.other)
            for row in rows
            if row.seen.other is not None and row.seen.other < row.owed.token
        ]
        ended = self._store.tombstones(self._source, [other for _, other in older])
        listed, _ = (
            self._store.listed(self._source, list(ended)) if ended else (frozenset[UUID](), False)
        )
        for row, other in older:
            if other not in ended:
                continue
            row.replaces = other
            # The library may believe that the older delivery still runs, for the whole timeout of
            # the job: its worker died after it had reported the end, or recorded the next delivery,
            # and before the library had the end.
            row.takeover = other not in listed
            row.seen = Observation(Presence.ABSENT, f"older:{other}")

    def _find_unrecorded(self, rows: Sequence[Inspected]) -> None:
        """Find deliveries whose place is taken by a delivery that the ledger does not know."""
        others = {row.seen.other for row in rows if row.seen.other is not None}
        known = self._store.known(self._source, list(others))
        for row in rows:
            row.replaced_by_unrecorded = row.seen.other is not None and row.seen.other not in known

    def _find_tombstones(self, rows: Sequence[Inspected]) -> None:
        """Find deliveries that have ended meanwhile."""
        missing = [row.owed.token for row in rows if row.seen.presence is not Presence.WAITING]
        ended = self._store.tombstones(self._source, missing)
        for row in rows:
            row.tombstone = ended.get(row.owed.token)

    def _find_rules(self, rows: Sequence[Inspected]) -> None:
        """Find the rules of deliveries that may be lost."""
        lost = [
            row.owed.token
            for row in rows
            if row.tombstone is None
            and not row.owed.claim_live
            and (row.owed.claim_number is not None or row.seen.presence not in _IN_PLACE)
        ]
        rules = self._store.rules(self._source, lost)
        for row in rows:
            row.recover = rules.get(row.owed.token)

    def _presence(self, page: Sequence[Owed]) -> dict[UUID, Observation]:
        """Read the presence of these.

        An unreadable one is left out, and does not stop the inspection of the others.
        """
        try:
            return dict(self._broker.presence(page))
        except (JobguardError, redis.ConnectionError, redis.TimeoutError):
            raise
        except Exception as error:
            if refusal_of(error) is not None:
                raise
            if len(page) == 1:
                log_event(
                    "value_unreadable",
                    source=self._address,
                    key=page[0].job_id[:200],
                    error=repr(error)[:500],
                )
                return {}
            half = len(page) // 2
            return self._presence(page[:half]) | self._presence(page[half:])

    def finish_joins(self) -> None:
        """Let the library continue with joins whose members have all ended."""
        self.restorer.finish_joins(lambda: self._redis_time() + _DEADLINE)

    def _redis_time(self) -> float:
        seconds, micros = self._client.time()
        return float(seconds) + float(micros) / 1e6

    # -- decide --------------------------------------------------------------------------------

    def _situation(self, row: Inspected, now: InspectionContext) -> Situation:
        owed = row.owed
        holder = self._holder(row)
        unchanged = owed.suspected is not None and (
            owed.suspected_mark == row.seen.mark or reported_absent(owed)
        )
        return Situation(
            presence=row.seen.presence,
            replaced_by_unrecorded=row.replaced_by_unrecorded,
            holder=holder,
            tombstone=row.tombstone,
            in_flight=row.in_flight,
            cause=row.cause,
            seen_for=owed.suspected_for if unchanged else None,
            grace=0.0 if row.taken_by else self._grace(row.cause, owed),
            reports_complete=now.reports_complete,
            trusted=self._is_trusted(owed, now),
            held=now.brake.holds(self._source, owed.queue),
            hold_unexplained=self._settings.unexplained == "hold",
            unsent=owed.unsent,
            expired=owed.expired,
            backing_off=owed.backoff > 0,
            announced=owed.claim_announced,
            alone=holder is not Holder.DEAD
            or owed.claim_worker is None
            or self._workers.is_cause(owed.claim_worker, owed.crashes),
            crashes=owed.crashes,
            crash_budget=self._settings.crash_budget,
            recover=row.recover,
        )

    def _holder(self, row: Inspected) -> Holder:
        owed = row.owed
        if owed.claim_number is None:
            return Holder.NONE
        if owed.claim_live or row.in_flight:
            return Holder.LIVE
        worker = owed.claim_worker
        if worker is not None and self._workers.is_unregistered(worker):
            return Holder.LIVE
        if worker is not None and not self._workers.gone(worker.hex):
            return Holder.DROPPED
        return Holder.DEAD

    def _is_trusted(self, owed: Owed, now: InspectionContext) -> bool:
        lost = now.is_lost(owed.age)
        return self._trust.trusts(owed.queue, now.at - owed.age, lost=lost)

    def _grace(self, cause: Cause, owed: Owed) -> float:
        if reported_absent(owed):
            return 0.0  # The report counts as the first inspection.
        # A younger record has at least the time in which its producer must have pushed it.
        young = owed.suspected_for + self._settings.push_deadline - owed.age
        if cause is Cause.INCIDENT:
            return max(self._settings.loss_grace, young)
        return max(self._settings.grace, young)

    # -- apply ---------------------------------------------------------------------------------

    def _apply(
        self,
        term: int,
        rows: Sequence[Inspected],
        now: InspectionContext,
        deadline: float,
        result: PassResult,
    ) -> None:
        """Record the suspects and the ends, void claims of dead workers, and release waiting jobs."""
        self._note(term, rows, now, result)
        self._close(term, rows, deadline, result)
        self._void(term, rows, deadline, result)
        free = [row for row in rows if not now.brake.holds(self._source, row.owed.queue)]
        hidden = [
            row.owed
            for row in free
            if row.owed.claim_live and row.seen.bodiless and row.known_cause in LOSSES
        ]
        self.restorer.show_running(term, hidden, deadline)
        self.restorer.release_waiting(
            term,
            [(row.owed, row.seen) for row in free],
            deadline,
            result,
            reports_complete=now.reports_complete,
        )

    def _note(
        self,
        term: int,
        rows: Sequence[Inspected],
        now: InspectionContext,
        result: PassResult,
    ) -> None:
        """Record which deliveries are new suspects, and which are suspects no longer."""
        suspects = []
        clear = []
        for row in rows:
            owed, seen, decision = row.owed, row.seen, row.decision
            if seen.presence is Presence.ABSENT:
                result.absent += 1
            if decision.action is Action.HOLD and self._trust.is_unsure(owed.queue):
                result.waiting += 1
            elif decision.action is Action.HOLD and not self._is_trusted(owed, now):
                result.untrusted += 1
            elif decision.action is Action.HOLD:
                result.held += 1
            elif decision.action is Action.WAIT and not decision.clear:
                result.waiting += 1
                result.in_grace += seen.presence is Presence.ABSENT
            if decision.clear and owed.suspected is not None:
                clear.append(owed.token)
            elif decision.action is Action.RESTORE and owed.suspected is None:
                # One inspection is enough here, but the limiter may delay the restore.
                suspects.append((owed.token, Cause.WORKER, seen.mark))
            elif decision.suspect and not reported_absent(owed):
                if owed.suspected is not None and owed.suspected_mark == seen.mark:
                    continue  # It is recorded already, and unchanged.
                suspects.append((owed.token, row.known_cause, seen.mark))
        self._store.clear(term, self._source, clear)
        self._store.suspect(term, self._source, suspects)
        if suspects:
            log_event("jobs_suspected", count=len(suspects))

    def _close(
        self,
        term: int,
        rows: Sequence[Inspected],
        deadline: float,
        result: PassResult,
    ) -> None:
        closings = [
            Closing(row.owed.token, row.decision.outcome, _why(row))
            for row in rows
            if row.decision.action in (Action.CLOSE, Action.BURY)
            and row.decision.outcome is not None
        ]
        if not closings:
            return
        closings = self._with_parts(closings)
        buried = [row.owed for row in rows if row.decision.action is Action.BURY]
        # The envelope of a closed delivery cannot be read any more.
        tokens = [owed.token for owed in buried]
        dead = self._store.envelopes(self._source, tokens) if buried else ()
        # Deliveries that have ended since the inspection are not closed: their workers have
        # reported the end.
        closed = frozenset(self._store.close_owed(term, self._source, closings))
        buried = self._still_dead(buried, closed)
        if buried and self._settings.mode == "guard":
            self._broker.bury(buried, deadline=deadline)
            deadline = self._redis_time() + _DEADLINE
            try:
                self._broker.report(
                    [one for one in dead if one.token in closed and not one.sealed],
                    deadline=deadline,
                    all_of_them=bool(self._client.exists(hears_dead_key(self._source))),
                )
            except RedisRefuses as error:  # They are dead in any case, and kept for a person.
                log_event(
                    "job_not_restored", answer="not reported", error=str(error), count=len(dead)
                )
        tokens = [owed.token for owed in buried]
        for row in rows:
            owed, decision = row.owed, row.decision
            if owed.token in tokens:
                result.buried += 1
                log_event("job_buried", job_id=owed.job_id, queue=owed.queue, reason=_why(row))
            elif (
                decision.action is Action.CLOSE
                and decision.outcome is not None
                and owed.token in closed
            ):
                result.closed[decision.outcome] += 1
                log_event(
                    "job_closed",
                    job_id=owed.job_id,
                    outcome=decision.outcome.value,
                    reason=decision.reason,
                )

    def _still_dead(self, buried: Sequence[Owed], closed: Collection[UUID]) -> list[Owed]:
        """Leave out those that have ended in another way since the inspection, or run again."""
        # The answer to a statement that was sent twice does not name what the first one closed.
        others = [owed.token for owed in buried if owed.token not in closed]
        ended = self._store.tombstones(self._source, others)
        return [
            owed for owed in buried if owed.token in closed or ended.get(owed.token) is Outcome.DEAD
        ]

    def _with_parts(self, closings: Sequence[Closing]) -> list[Closing]:
        """Add the part of a completed job in a join, if its worker died before it reported the part."""
        result = [c.token for c in closings if c.outcome is Outcome.COMPLETED]
        known = self._store.envelopes(self._source, result) if result else ()
        readable = [one for one in known if not one.sealed]
        parts = self._broker.parts(readable) if readable else {}
        return [replace(c, part=parts.get(c.token)) for c in closings]

    def _void(
        self,
        term: int,
        rows: Sequence[Inspected],
        deadline: float,
        result: PassResult,
    ) -> None:
        voids = []
        for row in rows:
            owed = row.owed
            if row.decision.action is Action.REQUEUE and owed.claim_number is not None:
                charge = row.decision.charge
                backoff = 0.0 if owed.claim_announced else self._backoff(owed)
                voids.append(Void(owed.token, owed.claim_number, charge, backoff))
        if voids:
            voided = self._store.void(term, self._source, voids)
            failpoint.hit("after_void")
            taken = frozenset(voided)
            abandoned = [row.owed for row in rows if row.owed.token in taken]
            self._broker.abandon(abandoned, deadline=deadline)
            result.requeued += len(voided)
            log_event("claims_voided", count=len(voided))

    def _backoff(self, owed: Owed) -> float:
        waits = self._settings.crash_backoff
        return waits[min(owed.crashes, len(waits) - 1)]


def _why(row: Inspected) -> str | None:
    if row.decision.outcome is Outcome.COMPLETED:
        return None
    if row.decision.action is Action.BURY and row.recover is None:
        return f"{row.decision.reason}: {row.owed.crashes + 1} worker deaths"
    return row.decision.reason
