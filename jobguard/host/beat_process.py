"""A process that beats for a worker while a C call blocks the worker's interpreter.

A thread that beats needs the GIL. A C call that keeps the GIL for a minute stops the worker's beats
for a minute, although the worker is alive. Therefore such a worker has a beat process: a bare
interpreter that waits at the end of a pipe. The worker reports to it each beat, and each claim that
starts or ends between beats. If the beat process receives no beat for a while, it beats itself,
with the claims that were last reported: while the GIL is blocked they cannot have changed.

The beat process never beats for a dead worker, nor for a stopped one (SIGSTOP). It ends when the pipe
closes, or when its parent is another process, even if a further process keeps the pipe open. A new
parent is the proof that the worker's process is gone, and with it all jobs that ran in it: then the beat
process reports the death, so that no leader must wait for ``worker_timeout``. A closed pipe alone
proves nothing.

This file is the program of both ends. The worker imports it. The beat process runs it by its path,
and imports the rest of jobguard only when it must beat, so that it uses no more memory than a bare
interpreter. All that it must know, including the password, comes through the pipe.
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
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobguard.model import Beat

_BEAT, _COUNT, _CLAIM, _END, _SPEC, _QUIT = "b", "n", "+", "-", "s", "q"
_PATIENCE = 1.5
"""Beat intervals without a beat after which the worker's interpreter counts as blocked."""
_CHECK_EVERY = 1.0
"""Seconds between two checks that the parent is still the same."""
_PIPE = 1 << 20
"""Bytes of reports that may wait in the pipe while other processes use the CPU: about 30,000 claims."""
_READ = 1 << 16
_REST = 0.05
"""Seconds after a read in which further reports wait in the pipe: a busy worker wakes this process 20
times a second, and not once for each job.
"""
_TO_END = 1.0
_TO_EXIT = 0.5
"""Seconds between the end of the pipe and the end of the process that had it, if it dies."""
_REPORT_AGAIN = 0.5
"""Seconds between two attempts to report a death."""
_AGAIN = 5.0
"""Seconds between two attempts to start a beat process."""
_IGNORED_SIGNALS = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
    *(signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2),
)
"""Signals that reach the whole process group but are meant for the worker, which decides what to do."""
_BETWEEN = (1 << 20) - 1
"""The maximum number of own beats between two beats of the worker; see beats.py."""


class BeatProcess:
    """The worker's end."""

    def __init__(self, spec: dict[str, Any]) -> None:
        # Imported here, because this file is also the other process's program.
        from jobguard import os_threads

        self._os = os_threads
        # A bare interpreter has no finder of an editable installation: it needs our own folder as well.
        path = [*sys.path, str(Path(__file__).parents[2])]
        self._spec = {**spec, "path": path, "parent": os.getpid()}
        self._owner_pid = os.getpid()
        self.pid = 0
        self._pipe = -1
        self._tried_at = float("-inf")
        self._lines: deque[str] = deque()
        self._writing = os_threads.lock()

    def begins(self, claim: str) -> None:
        """Report that the worker may run this from now on. Call it under the lock of the in-flight list.

        `flush` follows, without that lock, before its claim is requested and before the worker runs it.
        """
        self._add(_CLAIM + claim)

    def ends(self, claim: str) -> None:
        """Report, with the next report, that the worker no longer runs this. Needs the same lock."""
        self._add(_END + claim)

    def counts(self, counter: int) -> None:
        """Report that the list of this beat is complete, so later reports are newer. Needs the same lock.

        Beats are ordered by their lists. If the worker is blocked before it sends this beat, the
        beats that the beat process sends in between are newer than the beat that the worker sends
        in the end.
        """
        self._report(f"{_COUNT}{counter}")

    def beat(self, beat: Beat, conninfo: str) -> None:
        """Report a beat of the worker; start a new process if the last one has ended or was too slow."""
        if os.getpid() != self._owner_pid:
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
        self._report(_BEAT + json.dumps({"beat": sent, "conninfo": conninfo}))

    def close(self) -> None:
        """End the beat process."""
        if os.getpid() != self._owner_pid:
            return
        self._report(_QUIT)
        self._close_pipe()
        until = time.monotonic() + _TO_END
        while self.pid and not self._reap():
            if time.monotonic() >= until:
                os.kill(self.pid, signal.SIGKILL)
                until = float("inf")
            time.sleep(0.005)

    def _begin(self) -> None:
        if self.pid and not self._reap():
            return  # the old process has not noticed yet that its pipe is closed
        if not sys.executable:
            return
        # gevent's monkey patching does not turn posix_spawn into a greenlet.
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
                setsigmask=_IGNORED_SIGNALS,  # from its first moment on
            )
        except OSError:
            os.close(writer)
            return
        finally:
            os.close(reader)
        os.set_blocking(writer, False)
        with contextlib.suppress(AttributeError, OSError):  # only Linux has this option
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE)
        self._lines.clear()
        self._pipe = writer
        self._report(_SPEC + json.dumps(self._spec))

    def _report(self, line: str) -> None:
        self._add(line)
        self.flush()

    def _add(self, line: str) -> None:
        if self._pipe >= 0 and os.getpid() == self._owner_pid:
            self._lines.append(line)

    def flush(self) -> None:
        """Write the reports so far. Threads that come meanwhile share the next write."""
        if self._pipe < 0 or os.getpid() != self._owner_pid:
            return
        with self._writing:
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            if not lines or self._pipe < 0:
                return
            data = "".join(f"{line}\n" for line in lines).encode()
            try:
                sent = self._os.write(self._pipe, data)
            except OSError:  # the process has ended, or is too slow
                sent = 0
            if sent < len(data):
                # Its information is incomplete: the next beat starts another process.
                self._close_pipe()

    def _close_pipe(self) -> None:
        pipe, self._pipe = self._pipe, -1
        if pipe >= 0:
            os.close(pipe)

    def _reap(self) -> bool:
        try:
            if os.waitpid(self.pid, os.WNOHANG)[0] == 0:
                return False
        except ChildProcessError:  # another part of the program waits for every child
            pass
        self.pid = 0
        return True


