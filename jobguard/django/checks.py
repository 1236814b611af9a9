"""System checks: `manage.py check` names what is not guarded, and settings that lose or double jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning

from jobguard import schema
from jobguard.cli.doctor.finding import CheckResult
from jobguard.cli.doctor.libraries import judge_target
from jobguard.conninfo import postgres_conninfo
from jobguard.django import wiring
from jobguard.errors import JobguardError

_WORKERS = "jobguard.adapters.rq."


def check_settings(app_configs: Any, **_: Any) -> list[CheckMessage]:
    """Check the setting JOBGUARD and what it names."""
    found: list[CheckMessage] = [
        Error(problem, hint="correct JOBGUARD in the settings", id="jobguard.E001")
        for problem in wiring.problems
    ]
    targets = list(wiring.targets())
    if not targets:
        found.append(
            Warning(
                "JOBGUARD names nothing to guard",
                hint="set JOBGUARD = {'QUEUES': 'all'} for django-rq, or {'APPS': ['proj.celery:app']}",
                id="jobguard.W001",
            )
        )
    for name, find in targets:
        try:
            target = find()
        except Exception:  # it is among the problems above
            continue
        found += [
            Warning(
                f"{name}: {one.detail}", hint=f"{one.consequence}: {one.fix}", id="jobguard.W002"
            )
            for one in judge_target(target, name)
            if one.verdict is not CheckResult.OK and one.fix
        ]
    worker = getattr(settings, "RQ", {}).get("WORKER_CLASS", "rq.worker.Worker")
    if wiring.chosen().get("QUEUES") and not str(worker).startswith(_WORKERS):
        found.append(
            Warning(
                f"`manage.py rqworker` starts {worker}, which may be unguarded",
                hint="RQ = {'WORKER_CLASS': 'jobguard.adapters.rq.Worker'}",
                id="jobguard.W003",
            )
        )
    return found


def check_database(
    app_configs: Any, databases: Sequence[str] | None = None, **_: Any
) -> list[CheckMessage]:
    """Check the schema of the ledger; Django calls this for `check --database` and for `migrate`."""
    if not databases:
        return []
    import psycopg

    try:
        conninfo = postgres_conninfo(wiring.postgres())()
        with psycopg.connect(conninfo, autocommit=True, connect_timeout=5) as connection:
            problem: Exception | None = schema.check(connection)
    except (JobguardError, psycopg.Error) as error:
        problem = error
    if problem is None:
        return []
    return [
        Warning(
            f"the ledger of jobguard: {problem}",
            hint="python manage.py jobguard migrate",
            id="jobguard.W004",
        )
    ]
