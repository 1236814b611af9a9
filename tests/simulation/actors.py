"""The simulated processes: producers, workers with an adapter of their own, and reconcilers.

They use the tracker, the session, the push and the reconciler of the product. What the tasks do is written
into ``Truth``, which jobguard cannot change.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, cast
from uuid import UUID

import redis

from jobguard.adapter import Session, Tracker
from jobguard.adapters.dramatiq.consumer import InFlightMessages
from jobguard.host.push import Push
from jobguard.host.tracker import HostTracker
from jobguard.model import (
    Claim,
    Delivery,
    Outcome,
    Parent,
    Refusal,
    Refused,
    new_token,
)
from jobguard.reconciler.service import Service
from jobguard.store.protocols import HostStore, LeaderStore
from tests.simulation.kernel import Process
from tests.simulation.site import (
    ADDRESS,
    NAMESPACE,
    QUEUE,
    SETTINGS,
    TASK,
    Adapter,
    Client,
    Entry,
    Library,
    Site,
    Store,
    delivery,
)

_REDELIVERED_AFTER = 6.0
"""Seconds after which the library puts back what a dead consumer had taken."""


@dataclass(eq=False)
class Run:
    """One run of a job, as the task itself sees it."""

    job_id: str
    token: UUID
    number: int
    process: Process
    asked: float
    """When its claim was asked for."""
    began: float
    completed: float | None = None


@dataclass
class Truth:
    """What producers were promised and what tasks did."""

    accepted: set[str] = field(default_factory=set)
    """The jobs whose enqueue returned."""
    cancelled: dict[str, float] = field(default_factory=dict)
    """By job id: when its cancel returned."""
    runs: list[Run] = field(default_factory=list)
    frozen: set[Process] = field(default_factory=set)
    """Processes that were stopped, or cut off from a store, for longer than a worker may be silent."""
    broken: list[str] = field(default_factory=list)
    """Violations that were seen while the simulation ran."""


@dataclass
class Job:
    """A kind of job."""

    job_id: str
    seconds: float = 0.1
    fails: int = 0
    """How many of its runs fail and are retried."""
    delay: float | None = None
    """Seconds until it is due."""
    deadly: bool = False
    cancelled_after: float | None = None


class SimulatedPush(Push):
    """A push of one message."""

    broker_down: ClassVar[tuple[type[BaseException], ...]] = (
        redis.ConnectionError,
        redis.TimeoutError,
    )

    def __init__(self, tracker: Tracker, library: Library, delivery: Delivery) -> None:
        super().__init__(tracker)
        self._library = library
        self._delivery = delivery

    @property
    def deliveries(self) -> Sequence[Delivery]:
        """Return the one delivery."""
        return [self._delivery]

    @property
    def spooled(self) -> bool:
        """True if its record waits for Postgres."""
        return self._recorded.spooled

    def reach(self) -> None:
        """Reach Redis."""
        self._library.ping()

    def send(self) -> None:
        """Push it."""
        delivery = self._delivery
        self._library.push(delivery.token, delivery.job_id, delivery.due_at)


class Actors:
    """Starts the processes of one site."""

    def __init__(self, site: Site, truth: Truth, jobs: dict[str, Job]) -> None:
        self.site = site
        self.truth = truth
        self.jobs = jobs
        self.workers: dict[str, Process] = {}
        self.leaders: dict[str, Process] = {}
        self.producers: list[Process] = []
        self.trackers: dict[Process, HostTracker] = {}
        self.memory: dict[str, set[object]] = {}
        """By worker: the messages that it has taken and not acknowledged, as it knows itself."""
        self.unsent = 0
        """Jobs that producers have still to send."""
        self.ending = False

    # -- processes ---------------------------------------------------------------------------------

    def _tracker(self, process: Process) -> HostTracker:
        site = self.site

        def store() -> HostStore:
            return cast(HostStore, Store(site, process, site.ledger.host()))

        def client() -> redis.Redis:
            return cast(redis.Redis, Client(site, process))

        tracker = HostTracker(site.source, SETTINGS, store, client=client)
        self.trackers[process] = tracker
        return tracker

    def start_producer(self, name: str, jobs: Sequence[Job], *, skew: float) -> Process:
        """Start a process that sends these jobs."""
        process = Process(name, skew=skew)
        self.producers.append(process)
        self.unsent += len(jobs)
        self.site.kernel.start(process, partial(self._produce, process, jobs), "main")
        return process

    def start_worker(self, name: str, *, skew: float = 0.0) -> Process:
        """Start a worker process with two threads that run jobs."""
        process = self.workers[name] = Process(name, skew=skew)
        self.memory[name] = set()
        self.site.kernel.start(process, partial(self._work, process), "main")
        return process

    def start_leader(self, name: str, *, skew: float = 0.0) -> Process:
        """Start a reconciler."""
        process = self.leaders[name] = Process(name, skew=skew)
        self.site.kernel.start(process, partial(self._reconcile, process), "main")
        return process

    def _reconcile(self, process: Process) -> None:
        site = self.site

        def store(holder: UUID) -> LeaderStore:
            inner = site.ledger.leader(NAMESPACE, holder)
            return cast(LeaderStore, Store(site, process, inner))

        def client() -> redis.Redis:
            return cast(redis.Redis, Client(site, process))

        def host_store() -> HostStore:
            return cast(HostStore, Store(site, process, site.ledger.host()))

        service = Service(
            SETTINGS, lambda: "", {ADDRESS: client}, store=store, host_store=host_store
        )
        service._adapters["fake"] = cast(Any, Adapter(site, process))
        service.run()

    # -- a producer ----------------------------------------------------------------------------------

    def _produce(self, process: Process, jobs: Sequence[Job]) -> None:
        tracker, library = self._tracker(process), Library(self.site, process)
        kernel = self.site.kernel
        for job in jobs:
            kernel.wait(kernel.random.random() * 0.6)
            try:
                self._send(tracker, library, job)
            except redis.RedisError:
                pass  # the caller knows that it may not run
            except Exception as error:
                self.truth.broken.append(f"enqueue of {job.job_id} raised {error!r}")
            else:
                self.truth.accepted.add(job.job_id)
            self.unsent -= 1
            if job.cancelled_after is not None:
                kernel.start(process, partial(self._cancel, tracker, library, job), "cancel")
        # The process stays, as a web server does.
        while not self.ending:
            kernel.wait(5.0)

    def _send(self, tracker: HostTracker, library: Library, job: Job) -> None:
        delivery = Delivery(
            token=new_token(),
            job_id=job.job_id,
            queue=QUEUE,
            task=TASK,
            envelope=b"bytes",
            due_at=None if job.delay is None else self.site.wall() + job.delay,
            fresh=True,
        )
        SimulatedPush(tracker, library, delivery).make()

    def _cancel(self, tracker: HostTracker, library: Library, job: Job) -> None:
        kernel = self.site.kernel
        kernel.wait(job.cancelled_after)
        try:
            tracker.cancel(job_ids=[job.job_id])
            library.delete(job.job_id)
        except redis.RedisError:
            return
        except Exception as error:
            self.truth.broken.append(f"cancel of {job.job_id} raised {error!r}")
            return
        self.truth.cancelled[job.job_id] = kernel.now

    # -- a worker ------------------------------------------------------------------------------------

    def _work(self, process: Process) -> None:
        tracker, library = self._tracker(process), Library(self.site, process)
        session = tracker.open_session(name=process.name, queues=[QUEUE])
        in_memory = InFlightMessages()
        consume = partial(self._consume, process, tracker, session, library, in_memory)
        for number in range(2):
            self.site.kernel.start(process, consume, f"consumer {number}")
        self.site.kernel.start(process, partial(self._maintain, process, library), "maintenance")

    def _maintain(self, process: Process, library: Library) -> None:
        """Put back what dead consumers had taken, and what this one took without receiving it."""
        kernel = self.site.kernel
        died: dict[str, float] = {}
        unknown: set[object] = set()
        while True:
            kernel.wait(1.5)
            known = self.memory[process.name]
            taken = {
                key
                for key, entry in self.site.shelf.entries.items()
                if entry.holder == process.name and key not in known
            }
            for key in taken & unknown:
                with suppress(redis.RedisError):
                    library.redeliver(process.name, key)
            unknown = taken
            for name in {entry.holder for entry in self.site.shelf.entries.values()} - {""}:
                other = self.workers.get(name)
                if other is not None and other.alive:
                    died.pop(name, None)
                elif kernel.now - died.setdefault(name, kernel.now) > _REDELIVERED_AFTER:
                    with suppress(redis.RedisError):
                        library.redeliver(name)

    def _consume(
        self,
        process: Process,
        tracker: HostTracker,
        session: Session,
        library: Library,
        in_memory: InFlightMessages,
    ) -> None:
        kernel = self.site.kernel
        while True:
            try:
                found = library.take()
            except redis.RedisError:
                kernel.wait(0.3)
                continue
            if found is None:
                kernel.wait(0.3)
                continue
            key, entry = found
            memory = self.memory[process.name]
            memory.add(key)
            now = self.site.wall()
            try:
                if entry.due_at is not None and entry.due_at > now:
                    move = partial(
                        self._hold_in_memory, process, tracker, library, in_memory, key, entry
                    )
                    kernel.start(process, move, "delay")
                    continue
                self._run(process, tracker, session, library, key, entry)
            except redis.RedisError:
                pass
            except Exception as error:
                self.truth.broken.append(f"the worker of {entry.job_id} saw {error!r}")
            memory.discard(key)

    def _hold_in_memory(
        self,
        process: Process,
        tracker: HostTracker,
        library: Library,
        in_memory: InFlightMessages,
        key: object,
        entry: Entry,
    ) -> None:
        """Keep a delayed message until it is due, and push it as a new delivery, as Dramatiq does."""
        rid = entry.token.hex
        in_memory.take(rid, QUEUE)
        assert entry.due_at is not None
        kernel = self.site.kernel
        kernel.wait(entry.due_at - self.site.wall() + 0.3 * kernel.random.random())
        parent = Parent(entry.token) if rid in in_memory else None
        moved = _successor(entry, parent)
        try:
            SimulatedPush(tracker, library, moved).make()
            library.ack(key, entry.token)
        except redis.RedisError:
            pass
        except Exception as error:
            self.truth.broken.append(f"the move of {entry.job_id} raised {error!r}")
        finally:
            in_memory.drop([rid])
            self.memory[process.name].discard(key)

    def _run(
        self,
        process: Process,
        tracker: HostTracker,
        session: Session,
        library: Library,
        key: object,
        entry: Entry,
    ) -> None:
        kernel, truth = self.site.kernel, self.truth
        asked = kernel.now
        answer = session.start(entry.token, partial(delivery, entry))
        if isinstance(answer, Refused):
            if answer.reason is not Refusal.CLAIMED or not self.site.source.one_body:
                library.ack(key, entry.token)
            return
        run = Run(entry.job_id, entry.token, answer.number, process, asked=asked, began=kernel.now)
        truth.runs.append(run)
        job = self.jobs[entry.job_id]
        kernel.wait(job.seconds * (0.5 + kernel.random.random()))
        if job.deadly and not tracker.spool.left():
            kernel.kill(process)
        failed = sum(r.job_id == entry.job_id and r.completed is None for r in truth.runs)
        if job.fails >= failed:
            self._retry(tracker, session, library, key, entry, answer)
            return
        run.completed = kernel.now
        kernel.point()
        session.end(answer, Outcome.COMPLETED, job_id=entry.job_id, queue=QUEUE, task=TASK)
        library.ack(key, entry.token)

    def _retry(
        self,
        tracker: HostTracker,
        session: Session,
        library: Library,
        key: object,
        entry: Entry,
        claim: Claim,
    ) -> None:
        """Send the job again after a failed run, as a new delivery that supersedes this one.

        Where a job has several bodies, a run stays until the record of its successor is written, as
        Dramatiq's does.
        """
        parent = Parent(entry.token, claim.number, Outcome.SUPERSEDED, session.id, "it failed")
        again = _successor(entry, parent, due_at=self.site.wall() + 0.5)
        push = SimulatedPush(tracker, library, again)
        push.make()
        if push.spooled and not self.site.source.one_body:
            session.end(claim, Outcome.SUPERSEDED, job_id=entry.job_id, queue=QUEUE, task=TASK)
        else:
            session.mark_superseded(claim)
        library.ack(key, entry.token)


def _successor(entry: Entry, parent: Parent | None, due_at: float | None = None) -> Delivery:
    """Return a new delivery of the same job: a delayed message that is moved, or a retry."""
    token = new_token(entry.token)
    return replace(delivery(entry), token=token, parent=parent, due_at=due_at)
