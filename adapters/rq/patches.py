"""The table of the hooks: install all of them or none, once per process, and remove them again.

RQ creates plain ``Queue`` objects internally, so only hooks on the classes see every push. If a target
is missing, or its first arguments have other names, this version of RQ is unknown to the adapter:
then nothing is patched.
"""

from __future__ import annotations

import importlib.util
import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import redis.utils
from rq import exceptions
from rq import worker as workers
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job
from rq.queue import Queue
from rq.registry import (
    BaseRegistry,
    FailedJobRegistry,
    ScheduledJobRegistry,
    StartedJobRegistry,
)
from rq.scheduler import RQScheduler
from rq.timeouts import BaseTimeoutException
from rq.version import VERSION

from jobguard.adapters.rq import cancellation, job_hooks, killed_runs, producer, worker
from jobguard.errors import UnsupportedTarget, host_interrupts
from jobguard.patching import Hooks, Make


@dataclass(frozen=True, slots=True)
class Target:
    """One method to hook, and the function that makes its hook."""

    owner: Any
    name: str
    make: Make
    leading: tuple[str, ...]
    """The names of its first arguments."""
    required: bool = True


_ENQUEUE = ("self", "job", "pipeline", "at_front")
_DONE = ("self", "job", "queue")

PRODUCER = (
    Target(Queue, "enqueue_job", producer.enqueue_job, _ENQUEUE),
    Target(Queue, "enqueue_many", producer.enqueue_many, ("self", "job_datas", "pipeline")),
    Target(Queue, "_enqueue_job", producer._enqueue_job, _ENQUEUE),
    Target(Queue, "schedule_job", producer.schedule_job, ("self", "job", "datetime", "pipeline")),
    Target(
        Queue,
        "_enqueue_rate_limited_job",
        producer._enqueue_rate_limited_job,
        _ENQUEUE,
        required=False,
    ),
    Target(RQScheduler, "enqueue_scheduled_jobs", producer.enqueue_scheduled_jobs, ("self",)),
    Target(RQScheduler, "work", producer.work_as_scheduler, ("self",)),
    Target(Queue, "empty", cancellation.empty, ("self",)),
    Target(Queue, "delete", cancellation.delete_queue, ("self", "delete_jobs")),
    Target(Queue, "remove", cancellation.remove_from_queue, ("self", "job_or_id", "pipeline")),
    Target(
        ScheduledJobRegistry,
        "remove",
        cancellation.remove_from_registry,
        ("self", "job", "pipeline"),
    ),
    Target(Job, "save", producer.save, ("self", "pipeline", "include_meta")),
    Target(Job, "save_meta", producer.save_meta, ("self",)),
    Target(Job, "to_dict", job_hooks.to_dict, ("self", "include_meta", "include_result")),
    Target(Job, "restore", job_hooks.restore, ("self", "raw_data")),
    Target(Job, "retry", job_hooks.retry, ("self", "queue", "pipeline")),
    Target(Job, "_handle_retry_result", job_hooks._handle_retry_result, ("self",), required=False),
    Target(Job, "cancel", cancellation.cancel, ("self", "pipeline")),
    Target(Job, "delete", cancellation.delete, ("self", "pipeline")),
    Target(Job, "cleanup", cancellation.cleanup, ("self", "ttl", "pipeline")),
    Target(Job, "get_status", job_hooks.get_status, ("self", "refresh")),
    Target(
        ScheduledJobRegistry,
        "schedule",
        producer.schedule,
        ("self", "job", "scheduled_datetime", "pipeline"),
    ),
    Target(FailedJobRegistry, "add", job_hooks.add_to_failed, ("self", "job", "ttl")),
    Target(BaseRegistry, "requeue", job_hooks.requeue, ("self", "job_or_id", "at_front")),
    Target(StartedJobRegistry, "cleanup", killed_runs.clean_started, ("self", "timestamp")),
    Target(
        IntermediateQueue, "cleanup", killed_runs.clean_intermediate, ("self", "worker", "queue")
    ),
)

