from __future__ import annotations

import time
from math import inf, nan
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from jobguard.errors import BadRow
from jobguard.model import Claim
from jobguard.store.protocols import Pulse, SourceRow
from tests.contract.conftest import (
    ENDED_COMPLETED,
    LONG,
    NAMESPACE,
    SOURCE,
    Contract,
    delivery,
    refused,
)

if TYPE_CHECKING:
    pass


def test_the_first_process_that_registers_a_source_decides_its_settings(ledger: Contract) -> None:
    """A second process gets the settings with which the source was registered first."""
    first = SourceRow(SOURCE, NAMESPACE, "rq", "localhost:6379/0", "", None, "fence=true")
    assert ledger.store.register(first).settings == "fence=true"
    second = SourceRow(SOURCE, NAMESPACE, "rq", "localhost:6379/0", "", None, "fence=false")
    assert ledger.store.register(second).settings == "fence=true"


def test_a_leader_sees_only_the_sources_of_its_namespace(ledger: Contract) -> None:
    """A leader does not see the sources of another namespace."""
    for number, namespace in ((1, NAMESPACE), (2, "others"), (3, NAMESPACE)):
        row = SourceRow(number, namespace, "rq", f"localhost:6379/{number}", "", None, "")
        ledger.store.register(row)
    assert [source.id for source in ledger.leader.sources()] == [1, 3]


def test_a_source_keeps_the_pulse_that_was_acknowledged(ledger: Contract) -> None:
    """The next leader continues from the pulse that the last one stored."""
    ledger.store.register(SourceRow(SOURCE, NAMESPACE, "rq", "localhost:6379/0", "", None, ""))
    epoch = uuid4()
    term = ledger.elected()
    assert ledger.leader.acknowledge(term, SOURCE, (None, None), (epoch, 41), run_id="run")
    (source,) = ledger.leader.sources()
    assert (source.pulse_epoch, source.pulse_n, source.run_id) == (epoch, 41, "run")


def test_a_pulse_follows_the_one_that_the_leader_knows(ledger: Contract) -> None:
    """A ledger that was set back is not moved on; the repetition of a write whose answer was lost is."""
    ledger.store.register(SourceRow(SOURCE, NAMESPACE, "rq", "localhost:6379/0", "", None, ""))
    epoch, later = uuid4(), uuid4()
    term = ledger.elected()

    def acknowledge(known: Pulse, pulse: Pulse) -> tuple[bool, Pulse]:
        moved = ledger.leader.acknowledge(term, SOURCE, known, pulse, run_id=None)
        (source,) = ledger.leader.sources()
        return moved, (source.pulse_epoch, source.pulse_n)

    assert acknowledge((None, None), (epoch, 7)) == (True, (epoch, 7))
    assert acknowledge((epoch, 7), (epoch, 8)) == (True, (epoch, 8))
    assert acknowledge((epoch, 7), (epoch, 8)) == (True, (epoch, 8)), "the answer was lost"
    assert acknowledge((epoch, 9), (epoch, 10)) == (False, (epoch, 8))
    assert acknowledge((epoch, 9), (later, 10)) == (False, (epoch, 8))
    assert acknowledge((later, 8), (later, 9)) == (False, (epoch, 8))


def test_a_recorded_delivery_is_owed(ledger: Contract) -> None:
    """A delivery is owed from its record on, with everything that an inspection needs."""
    it = ledger.recorded(queue="mail", task="app.send", due_at=time.time() + 60, fresh=True)
    row = ledger.owed()[it.token]
    assert (row.job_id, row.queue, row.task) == ("j", "mail", "app.send")
    assert (row.crashes, row.recoveries, row.claims) == (0, 0, 0)
    assert row.claim_number is None
    assert row.suspected is None
    assert not row.expired
    assert 50 < row.due_in <= 61
    assert row.age < 50


def test_a_delivery_that_may_go_at_once_is_due(ledger: Contract) -> None:
    """A delivery without a set time is due at once."""
    it = ledger.recorded()
    assert ledger.owed()[it.token].due_in <= 0


def test_a_delivery_expires(ledger: Contract) -> None:
    """After its time to live the library would drop a delivery, and its row shows that."""
    it = ledger.recorded(expires_at=time.time() + 30)
    assert not ledger.owed()[it.token].expired
    ledger.advance(60)
    assert ledger.owed()[it.token].expired


def test_age_is_counted_from_the_record(ledger: Contract) -> None:
    """The age of a delivery counts from its record."""
    it = ledger.recorded()
    ledger.advance(100)
    assert 100 <= ledger.owed()[it.token].age < 150


