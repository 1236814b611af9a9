"""Every way in which a run of RQ ends: the status in RQ alone, the end in the ledger, and the recovery.

Faults that these tests were seen to catch: no note that a run raised (a handler that raises then counts
as killed); a run counts as killed only if RQ's own monitor reports it (the rows of a worker class that
monitors its horse in its own way fail); no check of a horse that exited with code 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rq import Callback, Queue, Repeat, Retry, SimpleWorker, Worker
from rq.job import JobStatus

from jobguard import registry
from tests.fakes.adapters import FakeTracker
from tests.integration.rq import tasks
from tests.integration.rq.test_killed_runs import kill
from tests.integration.rq.test_worker import ran, work
from tests.integration.rq.versions import VERSION_OF_RQ


class Reaper(Worker):
    """A worker class that monitors its horse in its own way, like the worker of Redash."""

    def monitor_work_horse(self, job: Any, queue: Any, *execution: Any) -> None:
        """Fail the job if the horse did not exit with code 0."""
        _, status, _ = self.wait_for_horse()
        self._horse_pid = 0
        if status != 0 and job.get_status() not in (JobStatus.FINISHED, JobStatus.FAILED):
            self.handle_job_failure(job, queue=queue, exc_string="terminated")


class Stopping(Worker):
    """A worker that stops its job by a command."""

    def monitor_work_horse(self, job: Any, *args: Any, **kwargs: Any) -> Any:
        """Kill the horse as the command stop-job does."""
        self._stopped_job_id = job.id
        kill(self)
        return super().monitor_work_horse(job, *args, **kwargs)


@dataclass
class End:
    """One row of the table: one way in which a run ends."""

    function: Any
    args: tuple[Any, ...] = ()
    bare: str = "failed"
    """The status in RQ without jobguard."""
    ledger: str = "failed"
    """The end of the delivery; ``owed``: its claim is given up, and it is restored within its budget."""
    workers: tuple[Any, ...] = (Worker, SimpleWorker)
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    runs: int = 1


FORKS = (Worker,)
HANDLER = {"exception_handlers": [tasks.handler_that_raises]}
RETRY = {"retry": Retry(max=3, interval=100)}
ENDS = {
    "returned": End(tasks.say, bare="finished", ledger="completed"),
    "raised": End(tasks.raise_it, ("ValueError",)),
    "SystemExit": End(tasks.raise_it, ("SystemExit",)),
    "KeyboardInterrupt": End(tasks.raise_it, ("KeyboardInterrupt",)),
    "CancelledError": End(tasks.raise_it, ("CancelledError",)),
    "timeout": End(tasks.too_long, options={"job_timeout": 1}),
    "raised, then retried": End(
        tasks.raise_it, ("ValueError",), "scheduled", "superseded", options=RETRY
    ),
    "returned a Retry": End(tasks.return_retry, (), "failed", "superseded", runs=2),
    "returned with repeats left": End(
        tasks.say,
        (),
        "scheduled" if VERSION_OF_RQ >= (2, 7) else "finished",
        "completed",
        options={"repeat": Repeat(times=1, interval=100)},
    ),
    "success callback raised": End(tasks.say, options={"on_success": Callback(tasks.broken)}),
    "failure callback raised": End(
        tasks.raise_it, ("ValueError",), options={"on_failure": Callback(tasks.broken)}
    ),
    "result could not be written": End(tasks.return_unwritable, (), "finished", "completed"),
    "traceback could not be written": End(tasks.raise_it, ("unwritable",), workers=FORKS),
    "exception handler raised": End(
        tasks.raise_it, ("ValueError",), workers=FORKS, settings=HANDLER
    ),
    "exception handler raised, then retried": End(
        tasks.raise_it,
        ("ValueError",),
        "scheduled",
        "superseded",
        workers=FORKS,
        settings=HANDLER,
        options=RETRY,
    ),
    "exception handler raised in the worker itself": End(
        tasks.raise_it, ("ValueError",), "started", workers=(SimpleWorker,), settings=HANDLER
    ),
    "killed in its failure callback": End(
        tasks.raise_it,
        ("ValueError",),
        workers=FORKS,
        options={"on_failure": Callback(tasks.dying)},
    ),
    "stopped": End(tasks.sleep, (), "stopped", "cancelled", workers=(Stopping,)),
    "killed": End(tasks.die_at_once, ledger="owed", workers=(Worker, Reaper)),
    "killed, with retries left": End(
        tasks.die_at_once, (), "scheduled", "owed", workers=(Worker, Reaper), options=RETRY
    ),
    "raised, watched by its own class": End(tasks.raise_it, ("unwritable",), workers=(Reaper,)),
    "left with a code": End(tasks.die_at_once, (3,), ledger="owed", workers=(Worker, Reaper)),
    "left with code 0": End(tasks.die_at_once, (0,), "started", "owed", workers=FORKS),
    "killed in its success callback": End(
        tasks.say, ledger="owed", workers=FORKS, options={"on_success": Callback(tasks.dying)}
    ),
}
ROWS = [
    pytest.param(end, worker, id=f"{name}-{worker.__name__}")
    for name, end in ENDS.items()
    for worker in end.workers
]


def run(end: End, worker: Any, queue: Queue, ledger: Path) -> Any:
    """Run a job that ends in this way; return the job."""
    first = 30 if end.function is tasks.sleep else str(ledger)
    job = queue.enqueue(end.function, first, *end.args, job_id="job", **end.options)
    work(worker, queue, **end.settings)
    return job


@pytest.mark.parametrize(("end", "worker"), ROWS)
def test_an_end(end: End, worker: Any, queue: Queue, tracker: FakeTracker, ledger: Path) -> None:
    """The status in RQ is the same with and without jobguard, except for a death, which is no end."""
    tracker.led = True
    registry.unregister(tracker)
    bare = run(end, worker, queue, ledger)
    assert bare.get_status() == end.bare
    in_failed = len(queue.failed_job_registry)
    queue.connection.flushdb()
    ledger.write_text("")

    registry.register(tracker)
    job = run(end, worker, queue, ledger)
    delivery = tracker.recorded[0]
    if end.ledger == "owed":
        assert tracker.notes("abandon") == [[delivery.token.hex]]
        assert delivery.token in tracker.owed
        assert not tracker.notes("end")
        assert job.get_status() == "started"
        assert len(queue.failed_job_registry) == 0
    else:
        assert not tracker.notes("abandon")
        assert reported_end(tracker, delivery.token.hex) == end.ledger
        assert job.get_status() == end.bare
        assert len(queue.failed_job_registry) == in_failed
    if end.function is not tasks.sleep:
        assert ran(ledger) == end.runs


def reported_end(tracker: FakeTracker, token: str) -> str:
    """Return the end of the first delivery, from the process that reported it."""
    for _, _, parent, _, outcome, _ in tracker.notes("record"):
        if parent == token:
            return outcome
    ((_, outcome, _),) = tracker.notes("end")
    return outcome


def test_a_run_that_redis_lost_is_shown_again(
    queue: Queue, tracker: FakeTracker, ledger: Path
) -> None:
    """The worker writes RQ's registries of its run again, so the run can be seen and stopped."""
    job = queue.enqueue(tasks.run_through_a_loss, str(ledger))
    tasks.RESTORED[:] = [tracker.recorded[0], tracker.source]
    try:
        work(Worker, queue, job_monitoring_interval=1)
    finally:
        tasks.RESTORED.clear()
    assert ran(ledger) == 1
    assert job.get_status() == "finished"
    assert queue.connection.zcard("rq:wip:default") == 0
    assert [end[:2] for end in tracker.notes("end")] == [[job.id, "completed"]]
