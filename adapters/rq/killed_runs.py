"""Killed is not failed: the hooks on every way by which RQ gives up a run that nobody finished.

RQ fails a job when its work-horse was killed (by the kernel, for want of memory), when its worker
has not been heard of (``AbandonedJobError``), or when it stands in the intermediate list of a worker
that is gone. All three are deaths of a worker: the job is still owed, and the leader puts it back
within the crash budget. RQ's failure callbacks, its retries and its failed registry are for jobs
that failed, and stay out of it. Where Redis failed RQ before the function was even called, its verdict
does not stand either; RQ 3.0 has called its failure callback by then.

RQ's verdict stands where nobody else would judge: the job is not owed, its queue is not trusted, nobody
leads and watches its Redis, or ``recover_killed`` is off. A horse that was killed by order (a job far
beyond its timeout, a stopped job, the command kill-horse) has failed, as RQ says.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

from rq.job import Job
from rq.queue import Queue

from jobguard.adapters.rq.layout import FIELD
from jobguard.adapters.rq.lookup import tracker_for_job, tracker_for_registry
from jobguard.adapters.rq.message import BROKER_DOWN, ENDED, run_of, token_in, token_of
from jobguard.errors import is_host_interrupt

if TYPE_CHECKING:
    from uuid import UUID

    from jobguard.adapter import Tracker
    from jobguard.adapters.rq.run import Run

log = logging.getLogger("jobguard")
Hook = Callable[..., Any]

_BY_ORDER = "_jobguard_by_order"
_SWEEPING = "_jobguard_sweeping"
_POSTPONED = 60
"""Seconds for which RQ does not look at an abandoned run again: by then the leader has judged it."""


def kill_horse(original: Hook) -> Hook:
    """Worker.kill_horse: what RQ kills itself was not killed by accident."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        sig = args[0] if args else kwargs.get("sig", signal.SIGKILL)
        if sig == signal.SIGKILL:  # Heroku's worker sends another, which the horse may survive
            self.__dict__[_BY_ORDER] = True
        return original(self, *args, **kwargs)

    return hook


def was_ordered(worker: Any) -> bool:
    """Whether this worker has killed its present horse."""
    return _BY_ORDER in worker.__dict__


def forget_orders(worker: Any) -> None:
    """A new horse begins, which nobody has asked to kill."""
    worker.__dict__.pop(_BY_ORDER, None)


def clean_intermediate(original: Hook) -> Hook:
    """IntermediateQueue.cleanup: RQ's maintenance fails what it finds stuck there."""

    @wraps(original)
    def hook(self: Any, worker: Any, queue: Queue) -> Any:
        worker.__dict__[_SWEEPING] = True
        try:
            return original(self, worker, queue)
        finally:
            worker.__dict__.pop(_SWEEPING, None)

    return hook


def is_left_to_the_leader(worker: Any, job: Job) -> bool:
    """Whether a failure that RQ is about to write is a worker's death instead, and is dealt with."""
    run = run_of(job)
    if run is None and _SWEEPING not in worker.__dict__:
        return False
    if run is not None:
        # Whatever class of worker has watched it, and however it says so.
        run.killed = run.horse_died and not was_ordered(worker)
    if run is not None and (run.reported or not (run.killed or _never_began(run))):
        return False
    token = token_of(job) if run is None else run.claim.token
    tracker = tracker_for_job(job)
    began = run is None or run.killed
    if tracker is None or token is None:
        return False
    if token not in (tracker.recovers([token], began=began) or ()):
        return False
    if run is None or run.killed:
        log.warning("job %s was killed, not failed: it goes back within its crash budget", job.id)
    else:
        log.warning("job %s never began, for Redis failed its worker: it goes back", job.id)
    if run is not None:
        run.abandon()
        _forget_run(worker)
    return True


def _forget_run(worker: Any) -> None:
    """Have RQ before 3.0 know that it runs nothing: "stop job" would kill by the pid of a dead horse."""
    clear = getattr(worker, "set_current_job_id", None)
    if clear is None:
        return
    try:
        clear(None)
        worker.execution = None
    except Exception as error:
        if is_host_interrupt(error):
            raise
        log.warning("jobguard could not clear the current job of worker %s: %s", worker.name, error)


def _never_began(run: Run) -> bool:
    """Whether Redis failed RQ between the claim and the first line of the function."""
    return not run.began and isinstance(sys.exc_info()[1], BROKER_DOWN)


def clean_started(original: Hook) -> Hook:
    """StartedJobRegistry.cleanup: RQ fails, or retries, the runs of workers it has not heard of."""

    @wraps(original)
    def hook(self: Any, timestamp: float | None = None, *args: Any, **kwargs: Any) -> Any:
        try:
            tracker = tracker_for_registry(self)
            if tracker is not None:
                # One moment for us and for RQ: what expires in between is for the next time.
                timestamp = int(time.time()) if timestamp is None else timestamp
                _postpone(tracker, self, timestamp)
        except Exception as error:
            if is_host_interrupt(error):
                raise
            log.exception("jobguard could not look at the abandoned runs of queue %s", self.name)
        return original(self, timestamp, *args, **kwargs)

    return hook


def _postpone(tracker: Tracker, registry: Any, until: float) -> None:
    """Have RQ pass by what the leader is going to judge; it sees the rest."""
    client = cast(Any, registry.connection)
    entries: list[bytes] = client.zrangebyscore(registry.key, 0, until)
    if not entries:
        return
    tokens = _tokens(registry, entries)
    ours = tracker.recovers(list(tokens.values())) or ()
    later = {
        entry: max(time.time(), until) + _POSTPONED
        for entry, token in tokens.items()
        if token in ours
    }
    if later:
        client.zadd(registry.key, later, xx=True)


def _tokens(registry: Any, entries: list[bytes]) -> dict[bytes, UUID]:
    """Return the tokens of the deliveries that these entries (``id:execution``) are runs of."""
    with registry.connection.pipeline(transaction=False) as pipe:
        for entry in entries:
            job_id = entry.decode().rsplit(":", 1)[0]
            pipe.hmget(registry.job_class.key_for(job_id), FIELD, "status")
        hashes = pipe.execute()
    found = {
        entry: token_in(field, status)
        for entry, (field, status) in zip(entries, hashes, strict=True)
        if (status or b"").decode(errors="replace") not in ENDED  # what RQ knows the end of
    }
    return {entry: token for entry, token in found.items() if token is not None}
