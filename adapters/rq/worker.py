"""The hooks on RQ's workers: a session for each worker, a claim for each start, an end for each claim.

``register_birth``, ``execute_job`` and ``fork_work_horse`` run in the worker. The code after
``Job.perform`` runs in the horse, or in the worker if it does not fork or if the horse was killed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

import redis.utils
from redis.exceptions import RedisError
from rq.executions import ExecutionRegistry
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.utils import now, utcformat
from rq.worker import SimpleWorker

from jobguard import failpoint
from jobguard.adapter import running_job
from jobguard.adapters.rq.dead_jobs import (
    is_dead,
    is_to_report,
    known_to_horse,
    learn_from_parent,
    raise_if_dead,
)
from jobguard.adapters.rq.envelope import Mode
from jobguard.adapters.rq.killed_runs import forget_orders, is_left_to_the_leader, was_ordered
from jobguard.adapters.rq.layout import FIELD, SPENT, WORKER_FIELD
from jobguard.adapters.rq.lookup import guarded_elsewhere, tracker_for, tracker_for_job
from jobguard.adapters.rq.message import (
    attempt_of,
    deliver,
    draft,
    drafting,
    is_given_up,
    mark,
    moving,
    redis_failed,
    run_of,
    set_run,
    set_token,
    task_of,
    token_of,
    why_unbegun,
)
from jobguard.adapters.rq.run import Run
from jobguard.adapters.rq.skip import finish, skip
from jobguard.client_names import label_client
from jobguard.host_safety import contain_errors
from jobguard.log import log_event
from jobguard.model import Delivery, Outcome, Refused, new_token
from jobguard.registry import trackers

if TYPE_CHECKING:
    from jobguard.adapter import Session, Tracker

Hook = Callable[..., Any]

_TRACKER = "_jobguard_tracker"
_SESSION = "_jobguard_session"
_MARKED = "_jobguard_marked"
_EXIT_TIME = 1.0
"""Seconds that a killed horse may need to exit."""
_HOOK_FIRST = """import sys
sys.path[:] = {path!r}
try:
    import jobguard.adapters.rq.workers
except ImportError:
    pass
"""


def get_lib_version(original: Hook) -> Hook:
    """Wrap redis.utils.get_lib_version: read the version once, and not for each connection.

    A horse opens a connection for its job. Measured: reading the version from a file is a third of the page
    faults of a horse whose job does nothing.
    """
    return cache(original)


def register_birth(original: Hook) -> Hook:
    """Wrap Worker.register_birth: start to beat before the worker can take its first job."""

    @wraps(original)
    def hook(self: Any) -> Any:
        # Beat before RQ registers the worker: an unknown consumer makes its queues untrusted.
        session = _open_session(self)
        _log_whether_guarded(self, session)
        getattr(redis.utils, "get_lib_version", bool)()  # each horse inherits what was read
        result = original(self)
        if session is not None:
            _mark_worker(self, session)
        return result

    return hook


def _mark_worker(worker: Any, session: Session) -> None:
    """Name the session in the worker's hash; a session that was declared dead continues as another one."""
    if worker.__dict__.get(_MARKED) != session.id:
        with contain_errors("mark a worker", event="redis_call_failed", worker=worker.name):
            worker.connection.hset(worker.key, WORKER_FIELD, session.id.hex)
            worker.__dict__[_MARKED] = session.id


def register_death(original: Hook) -> Hook:
    """Wrap Worker.register_death: close the session, so that claimed jobs are restored at once."""

    @wraps(original)
    def hook(self: Any) -> Any:
        try:
            return original(self)
        finally:
            session: Session | None = self.__dict__.pop(_SESSION, None)
            if session is not None:
                session.close(running=_horse_runs_on(self))

    return hook


