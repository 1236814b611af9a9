"""jobguard: a durability sidecar for Redis job queues.

RQ, Celery and Dramatiq keep their speed and their API; Postgres keeps the truth. What ``enqueue``
accepted is run, whatever dies::

    import jobguard
    guard = jobguard.guard(queue, postgres="postgresql://...")   # the one call

Importing this opens nothing, reads no environment and prints nothing.
"""

from jobguard.current import CurrentJob, current, lock
from jobguard.errors import (
    BreakerOpen,
    ConfigurationError,
    ConflictingGuard,
    JobguardError,
    NotMigrated,
    StoreUnavailable,
    UnsupportedTarget,
)
from jobguard.guard import JobGuard, guard

__version__ = "0.1.0"

__all__ = [
    "BreakerOpen",
    "ConfigurationError",
    "ConflictingGuard",
    "CurrentJob",
    "JobGuard",
    "JobguardError",
    "NotMigrated",
    "StoreUnavailable",
    "UnsupportedTarget",
    "__version__",
    "current",
    "guard",
    "lock",
]
