"""Record in one statement all that one thread sends inside ``with guard.batch():``.

An adapter passes its deliveries, and for each of them the work that is left once it is recorded. At
the end of the block all deliveries are recorded, and pushed in the order in which they were sent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from jobguard.fork import OwnerProcess
from jobguard.host.push import take_back
from jobguard.locks import lock
from jobguard.model import Delivery, Recorded

if TYPE_CHECKING:
    from jobguard.adapter import Tracker

Push = Callable[[Recorded], None]

_MOST = 1_000
"""The maximum number of deliveries in a batch; deliveries beyond it start the next batch."""


class Collector(Protocol):
    """An open block that takes the deliveries of its source."""

    over: bool
    takes_all: bool
    """True: also a batch that is apart joins the block."""

    @property
    def is_mine(self) -> bool:
        """Return True if this process opened the block; a forked child has a copy of it."""

    def defer(self, deliveries: Sequence[Delivery], push: Push) -> Callable[[], None] | None:
        """Take these deliveries; see the function `defer`."""

    def refuse(self, what: str) -> None:
        """Raise NotTransactional if the block must not let this pass."""


@dataclass(slots=True)
class _Batch:
    """The deferred deliveries, in order."""

    tracker: Tracker
    patience: float | None
    unheard: bool
    last: float = field(default_factory=time.monotonic)
    """The time of the last deferred delivery, or of the start of the batch."""
    over: bool = False
    """True after the end of the block; a task that was started inside then sends by itself."""
    takes_all: bool = False
    _deferred: list[tuple[Sequence[Delivery], Push]] = field(default_factory=list)
    _count: int = 0
    _lock: threading.Lock = field(default_factory=lock)
    _owner: OwnerProcess = field(default_factory=OwnerProcess)

    @property
    def is_mine(self) -> bool:
        """Return True if this process opened the batch; a forked child has a copy that is never sent."""
        return self._owner.is_current

    def defer(self, deliveries: Sequence[Delivery], push: Push) -> Callable[[], None] | None:
        """Keep these deliveries; see the function `defer`."""
        # A job with a key is sent at once: its sender waits for the answer.
        if not self.is_mine or any(one.rule for one in deliveries):
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
        """Remove and return all deferred deliveries."""
        with self._lock:
            deferred, self._deferred, self._count = self._deferred, [], 0
        return deferred

    def refuse(self, what: str) -> None:
        """Let everything pass."""

    def close(self) -> None:
        """Accept no more deliveries, and send the deferred ones."""
        with self._lock:
            self.over = True
        _send(self)


_open: ContextVar[Mapping[int, Collector]] = ContextVar("jobguard_batches", default={})  # noqa: B039
"""The open batches by source; never changed in place, so a copied context opens its own batches."""


def defer(source: int, deliveries: Sequence[Delivery], push: Push) -> Callable[[], None] | None:
    """Keep these deliveries for the end of this thread's batch; return None if there is no batch.

    The returned function does the work that is left now: none, or sending all that was kept. It
    raises the errors of a push.
    """
    batch = _open.get().get(source)
    return None if batch is None else batch.defer(deliveries, push)


def is_open(source: int) -> bool:
    """Return True inside a batch or a transaction of this source."""
    return source in _open.get()


def refuse(source: int, what: str) -> None:
    """Raise NotTransactional if a transaction is open, and ``what`` cannot be part of it."""
    block = _open.get().get(source)
    if block is not None:
        block.refuse(what)


@contextmanager
def collecting(source: int, block: Collector) -> Iterator[None]:
    """Give all deliveries to this source inside the block to ``block``."""
    before = _open.set({**_open.get(), source: block})
    try:
        yield
    finally:
        if block.is_mine:
            block.over = True
            # A generator may be closed in a context other than the one in which it started. Then
            # there is nothing to restore, and a context that still knows this block sees that it is
            # over.
            with suppress(ValueError):
                _open.reset(before)


def _wait() -> None:
    """Do nothing: the batch goes on."""


@contextmanager
def batch(
    source: int,
    tracker: Tracker,
    patience: float | None = None,
    *,
    first_at_once: bool = False,
    unheard: bool = False,
    apart: bool = False,
) -> Iterator[None]:
    """Defer deliveries to this source inside the block. A batch in a batch joins it, unless ``apart``.

    ``patience``: a delivery that comes this many seconds after the previous one is sent at once,
    with all deferred ones. None: no delivery is sent before the end. ``first_at_once``: the first
    delivery is also sent at once. ``unheard``: no caller receives an error, so a leader pushes the
    deliveries after a failed one.

    Deliveries that were sent before an error in the block are still sent, as they would be without
    a batch.
    """
    around = _open.get().get(source)
    joins = around is not None and around.is_mine and not around.over
    if around is not None and joins and (not apart or around.takes_all):
        yield
        return
    mine = _Batch(tracker, patience, unheard)
    if first_at_once:
        mine.last = float("-inf")
    try:
        with collecting(source, mine):
            yield
    finally:
        if mine.is_mine:
            mine.close()


def _send(batch: _Batch) -> None:
    deferred, tracker = batch.take(), batch.tracker
    if not deferred:
        return
    begun = time.monotonic()
    recorded = tracker.record([delivery for deliveries, _ in deferred for delivery in deliveries])
    for at, (_, push) in enumerate(deferred):
        if recorded.written and time.monotonic() - begun > tracker.push_deadline:
            tracker.leave_to_outbox([one.token for one in _left(deferred[at:], recorded)])
            return
        try:
            push(recorded)
        except BaseException:
            rest = _left(deferred[at + 1 :], recorded)
            if batch.unheard or recorded.may_be_pushed(tracker.push_deadline):
                tracker.leave_to_outbox([delivery.token for delivery in rest])
            else:  # surely not pushed, and the sender receives an error
                take_back(tracker, rest)
            raise


def _left(
    deferred: Sequence[tuple[Sequence[Delivery], Push]], recorded: Recorded
) -> list[Delivery]:
    """Return the deliveries of these that may be pushed."""
    return [
        one for deliveries, _ in deferred for one in deliveries if one.token not in recorded.refused
    ]
