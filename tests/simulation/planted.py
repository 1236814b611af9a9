"""Faults that are planted into the product, to see that the simulation finds them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from jobguard.adapters.dramatiq.consumer import InFlightMessages
from jobguard.host.beats import BeatSender
from jobguard.host.session import WorkerSession
from jobguard.host.stream import Notes
from jobguard.host.tracker import HostTracker
from jobguard.model import Beat, Claim, Delivery, End, Outcome, Recorded
from jobguard.reconciler.liveness import Liveness
from jobguard.reconciler.pulse import PulseKeeper
from jobguard.reconciler.stream_drain import StreamDrain
from jobguard.store.protocols import Void
from tests.fakes.store import host as host_store
from tests.fakes.store.host import MemoryHostStore
from tests.fakes.store.leader import MemoryLeaderStore
from tests.fakes.store.tables import Key, Tables
from tests.simulation.scenario import Fault


@dataclass(frozen=True)
class PlantedFault:
    """A fault of the product, and what must go wrong at the site to bring it to light."""

    plant: Callable[[], Iterator[Any]]
    faults: tuple[Fault, ...]
    """Each schedule has all of these, at times that differ by up to two seconds."""


PLANTED: dict[str, PlantedFault] = {}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Plant this fault inside the block."""
    with ExitStack() as stack:
        for patch in PLANTED[name].plant():
            stack.enter_context(patch)
        yield


def _found_by(
    *faults: Fault,
) -> Callable[[Callable[[], Iterator[Any]]], Callable[[], Iterator[Any]]]:
    def register(plant: Callable[[], Iterator[Any]]) -> Callable[[], Iterator[Any]]:
        PLANTED[plant.__name__] = PlantedFault(plant, faults)
        return plant

    return register


def _patch(owner: Any, name: str, made: Any) -> Any:
    return mock.patch.object(owner, name, made)


@_found_by(Fault("redis_lossy", 0.0, 3.0), Fault("kill_worker", 2.0))
def superseded_without_tombstone() -> Iterator[Any]:
    """A superseded delivery leaves no tombstone, so that a second copy of it is unknown, and runs."""
    bury = Tables.bury

    def made(self: Tables, key: Key, outcome: Outcome, **fields: Any) -> None:
        if outcome is Outcome.SUPERSEDED:
            self.drop(key)
        else:
            bury(self, key, outcome, **fields)

    yield _patch(Tables, "bury", made)


@_found_by(Fault("stop_worker", 1.0, 8.0))
def stale_claims_count() -> Iterator[Any]:
    """Reports of a worker count although another worker has the claim by now."""
    yield _patch(host_store, "_counts", lambda _end, _run: True)
    yield _patch(MemoryHostStore, "_is_valid_parent", lambda *_, **__: True)


@_found_by(Fault("die_before", 0.0, 8.0, step="open_incident"), Fault("flush", 1.0))
def pulse_before_incident() -> Iterator[Any]:
    """The pulse is made again before the incident is on record."""
    lost = PulseKeeper._lost

    def made(self: PulseKeeper, term: int, standing: Any, *rest: Any) -> Any:
        begin, store = self._begin, self._store
        opened: list[tuple[Any, ...]] = []

        class Later:
            def __getattr__(self, name: str) -> Any:
                return getattr(store, name)

            def open_incident(self, *arguments: Any) -> int:
                opened.append(arguments)
                return 0

        def first(*arguments: Any) -> None:
            begin(*arguments)
            for one in opened:
                store.open_incident(*one)

        with _patch(self, "_store", Later()), _patch(self, "_begin", first):
            return lost(self, term, standing, *rest)

    yield _patch(PulseKeeper, "_lost", made)


