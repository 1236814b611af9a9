from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobguard.host import beat_process
from jobguard.host.beat_process import BeatProcess, _BeatProgram
from jobguard.host.beats import BeatSender
from jobguard.host.in_flight import InFlight
from jobguard.model import Beat, new_token
from jobguard.settings import Settings
from tests.support import eventually

SPEC: dict[str, Any] = {
    "source": 1,
    "namespace": "default",
    "interval": 0.1,
    "timeout": 0.5,
    "settings": {},
}
ME = Beat(worker=new_token(), counter=3, claims=[], name="w", host="h", pid=1, queues=["mail"])


@pytest.fixture
def process() -> Iterator[BeatProcess]:
    """Start a beat process that listens."""
    made = BeatProcess(SPEC)
    made.beat(ME, "")
    assert made.pid
    yield made
    made.close()


def is_alive(pid: int) -> bool:
    """Return True if there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


class Vault:
    """A source of keys that can be neither copied nor written as JSON."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def keys(self) -> list[str]:
        """Return the keys."""
        return []


def test_a_callable_that_returns_keys_stays_in_the_worker() -> None:
    """The settings go through the pipe without the callable of the setting encrypt."""
    tracker: Any = SimpleNamespace(
        source=SimpleNamespace(id=1, namespace="default"), settings=Settings(encrypt=Vault().keys)
    )
    store: Any = SimpleNamespace(conninfo=lambda: "")
    in_flight = InFlight(os.getpid())
    sender = BeatSender(
        tracker,
        store,
        in_flight,
        name="w",
        queues=["mail"],
        inherited=None,
        lists=None,
        unflushed=lambda: None,
    )
    sender.start_beat_process()
    assert in_flight.beat_process is not None
    sent = json.loads(json.dumps(in_flight.beat_process._spec))
    assert Settings(**sent["settings"]).encrypt is None


