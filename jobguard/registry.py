"""The trackers of this process, where adapters and the command line find them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from jobguard.host_safety import safe_tracker

if TYPE_CHECKING:
    from jobguard.adapter import Tracker

_trackers: dict[int, Tracker] = {}
_mark: Any = SimpleNamespace(value=0)
"""Its value is 1 after something was guarded, here or in a child that shares the mark."""
_resolvers: list[Callable[[object], Tracker | None]] = []


def register(tracker: Tracker) -> None:
    """Register a tracker for the adapters of this process, behind a proxy that catches its errors."""
    _trackers[tracker.source.id] = safe_tracker(tracker)
    _mark.value = 1


def ever_guarded() -> bool:
    """Return True if anything was guarded so far, in this process or in a child that shares its mark."""
    return bool(_mark.value)


def share_mark() -> Any:
    """Return the mark of this process, from now on in memory that its forked children share.

    A child that is a new Python gets it as an argument of its process, and calls ``adopt_mark``.
    """
    global _mark
    if isinstance(_mark, SimpleNamespace):
        from multiprocessing.sharedctypes import RawValue  # only `jobguard run` needs it

        with suppress(OSError):  # no folder for the file behind the memory
            _mark = RawValue("b", _mark.value)
    return _mark


def adopt_mark(mark: Any) -> None:
    """Share the mark of the parent of this process."""
    global _mark
    mark.value |= _mark.value
    _mark = mark


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
