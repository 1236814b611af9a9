"""One look at a page of owed deliveries: where they are, what follows, and the doing of it.

Reading is unlimited; what is put back passes the limiter. What is decided for a delivery names the
leader's term in Postgres, and carries a deadline in Redis' own clock where it pushes: a leader that
fell asleep between the look and the push does neither.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from uuid import UUID

import redis

from jobguard import failpoint
from jobguard.adapter import Broker
from jobguard.job import Cause, Outcome, Owed, Presence, Restored, Sighting
from jobguard.log import say
from jobguard.reconciler.joins import Joins
from jobguard.reconciler.limiter import TokenBucket, round_robin
from jobguard.reconciler.verdict import Case, Decision, Holder, Verdict, decide
from jobguard.settings import Settings
from jobguard.store import Closing, LeaderStore, Void

_DEADLINE = 5.0
"""Seconds of Redis' clock from the look to the push, at most."""
_SLICE = 500
"""Jobs put back in one go: then the pulse and the lease have their turn."""


@dataclass(slots=True)
class Circumstances:
    """What the looks of this moment are judged by."""

    judgeable: bool
    listed: Collection[UUID]
    """What workers that beat list."""
    trusts: Callable[[str, float], bool]
    """(queue, age in seconds) -> whether it was only ever seen by guarded workers."""
    holds: Callable[[str], bool]
    cause_of: Callable[[Owed], Cause]
    too_many: Callable[[str, Sequence[Owed]], bool]
    """(queue, its unexplained absences now) -> whether that pulls the brake; it then holds."""


@dataclass(slots=True)
class Done:
    """What one look did."""

    looked: int = 0
    absent: int = 0
    restored: Counter[Cause] = field(default_factory=Counter)
    requeued: int = 0
    released: int = 0
    """Waited in vain for jobs that had ended."""
    closed: Counter[Outcome] = field(default_factory=Counter)
    buried: int = 0
    held: int = 0
    waiting: int = 0
    """Absent, and to be looked at again, or waiting for the limiter."""
    throttled: int = 0
    """Of these: waiting for the limiter."""
    in_grace: int = 0
    """Of these: seen absent, and to be seen once more."""
    untrusted: int = 0
    """Absent from a queue that was not trusted when they were recorded: nothing can be done."""
    failed: int = 0
    """Could not be put back: unreadable, too late, or Redis refused."""
    observed: int = 0
    """Would have been put back, if this were not mode=observe."""

    def __iadd__(self, other: Done) -> Done:
        self.looked += other.looked
        self.absent += other.absent
        self.restored.update(other.restored)
        self.requeued += other.requeued
        self.released += other.released
        self.closed.update(other.closed)
        self.buried += other.buried
        self.held += other.held
        self.waiting += other.waiting
        self.throttled += other.throttled
        self.in_grace += other.in_grace
        self.observed += other.observed
        self.failed += other.failed
        self.untrusted += other.untrusted
        return self

    def counts(self) -> dict[str, int]:
        """As plain numbers, for people."""
        return {
            "looked": self.looked,
            "absent": self.absent,
            "restored": self.restored.total(),
            "requeued": self.requeued,
            "released": self.released,
            "closed": self.closed.total(),
            "buried": self.buried,
            "held": self.held,
            "waiting": self.waiting,
            "observed": self.observed,
            "failed": self.failed,
            "untrusted": self.untrusted,
        }


def told(owed: Owed) -> bool:
    """Whether we were told of its absence, rather than having seen it.

    Its worker's claim was taken away, or its producer left the push to us. What a look saw has a mark.
    """
    return owed.suspected in (Cause.WORKER, Cause.PUSH) and not owed.suspected_mark


_LOSSES = (Cause.INCIDENT, Cause.TOPOLOGY, Cause.EVICTION)