class TestWorkerEnd:
    """The worker's end of the pipe."""

    def test_it_ends_when_it_is_closed(self, process: BeatProcess) -> None:
        """A closed beat process ends and leaves no zombie."""
        pid = process.pid
        process.close()
        assert not Path(f"/proc/{pid}").exists()

    def test_it_outlives_the_signals_that_are_meant_for_its_worker(
        self, process: BeatProcess
    ) -> None:
        """The beat process ignores Ctrl-C and a supervisor's SIGTERM, which reach the whole group."""
        # Signal at once, without a wait for the interpreter's start.
        for ordered in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(process.pid, ordered)
        time.sleep(0.1)
        assert is_alive(process.pid)

    def test_one_that_was_killed_is_followed_by_another(
        self, process: BeatProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The next beat starts a new process after the last one was killed."""
        monkeypatch.setattr(beat_process, "_AGAIN", 0.0)
        first = process.pid
        os.kill(first, signal.SIGKILL)
        eventually(lambda: not is_alive(first))
        process.begins("a")
        process.flush()
        process.beat(ME, "")
        assert process.pid not in (0, first)

    def test_one_that_does_not_keep_up_delays_no_caller(self, process: BeatProcess) -> None:
        """A process that does not read its pipe is ended, and the worker does not wait for it."""
        os.kill(process.pid, signal.SIGSTOP)
        for _ in range(10_000):  # a call that waited would never return
            process.begins("f" * 32)
            process.flush()
        os.kill(process.pid, signal.SIGCONT)

    def test_an_end_is_written_with_the_next_start(
        self, process: BeatProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ends wait for the next start, so that a job costs one write; the order stays."""
        written: list[bytes] = []

        def write(descriptor: int, data: bytes) -> int:
            written.append(data)
            return os.write(descriptor, data)

        monkeypatch.setattr(process._os, "write", write)
        process.begins("a")
        process.flush()
        process.ends("a")
        process.begins("b")
        process.flush()
        process.flush()
        assert written == [b"+a\n", b"-a\n+b\n"]

    def test_a_fork_of_the_worker_has_none(self, process: BeatProcess) -> None:
        """A fork of the worker neither reports to the parent's beat process nor ends it."""
        child = os.fork()
        if child == 0:
            process.begins("a")
            process.flush()
            process.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert is_alive(process.pid)

    @pytest.mark.parametrize("pipe", ["closed", "open in a fork"])
    def test_it_dies_with_its_worker(self, tmp_path: Path, pipe: str) -> None:
        """The beat process ends with its worker, even if a fork of the worker keeps the pipe open."""
        log = tmp_path / "pids"
        program = f"""
import os, signal, time
from jobguard.model import Beat, new_token
from jobguard.host.beat_process import BeatProcess
beat_process = BeatProcess({SPEC!r})
beat_process.beat(Beat(worker=new_token(), counter=1, claims=[]), "")
child = 0
if {pipe != "closed"}:
    child = os.fork()
    if not child:
        time.sleep(60)
open({str(log)!r}, "w").write(f"{{beat_process.pid}} {{child}}\\n")
os.kill(os.getpid(), signal.SIGKILL)
"""
        subprocess.run([sys.executable, "-c", program], check=False, timeout=120)
        pid, child = map(int, log.read_text().split())
        eventually(lambda: not is_alive(pid))
        if child:
            os.kill(child, signal.SIGKILL)


class NotedBeatProgram(_BeatProgram):
    """The beat process's end, which notes its beats."""

    def __init__(self) -> None:
        super().__init__(-1)
        self.beaten: list[set[str]] = []

    def _beat(self) -> None:
        self.beaten.append(set(self._claims))

    def reported(self, *lines: str) -> None:
        """Receive these lines in two parts, as a pipe may split them."""
        data = "".join(f"{line}\n" for line in lines).encode()
        if not data:
            return
        self._receive(data[:5])
        self._receive(data[5:])

    def is_due(self) -> bool:
        """Return True if it would beat now."""
        return self._is_due()


def test_reports_of_a_busy_worker_wait_in_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program rests after a read, so that it is not woken for each job; it misses no report."""
    reader, writer = os.pipe()
    program, reads = NotedBeatProgram(), []
    program._pipe = reader

    def read(descriptor: int, most: int) -> bytes:
        reads.append(data := os.read(descriptor, most))
        return data

    def rest(_: float) -> None:
        if len(reads) == 1:
            os.write(writer, b"-a\n+b\n")
            os.write(writer, b"+c\n")
            os.close(writer)

    monkeypatch.setattr(beat_process, "os", SimpleNamespace(read=read, getppid=os.getppid))
    monkeypatch.setattr(beat_process, "time", SimpleNamespace(sleep=rest, monotonic=time.monotonic))
    monkeypatch.setattr(program, "_wait", lambda: 0.0)
    os.write(writer, b"+a\n")
    program.run()
    os.close(reader)

    assert reads == [b"+a\n", b"-a\n+b\n+c\n", b""]
    assert program._claims == {"b", "c"}


def beat(*claims: str) -> str:
    """Return a beat as the worker reports it."""
    return "b" + json.dumps({"beat": {"counter": 1, "claims": claims}, "conninfo": ""})


class TestProcessEnd:
    """When the beat process beats, and with which claims."""

    @pytest.fixture
    def other(self, monkeypatch: pytest.MonkeyPatch) -> NotedBeatProgram:
        """Return one that knows the beat interval of its worker."""
        made = NotedBeatProgram()
        made.reported("s" + json.dumps({"interval": 0.1, "parent": os.getppid()}))
        return made

    def test_it_is_silent_while_the_worker_beats(self, other: NotedBeatProgram) -> None:
        """It sends no beat while the worker beats, nor before the first report of a beat."""
        assert not other.is_due()
        other._spec["interval"] = 60.0
        other.reported(beat())
        assert not other.is_due()
        other._beat_received_at -= 1_000.0
        assert other.is_due()
        other.reported(beat())
        assert not other.is_due()

    def test_it_knows_what_began_and_ended_since_the_beat(self, other: NotedBeatProgram) -> None:
        """It knows the claims that started or ended between the last beat and the block."""
        other.reported(beat("a", "b"), "+c", "-a")
        assert other._claims == {"b", "c"}
        other.reported(beat("d"))
        assert other._claims == {"d"}

    def test_its_beat_is_newer_than_a_beat_whose_list_was_made_before(
        self, other: NotedBeatProgram
    ) -> None:
        """A beat is counted when its list is made: the worker may be blocked before the send."""
        other.reported(beat("a"), "n2097152", "+b")
        assert other._received is not None
        assert other._received["beat"]["counter"] == 2 << 20
        assert other._claims == {"a", "b"}

    def test_a_claim_is_no_sign_of_life(self, other: NotedBeatProgram) -> None:
        """A worker whose beats do not come gets beats from this process, even if it reports claims."""
        other.reported(beat())
        other._beat_received_at -= 1_000.0
        other.reported("+c")
        assert other.is_due()

    @pytest.mark.parametrize(
        ("parent", "lines", "is_dead"),
        [
            (1, (beat(),), True),
            (os.getppid(), (beat(),), False),  # The pipe is closed, and the worker lives.
            (0, (beat(),), False),  # The worker is in another PID namespace.
            (1, (beat(), "q"), False),  # The worker ended this process itself.
            (1, (), False),  # Postgres does not know the worker.
        ],
    )
    def test_only_another_parent_proves_a_death(
        self,
        other: NotedBeatProgram,
        monkeypatch: pytest.MonkeyPatch,
        parent: int,
        lines: tuple[str, ...],
        *,
        is_dead: bool,
    ) -> None:
        """A pipe that is closed proves nothing: the worker may have closed all its descriptors."""
        other.reported(*lines)
        monkeypatch.setattr(os, "getppid", lambda: parent)
        assert other._is_orphan() is is_dead

    def test_it_does_not_beat_for_a_worker_that_is_stopped(
        self, other: NotedBeatProgram, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It does not beat for a stopped worker, whose jobs should run elsewhere."""
        stopped = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        try:
            other._parent = stopped.pid
            other.reported(beat())
            other._beat_received_at -= 1_000.0
            assert other.is_due()
            os.kill(stopped.pid, signal.SIGSTOP)
            eventually(lambda: not other.is_due())
        finally:
            stopped.kill()
            stopped.wait()
