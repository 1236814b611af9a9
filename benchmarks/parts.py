"""The parts of the suite by name, each with its tables."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from benchmarks import cost, enqueue, floors, outage, peers, recovery, work
from benchmarks.measure import Table
from benchmarks.site import Site

Part = Callable[[Site], AbstractContextManager[list[Table]]]

PARTS: dict[str, Part] = {
    "floors": lambda at: nullcontext(floors.tables(at)),
    "enqueue": lambda at: nullcontext(enqueue.tables(at)),
    "peers": peers.tables,
    "work": lambda at: nullcontext(work.tables(at)),
    "payload": lambda at: nullcontext(enqueue.payload_tables(at)),
    "latency": enqueue.latency_tables,
    "cost": lambda at: nullcontext(cost.tables(at)),
    "recovery": recovery.tables,
    "outage": outage.tables,
    "outage-work": outage.work_tables,
}
USUAL = ["floors", "enqueue", "peers", "work", "cost"]
"""The parts that are measured if none is named."""
