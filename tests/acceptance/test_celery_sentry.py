"""Sentry beside guarded Celery workers: one event and one transaction, in every pool and order."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.acceptance.roads import BIN, REPOSITORY, Site
from tests.support import PATIENT, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

APP = """
import os
import celery, jobguard, sentry_sdk
from celery.signals import celeryd_init
from sentry_sdk.integrations.celery import CeleryIntegration
from sentry_sdk.transport import Transport

class ToFile(Transport):
    def capture_envelope(self, envelope):
        with open("sent", "a") as file:
            for item in envelope.items:
                file.write(item.type + chr(10))

def sentry(**_):
    sentry_sdk.init(
        "http://key@127.0.0.1/1", transport=ToFile, integrations=[CeleryIntegration()],
        default_integrations=False, traces_sample_rate=1.0,
    )

app = celery.Celery("with_sentry", broker=os.environ["JOBGUARD_REDIS_URL"])
order = os.environ["ORDER"]
if order == "sentry first":
    sentry()
jobguard.guard(app)
if order == "guard first":
    sentry()
if order == "celeryd_init":
    celeryd_init.connect(sentry, weak=False)

@app.task
def bad():
    raise RuntimeError("as it must")
"""


@pytest.fixture
def site(tmp_path: Path, database: str, redis_url: str) -> Iterator[Site]:
    """Give a ledger and a Redis."""
    made = Site(tmp_path, database, redis_url, **PATIENT)
    yield made
    made.close()


@pytest.mark.skipif(not importlib.util.find_spec("sentry_sdk"), reason="no sentry-sdk is installed")
@pytest.mark.parametrize("order", ["guard first", "sentry first", "celeryd_init"])
@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_sentry_reports_a_failure_once(site: Site, pool: str, order: str) -> None:
    """Sentry reports a failure once: it wraps the tracers of tasks, which our import has bound before."""
    (site.folder / "with_sentry.py").write_text(APP)
    words = ("-A", "with_sentry", "worker", "-P", pool, "-c", "1", "-l", "INFO")
    worker = site.start(
        "worker",
        str(BIN / "celery"),
        *words,
        PYTHONPATH=f"{REPOSITORY}:{site.folder}",
        ORDER=order,
    )
    worker.wait_for_log(" ready.", 60)
    import celery

    with celery.Celery("sender", broker=site.redis_url, set_as_current=False) as app:
        job_id = app.send_task("with_sentry.bad").id
    log = site.folder / "sent"
    eventually(lambda: site.outcomes(job_id) == ["failed"], 60, message=worker.log)
    eventually(
        lambda: sorted(log.read_text().split()) == ["event", "transaction"],
        20,
        message=worker.log,
    )
