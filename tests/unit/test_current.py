from __future__ import annotations

import threading
from uuid import UUID, uuid4

import jobguard
from jobguard.current import CurrentJob, running


class Claim:
    """The claim of a job, and the locks that other jobs have."""

    def __init__(self, *others: str) -> None:
        self.others = set(others)
        self.mine: set[str] = set()
        self.worker = uuid4()
        self.asked = 0

    def predecessor(self) -> UUID | None:
        """Return the worker that ran the job before."""
        return self.worker

    def lock(self, name: str) -> bool:
        """Take the lock unless another job has it."""
        self.asked += 1
        if name in self.others:
            return False
        self.mine.add(name)
        return True

    def unlock(self, name: str) -> None:
        """Release the lock."""
        self.mine.remove(name)


def test_outside_of_a_job_nothing_is_locked() -> None:
    """The same code runs in a test or with an inert guard, without a wait."""
    with jobguard.lock("import") as mine:
        assert mine
    job = jobguard.current()
    assert (job.recovered, job.crashes, job.predecessor) == (False, 0, None)


def test_a_lock_is_taken_inside_and_released_after() -> None:
    """A lock is released also after an error; inside of itself it is the same lock."""
    claim = Claim()
    with running(CurrentJob("a", 1, _claim=claim)):
        with jobguard.lock("import") as mine:
            assert mine and claim.mine == {"import"}
            with jobguard.lock("import") as again:
                assert again
            assert claim.mine == {"import"}
        assert claim.mine == set()
        try:
            with jobguard.lock("import"):
                raise ValueError
        except ValueError:
            pass
        assert claim.mine == set()


def test_a_lock_of_another_is_waited_for_in_bounded_time() -> None:
    """Without a wait the block gets False at once; with a wait, True as soon as the lock is free."""
    claim = Claim("import")
    with running(CurrentJob("a", 1, _claim=claim)):
        with jobguard.lock("import") as mine:
            assert not mine
        assert claim.asked == 1
        with jobguard.lock("import", wait=0.1) as mine:
            assert not mine
        timer = threading.Timer(0.1, claim.others.clear)
        timer.start()
        with jobguard.lock("import", wait=30) as mine:
            assert mine
        timer.join()


def test_a_first_run_asks_for_no_predecessor() -> None:
    """Only a recovered job asks the ledger for its predecessor."""
    claim = Claim()
    assert CurrentJob("a", 1, _claim=claim).predecessor is None
    assert CurrentJob("a", 1, recovered=True, _claim=claim).predecessor == claim.worker
