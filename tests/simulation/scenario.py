"""One schedule: who is there, what goes wrong and when; and the rules that hold once it is over."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from jobguard import model
from jobguard.log_bounds import LINE_BOUNDS
from jobguard.model import Cause, Outcome
from tests.simulation.actors import Actors, Job, Run, Truth
from tests.simulation.kernel import EPOCH, Kernel, Process
from tests.simulation.site import SETTINGS, Line, Site

_WARM_UP = 3.0
_SETTLE = 120.0
"""Simulated seconds in which everything must be over after the last fault."""
_MOST_RUNS = 12
"""Runs of one job after which a schedule is given up: something goes round for ever."""
STEPS = (
    "ack",
    "acknowledge",
    "beat",
    "cancel",
    "claim",
    "close_owed",
    "declare_dead",
    "end",
    "eval",
    "open_incident",
    "outbox",
    "push",
    "record",
    "restore",
    "restored",
    "suspect",
    "take",
    "trust",
    "void",
)
"""The calls before and after which a process may die."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong at a time, for a while, to the nth process of a kind."""

    kind: str
    at: float
    seconds: float = 1.0
    nth: int = 0
    step: str = "end"
    """The call at which a process dies, for the kinds that name one."""


@dataclass(frozen=True)
class Schedule:
    """Everything that decides one run."""

    seed: int
    one_body: bool = False
    plain: int = 3
    retrying: int = 1
    delayed: int = 1
    long: int = 0
    deadly: int = 0
    cancelled: int = 1
    skews: tuple[float, ...] = (0.0, 0.0, 0.0)
    faults: Sequence[Fault] = field(default_factory=tuple)


def simulate(schedule: Schedule) -> list[str]:
    """Run one schedule; return the rules that were broken."""
    LINE_BOUNDS.reset()
    random.seed(schedule.seed)  # the circuit's pauses
    kernel = Kernel(schedule.seed)
    kernel.on_switch = _switch
    model._last_tick = 0
    Kernel.current = kernel
    try:
        return _Scenario(kernel, schedule).run()
    finally:
        Kernel.current = None


def _switch(before: Process | None, now: Process) -> None:
    """Give each process a generator of tokens of its own."""
    if before is not None:
        before.last_tick = model._last_tick
    model._last_tick = now.last_tick


