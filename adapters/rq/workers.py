"""RQ's workers, hooked on import: ``rq worker --worker-class jobguard.adapters.rq.Worker``.

The classes add nothing. RQ imports the configured class, and a spawned horse imports the class of
its worker: this import hooks RQ in processes that never call ``guard()``.
"""

from __future__ import annotations

import rq.worker

from jobguard.adapters.rq import patches
from jobguard.errors import UnsupportedTarget
from jobguard.log import log_event

try:
    patches.install(__name__)
except UnsupportedTarget as error:
    log_event("guard_refused", error=str(error))


class Worker(rq.worker.Worker):
    """RQ's forking worker, guarded."""


class SimpleWorker(rq.worker.SimpleWorker):
    """RQ's worker without a fork, guarded."""


class SpawnWorker(getattr(rq.worker, "SpawnWorker", rq.worker.Worker)):  # type: ignore[misc]
    """RQ's spawning worker, guarded; RQ before 2.2 has none, so there it is the forking worker."""
