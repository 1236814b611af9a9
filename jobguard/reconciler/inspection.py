"""One look at a page of owed deliveries: where they are, what follows, and what is written of it.

What goes back into Redis goes by ``putback``. What is decided for a delivery names the
leader's term in Postgres, and carries a deadline in Redis' own clock where it pushes: a leader that
fell asleep between the look and the push does neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

import redis

from jobguard import failpoint
from jobguard.adapter import Broker
from jobguard.log import log_event
from jobguard.model import DROPPED_BY_LIVE_WORKER, Cause, Observation, Outcome, Owed, Presence
from jobguard.reconciler.bypass import Bypass
from jobguard.reconciler.decision import ENDS, Action, Decision, Holder, Situation, decide
from jobguard.reconciler.restore import Restorer
from jobguard.reconciler.result import LOSSES, PassResult, reported_absent
from jobguard.redis_refusal import RedisRefuses, refusal_of
from jobguard.settings import Settings
from jobguard.store.protocols import Closing, LeaderStore, Void

_DEADLINE = 5.0
"""Seconds of Redis' clock from the look to the push, at most."""


@dataclass(slots=True)
class InspectionContext:
    """What the looks of this moment are judged by."""

    reports_complete: bool
    listed: Collection[UUID]
    """What workers that beat list."""
    trusts: Callable[[str, float], bool]
    """(queue, age in seconds) -> whether it was only ever seen by guarded workers."""
    holds: Callable[[str], bool]
    cause_of: Callable[[Owed], Cause]
    gone: Callable[[str], bool]
    """(a worker's name or id) -> whether it is dead or has left."""
    alone: Callable[[UUID], bool]
    """(a worker's id) -> whether it held no more than one claim when it died."""
    too_many: Callable[[str, Sequence[Owed]], bool]
    """(queue, its unexplained absences now) -> whether that pulls the brake; it then holds."""


