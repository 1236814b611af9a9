"""A process that beats in a worker's stead while something holds the worker's interpreter.

A thread that beats needs the GIL; a C call that keeps it for a minute silences its worker for a minute,
though it lives. So such a worker has a stand-in: a bare interpreter that waits at the end of a pipe. The
worker tells it each beat, and each claim that comes and goes in between. When it has heard no beat for a
while it beats itself, with the claims it was told last: while the GIL is held they cannot have changed.

It never speaks for the dead: it ends when the pipe does, or when its parent is another process, whoever
else holds the pipe. Nor does it speak for a worker that somebody has stopped (SIGSTOP).

This file is both ends. The worker imports it; the stand-in runs it by its path, and so that it weighs
as little as an interpreter can, imports the rest of jobguard when it must beat and not before. What it
must know, the password among it, comes through the pipe.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobguard.model import Beat

_BEAT, _COUNT, _CLAIM, _END, _SPEC = "b", "n", "+", "-", "s"
_PATIENCE = 1.5
"""Beats' intervals without a beat, after which the worker's interpreter is believed to be held."""
_CHECK_EVERY = 1.0
"""Seconds between two looks whether the parent is still the same."""
_PIPE = 1 << 20
"""Bytes of news that may wait: some 30,000 claims, while other processes have the processor."""
_TO_END = 1.0
_AGAIN = 5.0
"""Seconds between two tries to have a stand-in."""
_NOT_MEANT = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
    *(signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2),
)
"""Signals that reach the whole group, and are meant for the worker, which decides."""
_BETWEEN = (1 << 20) - 1
"""Beats of its own between two of the worker's, at most; see heart.py."""


