"""Stop processes, wait for their end, and end children whose parent died."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

import psutil

from jobguard.errors import JobguardError

if TYPE_CHECKING:
    from collections.abc import Callable

STOP_TIMEOUT_SECONDS = 15.0


class ServerError(JobguardError):
    """A server could not be found or started; the message says what to do."""


def suspend(process: psutil.Process) -> None:
    """Stop a process, and return once it has stopped: the signal itself only promises "soon"."""
    process.suspend()
    finished = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE)
    while process.status() not in finished:
        time.sleep(0.001)


def wait_until_gone(process: psutil.Process) -> None:
    """Wait for the end of a process; raise ServerError."""
    deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):  # as pid 1 we must reap it ourselves
            os.waitpid(process.pid, os.WNOHANG)
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return  # its new parent reaps it
        except psutil.NoSuchProcess:
            return
        time.sleep(0.002)
    raise ServerError(f"process {process.pid} does not go away")


def die_with_parent(signal_sent: signal.Signals) -> Callable[[], None] | None:
    """Make the kernel end the child when we die without cleanup; Linux only.

    For the kernel, the parent is the thread that forked, not its process. A thread that may end
    before the server does must not request this, so only the main thread does.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return None
    prctl = ctypes.CDLL(None).prctl  # loaded before the fork: the child should do very little
    parent = os.getpid()
    set_parent_death_signal = 1

    def in_child() -> None:
        prctl(set_parent_death_signal, int(signal_sent))
        if os.getppid() != parent:  # the parent died in between
            os._exit(1)

    return in_child
