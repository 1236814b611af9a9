"""A schedule of every second, and a trigger, while two leaders are killed in turn.

The short form runs in the suite. The full one prints its figures: ``JOBGUARD_TEST_SECONDS=60
JOBGUARD_TEST_ROWS=10000 pytest -s -n 0 --timeout 900 tests/acceptance/test_requests.py``.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import psycopg
import pytest

from tests.acceptance.roads import QUEUE, Site, words
from tests.support import PATIENT, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECONDS = int(os.environ.get("JOBGUARD_TEST_SECONDS", "6"))
ROWS = int(os.environ.get("JOBGUARD_TEST_ROWS", "300"))
TASK = "tests.acceptance.roads.say"

TRIGGER = """
create table public.orders (id int);
create function public.order_made() returns trigger language plpgsql as $$
begin
  perform jobguard.enqueue('rq', '{queue}', '{task}', jsonb_build_array('{ledger}', 'row-' || new.id));
  return null;
end $$;
create trigger order_made after insert on public.orders for each row execute function public.order_made();
"""


@pytest.fixture
def site(tmp_path: Path, database: str, redis_url: str) -> Iterator[Site]:
    """Give a ledger and a Redis."""
    made = Site(tmp_path, database, redis_url, **PATIENT)
    yield made
    made.close()


def test_each_slot_and_each_row_runs_once_while_leaders_are_killed(site: Site) -> None:
    """Every second of a schedule fires once, and every row of one statement becomes one run."""
    for _ in range(2):
        site.worker()
    with site.producer() as (_, guard):
        site.reconciler()
        guard.schedules.add(
            "tick", TASK, queue=QUEUE, args=[str(site.ledger), "tick"], every=1, catch_up="all"
        )
        eventually(lambda: site.ask("select count(*) from jobguard.slots")[0] > 0, 30)
        until, kills = time.monotonic() + SECONDS, 0
        while time.monotonic() < until:
            leader = site.children[-1]
            site.reconciler(leads=False).wait_for_log("reconciler_started")
            leader.process.kill()
            kills += 1
            site.children[-1].wait_for_event("leader_elected", 60)
            time.sleep(min(3.0, max(0.0, until - time.monotonic())))
        fired = site.ask("select count(*) from jobguard.slots")[0]
        with psycopg.connect(site.postgres, autocommit=True) as connection:
            trigger = TRIGGER.format(queue=QUEUE, task=TASK, ledger=site.ledger)
            connection.execute(trigger.encode())
            began = time.monotonic()
            connection.execute(b"insert into public.orders select generate_series(1, %d)" % ROWS)
            asked = time.monotonic() - began
        guard.schedules.pause("tick")
    pushed = (
        "select (select count(*) from jobguard.requests) + (select count(*) from jobguard.outbox)"
    )
    eventually(lambda: site.ask(pushed) == [0], 300)
    took = time.monotonic() - began
    site.nothing_is_owed(900)
    slots = site.ask("select slot_at from jobguard.slots order by slot_at")
    steps = Counter((b - a).total_seconds() for a, b in pairwise(slots))
    print(
        f"{len(slots)} slots, {fired} of them while {kills} leaders were killed; {ROWS} rows asked in "
        f"{asked:.1f} s and pushed within {took:.1f} s"
    )
    assert kills > 0 and set(steps) == {1.0}
    expected = {"tick": len(slots)} | {f"row-{n}": 1 for n in range(1, ROWS + 1)}
    assert words(site.ledger) == expected
