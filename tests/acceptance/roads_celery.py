"""The jobs of roads.py as tasks of Celery."""

from __future__ import annotations

import os
from typing import Any

import celery

import jobguard
from tests.acceptance import roads

app: Any = celery.Celery("roads", broker=os.environ["JOBGUARD_REDIS_URL"])
app.conf.update(task_default_queue=roads.QUEUE, broker_connection_retry_on_startup=True)
jobguard.guard(app)
say_slowly = app.task(roads.say_slowly)
