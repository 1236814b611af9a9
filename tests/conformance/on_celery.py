"""Celery for the suite."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from celery import Celery, signals
from celery._state import _set_task_join_will_block
from celery.app import trace
from celery.app.amqp import AMQP
from celery.app.base import Celery as App
from celery.app.control import Control
from celery.app.task import Task
from celery.backends.base import Backend
from celery.backends.redis import RedisBackend
from celery.canvas import chain, chord, group
from celery.utils.dispatch import Signal
from celery.worker import WorkController, state
from celery.worker.consumer import consumer
from celery.worker.request import Request
from kombu.asynchronous import set_event_loop
from kombu.transport.redis import Channel, QoS

from jobguard.adapters.celery import CeleryAdapter
from tests.conformance import celery_app
from tests.conformance.library import OTHER, QUEUE, Library

_HOOKED = (
    *(AMQP, App, Backend, Channel, Control, QoS, RedisBackend, Request, Task, WorkController),
    *(chain, chord, group, consumer.Consumer, consumer, trace),
)
_PATIENCE = 120.0
"""Longest time in seconds for a worker to finish all jobs."""


class OnCelery(Library):
    """Celery."""

    adapter = CeleryAdapter()
    one_body_per_id = False
    delayed_jobs_are_moved = False
    shows_runs = False
    reports_end_again = False

    def __init__(self, redis_url: str, ledger: Path) -> None:
        super().__init__(redis_url, ledger)
        self._revoked: set[str] = set()
        self.app = celery_app.make(redis_url)
        # A worker that ends waits for its last BRPOP: by default a second.
        self.app.conf.broker_transport_options = {"polling_interval": 0.1}
        configured(self.app)

    def target(self, queue: str | None = None) -> object:
        """Return the application."""
        if queue is not None:
            pytest.skip("a Celery application is guarded with all its queues")
        return self.app

    def doubles(self) -> Mapping[str, object]:
        """Return the targets that keep nothing that could be lost."""
        in_memory = Celery(broker="memory://", set_as_current=False)
        eager = celery_app.make(self.redis_url)
        eager.conf.task_always_eager = True
        return {"memory://": configured(in_memory), "task_always_eager": eager}

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Do nothing, because only a guard hooks Celery."""
        yield

    def hooks(self) -> object:
        """Return the classes and modules, entry by entry, and the receivers of the signals."""
        receivers = {
            name: [key for key, *_ in signal.receivers or ()]
            for name, signal in vars(signals).items()
            if isinstance(signal, Signal)
        }
        own = {name: vars(self.app).get(name) for name in ("amqp_cls", "control_cls")}
        sends = vars(self.app.amqp).get("send_task_message")
        return {each: dict(vars(each)) for each in _HOOKED}, receivers, own, sends

    def send(
        self,
        task: str = "say",
        *words: object,
        queue: str = QUEUE,
        job_id: str | None = None,
        delay: float | None = None,
        retries: int = 0,
        retry_delay: float = 0.0,
        at_front: bool = False,
    ) -> str:
        """Send the job to its queue."""
        if at_front:
            pytest.skip("a Celery queue has no front")
        sent: Any = self.app.tasks[celery_app.name_of(task)].apply_async(
            (str(self.ledger), *words),
            {"retries": retries, "wait": retry_delay} if retries else {},
            task_id=job_id,
            queue=queue,
            countdown=delay,
        )
        return str(sent.id)

    def cancel(self, job_id: str) -> None:
        """Revoke the job by its id, as a person does."""
        self.app.control.revoke(job_id)
        self._revoked.add(job_id)

    def send_with_read(self) -> None:
        """Send a chord, whose members are counted in Redis."""
        say = self.app.tasks[celery_app.name_of("say")]
        one = say.si(str(self.ledger)).set(queue=QUEUE)
        chord([one, one], one, app=self.app)()

    def task(self) -> object:
        """Return the task."""
        return self.app.tasks[celery_app.name_of("say")]

    def send_with_options(self, options: Mapping[str, object]) -> None:
        """Send with the options in the headers."""
        say = self.app.tasks[celery_app.name_of("say")]
        say.apply_async((str(self.ledger),), queue=QUEUE, headers=dict(options))

    def work(self, queue: str = QUEUE) -> None:
        """Run the solo worker in this thread until no due job waits."""
        awake, waker = os.pipe()
        worker: Any = WorkController(
            app=self.app,
            ready_callback=lambda ready: ready.hub.add_reader(awake, os.read, awake, 1),
            hostname="worker@suite",
            pool="solo",
            concurrency=1,
            queues=[queue],
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
        )
        state.revoked.update(self._revoked)  # as a worker that ran at that time
        trace.setup_worker_optimizations(self.app, worker.hostname)
        over = threading.Event()
        monitor = threading.Thread(target=self._stop_when_idle, args=(queue, worker, over, waker))
        monitor.start()
        try:
            worker.start()
        finally:
            over.set()
            monitor.join(10)
            os.close(awake)
            os.close(waker)
            trace.reset_worker_optimizations(self.app)
            set_event_loop(None)  # the next worker would wait on this one's timer
            _set_task_join_will_block(False)  # this process is no longer a worker
            state.should_stop = None
            state.reset_state()
            state.revoked.clear()

    def _stop_when_idle(self, queue: str, worker: Any, over: threading.Event, waker: int) -> None:
        client = self.client.__class__.from_url(self.redis_url)
        deadline = time.monotonic() + _PATIENCE
        idle = 0
        while not over.wait(0.02) and time.monotonic() < deadline and idle < 5:
            lists = [client.llen(key) for key in _lists(queue)]
            taken: Any = client.hvals("unacked")
            ready = getattr(worker.consumer, "task_consumer", None) is not None
            busy = any(lists) or any(map(_is_due, taken)) or state.active_requests
            idle = idle + 1 if ready and not busy else 0
        state.should_stop = 0
        os.write(waker, b".")  # Its loop would see this a second later.
        client.close()

    def move_delayed(self) -> None:
        """Set the due times to the past, so that a worker runs the jobs at once."""
        past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
        for key in _lists(QUEUE):
            waiting: Any = self.client.lrange(key, 0, -1)
            for at, raw in enumerate(waiting):
                message = json.loads(raw)
                if message["headers"].get("eta"):
                    message["headers"]["eta"] = past
                    self.client.lset(key, at, json.dumps(message))

    def start_worker(self, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start the usual command with the pool that runs in the worker process itself."""
        return self._command(environ, "--pool", "solo")

    def start_crowded_worker(self, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start the command with the pool of threads."""
        return self._command(environ, "--pool", "threads", "--concurrency", "4")

    def _command(self, environ: Mapping[str, str], *pool: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "celery", "-A", "tests.conformance.celery_app", "worker"),
                *(*pool, "-Q", QUEUE, "--loglevel", "ERROR", "-n", "worker@%h"),
            ],
            env={**environ, "C_FORCE_ROOT": "1"},  # it accepts pickle
            stdin=subprocess.DEVNULL,
        )

    def delayed_copies(self) -> int:
        """Return the number of messages that are fetched and not acknowledged."""
        return int(self.client.hlen("unacked"))

    def waiting(self, queue: str = QUEUE) -> list[str]:
        """Return the fetched messages, then those of the lists, with the next one to run first."""
        taken: Any = self.client.hvals("unacked")
        lists: list[Any] = [self.client.lrange(key, 0, -1) for key in _lists(queue)]
        left = [json.loads(entry)[0] for entry in taken]
        return [
            *(message["headers"]["id"] for message in left),
            *(json.loads(raw)["headers"]["id"] for raws in lists for raw in reversed(raws)),
        ]

    def body(self, job_id: str) -> dict[str, Any] | None:
        """Return its message."""
        found = (
            message for _, _, message in self._messages() if message["headers"]["id"] == job_id
        )
        return next(found, None)

    def token(self, job_id: str) -> UUID | None:
        """Return the token in our header."""
        text = ((self.body(job_id) or {}).get("headers") or {}).get("jobguard")
        return UUID(hex=text) if text else None

    def forget(self, job_id: str) -> None:
        """Delete its message."""
        for key, raw, message in list(self._messages()):
            if message["headers"]["id"] == job_id:
                self.client.lrem(key, 0, raw)

    def _messages(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        for queue in (QUEUE, OTHER):
            for key in _lists(queue):
                waiting: Any = self.client.lrange(key, 0, -1)
                for raw in waiting:
                    yield key, raw, json.loads(raw)

    def jobs(self) -> dict[str, Any]:
        """Return the keys without the tag that kombu puts on each push."""
        return {
            key: [re.sub(rb'"delivery_tag": "[^"]+"', b"", raw) for raw in value]
            if isinstance(value, list)
            else value
            for key, value in super().jobs().items()
        }

    def is_a_jobs(self, key: str) -> bool:
        """Return True for the lists and for the fetched messages."""
        return key.split("\x06")[0] in (QUEUE, OTHER, "unacked", "unacked_index")


def configured(app: Celery) -> Celery:
    """Return the application after it has read its settings, as after its first use."""
    assert app.conf.broker_url
    return app


def _is_due(unacked: bytes) -> bool:
    """Return True if a fetched message does not wait for its time."""
    eta = json.loads(unacked)[0]["headers"].get("eta")
    return not eta or datetime.fromisoformat(eta) <= datetime.now(UTC)


def _lists(queue: str) -> list[str]:
    return [queue, *(f"{queue}\x06\x16{step}" for step in (3, 6, 9))]
