"""Every setting with its default and its meaning, built once from arguments and environment.

An argument has priority over the environment, and the environment over the default. Only
``JOBGUARD_DISABLED=1`` has priority over everything. Every setting has the variable ``JOBGUARD_<NAME>``;
secrets also have ``JOBGUARD_<NAME>_FILE``, a file that is read again at every connect.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jobguard.errors import ConfigurationError
from jobguard.model import RecoverRule

PREFIX = "JOBGUARD_"

_OTHER_VARIABLES = frozenset(
    """
    DISABLED FAILPOINT FAILPOINT_LOGS FENCE LOG_JSON LOG_LEVEL POSTGRES_URL POSTGRES_URL_FILE
    NOTIFY_COMMAND NOTIFY_URL NOTIFY_URL_FILE REDIS_URL REDIS_URL_FILE TESTING TICK_SECRET
    TICK_SECRET_FILE
    """.split()  # noqa: SIM905 - a list would need 12 lines
)
# Options of single commands and of tests, and variables that Kubernetes sets for a service of that name.
_NOT_SETTINGS = re.compile(
    rf"{PREFIX}(?:ADOPT|BENCH|CANCEL|DASHBOARD|DEAD|DEMO|DOCTOR|DRIFT|ENCRYPT|FORGET|INCIDENTS|JOBS|MIGRATE"
    r"|PAUSE|PURGE|RECONCILE|REPLAY|REQUEUE|RESUME|RQ|RUN|SCHEDULES|STATS|TEST|TOP|WORKERS)_"
    rf"|{PREFIX}(?:.+_)?(?:SERVICE_(?:HOST|PORT)|PORT)(?:_|$)"
)

_KEY = re.compile(r"[\w=-]{43,44}")


def _setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of this process. Durations are seconds."""

    namespace: str = _setting("default", "the tenant; one reconciler leads in each namespace")
    source: str | None = _setting(
        None, "a name for the broker, if processes reach one Redis by different addresses"
    )
    installation: str | None = _setting(
        None, "the name that the database must have (`jobguard migrate --installation NAME`)"
    )
    mode: Literal["guard", "observe"] = _setting(
        "guard", "observe: record, detect and report losses, but restore no job"
    )
    connect: Literal["lazy", "require"] = _setting(
        "lazy", "require: guard() raises if Postgres cannot be reached or is not migrated"
    )
    durability: Literal["strict", "relaxed"] = _setting(
        "strict", "relaxed: do not wait for Postgres to flush a record (synchronous_commit=off)"
    )
    ends: Literal["batched", "durable"] = _setting(
        "batched", "durable: commit each end before the library's own acknowledgement"
    )
    when_postgres_down: Literal["spool", "raise", "skip"] = _setting(
        "spool",
        "the behaviour of enqueue while Postgres is away; for messages of a job, raise means spool",
    )
    when_redis_down: Literal["accept", "raise"] = _setting(
        "accept",
        "accept: enqueue succeeds while a reconciler leads; the job is pushed when Redis is back",
    )
    encrypt: str | Callable[[], Any] | None = _setting(  # noqa: RUF009 - a field
        None,
        "a file of Fernet keys, the newest first, or a callable that returns them: envelopes and errors "
        "are sealed in Postgres",
    )
    pooler: bool = _setting(False, "Postgres is behind pgbouncer: prepare no statements")
    connect_timeout: float = _setting(0.5, "limit of a connect to Postgres")
    call_timeout: float = _setting(0.25, "limit of one call to Postgres from a host process")
    record_timeout: float = _setting(1.0, "limit of all calls of one record together")
    redis_timeout: float = _setting(0.25, "limit of one command to Redis on jobguard's own client")
    retry_interval: float = _setting(
        1.0,
        "time between the first two checks whether Postgres is back; doubles up to 8 times this",
    )
    spool_size: int = _setting(
        100_000, "limit of the reports kept in memory while Postgres is away, in entries"
    )
    spool_bytes: int = _setting(
        64 << 20, "the same limit in bytes; above it, workers record the jobs that they start"
    )
    stream_bytes: int = _setting(
        256 << 20,
        "limit of the reports kept in Redis while Postgres is away; above it, records without their "
        "envelopes; above twice the limit, nothing",
    )
    ends_interval: float = _setting(
        0.05, "longest time that an end waits for others, to be committed together"
    )
    ends_batch: int = _setting(500, "number of waiting ends that are committed at once")
    beat_interval: float = _setting(3.0, "time between two beats of a worker")
    worker_timeout: float = _setting(
        15.0, "a worker is dead after this time without a beat, in Redis and in Postgres"
    )
    push_deadline: float = _setting(
        5.0, "a push that comes later than this after its record is left to the leader"
    )
    pulse_interval: float = _setting(0.5, "time between two ticks of the pulse")
    sweep_interval: float = _setting(
        60.0, "every owed job is inspected once in this time; longer with several 100,000 of them"
    )
    grace: float = _setting(
        10.0, "time between the two inspections of an absent job; see loss_grace"
    )
    loss_grace: float = _setting(1.0, "the same, after the pulse showed that Redis lost its data")
    lease: float = _setting(
        9.0, "length of a leader's lease; the leader renews it three times in this time"
    )
    recovery_rate: float = _setting(
        2000.0,
        "jobs restored each second after a loss, a failover or an eviction, and first pushes by the leader",
    )
    repair_rate: float = _setting(200.0, "jobs restored each second for all other causes")
    crash_budget: int = _setting(
        3, "number of worker deaths after which a job is dead and not restored again"
    )
    crash_backoff: tuple[float, ...] = _setting(
        (0.0, 30.0, 300.0), "waits before a job goes back after its 1st, 2nd, 3rd worker death"
    )
    recover_killed: bool = _setting(
        True, "a run that was killed, not failed, goes back within the crash budget"
    )
    recover: Mapping[str, RecoverRule] | None = _setting(
        None,
        "rules for tasks whose effects must not repeat, by name of the task: dead (a lost run is not "
        "repeated) or never (nor is a lost job restored)",
    )
    mend_library: bool = _setting(
        True, "repair faults of the queue library that end a worker or run a job twice"
    )
    unexplained: Literal["restore", "hold"] = _setting(
        "restore", "the decision about a job that is absent without a known cause"
    )
    brake_count: int = _setting(
        100, "a queue goes on hold above this number of unexplained absences a minute"
    )
    brake_share: float = _setting(
        0.01, "or above this share of the queue's owed jobs, if more than 10 are absent"
    )
    retention: float = _setting(7 * 86400.0, "time that ended deliveries stay in the history")
    keep_envelopes: bool = _setting(
        False,
        "the reconciler's: history keeps completed jobs whole, so that `jobguard replay` runs them",
    )
    redact_arguments: bool = _setting(
        False,
        "commands and pages show no arguments of jobs (JSON ones are shown, pickled ones never)",
    )
    page: int = _setting(2000, "number of owed deliveries that are inspected in one page")

    def recover_rule(self, task: str) -> RecoverRule | None:
        """Return the rule for the recovery of a task; None: it is restored whenever it is lost."""
        return None if self.recover is None else self.recover.get(task)

    def fingerprint(self) -> str:
        """Return the settings that must be equal in all processes of one source, as readable text."""
        # "fence=true" stays: processes of version 0.1.0 store and compare it.
        return f"namespace={self.namespace} fence=true mode={self.mode}"


