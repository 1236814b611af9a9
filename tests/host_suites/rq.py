"""RQ's own tests against a guarded RQ: ``python -m tests.host_suites.rq [--version 3.0.0]``.

They run bare, guarded, and guarded while a leader leads; see `suite.py`. Allowed differences are in
DOCUMENTED and DOCUMENTED_WHILE_LED; any other difference makes the exit code 1.
"""

from __future__ import annotations

import argparse
import sys

from tests.host_suites.suite import Suite, action, bare_and_guarded, distribution, servers

_CANCELLED = (
    "The test calls Queue.empty(), which cancels the job, and then has RQ put the job back by an inner "
    "method outside of any worker. A cancelled job stays cancelled: the push is refused."
)
_KILLED = (
    "A killed run is not failed (recover_killed). The leader puts a run back, within its crash budget, if "
    "its horse was killed, if RQ finds it abandoned, or if it is stuck in the intermediate queue."
)
_EXPECTED_ERRORS = (
    # Tests give a saved job the status of a scheduled one, and put it into no registry.
    "ERROR a job is scheduled outside of RQ's own registry*",
)
DOCUMENTED = {
    "tests/test_retry.py::TestRetry::test_retry_interval": _CANCELLED,
    "tests/test_worker.py::TestWorker::test_handle_retry": _CANCELLED,
    "tests/test_repeat.py::TestRepeatEnqueue::test_repeat_schedule_interval_order": _CANCELLED,
}
"""Tests (with * for several) that may fail guarded, with the reason."""
DOCUMENTED_WHILE_LED = {
    "tests/test_dependencies.py::*::test_allow_failures_when_work_horse_killed": _KILLED,
    "tests/test_intermediate_queue.py::*::test_cleanup_intermediate_queue": _KILLED,
    "tests/test_intermediate_queue.py::*::test_cleanup_intermediate_queue_in_maintenance": _KILLED,
    "tests/test_registry.py::*::test_cleanup_continues_when_failure_callback_raises": _KILLED,
    "tests/test_registry.py::*::test_cleanup_moves_jobs_to_failed_job_registry": _KILLED,
    "tests/test_retry.py::*::test_cleanup_handles_retries": _KILLED,
    "tests/test_webhooks.py::*::test_abandoned_terminal_failure_fires_failed_webhook": _KILLED,
    "tests/test_worker.py::TestWorker::test_horse_fails": _KILLED,
}
"""Further tests that may fail while a leader leads, which recovers jobs that RQ would give up."""


def main() -> int:
    """Run the tests, compare the runs, and print the differences."""
    parser = argparse.ArgumentParser(prog="python -m tests.host_suites.rq", description=__doc__)
    parser.add_argument("--version", default="3.0.0", help="version of RQ; default: %(default)s")
    parser.add_argument("tests", nargs="*", default=["tests"], help="files or ids, as for pytest")
    options = parser.parse_args()
    suite = Suite(
        "rq",
        distribution("rq", options.version),
        options.tests,
        options=("-p", "no:timeout"),  # RQ's tests use the alarm themselves
        expected_errors=_EXPECTED_ERRORS,
    )
    with servers() as at:
        return action(suite, bare_and_guarded(at, DOCUMENTED, DOCUMENTED_WHILE_LED))


if __name__ == "__main__":
    sys.exit(main())