def _horse_runs_on(worker: Any) -> bool:
    """Return True if a worker that quits (because Redis failed) leaves a horse that still runs a job."""
    pid = getattr(worker, "horse_pid", 0)
    if not pid:
        return False
    # A horse that the worker killed needs a moment to exit. It must not count as a crash of its job.
    deadline = time.monotonic() + (_EXIT_TIME if was_ordered(worker) else 0.0)
    try:
        while (runs := os.waitpid(pid, os.WNOHANG) == (0, 0)) and time.monotonic() < deadline:
            time.sleep(0.01)
    except OSError:
        return False
    return runs


def execute_job(original: Hook) -> Hook:
    """Wrap Worker.execute_job: start no job without a claim."""

    @wraps(original)
    def hook(self: Any, job: Job, queue: Queue) -> Any:
        return _claimed(self, job, queue, lambda: original(self, job, queue))

    return hook


def _claimed(worker: Any, job: Job, queue: Queue, call: Callable[[], Any]) -> Any:
    """Call the function that runs the job, here or in a horse, with a claim until the end."""
    session = _session_for(worker, queue)
    if session is None or run_of(job) is not None or is_dead(job):
        return call()
    answer = _start(worker, session, job, queue)
    if isinstance(answer, Refused):
        return call() if is_to_report(worker, job, answer) else skip(worker, job, queue, answer)
    if answer is None:
        return call()
    set_run(job, answer)
    failpoint.hit("after_claim")
    try:
        result = call()
        _conclude(answer, job)
        return result
    except BaseException as error:
        # RQ's own code failed and the worker quits. Later, RQ fails this run as abandoned.
        if answer.raised and not job.retries_left:
            answer.end(Outcome.FAILED, repr(error))
        raise
    finally:
        answer.drain()
        answer.close()
        set_run(job, None)


def fork_work_horse(original: Hook) -> Hook:
    """Wrap Worker.fork_work_horse: open the pipe for the horse's reports."""
    return _with_pipe(original, for_spawn=False)


def spawn_work_horse(original: Hook) -> Hook:
    """Wrap SpawnWorker.fork_work_horse: do the same for a horse that is a new interpreter."""
    return _with_pipe(original, for_spawn=True)


