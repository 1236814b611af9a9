"""The state of a delivery on a Job object, and the conversion of a push of RQ into a ``Delivery``.

RQ writes a job with ``Job.to_dict``. While a hook has set a ``Draft`` on the job, the wrapped method
adds the token to the mapping and keeps the mapping. So the envelope contains exactly the bytes that
go to Redis, and they are serialized once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

import redis
from rq.job import Job, JobStatus

from jobguard.adapters.rq.envelope import Mode, Routing, encode
from jobguard.adapters.rq.layout import ATTEMPT_FIELD, FIELD, SPENT, TASK_FIELD
from jobguard.job_keys import rule_of
from jobguard.model import Delivery, Outcome, Parent, new_token
from jobguard.redis_refusal import takes_no_writes
from jobguard.tracing import current_trace

if TYPE_CHECKING:
    from jobguard.adapters.rq.run import Run

BROKER_DOWN = (redis.ConnectionError, redis.TimeoutError)


def redis_failed(error: BaseException | None) -> bool:
    """Return True if Redis is away, or takes no writes now: it is full, a replica, or loads its data."""
    return isinstance(error, BROKER_DOWN) or (error is not None and takes_no_writes(error))


def why_unbegun(run: Run, error: BaseException | None) -> str:
    """Return the error of Redis that came before the call of the function; "": it was another, or none."""
    if run.began or error is None or not redis_failed(error):
        return ""
    return str(error) or type(error).__name__


# The attributes of jobguard on a Job object: in its __dict__, which RQ neither saves nor compares.
_TOKEN = "_jobguard_token"
_ATTEMPT = "_jobguard_attempt"
_TASK = "_jobguard_task"
_DRAFT = "_jobguard_draft"
_FRESH = "_jobguard_fresh"
_MOVE = "_jobguard_move"
_RUN = "_jobguard_run"
_GIVEN_UP = "_jobguard_given_up"

# Jobs with these statuses wait, and RQ moves them: by its scheduler, or when a parent has ended.
_WAITING = frozenset(("scheduled", "deferred", "ready_to_enqueue", "rate_limited", "queued"))
ENDED = frozenset(("finished", "failed", "stopped", "canceled"))
_aborted: dict[UUID, UUID] = {}
_ABORTED_KEPT = 1_000
"""RQ tries again at once. If it does not, the leader pushes the job."""
_scheduling: ContextVar[bool] = ContextVar("jobguard_scheduling", default=False)
_WRITTEN_BY_RQ = frozenset(
    {
        *("status", "origin", "created_at", "enqueued_at", "started_at", "ended_at"),
        *("last_heartbeat", "worker_name", "result", "exc_info", "dependency_ids", "dependency_id"),
        *(FIELD, ATTEMPT_FIELD, TASK_FIELD),
    }
)
_CALL = re.compile(r"[\w.]+(?=\()")
# RQ may have deleted the hash in the same step (failure_ttl=0): one field would create it again.
_MARK = """
if redis.call('HSTRLEN', KEYS[1], 'data') > 0 then redis.call('HSET', KEYS[1], 'jg', ARGV[1]) end
"""


@dataclass(slots=True)
class Draft:
    """Describe a push that RQ is about to write."""

    mode: Mode
    token: UUID
    attempt: int
    parent: Parent | None
    fresh: bool
    run: Run | None = None
    """The run that this push supersedes, if a worker makes the push."""
    previous: UUID | None = None
    """The token that the job had before."""
    at_front: bool = False
    score: str = ""
    due_at: float | None = None
    expires: bool = True
    """Whether the job's ttl starts with this push."""
    mapping: dict[str, Any] | None = None
    on_written: Callable[[], None] | None = None
    """The function to call when the mapping is final and nothing has been sent yet."""


def draft(job: Job, mode: Mode, *, fresh: bool = False, **routing: Any) -> Draft:
    """Start a push of this job. This finds its parent now, because RQ changes the job later."""
    state = job.__dict__
    parent, run = _parent(job)
    attempt: int = state.get(_ATTEMPT, 1)
    if parent is None or parent.outcome is Outcome.COMPLETED:
        attempt = 1
    elif _MOVE in state:  # this is a retry; a move from the delay queue keeps the attempt
        attempt += 1
    return Draft(
        mode=mode,
        token=new_token(after=parent.token if parent is not None else state.get(_TOKEN)),
        attempt=attempt,
        parent=parent,
        fresh=fresh or state.pop(_FRESH, False) or job._id is None,
        run=run,
        previous=state.get(_TOKEN),
        **routing,
    )


