"""Guards that came after the start of the worker of their process.

The runs of such a worker ask for no claim: its children were forked without our hooks, and its tracers
were built without them. It is an unguarded worker, and a leader must see it as one.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from billiard.process import current_process
from celery.worker import WorkController

from jobguard.log import log_event

if TYPE_CHECKING:
    from jobguard.adapter import Tracker

_late: set[int] = set()
"""The sources of such guards."""


def check(tracker: Tracker, app: Any) -> None:
    """Log an error if a worker of this app has started its pool before it was guarded."""
    if _works(app):
        _late.add(tracker.source.id)
        log_event("guard_late", source=str(tracker.source))


def is_late(tracker: Tracker) -> bool:
    """Return True if the worker of this process is unguarded, because its guard came too late."""
    return tracker.source.id in _late


def forget(tracker: Tracker) -> None:
    """Forget a source that is no longer guarded."""
    _late.discard(tracker.source.id)


def _works(app: Any) -> bool:
    """Return True if this process is a worker of this app, or a child of one, with its pool started."""
    if not getattr(vars(app).get("loader"), "worker_initialized", False):
        return False
    is_child = current_process()._parent_pid is not None
    # Nothing in Celery names the worker of a process. A forked child has a copy of its parent's.
    controllers = [each for each in gc.get_objects() if issubclass(type(each), WorkController)]
    return any(
        each.app is app and each.pool is not None and (is_child or each.pool.active)
        for each in controllers
    )
