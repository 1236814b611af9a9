"""How the children of a worker reach Postgres: through their worker. No child has a connection.

A child creates a pair of sockets at its first call, and sends one of them to its worker through a
socket that every forked child inherits. The worker serves each child in a separate thread. It makes
the call with its own tracker, so that the requests of several children are committed together. A
report of an end belongs to the worker when the call returns: the child may be killed from then on.
"""

from __future__ import annotations

import pickle
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from jobguard import errors
from jobguard.errors import JobguardError, StoreUnavailable
from jobguard.fork import OwnerProcess
from jobguard.host.spool import Cancelled, Entry, JoinOpened, Released, Spool, Unsent
from jobguard.host_safety import contain_errors
from jobguard.locks import Turn
from jobguard.log import log_event
from jobguard.model import Delivery, End, Ended
from jobguard.store.protocols import SourceRow

if TYPE_CHECKING:
    from jobguard.host.tracker_api import TrackerApi

_LENGTH = struct.Struct("=Q")
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # billiard ends a child at SIGPIPE
_REST = 0.05
"""Seconds of pause after a failure to accept a child."""


class Door:
    """The place where this process serves its children. Create it before the first fork."""

    def __init__(self, tracker: TrackerApi) -> None:
        self.owner = OwnerProcess()
        self._tracker = tracker
        self._here, self._there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def open(self) -> None:
        """Serve children from now on."""
        threading.Thread(target=self._accept, name="jobguard-children", daemon=True).start()

    def knock(self) -> socket.socket:
        """Return, in a child, a socket that leads to the worker. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                flags = socket.MSG_DONTWAIT | _NO_SIGNAL
                socket.send_fds(self._there, [b"+"], [theirs.fileno()], flags)
            except BaseException:
                ours.close()
                raise
        return ours

    def close(self) -> None:
        """Accept no more children."""
        with suppress(OSError):
            self._here.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            with contain_errors("children") as contained:
                data, descriptors, _, _ = socket.recv_fds(self._here, 1, 1)
                if not data:
                    return  # closed
                for descriptor in descriptors:
                    link = socket.socket(fileno=descriptor)
                    name = "jobguard-child"
                    threading.Thread(
                        target=self._serve, args=(link,), name=name, daemon=True
                    ).start()
            if contained.failed:
                time.sleep(_REST)

    def _serve(self, link: socket.socket) -> None:
        with link, suppress(OSError, EOFError):
            while True:
                name, arguments, options = _receive(link)
                _send(link, self._answer(name, arguments, options))

    def _answer(
        self, name: str, arguments: Sequence[Any], options: Mapping[str, Any]
    ) -> tuple[str | None, Any]:
        try:
            return None, self._tracker.for_child(name, arguments, options)
        except Exception as error:
            if not isinstance(error, JobguardError):
                log_event("guest_failed", where=name, error=str(error), exc_info=True)
            return type(error).__name__, str(error)


class ParentStore:
    """HostStore in a child: its worker makes the calls. Raises StoreUnavailable on no answer."""

    def __init__(self, door: Door, *, timeout: float) -> None:
        self.installation: str | None = None
        self._door = door
        self._timeout = timeout
        self._link: socket.socket | None = None
        self._lock = Turn()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments, **options: self.call(name, *arguments, **options)

    def conninfo(self) -> str | None:
        """Return None: no other process reaches Postgres through a child."""
        return None

    def register(self, source: SourceRow) -> SourceRow:
        """Return the source as the worker knows it; see HostStore."""
        there: SourceRow
        there, self.installation = self.call("register", source)
        return there

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Ask the worker to make a call of the store."""
        until = time.monotonic() + self._timeout
        if not self._lock.take(self._timeout):
            raise StoreUnavailable("the worker of this child is busy with another call")
        try:
            error, answer = self._ask((name, arguments, options), until)
        except (OSError, EOFError) as broken:
            self.close()
            raise StoreUnavailable(
                f"the worker of this child does not answer: {broken}"
            ) from broken
        except (
            BaseException
        ):  # raised by a signal: the answer that may still come belongs to no call
            self.close()
            raise
        finally:
            self._lock.free()
        if error is None:
            return answer
        kind = getattr(errors, error, JobguardError)
        raise kind(answer)

    def end(self, source: int, ends: Sequence[End]) -> Sequence[Ended]:
        """Pass these ends to the worker, which commits them now or when Postgres is back."""
        answers: Sequence[Ended] = self.call("end", source, ends)
        return answers

    def close(self) -> None:
        """Close the socket."""
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def _ask(self, asked: Any, until: float) -> tuple[str | None, Any]:
        if self._link is None:
            self._link = self._door.knock()
        _send(self._link, asked, until)
        answer: tuple[str | None, Any] = _receive(self._link, until)
        return answer


class ParentSpool:
    """The spool of a child: entries go to the worker, and stay in this process if the worker takes none."""

    def __init__(self, parent: ParentStore, own: Spool) -> None:
        self._parent = parent
        self._own = own

    def put(self, entries: Sequence[Entry]) -> bool:
        """Keep all of these entries or none; see Spool."""
        if all(
            isinstance(entry, Delivery | Cancelled | JoinOpened | Released | Unsent)
            for entry in entries
        ):
            with suppress(JobguardError):
                if self._parent.call("spool", entries):
                    return True
        return self._own.put(entries)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __len__(self) -> int:
        return len(self._own)


def _send(link: socket.socket, what: Any, until: float | None = None) -> None:
    data = pickle.dumps(what, protocol=pickle.HIGHEST_PROTOCOL)
    _wait_until(link, until)
    link.sendall(_LENGTH.pack(len(data)) + data, _NO_SIGNAL)


def _receive(link: socket.socket, until: float | None = None) -> Any:
    (length,) = _LENGTH.unpack(_read(link, _LENGTH.size, until))
    return pickle.loads(_read(link, length, until))  # the data comes from this same program


def _read(link: socket.socket, size: int, until: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        _wait_until(link, until)
        some = link.recv(min(size - len(data), 1 << 20))
        if not some:
            raise EOFError("the other side is gone")
        data += some
    return bytes(data)


def _wait_until(link: socket.socket, until: float | None) -> None:
    if until is not None:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer in time")
        link.settimeout(left)