def _parent(job: Job) -> tuple[Parent | None, Run | None]:
    state = job.__dict__
    move: Outcome | None = state.get(_MOVE)
    run: Run | None = state.get(_RUN)
    if move is not None and run is not None:
        return run.parent(move), run
    token: UUID | None = state.get(_TOKEN)
    if token is not None and (move is not None or job._status in _WAITING or _scheduling.get()):
        while token in _aborted:
            token = _aborted[token]
        return Parent(token), None
    return None, None


def aborted(predecessor: UUID, token: UUID) -> None:
    """Note that a push lost a race, but its record stays: RQ's next try supersedes that record.

    RQ reads the job again. It then finds the predecessor in Redis, and that delivery has ended.
    """
    _aborted[predecessor] = token
    if len(_aborted) > _ABORTED_KEPT:
        del _aborted[next(iter(_aborted))]


@contextmanager
def drafting(job: Job, push: Draft) -> Iterator[None]:
    """Add the token of the draft to all that RQ writes of this job inside the block."""
    job.__dict__[_DRAFT] = push
    try:
        yield
    finally:
        job.__dict__.pop(_DRAFT, None)


def ttl_runs(job: Job) -> None:
    """Note that RQ sets the ttl of the job; RQ before 3.0 does not set it for a scheduled job."""
    push: Draft | None = job.__dict__.get(_DRAFT)
    if push is not None:
        push.expires = True


def is_drafted(job: Job) -> bool:
    """Return True if an outer hook already handles the write of RQ."""
    return _DRAFT in job.__dict__


@contextmanager
def scheduling() -> Iterator[None]:
    """Treat every push inside the block as a move out of the delay queue, with any status of the job.

    After a rollback, the delay queue of Redis has ids of jobs that have ended since.
    """
    before = _scheduling.set(True)
    try:
        yield
    finally:
        _scheduling.reset(before)


@contextmanager
def moving(job: Job, outcome: Outcome) -> Iterator[None]:
    """Let pushes of this job inside the block supersede its current delivery."""
    before = job.__dict__.get(_MOVE)
    job.__dict__[_MOVE] = outcome
    try:
        yield
    finally:
        if before is None:
            job.__dict__.pop(_MOVE, None)
        else:
            job.__dict__[_MOVE] = before


def is_moving(job: Job) -> bool:
    """Return True if RQ itself is about to push this job again."""
    return _MOVE in job.__dict__


def is_repeating(job: Job) -> bool:
    """Return True if RQ is writing the success of this job."""
    return job.__dict__.get(_MOVE) is Outcome.COMPLETED


def clear_delivery(job: Job) -> None:
    """Remove the state of the old delivery: the application enqueues the job anew."""
    state = job.__dict__
    for name in (_TOKEN, _ATTEMPT, _TASK):
        state.pop(name, None)
    if job._id is None:
        state[_FRESH] = True


def written(job: Job, mapping: dict[str, Any]) -> None:
    """Complete the mapping that ``Job.to_dict`` made and that RQ will send."""
    push: Draft | None = job.__dict__.get(_DRAFT)
    if push is None:
        run: Run | None = job.__dict__.get(_RUN)
        if run is not None and job._status == JobStatus.FINISHED:
            mapping[FIELD] = run.claim.token.hex + SPENT
        return
    mapping[FIELD] = push.token.hex
    task = task_of(job)
    # If the id is not new, its old hash may still exist, and HSET keeps the old fields.
    if push.attempt != 1 or not push.fresh:
        mapping[ATTEMPT_FIELD] = push.attempt
    if not push.fresh or task != _called(job):
        mapping[TASK_FIELD] = task
    push.mapping = mapping
    if push.on_written is not None:
        push.on_written()


def remember(job: Job, raw: dict[Any, Any]) -> None:
    """Keep jobguard's fields of the hash that ``Job.restore`` read."""
    state = job.__dict__
    for name in (_TOKEN, _ATTEMPT, _TASK):
        state.pop(name, None)
    token = token_in(raw.get(FIELD.encode()), raw.get(b"status"))
    if token is not None:
        state[_TOKEN] = token
    attempt = raw.get(ATTEMPT_FIELD.encode())
    if attempt and attempt.isdigit():
        state[_ATTEMPT] = int(attempt)
    task = raw.get(TASK_FIELD.encode())
    if task:
        state[_TASK] = task.decode(errors="replace")


