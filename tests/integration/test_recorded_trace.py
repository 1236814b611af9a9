"""Each library's record has the trace of the span in which the job was sent."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from opentelemetry.sdk.trace import TracerProvider

from tests.databases import rows
from tests.integration.hosts import Host

TRACER = TracerProvider().get_tracer("application")


@pytest.mark.parametrize("library", ["celery", "dramatiq", "rq"])
def test_a_job_that_is_sent_in_a_span(
    library: str, redis_url: str, database: str, stack: ExitStack
) -> None:
    """A job that is sent in a span has its context, and one that is sent outside has none."""
    host = Host(library, redis_url)
    host.guard(stack, database)
    host.send()
    with TRACER.start_as_current_span("request") as span:
        host.send()
        wanted = f"00-{span.get_span_context().trace_id:032x}-"
    found = rows(database, "select trace from jobguard.jobs order by token")
    assert found[0] == (None,)
    assert str(found[1][0]).startswith(wanted)
