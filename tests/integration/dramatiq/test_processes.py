"""Worker processes: the command, its death, and a job that blocks the interpreter of its process."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobguard.guard import JobGuard
from tests.conformance.words import Records
from tests.databases import rows
from tests.integration.dramatiq.stage import Stage, program
from tests.support import eventually

APP = "tests.integration.dramatiq.app"
STAGE = "tests.integration.dramatiq.stage"


def workers(database: str) -> list[tuple[int, list[str]]]:
    """Return the pid and the queues of each worker that beats."""
    alive = "select pid, queues from jobguard.workers where left_at is null and dead_at is null"
    return rows(database, alive)


def beats_of_beat_process(surroundings: Mapping[str, str], pid: int) -> int:
    """Return how often the beat process of a worker has beaten since the worker's own last beat."""
    query = "select beat %% 1048576 from jobguard.workers where pid = %s"
    ((count,),) = rows(surroundings["JOBGUARD_POSTGRES_URL"], query, pid)
    return int(count)


def test_the_command_with_processes_and_threads(
    stage: Stage,
    guard: JobGuard,
    records: Records,
    database: str,
    surroundings: Mapping[str, str],
    reconciler: Any,
) -> None:
    """Each process of the command is a worker, each message runs once, and SIGTERM ends all of them."""
    command = ("-m", "dramatiq", APP, "--processes", "2", "--threads", "4")
    with program(*command, environ=surroundings) as master:
        eventually(lambda: len(workers(database)) == 2, 30)
        assert {tuple(queues) for _, queues in workers(database)} == {("default",)}
        reconciler()
        for word in range(40):
            stage.actor("say").send(word)
        stage.actor("later").send("async")
        eventually(lambda: len(stage.said()) == 42, 30)
        assert len(set(stage.said())) == 42
        eventually(lambda: records.owed() == [])
        family = psutil.Process(master.pid).children(recursive=True)
        assert sum("beat_process.py" in " ".join(child.cmdline()) for child in family) == 2
        master.send_signal(signal.SIGTERM)
        master.wait(120)
        eventually(lambda: workers(database) == [])
        _, alive = psutil.wait_procs(family, timeout=60)
        assert alive == []


def test_jobs_of_a_worker_that_is_killed_come_back(
    stage: Stage,
    guard: JobGuard,
    records: Records,
    surroundings: Mapping[str, str],
    reconciler: Any,
) -> None:
    """Running, fetched and delayed messages of a killed worker come back once, within its timeout."""
    with ExitStack() as stack:
        first = stack.enter_context(program("-m", STAGE, "2", environ=surroundings))
        reconciler()
        for word in "abcd":
            stage.actor("wait").send(word)
        stage.actor("say").send_with_options(args=("late",), delay=1500)
        eventually(lambda: len(stage.said()) == 2, 20)
        eventually(lambda: not stage.client.exists("dramatiq:default", "dramatiq:default.DQ"))
        for word in "abcd":
            stage.gate(word).touch() if f"{word}:begun" not in stage.said() else None
        os.kill(first.pid, signal.SIGKILL)
        stack.enter_context(program("-m", STAGE, "2", environ=surroundings))
        for word in "abcd":
            stage.gate(word).touch()
        eventually(lambda: {"a", "b", "c", "d", "late"} <= set(stage.said()), 20)
        eventually(lambda: records.owed() == [])
        counts = {word: stage.said().count(word) for word in ("a", "b", "c", "d", "late")}
        assert counts == dict.fromkeys(counts, 1)


