"""The log events of jobguard: the name, the level and the sentence of each, in one table.

The code logs an event by its name and with fields; its sentence is in this table. Every line goes through
the standard logger ``jobguard``, so that the host's logging configuration decides where it goes. Without
a logging configuration, warnings and errors go to stderr. A log record has its event and fields in the
attribute ``jobguard`` (a mapping), for handlers that want more than text.

Only ``configure`` loads structlog, and only our command line calls ``configure``. The import takes 150 ms,
and a host should not lose that time when the first event, most often a sign of trouble, is logged.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections import deque
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple
from uuid import UUID

from jobguard.log_bounds import ENDS, LINE_BOUNDS
from jobguard.redact import redact

DEBUG, INFO, WARNING, ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR


class Event(NamedTuple):
    """The level and the sentence of an event."""

    level: int
    sentence: str


EVENTS: Mapping[str, Event] = {
    # The stores, as a host process sees them.                                 fields
    "postgres_away": Event(
        WARNING, "Postgres does not answer; jobguard goes on without it"
    ),  # error
    "postgres_back": Event(INFO, "Postgres answers again"),  # seconds
    "not_migrated": Event(ERROR, "the schema does not exist: run `jobguard migrate`"),  # place
    "no_rights": Event(
        ERROR, "the role may not use the schema: see `jobguard migrate --roles`"
    ),  # error
    "wrong_installation": Event(
        ERROR, "this database belongs to another installation"
    ),  # has, wants
    "redis_away": Event(WARNING, "Redis does not answer"),  # source, error
    "redis_back": Event(INFO, "Redis answers again"),  # source, seconds
    "redis_refuses": Event(ERROR, "Redis refuses to store jobs"),  # source, error, waiting
    "redis_accepts": Event(INFO, "Redis stores jobs again"),  # source, seconds, refused
    "value_unreadable": Event(
        WARNING, "a value in Redis cannot be read and is skipped"
    ),  # source, key, error
    # Guarding.
    "guarded": Event(INFO, "a source is guarded"),  # source, queues, postgres
    "guard_inert": Event(INFO, "nothing is guarded here"),  # reason
    "guard_refused": Event(ERROR, "a target cannot be guarded"),  # error
    "guard_differs": Event(
        ERROR,
        "a job called guard() with other settings than its worker has, and those of the worker hold: give "
        "the worker the same ones by JOBGUARD_… variables, or by `rq worker -c MODULE` with a module that "
        "calls guard()",
    ),  # error
    "guard_late": Event(
        ERROR, "runs are not guarded: call guard() before the worker of this process starts"
    ),  # source
    "brokers_listed": Event(
        WARNING,
        "of several brokers only the first is guarded, and tasks wait for it while it is away: name one "
        "broker, or use Sentinel",
    ),  # guarded
    "adapter_loaded": Event(DEBUG, "an adapter is installed"),  # library
    "adapter_failed": Event(ERROR, "an adapter could not be installed"),  # library, error
    "settings_differ": Event(
        ERROR, "processes of one source have different settings"
    ),  # source, here, there
    "guest_failed": Event(
        ERROR, "jobguard failed, and the host continued without it"
    ),  # where, error
    "postgres_unnamed": Event(
        WARNING, "nothing is guarded in this process: no usable Postgres is named"
    ),  # reason
    "variable_unknown": Event(
        WARNING, "an environment variable JOBGUARD_… is unknown and has no effect"
    ),  # variable
    "redis_option_unknown": Event(
        WARNING, "an option of a Redis URL is unknown and has no effect"
    ),  # redis, option
    # Recording.
    "record_spooled": Event(WARNING, "records wait in the spool"),  # count
    "record_lost": Event(
        ERROR, "a record was lost: neither Postgres nor the spool took it"
    ),  # job_id, queue, error
    "record_skipped": Event(WARNING, "jobs are not recorded while Postgres is away"),  # count
    "row_refused": Event(ERROR, "Postgres refuses a row because of its content"),  # job_id, error
    "spool_replayed": Event(
        INFO, "the entries of the spool were written to Postgres"
    ),  # count, seconds
    "spool_left": Event(
        ERROR, "entries of the spool were not written to Postgres when the process ended"
    ),  # count, job_ids, aside
    "not_written": Event(DEBUG, "a report was not written: Postgres is away"),  # what, error
    "pooler_found": Event(
        INFO,
        "Postgres is behind a pooler: jobguard prepares no statements and sets its session settings in "
        "each transaction",
    ),
    "keys_unreadable": Event(
        ERROR, "the keys of the setting encrypt cannot be read again: the ones before are used"
    ),  # error
    "envelopes_sealed": Event(
        ERROR, "envelopes are sealed, and this reconciler has no key: it cannot put these jobs back"
    ),  # source, error, waiting
    "envelopes_unsealed": Event(
        INFO, "the sealed envelopes can be read again"
    ),  # source, seconds, refused
    "http_serves": Event(INFO, "the reconciler answers HTTP"),  # address
    "http_failed": Event(ERROR, "an HTTP request failed"),  # path, error
    "metrics_unread": Event(
        WARNING, "the metrics of the ledger cannot be read: Postgres is away"
    ),  # error
    "notices_unread": Event(
        WARNING, "the ledger cannot be read for notices: Postgres is away"
    ),  # error
    "notice_lost": Event(
        ERROR, "a notice could not be delivered and is dropped"
    ),  # receiver, id, error
    "settings_reduced": Event(
        INFO, "this Postgres does not know all settings of jobguard's sessions"
    ),  # error
    "spool_full": Event(
        ERROR, "the spool is full: jobs are not recorded until it has room"
    ),  # entries, bytes, count, lost
    "spool_lightened": Event(
        WARNING,
        "the spool has reached its limit in bytes: it drops the envelopes of jobs that are in Redis; "
        "the workers that start these jobs record them",
    ),  # count, bytes
    "stream_refused": Event(
        WARNING, "Redis refuses to keep the reports that Postgres cannot take"
    ),  # error
    "stream_full": Event(
        ERROR,
        "the stream of reports in Redis is full: reports stay in the memory of their processes",
    ),  # bytes
    "stream_drained": Event(
        INFO, "the reports that waited in Redis were written to Postgres"
    ),  # source, count, seconds
    "stream_left": Event(
        WARNING, "reports in Redis cannot be read or written, and stay there"
    ),  # source, count, error
    "backlog_recorded": Event(
        INFO, "jobs that wait in Redis without a record were recorded"
    ),  # source, recorded, waiting, unreadable
    "spool_has_room": Event(INFO, "the spool is empty again"),  # lost
    "entry_set_aside": Event(
        WARNING,
        "an entry of the spool fails while Postgres answers: it is set aside and tried again later",
    ),  # job_id, kind, bytes, aside, error
    "entry_given_up": Event(ERROR, "an entry that was set aside is dropped"),  # job_id, error
    "aside_written": Event(INFO, "the entries that were set aside are written"),
    # Working.
    "worker_started": Event(INFO, "a guarded worker starts"),  # worker, name, queues
    "worker_renewed": Event(
        WARNING, "this worker was declared dead and continues under a new id"
    ),  # worker
    "worker_inherited": Event(
        WARNING,
        "the process of this worker has ended, and its child that runs a job sends its beats",
    ),  # worker, name
    "worker_left": Event(INFO, "a guarded worker left"),  # worker, name
    "start_skipped": Event(INFO, "a start was skipped"),  # job_id, queue, reason, outcome
    "start_not_allowed": Event(
        WARNING, "a start was refused: Postgres is away, and the task must not be repeated"
    ),  # recover
    "start_unclaimed": Event(WARNING, "a job starts without a claim"),  # job_id
    "start_waits": Event(
        INFO, "a job that may have caused a worker's death waits until it can run alone"
    ),  # token
    "job_declined": Event(
        WARNING, "this worker cannot begin a job: the job goes back later"
    ),  # job_id, tries_left, error
    "claim_lost": Event(WARNING, "another worker has taken the claim of a run"),  # job_id
    "start_unfenced": Event(
        WARNING, "the claim of a start was refused, but the job runs (mode=observe)"
    ),  # reason
    "nobody_leads": Event(
        WARNING, "a start was skipped while no reconciler leads: run `jobguard reconcile`"
    ),
    "beat_unheard": Event(DEBUG, "a store did not take a beat"),  # store, error
    "source_differs": Event(
        ERROR,
        "the reconciler knows this Redis as another source than this process does: use one address "
        "everywhere, or set JOBGUARD_SOURCE to one name",
    ),  # source
    "redis_recognized": Event(
        INFO, "a Redis is guarded that this process reaches by another address"
    ),  # redis, source
    "redis_unrecognized": Event(
        WARNING,
        "it is not known whether a Redis is a guarded one by another address: jobs that are sent there are "
        "not recorded until it is; use one address everywhere, or grant +info",
    ),  # redis, error
    "pulse_elsewhere": Event(
        ERROR,
        "the reconciler inspects another Redis for this source than this process uses, and may put jobs of "
        "this one there: give each Redis a JOBGUARD_SOURCE of its own, or correct its address",
    ),  # source, redis, epoch
    "end_late": Event(
        WARNING, "a report of an end came too late and changed nothing"
    ),  # job_id, number
    "connection_unnamed": Event(
        WARNING,
        "Redis refuses CLIENT SETNAME: a leader cannot tell this worker from an unguarded one, and "
        "recovers nothing; grant +client|setname",
    ),  # error
    "push_left": Event(
        WARNING, "a committed job could not be pushed now; the leader pushes it"
    ),  # source, error
    "key_held": Event(INFO, "a job is not sent: another one holds its key"),  # job_id, key, holder
    "push_skipped": Event(INFO, "a job has ended or moved on: it is not pushed"),  # job_id
    "job_skipped": Event(WARNING, "a worker skips a job that it must not run"),  # job_id, reason
    "run_killed": Event(
        WARNING, "a job was killed and has not failed: it is restored within its crash budget"
    ),  # job_id
    "run_not_stopped": Event(
        INFO, "a cold shutdown waits for a run, because this pool cannot stop it"
    ),  # job_id
    "run_not_begun": Event(
        WARNING, "Redis failed before the function of a job was called: the job goes back later"
    ),  # job_id, error
    "run_exited": Event(
        WARNING, "a job ended its own process: it is restored within its crash budget"
    ),  # job_id
    "end_lost": Event(
        ERROR, "the worker of a job is gone: the end of the job cannot be reported"
    ),  # job_id
    "redis_call_failed": Event(
        WARNING, "the state of a run could not be read or written in Redis"
    ),  # where, job_id, worker, error
    "scheduler_waits": Event(WARNING, "the scheduler of the library waits for Redis"),  # error
    "schedule_unrecorded": Event(
        ERROR,
        "a job is scheduled outside of RQ's own registry, as rq-scheduler does: until they are "
        "enqueued, such jobs are only in Redis. Use Queue.enqueue_at or RQ's cron, or schedule them "
        "again after a loss of Redis. This is logged once",
    ),  # job_id
    "announcement_failed": Event(
        DEBUG, "a worker could not announce itself in Redis"
    ),  # where, error
    "unacked_not_renewed": Event(
        DEBUG, "a worker could not renew its messages in unacked"
    ),  # error
    "task_skipped": Event(WARNING, "a task is skipped"),  # job_id, task, reason
    "task_unknown": Event(
        ERROR, "a task is not registered here: it goes back, for other workers"
    ),  # job_id, task
    "child_lost": Event(WARNING, "a child is lost, but its task has ended"),  # job_id, outcome
    "outcome_undecided": Event(
        WARNING, "the outcome of a task is decided when Postgres is back"
    ),  # job_id
    "result_unstored": Event(WARNING, "the result of a task could not be stored"),  # job_id, error
    "failure_ignored": Event(
        WARNING, "a task has not failed, only the library's report of its end"
    ),  # job_id, error
    "chord_size_waits": Event(
        WARNING, "Redis is away: it gets the size of a chord when it is back"
    ),  # chord, error
    "chord_waits": Event(
        WARNING, "Redis failed before a chord could go on: the chord goes on when Redis is back"
    ),  # chord
    "part_unkept": Event(DEBUG, "the result of a chord's part cannot be kept"),  # where, error
    "join_unreadable": Event(
        WARNING, "the library's counters of a join cannot be put back"
    ),  # join, error
    "message_undecodable": Event(ERROR, "a message cannot be decoded"),  # queue, error
    "messages_lost": Event(
        WARNING, "a worker has lost messages from its memory: they are requeued"
    ),  # queue, count
    "messages_unchecked": Event(
        DEBUG, "lost messages are not checked: Redis does not answer"
    ),  # error
    "requeue_failed": Event(
        WARNING, "messages could not be requeued: they are requeued later"
    ),  # queue, error
    "consumer_restarted": Event(
        ERROR, "the thread of a consumer had ended, and is restarted"
    ),  # queue
    "removal_failed": Event(
        DEBUG, "messages of ended runs are not removed: Redis does not answer"
    ),  # error
    "group_continued": Event(
        WARNING, "all members of a group have completed: its callbacks are sent"
    ),  # group
    "continuation_lost": Event(
        ERROR, "a continuation of a job could not be sent: the job runs again"
    ),  # job_id
    "report_unknown": Event(
        WARNING, "Redis does not answer whether the death of a job is reported"
    ),  # job_id, error
    "callback_failed": Event(ERROR, "the failure callback of a dead job failed"),  # job_id, error
    # Leading.
    "reconciler_started": Event(INFO, "the reconciler starts"),  # namespace, postgres, redis
    "reconciler_stopped": Event(INFO, "the reconciler stops"),  # namespace
    "leader_elected": Event(INFO, "this process is the leader"),  # namespace, term
    "leader_resigned": Event(INFO, "this process is no longer the leader"),  # namespace, term
    "leader_lost": Event(WARNING, "the lease was lost"),  # namespace, term, error
    "lease_unrenewed": Event(WARNING, "the lease could not be renewed"),  # error
    "step_failed": Event(ERROR, "a step failed and will be tried again"),  # part, error
    "step_stuck": Event(
        ERROR, "a step takes too long; its connections are closed"
    ),  # source, seconds
    "hook_failed": Event(ERROR, "a function of guard.on() failed"),  # hook, error
    "hook_slow": Event(WARNING, "a function of guard.on() delays jobs"),  # hook, seconds
    "sql_warning": Event(WARNING, "Postgres warns"),  # warning, hint
    "request_held": Event(
        WARNING,
        "a job that SQL or a schedule asked for cannot be sent: it is kept, with the reason",
    ),  # job_id, error
    "schedule_wrong": Event(
        ERROR, "a schedule cannot be planned: change it, or remove it"
    ),  # schedule, error
    "slots_skipped": Event(
        WARNING, "slots of a schedule were missed and are not made up for"
    ),  # schedule, count
    "watching": Event(INFO, "a source is watched"),  # source
    "source_unwatched": Event(
        ERROR, "no Redis URL was given for a source: add it to --redis or JOBGUARD_REDIS_URL"
    ),  # source, given
    "adapter_missing": Event(
        ERROR, "there is no adapter for the library of a source"
    ),  # library, install
    "wrong_redis": Event(
        ERROR,
        "the workers see a current pulse and this reconciler sees none: the reconciler is at the wrong "
        "Redis",
    ),  # source
    "foreign_pulse": Event(
        ERROR,
        "another ledger keeps its pulse in this Redis: no job is restored; give one of the two ledgers "
        "another JOBGUARD_NAMESPACE, or run `jobguard resume --moved` if the other one is gone",
    ),  # source
    "place_unsure": Event(
        ERROR, "no job is restored until a person runs `jobguard resume`"
    ),  # source, reason
    "ledger_moved": Event(
        ERROR, "this database was copied or moved: run `jobguard resume --moved`"
    ),  # was, is_now
    "identity_partial": Event(
        INFO,
        "this Postgres does not show its system identifier: jobguard recognises a copy of the database "
        "only by the number of the database",
    ),  # error
    "ledger_behind": Event(
        ERROR, "the pulse in Redis is ahead: Postgres was set back to an earlier state"
    ),  # source
    "queue_held": Event(
        ERROR, "the recoveries of a queue are on hold until `jobguard resume`"
    ),  # source, queue, reason
    "queue_trusted": Event(INFO, "a queue is trusted"),  # source, queue
    "consumers_uncounted": Event(
        WARNING,
        "Redis does not list its clients: unguarded workers are found only by their names; grant "
        "+client|list and +pubsub",
    ),  # source, error
    "queue_untrusted": Event(
        WARNING, "unguarded workers take jobs from a queue"
    ),  # source, queue, workers
    "worker_elsewhere": Event(
        ERROR,
        "a guarded worker does not report to this ledger, so its queues are not restored: give it the "
        "JOBGUARD_POSTGRES_URL and JOBGUARD_NAMESPACE of this reconciler",
    ),  # source, worker
    "worker_in_another_redis": Event(
        ERROR,
        "a worker of this source takes its jobs from another Redis than this reconciler inspects, so its "
        "queues are not restored: give each Redis a JOBGUARD_SOURCE of its own, or correct its address",
    ),  # source, worker, host, pid
    # Losses and recoveries.
    "redis_lost_data": Event(ERROR, "Redis lost data"),  # source, detail
    "redis_is_cluster": Event(
        ERROR,
        "Redis is in cluster mode, and nothing can be restored: scripts need all keys of a job on one node",
    ),  # source
    "redis_evicted": Event(ERROR, "Redis evicted keys: set maxmemory-policy to noeviction"),  # keys
    "verifying": Event(INFO, "the reconciler verifies all owed jobs"),  # source, cause
    "incident_resumed": Event(
        WARNING, "this leader continues the incident of an earlier leader"
    ),  # incident, detail
    "incident_closed": Event(
        INFO, "an incident is over"
    ),  # source, incident, missing, restored, seconds
    "worker_dead": Event(WARNING, "a worker is dead"),  # worker, name, host, pid, claims
    "jobs_suspected": Event(DEBUG, "jobs are absent; they will be inspected again"),  # count
    "jobs_untrusted": Event(
        ERROR, "jobs were absent before their queue was trusted: they are not recovered"
    ),  # queue, count
    "restores_held": Event(
        ERROR,
        "jobs were restored twice, and each time they were taken without a claim: a process that "
        "jobguard does not see runs or deletes them; they are not restored again: run "
        "`jobguard requeue`, or cancel them",
    ),  # path, count
    "claims_voided": Event(WARNING, "the claims of dead workers were voided"),  # count
    "restore_failed": Event(WARNING, "Redis answers a restore with an error"),  # error, token
    "job_not_restored": Event(WARNING, "a job was not restored"),  # job_id, answer
    "jobs_released": Event(INFO, "jobs whose dependencies have all ended were released"),  # count
    "job_waits_for_unknown": Event(
        WARNING,
        "a restored job waits for jobs that are not recorded: send those jobs again, or cancel this one",
    ),  # job_id, waits_for
    "jobs_restored": Event(INFO, "jobs were restored"),  # source, count, cause, seconds
    "joins_mended": Event(INFO, "the library's counters of joins were restored"),  # count
    "joins_finished": Event(
        INFO, "the last members of joins whose members had all ended were pushed again"
    ),  # count
    "job_buried": Event(
        ERROR, "a job is dead: its crash budget is spent, or its task must not be repeated"
    ),  # job_id, queue, reason
    "job_closed": Event(INFO, "a job was closed because Redis shows its end"),  # job_id, outcome
    "would_restore": Event(INFO, "a job would have been restored (mode=observe)"),  # job_id, cause
    # Housekeeping.
    "vacuumed": Event(DEBUG, "tables were vacuumed"),  # tables
    "rotated": Event(INFO, "old history was dropped"),  # dropped
    "rotation_waits": Event(
        INFO, "a long read of the history (a backup) blocks its rotation; jobguard tries again"
    ),  # done
}


class _LastResort(logging.Handler):
    """Print warnings and errors to stderr if the host configured no handler that gets them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record if no other handler gets it."""
        if not has_handlers():
            self.print(record)

    def print(self, record: logging.LogRecord) -> None:
        """Print one line, unless the host switched off the last resort of the standard library."""
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

_undelivered: deque[tuple[str, Mapping[str, Any]]] = deque()
"""The first events that no handler of the host got, because a host may configure logging late."""
_MOST_UNDELIVERED = 20


def has_handlers() -> bool:
    """Return True if a handler of the host gets our log records."""
    logger: logging.Logger | None = _standard
    while logger is not None:
        if any(handler is not _last_resort for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def log_event(event: str, /, *, exc_info: Any = None, **fields: Any) -> None:
    """Log an event; its level and its sentence are in the table.

    The lines of an event that repeats are bounded; see log_bounds.py.
    """
    if _undelivered and _is_handled(INFO):
        log_again()
    level, _ = EVENTS.get(event) or Event(WARNING, event)
    if level < INFO and not _standard.isEnabledFor(level) and event not in ENDS:
        return
    for line in LINE_BOUNDS.passes(event, fields, exc_info):
        _write(*line, stacklevel=3)


def remind() -> None:
    """Write the suppressed repetitions that are due now. Loops call this."""
    for line in LINE_BOUNDS.due():
        _write(*line, stacklevel=3)


@atexit.register
def _last_reminders() -> None:
    for line in LINE_BOUNDS.rest():
        _write(*line, stacklevel=3)


def _write(event: str, fields: Mapping[str, Any], exc_info: Any, *, stacklevel: int) -> None:
    level, sentence = EVENTS.get(event) or Event(WARNING, event)
    if level >= INFO and not _is_handled(level) and len(_undelivered) < _MOST_UNDELIVERED:
        _undelivered.append((event, fields))
    if _standard.isEnabledFor(level):
        message, extra = _rendered(event, sentence, fields)
        _standard.log(level, "%s", message, exc_info=exc_info, extra=extra, stacklevel=stacklevel)
    elif _standard.disabled and level >= ERROR:
        # The host's logging.config disabled every logger that it does not name.
        message, extra = _rendered(event, sentence, fields)
        record = _standard.makeRecord("jobguard", level, "", 0, message, (), None, extra=extra)
        _last_resort.print(record)


def log_again() -> None:
    """Log the events that no handler got. Called in a worker after its library has configured logging."""
    early = list(_undelivered)
    _undelivered.clear()
    for event, fields in early:
        level, sentence = EVENTS.get(event) or Event(WARNING, event)
        if _is_handled(level):
            message, extra = _rendered(event, sentence, fields)
            _standard.log(level, "%s", message, extra=extra, stacklevel=3)


def _is_handled(level: int) -> bool:
    """Return True if a handler of the host gets records of this level."""
    at: logging.Logger | None = _standard
    while at is not None and _standard.isEnabledFor(level):
        for handler in at.handlers:
            if handler.level <= level and not isinstance(
                handler, logging.NullHandler | _LastResort
            ):
                return True
        at = at.parent if at.propagate else None
    return False


def configure(level: str = "info", json: bool = False) -> None:
    """Log to stderr, for people or as one JSON object a line. Only our command line calls this."""
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
        # The usual traceback prints local variables, which may be passwords or arguments of jobs.
        plain = structlog.dev.plain_traceback
        renderer = structlog.dev.ConsoleRenderer(
            colors=_colours(), sort_keys=False, exception_formatter=plain
        )
        final += [renderer]
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
    root.setLevel(logging.WARNING)  # of other libraries, only warnings and errors
    _standard.setLevel(level.upper())


def _colours() -> bool:
    """Return True for coloured lines on stderr: https://no-color.org, https://force-color.org."""
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