def token_in(field: bytes | None, status: bytes | None) -> UUID | None:
    """Return the token in a job's hash.

    A token that is marked as spent is valid while the status in the hash is an end: this happens if
    an id is in a list twice. With any other status, an unguarded program has pushed the job again,
    and it is another delivery.
    """
    text = (field or b"").decode(errors="replace")
    if text.endswith(SPENT) and (status or b"").decode(errors="replace") in ENDED:
        text = text.removesuffix(SPENT)
    try:
        return UUID(hex=text) if len(text) == 32 else None
    except ValueError:
        return None


def attempt_of(job: Job) -> int:
    """Return the number of this attempt of the job; a retry counts, a move does not."""
    attempt: int = job.__dict__.get(_ATTEMPT, 1)
    return attempt


def token_of(job: Job) -> UUID | None:
    """Return the token of this object's delivery."""
    token: UUID | None = job.__dict__.get(_TOKEN)
    return token


def set_token(job: Job, token: UUID | None) -> None:
    """Set the token of this object's delivery."""
    if token is None:
        job.__dict__.pop(_TOKEN, None)
    else:
        job.__dict__[_TOKEN] = token


def give_up(job: Job) -> None:
    """Note that RQ has failed the job; with failure_ttl=0, RQ before 3.0 then clears its status."""
    job.__dict__[_GIVEN_UP] = True


def is_given_up(job: Job) -> bool:
    """Return True if RQ has given up this job, in this process and run."""
    return job._status == JobStatus.FAILED or _GIVEN_UP in job.__dict__


def mark(client: Any, job: Job, token: str) -> None:
    """Write a token into the job's hash, if the job exists; on a pipeline, as one of its commands."""
    client.eval(_MARK, 1, job.key, token)


def run_of(job: Job) -> Run | None:
    """Return the guarded run of this object."""
    run: Run | None = job.__dict__.get(_RUN)
    return run


def set_run(job: Job, run: Run | None) -> None:
    """Set the guarded run of this object, or remove it."""
    if run is None:
        job.__dict__.pop(_RUN, None)
    else:
        job.__dict__[_RUN] = run


def deliver(job: Job, push: Draft, *, queue: str) -> Delivery:
    """Return the record of a push, once RQ has written it into the draft."""
    assert push.mapping is not None
    fields = _encoded(job, push.mapping)
    routing = Routing(
        mode=push.mode,
        at_front=push.at_front,
        score=push.score,
        parents=tuple(job._dependency_ids) if push.mode is Mode.DEFERRED else (),
        allow_failure=bool(job.allow_dependency_failures),
        group=job.group_id or "",
        rate_key=getattr(job, "rate_limit_key", None) or "",
        rate_concurrency=getattr(job, "rate_limit_concurrency", None) or 0,
    )
    return Delivery(
        token=push.token,
        job_id=job.id,
        queue=queue,
        task=task_of(job),
        envelope=encode(routing, fields),
        attempt=push.attempt,
        due_at=push.due_at,
        expires_at=time.time() + job.ttl if job.ttl and push.expires else None,
        trace=current_trace(),
        parent=push.parent,
        fresh=push.fresh,
        rule=rule_of(job.meta),
    )


def saved(job: Job, *, include_meta: bool, only_meta: bool) -> dict[str, bytes]:
    """Return the fields that a program saved, without the fields in which RQ records its progress."""
    mapping = job.to_dict(include_meta=include_meta, include_result=False)
    return {
        name: value
        for name, value in _encoded(job, mapping).items()
        if name not in _WRITTEN_BY_RQ and (name == "meta" or not only_meta)
    }


def _encoded(job: Job, mapping: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the fields of a hash as redis-py sends them."""
    encoder = cast(Any, job.connection).get_encoder()
    encoding, errors = encoder.encoding, encoder.encoding_errors
    return {
        name: value
        if type(value) is bytes
        else value.encode(encoding, errors)
        if type(value) is str
        else encoder.encode(value)
        for name, value in mapping.items()
        if value is not None
    }


def task_of(job: Job) -> str:
    """Return the name of the job's function, without unpickling its call."""
    name: object = job._func_name
    if isinstance(name, str):
        return name
    task: str | None = job.__dict__.get(_TASK)
    return task if task is not None else _called(job)


def _called(job: Job) -> str:
    """Return the function name at the start of RQ's usual description, which is a call."""
    called = _CALL.match(job.description or "")
    return called.group() if called else ""