class Inspector:
    """Looks at pages of one source's deliveries and does what follows."""

    def __init__(
        self,
        client: redis.Redis,
        broker: Broker,
        store: LeaderStore,
        source: int,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        address: str = "",
    ) -> None:
        self._client = client
        self._broker = broker
        self._store = store
        self._source = source
        self._settings = settings
        self.bypass = Bypass(store, source)
        self._address = address
        self.putting_back = Restorer(broker, store, source, settings, clock, address)

    def inspect(self, term: int, page: Sequence[Owed], now: InspectionContext) -> PassResult:
        """Look at these and do what follows. Raises NotLeading, StoreUnavailable, RedisError."""
        result = PassResult(inspected=len(page))
        if not page:
            return result
        deadline = self._redis_time() + _DEADLINE
        observations = self._presence(page)
        result.failed += len(page) - len(observations)
        page = [owed for owed in page if owed.token in observations]
        # What a worker has taken and not begun is as good as lost with it: nobody else will run it.
        left = {t: s.taken_by for t, s in observations.items() if self._is_left(s.taken_by, now)}
        observations = {
            token: Observation(Presence.ABSENT, f"held by {left[token]}") if token in left else s
            for token, s in observations.items()
        }
        ends = [token for token, s in observations.items() if s.presence in ENDS and s.by_id]
        anyones = self._store.sharing_job_id(self._source, ends) if ends else frozenset()
        observations = {
            token: Observation(Presence.ABSENT, "end of a namesake") if token in anyones else s
            for token, s in observations.items()
        }
        older = self._older_lives(observations)
        # The library may still believe in the run of an older life, for as long as the job may take:
        # its worker died after it told the end, or the record of the next life, and before it told Redis.
        over = {token for token, other in older.items() if other not in now.listed}
        observations = {
            token: Observation(Presence.ABSENT, f"older:{s.other}") if token in older else s
            for token, s in observations.items()
        }
        strangers = self._strangers(observations)
        missing = [o.token for o in page if observations[o.token].presence is not Presence.WAITING]
        ended = self._store.tombstones(self._source, missing)
        decided = [
            (
                owed,
                seen,
                self._decide(
                    owed,
                    seen,
                    ended,
                    now,
                    stranger=seen.other in strangers,
                    left=owed.token in left,
                ),
            )
            for owed, seen in ((owed, observations[owed.token]) for owed in page)
        ]
        self._note(term, decided, now, result)
        self._close(term, decided, deadline, result)
        self._void(term, decided, deadline, result)
        free = [(owed, seen) for owed, seen, _ in decided if not now.holds(owed.queue)]
        self.putting_back.running(
            term,
            [o for o, seen in free if o.claim_live and seen.bodiless and self._is_loss(o, now)],
            deadline,
        )
        self.putting_back.joined(
            term, free, deadline, result, reports_complete=now.reports_complete
        )
        lost = [
            (owed, Cause.WORKER if owed.token in left else self._cause(owed, now))
            for owed, _, decision in decided
            if decision.action is Action.RESTORE
        ]
        lost = self.bypass.without(term, lost, left, result)
        lost = self._brake(lost, now, result)
        self.putting_back.lost(term, lost, older, over, left, deadline, result)
        return result

    def _presence(self, page: Sequence[Owed]) -> dict[UUID, Observation]:
        """Look for these. One that cannot be read is left out, and keeps no other from its look."""
        try:
            return dict(self._broker.presence(page))
        except (redis.ConnectionError, redis.TimeoutError):
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

    def _is_left(self, holder: str, now: InspectionContext) -> bool:
        # Who let go of it lives, and may have run it all the same: its report is on the way then.
        return (
            bool(holder)
            and now.gone(holder)
            and (holder != DROPPED_BY_LIVE_WORKER or now.reports_complete)
        )

    def finish_joins(self) -> None:
        """Have the library go on from joins whose members have all ended."""
        self.putting_back.finish_joins(lambda: self._redis_time() + _DEADLINE)

    def _redis_time(self) -> float:
        seconds, micros = self._client.time()
        return float(seconds) + float(micros) / 1e6

    def _older_lives(self, observations: Mapping[UUID, Observation]) -> dict[UUID, UUID]:
        """Which deliveries have an older life of their id in their place that has ended, and which.

        A younger one is never replaced, even if it has ended by now.
        """
        others = {
            token: s.other
            for token, s in observations.items()
            if s.other is not None and s.other < token
        }
        ended = self._store.tombstones(self._source, list(others.values())) if others else {}
        return {token: other for token, other in others.items() if other in ended}

    def _strangers(self, observations: Mapping[UUID, Observation]) -> frozenset[UUID]:
        """Which deliveries stand in others' places that the ledger has not heard of."""
        others = frozenset(s.other for s in observations.values() if s.other is not None)
        return others - self._store.known(self._source, list(others)) if others else others

    def _cause(self, owed: Owed, now: InspectionContext) -> Cause:
        if owed.suspected is not None and (
            reported_absent(owed) or owed.suspected is Cause.UNTRUSTED
        ):
            return owed.suspected
        cause = now.cause_of(owed)
        if cause is Cause.UNEXPLAINED and owed.suspected is not None:
            return owed.suspected  # the cause that was known at the first look
        return cause

    def _is_loss(self, owed: Owed, now: InspectionContext) -> bool:
        return self._cause(owed, now) in LOSSES

    def _decide(
        self,
        owed: Owed,
        seen: Observation,
        ended: Mapping[UUID, Outcome],
        now: InspectionContext,
        *,
        stranger: bool,
        left: bool,
    ) -> Decision:
        cause = Cause.WORKER if left else self._cause(owed, now)
        unchanged = owed.suspected is not None and (
            owed.suspected_mark == seen.mark or reported_absent(owed)
        )
        holder = Holder.NONE
        if owed.claim_number is not None:
            if owed.claim_live or owed.token in now.listed:
                holder = Holder.LIVE
            elif owed.claim_worker is not None and not now.gone(owed.claim_worker.hex):
                holder = Holder.DROPPED
            else:
                holder = Holder.DEAD
        return decide(
            Situation(
                presence=seen.presence,
                replaced_by_a_stranger=stranger,
                holder=holder,
                tombstone=ended.get(owed.token),
                listed=owed.token in now.listed,
                cause=cause,
                seen_for=owed.suspected_for if unchanged else None,
                grace=0.0 if left else self._grace(cause, owed),
                reports_complete=now.reports_complete,
                trusted=now.trusts(owed.queue, owed.age),
                held=now.holds(owed.queue),
                hold_unexplained=self._settings.unexplained == "hold",
                unsent=owed.unsent,
                expired=owed.expired,
                backing_off=owed.backoff > 0,
                announced=owed.claim_announced,
                alone=holder is not Holder.DEAD
                or owed.claim_worker is None
                or now.alone(owed.claim_worker),
                crashes=owed.crashes,
                crash_budget=self._settings.crash_budget,
            )
        )

    def _grace(self, cause: Cause, owed: Owed) -> float:
        if reported_absent(owed):
            return 0.0  # that was the first look
        # A younger record has at least until its producer must have pushed it.
        young = owed.suspected_for + self._settings.push_deadline - owed.age
        if cause is Cause.INCIDENT:
            return max(self._settings.loss_grace, young)
        return max(self._settings.grace, young)

    def _note(
        self,
        term: int,
        decided: Sequence[tuple[Owed, Observation, Decision]],
        now: InspectionContext,
        result: PassResult,
    ) -> None:
        """Write down who is suspected, and who is not any more."""
        suspects = []
        clear = []
        for owed, seen, decision in decided:
            if seen.presence is Presence.ABSENT:
                result.absent += 1
            if decision.action is Action.HOLD and not now.trusts(owed.queue, owed.age):
                result.untrusted += 1
            elif decision.action is Action.HOLD:
                result.held += 1
            elif decision.action is Action.WAIT and not decision.clear:
                result.waiting += 1
                result.in_grace += seen.presence is Presence.ABSENT
            if decision.clear and owed.suspected is not None:
                clear.append(owed.token)
            elif decision.action is Action.RESTORE and owed.suspected is None:
                # Its first look is enough, but the limiter may keep it waiting.
                suspects.append((owed.token, Cause.WORKER, seen.mark))
            elif decision.suspect and not reported_absent(owed):
                if owed.suspected is not None and owed.suspected_mark == seen.mark:
                    continue  # noted already, and unchanged
                suspects.append((owed.token, self._cause(owed, now), seen.mark))
        self._store.clear(term, self._source, clear)
        self._store.suspect(term, self._source, suspects)
        if suspects:
            log_event("jobs_suspected", count=len(suspects))

    def _close(
        self,
        term: int,
        decided: Sequence[tuple[Owed, Observation, Decision]],
        deadline: float,
        result: PassResult,
    ) -> None:
        closings = [
            Closing(
                owed.token,
                decision.outcome,
                _why(owed, decision),
            )
            for owed, _, decision in decided
            if decision.action in (Action.CLOSE, Action.BURY) and decision.outcome is not None
        ]
        if not closings:
            return
        closings = self._with_parts(closings)
        buried = [owed for owed, _, decision in decided if decision.action is Action.BURY]
        # Of what is closed the envelope is no longer asked for.
        tokens = [owed.token for owed in buried]
        dead = self._store.envelopes(self._source, tokens) if buried else ()
        # Not those that have ended since the look: their workers have told it.
        closed = frozenset(self._store.close_owed(term, self._source, closings))
        if buried and self._settings.mode == "guard":
            self._broker.bury(buried, deadline=deadline)
            deadline = self._redis_time() + _DEADLINE
            try:
                self._broker.report([one for one in dead if one.token in closed], deadline=deadline)
            except RedisRefuses as error:  # they are dead all the same, and kept for a person
                log_event(
                    "job_not_restored", answer="not reported", error=str(error), count=len(dead)
                )
        for owed, _, decision in decided:
            if decision.action is Action.BURY:
                result.buried += 1
                log_event(
                    "job_buried", job_id=owed.job_id, queue=owed.queue, crashes=owed.crashes + 1
                )
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

    def _with_parts(self, closings: Sequence[Closing]) -> list[Closing]:
        """Add what they are to joins, where their worker died before it could tell."""
        result = [c.token for c in closings if c.outcome is Outcome.COMPLETED]
        parts = self._broker.parts(self._store.envelopes(self._source, result)) if result else {}
        return [replace(c, part=parts.get(c.token)) for c in closings]

    def _void(
        self,
        term: int,
        decided: Sequence[tuple[Owed, Observation, Decision]],
        deadline: float,
        result: PassResult,
    ) -> None:
        voids = []
        for owed, _, decision in decided:
            if decision.action is Action.REQUEUE and owed.claim_number is not None:
                charge = decision.charge
                backoff = 0.0 if owed.claim_announced else self._backoff(owed)
                voids.append(Void(owed.token, owed.claim_number, charge, backoff))
        if voids:
            voided = self._store.void(term, self._source, voids)
            failpoint.hit("after_void")
            taken = frozenset(voided)
            left = [owed for owed, _, _ in decided if owed.token in taken]
            self._broker.abandon(left, deadline=deadline)
            result.requeued += len(voided)
            log_event("claims_voided", count=len(voided))

    def _backoff(self, owed: Owed) -> float:
        waits = self._settings.crash_backoff
        return waits[min(owed.crashes, len(waits) - 1)]

    def _brake(
        self, lost: list[tuple[Owed, Cause]], now: InspectionContext, result: PassResult
    ) -> list[tuple[Owed, Cause]]:
        unexplained: dict[str, list[Owed]] = {}
        for owed, cause in lost:
            if cause is Cause.UNEXPLAINED:
                unexplained.setdefault(owed.queue, []).append(owed)
        held = {queue for queue, absent in unexplained.items() if now.too_many(queue, absent)}
        kept = [(owed, cause) for owed, cause in lost if owed.queue not in held]
        result.held += len(lost) - len(kept)
        return kept


def _why(owed: Owed, decision: Decision) -> str | None:
    if decision.outcome is Outcome.COMPLETED:
        return None
    if decision.action is Action.BURY:
        return f"{decision.reason}: {owed.crashes + 1} worker deaths"
    return decision.reason
