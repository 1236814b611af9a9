"""What jobguard says: every event's name, level and sentence, in one table.

Code announces what happened by name and with fields; the wording is here. Everything goes through
the standard logger ``jobguard`` and nowhere else, so that the host's logging decides what becomes
of it; without logging set up, warnings and errors go to stderr. A record carries its event and
fields as the attribute ``jobguard`` (a mapping), for handlers that want more than text.

structlog is loaded when somebody binds a logger, and by ``configure``, which our command line alone
calls: its import costs a host 150 ms, and the first event is most often a sign of trouble.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections import deque
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from jobguard.log_bounds import ENDS, FLOOD
from jobguard.redact import redact

if TYPE_CHECKING:
    from structlog.stdlib import BoundLogger

DEBUG, INFO, WARNING, ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR


class Event(NamedTuple):
    """How an event is told."""

    level: int
    sentence: str


EVENTS: Mapping[str, Event] = {
    # The stores, as a host process meets them.                                fields
    "postgres_away": Event(WARNING, "Postgres does not answer; going on without"),  # error
    "postgres_back": Event(INFO, "Postgres answers again"),  # seconds
    "not_migrated": Event(ERROR, "the schema is not there: run `jobguard migrate`"),  # place
    "no_rights": Event(ERROR, "the role may not use the schema: see schema/grants.sql"),  # error
    "wrong_installation": Event(ERROR, "this is another installation's database"),  # has, wants
    "redis_away": Event(WARNING, "Redis does not answer"),  # source, error
    "redis_back": Event(INFO, "Redis answers again"),  # source, seconds
    "redis_refuses": Event(ERROR, "Redis refuses to store jobs"),  # source, error, waiting
    "redis_accepts": Event(INFO, "Redis stores jobs again"),  # source, seconds, refused
    "value_unreadable": Event(
        WARNING, "a value in Redis cannot be read and is skipped"
    ),  # source, key, error
    # Guarding.
    "guarded": Event(INFO, "guarding"),  # source, queues, postgres
    "guard_inert": Event(INFO, "nothing is guarded here"),  # reason
    "guard_refused": Event(ERROR, "this cannot be guarded"),  # error
    "adapter_loaded": Event(DEBUG, "an adapter is in place"),  # library
    "adapter_failed": Event(ERROR, "an adapter could not be put in place"),  # library, error
    "settings_differ": Event(
        ERROR, "processes of one source are set differently"
    ),  # source, here, there
    "guest_failed": Event(
        ERROR, "jobguard failed, and the host went on without it"
    ),  # where, error
    "postgres_unnamed": Event(
        WARNING, "nothing is guarded in this process: no usable Postgres is named"
    ),  # reason
    "variable_unknown": Event(
        WARNING, "a variable JOBGUARD_… is unknown and has no effect"
    ),  # variable
    "redis_option_unknown": Event(
        WARNING, "an option of a Redis URL is unknown and has no effect"
    ),  # redis, option
    # Recording.
    "record_spooled": Event(WARNING, "records wait in the spool"),  # count
    "record_lost": Event(ERROR, "a record could be kept nowhere"),  # job_id, queue, error
    "record_skipped": Event(WARNING, "jobs go unrecorded while Postgres is away"),  # count
    "row_refused": Event(ERROR, "Postgres refuses a row for what is in it"),  # job_id, error
    "spool_replayed": Event(INFO, "the spool was replayed"),  # count, seconds
    "spool_left": Event(
        ERROR, "entries of the spool were not written to Postgres when the process ended"
    ),  # count, job_ids, aside
    "not_written": Event(DEBUG, "something was not written: Postgres is away"),  # what, error
    "pooler_found": Event(
        INFO,
        "Postgres is behind a pooler: statements are not prepared, and each transaction sets what it "
        "needs",
    ),
    "settings_reduced": Event(
        INFO, "this Postgres does not have all settings of our sessions"
    ),  # error
    "spool_full": Event(
        ERROR, "the spool is full: jobs go unrecorded until it has room"
    ),  # entries, bytes, count, lost
    "spool_lightened": Event(
        WARNING,
        "the spool is at its bound in bytes: records of jobs that are in Redis give up their "
        "envelopes, and are recorded by the workers that start them",
    ),  # count, bytes
    "spool_has_room": Event(INFO, "the spool is empty again"),  # lost
    "entry_set_aside": Event(
        WARNING,
        "an entry of the spool fails while Postgres answers: it is set aside and tried again later",
    ),  # job_id, kind, bytes, aside, error
    "entry_given_up": Event(ERROR, "an entry that was set aside is given up"),  # job_id, error
    "aside_written": Event(INFO, "what was set aside is written"),
    # Working.
    "worker_started": Event(INFO, "a guarded worker begins"),  # worker, name, queues
    "worker_renewed": Event(WARNING, "this worker was declared dead and goes on anew"),  # worker
    "worker_inherited": Event(
        WARNING, "this worker's process is gone, and its child that runs a job beats for it"
    ),  # worker, name
    "worker_left": Event(INFO, "a guarded worker said goodbye"),  # worker, name
    "start_skipped": Event(INFO, "a start was skipped"),  # job_id, queue, reason, outcome
    "start_unclaimed": Event(WARNING, "a job starts without a claim"),  # job_id
    "start_waits": Event(
        INFO, "a job that is charged with a worker's death waits until it can run alone"
    ),  # token
    "job_declined": Event(
        WARNING, "this worker cannot begin a job: it goes back later"
    ),  # job_id, tries_left, error
    "claim_lost": Event(WARNING, "a run's claim went to another worker"),  # job_id
    "start_unfenced": Event(
        WARNING, "a start was not granted, and runs all the same (mode=observe)"
    ),  # reason
    "nobody_leads": Event(
        WARNING, "a start was skipped while no reconciler leads: run `jobguard reconcile`"
    ),
    "beat_unheard": Event(DEBUG, "a store did not hear a beat"),  # store, error
    "source_differs": Event(
        ERROR,
        "the reconciler knows this Redis as another source than this process does: use one address "
        "everywhere, or set JOBGUARD_SOURCE to one name",
    ),  # source
    "end_late": Event(WARNING, "an end came too late and changed nothing"),  # job_id, number
    "connection_unnamed": Event(
        WARNING,
        "Redis refuses CLIENT SETNAME: a leader cannot tell this worker from an unguarded one, and "
        "recovers nothing; grant +client|setname",
    ),  # error
    # Leading.
    "reconciler_started": Event(INFO, "the reconciler begins"),  # namespace, postgres, redis
    "reconciler_stopped": Event(INFO, "the reconciler ends"),  # namespace
    "leader_elected": Event(INFO, "this process leads"),  # namespace, term
    "leader_resigned": Event(INFO, "this process leads no longer"),  # namespace, term
    "leader_lost": Event(WARNING, "the lease was lost"),  # namespace, term, error
    "lease_unrenewed": Event(WARNING, "the lease could not be written"),  # error
    "step_failed": Event(ERROR, "a step failed and will be tried again"),  # part, error
    "step_stuck": Event(ERROR, "a step takes too long; its connections are cut"),  # source, seconds
    "watching": Event(INFO, "a source is watched"),  # source
    "source_unwatched": Event(
        ERROR, "no Redis URL was given for a source: add it to --redis or JOBGUARD_REDIS_URL"
    ),  # source, given
    "adapter_missing": Event(
        ERROR, "there is no adapter for a source's library"
    ),  # library, install
    "wrong_redis": Event(
        ERROR,
        "workers see a living pulse where this reconciler sees none: it is at the wrong Redis",
    ),  # source
    "foreign_pulse": Event(
        ERROR,
        "another ledger keeps its pulse in this Redis: nothing is put back; give one of the two "
        "another JOBGUARD_NAMESPACE",
    ),  # source
    "place_unsure": Event(
        ERROR, "nothing is put back until a person says `jobguard resume`"
    ),  # source, reason
    "ledger_moved": Event(
        ERROR, "this database is not where it was: `jobguard resume --moved`"
    ),  # was, is_now
    "identity_partial": Event(
        INFO,
        "this Postgres does not tell its system identifier: a copy of the database is known by the "
        "database's number alone",
    ),  # error
    "ledger_behind": Event(ERROR, "Redis' pulse is ahead: Postgres went back in time"),  # source
    "queue_held": Event(ERROR, "a queue is held until `jobguard resume`"),  # source, queue, reason
    "queue_trusted": Event(INFO, "a queue is trusted"),  # source, queue
    "consumers_uncounted": Event(
        WARNING,
        "Redis does not list its clients: unguarded workers are seen by their names only; grant "
        "+client|list and +pubsub",
    ),  # source, error
    "queue_untrusted": Event(
        WARNING, "unguarded workers consume a queue"
    ),  # source, queue, workers
    # What was lost, and what was done.
    "redis_lost_data": Event(ERROR, "Redis lost data"),  # source, detail
    "redis_evicted": Event(ERROR, "Redis evicted keys: set maxmemory-policy to noeviction"),  # keys
    "verifying": Event(INFO, "everything owed is verified"),  # source, cause
    "incident_resumed": Event(WARNING, "an earlier leader's incident goes on"),  # incident, detail
    "incident_closed": Event(
        INFO, "an incident is over"
    ),  # source, incident, missing, restored, seconds
    "worker_dead": Event(WARNING, "a worker is dead"),  # worker, name, host, pid, claims
    "jobs_suspected": Event(DEBUG, "jobs are absent; they will be looked at again"),  # count
    "jobs_untrusted": Event(
        ERROR, "jobs were absent before their queue was trusted: they are not recovered"
    ),  # queue, count
    "restores_held": Event(
        ERROR,
        "jobs were put back twice and taken each time without a claim: something runs or deletes them "
        "that jobguard does not see; they are held: `jobguard requeue`, or cancel them",
    ),  # path, count
    "claims_voided": Event(WARNING, "claims of dead workers were taken away"),  # count
    "restore_failed": Event(WARNING, "Redis answers a restore with an error"),  # error, token
    "job_not_restored": Event(WARNING, "a job was not put back"),  # job_id, answer
    "jobs_released": Event(
        INFO, "jobs that waited in vain for others, which had ended, go on"
    ),  # count
    "job_waits_for_unknown": Event(
        WARNING,
        "a job that was put back waits for jobs that nobody recorded: send these again, or cancel it",
    ),  # job_id, waits_for
    "jobs_restored": Event(INFO, "jobs were put back"),  # source, count, cause, seconds
    "joins_mended": Event(INFO, "what a library counts of joins was put back"),  # count
    "joins_finished": Event(
        INFO, "joins whose members had all ended were told to the library again"
    ),  # count
    "job_buried": Event(
        ERROR, "a job is dead: its crash budget is spent"
    ),  # job_id, queue, crashes
    "job_closed": Event(INFO, "a job was closed from what Redis shows"),  # job_id, outcome
    "would_restore": Event(INFO, "a job would have been put back (mode=observe)"),  # job_id, cause
    # Housekeeping.
    "vacuumed": Event(DEBUG, "tables were vacuumed"),  # tables
    "rotated": Event(INFO, "old history was dropped"),  # dropped
    "rotation_waits": Event(
        INFO, "a long reader of history (a backup) is in the way of retention; it is tried again"
    ),  # done
}


class _LastResort(logging.Handler):
    """Print warnings and errors to stderr where the host configured no handler that gets them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record if no other handler gets it."""
        if not has_handlers():
            self.print(record)

    def print(self, record: logging.LogRecord) -> None:
        """Print one line, unless the host switched the standard library's own last resort off."""
        if logging.lastResort is None or sys.stderr is None:
            return
        try:
            sys.stderr.write(f"jobguard: {record.levelname}: {record.getMessage()}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


_standard = logging.getLogger("jobguard")
_last_resort = _LastResort(WARNING)
_standard.addHandler(_last_resort)

_unheard: deque[tuple[str, Mapping[str, Any]]] = deque()
"""The first events that no handler of the host got: a host may configure logging late."""
_MOST_UNHEARD = 20


def has_handlers() -> bool:
    """Whether a handler of the host gets what we log."""
    logger: logging.Logger | None = _standard
    while logger is not None:
        if any(handler is not _last_resort for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def log_event(event: str, /, *, exc_info: Any = None, **fields: Any) -> None:
    """Tell that something happened; level and sentence are the table's.

    Events that repeat are bounded; see flood.py.
    """
    if _unheard and _is_heard(INFO):
        say_again()
    level, _ = EVENTS.get(event) or Event(WARNING, event)
    if level < INFO and not _standard.isEnabledFor(level) and event not in ENDS:
        return
    for line in FLOOD.passes(event, fields, exc_info):
        _write(*line, stacklevel=3)


def remind() -> None:
    """Write the lines that were held back as repetitions, and whose time has come. For loops."""
    for line in FLOOD.due():
        _write(*line, stacklevel=3)


@atexit.register
def _last_reminders() -> None:
    for line in FLOOD.rest():
        _write(*line, stacklevel=3)


def _write(event: str, fields: Mapping[str, Any], exc_info: Any, *, stacklevel: int) -> None:
    level, sentence = EVENTS.get(event) or Event(WARNING, event)
    if level >= INFO and not _is_heard(level) and len(_unheard) < _MOST_UNHEARD:
        _unheard.append((event, fields))
    if _standard.isEnabledFor(level):
        message, extra = _rendered(event, sentence, fields)
        _standard.log(level, "%s", message, exc_info=exc_info, extra=extra, stacklevel=stacklevel)
    elif _standard.disabled and level >= ERROR:
        # The host's logging.config disabled every logger that it does not name.
        message, extra = _rendered(event, sentence, fields)
        record = _standard.makeRecord("jobguard", level, "", 0, message, (), None, extra=extra)
        _last_resort.print(record)


def say_again() -> None:
    """Log the events that no handler got, for a worker whose library has configured logging by now."""
    early = list(_unheard)
    _unheard.clear()
    for event, fields in early:
        level, sentence = EVENTS.get(event) or Event(WARNING, event)
        if _is_heard(level):
            message, extra = _rendered(event, sentence, fields)
            _standard.log(level, "%s", message, extra=extra, stacklevel=3)


def _is_heard(level: int) -> bool:
    """Whether a handler of the host gets what is logged at this level."""
    at: logging.Logger | None = _standard
    while at is not None and _standard.isEnabledFor(level):
        for handler in at.handlers:
            if handler.level <= level and not isinstance(
                handler, logging.NullHandler | _LastResort
            ):
                return True
        at = at.parent if at.propagate else None
    return False


def get_logger(**bound: Any) -> BoundLogger:
    """Return a structlog logger whose events carry these fields, told as say() tells them."""
    from structlog import wrap_logger
    from structlog.stdlib import BoundLogger as Bound

    logger: BoundLogger = wrap_logger(
        _standard, processors=[_as_standard_call], wrapper_class=Bound, context_class=dict
    )
    return logger.bind(**bound)


def configure(level: str = "info", json: bool = False) -> None:
    """Log to stderr, for people or as one JSON object a line. For our own command line alone."""
    import structlog
    from structlog.stdlib import ProcessorFormatter
    from structlog.typing import Processor

    final: list[Processor] = [ProcessorFormatter.remove_processors_meta]
    if json:
        final += [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str, ensure_ascii=False),
        ]
    else:
        final += [structlog.dev.ConsoleRenderer(colors=_colours(), sort_keys=False)]
    formatter = ProcessorFormatter(
        foreign_pre_chain=[
            _fields_for_machines if json else _fields_for_people,
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
        ],
        processors=final,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # other libraries' chatter stays away
    _standard.setLevel(level.upper())


def _colours() -> bool:
    """Whether lines on stderr are coloured: https://no-color.org, https://force-color.org."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _rendered(
    event: str, sentence: str, fields: Mapping[str, Any]
) -> tuple[str, dict[str, dict[str, Any]]]:
    plain = {key: _plain(value) for key, value in fields.items()}
    pairs = "".join(f" {key}={value!r}" for key, value in plain.items())
    return sentence + pairs, {"jobguard": {"event": event, "sentence": sentence, **plain}}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseException):
        value = f"{type(value).__name__}: {value}"
    if isinstance(value, UUID):
        return str(value)
    return redact(value) if isinstance(value, str) else value


def _as_standard_call(
    _logger: Any, _method: str, fields: MutableMapping[str, Any]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    event = str(fields.pop("event", ""))
    kept = {name: fields.pop(name) for name in ("exc_info", "stack_info") if name in fields}
    known = EVENTS.get(event)
    message, extra = _rendered(event, known.sentence if known else event, fields)
    return ("%s", message), {"extra": extra, **kept}


def _fields_for_machines(
    _logger: Any, _method: str, line: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    fields_given = getattr(line["_record"], "jobguard", None)
    if fields_given:
        line.update(fields_given)
    return line


def _fields_for_people(
    _logger: Any, _method: str, line: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    fields_given = getattr(line["_record"], "jobguard", None)
    if fields_given:
        line.update(fields_given)
        line["event"] = line.pop("sentence")
    return line
