"""What the queue libraries are set to: settings that lose a job, run it twice, or block its producer.

Facts of running processes come from the ledger. The settings of an application are known only to who
imports it: `--app`, or Django's system checks.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jobguard.adapter import Advice
from jobguard.cli.doctor.finding import Finding, note, ok, problem
from jobguard.errors import JobguardError
from jobguard.guard import find_adapter
from jobguard.settings import Settings, settings_from

_VISIBILITY_SECONDS = 3600
"""The default of Celery's Redis transport."""


def judge_app(given: str) -> Iterator[Finding]:
    """Import MODULE:NAME and check its settings."""
    module, colon, name = given.partition(":")
    about = f"app {given}"
    if not colon or not name:
        yield problem(about, "give MODULE:NAME, for example shop.celery:app")
        return
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        target: Any = importlib.import_module(module)
        for part in name.split("."):
            target = getattr(target, part)
    except Exception as error:  # of the user's module
        yield problem(about, f"cannot be imported: {type(error).__name__}: {error}")
        return
    yield from judge_target(target, about)


def judge_target(target: object, about: str) -> Iterator[Finding]:
    """Check the settings of an application, a queue or a broker."""
    try:
        adapter, _ = find_adapter(target, settings_from())
    except JobguardError as error:
        yield problem(about, str(error))
        return
    advise: Callable[[object], Sequence[Advice]] | None = getattr(adapter, "advice", None)
    advice = [] if advise is None else advise(target)
    for one in advice:
        yield note(about, one.detail, one.consequence, one.fix)
    if not advice:
        yield ok(about, "no setting of it loses or doubles jobs, as far as jobguard knows")


def judge_workers(
    conninfo: Callable[[], str], settings: Settings, workers: Sequence[Mapping[str, Any]]
) -> Iterator[Finding]:
    """Check what running workers and owed jobs show."""
    several = sorted({w["name"] for w in workers if w["library"] == "rq" and len(w["queues"]) > 1})
    if several:
        yield note(
            "rq workers",
            f"{len(several)} take jobs of several queues: {', '.join(several[:5])}",
            "RQ takes a job of one queue by a move, but of several queues by a pop: a worker that dies "
            "between the pop and the start leaves the job in no list, and only jobguard knows it",
            "start one worker for each queue, or leave it to the sweep (sweep_interval)",
        )
    for library, address, due in _longest_waits(conninfo, settings.namespace):
        if library == "celery" and due > _VISIBILITY_SECONDS:
            yield note(
                f"celery at {address}",
                f"a task is due in {due / 3600:.0f} h, later than the default visibility timeout of 1 h",
                "Celery hands such a task to further workers again and again; guarded workers renew what "
                "they hold and the fence lets one run, but an unguarded worker runs its copy too",
                f'app.conf.broker_transport_options = {{"visibility_timeout": {int(due * 2)}}}',
            )


def _longest_waits(conninfo: Callable[[], str], namespace: str) -> list[tuple[str, str, float]]:
    import psycopg

    from jobguard.postgres_hosts import writable

    with psycopg.connect(writable(conninfo()), connect_timeout=5, prepare_threshold=None) as one:
        return one.execute(
            "select s.library, s.address, extract(epoch from max(j.due_at) - now())::float8"
            " from jobguard.sources s join jobguard.jobs j on j.source = s.id"
            " where s.namespace = %s and j.due_at > now() group by 1, 2",
            [namespace],
        ).fetchall()