def disabled(environ: Mapping[str, str] | None = None) -> bool:
    """Return True if JOBGUARD_DISABLED switches everything off."""
    environ = os.environ if environ is None else environ
    return environ.get("JOBGUARD_DISABLED", "").strip().lower() in ("1", "true", "yes", "on")


def settings_from(
    arguments: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Build the settings.

    Raises ConfigurationError, which names all problems.
    """
    arguments = {} if arguments is None else arguments
    environ = os.environ if environ is None else environ
    hints = get_type_hints(Settings)
    names = [f.name for f in fields(Settings)]
    arguments, problems = _without_fence(arguments, environ)
    problems += [_unknown(name, names) for name in arguments if name not in names]
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for name in names:
        variable = PREFIX + name.upper()
        if name in arguments and arguments[name] is not None:
            given, where = arguments[name], name
        elif environ.get(variable, "") != "":
            given, where = environ[variable], variable
        else:
            continue
        places[name] = where
        try:
            values[name] = _coerce(given, hints[name])
        except ValueError as error:
            problems.append(f"{where}={given!r}: {error}")
    settings = None
    if not problems:
        settings = Settings(**values)
        problems = _nonsense(settings, places)
    if problems or settings is None:
        raise ConfigurationError("; ".join(problems))
    return settings


def unknown_variables(environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the unknown variables JOBGUARD_…, each with the most similar known variable."""
    environ = os.environ if environ is None else environ
    known = {f.name.upper() for f in fields(Settings)} | _OTHER_VARIABLES
    unknown = []
    for variable in sorted(environ):
        name = variable.removeprefix(PREFIX)
        if name == variable or name in known or _NOT_SETTINGS.match(variable):
            continue
        close = difflib.get_close_matches(name, known, n=1)
        unknown.append(variable + (f" (did you mean {PREFIX}{close[0]}?)" if close else ""))
    return unknown


def _without_fence(
    arguments: Mapping[str, Any], environ: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments without ``fence``, a setting of earlier versions, and the problems with it.

    The value True changes nothing and is accepted. Any other value is a problem.
    """
    kept = dict(arguments)
    given = {
        "fence": kept.pop("fence", None),
        "JOBGUARD_FENCE": environ.get("JOBGUARD_FENCE") or None,
    }
    problems = []
    for where, value in given.items():
        try:
            if value is None or _coerce(value, bool):
                continue
        except ValueError:
            pass
        problems.append(
            f"{where}={value!r}: the fence is always on; remove this setting. To try jobguard "
            "without an effect on jobs, set mode='observe' (JOBGUARD_MODE=observe)"
        )
    return kept, problems


def _unknown(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"there is no setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")


def _coerce(given: Any, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if given not in choices:
            raise ValueError(f"must be one of {', '.join(map(repr, choices))}")
        return given
    if kind is bool:
        if isinstance(given, bool):
            return given
        word = str(given).strip().lower()
        if word not in ("1", "0", "true", "false", "yes", "no", "on", "off"):
            raise ValueError("must be true or false")
        return word in ("1", "true", "yes", "on")
    if kind == Mapping[str, RecoverRule] | None:
        return _rules(given)
    if get_origin(kind) is tuple:
        parts = given.split(",") if isinstance(given, str) else given
        try:
            return tuple(float(part) for part in parts)
        except (TypeError, ValueError):
            raise ValueError("must be numbers, separated by commas") from None
    if callable(given) and any(get_origin(one) is Callable for one in get_args(kind)):
        return given
    if kind in (int, float):
        try:
            return kind(given)
        except (TypeError, ValueError):
            raise ValueError(f"must be a number of type {kind.__name__}") from None
    return str(given)


def _rules(given: Any) -> Mapping[str, RecoverRule]:
    if isinstance(given, str):
        given = dict(part.strip().rpartition("=")[::2] for part in given.split(","))
    if not isinstance(given, Mapping):
        raise ValueError("must be rules by task: {'app.charge': 'dead'}, or app.charge=dead,…")
    for task, rule in given.items():
        if not (isinstance(task, str) and task and rule in get_args(RecoverRule)):
            raise ValueError(
                f"the rule of the task {task!r} is {rule!r}: write task=dead or task=never"
            )
    return dict(given)


def _nonsense(settings: Settings, places: Mapping[str, str]) -> list[str]:
    """Return the problems of values that are invalid; ``places``: the name by which each was given."""
    problems = [
        f"{places.get(f.name, f.name)} must be more than 0, not {getattr(settings, f.name)!r}"
        for f in fields(Settings)
        if isinstance(getattr(settings, f.name), int | float)
        and not isinstance(getattr(settings, f.name), bool)
        and getattr(settings, f.name) <= 0
    ]
    if settings.worker_timeout < 2 * settings.beat_interval:
        problems.append(
            f"{places.get('worker_timeout', 'worker_timeout')} ({settings.worker_timeout}) must be at "
            f"least twice {places.get('beat_interval', 'beat_interval')} ({settings.beat_interval}), "
            "otherwise one late beat looks like a death"
        )
    given = settings.encrypt
    if isinstance(given, str) and _KEY.fullmatch(given):
        problems.append(
            f"{places.get('encrypt', 'encrypt')} is a key: put it into a file, and give the path"
        )
    if not settings.namespace.strip():
        problems.append(f"{places.get('namespace', 'namespace')} must not be empty")
    if not settings.crash_backoff or min(settings.crash_backoff) < 0:
        where = places.get("crash_backoff", "crash_backoff")
        problems.append(f"{where} must be a list of seconds, 0 or more")
    return problems
