from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobguard.host import beat_process
from jobguard.host.beat_process import BeatProcess, _Substitute
from jobguard.model import Beat, new_token
from tests.support import eventually

SPEC: dict[str, Any] = {"source": 1, "namespace": "default", "interval": 0.1, "settings": {}}
ME = Beat(worker=new_token(), counter=3, claims=[], name="w", host="h", pid=1, queues=["mail"])


@pytest.fixture
def process() -> Iterator[BeatProcess]:
    """Give a stand-in that listens."""
    made = BeatProcess(SPEC)
    made.beat(ME, "")
    assert made.pid
    yield made
    made.close()


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and it is no corpse."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


class TestTheWorkersEnd:
    """What a worker does for its stand-in, and it for the worker."""

    def test_it_ends_when_it_is_let_go(self, process: BeatProcess) -> None:
        """And leaves no corpse."""
        pid = process.pid
        process.close()
        assert not Path(f"/proc/{pid}").exists()

    def test_it_outlives_the_signals_that_are_meant_for_its_worker(
        self, process: BeatProcess
    ) -> None:
        """Ctrl-C and a supervisor's SIGTERM reach the whole group."""
        # At once: nobody waits for an interpreter to have begun.
        for ordered in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(process.pid, ordered)
        time.sleep(0.1)
        assert is_alive(process.pid)

    def test_one_that_was_killed_is_followed_by_another(
        self, process: BeatProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At the next beat."""
        monkeypatch.setattr(beat_process, "_AGAIN", 0.0)
        first = process.pid
        os.kill(first, signal.SIGKILL)
        eventually(lambda: not is_alive(first))
        process.begins("a")
        process.beat(ME, "")
        assert process.pid not in (0, first)

    def test_one_that_does_not_keep_up_holds_nobody_up(self, process: BeatProcess) -> None:
        """It is let go, and nothing waits for it."""
        os.kill(process.pid, signal.SIGSTOP)
        began = time.monotonic()
        for _ in range(10_000):
            process.begins("f" * 32)
        assert time.monotonic() - began < 5
        os.kill(process.pid, signal.SIGCONT)

    def test_a_fork_of_the_worker_has_none(self, process: BeatProcess) -> None:
        """It neither speaks to its parent's, nor ends it."""
        child = os.fork()
        if child == 0:
            process.begins("a")
            process.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert is_alive(process.pid)

    @pytest.mark.parametrize("pipe", ["closed", "held by a fork"])
    def test_it_dies_with_its_worker(self, tmp_path: Path, pipe: str) -> None:
        """Also where a fork of the worker holds the pipe open and lives on."""
        log = tmp_path / "pids"
        program = f"""
import os, signal, time
from jobguard.model import Beat, new_token
from jobguard.host.beat_process import BeatProcess
stand_in = BeatProcess({SPEC!r})
stand_in.beat(Beat(worker=new_token(), counter=1, claims=[]), "")
child = 0
if {pipe != "closed"}:
    child = os.fork()
    if not child:
        time.sleep(60)
open({str(log)!r}, "w").write(f"{{stand_in.pid}} {{child}}\\n")
os.kill(os.getpid(), signal.SIGKILL)
"""
        subprocess.run([sys.executable, "-c", program], check=False, timeout=30)
        pid, child = map(int, log.read_text().split())
        eventually(lambda: not is_alive(pid), 5)
        if child:
            os.kill(child, signal.SIGKILL)


class Substitute(_Substitute):
    """The other end, whose beats are noted."""

    def __init__(self) -> None:
        super().__init__(-1)
        self.beaten: list[set[str]] = []

    def _beat(self) -> None:
        self.beaten.append(set(self._claims))

    def reported(self, *lines: str) -> None:
        """Hear these, torn as a pipe may tear them."""
        data = "".join(f"{line}\n" for line in lines).encode()
        self._hear(data[:5])
        self._hear(data[5:])

    def is_due(self) -> bool:
        """Whether it would beat now."""
        return self._is_due()


def beat(*claims: str) -> str:
    """Return how a worker tells a beat."""
    return "b" + json.dumps({"beat": {"counter": 1, "claims": claims}, "conninfo": ""})


class TestTheOtherEnd:
    """When it beats, and with what."""

    @pytest.fixture
    def other(self, monkeypatch: pytest.MonkeyPatch) -> Substitute:
        """Give one that was told how often its worker beats."""
        made = Substitute()
        made.reported("s" + json.dumps({"interval": 0.1, "parent": os.getppid()}))
        return made

    def test_it_is_silent_while_the_worker_beats(self, other: Substitute) -> None:
        """And as long as it was told of no beat."""
        assert not other.is_due()
        other.reported(beat())
        assert not other.is_due()
        time.sleep(0.2)
        assert other.is_due()
        other.reported(beat())
        assert not other.is_due()

    def test_it_knows_what_began_and_ended_since_the_beat(self, other: Substitute) -> None:
        """What was claimed a moment before the interpreter was held, above all."""
        other.reported(beat("a", "b"), "+c", "-a")
        assert other._claims == {"b", "c"}
        other.reported(beat("d"))
        assert other._claims == {"d"}

    def test_what_it_says_is_newer_than_a_beat_whose_list_was_made_before(
        self, other: Substitute
    ) -> None:
        """A beat is counted when its list is made: the worker may be held before it sends it."""
        other.reported(beat("a"), "n2097152", "+b")
        assert other._received is not None
        assert other._received["beat"]["counter"] == 2 << 20
        assert other._claims == {"a", "b"}

    def test_a_claim_is_no_sign_of_life(self, other: Substitute) -> None:
        """A worker whose beats do not come is spoken for, whatever else it does."""
        other.reported(beat())
        time.sleep(0.2)
        other.reported("+c")
        assert other.is_due()

    def test_it_does_not_speak_for_a_worker_that_is_stopped(
        self, other: Substitute, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Somebody stopped it, and its jobs are better off elsewhere."""
        stopped = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        try:
            other._parent = stopped.pid
            other.reported(beat())
            time.sleep(0.2)
            assert other.is_due()
            os.kill(stopped.pid, signal.SIGSTOP)
            eventually(lambda: not other.is_due())
        finally:
            stopped.kill()
            stopped.wait()
