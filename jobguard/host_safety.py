"""Manners: whatever a tracker or a session of ours raises, the host never sees it.

Both promise not to raise. This holds for what nobody thought of: an adapter is only ever given them
behind this wall, which answers what leaves the library to itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, cast
from uuid import UUID

from jobguard.errors import StoreUnavailable, is_host_interrupt
from jobguard.log import log_event
from jobguard.model import Claim, Recorded, new_token

if TYPE_CHECKING:
    from jobguard.adapter import Session, Tracker


def safe_tracker(tracker: Tracker) -> Tracker:
    """Return this tracker behind the wall."""
    return cast("Tracker", _Tracker(tracker))


class SafeProxy:
    """What stands before an object of ours."""

    _answers: ClassVar[dict[str, Callable[..., Any]]]
    """What each of its methods answers where it raises: without us."""

    def __init__(self, behind: Any) -> None:
        self._behind = behind

    def __getattr__(self, name: str) -> Any:
        instead = self._answers.get(name)
        if instead is None:
            return getattr(self._behind, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return getattr(self._behind, name)(*args, **kwargs)
            except StoreUnavailable:
                if name == "record":  # the user asked to hear it
                    raise
                return instead(*args, **kwargs)
            except Exception as error:
                if is_host_interrupt(error):
                    raise
                log_event("guest_failed", where=name, error=str(error), exc_info=True)
                return instead(*args, **kwargs)

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
        "release": _nothing,
        "abandon": _nothing,
        "consumes": _nothing,
        "take_over_beats": _nothing,
        "flush": _nothing,
        "close": _nothing,
    }


class _UnguardedSession:
    """A session of which we could not even open the first page: its worker works unguarded."""

    def __init__(self) -> None:
        self.id = new_token()

    def start(self, token: Any, describe: Any, **_: Any) -> Claim:
        """Let it run."""
        return Claim(token, 0)

    end = mark_superseded = decline = release = abandon = consumes = take_over_beats = flush = (
        close
    ) = _nothing


class _Tracker(SafeProxy):
    _answers: ClassVar = {
        "guards": _no,
        "record": lambda deliveries, **_: Recorded(lost=True),
        "withdraw": _nothing,
        "defer": _nothing,
        "batch": lambda **_: nullcontext(),
        "open_join": lambda *_: Recorded(lost=True),
        "close_join": _nothing,
        "leave_to_outbox": _nothing,
        "drain_spool": _nothing,
        "broker_in_doubt": _no,
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
        """Open a session, and put it behind a wall of its own."""
        return _safe_session(self.__getattr__("open_session")(**what))

    def inherit_session(self, worker: UUID, pid: int, **what: Any) -> Session:
        """The same for a session that is the parent's."""
        return _safe_session(self.__getattr__("inherit_session")(worker, pid, **what))


def _safe_session(session: Any) -> Session:
    return cast("Session", session if isinstance(session, _UnguardedSession) else _Session(session))