class _Scenario:
    def __init__(self, kernel: Kernel, schedule: Schedule) -> None:
        self.kernel = kernel
        self.schedule = schedule
        self.site = Site(kernel, one_body=schedule.one_body)
        self.truth = Truth()
        self.jobs = {job.job_id: job for job in _jobs(schedule)}
        self.actors = Actors(self.site, self.truth, self.jobs)
        self.flushed = False
        self.names = 0

    def run(self) -> list[str]:
        kernel, skews = self.kernel, self.schedule.skews
        for name in ("leader-a", "leader-b"):
            self.actors.start_leader(name, skew=skews[0])
        for name in ("worker-a", "worker-b"):
            self.actors.start_worker(name, skew=skews[1])
        kernel.run(_WARM_UP)
        jobs = list(self.jobs.values())
        half = (len(jobs) + 1) // 2
        for name, part in (("producer-a", jobs[:half]), ("producer-b", jobs[half:])):
            self.actors.start_producer(name, part, skew=skews[2])
        for fault in sorted(self.schedule.faults, key=lambda fault: fault.at):
            self._until(_WARM_UP + fault.at)
            self._apply(fault)
        last = max((f.at + f.seconds for f in self.schedule.faults), default=0.0)
        self._until(_WARM_UP + last + 0.1)
        self._heal()
        deadline = kernel.now + _SETTLE
        while kernel.now < deadline and not self._is_over():
            self._until(kernel.now + 1.0)
        return self._broken()

    def _until(self, at: float) -> None:
        """Run on, and start a new process for each worker and reconciler that died."""
        while self.kernel.now < at:
            self.kernel.run(min(at, self.kernel.now + 0.5))
            for dead, start in (
                (self.actors.workers, self.actors.start_worker),
                (self.actors.leaders, self.actors.start_leader),
            ):
                for name, process in list(dead.items()):
                    if not process.alive:
                        self.names += 1
                        del dead[name]
                        start(f"{name.split('+')[0]}+{self.names}", skew=process.skew)

    # -- faults --------------------------------------------------------------------------------------

    def _apply(self, fault: Fault) -> None:
        getattr(self, f"_fault_{fault.kind}")(fault)

    def _later(self, seconds: float, work: Callable[[], object]) -> None:
        def run() -> None:
            self.kernel.wait(seconds)
            work()

        self.kernel.start(self.site.network, run, "fault")

    def _reports_wait(self) -> bool:
        """Return True if Redis may have the only copy of a report."""
        if self.site.postgres is not Line.UP or any(self.site.redis.streams.values()):
            return True
        return any(
            tracker.spool.pending
            for process, tracker in self.actors.trackers.items()
            if process.alive
        )

    def _worker(self, fault: Fault) -> Process:
        workers = list(self.actors.workers.values())
        return workers[fault.nth % len(workers)]

    def _fault_flush(self, fault: Fault) -> None:
        """FLUSHALL. Redis and Postgres together are more than one failure."""
        if self._reports_wait():
            return
        self.flushed = True
        self.site.flush()

    def _fault_restart(self, fault: Fault) -> None:
        """Kill Redis, and start it again from a snapshot."""
        if self._reports_wait():
            return
        self.site.save()
        self._later(0.3 * fault.seconds, partial(self._restart_if_alone, flushed=self.flushed))

    def _restart_if_alone(self, *, flushed: bool) -> None:
        if not self._reports_wait():
            self.site.restart()
            # A snapshot from before a flush brings back what the flush deleted, and the pulse.
            self.flushed = flushed

    def _fault_evict(self, fault: Fault) -> None:
        if not self._reports_wait():
            self.site.evict()

    def _fault_redis_down(self, fault: Fault) -> None:
        self._broker(Line.DOWN, fault)

    def _fault_redis_hangs(self, fault: Fault) -> None:
        self._broker(Line.HANGS, fault)

    def _fault_redis_lossy(self, fault: Fault) -> None:
        self._broker(Line.LOSSY, fault)

    def _broker(self, line: Line, fault: Fault) -> None:
        self.site.broker = line

        def back() -> None:
            self.site.broker = Line.UP

        self._later(fault.seconds, back)

    def _fault_postgres_down(self, fault: Fault) -> None:
        self._postgres(Line.DOWN, fault)

    def _fault_postgres_hangs(self, fault: Fault) -> None:
        self._postgres(Line.HANGS, fault)

    def _fault_postgres_lossy(self, fault: Fault) -> None:
        self._postgres(Line.LOSSY, fault)

    def _postgres(self, line: Line, fault: Fault) -> None:
        self.site.postgres = line

        def back() -> None:
            self.site.postgres = Line.UP

        self._later(fault.seconds, back)

    def _fault_cut_worker(self, fault: Fault) -> None:
        """Cut one worker off from Postgres."""
        self._cut(self._worker(fault), "postgres", fault.seconds)

    def _fault_isolate_worker(self, fault: Fault) -> None:
        """Cut one worker off from both stores."""
        process = self._worker(fault)
        for store in ("postgres", "redis"):
            self._cut(process, store, fault.seconds)
        self._note_silence(process, fault.seconds)

    def _cut(self, process: Process, store: str, seconds: float) -> None:
        self.site.lines[process.name, store] = Line.HANGS
        self._later(seconds, partial(self.site.lines.pop, (process.name, store), None))

    def _fault_stop_worker(self, fault: Fault) -> None:
        self._stop(self._worker(fault), fault)

    def _fault_stop_leader(self, fault: Fault) -> None:
        leaders = list(self.actors.leaders.values())
        self._stop(leaders[fault.nth % len(leaders)], fault)

    def _stop(self, process: Process, fault: Fault) -> None:
        process.stopped = True
        self._note_silence(process, fault.seconds)
        self._later(fault.seconds, partial(setattr, process, "stopped", False))

    def _note_silence(self, process: Process, seconds: float) -> None:
        # It may be declared dead, so that another worker may run its jobs beside it.
        if seconds + SETTINGS.beat_interval >= SETTINGS.worker_timeout / 2:
            self.truth.frozen.add(process)

    def _fault_kill_worker(self, fault: Fault) -> None:
        process = self._worker(fault)
        if self._unwritten(process):
            return
        self.kernel.kill(process)

    def _fault_die_before(self, fault: Fault) -> None:
        self._die_at(fault, executed=False)

    def _fault_die_after(self, fault: Fault) -> None:
        self._die_at(fault, executed=True)

    def _die_at(self, fault: Fault, *, executed: bool) -> None:
        """Kill the next process that makes this call, before or after the call is executed."""
        self.site.traps.append((fault.step, executed))
        self._later(fault.seconds, self.site.traps.clear)

    def _fault_kill_leader(self, fault: Fault) -> None:
        leaders = list(self.actors.leaders.values())
        self.kernel.kill(leaders[fault.nth % len(leaders)])

    def _fault_kill_producer(self, fault: Fault) -> None:
        """Kill a producer: what it has not sent will never be sent."""
        process = self.actors.producers[fault.nth % len(self.actors.producers)]
        if not process.alive or self._unwritten(process):
            return
        self.kernel.kill(process)

    def _unwritten(self, process: Process) -> bool:
        """Return True if only this process has some report: both stores are away, and it would die too."""
        tracker = self.actors.trackers.get(process)
        return tracker is not None and bool(tracker.spool.left())

    def _heal(self) -> None:
        self.site.postgres = self.site.broker = Line.UP
        self.site.lines.clear()
        for process in (*self.actors.workers.values(), *self.actors.leaders.values()):
            process.stopped = False

    # -- the rules -----------------------------------------------------------------------------------

    def _is_over(self) -> bool:
        sent = self.actors.unsent == 0 or not any(p.alive for p in self.actors.producers)
        running = any(
            run.completed is None and run.process.alive and not self._superseded(run)
            for run in self.truth.runs
        )
        tables = self.site.ledger._tables
        most = max(Counter(run.job_id for run in self.truth.runs).values(), default=0)
        # The record of an accepted job may still wait in the stream: then no table has the job.
        ended = self.truth.accepted <= {stone.job_id for stone in tables.history.values()}
        quiet = sent and ended and not running and not tables.jobs
        return most > _MOST_RUNS or (quiet and self._flush_noticed())

    def _flush_noticed(self) -> bool:
        causes = {loss.cause for loss in self.site.ledger._tables.incidents.values()}
        return not self.flushed or Cause.INCIDENT in causes

    def _superseded(self, run: Run) -> bool:
        return (self.site.source.id, run.token) in self.site.ledger._tables.history

    def _broken(self) -> list[str]:
        broken = list(self.truth.broken)
        broken += [f"{where} ended with {error!r}" for where, error in self.kernel.errors]
        tables = self.site.ledger._tables
        unvouched = self._unvouched()
        owed = {job.delivery.job_id for job in tables.jobs.values()} - unvouched
        if owed:
            broken.append(f"still owed: {sorted(owed)}")
        if not self._flush_noticed():
            broken.append("silent: Redis was flushed, and no incident is on record")
        for job_id in self.truth.accepted - unvouched:
            broken += self._lost(job_id)
        for job_id in {run.job_id for run in self.truth.runs}:
            broken += self._twice(job_id)
        for job_id, at in self.truth.cancelled.items():
            broken += self._ran_after_cancel(job_id, at)
        return broken

    def _unvouched(self) -> set[str]:
        """Return the jobs that wait for a person, because nobody watched the consumers for a while.

        It takes more than one failure: a reconciler watches them through an outage of Postgres, another
        one leads after the death of a leader, and a short outage of Redis is no gap.
        """
        kinds = self._kinds
        failures = (
            any(kind.startswith("postgres") for kind in kinds),
            any(kind.startswith("redis") for kind in kinds) or bool(kinds & {"flush", "restart"}),
            "evict" in kinds,
            bool(kinds & {"kill_leader", "stop_leader"}),
            bool(kinds & {"die_before", "die_after"}) or self.schedule.deadly > 0,
        )
        tables = self.site.ledger._tables
        return {
            tables.jobs[key].delivery.job_id
            for key, suspect in tables.suspects.items()
            if suspect.cause is Cause.UNTRUSTED and key in tables.jobs and sum(failures) > 1
        }

    def _lost(self, job_id: str) -> list[str]:
        if any(run.completed is not None for run in self.truth.runs if run.job_id == job_id):
            return []
        if self.jobs[job_id].cancelled_after is not None:
            return []
        outcomes = {
            stone.outcome
            for stone in self.site.ledger._tables.history.values()
            if stone.job_id == job_id
        }
        if Outcome.DEAD in outcomes and self.jobs[job_id].deadly:
            return []
        return [f"lost: {job_id} was accepted and never completed; its outcomes: {outcomes}"]

    def _twice(self, job_id: str) -> list[str]:
        broken = []
        runs = [run for run in self.truth.runs if run.job_id == job_id]
        for nth, later in enumerate(runs):
            for earlier in runs[:nth]:
                if reason := self._why_wrong(earlier, later):
                    broken.append(f"twice: {job_id} ({reason}) {_shown(earlier)} {_shown(later)}")
        # A run without a claim, while Postgres is away, is charged to nobody.
        charged = [run for run in runs if run.number]
        if self.jobs[job_id].deadly and len(charged) > SETTINGS.crash_budget:
            broken.append(f"deadly: {job_id} began {len(runs)} times")
        return broken

    def _why_wrong(self, earlier: Run, later: Run) -> str:
        """Return why the later run should not have begun, or an empty string."""
        if not later.number:
            return ""  # the fence needs Postgres
        if not earlier.number and self._was_superseded(earlier):
            # An old snapshot of Redis brought the delivery back, and only Postgres could refuse it.
            return ""
        if not earlier.number and "isolate_worker" in self._kinds:
            return ""  # no store could know of the run of a worker that reached none
        gone = earlier.process in self.truth.frozen or not earlier.process.alive
        if gone and (earlier.completed is None or not self._reported(earlier)):
            # Its worker died, or was rightly taken for dead: the job runs again from its beginning.
            return ""
        if earlier.completed is not None and later.began > earlier.completed:
            return "it had completed"
        if earlier.completed is not None and later.began <= earlier.completed:
            return "at the same time"
        return ""

    def _was_superseded(self, run: Run) -> bool:
        """Return True if another delivery had replaced this one before the run began."""
        stone = self.site.ledger._tables.history.get((self.site.source.id, run.token))
        return (
            stone is not None
            and stone.outcome is Outcome.SUPERSEDED
            and stone.ended_at <= EPOCH + run.began
        )

    def _reported(self, run: Run) -> bool:
        """Return True if the end of this run is in the ledger as its own."""
        stone = self.site.ledger._tables.history.get((self.site.source.id, run.token))
        return (
            stone is not None and stone.outcome is Outcome.COMPLETED and stone.number == run.number
        )

    @property
    def _kinds(self) -> set[str]:
        """Return the kinds of the faults of this schedule."""
        return {fault.kind for fault in self.schedule.faults}

    def _ran_after_cancel(self, job_id: str, at: float) -> list[str]:
        away = {kind.partition("_")[0] for kind in self._kinds}
        if away >= {"redis", "postgres"}:
            return []  # a cancel that reaches no store waits in the memory of its process
        return [
            f"cancelled: {job_id} began after its cancel had returned {_shown(run)}"
            for run in self.truth.runs
            # Without Postgres, a worker that has the message already cannot know of the cancel.
            if run.job_id == job_id and run.number and run.asked > at
        ]


def _shown(run: Run) -> str:
    completed = "-" if run.completed is None else f"{run.completed:.2f}"
    return f"[{run.process.name} claim {run.number} {run.began:.2f}..{completed}]"


def _jobs(schedule: Schedule) -> list[Job]:
    jobs = [Job(f"plain-{n}") for n in range(schedule.plain)]
    jobs += [Job(f"retrying-{n}", fails=1) for n in range(schedule.retrying)]
    jobs += [Job(f"delayed-{n}", delay=1.0 + 2.0 * n) for n in range(schedule.delayed)]
    jobs += [Job(f"long-{n}", seconds=1.5 * SETTINGS.worker_timeout) for n in range(schedule.long)]
    jobs += [Job(f"deadly-{n}", deadly=True) for n in range(schedule.deadly)]
    jobs += [
        Job(f"cancelled-{n}", delay=2.0, cancelled_after=0.5) for n in range(schedule.cancelled)
    ]
    return jobs


FAULTS = tuple(
    name.removeprefix("_fault_") for name in vars(_Scenario) if name.startswith("_fault_")
)
"""The kinds of faults."""
