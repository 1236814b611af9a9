"""Proxies that catch our exceptions, so that the host application never sees them.

Trackers and sessions must not raise. The proxies are for unforeseen errors: an adapter gets a tracker or a
session only behind a proxy. If a method raises, the proxy returns the value that makes the library work as
if jobguard were absent.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, cast
from uuid import UUID

from jobguard.errors import InvalidKey, NotTransactional, StoreUnavailable, is_host_interrupt
from jobguard.log import log_event
from jobguard.model import Claim, Recorded, new_token

if TYPE_CHECKING:
    from jobguard.adapter import Session, Tracker


def safe_tracker(tracker: Tracker) -> Tracker:
    """Return this tracker behind a proxy."""
    return cast("Tracker", _Tracker(tracker))


class contain_errors:
    """Log an error of jobguard that is raised inside, and continue after the block.

    An exception that the host raises in this thread (a time limit, a shutdown) passes, and so do the
    classes in ``let_pass``: errors that the user asked to get. ``event`` names the event of the log line.
    ``failed`` is True after the block if an error was contained.
    """

    __slots__ = ("_event", "_fields", "_let_pass", "failed")

    def __init__(
        self,
        where: str,
        *,
        event: str = "guest_failed",
        let_pass: type[Exception] | tuple[type[Exception], ...] = (),
        **fields: Any,
    ) -> None:
        self._event = event
        self._fields = {"where": where, **fields}
        self._let_pass = let_pass
        self.failed = False

    def __enter__(self) -> contain_errors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is None:
            return False
        if not isinstance(error, Exception) or isinstance(error, self._let_pass):
            return False
        if is_host_interrupt(error) or isinstance(error, NotTransactional | InvalidKey):
            return False
        self.failed = True
        log_event(self._event, error=str(error), exc_info=error, **self._fields)
        return True


class SafeProxy:
    """A proxy for one of our objects."""

    _answers: ClassVar[dict[str, Callable[..., Any]]]
    """For each method: makes the result if the method raises, as if jobguard were absent."""

    def __init__(self, proxied: Any) -> None:
        self._proxied = proxied

    def __init_subclass__(cls) -> None:
        # Made once for a class: these methods are called several times for each job.
        for name, fallback in cls._answers.items():
            if name not in vars(cls):
                setattr(cls, name, _contained(name, fallback))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._proxied, name)


def _contained(name: str, fallback: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that calls the method of this name, and the fallback if that raises."""

    def call(self: SafeProxy, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(self._proxied, name)(*args, **kwargs)
        except NotTransactional:
            raise  # an error in the user's program: to send it anyway would be wrong
        except StoreUnavailable:
            if name == "record":  # the user asked to get this error
                raise
            return fallback(*args, **kwargs)
        except Exception as error:
            if is_host_interrupt(error):
                raise
            log_event("guest_failed", where=name, error=str(error), exc_info=True)
            return fallback(*args, **kwargs)

    return call


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _no(*_: Any, **__: Any) -> bool:
    return False


class _Session(SafeProxy):
    _answers: ClassVar = {
        "start": lambda token, describe, **_: Claim(token, 0),
        "end": _nothing,
        "mark_superseded": _nothing,
        "decline": _nothing,
        "give_back": _nothing,
        "release": _nothing,
        "abandon": _nothing,
        "consumes": _nothing,
        "take_over_beats": _nothing,
        "flush": _nothing,
        "close": _nothing,
    }


class _UnguardedSession:
    """The session of a worker whose real session could not be opened: the worker works unguarded."""

    queues = ()

    def __init__(self) -> None:
        self.id = new_token()

    def start(self, token: Any, describe: Any, **_: Any) -> Claim:
        """Let the job run."""
        return Claim(token, 0)

    end = mark_superseded = decline = give_back = release = abandon = _nothing
    consumes = take_over_beats = flush = close = _nothing


class _Tracker(SafeProxy):
    _answers: ClassVar = {
        "guards": _no,
        "record": lambda deliveries, **_: Recorded(lost=True),
        "record_beside": _nothing,
        "withdraw": _nothing,
        "defer": _nothing,
        "batch": lambda **_: nullcontext(),
        "open_join": lambda *_: Recorded(lost=True),
        "close_join": _nothing,
        "forget_spooled": _no,
        "leave_to_outbox": _nothing,
        "drain_spool": _nothing,
        "broker_in_doubt": _no,
        "broker_error": _nothing,
        "broker_answered": _nothing,
        "broker_failed": _nothing,
        "accepts_without_broker": _no,
        "cancel": _nothing,
        "heartbeat": _no,
        "amend": _no,
        "predecessor": _nothing,
        "lock": _no,
        "unlock": _nothing,
        "tombstones": lambda tokens: {},
        "recovers": lambda tokens, **_: frozenset(),
        "open_session": lambda **_: _UnguardedSession(),
        "inherit_session": lambda worker, pid, **_: _UnguardedSession(),
    }

    def open_session(self, **what: Any) -> Session:
        """Open a session, and return it behind a proxy."""
        call = _contained("open_session", self._answers["open_session"])
        return _safe_session(call(self, **what))

    def inherit_session(self, worker: UUID, pid: int, **what: Any) -> Session:
        """Return the session of the parent process behind a proxy."""
        call = _contained("inherit_session", self._answers["inherit_session"])
        return _safe_session(call(self, worker, pid, **what))


def _safe_session(session: Any) -> Session:
    return cast("Session", session if isinstance(session, _UnguardedSession) else _Session(session))
