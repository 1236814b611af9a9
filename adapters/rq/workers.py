"""RQ's workers, hooked on import: ``rq worker --worker-class jobguard.adapters.rq.Worker``.

The classes add nothing. RQ imports the class it is told to use, and a spawned horse imports the
class of its worker: that import is what hooks RQ in processes that never call ``guard()``.
"""

from __future__ import annotations

import logging

import rq.worker

from jobguard.adapters.rq import patches
from jobguard.errors import UnsupportedTarget

try:
    patches.install(__name__)
except UnsupportedTarget as error:
    logging.getLogger("jobguard").error("%s", error)


class Worker(rq.worker.Worker):
    """RQ's forking worker, guarded."""


class SimpleWorker(rq.worker.SimpleWorker):
    """RQ's worker without a fork, guarded."""


class SpawnWorker(getattr(rq.worker, "SpawnWorker", rq.worker.Worker)):  # type: ignore[misc]
    """RQ's spawning worker, guarded; before RQ 2.2, which has none, the forking one."""
