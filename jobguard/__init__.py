"""jobguard: a durability sidecar for Redis job queues.

RQ, Celery and Dramatiq keep their speed and their API. PostgreSQL keeps the record of every job. A job
that ``enqueue`` accepted is run, even if processes or servers die::

    import jobguard
    guard = jobguard.guard(queue, postgres="postgresql://...")   # the one call

Importing this package opens no connection, reads no environment variable and prints nothing. Its modules
are loaded when a name is used for the first time.
"""

import sys
from importlib import import_module
from types import ModuleType

TYPE_CHECKING = False  # as in typing, which is not loaded here
if TYPE_CHECKING:
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

__version__ = "0.2.0"

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

_HOMES = {
    **dict.fromkeys(("CurrentJob", "current", "lock"), "jobguard.current"),
    **dict.fromkeys(("aonce", "once"), "jobguard.effects"),
    **dict.fromkeys(("JobGuard", "guard"), "jobguard.guard"),
}
"""The modules of the public names; all others are errors."""
_MODULES = ("errors", "hooks")
"""Modules that need no import of their own."""


class _Package(ModuleType):
    """This package, whose names are loaded at their first use."""

    def __getattr__(self, name: str) -> object:
        if name in _MODULES:
            return import_module(f"jobguard.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found: object = getattr(import_module(_HOMES.get(name, "jobguard.errors")), name)
        setattr(self, name, found)
        return found

    def __setattr__(self, name: str, value: object) -> None:
        # The import of the module ``guard`` or ``current`` must not hide the function of its name.
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = _Package
