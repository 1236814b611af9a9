"""Child processes that are restarted when they end, as systemd would do it.

RQ workers end by design when Redis fails in the middle of a job. Without a supervisor, a crash of
Redis would stop the work for good, with jobguard or without.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

# These functions exist only once, also for the servers.
from jobguard.demo.servers.process import die_with_parent, suspend, wait_until_gone

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

RESTART_SECONDS = 0.1  # the default RestartSec of systemd
STOP_SECONDS = 5.0
_PREFIXES = ("JOBGUARD_", "RQ_", "CELERY_", "DRAMATIQ_")


class Child:
    """A process of this Python with these arguments; its output goes to a log."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        environ: Mapping[str, str],
        log: Path,
        orphan_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self._command = [sys.executable, *arguments]
        self._environ = dict(environ)
        self._log = log
        self._orphan_signal = orphan_signal
        self._ended_at: float | None = None
        self.process = self._start()
        self.starts = 1

    @property
    def pid(self) -> int:
        """The id of the process that runs now, or ran last."""
        return self.process.pid

    @property
    def ended(self) -> bool:
        """True if the process does not run at the moment."""
        return self.process.poll() is not None

    @property
    def last_words(self) -> str:
        """The end of the log."""
        return self._log.read_text(errors="replace")[-2000:].strip()

    def tend(self) -> bool:
        """Restart the process some time after its end; return True if it was restarted."""
        if not self.ended:
            return False
        if self._ended_at is None:
            self._ended_at = time.monotonic()
        if time.monotonic() - self._ended_at < RESTART_SECONDS:
            return False
        self._ended_at = None
        self.process = self._start()
        self.starts += 1
        return True

    def kill(self) -> None:
        """Kill the process with SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environ,
                start_new_session=True,  # a Ctrl-C is for the demo, which ends the children in order
                preexec_fn=die_with_parent(self._orphan_signal),
            )


def end(children: Iterable[Child]) -> None:
    """Terminate all of them; kill those that do not end in time, and children that stay behind."""
    running = [child.process for child in children if not child.ended]
    below = [member for process in running for member in _below(process.pid)]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            process.wait()
    for member in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def _below(pid: int) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found


def kill_tree(pid: int) -> None:
    """Kill a process and all its children with SIGKILL, and return when they are gone."""
    try:
        root = psutil.Process(pid)
        suspend(root)  # it must not fork between the listing and the kill
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    for member in tree:
        wait_until_gone(member)


def clean_environment() -> dict[str, str]:
    """Return our environment without settings, so that the demo shows the defaults."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith(_PREFIXES) and name not in ("DATABASE_URL", "REDIS_URL")
    }
