"""The trackers of this process, where adapters and the command line find them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING

from jobguard.host_safety import safe_tracker

if TYPE_CHECKING:
    from jobguard.adapter import Tracker

_trackers: dict[int, Tracker] = {}
_first: list[int] = []
"""The first source that was guarded in this process, if there was one."""
_resolvers: list[Callable[[object], Tracker | None]] = []


def register(tracker: Tracker) -> None:
    """Register a tracker for the adapters of this process, behind a proxy that catches its errors."""
    _trackers[tracker.source.id] = safe_tracker(tracker)
    _first[:] = _first or [tracker.source.id]


def ever_guarded() -> bool:
    """Return True if anything was guarded in this process so far."""
    return bool(_first)


def registered_tracker(tracker: Tracker) -> Tracker:
    """Return a registered tracker behind its proxy, as adapters get it."""
    return _trackers[tracker.source.id]


def unregister(tracker: Tracker) -> None:
    """Forget a tracker."""
    _trackers.pop(tracker.source.id, None)


def trackers() -> Iterable[Tracker]:
    """Return the trackers of this process."""
    return tuple(_trackers.values())


def on_unguarded_worker(resolve: Callable[[object], Tracker | None]) -> None:
    """Set the function that makes the tracker of a worker whose process never called guard()."""
    _resolvers[:] = [resolve]


def tracker_for_worker(target: object) -> Tracker | None:
    """Return the tracker of a worker's connection; make it from the environment if there is none yet."""
    if not _resolvers:
        # No name of the package was used in this process: the module that sets the resolver is not loaded.
        import_module("jobguard.guard")
    made = _resolvers[0](target) if _resolvers else None
    return _trackers.get(made.source.id) if made is not None else None
