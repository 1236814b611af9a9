"""The data of the demo for each library, without a run."""

from __future__ import annotations

import shlex

import pytest

from jobguard.demo.harness import WORK_SECONDS, work_seconds
from jobguard.demo.ledger import Mark
from jobguard.demo.libraries import NAMES, WorkerPool, named

MAIN, CHILD, OTHER = 10, 11, 12


@pytest.mark.parametrize("name", NAMES)
def test_a_library_knows_its_name(name: str) -> None:
    """The figures contain the name."""
    assert named(name).name == name == named(name).title.lower()


@pytest.mark.parametrize(
    ("name", "worker_pool", "at_once"),
    [
        ("rq", WorkerPool(8), 8),
        ("celery", WorkerPool(2, processes=4), 8),
        ("dramatiq", WorkerPool(2, threads=30), 60),
    ],
)
def test_the_usual_worker_pool_on_four_cores(
    name: str, worker_pool: WorkerPool, at_once: int
) -> None:
    """Each library has the number of workers that it usually runs with."""
    assert named(name).worker_pool(None, 4) == worker_pool
    assert worker_pool.at_once == at_once


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_workers_can_be_named(name: str) -> None:
    """A worker is a process that can be killed, in every library."""
    assert named(name).worker_pool(5, 4).workers == 5


def test_the_commands_are_those_a_user_types() -> None:
    """There is one command for each worker; Dramatiq starts all its workers with one command."""
    reported = {
        name: [
            shlex.join(command) for command in named(name).commands(named(name).worker_pool(3, 2))
        ]
        for name in NAMES
    }
    assert reported["rq"] == ["-m jobguard.demo.apps.rq_worker demo"] * 3
    assert reported["celery"] == [
        "-m celery -A jobguard.demo.apps.celery worker --loglevel WARNING"
        f" --concurrency 2 --hostname demo-{number}@%h"
        for number in range(3)
    ]
    assert reported["dramatiq"] == [
        "-m dramatiq jobguard.demo.apps.dramatiq --processes 3 --threads 30"
    ]


@pytest.mark.parametrize(("name", "worker"), [("rq", CHILD), ("celery", MAIN), ("dramatiq", CHILD)])
def test_a_worker_is_the_process_that_beats(name: str, worker: int) -> None:
    """For Celery it is the main process, whose child ran the job; else the process that ran the job."""
    mark = Mark(pid=CHILD, at=1.0, parent=MAIN)
    assert named(name).worker_of(mark) == worker
    assert mark.is_of(worker) and not mark.is_of(OTHER)


@pytest.mark.parametrize("cores", [1, 2, 8])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("workers", [None, 1, 3, 40])
def test_no_worker_pool_is_faster_than_the_producer(
    name: str, workers: int | None, cores: int
) -> None:
    """The rate of all workers together is bounded, and lower on a machine with few cores."""
    library = named(name)
    worker_pool = library.worker_pool(workers, cores)
    takes = work_seconds(library, worker_pool, cores)
    assert takes >= WORK_SECONDS
    rate = worker_pool.at_once / (takes + library.overhead_seconds)
    assert rate <= library.jobs_a_second + 0.01
    if worker_pool.workers * worker_pool.processes > 2 * cores:
        assert rate <= 100.01 * cores
