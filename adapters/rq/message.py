"""What a Job object knows of its delivery, and how a push of RQ becomes a ``Delivery``.

RQ writes a job with ``Job.to_dict``. While a hook has a ``Draft`` on the job, the wrapped method
puts our token into the mapping and keeps the mapping, so that the envelope holds the very bytes
that go to Redis, made once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

import redis
from rq.job import Job, JobStatus

from jobguard.adapters.rq.envelope import Mode, Routing, encode
from jobguard.adapters.rq.layout import ATTEMPT_FIELD, FIELD, SPENT, TASK_FIELD
from jobguard.model import Delivery, Outcome, Parent, new_token

if TYPE_CHECKING:
    from jobguard.adapters.rq.run import Run

BROKER_DOWN = (redis.ConnectionError, redis.TimeoutError)

# Attributes of ours on a Job object: in its __dict__, which RQ neither saves nor compares.
_TOKEN = "_jobguard_token"
_ATTEMPT = "_jobguard_attempt"
_TASK = "_jobguard_task"
_DRAFT = "_jobguard_draft"
_FRESH = "_jobguard_fresh"
_MOVE = "_jobguard_move"
_RUN = "_jobguard_run"
_GIVEN_UP = "_jobguard_given_up"

# What waits, and is then moved by the library itself: by its scheduler, or when a parent has ended.
_WAITING = frozenset(("scheduled", "deferred", "ready_to_enqueue", "rate_limited", "queued"))
ENDED = frozenset(("finished", "failed", "stopped", "canceled"))
_aborted: dict[UUID, UUID] = {}
_ABORTED_KEPT = 1_000
"""RQ tries again at once; what it never does is the leader's to push."""
_scheduling: ContextVar[bool] = ContextVar("jobguard_scheduling", default=False)
_OF_ITS_WAY = frozenset(
    {
        *("status", "origin", "created_at", "enqueued_at", "started_at", "ended_at"),
        *("last_heartbeat", "worker_name", "result", "exc_info", "dependency_ids", "dependency_id"),
        *(FIELD, ATTEMPT_FIELD, TASK_FIELD),
    }
)
_CALL = re.compile(r"[\w.]+(?=\()")
# RQ may have deleted the hash in the same breath (failure_ttl=0): a field alone would bring it back.
_MARK = """
if redis.call('HSTRLEN', KEYS[1], 'data') > 0 then redis.call('HSET', KEYS[1], 'jg', ARGV[1]) end
"""


@dataclass(slots=True)
class Draft:
    """A push that RQ is about to write."""

    mode: Mode
    token: UUID
    attempt: int
    parent: Parent | None
    fresh: bool
    run: Run | None = None
    """The run that this push takes the place of, if a worker speaks."""
    previous: UUID | None = None
    """The token the job had before."""
    at_front: bool = False
    score: str = ""
    due_at: float | None = None
    expires: bool = True
    """Whether RQ lets the job's ttl run from this push on."""
    mapping: dict[str, Any] | None = None
    on_written: Callable[[], None] | None = None
    """Called when the mapping is final and nothing is sent yet."""


def draft(job: Job, mode: Mode, *, fresh: bool = False, **routing: Any) -> Draft:
    """Begin a push of this job: who it comes from is decided here, before RQ changes the job."""
    state = job.__dict__
    parent, run = _parent(job)
    attempt: int = state.get(_ATTEMPT, 1)
    if parent is None or parent.outcome is Outcome.COMPLETED:
        attempt = 1
    elif _MOVE in state:  # a retry, where a delay queue's move is the same attempt still
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
    """A push lost a race, but its record stands: RQ's next try takes the place of that one.

    RQ reads the job again, and finds the predecessor in Redis, which has ended.
    """
    _aborted[predecessor] = token
    if len(_aborted) > _ABORTED_KEPT:
        del _aborted[next(iter(_aborted))]


@contextmanager
def drafting(job: Job, push: Draft) -> Iterator[None]:
    """Have what RQ writes of this job inside the block carry the draft's token."""
    job.__dict__[_DRAFT] = push
    try:
        yield
    finally:
        job.__dict__.pop(_DRAFT, None)


def ttl_runs(job: Job) -> None:
    """RQ sets the ttl of a job that it writes; before 3.0 it does not for one that is scheduled."""
    push: Draft | None = job.__dict__.get(_DRAFT)
    if push is not None:
        push.expires = True


def is_drafted(job: Job) -> bool:
    """Whether a hook further out already takes care of what RQ writes."""
    return _DRAFT in job.__dict__


@contextmanager
def scheduling() -> Iterator[None]:
    """Have what is pushed inside the block be moves out of the delay queue, whatever a job's status.

    A Redis that went back in time has ids in its delay queue whose jobs have ended since.
    """
    before = _scheduling.set(True)
    try:
        yield
    finally:
        _scheduling.reset(before)


@contextmanager
def moving(job: Job, outcome: Outcome) -> Iterator[None]:
    """Have pushes of this job inside the block take the place of its present delivery."""
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
    """Whether RQ is about to push this job again by itself."""
    return _MOVE in job.__dict__