class TestBlockedInterpreter:
    """A job that stays in a C call which keeps the GIL."""

    @pytest.fixture
    def surroundings(self, surroundings: Mapping[str, str]) -> Mapping[str, str]:
        """Allow the time that a beat process needs on a busy machine to import psycopg."""
        return {
            **surroundings,
            "JOBGUARD_WORKER_TIMEOUT": "5",
            "JOBGUARD_BEAT_INTERVAL": "0.5",
        }

    @pytest.mark.parametrize("apart", [True, False])
    def test_it_is_not_recovered(
        self,
        stage: Stage,
        guard: JobGuard,
        records: Records,
        surroundings: Mapping[str, str],
        reconciler: Any,
        apart: bool,
    ) -> None:
        """A job that blocks for two worker timeouts runs once; without a beat process it runs twice."""
        theirs = dict(surroundings) if apart else {**surroundings, "STAGE_NO_BEAT_PROCESS": "1"}
        with ExitStack() as stack:
            stack.enter_context(program("-m", STAGE, "1", environ=theirs))
            reconciler()
            sent = stage.actor("hold").send("a", 12)
            eventually(lambda: stage.said() == ["a:begun"], 20)
            stack.enter_context(program("-m", STAGE, "1", environ=surroundings))
            eventually(lambda: "a" in stage.said(), 40)
            if apart:
                assert stage.said() == ["a:begun", "a"]
                eventually(lambda: records.ended(sent.message_id) == [("completed", 1)])
            else:
                assert stage.said().count("a:begun") == 2

    def test_its_worker_killed_meanwhile_is_dead(
        self,
        stage: Stage,
        guard: JobGuard,
        records: Records,
        surroundings: Mapping[str, str],
        reconciler: Any,
    ) -> None:
        """If the worker is killed, its beat process dies with it, and its job comes back."""
        with ExitStack() as stack:
            first = stack.enter_context(program("-m", STAGE, "1", environ=surroundings))
            reconciler()
            stage.actor("hold").send("a", 9)
            eventually(lambda: stage.said() == ["a:begun"], 20)
            eventually(lambda: beats_of_beat_process(surroundings, first.pid) > 0)
            (beat_process,) = psutil.Process(first.pid).children()
            os.kill(first.pid, signal.SIGKILL)
            beat_process.wait(60)
            stack.enter_context(program("-m", STAGE, "1", environ=surroundings))
            eventually(lambda: stage.said() == ["a:begun", "a:begun", "a"], 40)


@pytest.mark.parametrize("more", [(), ("--use-spawn",)])
def test_a_worker_is_guarded_by_its_environment(
    more: tuple[str, ...],
    stage: Stage,
    guard: JobGuard,
    database: str,
    records: Records,
    surroundings: Mapping[str, str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """``jobguard run -- dramatiq app`` guards a worker whose application calls no guard(), and knows it."""
    command = ("-c", "from jobguard.cli import main; main()", "run", "--", sys.executable, "-m")
    theirs = {**surroundings, "STAGE_GUARD": "0"}
    options = ("dramatiq", APP, "--processes", "1", "--threads", "1")
    with program(*command, *options, *more, environ=theirs) as master:
        eventually(lambda: len(workers(database)) == 1, 30)
        sent = stage.actor("say").send("a")
        eventually(lambda: records.ended(sent.message_id) == [("completed", 1)], 20)
        master.send_signal(signal.SIGTERM)
        master.wait(60)
    assert "nothing was guarded" not in capfd.readouterr().err


def test_a_job_that_is_killed_again_and_again_is_dead(
    stage: Stage,
    guard: JobGuard,
    records: Records,
    surroundings: Mapping[str, str],
    reconciler: Any,
    tmp_path: Path,
) -> None:
    """A job that kills its worker again and again is dead, and is shown among the dead letters."""
    with ExitStack() as stack:
        sent: Any = None
        for run in range(2):
            worker = stack.enter_context(program("-m", STAGE, "1", environ=surroundings))
            if sent is None:
                reconciler()
                sent = stage.actor("wait").send("a")
            eventually(lambda: len(stage.said()) == run + 1, 30)  # noqa: B023 - called at once
            os.kill(worker.pid, signal.SIGKILL)
        eventually(lambda: records.ended(sent.message_id) == [("dead", 1)], 30)
        dead = "dramatiq:default.XQ.msgs", sent.options["redis_message_id"]
        eventually(lambda: stage.client.hexists(*dead))


@pytest.mark.skipif(importlib.util.find_spec("gevent") is None, reason="needs gevent")
def test_the_command_with_greenlets(
    stage: Stage,
    guard: JobGuard,
    records: Records,
    database: str,
    surroundings: Mapping[str, str],
) -> None:
    """With dramatiq-gevent, claims and ends are recorded and workers sign off as with threads."""
    command = Path(sys.executable).with_name("dramatiq-gevent")
    options = (str(command), APP, "--processes", "1", "--threads", "8")
    with program(*options, environ=surroundings) as master:
        eventually(lambda: len(workers(database)) == 1, 30)
        for word in range(40):
            stage.actor("say").send(word)
        stage.actor("flaky").send_with_options(args=("f",), max_retries=1)
        eventually(lambda: len(stage.said()) == 42, 30)
        eventually(lambda: records.owed() == [])
        assert records.claims() == []
        master.send_signal(signal.SIGTERM)
        master.wait(120)
        eventually(lambda: workers(database) == [])