@contextmanager
def _hooked_interpreter() -> Iterator[None]:
    """Make the new Python process that RQ starts inside the block hook RQ first.

    RQ writes the program of that process, with RQ's own class names unless jobguard's are configured.
    """
    spawns = {name: getattr(os, name) for name in ("posix_spawn", "spawnv")}  # RQ 3.0, and before

    def hooked(spawn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: spawn(*map(_with_hooks, args), **kwargs)

    for name, spawn in spawns.items():
        setattr(os, name, hooked(spawn))
    try:
        yield
    finally:
        for name, spawn in spawns.items():
            setattr(os, name, spawn)


def _with_hooks(argument: Any) -> Any:
    """Add the hook code before the program in the arguments of a Python; return others unchanged."""
    if not isinstance(argument, list) or "-c" not in argument[:-1]:
        return argument
    at = argument.index("-c") + 1
    return [*argument[:at], _HOOK_FIRST.format(path=sys.path) + argument[at], *argument[at + 1 :]]


def _with_pipe(original: Hook, *, for_spawn: bool) -> Hook:
    @wraps(original)
    def hook(self: Any, job: Job, queue: Queue) -> Any:
        run = run_of(job)
        if run is None and for_spawn and is_dead(job):
            with _hooked_interpreter(), known_to_horse(job):
                return original(self, job, queue)
        if run is None:
            return original(self, job, queue)
        forget_orders(self)
        run.open_pipe(for_spawn=for_spawn)
        try:
            with _hooked_interpreter() if for_spawn else nullcontext():
                return original(self, job, queue)  # a forked horse never returns from here
        finally:
            run.close_writer()

    return hook


def main_work_horse(original: Hook) -> Hook:
    """Wrap Worker.main_work_horse: find the run of the horse, and prepare for the parent's death."""

    @wraps(original)
    def hook(self: Any, job: Job, queue: Queue) -> Any:
        with contain_errors("find the run of a horse", job_id=job.id):
            learn_from_parent(job)
            run = run_of(job) or _inherit(self, job, queue)
            if run is not None:
                set_run(job, run)
                run.take_over_beats()
        return original(self, job, queue)

    return hook


def perform_job(original: Hook) -> Hook:
    """Wrap Worker.perform_job: drain the spool, because a horse exits with os._exit.

    A worker class that overrides execute_job and does not fork gets its claim here.
    """

    @wraps(original)
    def hook(self: Any, job: Job, queue: Queue, *args: Any, **kwargs: Any) -> Any:
        def call() -> Any:
            return original(self, job, queue, *args, **kwargs)

        try:
            # After its removal, this hook may still be called by another tool's wrapper.
            ours = _SESSION in self.__dict__ and not self.is_horse
            return _claimed(self, job, queue, call) if ours else call()
        except RedisError as error:
            run = run_of(job)
            if self.is_horse and run is not None and (reason := why_unbegun(run, error)):
                run.give_back(reason)
            raise
        finally:
            if self.is_horse:
                for tracker in trackers():
                    tracker.drain_spool()

    return hook


def maintain_heartbeats(original: Hook) -> Hook:
    """Wrap Worker.maintain_heartbeats: write a run that Redis lost again, so that it can be stopped."""

    @wraps(original)
    def hook(self: Any, job: Job, *args: Any, **kwargs: Any) -> Any:
        with contain_errors("write a lost run again", event="redis_call_failed", job_id=job.id):
            _show_again(self, job, args[0] if args else kwargs.get("execution", self.execution))
        return original(self, job, *args, **kwargs)

    return hook


def _show_again(worker: Any, job: Job, execution: Any) -> None:
    """Write RQ's registries of a run again; the leader has restored the job's hash."""
    run = run_of(job)
    client = cast(Any, worker.connection)
    if run is None or execution is None or client.exists(execution.key):
        return
    field, status = client.hmget(job.key, FIELD, "status")
    if field != run.claim.token.hex.encode() or status != b"started":
        return
    ttl = int(worker.get_heartbeat_ttl(job))
    with client.pipeline() as pipe:
        execution.save(ttl=ttl, pipeline=pipe)
        executions = ExecutionRegistry(job_id=job.id, connection=pipe)
        executions.add(execution=execution, ttl=ttl, pipeline=pipe)
        job.started_job_registry.add_execution(execution, pipeline=pipe, ttl=ttl, xx=False)
        index = getattr(execution, "worker_executions_key", None)
        if index is not None:
            pipe.sadd(index, execution.composite_key)
            pipe.expire(index, ttl + 60)
        fields = {"worker_name": worker.name, "started_at": utcformat(job.started_at or now())}
        pipe.hset(job.key, mapping=fields)
        if hasattr(worker, "set_current_job_id"):  # RQ before 3.0
            worker.set_current_job_id(job.id, pipeline=pipe)
        pipe.execute()


def perform(original: Hook) -> Hook:
    """Wrap Job.perform: note that the function returned. Do no I/O: RQ's alarm may be active."""

    @wraps(original)
    def hook(self: Job) -> Any:
        raise_if_dead(self)
        run = run_of(self)
        if run is None:
            return original(self)
        run.began = True
        tracker = tracker_for_job(self)
        if tracker is None:
            result = original(self)
        else:
            with running_job(
                tracker, run.claim, self.id, attempt=attempt_of(self), limit=self.timeout
            ):
                result = original(self)
        run.returned = True
        failpoint.hit("after_return")
        return result

    return hook


def handle_execution_ended(original: Hook) -> Hook:
    """Wrap Worker.handle_execution_ended: RQ's first write to Redis after the function."""

    @wraps(original)
    def hook(self: Any, job: Job, *args: Any, **kwargs: Any) -> Any:
        _note_if_raised(job)
        try:
            return original(self, job, *args, **kwargs)
        except RedisError:
            _completed_if_returned(job)
            raise

    return hook


def handle_job_success(original: Hook) -> Hook:
    """Wrap Worker.handle_job_success: report "completed", also if Redis fails during RQ's write."""

    @wraps(original)
    def hook(self: Any, job: Job, *args: Any, **kwargs: Any) -> Any:
        run = run_of(job)
        if run is None:
            return original(self, job, *args, **kwargs)
        try:
            with moving(job, Outcome.COMPLETED):  # a Repeat supersedes a completed run
                result = original(self, job, *args, **kwargs)
        except RedisError:
            run.end(Outcome.COMPLETED)
            raise
        run.end(Outcome.COMPLETED)
        return result

    return hook


def handle_job_retry(original: Hook) -> Hook:
    """Wrap Worker.handle_job_retry: the function returned a Retry; RQ pushes again or gives up."""

    @wraps(original)
    def hook(self: Any, job: Job, *args: Any, **kwargs: Any) -> Any:
        result = original(self, job, *args, **kwargs)
        run = run_of(job)
        if run is not None and is_given_up(job):
            run.end(Outcome.FAILED, "the function returned Retry once too often")
        return result

    return hook


def handle_job_failure(original: Hook) -> Hook:
    """Wrap Worker.handle_job_failure: RQ pushes the job again, or the job failed or was stopped."""

    @wraps(original)
    def hook(self: Any, job: Job, *args: Any, **kwargs: Any) -> Any:
        run = run_of(job)
        if is_dead(job):
            return original(self, job, *args, **kwargs)
        if run is not None:
            run.drain()  # a killed horse may have reported its end before
            _note_if_raised(job)
        if is_left_to_the_leader(self, job):
            return None
        if run is None:
            return original(self, job, *args, **kwargs)
        if run.returned and redis_failed(sys.exc_info()[1]):
            run.end(Outcome.COMPLETED)
        if run.outcome is Outcome.COMPLETED:
            # Otherwise RQ retries the job, which is refused, or shows it as failed. In both cases
            # its children would wait.
            finish(self, job, _queue_of(args, kwargs), run.claim.token)
            return None
        result = original(self, job, *args, **kwargs)
        outcome = _given_up(job)
        if outcome is not None:
            run.end(outcome, kwargs.get("exc_string") or _named(args))
        return result

    return hook


def _note_if_raised(job: Job) -> None:
    """Note the error that RQ handles, unless Redis failed outside of the function."""
    run, error = run_of(job), sys.exc_info()[1]
    if run is None or error is None or not run.began:
        return
    if not (run.returned and redis_failed(error)):
        run.note_raised()


def _queue_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Queue:
    """Return the queue, which RQ passes first or as a keyword."""
    queue: Queue = args[0] if args else kwargs["queue"]
    return queue


def _given_up(job: Job) -> Outcome | None:
    if job._status == JobStatus.STOPPED:
        return Outcome.CANCELLED
    return Outcome.FAILED if is_given_up(job) else None


def _named(args: tuple[Any, ...]) -> str | None:
    """Return the exc_string among (queue, started_job_registry, exc_string, ...)."""
    return args[2] if len(args) > 2 and isinstance(args[2], str) else None


def _completed_if_returned(job: Job) -> None:
    run = run_of(job)
    if run is not None and run.returned:
        run.end(Outcome.COMPLETED)


def _open_session(worker: Any) -> Session | None:
    """Open the worker's session; return None if its Redis is not guarded."""
    tracker = tracker_for(worker)
    if tracker is None:
        return None
    worker.__dict__[_TRACKER] = tracker
    label_client(worker.connection, tracker.source, name=worker.name)
    session: Session = tracker.open_session(
        name=worker.name, queues=worker.queue_names(), apart=isinstance(worker, SimpleWorker)
    )
    worker.__dict__[_SESSION] = session
    return session


def _log_whether_guarded(worker: Any, session: Session | None) -> None:
    """Log with RQ's own logger: only that logger writes to the output of the worker's command."""
    tracker: Tracker | None = worker.__dict__.get(_TRACKER)
    queues = [name for name in worker.queue_names() if tracker and tracker.guards(name)]
    if session is None or tracker is None or not queues:
        worker.log.warning(
            "Worker %s: not guarded by jobguard: its jobs are not recorded", worker.name
        )
    else:
        source, names = tracker.source, ", ".join(queues)
        worker.log.info("Worker %s: guarded by jobguard: %s of %s", worker.name, names, source)
        with contain_errors("compare namespaces", worker=worker.name):
            if others := guarded_elsewhere(worker, tracker):
                worker.log.warning(
                    "Worker %s: not guarded here, because another namespace guards them: %s. Start one "
                    "worker for each namespace",
                    worker.name,
                    ", ".join(others),
                )


def _inherit(worker: Any, job: Job, queue: Queue) -> Run | None:
    """Return the run that the parent of this spawned horse started."""
    tracker = tracker_for(worker)  # created in this new process, also for pushes of the job

    def session_of(parent: UUID, pid: int) -> Session | None:
        if tracker is None:
            return None
        queues = worker.queue_names()
        return tracker.inherit_session(parent, pid, name=worker.name, queues=queues)

    return Run.inherited(session_of, job.id, queue=queue.name, task=task_of(job))


def _session_for(worker: Any, queue: Queue) -> Session | None:
    """Return the session with which this worker claims jobs of this queue."""
    with contain_errors("open a session", worker=worker.name):
        session: Session | None = worker.__dict__.get(_SESSION) or _open_session(worker)
        tracker: Tracker | None = worker.__dict__.get(_TRACKER)
        return session if tracker is not None and tracker.guards(queue.name) else None
    return None


def _start(worker: Any, session: Session, job: Job, queue: Queue) -> Run | Refused | None:
    with contain_errors("claim a job", job_id=job.id):
        _mark_worker(worker, session)
        token = token_of(job) or _mark(worker, job)
        answer = session.start(token, lambda: _describe(job, queue, token))
        if isinstance(answer, Refused):
            return answer
        return Run(session, answer, job_id=job.id, queue=queue.name, task=task_of(job))
    return None


def _mark(worker: Any, job: Job) -> UUID:
    """Set a token on a job that an unguarded program pushed."""
    token = new_token()
    set_token(job, token)
    mark(worker.connection, job, token.hex)
    return token


def _describe(job: Job, queue: Queue, token: UUID) -> Delivery:
    """Return the record of an unrecorded delivery, from its state in Redis."""
    found = draft(job, Mode.QUEUED)
    found.token, found.parent, found.fresh = token, None, False
    with drafting(job, found):
        job.to_dict()
    return deliver(job, found, queue=queue.name)


def _conclude(run: Run, job: Job) -> None:
    """Report the end after RQ is done with the job: if there is no report, read the status in Redis."""
    run.drain()
    if run.unbegun:
        run.give_back(run.unbegun)
    if run.reported:
        return
    status = None
    with contain_errors("read the end of a job", event="redis_call_failed", job_id=job.id):
        raw, field = cast(Any, job.connection).hmget(job.key, "status", FIELD)
        if field and field.decode().rstrip(SPENT) == run.claim.token.hex:
            status = raw
    if status == b"finished":
        run.end(Outcome.COMPLETED)
    elif status == b"failed":
        run.end(Outcome.FAILED)
    elif status == b"stopped":
        run.end(Outcome.CANCELLED)
    elif status == b"started" and run.horse_died:
        # The horse exited with code 0, and RQ assumes that the end was written.
        log_event("run_exited", job_id=job.id)
        run.abandon()
    else:
        run.drop_claim()
