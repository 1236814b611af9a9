"""One process of a user: a tracer, a guard, a job of each kind, and the spans that the tracer got.

Usage: program.py LIBRARY TOOL ORDER REDIS_URL QUEUE
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

LIBRARY, TOOL, ORDER, REDIS_URL, QUEUE = sys.argv[1:]
heard: list[str] = []
"""The names of the spans that the tool has ended; ``error`` for an error."""


# Tools.


def ddtrace() -> None:
    """Start Datadog's tracer, and read its traces before it sends them."""
    from ddtrace.trace import TraceFilter, tracer

    class Ear(TraceFilter):
        def process_trace(self, trace: Any) -> None:
            heard.extend(span.name for span in trace)

    tracer.configure(trace_processors=[Ear()])
    from ddtrace import patch

    patch(**{LIBRARY: True}, redis=True, psycopg=True)


def opentelemetry() -> None:
    """Start OpenTelemetry, with the instrumentations of the library and of Redis."""
    from opentelemetry import trace
    from opentelemetry.instrumentation.redis import RedisInstrumentor
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

    class Ear(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            heard.extend(
                f"redis {span.name}" if "db.system" in span.attributes else span.name
                for span in spans
            )
            return SpanExportResult.SUCCESS

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(Ear()))
    trace.set_tracer_provider(provider)
    RedisInstrumentor().instrument()
    if LIBRARY == "rq":
        of_rq: Any = importlib.import_module("opentelemetry_instrumentation_rq")
        wrap = of_rq.wrap_function_wrapper

        def wrap_what_is_there(*target: Any) -> None:
            with suppress(AttributeError):  # the instrumentation was made for RQ 2
                wrap(*target)

        of_rq.wrap_function_wrapper = wrap_what_is_there
        of_rq.RQInstrumentor().instrument()
    elif LIBRARY == "celery":
        of_celery: Any = importlib.import_module("opentelemetry.instrumentation.celery")
        of_celery.CeleryInstrumentor().instrument()


def sentry() -> None:
    """Start Sentry."""
    import sentry_sdk
    from sentry_sdk.transport import Transport

    class Ear(Transport):
        def capture_envelope(self, envelope: Any) -> None:
            for item in envelope.items:
                if item.type == "event":
                    heard.append("error")
                elif item.type == "transaction":
                    heard.append(item.payload.json["transaction"])

    name = {"rq": "RqIntegration", "celery": "CeleryIntegration", "dramatiq": "DramatiqIntegration"}
    integration = importlib.import_module(f"sentry_sdk.integrations.{LIBRARY}")
    sentry_sdk.init(
        "http://key@127.0.0.1/1",
        transport=Ear,
        integrations=[getattr(integration, name[LIBRARY])()],
        default_integrations=False,
        traces_sample_rate=1.0,
    )


def newrelic() -> None:
    """Start New Relic's agent in developer mode: it sends nothing, but its hooks are active."""
    import newrelic.agent

    os.environ.update(NEW_RELIC_DEVELOPER_MODE="true", NEW_RELIC_LICENSE_KEY="0" * 40)
    newrelic.agent.initialize()
    newrelic.agent.register_application(timeout=10)


# Libraries.


class Rq:
    """RQ with a worker in this process."""

    def __init__(self) -> None:
        import redis
        import rq

        self._client = redis.Redis.from_url(REDIS_URL)
        self._queue = rq.Queue(QUEUE, connection=self._client)
        self._rq = rq
        self.target = self._queue

    def round(self) -> None:
        """Run a job of each kind."""
        jobs = [
            self._queue.enqueue("operator.add", 1, 2),
            self._queue.enqueue("operator.truediv", 1, 0),
        ]
        self._rq.SimpleWorker([self._queue], connection=self._client).work(burst=True)
        assert [job.get_status() for job in jobs] == ["finished", "failed"]


class Celery:
    """Celery with a worker in a thread of this process."""

    def __init__(self) -> None:
        import celery

        app = self.target = celery.Celery("app", broker=REDIS_URL, backend=REDIS_URL)
        app.conf.update(task_default_queue=QUEUE, worker_hijack_root_logger=False)
        self._good = app.task(good, name="good")
        self._bad = app.task(bad, name="bad")

    def round(self) -> None:
        """Run a task of each kind."""
        from celery.contrib.testing.worker import start_worker

        results = [self._good.delay("x"), self._bad.delay("x")]
        with start_worker(self.target, pool="solo", perform_ping_check=False):
            assert results[0].get(timeout=120) == "x"
            assert results[1].get(timeout=120, propagate=False).args == ("x",)


class Dramatiq:
    """Dramatiq with a worker in threads of this process."""

    def __init__(self) -> None:
        import dramatiq
        from dramatiq.brokers import redis

        broker = self.target = redis.RedisBroker(url=REDIS_URL)  # type: ignore[no-untyped-call]
        dramatiq.set_broker(broker)
        self._good = dramatiq.actor(queue_name=QUEUE)(good)
        self._bad = dramatiq.actor(queue_name=QUEUE, max_retries=0)(bad)

    def round(self) -> None:
        """Run a message of each kind."""
        import dramatiq

        self._good.send("x")
        self._bad.send("x")
        worker = dramatiq.Worker(self.target, worker_threads=1, worker_timeout=100)
        worker.start()
        self.target.join(QUEUE, timeout=120_000)
        worker.join()
        worker.stop()


def good(word: str) -> str:
    """Return the word."""
    return word


def bad(word: str) -> None:
    """Fail."""
    raise RuntimeError(word)


def main() -> None:
    """Set up in the requested order, run three rounds, and print what the tool got in each round."""
    import jobguard

    kinds: dict[str, Callable[[], Any]] = {"rq": Rq, "celery": Celery, "dramatiq": Dramatiq}
    if ORDER == "tool first":
        globals()[TOOL]()
        library = kinds[LIBRARY]()
        guard = jobguard.guard(library.target)
    else:
        library = kinds[LIBRARY]()
        guard = jobguard.guard(library.target)
        globals()[TOOL]()
    rounds = []
    for number in range(3):
        heard.clear()
        library.round()
        if number == 0:
            guard.close()
        elif number == 1:
            guard = jobguard.guard(library.target)
        rounds.append(sorted(heard))
    guard.close()
    print(json.dumps(rounds))
    sys.stdout.flush()
    os._exit(0)  # a tool has its own threads, which need not send anything


if __name__ == "__main__":
    main()