class _BeatProgram:
    """The beat process's end."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._parent = os.getppid()
        self._unread = b""
        self._spec: dict[str, Any] = {}
        self._received: dict[str, Any] | None = None
        """The worker's last beat; None if there is no beat to repeat."""
        self._claims: set[str] = set()
        self._beat_received_at = time.monotonic()
        self._beat_at = float("-inf")
        self._beats = 0
        self._store: Any = None
        self._quits = False

    def run(self) -> None:
        """Listen until the worker is gone; report its death, unless it has ended this process itself."""
        poller = select.poll()
        poller.register(self._pipe, select.POLLIN)
        while os.getppid() == self._parent and not self._quits:
            if poller.poll(self._wait() * 1000):
                data = os.read(self._pipe, _READ)
                if not data:
                    break
                self._receive(data)
                if len(data) < _READ:
                    time.sleep(_REST)
            elif os.getppid() == self._parent and self._is_due():
                self._beat_at = time.monotonic()
                self._beat()
        if self._is_orphan():
            self._report_death()

    def _is_orphan(self) -> bool:
        """Return True if the process that this one was started for is gone."""
        if self._quits or self._received is None:
            return False
        worker: int = self._spec["parent"]
        until = time.monotonic() + _TO_EXIT
        while os.getppid() == worker and time.monotonic() < until:
            time.sleep(0.01)
        return os.getppid() not in (worker, 0)  # 0: a process of another PID namespace

    def _report_death(self) -> None:
        """Report that the worker is dead, unless a leader has found that out by then."""
        assert self._received is not None
        from uuid import UUID

        worker = UUID(hex=self._received["beat"]["worker"])
        until = time.monotonic() + self._spec["timeout"]
        while time.monotonic() < until:
            with contextlib.suppress(Exception):  # the store is away
                self._open_store().report_death(worker)
                break
            self._rest()
            time.sleep(_REPORT_AGAIN)

    def _wait(self) -> float:
        if self._received is None:
            return _CHECK_EVERY
        interval: float = self._spec["interval"]
        due = max(self._beat_received_at + _PATIENCE * interval, self._beat_at + interval)
        return max(0.0, min(_CHECK_EVERY, due - time.monotonic()))

    def _is_due(self) -> bool:
        return self._received is not None and self._wait() == 0.0 and not self._is_stopped()

    def _receive(self, data: bytes) -> None:
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
                self._beat_received_at = time.monotonic()
                self._rest()
            elif what == _QUIT:
                self._quits = True
            elif what == _SPEC:
                self._spec = json.loads(rest)
                if self._spec["parent"] != self._parent:
                    self._parent = -1  # the parent died before this process started

    def _is_stopped(self) -> bool:
        """Return True if the worker is stopped: it does no work, so its jobs should run elsewhere."""
        try:
            with open(f"/proc/{self._parent}/stat", "rb") as stat:
                return stat.read().rpartition(b") ")[2][:1] in (b"T", b"t")
        except OSError:  # this system has no /proc
            return False

    def _beat(self) -> None:
        """Send a beat for the worker."""
        try:
            self._send_beat()
        except Exception:
            # No log of this process is read. The store is away, and then no leader declares a
            # worker dead.
            self._rest()

    def _send_beat(self) -> None:
        assert self._received is not None
        store = self._open_store()
        from uuid import UUID

        from jobguard.model import Beat

        self._beats = min(self._beats + 1, _BETWEEN)
        sent = dict(self._received["beat"])
        sent["worker"] = UUID(hex=sent["worker"])
        sent["counter"] += self._beats
        sent["claims"] = [UUID(hex=claim) for claim in self._claims]
        reply = store.beat(self._spec["source"], Beat(**sent), namespace=self._spec["namespace"])
        if reply.dead:
            self._received = None
            self._rest()

    def _open_store(self) -> Any:
        if self._store is None:
            assert self._received is not None
            sys.path[:] = self._spec["path"]
            from jobguard.settings import Settings
            from jobguard.store.host import PostgresStore

            conninfo = self._received["conninfo"]
            self._store = PostgresStore(lambda: conninfo, Settings(**self._spec["settings"]))
        return self._store

    def _rest(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store.close()


def _main() -> None:
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _BeatProgram(0).run()


if __name__ == "__main__":
    _main()
