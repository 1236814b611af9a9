from __future__ import annotations

import threading
from collections.abc import Sequence
from uuid import UUID

import pytest

from jobguard.errors import BadRow, StoreUnavailable
from jobguard.host.group_commit import _LARGEST, GroupCommit
from jobguard.model import Delivery, Recorded
from tests.fakes.world import delivery
from tests.support import eventually

LONG = 10.0


class Stage:
    """A store whose first commit can be blocked, so that other callers gather behind it."""

    def __init__(self, timeout: float = LONG) -> None:
        self.writes: list[list[UUID]] = []
        self.bad: set[UUID] = set()
        self.error: BaseException | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()
        self.commit = GroupCommit(self._write, timeout=timeout)
        self.answers: dict[UUID, Recorded | BaseException] = {}
        self.threads: list[threading.Thread] = []

    def _write(self, rows: Sequence[Delivery]) -> Recorded:
        self.writes.append([row.token for row in rows])
        self.begun.set()
        assert self.gate.wait(LONG)
        error, self.error = self.error, None
        if error is not None:
            raise error
        if bad := {row.token for row in rows} & self.bad:
            raise BadRow(f"{len(bad)} bad")
        return Recorded(leader_live=True)

    def submit(self, *rows: Delivery) -> None:
        """Submit in a separate thread, and keep the answer."""

        def run() -> None:
            try:
                self.answers[rows[0].token] = self.commit.submit(rows)
            except BaseException as error:
                self.answers[rows[0].token] = error

        thread = threading.Thread(target=run, daemon=True)
        self.threads.append(thread)
        thread.start()

    def hold(self) -> Delivery:
        """Start a commit that stays under way until release()."""
        self.gate.clear()
        self.begun.clear()
        first = delivery("first")
        self.submit(first)
        assert self.begun.wait(LONG)
        return first

    def gathered(self, parts: int) -> None:
        """Wait until this many callers are in the open batch."""
        eventually(lambda: self.commit._open is not None and len(self.commit._open.parts) >= parts)

    def release(self) -> None:
        """Let everything finish."""
        self.gate.set()
        for thread in self.threads:
            thread.join(LONG)
            assert not thread.is_alive()


def test_a_lone_caller_pays_one_commit() -> None:
    """One caller's rows are one statement, committed when submit() returns."""
    stage = Stage()
    rows = [delivery("a"), delivery("b")]

    answer = stage.commit.submit(rows)

    assert answer == Recorded(leader_live=True)
    assert stage.writes == [[row.token for row in rows]]


def test_followers_share_one_commit() -> None:
    """Callers that come while a commit is under way share the next one, in their order."""
    stage = Stage()
    first = stage.hold()
    others = [delivery(str(n)) for n in range(8)]
    for nth, other in enumerate(others, 1):
        stage.submit(other)
        stage.gathered(nth)
    stage.release()

    assert stage.writes == [[first.token], [other.token for other in others]]
    assert set(stage.answers) == {first.token, *(other.token for other in others)}
    assert all(isinstance(answer, Recorded) for answer in stage.answers.values())


def test_no_caller_returns_before_the_commit() -> None:
    """A caller that joined gets no answer while its batch is under way."""
    stage = Stage()
    stage.hold()
    follower = delivery("follower")
    stage.submit(follower)
    stage.gathered(1)

    assert follower.token not in stage.answers

    stage.release()
    assert follower.token in stage.answers


def test_a_bad_row_affects_only_its_caller() -> None:
    """A batch with one bad row is written caller by caller, so the other rows are recorded."""
    stage = Stage()
    stage.hold()
    good, bad, fine = delivery("good"), delivery("bad"), delivery("fine")
    stage.bad = {bad.token}
    for nth, row in enumerate((good, bad, fine), 1):
        stage.submit(row)
        stage.gathered(nth)
    stage.release()

    assert isinstance(stage.answers[bad.token], BadRow)
    assert isinstance(stage.answers[good.token], Recorded)
    assert isinstance(stage.answers[fine.token], Recorded)


def test_a_bad_row_alone() -> None:
    """A lone caller's bad row is that caller's error, and is not tried twice."""
    stage = Stage()
    bad = delivery()
    stage.bad = {bad.token}

    with pytest.raises(BadRow):
        stage.commit.submit([bad])

    assert len(stage.writes) == 1
    assert stage.commit.submit([delivery()])


