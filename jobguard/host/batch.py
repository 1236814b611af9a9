"""A batch: what one thread sends inside ``with guard.batch():``, recorded in one statement.

An adapter hands over its deliveries with what is left to do for each once they are recorded. At the end
of the block all of them are recorded, and pushed in the order in which they were sent.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from jobguard.host.push import TakesBack, take_back
from jobguard.model import Delivery, Recorded

Push = Callable[[Recorded], None]

_MOST = 1_000
"""Deliveries of which none is kept waiting for more: what is sent beyond them begins anew."""


class Recorder(TakesBack, Protocol):
    """What a batch needs of the tracker whose deliveries it holds."""

    @property
    def push_deadline(self) -> float:
        """Seconds after its record in which a producer may push."""

    def record(self, deliveries: Sequence[Delivery], *, outbox: bool = False) -> Recorded:
        """Commit these."""


@dataclass(slots=True)
class _Batch:
    """What is held back, in order."""

    recorder: Recorder
    patience: float | None
    unheard: bool
    last: float = field(default_factory=time.monotonic)
    """When something was held last, or it was opened."""
    over: bool = False
    """Its block is left: whoever still knows of it, a task that was begun inside, sends by itself."""
    _deferred: list[tuple[Sequence[Delivery], Push]] = field(default_factory=list)
    _count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _pid: int = field(default_factory=os.getpid)

    @property
    def is_mine(self) -> bool:
        """Whether this process opened it: a forked child has a copy that nobody sends."""
        return self._pid == os.getpid()

    def defer(self, deliveries: Sequence[Delivery], push: Push) -> Callable[[], None] | None:
        """Keep these; see `hold`."""
        if not self.is_mine:
            return None
        with self._lock:
            if self.over:
                return None
            self._deferred.append((deliveries, push))
            self._count += len(deliveries)
            quiet, self.last = time.monotonic() - self.last, time.monotonic()
            if self._count < _MOST and (self.patience is None or quiet <= self.patience):
                return _wait
        return lambda: _send(self)

    def take(self) -> list[tuple[Sequence[Delivery], Push]]:
        """Give what is held, and hold it no longer."""
        with self._lock:
            deferred, self._deferred, self._count = self._deferred, [], 0
        return deferred

    def close(self) -> None:
        """Hold nothing from here on, and send what is held."""
        with self._lock:
            self.over = True
        _send(self)


_open: ContextVar[Mapping[int, _Batch]] = ContextVar("jobguard_batches", default={})  # noqa: B039
"""By source. Never changed in place: a context that is copied opens batches of its own."""


def defer(source: int, deliveries: Sequence[Delivery], push: Push) -> Callable[[], None] | None:
    """Keep these for the end of the batch of this thread; None: there is none.

    Returns what is left to do now: nothing, or to send all that was kept. It raises what a push raises.
    """
    batch = _open.get().get(source)
    return None if batch is None else batch.defer(deliveries, push)


def _wait() -> None:
    """The batch is not over yet."""


@contextmanager
def batch(
    source: int,
    recorder: Recorder,
    patience: float | None = None,
    *,
    first_at_once: bool = False,
    unheard: bool = False,
    apart: bool = False,
) -> Iterator[None]:
    """Hold back what is sent to this source inside. A batch inside a batch is part of it, unless ``apart``.

    ``patience``: a delivery that comes so many seconds after the last goes out at once, with all that
    waits; None: none of it goes out before the end. ``first_at_once``: so does the first of all.
    ``unheard``: nobody hears of an error, so that a leader pushes what comes after it.

    What was sent before an error is sent all the same, as it would have been without a batch.
    """
    around = _open.get().get(source)
    if not apart and around is not None and around.is_mine and not around.over:
        yield
        return
    mine = _Batch(recorder, patience, unheard)
    if first_at_once:
        mine.last = float("-inf")
    before = _open.set({**_open.get(), source: mine})
    try:
        yield
    finally:
        if mine.is_mine:
            # A generator may be closed in another context than it was begun in: there is nothing to
            # put back then, and where it is still known it is over.
            with suppress(ValueError):
                _open.reset(before)
            mine.close()


def _send(batch: _Batch) -> None:
    deferred, recorder = batch.take(), batch.recorder
    if not deferred:
        return
    begun = time.monotonic()
    recorded = recorder.record([delivery for deliveries, _ in deferred for delivery in deliveries])
    for at, (_, push) in enumerate(deferred):
        if recorded.written and time.monotonic() - begun > recorder.push_deadline:
            tokens = {
                d.token for deferred_part, _ in deferred[at:] for d in deferred_part
            } - recorded.refused
            recorder.leave_to_outbox(sorted(tokens))
            return
        try:
            push(recorded)
        except BaseException:
            rest = [
                delivery for deferred_part, _ in deferred[at + 1 :] for delivery in deferred_part
            ]
            rest = [delivery for delivery in rest if delivery.token not in recorded.refused]
            if batch.unheard or recorded.may_be_pushed(recorder.push_deadline):
                recorder.leave_to_outbox([delivery.token for delivery in rest])
            else:  # surely not pushed, and whoever sent them hears that something went wrong
                take_back(recorder, rest)
            raise