def is_repeating(job: Job) -> bool:
    """Whether RQ is writing the success of this job."""
    return job.__dict__.get(_MOVE) is Outcome.COMPLETED


def begin_new_life(job: Job) -> None:
    """Forget what this job was: a person or program enqueues it, and nothing carries over."""
    state = job.__dict__
    for name in (_TOKEN, _ATTEMPT, _TASK):
        state.pop(name, None)
    if job._id is None:
        state[_FRESH] = True


def written(job: Job, mapping: dict[str, Any]) -> None:
    """``Job.to_dict`` made this mapping, and RQ is going to send it."""
    push: Draft | None = job.__dict__.get(_DRAFT)
    if push is None:
        run: Run | None = job.__dict__.get(_RUN)
        if run is not None and job._status == JobStatus.FINISHED:
            mapping[FIELD] = run.claim.token.hex + SPENT
        return
    mapping[FIELD] = push.token.hex
    task = task_of(job)
    # A hash may still stand under an id that is not new, and HSET would leave its old fields in it.
    if push.attempt != 1 or not push.fresh:
        mapping[ATTEMPT_FIELD] = push.attempt
    if not push.fresh or task != _called(job):
        mapping[TASK_FIELD] = task
    push.mapping = mapping
    if push.on_written is not None:
        push.on_written()


def remember(job: Job, raw: dict[Any, Any]) -> None:
    """``Job.restore`` read this hash: keep what is ours in it."""
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
    """Return the token that a job's hash carries.

    One that is marked as spent counts while the hash says how it ended: an id that stands in a list
    twice. With any other status the job was put back by unguarded hands, and is another delivery.
    """
    text = (field or b"").decode(errors="replace")
    if text.endswith(SPENT) and (status or b"").decode(errors="replace") in ENDED:
        text = text.removesuffix(SPENT)
    try:
        return UUID(hex=text) if len(text) == 32 else None
    except ValueError:
        return None


def attempt_of(job: Job) -> int:
    """Return which attempt of the job this delivery is; a retry counts, a move does not."""
    attempt: int = job.__dict__.get(_ATTEMPT, 1)
    return attempt


def token_of(job: Job) -> UUID | None:
    """Return the token of the delivery that this object stands for."""
    token: UUID | None = job.__dict__.get(_TOKEN)
    return token


def set_token(job: Job, token: UUID | None) -> None:
    """Say which delivery this object stands for."""
    if token is None:
        job.__dict__.pop(_TOKEN, None)
    else:
        job.__dict__[_TOKEN] = token


def give_up(job: Job) -> None:
    """RQ puts the job among the failed: with failure_ttl=0, RQ before 3.0 forgets its status then."""
    job.__dict__[_GIVEN_UP] = True


def is_given_up(job: Job) -> bool:
    """Whether RQ has given this job up, in this process and run."""
    return job._status == JobStatus.FAILED or _GIVEN_UP in job.__dict__


def mark(client: Any, job: Job, token: str) -> None:
    """Write a token into the job's hash, if there is a job; on a pipeline, with what it sends."""
    client.eval(_MARK, 1, job.key, token)


def run_of(job: Job) -> Run | None:
    """Return the guarded run that this object is in."""
    run: Run | None = job.__dict__.get(_RUN)
    return run


def set_run(job: Job, run: Run | None) -> None:
    """Put the job into a guarded run, or take it out."""
    if run is None:
        job.__dict__.pop(_RUN, None)
    else:
        job.__dict__[_RUN] = run


def deliver(job: Job, push: Draft, *, queue: str) -> Delivery:
    """Return the record of a push, once RQ has written it into the draft."""
    assert push.mapping is not None
    encoder = cast(Any, job.connection).get_encoder().encode
    fields: dict[str, bytes] = {
        name: value if type(value) is bytes else encoder(value)
        for name, value in push.mapping.items()
        if value is not None
    }
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
        parent=push.parent,
        fresh=push.fresh,
    )


def saved(job: Job, *, include_meta: bool, only_meta: bool) -> dict[str, bytes]:
    """Return what a program saved of a job, but for what RQ itself writes of its way."""
    encoder = cast(Any, job.connection).get_encoder().encode
    mapping = job.to_dict(include_meta=include_meta, include_result=False)
    return {
        name: value if type(value) is bytes else encoder(value)
        for name, value in mapping.items()
        if value is not None and name not in _OF_ITS_WAY and (name == "meta" or not only_meta)
    }


def task_of(job: Job) -> str:
    """Return the name of the job's function, without ever loading its pickled call."""
    name: object = job._func_name
    if isinstance(name, str):
        return name
    task: str | None = job.__dict__.get(_TASK)
    return task if task is not None else _called(job)


def _called(job: Job) -> str:
    """Return the function that RQ's usual description, a call, begins with."""
    called = _CALL.match(job.description or "")
    return called.group() if called else ""
