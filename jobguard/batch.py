"""A batch: what one thread sends inside ``with guard.batch():``, recorded in one statement.

An adapter hands over its deliveries with what is left to do for each once they are recorded. At the end
of the block all of them are recorded, and pushed in the order in which they were sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from jobguard.job import Delivery, Recorded
from jobguard.push import TakesBack, take_back

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
    held: list[tuple[Sequence[Delivery], Push]] = field(default_factory=list)
    count: int = 0
    last: float = field(default_factory=time.monotonic)
    """When something was held last, or it was opened."""


_open: ContextVar[Mapping[int, _Batch]] = ContextVar("jobguard_batches", default={})  # noqa: B039
"""By source. Never changed in place: a context that is copied has batches of its own."""


def hold(source: int, deliveries: Sequence[Delivery], push: Push) -> Callable[[], None] | None:
    """Keep these for the end of the batch of this thread; None: there is none.

    Returns what is left to do now: nothing, or to send all that was kept. It raises what a push raises.
    """
    batch = _open.get().get(source)
    if batch is None:
        return None
    batch.held.append((deliveries, push))
    batch.count += len(deliveries)
    quiet, batch.last = time.monotonic() - batch.last, time.monotonic()
    if batch.count >= _MOST or (batch.patience is not None and quiet > batch.patience):
        return lambda: _send(batch)
    return _wait


def _wait() -> None:
    """The batch is not over yet."""


@contextmanager
def batch(
    source: int, recorder: Recorder, patience: float | None = None, *, first_at_once: bool = False
) -> Iterator[None]:
    """Hold back what is sent to this source inside. A batch inside a batch is part of it.

    ``patience``: a delivery that comes so many seconds after the last goes out at once, with all that
    waits; None: none of it goes out before the end. ``first_at_once``: so does the first of all.

    What was sent before an error is sent all the same, as it would have been without a batch.
    """
    if source in _open.get():
        yield
        return
    mine = _Batch(recorder, patience)
    if first_at_once:
        mine.last = float("-inf")
    before = _open.set({**_open.get(), source: mine})
    try:
        yield
    finally:
        _open.reset(before)
        _send(mine)


def _send(batch: _Batch) -> None:
    held, batch.held, batch.count = batch.held, [], 0
    recorder = batch.recorder
    if not held:
        return
    begun = time.monotonic()
    recorded = recorder.record([delivery for deliveries, _ in held for delivery in deliveries])
    for at, (_, push) in enumerate(held):
        if recorded.written and time.monotonic() - begun > recorder.push_deadline:
            tokens = {d.token for later, _ in held[at:] for d in later} - recorded.refused
            recorder.leave_to_outbox(sorted(tokens))
            return
        try:
            push(recorded)
        except BaseException:
            # Surely not pushed, and whoever sent them hears that something went wrong.
            rest = [delivery for later, _ in held[at + 1 :] for delivery in later]
            take_back(recorder, [d for d in rest if d.token not in recorded.refused])
            raise