class BeatProcess:
    """The worker's end."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = {**spec, "path": sys.path, "parent": os.getpid()}
        self._mine = os.getpid()
        self.pid = 0
        self._pipe = -1
        self._tried_at = float("-inf")

    def begins(self, claim: str) -> None:
        """The worker may be running this from now on. Under the lock of its list."""
        self._tell(_CLAIM + claim)

    def ends(self, claim: str) -> None:
        """The worker runs this no more."""
        self._tell(_END + claim)

    def counts(self, counter: int) -> None:
        """The worker's list of this beat is made; what it tells from now on is newer. Under that lock.

        Beats are ordered by their lists: if the worker is held before it sends this beat, what its
        stand-in says meanwhile is newer than what the worker sends in the end.
        """
        self._tell(f"{_COUNT}{counter}")

    def beat(self, beat: Beat, conninfo: str) -> None:
        """The worker has beaten; begins anew what has ended or cannot keep up."""
        if os.getpid() != self._mine:
            return
        if self._pipe < 0 and time.monotonic() - self._tried_at >= _AGAIN:
            self._tried_at = time.monotonic()
            self._begin()
        sent = {
            "worker": beat.worker.hex,
            "counter": beat.counter,
            "claims": [claim.hex for claim in beat.claims],
            "name": beat.name,
            "host": beat.host,
            "pid": beat.pid,
            "queues": list(beat.queues),
            "unflushed_since": beat.unflushed_since,
        }
        self._tell(_BEAT + json.dumps({"beat": sent, "conninfo": conninfo}))

    def close(self) -> None:
        """Have it end."""
        if os.getpid() != self._mine:
            return
        self._close_pipe()
        until = time.monotonic() + _TO_END
        while self.pid and not self._reap():
            if time.monotonic() >= until:
                os.kill(self.pid, signal.SIGKILL)
                until = float("inf")
            time.sleep(0.005)

    def _begin(self) -> None:
        if self.pid and not self._reap():
            return  # it has not noticed yet that it was let go
        if not sys.executable:
            return
        # posix_spawn is what no monkey patching of gevent's makes a greenlet of.
        reader, writer = os.pipe()
        try:
            self.pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-S", "-s", "-P", __file__],
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, reader, 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                ],
                setsigmask=_NOT_MEANT,  # from its first moment on
            )
        except OSError:
            os.close(writer)
            return
        finally:
            os.close(reader)
        os.set_blocking(writer, False)
        with contextlib.suppress(AttributeError, OSError):  # Linux alone knows how
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE)
        self._pipe = writer
        self._tell(_SPEC + json.dumps(self._spec))

    def _tell(self, line: str) -> None:
        if self._pipe < 0 or os.getpid() != self._mine:
            return
        from jobguard import os_threads  # here: this file is the other process's program, too

        data = f"{line}\n".encode()
        try:
            sent = os_threads.write(self._pipe, data)
        except OSError:  # it has ended, or does not keep up
            sent = 0
        if sent < len(data):
            self._close_pipe()  # what it knows is not all: the next beat begins another

    def _close_pipe(self) -> None:
        pipe, self._pipe = self._pipe, -1
        if pipe >= 0:
            os.close(pipe)

    def _reap(self) -> bool:
        try:
            if os.waitpid(self.pid, os.WNOHANG)[0] == 0:
                return False
        except ChildProcessError:  # somebody waits for every child
            pass
        self.pid = 0
        return True


class _Substitute:
    """The other end, in a process of its own."""

    def __init__(self, reported_by: int) -> None:
        self._pipe = reported_by
        self._parent = os.getppid()
        self._unread = b""
        self._spec: dict[str, Any] = {}
        self._received: dict[str, Any] | None = None
        """The worker's last beat; None: there is nothing to speak of."""
        self._claims: set[str] = set()
        self._heard_at = time.monotonic()
        self._beat_at = float("-inf")
        self._beats = 0
        self._store: Any = None

    def run(self) -> None:
        """Listen until there is nobody to speak for."""
        poller = select.poll()
        poller.register(self._pipe, select.POLLIN)
        while os.getppid() == self._parent:
            if poller.poll(self._wait() * 1000):
                data = os.read(self._pipe, 1 << 16)
                if not data:
                    return
                self._hear(data)
            elif os.getppid() == self._parent and self._is_due():
                self._beat_at = time.monotonic()
                self._beat()

    def _wait(self) -> float:
        if self._received is None:
            return _CHECK_EVERY
        interval: float = self._spec["interval"]
        due = max(self._heard_at + _PATIENCE * interval, self._beat_at + interval)
        return max(0.0, min(_CHECK_EVERY, due - time.monotonic()))

    def _is_due(self) -> bool:
        return self._received is not None and self._wait() == 0.0 and not self._is_stopped()

    def _hear(self, data: bytes) -> None:
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            what, rest = chr(line[0]), line[1:]
            if what == _CLAIM:
                self._claims.add(rest.decode())
            elif what == _END:
                self._claims.discard(rest.decode())
            elif what == _COUNT:
                self._beats = 0
                if self._received is not None:
                    self._received["beat"]["counter"] = int(rest)
            elif what == _BEAT:
                self._received = json.loads(rest)
                self._claims = set(self._received["beat"]["claims"]) if self._received else set()
                self._heard_at = time.monotonic()
                self._rest()
            elif what == _SPEC:
                self._spec = json.loads(rest)
                if self._spec["parent"] != self._parent:
                    self._parent = -1  # it died before we began

    def _is_stopped(self) -> bool:
        """Whether somebody has stopped the worker: it does nothing, and its jobs are better off."""
        try:
            with open(f"/proc/{self._parent}/stat", "rb") as stat:
                return stat.read().rpartition(b") ")[2][:1] in (b"T", b"t")
        except OSError:  # no /proc here
            return False

    def _beat(self) -> None:
        """Say that the worker lives."""
        try:
            self._say()
        except Exception:
            # Nobody hears us say why: the store is away, and then no leader judges anybody either.
            self._rest()

    def _say(self) -> None:
        assert self._received is not None
        if self._store is None:
            sys.path[:] = self._spec["path"]
            from jobguard.settings import Settings
            from jobguard.store.host import PostgresStore

            conninfo = self._received["conninfo"]
            self._store = PostgresStore(lambda: conninfo, Settings(**self._spec["settings"]))
        from uuid import UUID

        from jobguard.model import Beat

        self._beats = min(self._beats + 1, _BETWEEN)
        sent = dict(self._received["beat"])
        sent["worker"] = UUID(hex=sent["worker"])
        sent["counter"] += self._beats
        sent["claims"] = [UUID(hex=claim) for claim in self._claims]
        reply = self._store.beat(
            self._spec["source"], Beat(**sent), namespace=self._spec["namespace"]
        )
        if reply.dead:
            self._received = None
            self._rest()

    def _rest(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store.close()


def _main() -> None:
    for number in _NOT_MEANT:
        signal.signal(number, signal.SIG_IGN)
    _Substitute(0).run()


if __name__ == "__main__":
    _main()