@_found_by(Fault("postgres_down", 0.0, 3.0), Fault("kill_worker", 2.0))
def absence_before_the_drain() -> Iterator[Any]:
    """Absent jobs are judged although reports wait in the stream, which is drained now and then.

    Workers do not ask the stream either: that refuses what the early judgement puts back.
    """
    step = StreamDrain.step
    calls = itertools.count()

    def made(self: StreamDrain) -> bool:
        if next(calls) % 100 == 99:
            step(self)
        return True

    yield _patch(StreamDrain, "step", made)
    yield _patch(HostTracker, "notes_of", lambda _self, _delivery: Notes())


@_found_by(Fault("flush", 0.5))
def delayed_message_held_twice() -> Iterator[Any]:
    """A process that has two copies of a delayed message forgets both when one is acknowledged."""

    def made(self: InFlightMessages, rids: Sequence[str]) -> None:
        for rid in rids:
            self._queues.pop(rid, None)

    yield _patch(InFlightMessages, "drop", made)


@_found_by(Fault("postgres_down", 0.0, 3.0))
def late_record_is_owed_again() -> Iterator[Any]:
    """A record that comes after the end of its delivery makes it owed again."""
    record = MemoryHostStore.record

    def made(
        self: MemoryHostStore, source: int, deliveries: Sequence[Delivery], **options: Any
    ) -> Recorded:
        for delivery in deliveries:
            self._tables.history.pop((source, delivery.token), None)
        return record(self, source, deliveries, **options)

    yield _patch(MemoryHostStore, "record", made)


@_found_by(Fault("redis_hangs", 1.0, 1.0))
def cancel_without_tombstone() -> Iterator[Any]:
    """A cancel deletes what is owed and leaves no tombstone."""
    bury = Tables.bury

    def made(self: Tables, key: Key, outcome: Outcome, **fields: Any) -> None:
        if outcome is Outcome.CANCELLED:
            self.drop(key)
        else:
            bury(self, key, outcome, **fields)

    yield _patch(Tables, "bury", made)


@_found_by(Fault("flush", 1.0))
def beats_list_nothing() -> Iterator[Any]:
    """The beats of a worker do not list the deliveries that it runs."""
    snapshot = BeatSender._snapshot

    def made(self: BeatSender) -> Beat:
        return replace(snapshot(self), claims=())

    yield _patch(BeatSender, "_snapshot", made)


@_found_by(Fault("cut_worker", 0.0, 8.0))
def death_in_one_store() -> Iterator[Any]:
    """A worker that beats in Redis alone counts as dead."""
    see = Liveness._see

    def made(self: Liveness, at: float, row: Any, _redis_beat: int | None) -> None:
        see(self, at, row, None)

    yield _patch(Liveness, "_see", made)


@_found_by(Fault("evict", 1.0))
def deaths_are_not_charged() -> Iterator[Any]:
    """The death of a worker is not charged to the job that it ran."""
    void = MemoryLeaderStore.void

    def made(self: MemoryLeaderStore, term: int, source: int, voids: Sequence[Void]) -> Any:
        return void(self, term, source, [replace(one, charge=False) for one in voids])

    yield _patch(MemoryLeaderStore, "void", made)


@_found_by(Fault("kill_worker", 3.0))
def ends_are_forgotten() -> Iterator[Any]:
    """An end is acknowledged to the worker and not written."""

    def made(self: MemoryHostStore, source: int, ends: Sequence[End]) -> Sequence[Any]:
        return ["ended"] * len(ends)

    yield _patch(MemoryHostStore, "end", made)


@_found_by(Fault("postgres_lossy", 0.0, 3.0))
def superseded_before_its_successor() -> Iterator[Any]:
    """The end of a superseded run passes the record of its successor, which waits in the spool."""

    def made(self: WorkerSession, claim: Claim, outcome: Outcome, **of: Any) -> None:
        if outcome is not Outcome.SUPERSEDED:
            end(self, claim, outcome, **of)
            return
        report = End(claim.token, claim.number, outcome, self.id, **of)
        with self._lock:
            self._pending.append(report)
        self._wake.set()

    end = WorkerSession.end
    yield _patch(WorkerSession, "end", made)
