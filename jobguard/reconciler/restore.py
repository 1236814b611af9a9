"""What goes back into Redis: what was lost, what waits in vain, and what others must see running.

Reading is unlimited; what was lost passes the limiter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from uuid import UUID

import redis

from jobguard import failpoint
from jobguard.adapter import Broker
from jobguard.errors import StoreUnavailable
from jobguard.log import log_event
from jobguard.model import Cause, Observation, Outcome, Owed, Restorable, Restored
from jobguard.reconciler.joins import Joins
from jobguard.reconciler.limiter import Slice, TokenBucket, round_robin
from jobguard.reconciler.refusals import Refusals
from jobguard.reconciler.rejoin import Rejoiner
from jobguard.reconciler.result import LOSSES, PassResult, reported_absent
from jobguard.redis_refusal import RedisRefuses, refusal_of
from jobguard.settings import Settings
from jobguard.store.protocols import Closing, LeaderStore

_SLICE = 500
"""Jobs put back in one go: then the pulse and the lease have their turn."""
_TURN = 0.3
"""Seconds after which no further slice is begun."""
_RETRY = 1.0
_RETRY_MOST = 60.0
"""Seconds between two tries of one that Redis or its envelope does not allow; doubled each time."""
_FAILING = 10_000
"""Of so many it is remembered."""


class Restorer:
    """Puts one source's deliveries back."""

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
        self._slice = Slice()
        self._failing: dict[UUID, tuple[float, float]] = {}  # when to try again, and the wait then
        self._shown: dict[UUID, Owed] = {}  # what runs, and was put back for others to see
        # A million lost jobs must not delay one killed worker's.
        self._losses = TokenBucket(settings.recovery_rate)
        self._repairs = TokenBucket(settings.repair_rate)

    def running(self, term: int, hidden: Sequence[Owed], deadline: float) -> None:
        """Put back what a loss took of jobs that run: those that wait for them look for it.

        Before anything that waits is put back, for that is seen absent a grace later.
        """
        if not hidden or self._observes:
            return
        of = {owed.token: owed for owed in hidden}
        answers = self._restore(term, list(of), _running, deadline)
        self._shown.update(
            (token, of[token]) for token, answer in answers.items() if answer is Restored.RESTORED
        )

    def hide_ended(self) -> None:
        """Take back what was put back of jobs that have ended before the library could see it."""
        if self._shown:
            ended = self._store.tombstones(self._source, list(self._shown))
            if ended:
                self._broker.hide([self._shown[token] for token in ended])
            for token in ended:
                del self._shown[token]

    def finish_joins(self, deadline: Callable[[], float]) -> None:
        """Have the library go on from joins whose members have all ended."""
        if not self._observes:
            self._rejoiner.finish(deadline)

    @property
    def has_joins_to_see_again(self) -> bool:
        """Whether something waits in vain, as far as one look can tell."""
        return self._joins.pending

    def joined(
        self,
        term: int,
        page: Sequence[tuple[Owed, Observation]],
        deadline: float,
        result: PassResult,
        *,
        reports_complete: bool,
    ) -> None:
        """Let go on what waits in vain for jobs that have ended."""
        vain = self._joins.over(page, reports_complete=reports_complete)
        if not vain:
            return
        if self._observes:
            result.observed += len(vain)
            return
        answers = self._restore(term, vain, _released, deadline)
        released = [token for token, answer in answers.items() if answer is Restored.RESTORED]
        self._store.restored(term, self._source, released)
        result.released += len(released)
        if released:
            log_event("jobs_released", count=len(released))

    def lost(
        self,
        term: int,
        lost: Sequence[tuple[Owed, Cause]],
        older: Mapping[UUID, UUID],
        over: Collection[UUID],
        left: Mapping[UUID, str],
        deadline: float,
        result: PassResult,
    ) -> None:
        """Put back what nobody has, as fast as the limiter lets it.

        ``left``: by whom Redis says that it was taken, if they are gone.
        """
        if not lost:
            return
        if self._observes:
            result.observed += len(lost)
            if len(lost) != self._observed:  # the same ones are seen again and again
                self._observed = len(lost)
                log_event("would_restore", count=len(lost))
            return
        if not self.refusals.most():
            result.waiting += len(lost)
            result.throttled += len(lost)
            return
        now = self._clock()
        ready = [pair for pair in lost if self._failing.get(pair[0].token, (now, 0))[0] <= now]
        result.failed += len(lost) - len(ready)
        lost = ready
        losses = [pair for pair in lost if pair[1] in LOSSES]
        if losses and not self._mended(term, deadline, waiting=len(lost)):
            result.waiting += len(lost)
            result.throttled += len(lost)
            return
        repairs = [pair for pair in lost if pair[1] not in LOSSES]
        for bucket, wanted in ((self._repairs, repairs), (self._losses, losses)):
            granted = bucket.take(min(len(wanted), _SLICE))
            result.waiting += len(wanted) - granted
            result.throttled += len(wanted) - granted
            chosen = list(round_robin(wanted, lambda pair: pair[0].queue))[:granted]
            if chosen:
                tried = self._put_back(term, chosen, older, over, left, deadline, result)
                bucket.release(granted - tried)
                result.waiting += granted - tried
                result.throttled += granted - tried

    def _mended(self, term: int, deadline: float, *, waiting: int) -> bool:
        """Put back what is counted of joins, before their members; False: Redis refuses."""
        try:
            self._rejoiner.mend(deadline)
        except redis.RedisError as error:
            reason = refusal_of(error)
            if reason is None:
                raise
            self.refusals.refused(term, reason, waiting)
            return False
        return True

    def _put_back(
        self,
        term: int,
        chosen: Sequence[tuple[Owed, Cause]],
        older: Mapping[UUID, UUID],
        over: Collection[UUID],
        left: Mapping[UUID, str],
        deadline: float,
        result: PassResult,
    ) -> int:
        """Return for how many of these it is known what became of them."""
        overtaken = self._store.overtaken(self._source, [owed.token for owed, _ in chosen])
        self._store.close_owed(
            term,
            self._source,
            [Closing(t, Outcome.SUPERSEDED, "a later life of its id has begun") for t in overtaken],
        )
        result.closed[Outcome.SUPERSEDED] += len(overtaken)
        causes = {
            owed.token: (owed, cause) for owed, cause in chosen if owed.token not in overtaken
        }

        def prepared(given: Restorable) -> Restorable:
            owed = causes[given.token][0]
            return replace(
                given,
                replaces=frozenset([older[given.token]] if given.token in older else []),
                takeover=given.token in over
                or (reported_absent(owed) and owed.suspected is Cause.WORKER),
                taken_by=left.get(given.token, ""),
            )

        answers = self._restore(term, list(causes), prepared, deadline)
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
            result.restored[causes[token][1]] += 1
            self._failing.pop(token, None)
        for token, answer in answers.items():
            if answer not in (Restored.RESTORED, Restored.PRESENT, Restored.EXPIRED):
                result.failed += 1
                if answer is not Restored.TOO_LATE:  # that is never the job's own fault
                    self._try_later(token)
                log_event("job_not_restored", job_id=causes[token][0].job_id, answer=answer.value)
        if back:
            log_event(
                "jobs_restored",
                count=len(back),
                causes=sorted({causes[token][1].value for token in back}),
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
        """Put these back in slices that are bounded in bytes, from the first on, for a short time."""
        answers: dict[UUID, Restored] = {}
        until = self._clock() + _TURN
        left = list(tokens)
        while left and (most := self.refusals.most()):
            began = self._clock()
            ready = self._fetched(left[:most])
            if not ready:
                break
            # What came before the last of them and is not among them has ended.
            left = left[left.index(ready[-1].token) + 1 :]
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

    def _fetched(self, tokens: Sequence[UUID]) -> Sequence[Restorable]:
        try:
            return self._store.envelopes(self._source, tokens, most_bytes=self._slice.most_bytes)
        except StoreUnavailable:
            self._slice.missed()
            raise

    def _restore_slice(
        self, term: int, ready: Sequence[Restorable], deadline: float, *, waiting: int
    ) -> tuple[bool, Mapping[UUID, Restored]]:
        """Return whether Redis refused, and what was done."""
        try:
            result = self._broker.restore(ready, deadline=deadline)
        except RedisRefuses as error:
            self._slice.missed()
            self.refusals.refused(term, str(error), waiting - len(error.result))
            return True, error.result
        except redis.TimeoutError:
            self._slice.missed()
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
