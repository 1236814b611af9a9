"""What goes back into Redis: what was lost, what waits in vain, and what others must see running.

Reading is unlimited; what was lost passes the limiter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from uuid import UUID

from jobguard import failpoint
from jobguard.adapter import Broker
from jobguard.job import Cause, Outcome, Owed, Restored, Sighting
from jobguard.log import say
from jobguard.reconciler.done import LOSSES, Done, told
from jobguard.reconciler.joins import Joins
from jobguard.reconciler.limiter import TokenBucket, round_robin
from jobguard.reconciler.rejoin import Rejoiner
from jobguard.settings import Settings
from jobguard.store import Closing, LeaderStore

_SLICE = 500
"""Jobs put back in one go: then the pulse and the lease have their turn."""


class PutBack:
    """Puts one source's deliveries back."""

    def __init__(
        self,
        broker: Broker,
        store: LeaderStore,
        source: int,
        settings: Settings,
        clock: Callable[[], float],
    ) -> None:
        self._broker = broker
        self._store = store
        self._source = source
        self._observes = settings.mode == "observe"
        self._observed = 0
        self._joins = Joins(
            partial(store.fates, source),
            partial(store.tombstones, source),
            grace=settings.grace,
            patience=settings.sweep_interval,
            clock=clock,
        )
        self._rejoiner = Rejoiner(broker, store, source, grace=settings.grace, clock=clock)
        self._shown: dict[UUID, Owed] = {}  # what runs, and was put back for others to see
        # A million lost jobs must not delay one killed worker's.
        self._losses = TokenBucket(settings.recovery_rate)
        self._repairs = TokenBucket(settings.repair_rate)

    def running(self, hidden: Sequence[Owed], deadline: float) -> None:
        """Put back what a loss took of jobs that run: those that wait for them look for it.

        Before anything that waits is put back, for that is seen absent a grace later.
        """
        if not hidden or self._observes:
            return
        of = {owed.token: owed for owed in hidden}
        envelopes = self._store.envelopes(self._source, list(of))
        shown = [replace(restorable, running=True) for restorable in envelopes]
        answers = self._broker.restore(shown, deadline=deadline)
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
        page: Sequence[tuple[Owed, Sighting]],
        deadline: float,
        done: Done,
        *,
        judgeable: bool,
    ) -> None:
        """Let go on what waits in vain for jobs that have ended."""
        vain = self._joins.over(page, judgeable=judgeable)
        if not vain:
            return
        if self._observes:
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

    def lost(
        self,
        term: int,
        lost: Sequence[tuple[Owed, Cause]],
        older: Mapping[UUID, UUID],
        over: Collection[UUID],
        left: Mapping[UUID, str],
        deadline: float,
        done: Done,
    ) -> None:
        """Put back what nobody has, as fast as the limiter lets it.

        ``left``: by whom Redis says that it was taken, if they are gone.
        """
        if not lost:
            return
        if self._observes:
            done.observed += len(lost)
            if len(lost) != self._observed:  # the same ones are seen again and again
                self._observed = len(lost)
                say("would_restore", count=len(lost))
            return
        losses = [pair for pair in lost if pair[1] in LOSSES]
        if losses:
            self._rejoiner.mend(deadline)
        repairs = [pair for pair in lost if pair[1] not in LOSSES]
        for bucket, wanted in ((self._repairs, repairs), (self._losses, losses)):
            granted = bucket.take(min(len(wanted), _SLICE))
            done.waiting += len(wanted) - granted
            done.throttled += len(wanted) - granted
            chosen = list(round_robin(wanted, lambda pair: pair[0].queue))[:granted]
            if chosen:
                self._put_back(term, chosen, older, over, left, deadline, done)

    def _put_back(
        self,
        term: int,
        chosen: Sequence[tuple[Owed, Cause]],
        older: Mapping[UUID, UUID],
        over: Collection[UUID],
        left: Mapping[UUID, str],
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
                replaces=frozenset([older[restorable.token]] if restorable.token in older else []),
                takeover=restorable.token in over
                or (
                    told(causes[restorable.token][0])
                    and causes[restorable.token][0].suspected is Cause.WORKER
                ),
                held_by=left.get(restorable.token, ""),
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
