"""What jobguard says: every event's name, level and sentence, in one table.

Code announces what happened by name and with fields; the wording is here. Everything goes through
the standard logger ``jobguard`` and nowhere else, so that the host's logging decides what becomes
of it; without logging set up, nothing is printed. A record carries its event and fields as the
attribute ``jobguard`` (a mapping), for handlers that want more than text.

structlog is loaded when somebody binds a logger, and by ``configure``, which our command line alone
calls: its import costs a host 150 ms, and the first event is most often a sign of trouble.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from jobguard.flood import ENDS, FLOOD
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
    # Recording.
    "record_spooled": Event(WARNING, "records wait in the spool"),  # count
    "record_lost": Event(ERROR, "a record could be kept nowhere"),  # job_id, queue, error
    "record_skipped": Event(WARNING, "jobs go unrecorded while Postgres is away"),  # count
    "row_refused": Event(ERROR, "Postgres refuses a row for what is in it"),  # job_id, error
    "spool_replayed": Event(INFO, "the spool was replayed"),  # count, seconds
    "spool_left": Event(ERROR, "entries of the spool were never written to Postgres"),  # count
    "not_written": Event(DEBUG, "something was not written: Postgres is away"),  # what, error
    "pooler_found": Event(
        WARNING, "prepared statements are lost between calls, as behind a pooler; going without"
    ),
    "spool_full": Event(ERROR, "the spool is full"),  # size
    # Working.
    "worker_started": Event(INFO, "a guarded worker begins"),  # worker, name, queues
    "worker_renewed": Event(WARNING, "this worker was declared dead and goes on anew"),  # worker
    "worker_inherited": Event(
        WARNING, "this worker's process is gone, and its child that runs a job beats for it"
    ),  # worker, name
    "worker_left": Event(INFO, "a guarded worker said goodbye"),  # worker, name
    "start_skipped": Event(INFO, "a start was skipped"),  # job_id, queue, reason, outcome
    "start_unclaimed": Event(WARNING, "a job starts without a claim"),  # job_id
    "job_declined": Event(
        WARNING, "this worker cannot begin a job: it goes back later"
    ),  # job_id, tries_left, error
    "claim_lost": Event(WARNING, "a run's claim went to another worker"),  # job_id
    "start_unfenced": Event(WARNING, "a start was not granted, but the fence is off"),  # reason
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
    "ledger_behind": Event(ERROR, "Redis' pulse is ahead: Postgres went back in time"),  # source
    "queue_held": Event(ERROR, "a queue is held until `jobguard resume`"),  # source, queue, reason
    "queue_trusted": Event(INFO, "a queue is trusted"),  # source, queue
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
    "claims_voided": Event(WARNING, "claims of dead workers were taken away"),  # count
    "restore_failed": Event(WARNING, "Redis answers a restore with an error"),  # error, token
    "job_not_restored": Event(WARNING, "a job was not put back"),  # job_id, answer
    "jobs_released": Event(
        INFO, "jobs that waited in vain for others, which had ended, go on"
    ),  # count
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
}

_standard = logging.getLogger("jobguard")
# Else the standard library's last resort prints warnings to the stderr of hosts without logging.
_standard.addHandler(logging.NullHandler())


def say(event: str, /, *, exc_info: Any = None, **fields: Any) -> None:
    """Tell that something happened; level and sentence are the table's.

    Events that repeat are bounded; see flood.py.
    """
    level, _ = EVENTS.get(event) or Event(WARNING, event)
    if not _standard.isEnabledFor(level) and event not in ENDS:
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
    if _standard.isEnabledFor(level):
        message, extra = _told(event, sentence, fields)
        _standard.log(level, "%s", message, exc_info=exc_info, extra=extra, stacklevel=stacklevel)


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
        final += [structlog.dev.ConsoleRenderer(sort_keys=False)]
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


def _told(
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
    message, extra = _told(event, known.sentence if known else event, fields)
    return ("%s", message), {"extra": extra, **kept}


def _fields_for_machines(
    _logger: Any, _method: str, line: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    told = getattr(line["_record"], "jobguard", None)
    if told:
        line.update(told)
    return line


def _fields_for_people(
    _logger: Any, _method: str, line: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    told = getattr(line["_record"], "jobguard", None)
    if told:
        line.update(told)
        line["event"] = line.pop("sentence")
    return line