class Looker:
    """Looks at pages of one source's deliveries and does what follows."""

    def __init__(
        self,
        client: redis.Redis,
        broker: Broker,
        store: LeaderStore,
        source: int,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._broker = broker
        self._store = store
        self._source = source
        self._settings = settings
        self._observed = 0
        self._joins = Joins(
            partial(store.fates, source),
            grace=settings.grace,
            patience=settings.sweep_interval,
            clock=clock,
        )
        self._shown: dict[UUID, Owed] = {}  # what runs, and was put back for others to see
        # A million lost jobs must not delay one killed worker's.
        self._losses = TokenBucket(settings.recovery_rate)
        self._repairs = TokenBucket(settings.repair_rate)

    def look(self, term: int, page: Sequence[Owed], now: Circumstances) -> Done:
        """Look at these and do what follows. Raises NotLeading, StoreUnavailable, RedisError."""
        done = Done(looked=len(page))
        if not page:
            return done
        deadline = self._redis_time() + _DEADLINE
        sightings = self._broker.presence(page)
        older = self._older_lives(sightings)
        # The library may still believe in the run of an older life, for as long as the job may take:
        # its worker died after it told the end, or the record of the next life, and before it told Redis.
        over = {token for token, (other, _) in older.items() if other not in now.listed}
        sightings = {
            token: Sighting(Presence.ABSENT, f"older:{s.other}") if token in older else s
            for token, s in sightings.items()
        }
        missing = [o.token for o in page if sightings[o.token].presence is not Presence.WAITING]
        ended = self._store.tombstones(self._source, missing)
        decided = [
            (owed, sightings[owed.token], self._decide(owed, sightings[owed.token], ended, now))
            for owed in page
        ]
        self._note(term, decided, now, done)
        self._close(term, decided, done)
        self._void(term, decided, done)
        self._show_running(decided, now, deadline)
        self._release(term, decided, now, deadline, done)
        lost = [
            (owed, self._cause(owed, now))
            for owed, _, decision in decided
            if decision.verdict is Verdict.RESTORE
        ]
        lost = self._brake(lost, now, done)
        self._restore(term, lost, older, over, deadline, done)
        return done

    def _redis_time(self) -> float:
        seconds, micros = self._client.time()
        return float(seconds) + float(micros) / 1e6

    def _older_lives(self, sightings: Mapping[UUID, Sighting]) -> dict[UUID, tuple[UUID, Outcome]]:
        """Which deliveries have an older life of their id in their place, that has ended; and how.

        A younger one is never replaced, even if it has ended by now.
        """
        others = {
            token: s.other
            for token, s in sightings.items()
            if s.other is not None and s.other < token
        }
        ended = self._store.tombstones(self._source, list(others.values())) if others else {}
        return {token: (other, ended[other]) for token, other in others.items() if other in ended}

    def _cause(self, owed: Owed, now: Circumstances) -> Cause:
        if owed.suspected is not None and (told(owed) or owed.suspected is Cause.UNTRUSTED):
            return owed.suspected
        cause = now.cause_of(owed)
        if cause is Cause.UNEXPLAINED and owed.suspected is not None:
            return owed.suspected  # the cause that was known at the first look
        return cause

    def _decide(
        self, owed: Owed, seen: Sighting, ended: Mapping[UUID, Outcome], now: Circumstances
    ) -> Decision:
        cause = self._cause(owed, now)
        unchanged = owed.suspected is not None and (owed.suspected_mark == seen.mark or told(owed))
        holder = Holder.NOBODY
        if owed.claim_number is not None:
            live = owed.claim_live or owed.token in now.listed
            holder = Holder.LIVE if live else Holder.DEAD
        return decide(
            Case(
                presence=seen.presence,
                holder=holder,
                tombstone=ended.get(owed.token),
                listed=owed.token in now.listed,
                cause=cause,
                seen_for=owed.suspected_for if unchanged else None,
                grace=self._grace(cause, owed),
                judgeable=now.judgeable,
                trusted=now.trusts(owed.queue, owed.age),
                held=now.holds(owed.queue),
                hold_unexplained=self._settings.unexplained == "hold",
                unsent=owed.unsent,
                expired=owed.expired,
                backing_off=owed.backoff > 0,
                announced=owed.claim_announced,
                crashes=owed.crashes,
                crash_budget=self._settings.crash_budget,
            )
        )

    def _grace(self, cause: Cause, owed: Owed) -> float:
        if told(owed):
            return 0.0  # that was the first look
        # A younger record has at least until its producer must have pushed it.
        young = owed.suspected_for + self._settings.push_deadline - owed.age
        if cause is Cause.INCIDENT:
            return max(self._settings.loss_grace, young)
        return max(self._settings.grace, young)

    def _note(
        self,
        term: int,
        decided: Sequence[tuple[Owed, Sighting, Decision]],
        now: Circumstances,
        done: Done,
    ) -> None:
        """Write down who is suspected, and who is not any more."""
        suspects = []
        clear = []
        for owed, seen, decision in decided:
            if seen.presence is Presence.ABSENT:
                done.absent += 1
            if decision.verdict is Verdict.HOLD and not now.trusts(owed.queue, owed.age):
                done.untrusted += 1
            elif decision.verdict is Verdict.HOLD:
                done.held += 1
            elif decision.verdict is Verdict.WAIT and not decision.clear:
                done.waiting += 1
                done.in_grace += seen.presence is Presence.ABSENT
            if decision.clear and owed.suspected is not None:
                clear.append(owed.token)
            elif decision.suspect and not told(owed):
                if owed.suspected is not None and owed.suspected_mark == seen.mark:
                    continue  # noted already, and unchanged
                suspects.append((owed.token, self._cause(owed, now), seen.mark))
        self._store.clear(term, self._source, clear)
        self._store.suspect(term, self._source, suspects)
        if suspects:
            say("jobs_suspected", count=len(suspects))

    def _close(
        self, term: int, decided: Sequence[tuple[Owed, Sighting, Decision]], done: Done
    ) -> None:
        closings = [
            Closing(
                owed.token,
                decision.outcome,
                decision.reason if decision.outcome is not Outcome.COMPLETED else None,
            )
            for owed, _, decision in decided
            if decision.verdict in (Verdict.CLOSE, Verdict.BURY) and decision.outcome is not None
        ]
        if not closings:
            return
        self._store.close_owed(term, self._source, closings)
        buried = [owed for owed, _, decision in decided if decision.verdict is Verdict.BURY]
        if buried and self._settings.mode == "guard":
            self._broker.bury(buried)
        for owed, _, decision in decided:
            if decision.verdict is Verdict.BURY:
                done.buried += 1
                say("job_buried", job_id=owed.job_id, queue=owed.queue, crashes=owed.crashes)
            elif decision.verdict is Verdict.CLOSE and decision.outcome is not None:
                done.closed[decision.outcome] += 1
                say(
                    "job_closed",
                    job_id=owed.job_id,
                    outcome=decision.outcome.value,
                    reason=decision.reason,
                )

    def _void(
        self, term: int, decided: Sequence[tuple[Owed, Sighting, Decision]], done: Done
    ) -> None:
        voids = []
        for owed, _, decision in decided:
            if decision.verdict is Verdict.REQUEUE and owed.claim_number is not None:
                charge = not owed.claim_announced
                voids.append(
                    Void(owed.token, owed.claim_number, charge, self._backoff(owed, charge))
                )
        if voids:
            voided = self._store.void(term, self._source, voids)
            failpoint.hit("after_void")
            taken = frozenset(voided)
            self._broker.abandon([owed for owed, _, _ in decided if owed.token in taken])
            done.requeued += len(voided)
            say("claims_voided", count=len(voided))

    def _backoff(self, owed: Owed, charge: bool) -> float:
        if not charge:
            return 0.0
        waits = self._settings.crash_backoff
        return waits[min(owed.crashes, len(waits) - 1)]

    def _show_running(
        self,
        decided: Sequence[tuple[Owed, Sighting, Decision]],
        now: Circumstances,
        deadline: float,
    ) -> None:
        """Put back what a loss took of jobs that run: those that wait for them look for it.

        Before anything that waits is put back, for that is seen absent a grace later.
        """
        if self._settings.mode == "observe":
            return
        hidden = {
            owed.token: owed
            for owed, seen, _ in decided
            if seen.bodiless
            and owed.claim_live
            and not now.holds(owed.queue)
            and self._cause(owed, now) in _LOSSES
        }
        if hidden:
            envelopes = self._store.envelopes(self._source, list(hidden))
            running = [replace(restorable, running=True) for restorable in envelopes]
            answers = self._broker.restore(running, deadline=deadline)
            self._shown.update(
                (token, hidden[token])
                for token, answer in answers.items()
                if answer is Restored.RESTORED
            )

    @property
    def has_joins_to_see_again(self) -> bool:
        """Whether something waits in vain, as far as one look can tell."""
        return self._joins.pending

    def hide_ended(self) -> None:
        """Take back what was put back of jobs that have ended before the library could see it."""
        if self._shown:
            ended = self._store.tombstones(self._source, list(self._shown))
            over = [self._shown.pop(token) for token in ended]
            if over:
                self._broker.hide(over)

    def _release(
        self,
        term: int,
        decided: Sequence[tuple[Owed, Sighting, Decision]],
        now: Circumstances,
        deadline: float,
        done: Done,
    ) -> None:
        """Let go on what waits in vain for jobs that have ended."""
        page = [(owed, seen) for owed, seen, _ in decided if not now.holds(owed.queue)]
        vain = self._joins.over(page, judgeable=now.judgeable)
        if not vain:
            return
        if self._settings.mode == "observe":
            done.observed += len(vain)
            return
        ready = [
            replace(restorable, released=True)
            for restorable in self._store.envelopes(self._source, vain)
        ]
        answers = self._broker.restore(ready, deadline=deadline)
        released = [token for token, answer in answers.items() if answer is Restored.RESTORED]
        self._store.restored(term, self._source, released)
        done.released += len(released)
        if released:
            say("jobs_released", count=len(released))

    def _brake(
        self, lost: list[tuple[Owed, Cause]], now: Circumstances, done: Done
    ) -> list[tuple[Owed, Cause]]:
        unexplained: dict[str, list[Owed]] = {}
        for owed, cause in lost:
            if cause is Cause.UNEXPLAINED:
                unexplained.setdefault(owed.queue, []).append(owed)
        held = {queue for queue, absent in unexplained.items() if now.too_many(queue, absent)}
        kept = [(owed, cause) for owed, cause in lost if owed.queue not in held]
        done.held += len(lost) - len(kept)
        return kept

    def _restore(
        self,
        term: int,
        lost: Sequence[tuple[Owed, Cause]],
        older: Mapping[UUID, tuple[UUID, Outcome]],
        over: Collection[UUID],
        deadline: float,
        done: Done,
    ) -> None:
        if not lost:
            return
        if self._settings.mode == "observe":
            done.observed += len(lost)
            if len(lost) != self._observed:  # the same ones are seen again and again
                self._observed = len(lost)
                say("would_restore", count=len(lost))
            return
        losses = [pair for pair in lost if pair[1] in _LOSSES]
        repairs = [pair for pair in lost if pair[1] not in _LOSSES]
        for bucket, wanted in ((self._repairs, repairs), (self._losses, losses)):
            granted = bucket.take(min(len(wanted), _SLICE))
            done.waiting += len(wanted) - granted
            done.throttled += len(wanted) - granted
            chosen = list(round_robin(wanted, lambda pair: pair[0].queue))[:granted]
            if chosen:
                self._put_back(term, chosen, older, over, deadline, done)

    def _put_back(
        self,
        term: int,
        chosen: Sequence[tuple[Owed, Cause]],
        older: Mapping[UUID, tuple[UUID, Outcome]],
        over: Collection[UUID],
        deadline: float,
        done: Done,
    ) -> None:
        overtaken = self._store.overtaken(self._source, [owed.token for owed, _ in chosen])
        self._store.close_owed(
            term,
            self._source,
            [Closing(t, Outcome.SUPERSEDED, "a later life of its id has begun") for t in overtaken],
        )
        done.closed[Outcome.SUPERSEDED] += len(overtaken)
        causes = {
            owed.token: (owed, cause) for owed, cause in chosen if owed.token not in overtaken
        }
        ready = [
            replace(
                restorable,
                replaces=frozenset(
                    [older[restorable.token][0]] if restorable.token in older else []
                ),
                takeover=restorable.token in over
                or (
                    told(causes[restorable.token][0])
                    and causes[restorable.token][0].suspected is Cause.WORKER
                ),
            )
            for restorable in self._store.envelopes(self._source, list(causes))
        ]
        order = {owed.token: nth for nth, (owed, _) in enumerate(chosen)}
        ready.sort(key=lambda restorable: order[restorable.token])
        answers = self._broker.restore(ready, deadline=deadline)
        back = [token for token, answer in answers.items() if answer is Restored.RESTORED]
        there = [token for token, answer in answers.items() if answer is Restored.PRESENT]
        expired = [token for token, answer in answers.items() if answer is Restored.EXPIRED]
        failpoint.hit("after_restore", when=bool(back))
        self._store.restored(term, self._source, back)
        self._store.clear(term, self._source, there)
        self._store.close_owed(
            term,
            self._source,
            [Closing(token, Outcome.CANCELLED, "its time to live is over") for token in expired],
        )
        for token in back:
            done.restored[causes[token][1]] += 1
        for token, answer in answers.items():
            if answer not in (Restored.RESTORED, Restored.PRESENT, Restored.EXPIRED):
                done.failed += 1
                say("job_not_restored", job_id=causes[token][0].job_id, answer=answer.value)
        if back:
            say(
                "jobs_restored",
                count=len(back),
                causes=sorted({causes[token][1].value for token in back}),
            )
