"""The hooks on every way in which RQ gives up an unfinished run: a killed job has not failed.

RQ fails a job in three cases: its work-horse was killed (for example by the kernel, for lack of
memory), its worker sent no heartbeat (``AbandonedJobError``), or the job is in the intermediate list
of a worker that is gone. All three are deaths of a worker: the job is still owed, and the leader
restores it within the crash budget. RQ's failure callbacks, its retries and its failed registry are
for jobs that failed, and are not used here. The same is true if Redis failed before RQ called the
function; but RQ 3.0 has called the failure callback by then.

RQ's decision stays valid where jobguard would not decide: the job is not owed, its queue is not
trusted, no reconciler leads and monitors its Redis, or ``recover_killed`` is off. If RQ itself killed
the horse (a job far beyond its timeout, a stopped job, the command kill-horse), the job has failed.
"""

from __future__ import annotations

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
from jobguard.adapters.rq.message import ENDED, run_of, token_in, token_of, why_unbegun
from jobguard.host_safety import contain_errors
from jobguard.log import log_event

if TYPE_CHECKING:
    from uuid import UUID

    from jobguard.adapter import Tracker

Hook = Callable[..., Any]

_BY_ORDER = "_jobguard_by_order"
_SWEEPING = "_jobguard_sweeping"
_POSTPONED = 60
"""Seconds for which RQ does not inspect an abandoned run again; the leader decides before."""


def kill_horse(original: Hook) -> Hook:
    """Wrap Worker.kill_horse: note that RQ itself killed this horse."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        sig = args[0] if args else kwargs.get("sig", signal.SIGKILL)
        if sig == signal.SIGKILL:  # Heroku's worker sends a signal that the horse may survive
            self.__dict__[_BY_ORDER] = True
        return original(self, *args, **kwargs)

    return hook


def was_ordered(worker: Any) -> bool:
    """Return True if this worker has killed its current horse."""
    return _BY_ORDER in worker.__dict__


def forget_orders(worker: Any) -> None:
    """Clear the note about a kill, because a new horse starts."""
    worker.__dict__.pop(_BY_ORDER, None)


def clean_intermediate(original: Hook) -> Hook:
    """Wrap IntermediateQueue.cleanup: RQ's maintenance fails the jobs that are stuck there."""

    @wraps(original)
    def hook(self: Any, worker: Any, queue: Queue) -> Any:
        worker.__dict__[_SWEEPING] = True
        try:
            return original(self, worker, queue)
        finally:
            worker.__dict__.pop(_SWEEPING, None)

    return hook


def is_left_to_the_leader(worker: Any, job: Job) -> bool:
    """Return True if RQ is about to write a failure that is a worker's death; give up the claim."""
    run = run_of(job)
    if run is None and _SWEEPING not in worker.__dict__:
        return False
    if run is not None:
        # Do not rely on the class of the worker, which may monitor its horse in its own way.
        run.killed = run.horse_died and not was_ordered(worker)
    unbegun = "" if run is None else why_unbegun(run, sys.exc_info()[1]) or run.unbegun
    if run is not None and (run.reported or not (run.killed or unbegun)):
        return False
    token = token_of(job) if run is None else run.claim.token
    tracker = tracker_for_job(job)
    began = run is None or run.killed
    if tracker is None or token is None:
        return False
    if token not in (tracker.recovers([token], began=began) or ()):
        return False
    if run is not None and unbegun:
        run.give_back(unbegun)
    else:
        log_event("run_killed", job_id=job.id)
        if run is not None:
            run.abandon()
    if run is not None:
        _forget_run(worker)
    return True


def _forget_run(worker: Any) -> None:
    """Clear the current job of RQ before 3.0: "stop job" would send a signal to the pid of a dead horse."""
    clear = getattr(worker, "set_current_job_id", None)
    if clear is None:
        return
    with contain_errors("clear the current job", event="redis_call_failed", worker=worker.name):
        clear(None)
        worker.execution = None


def clean_started(original: Hook) -> Hook:
    """Wrap StartedJobRegistry.cleanup: RQ fails or retries the runs of workers without heartbeats."""

    @wraps(original)
    def hook(self: Any, timestamp: float | None = None, *args: Any, **kwargs: Any) -> Any:
        with contain_errors("postpone abandoned runs", queue=self.name):
            tracker = tracker_for_registry(self)
            if tracker is not None:
                # Use one time for jobguard and for RQ. Runs that expire later are for the next call.
                timestamp = int(time.time()) if timestamp is None else timestamp
                _postpone(tracker, self, timestamp)
        return original(self, timestamp, *args, **kwargs)

    return hook


def _postpone(tracker: Tracker, registry: Any, until: float) -> None:
    """Hide from RQ the runs that the leader will decide on; RQ handles the others."""
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
    """Return for each entry (``id:execution``) the token of its delivery."""
    with registry.connection.pipeline(transaction=False) as pipe:
        for entry in entries:
            job_id = entry.decode().rsplit(":", 1)[0]
            pipe.hmget(registry.job_class.key_for(job_id), FIELD, "status")
        hashes = pipe.execute()
    found = {
        entry: token_in(field, status)
        for entry, (field, status) in zip(entries, hashes, strict=True)
        if (status or b"").decode(errors="replace") not in ENDED  # RQ knows how these ended
    }
    return {entry: token for entry, token in found.items() if token is not None}