WORKER = (
    Target(Job, "perform", worker.perform, ("self",)),
    Target(workers.SimpleWorker, "register_birth", worker.register_birth, ("self",)),
    Target(workers.SimpleWorker, "register_death", worker.register_death, ("self",)),
    Target(workers.SimpleWorker, "main_work_horse", worker.main_work_horse, _DONE),
    Target(workers.SimpleWorker, "perform_job", worker.perform_job, _DONE),
    Target(workers.SimpleWorker, "handle_execution_ended", worker.handle_execution_ended, _DONE),
    Target(workers.SimpleWorker, "handle_job_success", worker.handle_job_success, _DONE),
    Target(workers.SimpleWorker, "handle_job_failure", worker.handle_job_failure, _DONE),
    Target(
        workers.SimpleWorker, "handle_job_retry", worker.handle_job_retry, _DONE, required=False
    ),
    # Worker overrides execute_job of SimpleWorker, so both need the hook.
    Target(workers.SimpleWorker, "execute_job", worker.execute_job, _DONE),
    Target(workers.Worker, "execute_job", worker.execute_job, _DONE),
    Target(workers.Worker, "fork_work_horse", worker.fork_work_horse, _DONE),
    Target(workers.Worker, "maintain_heartbeats", worker.maintain_heartbeats, ("self", "job")),
    Target(workers.Worker, "kill_horse", killed_runs.kill_horse, ("self", "sig")),
)

# Exceptions that RQ raises from a signal handler; they can be raised inside jobguard's code.
host_interrupts(
    BaseTimeoutException,
    exceptions.ShutDownImminentException,
    # The first versions of RQ 2 define it in rq.worker.
    getattr(exceptions, "StopRequested", None) or vars(workers)["StopRequested"],
)

_lock = threading.Lock()
_hooks = Hooks()
_holders: set[object] = set()


def install(holder: object) -> None:
    """Install the hooks for the first holder; raise UnsupportedTarget for an unknown version of RQ."""
    with _lock:
        if not _holders:
            for put in list(_plan()):  # check all before the first is installed
                _hooks.put(*put)
        _holders.add(holder)


def uninstall(holder: object) -> None:
    """Remove the hooks after the last holder."""
    with _lock:
        _holders.discard(holder)
        if not _holders:
            _hooks.take_off()


def _plan() -> Iterator[tuple[Any, str, Make]]:
    if hasattr(redis.utils, "get_lib_version"):
        yield redis.utils, "get_lib_version", worker.get_lib_version
    for target in (*PRODUCER, *WORKER, *_spawning(), *_cron()):
        owner = next((c for c in target.owner.__mro__ if target.name in c.__dict__), None)
        if owner is not None and _begins_with(getattr(owner, target.name), target.leading):
            yield owner, target.name, target.make
        elif target.required or owner is not None:
            raise UnsupportedTarget(
                f"RQ {VERSION} has no {target.owner.__name__}.{target.name}"
                f"({', '.join(target.leading)}, ...) as jobguard expects it: jobs are not guarded. "
                "Use RQ 2.0 to 3.x, or upgrade jobguard."
            )


def _spawning() -> tuple[Target, ...]:
    """Return the target of SpawnWorker, if RQ has that class."""
    spawner = getattr(workers, "SpawnWorker", None)
    if spawner is None or "fork_work_horse" not in spawner.__dict__:
        return ()
    return (Target(spawner, "fork_work_horse", worker.spawn_work_horse, _DONE),)


def _cron() -> tuple[Target, ...]:
    """Return the target of RQ's cron program, if RQ has one."""
    if importlib.util.find_spec("rq.cron") is None:
        return ()
    scheduler = importlib.import_module("rq.cron").CronScheduler
    return (Target(scheduler, "start", producer.start_cron, ("self",)),)


def _begins_with(method: Any, leading: tuple[str, ...]) -> bool:
    """Return True if these are the method's first arguments; another tool's wrapper may take any."""
    try:
        parameters = tuple(inspect.signature(method).parameters.values())
    except (TypeError, ValueError):
        return False
    for at, name in enumerate(leading):
        if at < len(parameters) and parameters[at].kind is inspect.Parameter.VAR_POSITIONAL:
            return True
        if at >= len(parameters) or parameters[at].name != name:
            return False
    return True
