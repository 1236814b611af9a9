"""The adapter for RQ 2.0 to 3.x.

``rq worker --worker-class jobguard.adapters.rq.Worker`` guards a worker; so does
``rq worker -c jobguard.adapters.rq``, and any module that calls ``guard()``.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from jobguard.adapters.rq.adapter import RQAdapter

if TYPE_CHECKING:
    from jobguard.adapters.rq.workers import SimpleWorker, SpawnWorker, Worker

__all__ = ["RQAdapter", "SimpleWorker", "SpawnWorker", "Worker"]

_WORKERS = frozenset(("SimpleWorker", "SpawnWorker", "Worker"))


def __getattr__(name: str) -> Any:
    """Import and hook RQ's workers on first use; a reconciler never uses them."""
    if name not in _WORKERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.workers"), name)


if "rq.cli" in sys.modules:  # `rq worker -c jobguard.adapters.rq` only imports this module
    importlib.import_module(f"{__name__}.workers")
