"""Push to Redis: lost deliveries, jobs whose dependencies have ended, and entries of running jobs.

Reads are not limited. Restores of lost deliveries pass the limiter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from uuid import UUID

import redis

from jobguard import failpoint
from jobguard.adapter import Broker
from jobguard.errors import StoreUnavailable, Unsealable
from jobguard.log import log_event
from jobguard.model import Observation, Outcome, Owed, Restorable, Restored
from jobguard.reconciler.joins import Joins
from jobguard.reconciler.limiter import Slice, TokenBucket, round_robin
from jobguard.reconciler.refusals import SEALED, Refusals
from jobguard.reconciler.rejoin import Rejoiner
from jobguard.reconciler.result import LOSSES, Lost, PassResult
from jobguard.redis_refusal import RedisRefuses, refusal_of
from jobguard.settings import Settings
from jobguard.store.protocols import Closing, LeaderStore
from jobguard.tracing import add_span

_SLICE = 1_000
"""Jobs that are restored in one go. After that the pulse is read and the lease is checked again."""
_TURN = 0.3
"""Seconds after which no further slice is begun."""
_RETRY = 1.0
_RETRY_MOST = 60.0
"""Seconds between two tries of a delivery that cannot be restored; doubled each time."""
_FAILING = 10_000
"""Number of such deliveries that are remembered."""


class Restorer:
    """Restores the deliveries of one source."""

    def __init__(
        self,
        broker: Broker,
        store: LeaderStore,
        source: int,
        settings: Settings,
        clock: Callable[[], float],
        address: str = "",
    ) -> None:
        self._broker = broker
        self._store = store
        self._source = source
        self._observes = settings.mode == "observe"
        self._observed = 0
        self._joins = Joins(
            partial(store.last_outcomes, source),
            partial(store.tombstones, source),
            grace=settings.grace,
            patience=settings.sweep_interval,
            clock=clock,
        )
        self._rejoiner = Rejoiner(broker, store, source, grace=settings.grace, clock=clock)
        self._clock = clock
        self.refusals = Refusals(store, source, address, clock)
        self.sealed = Refusals(store, source, address, clock, SEALED)
        self._slice = Slice()
        # When to try again, and the wait that was used.
        self._failing: dict[UUID, tuple[float, float]] = {}
        # Running jobs that were restored so that other jobs can see them.
        self._shown: dict[UUID, Owed] = {}
        # A million lost jobs must not delay the job of one killed worker.
        self._losses = TokenBucket(settings.recovery_rate)
        self._repairs = TokenBucket(settings.repair_rate)
        # A push that was never tried is the usual work of SQL callers and schedules, and no repair.
        self._first_pushes = TokenBucket(settings.recovery_rate)

    def show_running(self, term: int, hidden: Sequence[Owed], deadline: float) -> None:
        """Restore the lost entries of running jobs, because the jobs that depend on them look for these.

        This happens before any waiting job is restored: those are restored a grace after they were
        seen absent.
        """
        if not hidden or self._observes:
            return
        of = {owed.token: owed for owed in hidden}
        answers = self._restore(term, list(of), _running, deadline)
        self._shown.update(
            (token, of[token]) for token, answer in answers.items() if answer is Restored.RESTORED
        )

    def hide_ended(self) -> None:
        """Remove the restored entries of running jobs that ended before the library could see the end."""
        if self._shown:
            ended = self._store.tombstones(self._source, list(self._shown))
            if ended:
                self._broker.hide([self._shown[token] for token in ended])
            for token in ended:
                del self._shown[token]

    def finish_joins(self, deadline: Callable[[], float]) -> None:
        """Let the library continue with joins whose members have all ended."""
        if not self._observes:
            self._rejoiner.finish(deadline)

    def forget_reported_joins(self) -> None:
        """Report complete joins again: Redis has lost what was pushed for them."""
        self._rejoiner.forget_reports()

    @property
    def room(self) -> int:
        """How many lost deliveries the limiter would restore now."""
        return min(self._losses.available(), _SLICE)

    @property
    def has_joins_to_see_again(self) -> bool:
        """True if a job seems to wait for ended dependencies, and is to be inspected again."""
        return self._joins.pending

    def release_waiting(
        self,
        term: int,
        page: Sequence[tuple[Owed, Observation]],
        deadline: float,
        result: PassResult,
        *,
        reports_complete: bool,
    ) -> None:
        """Release jobs whose dependencies have all ended."""
        ready = self._joins.over(page, reports_complete=reports_complete)
        if not ready:
            return
        if self._observes:
            result.observed += len(ready)
            return
        answers = self._restore(term, ready, _released, deadline)
        released = [token for token, answer in answers.items() if answer is Restored.RESTORED]
        self._store.restored(term, self._source, released)
        result.released += len(released)
        if released:
            log_event("jobs_released", count=len(released))

    def restore_lost(
        self, term: int, lost: Sequence[Lost], deadline: float, result: PassResult
    ) -> None:
        """Restore lost deliveries, as fast as the limiter allows."""
        if not lost:
            return
        if self._observes:
            result.observed += len(lost)
            if len(lost) != self._observed:  # Every inspection finds the same ones again.
                self._observed = len(lost)
                log_event("would_restore", count=len(lost))
            return
        if not self.refusals.most():
            result.waiting += len(lost)
            result.throttled += len(lost)
            return
        now = self._clock()
        ready = [one for one in lost if self._failing.get(one.owed.token, (now, 0))[0] <= now]
        result.failed += len(lost) - len(ready)
        lost = ready
        losses = [one for one in lost if one.cause in LOSSES]
        if losses and not self._joins_restored(term, deadline, waiting=len(lost)):
            result.waiting += len(lost)
            result.throttled += len(lost)
            return
        others = [one for one in lost if one.cause not in LOSSES]
        repairs = [one for one in others if not one.owed.unsent]
        unsent = [one for one in others if one.owed.unsent]
        for bucket, wanted in (
            (self._first_pushes, unsent),
            (self._repairs, repairs),
            (self._losses, losses),
        ):
            granted = bucket.take(min(len(wanted), _SLICE))
            result.waiting += len(wanted) - granted
            result.throttled += len(wanted) - granted
            chosen = list(round_robin(wanted, lambda one: one.owed.queue))[:granted]
            if chosen:
                tried = self._restore_chosen(term, chosen, deadline, result)
                bucket.release(granted - tried)
                result.waiting += granted - tried
                result.throttled += granted - tried

    def _joins_restored(self, term: int, deadline: float, *, waiting: int) -> bool:
        """Restore the counts of joins, before their members; return False if Redis refuses."""
        try:
            self._rejoiner.restore_counts(deadline)
        except redis.RedisError as error:
            reason = refusal_of(error)
            if reason is None:
                raise
            self.refusals.refused(term, reason, waiting)
            return False
        return True

    def _restore_chosen(
        self, term: int, chosen: Sequence[Lost], deadline: float, result: PassResult
    ) -> int:
        """Return for how many of these the result is known."""
        overtaken = self._store.overtaken(self._source, [one.owed.token for one in chosen])
        self._store.close_owed(
            term,
            self._source,
            [
                Closing(t, Outcome.SUPERSEDED, "a later delivery of its id has started")
                for t in overtaken
            ],
        )
        result.closed[Outcome.SUPERSEDED] += len(overtaken)
        lost = {one.owed.token: one for one in chosen if one.owed.token not in overtaken}

        traces: dict[UUID, str | None] = {}

        def prepared(given: Restorable) -> Restorable:
            one = lost[given.token]
            traces[given.token] = given.trace
            return replace(
                given,
                replaces=frozenset() if one.replaces is None else frozenset([one.replaces]),
                takeover=one.takeover,
                taken_by=one.taken_by,
            )

        answers = self._restore(term, list(lost), prepared, deadline)
        back = [token for token, answer in answers.items() if answer is Restored.RESTORED]
        there = [token for token, answer in answers.items() if answer is Restored.PRESENT]
        expired = [token for token, answer in answers.items() if answer is Restored.EXPIRED]
        failpoint.hit("after_restore", when=bool(back))
        causes = {token: lost[token].cause for token in back}
        self._store.restored(term, self._source, back, causes=causes)
        self._store.clear(term, self._source, there)
        self._store.close_owed(
            term,
            self._source,
            [Closing(token, Outcome.CANCELLED, "its time to live has ended") for token in expired],
        )
        for token in back:
            result.restored[lost[token].cause] += 1
            self._failing.pop(token, None)
        for token, answer in answers.items():
            if answer not in (Restored.RESTORED, Restored.PRESENT, Restored.EXPIRED):
                result.failed += 1
                # This result is never caused by the job itself.
                if answer is not Restored.TOO_LATE:
                    self._try_later(token)
                log_event("job_not_restored", job_id=lost[token].owed.job_id, answer=answer.value)
        for token in back:
            owed = lost[token].owed
            add_span(
                f"jobguard recover {owed.queue}",
                traces[token],
                {
                    "messaging.system": "redis",
                    "messaging.destination.name": owed.queue,
                    "messaging.message.id": owed.job_id,
                    "jobguard.cause": lost[token].cause.value,
                },
            )
        if back:
            log_event(
                "jobs_restored",
                count=len(back),
                causes=sorted({lost[token].cause.value for token in back}),
            )
        return len(overtaken) + len(answers)

    def _try_later(self, token: UUID) -> None:
        _, wait = self._failing.pop(token, (0.0, _RETRY / 2))
        wait = min(2 * wait, _RETRY_MOST)
        if len(self._failing) >= _FAILING:
            self._failing.pop(next(iter(self._failing)))
        self._failing[token] = (self._clock() + wait, wait)

    def _restore(
        self,
        term: int,
        tokens: Sequence[UUID],
        prepared: Callable[[Restorable], Restorable],
        deadline: float,
    ) -> dict[UUID, Restored]:
        """Restore these in slices of bounded size, in their order, for a short time."""
        answers: dict[UUID, Restored] = {}
        until = self._clock() + _TURN
        left = list(tokens)
        while left and (most := self.refusals.most()):
            began = self._clock()
            ready = self._fetched(left[:most])
            if not ready:
                break
            # Deliveries before the last one that have no envelope any more have ended.
            left = left[left.index(ready[-1].token) + 1 :]
            self._set_sealed_aside(term, [given for given in ready if given.sealed])
            ready = [given for given in ready if not given.sealed]
            if not ready:
                continue
            refused, result = self._restore_slice(
                term, [prepared(given) for given in ready], deadline, waiting=len(left) + len(ready)
            )
            answers |= result
            if refused:
                break
            if Restored.TOO_LATE in result.values():
                self._slice.missed()
                break
            self._slice.took(sum(len(g.envelope) for g in ready), self._clock() - began)
            if self._clock() >= until:
                break
        return answers

    def _set_sealed_aside(self, term: int, sealed: Sequence[Restorable]) -> None:
        """Report jobs whose envelopes cannot be read here, and try them again later."""
        for given in sealed:
            self._try_later(given.token)
        if sealed:
            self.sealed.refused(term, str(Unsealable()), len(sealed))

    def _fetched(self, tokens: Sequence[UUID]) -> Sequence[Restorable]:
        try:
            return self._store.envelopes(self._source, tokens, most_bytes=self._slice.most_bytes)
        except StoreUnavailable:
            self._slice.missed()
            raise

    def _restore_slice(
        self, term: int, ready: Sequence[Restorable], deadline: float, *, waiting: int
    ) -> tuple[bool, Mapping[UUID, Restored]]:
        """Return whether Redis refused, and the result for each delivery."""
        try:
            result = self._broker.restore(ready, deadline=deadline)
        except RedisRefuses as error:
            self._slice.missed()
            self.refusals.refused(term, str(error), waiting - len(error.result))
            return True, error.result
        except redis.TimeoutError:
            self._slice.missed()
            if len(ready) == 1:  # it is too large for this network: others must not wait behind it
                self._try_later(ready[0].token)
                log_event("job_not_restored", job_id=ready[0].job_id, answer="no answer in time")
            raise
        except redis.RedisError as error:
            reason = refusal_of(error)
            if reason is None:
                raise
            self.refusals.refused(term, reason, waiting)
            return True, {}
        self.refusals.stored(term, sum(a is Restored.RESTORED for a in result.values()))
        return False, result


def _running(given: Restorable) -> Restorable:
    return replace(given, running=True)


def _released(given: Restorable) -> Restorable:
    return replace(given, released=True)
