"""Threads of the operating system, also after monkey patching."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import jobguard
from jobguard import adapters, os_threads
from tests.support import eventually


def test_a_thread_runs_and_sets_its_event_at_the_end() -> None:
    """The event is set also if the work raises."""
    seen: list[str] = []
    ended = os_threads.start(lambda: seen.append("ran"), name="one")
    assert ended.wait(10)
    assert seen == ["ran"]


def test_an_event_lets_through_until_it_is_cleared() -> None:
    """Repeated sets and earlier waits change nothing."""
    event = os_threads.Event()
    assert not event.wait(0)
    event.set()
    event.set()
    assert event.wait(0) and event.wait(0) and event.is_set()
    event.clear()
    assert not event.wait(0) and not event.is_set()


def test_an_event_wakes_the_waiting_thread() -> None:
    """The thread wakes at once."""
    event, woken = os_threads.Event(), threading.Event()

    def wait() -> None:
        if event.wait(60):
            woken.set()

    threading.Thread(target=wait, daemon=True).start()
    time.sleep(0.01)
    event.set()
    eventually(woken.is_set)


STARVED = """
from gevent import monkey
monkey.patch_all()
import gevent, time
import jobguard
from jobguard import adapters, os_threads

assert os_threads.is_patched()
beats = []
stop = os_threads.Event()

def beat():
    while not stop.wait(0.02):
        beats.append(1)

ended = os_threads.start(beat, name="beat")
until = time.perf_counter() + 60.0
while len(beats) < 5 and time.perf_counter() < until:
    pass  # a task that computes, and never lets another greenlet run
count = len(beats)
stop.set()
assert ended.wait(10)
assert count >= 5, count
"""


def test_a_greenlet_that_computes_does_not_stop_our_threads() -> None:
    """After gevent's patching, a thread of Python would not beat once."""
    pytest.importorskip("gevent")
    result = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_opentelemetry_sees_nothing_of_a_thread_of_ours() -> None:
    """Traffic of jobguard's thread makes no spans; traffic of the host does."""
    utils = pytest.importorskip("opentelemetry.instrumentation.utils")
    enabled: list[bool] = []
    os_threads.start(lambda: enabled.append(utils.is_instrumentation_enabled()), name="ours").wait(
        10
    )
    assert enabled == [False]
    assert utils.is_instrumentation_enabled()


def test_a_write_lets_no_other_greenlet_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer may have a lock of the operating system, and another greenlet would wait for the lock."""

    def green(*_: Any) -> int:
        raise AssertionError("eventlet would switch to another greenlet")

    raw = SimpleNamespace(write=os.write)
    reader, writer = os.pipe()
    patcher = SimpleNamespace(is_monkey_patched=lambda _: True, original=lambda _: raw)

    monkeypatch.setattr(os, "write", green)
    monkeypatch.setitem(sys.modules, "eventlet.patcher", patcher)
    try:
        assert os_threads.write(writer, b"beat") == 4
        assert os.read(reader, 4) == b"beat"
    finally:
        os.close(reader)
        os.close(writer)


LATE_PATCH = """
import jobguard.host.tracker, jobguard.host.transaction  # `gunicorn --preload -k gevent` imports first
from gevent import monkey
monkey.patch_all()
import gevent
from jobguard.host.group_commit import GroupCommit

def write(rows):
    gevent.sleep(0.02)
    return len(rows)

commits = GroupCommit(write, timeout=5.0)
callers = [gevent.spawn(commits.submit, [n]) for n in range(20)]
gevent.joinall(callers, timeout=2.5)
print(sum(caller.successful() for caller in callers))
"""


def test_greenlets_share_a_commit_also_if_they_came_after_our_import() -> None:
    """A caller that waits for the commit of another greenlet lets that greenlet run."""
    pytest.importorskip("gevent")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LATE_PATCH],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["20"], done.stderr[-2000:]


def test_no_dataclass_keeps_a_lock_of_the_time_of_its_import() -> None:
    """Each lock is made from what ``threading`` has at that moment."""
    root = Path(jobguard.__file__).parent
    files = [*root.rglob("*.py"), *Path(adapters.__file__).parent.rglob("*.py")]
    assert [str(file) for file in files if "default_factory=threading." in file.read_text()] == []
