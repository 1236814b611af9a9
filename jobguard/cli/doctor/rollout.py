"""Whether ``mode="observe"`` may be removed now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jobguard.cli.doctor.finding import Finding, note, ok, problem

_ABOUT = "rollout"


def judge_rollout(
    overview: Mapping[str, Any], workers: Sequence[Mapping[str, Any]]
) -> Iterator[Finding]:
    """Find what speaks against recovering jobs from now on."""
    reasons = list(_reasons(overview, workers))
    yield from reasons
    suspects = sum(source["suspects"] for source in overview["sources"])
    if suspects:
        yield note(
            _ABOUT,
            f"{suspects} owed jobs are absent from Redis now",
            "those whose queue is trusted go back as soon as observe is removed",
            "look at `jobguard jobs --state stuck`; cancel what must not run",
        )
    if not reasons:
        yield ok(
            _ABOUT,
            "safe: remove JOBGUARD_MODE=observe from the reconcilers, then from workers and producers",
        )


def _reasons(
    overview: Mapping[str, Any], workers: Sequence[Mapping[str, Any]]
) -> Iterator[Finding]:
    leader = overview["leader"]
    if leader is None or not leader["live"]:
        yield problem(_ABOUT, "no reconciler leads, so nothing was observed")
    if not overview["sources"]:
        yield problem(_ABOUT, "nothing is guarded yet: no producer has recorded a job")
    elif not any("mode=observe" in source["settings"] for source in overview["sources"]):
        yield note(_ABOUT, "no process is in mode observe: jobs are recovered already")
    for queue in overview["queues"]:
        if queue["trusted_since"] is None:
            yield problem(
                _ABOUT,
                f"queue {queue['queue']} is not trusted",
                "its jobs are not put back, with or without observe",
                "guard all of its workers; `jobguard stats` names the others",
            )
    served = {queue for worker in workers for queue in worker["queues"]}
    for queue in overview["queues"]:
        if queue["queue"] not in served:
            yield note(_ABOUT, f"queue {queue['queue']} has no guarded worker at this moment")
    late = [w["name"] for w in workers if w["unflushed_seconds"]]
    if late:
        yield problem(
            _ABOUT,
            f"workers have reports that Postgres does not have: {', '.join(late[:5])}",
            "jobs that they finished look owed",
        )
    if overview["installation"]["moved"]:
        yield problem(_ABOUT, "this database is a copy: see above")
