"""jobguard: a durability sidecar for Redis job queues.

RQ, Celery and Dramatiq keep their speed and their API. PostgreSQL keeps the record of every job. A job
that ``enqueue`` accepted is run, even if processes or servers die::

    import jobguard
    guard = jobguard.guard(queue, postgres="postgresql://...")   # the one call

Importing this package opens no connection, reads no environment variable and prints nothing.
"""

from jobguard.current import CurrentJob, current, lock
from jobguard.effects import aonce, once
from jobguard.errors import (
    BreakerOpen,
    ConfigurationError,
    ConflictingGuard,
    EffectInDoubt,
    EffectInProgress,
    JobguardError,
    KeyHeld,
    NotMigrated,
    NotTransactional,
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
    "EffectInDoubt",
    "EffectInProgress",
    "JobGuard",
    "JobguardError",
    "KeyHeld",
    "NotMigrated",
    "NotTransactional",
    "StoreUnavailable",
    "UnsupportedTarget",
    "__version__",
    "aonce",
    "current",
    "guard",
    "lock",
    "once",
]