def test_postgres_goes_away_under_a_batch() -> None:
    """Every caller that shared a failed commit gets its error, and the next batch is tried again."""
    stage = Stage()
    stage.hold()
    rows = [delivery(str(n)) for n in range(4)]
    for nth, row in enumerate(rows, 1):
        stage.submit(row)
        stage.gathered(nth)
    stage.error = None
    write = stage.commit._write

    def gone(given: Sequence[Delivery]) -> Recorded:
        stage.commit._write = write
        raise StoreUnavailable("gone")

    stage.commit._write = gone
    stage.release()

    for row in rows:
        assert isinstance(stage.answers[row.token], StoreUnavailable)
    assert isinstance(stage.commit.submit([delivery()]), Recorded)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_an_exception_in_the_leader_releases_its_followers(error: BaseException) -> None:
    """A signal's exception in the leader stays in the leader; its followers get an error at once."""
    stage = Stage()
    stage.hold()
    leader, follower = delivery("leader"), delivery("follower")
    stage.submit(leader)
    stage.gathered(1)
    stage.submit(follower)
    stage.gathered(2)
    write = stage.commit._write

    def interrupted(_rows: Sequence[Delivery]) -> Recorded:
        stage.commit._write = write
        raise error

    stage.commit._write = interrupted
    stage.release()

    assert stage.answers[leader.token] is error
    assert isinstance(stage.answers[follower.token], StoreUnavailable)
    assert isinstance(stage.commit.submit([delivery()]), Recorded)


def test_a_follower_waits_no_longer_than_its_timeout() -> None:
    """A batch that hangs costs its followers the timeout, and raises StoreUnavailable."""
    stage = Stage(timeout=0.05)
    first = stage.hold()
    leader, follower = delivery("leader"), delivery("follower")
    stage.submit(leader)
    stage.submit(follower)

    eventually(lambda: {leader.token, follower.token} <= set(stage.answers))
    assert isinstance(stage.answers[leader.token], StoreUnavailable)
    assert isinstance(stage.answers[follower.token], StoreUnavailable)
    assert first.token not in stage.answers

    stage.release()
    assert isinstance(stage.answers[first.token], Recorded)
    assert isinstance(stage.commit.submit([delivery()]), Recorded)


def test_a_batch_is_capped() -> None:
    """A caller that does not fit into a batch opens another; no batch is larger than the limit."""
    stage = Stage()
    stage.hold()
    most = [delivery(f"most-{n}") for n in range(_LARGEST - 1)]
    stage.submit(*most)
    stage.gathered(1)
    fits = delivery("fits")
    stage.submit(fits)
    stage.gathered(2)
    beyond = delivery("beyond")
    stage.submit(beyond)
    eventually(lambda: stage.commit._open is not None and stage.commit._open.size == 1)
    stage.release()

    assert sorted(map(len, stage.writes)) == [1, 1, _LARGEST]
    assert all(isinstance(answer, Recorded) for answer in stage.answers.values())


def test_more_than_a_batch_from_one_caller() -> None:
    """One caller's many rows are not split."""
    stage = Stage()
    rows = [delivery(str(n)) for n in range(_LARGEST * 2)]

    stage.commit.submit(rows)

    assert [len(write) for write in stage.writes] == [_LARGEST * 2]


def test_many_threads() -> None:
    """With many threads, every row is committed once, in fewer commits than rows."""
    stage = Stage()
    stage.hold()
    rows = [delivery(str(n)) for n in range(64)]
    for row in rows:
        stage.submit(row)
    stage.gathered(1)
    stage.release()

    written = [token for write in stage.writes for token in write]
    assert sorted(written) == sorted({row.token for row in rows} | {stage.writes[0][0]})
    assert len(stage.writes) <= 65
    assert all(isinstance(answer, Recorded) for answer in stage.answers.values())


def test_callers_of_a_batch_without_a_leader_wait_once() -> None:
    """A signal may interrupt the leader before it begins: the next caller leads a batch of its own."""
    stage = Stage(timeout=0.05)
    stage.commit._lead = lambda batch: None  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        stage.commit.submit([delivery("interrupted")])
    del stage.commit._lead
    with pytest.raises(StoreUnavailable):
        stage.commit.submit([delivery("waits")])
    assert stage.commit.submit([delivery("leads")]) == Recorded(leader_live=True)
