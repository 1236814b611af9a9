"""Processes that are stopped, waited for, and do not outlive who started them."""

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
    """Stop a process, and return once it has stopped: the signal alone promises only "soon"."""
    process.suspend()
    finished = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE)
    while process.status() not in finished:
        time.sleep(0.001)


def wait_until_gone(process: psutil.Process) -> None:
    """Wait for the end of a process; raises ServerError."""
    deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):  # ours to reap where we are pid 1
            os.waitpid(process.pid, os.WNOHANG)
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return  # its new parent reaps it
        except psutil.NoSuchProcess:
            return
        time.sleep(0.002)
    raise ServerError(f"process {process.pid} does not go away")


def die_with_parent(signal_sent: signal.Signals) -> Callable[[], None] | None:
    """Make the kernel end the child when we die without a goodbye; Linux only.

    The kernel means the thread that forked, not its process; a thread that may end before the
    server does must not ask for it, so only the main thread does.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return None
    prctl = ctypes.CDLL(None).prctl  # found before the fork: the child should do very little
    parent = os.getpid()
    set_parent_death_signal = 1

    def in_child() -> None:
        prctl(set_parent_death_signal, int(signal_sent))
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return in_child
