"""Job ids, queues, tasks, workers and joins of any text and any length, in both stores."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from jobguard.model import Claim, Ended, LastOutcome, Outcome, Parent, Part
from jobguard.store.protocols import QueueRow, SourceRow
from jobguard.store.texts import escaped, key, name, restored
from tests.contract.conftest import SOURCE, delivery

if TYPE_CHECKING:
    from tests.contract.conftest import Contract

_random = random.Random(7)
_LETTERS = [chr(code) for code in range(0x21, 0x3000) if chr(code).isprintable()]


def noise(length: int) -> str:
    """Return a text that cannot be compressed."""
    return "".join(_random.choices(_LETTERS, k=length))


TEXTS = {
    "one letter": "x",
    "3,000": noise(3_000),
    "100 kB": noise(40_000),
    "emoji": "💥👩‍👩‍👧",
    "nul": "a\x00b\x00",
    "half a pair": "a\udcffb\ud800",
    "our own mark": "\uf6a80000 \uf6a8",
    "empty": "",
}


@pytest.fixture(params=list(TEXTS.values()), ids=list(TEXTS))
def text(request: pytest.FixtureRequest) -> str:
    """Give one of the unusual texts."""
    return str(request.param)


def test_the_path_of_a_job(ledger: Contract, text: str) -> None:
    """A job with an unusual text is recorded, claimed, seen by the leader and ended under its id."""
    it = ledger.recorded(text, queue=text, task=text)
    (owed,) = ledger.owed().values()
    assert (owed.job_id, owed.queue, owed.task) == (text, text, text)
    assert ledger.leader.tally(SOURCE, after=None, limit=9) == ({text: 1}, None)
    worker = ledger.worker()
    worker.beat(name=text, queues=(text,))
    (row,) = ledger.leader.workers(SOURCE)
    assert (row.name, list(row.queues)) == (text, [text])
    claim = worker.start(it.token)
    assert ledger.store.heartbeat(SOURCE, job_id=text, progress=0.5, attrs={text: [{"a": text}]})
    (restorable,) = ledger.leader.envelopes(SOURCE, [it.token])
    assert (restorable.job_id, restorable.queue) == (text, text)
    assert ledger.leader.last_outcomes(SOURCE, [text]) == {text: LastOutcome(owed=True)}
    assert worker.end(claim, job_id=text, queue=text, task=text, error=text) is Ended.ENDED
    assert ledger.leader.last_outcomes(SOURCE, [text]) == {
        text: LastOutcome(False, Outcome.COMPLETED)
    }


def test_deliveries_of_one_id(ledger: Contract, text: str) -> None:
    """Supersession, retry and replay work with an unusual text."""
    first, second = ledger.recorded(text), ledger.recorded(text)
    assert list(ledger.owed()) == [second.token]
    claim = ledger.working().start(second.token)
    retry = ledger.recorded(text, parent=Parent(second.token, claim=claim.number))
    ledger.record(first, replay=True)
    assert list(ledger.owed()) == [retry.token]


def test_ends_and_cancels(ledger: Contract, text: str) -> None:
    """An unknown end, a cancel by id and a cancel by queue work with an unusual text."""
    unknown = delivery(text)
    worker = ledger.working()
    assert worker.end(Claim(unknown.token, 0), job_id=text, queue=text) is Ended.UNKNOWN
    ledger.record(unknown, replay=True)
    assert ledger.owed() == {}
    by_id, by_queue = ledger.recorded(text), ledger.recorded("other", queue=text)
    assert ledger.cancel(job_ids=[text]) == 1
    assert ledger.cancel(queue=text) == 1
    assert ledger.outcome(by_id.token) is ledger.outcome(by_queue.token) is Outcome.CANCELLED


def test_joins(ledger: Contract, text: str) -> None:
    """Joins with unusual ids work; two long ids that differ only at their end are two joins."""
    for name_ in (text, text + "2"):
        ledger.store.open_join(SOURCE, name_, size=2, state=b"s", namespace=ledger.namespace)
        worker = ledger.working()
        for job_id in (text, text + "2"):
            claim = worker.start(ledger.recorded(job_id, queue=text).token)
            worker.end(claim, part=Part(name_, b"p"))
    opened = ledger.leader.open_joins(SOURCE, after="", limit=10)
    assert {join.id for join in opened} == {text, text + "2"} - {""}
    for join in opened:
        assert {part.job_id for part in join.parts} == {text, text + "2"}
        assert {part.queue for part in join.parts} == {text}
    last = ledger.recorded("continuation", closes=text)
    assert ledger.record(delivery("late", closes=text)).refused
    assert last.token in ledger.owed()
    ledger.store.close_join(SOURCE, text + "2")
    assert ledger.leader.open_joins(SOURCE, after="", limit=10) == []


def test_trust(ledger: Contract, text: str) -> None:
    """The trust of a queue is stored under its name."""
    term = ledger.elected()
    row = SourceRow(SOURCE, ledger.namespace, "rq", "localhost:6379/0", "", None, "")
    ledger.store.register(row)
    it = ledger.recorded(queue=text)
    epoch = it.token
    ledger.leader.acknowledge(term, SOURCE, (None, None), (epoch, 1), run_id=None)
    for _ in range(2):
        ledger.leader.trust(term, [QueueRow(SOURCE, text, trusted_since=1.0)])
    assert [row.queue for row in ledger.leader.queues(SOURCE)] == [text]
    assert ledger.store.recoverable(SOURCE, [it.token]) == {it.token}
    ledger.leader.trust(term, [QueueRow(SOURCE, text, unguarded=(text, "w"))])
    assert [row.unguarded for row in ledger.leader.queues(SOURCE)] in ([(text, "w")], [[text, "w"]])


def test_a_hold_and_the_counts(ledger: Contract, text: str) -> None:
    """A queue is held under its name, and its jobs are counted."""
    term = ledger.elected()
    ledger.store.register(
        SourceRow(SOURCE, ledger.namespace, "rq", "localhost:6379/0", "", None, "")
    )
    ledger.recorded(queue=text)
    ledger.leader.hold(term, SOURCE, text, "many are absent")
    for brake in (ledger.leader.signs(term).brake, ledger.leader.renew(term, lease=9.0)):
        assert list(brake.held) == [f"{SOURCE}/{text}"]
    ledger.leader.count_up(term, seconds=60)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_stored_text_is_valid_and_comes_back(text: str) -> None:
    """PostgreSQL stores the escaped text, it comes back unchanged, and its key is short."""
    stored = escaped(text)
    assert b"\x00" not in stored.encode()
    assert restored(stored) == text
    assert len(escaped(key(text)).encode()) <= 1_000
    assert (name(text) is None) == (key(text) == text)
