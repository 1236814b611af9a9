"""The forms that change something: a page that counts and asks, and the act itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from jobguard.dashboard.fields import fields_in, query, words_of
from jobguard.dashboard.views import filter_of, moment_in
from jobguard.errors import ConfigurationError, JobguardError
from jobguard.model import Outcome
from jobguard.operations.act import REPLAYED, WAITING, Operations, actor

if TYPE_CHECKING:
    from jobguard.dashboard.application import Site

Given = Mapping[str, str]
Rows = Sequence[Mapping[str, Any]]
_MOST = 100_000
"""Jobs that one form changes; more are for the command line, which shows its progress."""


@dataclass(frozen=True, slots=True)
class Act:
    """One thing that a person can do."""

    title: str
    button: str
    effect: str
    select: Callable[[Site, Given], Rows] | None
    """Returns what would be changed; None: it concerns no single jobs."""
    do: Callable[[Site, Operations, Given, Rows], tuple[int, list[str]]]


def confirm(site: Site, request: Request) -> Response:
    """Count what an action would change, and ask."""
    given = query(request)
    act_ = _act(given)
    rows = act_.select(site, given) if act_.select is not None else []
    counts = Counter((row["queue"], row["state"]) for row in rows)
    return site.render(
        request,
        "confirm.html",
        act=act_,
        given=given,
        words=words_of(given),
        total=len(rows),
        counts=sorted(counts.items()),
        possible=bool(rows) or act_.select is None,
        sample=[row["job_id"] for row in rows[:10]],
    )


def act(site: Site, request: Request, form: Given) -> Response:
    """Do what a person has confirmed."""
    given = fields_in(form.get("given", ""))
    chosen = _act(given)
    rows = chosen.select(site, given) if chosen.select is not None else []
    done, problems = chosen.do(site, _as(site, request), given, rows)
    return site.render(
        request, "done.html", act=chosen, done=done, problems=problems, given=given, of=len(rows)
    )


def _act(given: Given) -> Act:
    found = ACTS.get(given.get("action", ""))
    if found is None:
        raise ConfigurationError(f"there is no action {given.get('action', '')!r}")
    return found


class _Named(Operations):
    """The operations of one person: the connections are those of the page."""

    def __init__(self, shared: Operations, name: str) -> None:
        self.__dict__.update(shared.__dict__)
        self.actor = name


def _as(site: Site, request: Request) -> Operations:
    person = request.state.person
    return _Named(site.ledger, actor() if person == "local" else f"{person} (page)")


def _words(given: Given) -> str:
    words = {name: value for name, value in given.items() if value and name != "action"}
    return " ".join(f"{name}={value}" for name, value in words.items())


def _bounded(rows: Rows) -> Rows:
    if len(rows) > _MOST:
        raise JobguardError(
            f"these are more than {_MOST:,} jobs: do this with the command `jobguard`"
        )
    return rows


def _owed(site: Site, given: Given) -> Rows:
    if given.get("id"):
        return site.ledger.owed_named(site.namespace, given["id"])
    wanted = filter_of(given)
    states = tuple(
        state for state in (wanted.states or WAITING) if state in (*WAITING, "processing")
    )
    if not states:
        return []
    chosen = replace(wanted, states=states)
    if all(getattr(chosen, name) is None for name in ("queue", "task", "priority", "due_before")):
        raise ConfigurationError("name a job, or a queue, task, priority or due time")
    rows = _bounded(site.ledger.owed_of(site.namespace, chosen, limit=_MOST + 1))
    return rows if wanted.states else [r for r in rows if r["state"] != "processing"]


def _cancel(site: Site, ledger: Operations, given: Given, rows: Rows) -> tuple[int, list[str]]:
    return ledger.cancel(site.namespace, [dict(r) for r in rows], site.brokers, _words(given))


def _sendable(site: Site, given: Given) -> Rows:
    """Return the newest delivery of a job, if it can be sent again."""
    for row in site.ledger.job(site.namespace, given.get("id", "")):
        if row["state"] in (Outcome.COMPLETED, Outcome.CANCELLED):
            return []
        if row["state"] != Outcome.SUPERSEDED:
            return [row]
    return []


def _given_up(site: Site, given: Given) -> Rows:
    if given.get("id"):
        return [r for r in _sendable(site, given) if r["state"] in (Outcome.FAILED, Outcome.DEAD)]
    outcomes = [Outcome.DEAD, Outcome.FAILED]
    if given.get("state") in outcomes:
        outcomes = [Outcome(given["state"])]
    rows = site.ledger.dead(
        site.namespace, outcomes=outcomes, queue=given.get("queue") or None, limit=_MOST + 1
    )
    task = given.get("task")
    return [row for row in _bounded(rows) if not task or row["task"] == task]


def _send(site: Site, ledger: Operations, given: Given, rows: Rows) -> tuple[int, list[str]]:
    found = [dict(r) for r in rows]
    return ledger.send_again(
        site.namespace, found, "requeue", _words(given), outcomes=(Outcome.FAILED, Outcome.DEAD)
    )


def _drop(site: Site, ledger: Operations, given: Given, rows: Rows) -> tuple[int, list[str]]:
    return ledger.purge_dead(site.namespace, [dict(r) for r in rows], _words(given)), []


def _job(site: Site, given: Given) -> Rows:
    return site.ledger.job(site.namespace, given.get("id", ""))


def _forget(site: Site, ledger: Operations, given: Given, rows: Rows) -> tuple[int, list[str]]:
    return ledger.forget(site.namespace, given.get("id", ""), site.brokers)


def _window(site: Site, given: Given) -> Rows:
    since, until = moment_in(given, "since"), moment_in(given, "until")
    if since is None or until is None or since >= until:
        raise ConfigurationError("give the begin and the end of the window")
    outcomes = [outcome for outcome in REPLAYED if outcome == given.get("outcome")]
    found = site.ledger.ended_in(
        site.namespace,
        since,
        until,
        outcomes=outcomes or [Outcome.COMPLETED],
        queue=given.get("queue") or None,
        task=given.get("task") or None,
    )
    return _bounded(list(islice((row for row in found if row["kept"]), _MOST + 1)))


def _replay(site: Site, ledger: Operations, given: Given, rows: Rows) -> tuple[int, list[str]]:
    found = [dict(r) for r in rows]
    return ledger.send_again(site.namespace, found, "replay", _words(given), outcomes=REPLAYED)


def _pause(site: Site, ledger: Operations, given: Given, rows: Rows) -> tuple[int, list[str]]:
    ledger.pause(site.namespace, queue=given.get("queue") or None)
    return 0, []


def _resume(site: Site, ledger: Operations, given: Given, rows: Rows) -> tuple[int, list[str]]:
    ledger.resume(site.namespace, queue=given.get("queue") or None, moved=False)
    return 0, []


ACTS = {
    "cancel": Act(
        "Cancel jobs",
        "Cancel",
        "They do not run, whatever Redis still has or gets back. A run that has begun is not stopped.",
        _owed,
        _cancel,
    ),
    "requeue": Act(
        "Send a job again",
        "Send again",
        "The leader pushes it as a new delivery. If the old one has run, the job runs again.",
        _sendable,
        _send,
    ),
    "requeue-dead": Act(
        "Send jobs again that were given up",
        "Send again",
        "The leader pushes them as new deliveries of the same jobs.",
        _given_up,
        _send,
    ),
    "drop-dead": Act(
        "Drop jobs that were given up",
        "Drop",
        "They count as cancelled, and cannot be sent again.",
        _given_up,
        _drop,
    ),
    "forget": Act(
        "Forget a job",
        "Erase",
        "Its arguments, message and errors are erased for good, here and in Redis. If it waits, it is "
        "cancelled.",
        _job,
        _forget,
    ),
    "replay": Act(
        "Run again what ended in a window",
        "Run again",
        "The leader pushes these jobs as new deliveries. Their effects happen a second time.",
        _window,
        _replay,
    ),
    "pause": Act(
        "Stop putting jobs back",
        "Pause",
        "Producers and workers continue. Lost jobs wait until you resume.",
        None,
        _pause,
    ),
    "resume": Act(
        "Put jobs back again",
        "Resume",
        "This ends a pause, and the holds that jobguard made by itself.",
        None,
        _resume,
    ),
}