@pytest.mark.parametrize("fresh", [True, False])
def test_the_same_token_again_changes_nothing(ledger: Contract, fresh: bool) -> None:
    """A record whose answer was lost can be sent again."""
    it = ledger.recorded(fresh=fresh)
    claim = ledger.working().start(it.token)
    assert ledger.record(it).refused == frozenset()
    row = ledger.owed()[it.token]
    assert (row.claim_number, row.claim_live) == (claim.number, True)


def test_a_record_reports_whether_a_leader_leads(ledger: Contract) -> None:
    """The answer to a record shows whether a leader leads."""
    assert not ledger.record(delivery("a", fresh=True)).leader_live
    assert not ledger.record(delivery("b")).leader_live
    assert ledger.leader.elect(lease=10) is not None
    assert ledger.record(delivery("c", fresh=True)).leader_live
    assert ledger.record(delivery("d")).leader_live
    ledger.advance(11)
    assert not ledger.record(delivery("e", fresh=True)).leader_live
    assert not ledger.record(delivery("f")).leader_live


def test_a_leader_of_another_namespace_does_not_count(ledger: Contract) -> None:
    """A leader of another namespace does not count."""
    ledger.backend.leader("others", uuid4()).elect(lease=LONG)
    assert not ledger.record(delivery()).leader_live


def test_many_deliveries_are_recorded_in_one_call(ledger: Contract) -> None:
    """A bulk of any size is owed as a whole, in the order of its tokens."""
    many = [delivery(f"j{n}", fresh=True) for n in range(600)]
    ledger.record(*many)
    assert list(ledger.owed()) == [it.token for it in many]


def test_sources_do_not_see_each_other(ledger: Contract) -> None:
    """The same job id in another source is another job."""
    it = ledger.recorded()
    other = delivery()
    ledger.store.record(SOURCE + 1, [other], namespace=NAMESPACE)
    assert list(ledger.owed()) == [it.token]
    assert ledger.leader.tally(SOURCE + 1, after=None, limit=9) == ({"default": 1}, None)
    assert ledger.cancel(job_ids=["j"]) == 1
    assert ledger.leader.tally(SOURCE + 1, after=None, limit=9) == ({"default": 1}, None)


@pytest.mark.parametrize("fresh", [True, False])
def test_a_row_that_postgres_refuses_is_a_bad_row(ledger: Contract, fresh: bool) -> None:
    """A row that PostgreSQL refuses raises BadRow, and nothing of its batch is recorded."""
    good, bad = delivery("good", fresh=fresh), delivery("bad", fresh=fresh, priority=40_000)
    with pytest.raises(BadRow):
        ledger.record(good, bad)
    assert ledger.owed() == {}


def test_a_priority_out_of_range_is_a_bad_row(ledger: Contract) -> None:
    """A priority out of range is refused, because the ledger stores a smallint."""
    with pytest.raises(BadRow):
        ledger.record(delivery(priority=40_000))


def test_a_record_beside_its_push_is_owed(ledger: Contract) -> None:
    """A delivery that is recorded while it is pushed is owed, and a second time changes nothing."""
    it = delivery(fresh=True)
    for _ in range(2):
        assert ledger.store.record_beside(SOURCE, it, namespace=NAMESPACE)().refused == frozenset()
        assert set(ledger.owed()) == {it.token}


@pytest.mark.parametrize("how", ["recorded by its worker", "unknown"])
def test_a_record_that_comes_after_its_end_is_not_owed(ledger: Contract, how: str) -> None:
    """A worker may record, run and end a delivery before the record of its producer comes."""
    it, worker = delivery(fresh=True), ledger.working()
    if how == "unknown":
        worker.end(Claim(it.token, 0))
    else:
        ledger.record(it, replay=True, newest=True)
        worker.end(worker.start(it.token))
    ledger.store.record_beside(SOURCE, it, namespace=NAMESPACE)()
    assert ledger.owed() == {}
    assert refused(worker.claim(it.token)) == ENDED_COMPLETED


@pytest.mark.parametrize("beside", [False, True])
def test_any_time(ledger: Contract, *, beside: bool) -> None:
    """A job that never expires, or is never due, by a number that no calendar has, is owed."""
    for number, never in enumerate((2.0**63, 1e300, inf, -1e300, nan)):
        for fields in ({"due_at": never}, {"expires_at": never}):
            it = delivery(f"{number} {fields}", fresh=True, **fields)
            if beside:
                ledger.store.record_beside(SOURCE, it, namespace=ledger.namespace)()
            else:
                assert not ledger.record(it).refused
            assert it.token in ledger.owed()
