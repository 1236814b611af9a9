"""Celery in a Django project: a task that is sent on commit is recorded then, and not before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import redis

pytest.importorskip("django")

PROGRAM = """
import sys
from pathlib import Path
import celery
import django
from django.conf import settings

settings.configure(
    DATABASES={{"default": {{"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}}}
)
django.setup()
from celery.contrib.django.task import DjangoTask
from django.db import transaction
from jobguard import registry
from jobguard.adapters.celery import CeleryAdapter
from jobguard.host_safety import safe_tracker
from tests.fakes.adapters import FakeTracker

app = celery.Celery("project", broker={redis_url!r}, task_cls=DjangoTask)

@app.task(name="add")
def add(x, y):
    return x + y

assert app.conf.broker_url
guarded = CeleryAdapter().sources(app, namespace="test", name=None)
tracker = FakeTracker(guarded.source, Path({calls!r}))
registry.register(tracker)
CeleryAdapter().install(safe_tracker(tracker), app)

with transaction.atomic():
    add.delay_on_commit(1, 2)
    assert not tracker.recorded
assert len(tracker.recorded) == 1

try:
    with transaction.atomic():
        add.delay_on_commit(1, 2)
        add.delay(3, 4)
        raise RuntimeError
except RuntimeError:
    pass
assert len(tracker.recorded) == 2
"""


def test_delay_on_commit(redis_url: str, tmp_path: Path, client: redis.Redis) -> None:
    """The record comes with the commit of the transaction."""
    program = PROGRAM.format(redis_url=redis_url, calls=str(tmp_path / "calls"))
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert client.llen("celery") == 2
