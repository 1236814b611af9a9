"""The process of the reconciler: it finds its sources, leads or stands by, and does not end on an error."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from importlib.metadata import entry_points
from typing import Any
from uuid import UUID

import redis
import tenacity

from jobguard.adapter import Adapter, Broker, Source
from jobguard.clients import address_of, client_from_url
from jobguard.errors import JobguardError, NotLeading, StoreUnavailable, WrongInstallation
from jobguard.host.stream import ReportStream, sources_with_streams
from jobguard.log import log_event
from jobguard.model import new_token
from jobguard.reconciler import requests
from jobguard.reconciler.leader import Leadership
from jobguard.reconciler.result import PassResult
from jobguard.reconciler.runner import Runner, SharedSigns
from jobguard.reconciler.source_monitor import SourceMonitor
from jobguard.reconciler.stream_drain import StreamDrain
from jobguard.reconciler.vigil import Vigil
from jobguard.redis_urls import parse
from jobguard.settings import Settings
from jobguard.store.host import PostgresStore
from jobguard.store.leader import PostgresLeaderStore, with_patience
from jobguard.store.protocols import HostStore, LeaderStore, SourceRow

Clients = Mapping[str, Callable[[], redis.Redis]]
"""Functions that make a client for each Redis, by its address."""

_CLIENT_TIMEOUT = 1.0
_STEP = 0.1
"""Seconds between two checks of the threads of the sources."""
_SOURCES = 5.0
"""Seconds between two searches for sources; the signs show a new one sooner."""
_SOON = 1.0
"""The same while nothing may be restored, or after the thread of a source has ended."""
_STUCK = 30.0
"""Seconds of one step after which its connections to Redis are cut."""
_GIVE_UP = 60.0
"""Seconds of one step after which the term is given up, and the stuck thread is abandoned."""
_LOOP_STUCK = 120.0
"""Seconds without a turn of the main loop after which the lease is not renewed."""
_LEFT_BEHIND = 8
"""Number of stuck threads that may be abandoned; with more of them alive, this process leads no
more."""
_VIGIL = 5.0
"""Seconds between two searches for new sources while this process does not lead."""
_STREAMS = 5.0
"""Seconds between two searches for streams of unknown sources."""
_HOUSEKEEPING = 5.0
_QUIET = 60.0
"""Seconds between two counts, and between two pieces of housekeeping, when nothing is owed."""
_ROTATE = 3600.0
_CHORE_AGAIN = 60.0
"""Seconds until a piece of housekeeping is tried again that failed: a backup may read the history."""
_COUNT = 10.0
"""Seconds between two counts."""
_COUNTED = 90.0
"""Seconds whose ends each count includes."""
_RECOUNT, _RECOUNTED = 600.0, 3700.0
"""The same for a count of a longer time."""
_REQUESTS = "requests"
"""The name of the runner that is of no single source."""
_JOIN = 3.0
"""Seconds that the end waits for the present steps."""


class Service:
    """One reconciler process of one namespace."""

    def __init__(
        self,
        settings: Settings,
        conninfo: Callable[[], str],
        clients: Clients,
        *,
        store: Callable[[UUID], LeaderStore] | None = None,
        host_store: Callable[[], HostStore] | None = None,
    ) -> None:
        self._make_host_store = host_store or partial(_host_store, conninfo, settings)
        self._settings = settings
        self._clients = clients
        self._holder = new_token()
        make = store or (
            lambda holder: PostgresLeaderStore(conninfo, settings.namespace, holder, settings)
        )
        self._make_store = partial(make, self._holder)
        self._store = make(self._holder)
        # The lease has its own connection, so that a long inspection cannot cost the lease.
        self._lease_store = make(self._holder)
        self._vigil = Vigil(self._broker_of, longest=2 * settings.lease)
        self._leadership = Leadership(
            self._lease_store,
            lease=settings.lease,
            healthy=self._is_healthy,
            watched_for=self._vigil.watched_for,
        )
        self._runners: dict[int | str, Runner] = {}
        self._signs = SharedSigns(0)
        self._sources_found = -1
        self._rows: dict[int, SourceRow] = {}
        self._readers: dict[str, redis.Redis] = {}
        self._brokers: dict[int, Broker] = {}
        self._left_behind: list[Runner] = []
        self._turn_at: float | None = None
        self._unreachable: set[int] = set()
        self._adapters: dict[str, Adapter | None] = {}
        self._stop = threading.Event()
        self._seeking = False
        self._due: dict[str, float] = {}
        self._wrong_place: str | None = None
        self._term_watched: int | None = None
        self._earlier = PassResult()  # of the threads that ended

    # -- as others see it --------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """True if this process surely leads now."""
        return self._leadership.leads

    def stuck(self) -> str | None:
        """Return why this process must be restarted; None: it works."""
        turn = self._turn_at
        if turn is not None and time.monotonic() - turn >= _LOOP_STUCK:
            return "the main loop is stuck"
        for runner in (*self._runners.copy().values(), *self._left_behind):
            if runner.alive and runner.stuck_for() >= _GIVE_UP:
                return f"a step of {runner.name} has been stuck for {runner.stuck_for():.0f} s"
        return None

    def unready(self) -> str | None:
        """Return why this process could neither lead nor take over now; None: it could."""
        silent = self._leadership.silent_for()
        if silent is None:
            return "Postgres has not answered yet"
        if silent > self._settings.lease:
            return f"Postgres has not answered for {silent:.0f} s"
        return None

    def totals(self) -> PassResult:
        """Return what this process has done since it started."""
        total = PassResult()
        total += self._earlier
        for runner in self._runners.copy().values():
            if runner.monitor is not None:
                total += runner.monitor.result
        return total

    # -- for ever, or once -------------------------------------------------------------------------

    def run(self) -> None:
        """Lead or stand by until stopped."""
        log_event(
            "reconciler_started", namespace=self._settings.namespace, redis=list(self._clients)
        )
        backoff = tenacity.Retrying(
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=5.0),
            retry=tenacity.retry_if_exception_type(Exception),
            stop=tenacity.stop_when_event_set(self._stop),
            sleep=self._sleep,
            before_sleep=self._log_error,
            reraise=False,
        )
        try:
            while not self._stop.is_set():
                try:
                    backoff(self._lead_a_little)
                except tenacity.RetryError:
                    break
        finally:
            self._turn_at = None
            self._stand_down(wait=True)
            self._leadership.stop()
            self._close()

    def stop(self) -> None:
        """Finish the present step, resign, and return from run()."""
        self._stop.set()

    def _sleep(self, seconds: float) -> None:
        self._stop.wait(seconds)

    @staticmethod
    def _log_error(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, StoreUnavailable):
            log_event("postgres_away", error=str(error))
        else:
            known = isinstance(error, JobguardError)
            log_event("step_failed", error=str(error), exc_info=None if known else error)

    def _lead_a_little(self) -> None:
        """Lead, one step at a time, until an error occurs or the process is stopped."""
        if not self._seeking:
            self._require_installation()
            self._leadership.start()
            self._seeking = True
        while not self._stop.is_set():
            self._turn_at = time.monotonic()
            if not self._leadership.wait(timeout=1.0):
                self._stand_down()
                self._keep_vigil()
                continue
            self._vigil.look(leads=True)
            try:
                self.step()
            except NotLeading as error:
                log_event("leader_lost", error=str(error))
                self._stand_down()
                continue
            self._stop.wait(_STEP)

    def once(self) -> dict[str, Any]:
        """Make one pass: inspect all owed deliveries, twice where needed, then resign.

        The death of a worker is only certain after ``worker_timeout``; this method waits for it if
        a worker that has claims is silent. ``unfinished``: sources that this pass could not inspect
        completely. Raises StoreUnavailable.
        """
        self._require_installation()
        # An election that fails because Postgres is away looks like a lost election.
        self._store.sources()
        self._leadership.seek()
        try:
            if not self._leadership.leads:
                return {"leads": False, "unfinished": [], **PassResult().counts()}
            self._leadership.start()
            longest = 3 * self._settings.worker_timeout + self._settings.grace
            deadline = time.monotonic() + longest
            while time.monotonic() < deadline and not self._stop.is_set():
                self.step()
                self._stop.wait(_STEP)
                if self._wrong_place or all(one.finished for one in self._runners.values()):
                    break
            total = PassResult()
            unfinished = [
                row.address for row in self._store.sources() if not self._is_finished(row.id)
            ]
            for runner in self._runners.values():
                runner.stop()
                runner.join(_JOIN)
                total += runner.monitor.result if runner.monitor is not None else PassResult()
            return {
                "leads": True,
                "misplaced": self._wrong_place,
                "unfinished": unfinished,
                **total.counts(),
            }
        except NotLeading:
            return {"leads": False, "unfinished": [], **PassResult().counts()}
        finally:
            self._turn_at = None
            self._stand_down(wait=True)
            self._leadership.stop()
            self._close()

    def _is_finished(self, source: int) -> bool:
        runner = self._runners.get(source)
        return runner is not None and runner.finished

    # -- one step ----------------------------------------------------------------------------------

    def step(self) -> None:
        """Give every source a thread, find stuck threads, and do the housekeeping."""
        term = self._leadership.term
        if self._term_watched != term:
            # The work of another leader in between is not known here: start again without old
            # state.
            self._stand_down()
            self._due.clear()
            self._signs = SharedSigns(term)
            self._term_watched = term
        now = time.monotonic()
        signs = self._signs.read(self._store)  # Raises if the term is over.
        if now >= self._due.get("sources", 0.0) or signs.sources != self._sources_found:
            self._due["sources"] = now + (_SOON if self._wrong_place else _SOURCES)
            self._find_sources()
            self._sources_found = signs.sources
        if self._wrong_place:
            self._stop_runners()
            return
        self._watch_over(now)
        self._housekeeping(now, owed=signs.owed)

    def _watch_over(self, now: float) -> None:
        """Cut the connections of a step that takes too long; if that does not help, give up the term."""
        for id, runner in list(self._runners.items()):
            stuck = runner.stuck_for()
            if stuck >= _STUCK and now >= self._due.get(f"cut {id}", 0.0):
                self._due[f"cut {id}"] = now + _STUCK
                log_event("step_stuck", source=runner.name, seconds=round(stuck))
                runner.cut()
            if stuck >= _GIVE_UP:
                self._leadership.give_up()
                raise NotLeading(f"a step of {runner.name} has been stuck for {stuck:.0f} s")
            if not runner.alive:
                self._retire(runner)
                del self._runners[id]  # The next search for sources starts it again.
                self._due["sources"] = min(self._due["sources"], now + _SOON)

    def _is_healthy(self) -> bool:
        """Return True if the lease may be renewed or sought. The lease thread calls this."""
        turn = self._turn_at
        self._left_behind = [runner for runner in self._left_behind if runner.alive]
        if len(self._left_behind) > _LEFT_BEHIND:
            return False
        return turn is None or time.monotonic() - turn < _LOOP_STUCK

    def _find_sources(self) -> None:
        identity = self._store.identity()
        self._wrong_place = self._why_wrong_place(identity)
        if self._wrong_place:
            return
        installation = UUID(str(identity["id"]))
        rows = self._store.sources()
        for row in self._register_sources(rows) or rows:
            if row.id not in self._runners:
                self._add_monitor(row, installation)
        if self._settings.mode == "guard" and self._brokers and _REQUESTS not in self._runners:
            self._add_requests()

    def _register_sources(self, rows: Iterable[SourceRow]) -> Sequence[SourceRow]:
        """Register sources whose first process started while Postgres was away, and left a stream.

        Return all sources if there were any.
        """
        registered: Sequence[SourceRow] = ()
        now = time.monotonic()
        if now < self._due.get("streams", 0.0):
            return registered
        self._due["streams"] = now + _STREAMS
        known = {row.id for row in rows}
        for address, make in self._clients.items():
            try:
                if address not in self._readers:
                    self._readers[address] = make()
                found = sources_with_streams(self._readers[address])
            except redis.RedisError:
                self._due["streams"] = (
                    now + 6 * _STREAMS
                )  # Its clients wait for a timeout each time.
                continue
            unknown = [
                row
                for row in found
                if row.id not in known and row.namespace == self._settings.namespace
            ]
            if unknown:
                with closing(self._make_host_store()) as host:
                    for row in unknown:
                        host.register(row)
                registered = self._store.sources()
        return registered

    def _require_installation(self) -> None:
        """Raise WrongInstallation before the lease is taken: it belongs to the other installation."""
        if self._settings.installation is not None:
            self._why_wrong_place(self._store.identity())

    def _why_wrong_place(self, identity: Mapping[str, str | None]) -> str | None:
        """Return the reason why nothing may be restored with this database, or None."""
        wanted = self._settings.installation
        if wanted is not None and identity["name"] != wanted:
            raise WrongInstallation(
                f"this database is installation {identity['name']!r}, "
                f"JOBGUARD_INSTALLATION says {wanted!r}"
            )
        for what, was, now in (
            ("server", identity["system_identifier"], identity["system_now"]),
            ("database", identity["database_oid"], identity["database_now"]),
        ):
            if was is not None and now is not None and was != now:
                reason = (
                    f"this database is a copy: it was in {what} {was}, now it is in {now}. Nothing is "
                    "restored. If it was moved here for good: `jobguard resume --moved`"
                )
                if self._wrong_place != reason:
                    log_event("ledger_moved", what=what, was=was, is_now=now)
                return reason
        return None

    def _add_monitor(self, row: SourceRow, installation: UUID) -> None:
        opened = self._open(row)
        if opened is None:
            return
        source, client, broker = opened
        self._brokers[row.id] = broker

        def monitor(store: LeaderStore) -> SourceMonitor:
            host = self._make_host_store()
            stream = ReportStream(source, lambda: client, bound=self._settings.stream_bytes)
            return SourceMonitor(
                client,
                broker,
                store,
                row,
                installation,
                self._settings,
                named=self._settings.installation is not None,
                drain=StreamDrain(stream, host, source),
                host=host,
                vouches=lambda gap: self._vigil.vouches(row.id, gap),
                saw=lambda consumers: self._vigil.saw(row, consumers),
            )

        self._rows[row.id] = row
        self._runners[row.id] = Runner(
            str(source),
            self._leadership.term,
            lambda: self._leadership.term,
            self._signs,
            self._make_store(),
            client,
            monitor,
        )
        log_event("watching", source=str(source))

    def _keep_vigil(self) -> None:
        """Watch the consumers in Redis while this process does not lead."""
        now = time.monotonic()
        if now >= self._due.get("vigil", 0.0):
            self._due["vigil"] = now + _VIGIL
            with suppress(JobguardError):  # The sources that are known are enough.
                self._vigil.watch(self._store.sources())
        self._vigil.look()

    def _broker_of(self, row: SourceRow) -> Broker | None:
        opened = self._open(row)
        return None if opened is None else opened[2]

    def _open(self, row: SourceRow) -> tuple[Source, redis.Redis, Broker] | None:
        """Return the source with a client and a broker of its own; None: this process cannot read it."""
        adapter = self._adapter(row.library)
        client = None if adapter is None else self._client(row)
        if adapter is None or client is None:
            return None
        source = Source(row.namespace, row.library, row.address, row.prefix, row.name)
        return source, client, adapter.broker(source, client)

    def _add_requests(self) -> None:
        brokers = self._brokers
        self._runners[_REQUESTS] = Runner(
            _REQUESTS,
            self._leadership.term,
            lambda: self._leadership.term,
            self._signs,
            self._make_store(),
            None,
            lambda store: requests.Requests(store, self._settings.namespace, brokers),
        )

    def _adapter(self, library: str) -> Adapter | None:
        if library not in self._adapters:
            found = [e for e in entry_points(group="jobguard.adapters") if e.name == library]
            self._adapters[library] = found[0].load()() if found else None
            if not found:
                log_event("adapter_missing", library=library, install=f"jobguard[{library}]")
        return self._adapters[library]

    def _client(self, row: SourceRow) -> redis.Redis | None:
        make = self._clients.get(row.address) or self._clients.get(row.name or "")
        if make is not None:
            return make()
        if self._clients:
            if row.id not in self._unreachable:
                self._unreachable.add(row.id)
                log_event("source_unwatched", source=row.address, given=list(self._clients))
            return None
        # No URL at all: use the address as it is, without a password.
        place = row.address
        url = place if place.startswith("unix:") else f"redis://{place}"
        return client_from_url(url.replace("unix:", "unix://"), timeout=_CLIENT_TIMEOUT)

    def _housekeeping(self, now: float, *, owed: bool) -> None:
        if now >= self._due.get("rotate", 0.0):
            self._due["rotate"] = now + _ROTATE
            if not self._chore("rotate", self._rotate):
                self._due["rotate"] = now + _CHORE_AGAIN
        # What is still to do after the last owed job is done once, and then seldom.
        if now >= self._due.get("count" if owed else "quiet count", 0.0):
            self._due["quiet count"] = now + (_COUNT if owed else _QUIET)
            self._count(now)
        if now >= self._due.get("vacuum" if owed else "quiet vacuum", 0.0):
            self._due["vacuum"] = now + _HOUSEKEEPING
            self._due["quiet vacuum"] = now + (_HOUSEKEEPING if owed else _QUIET)
            if not self._chore("vacuum", self._vacuum):
                self._due["vacuum"] = now + _CHORE_AGAIN

    def _chore(self, part: str, work: Callable[[], None]) -> bool:
        """Do a piece of housekeeping; return False if it failed, which does not end the step."""
        if self._turn_at is not None:
            self._turn_at = time.monotonic()  # Each piece has the time of a whole turn.
        try:
            work()
        except NotLeading:
            raise
        except JobguardError as error:
            log_event("step_failed", part=part, error=str(error))
            return False
        return True

    def _rotate(self) -> None:
        dropped = self._store.rotate(
            retention=self._settings.retention, keep_envelopes=self._settings.keep_envelopes
        )
        if dropped:
            log_event("rotated", dropped=dropped)

    def _vacuum(self) -> None:
        if tables := self._store.vacuum():
            log_event("vacuumed", tables=list(tables))

    def _count(self, now: float) -> None:
        """Count jobs for people who look. It takes at most a twentieth of the time."""
        seconds = _COUNTED
        recount = self._due.get("recount")
        if (
            recount is None
        ):  # The leader before may have counted nothing, or be of an older version.
            self._due["recount"], seconds = now + _RECOUNT, self._settings.retention
        elif now >= recount:  # Ends that were spooled come with their own time.
            self._due["recount"], seconds = now + _RECOUNT, _RECOUNTED
        count = partial(self._store.count_up, self._leadership.term, seconds=seconds)
        self._chore("count", count)
        took = time.monotonic() - now
        self._due["count"] = now + max(_COUNT, 20 * took)

    def _stand_down(self, *, wait: bool = False) -> None:
        stopped = self._stop_runners()
        if wait:
            deadline = time.monotonic() + _JOIN
            for runner in stopped:
                runner.join(max(0.0, deadline - time.monotonic()))
        self._term_watched = None

    def _stop_runners(self) -> list[Runner]:
        stopped = list(self._runners.values())
        self._vigil.watch(row for id, row in self._rows.items() if id in self._runners)
        self._runners.clear()
        for runner in stopped:
            runner.stop()
            self._retire(runner)
        self._left_behind += stopped
        return stopped

    def _retire(self, runner: Runner) -> None:
        if runner.monitor is not None:
            self._earlier += runner.monitor.result

    def _close(self) -> None:
        self._store.close()
        self._lease_store.close()
        log_event("reconciler_stopped", namespace=self._settings.namespace)


def _host_store(conninfo: Callable[[], str], settings: Settings) -> HostStore:
    """Return a store that writes what host processes could not write, with the patience of a leader."""
    return PostgresStore(conninfo, with_patience(settings))


def clients_from_urls(urls: Sequence[str]) -> Clients:
    """Map the address of each URL to a client function. ``name=URL`` uses the name of a source instead."""
    made: dict[str, Callable[[], redis.Redis]] = {}
    for given in urls:
        name, separator, url = given.partition("=")
        if not separator or "://" in name:
            name, url = "", given
        address = address_of(client_from_url(url, timeout=_CLIENT_TIMEOUT))
        for option in parse(url).unknown:
            log_event("redis_option_unknown", redis=address, option=option)
        made[name or address] = _maker(url)
    return made


def _maker(url: str) -> Callable[[], redis.Redis]:
    return lambda: client_from_url(url, timeout=_CLIENT_TIMEOUT)


def run_once(settings: Settings, conninfo: Callable[[], str], clients: Clients) -> dict[str, Any]:
    """Make one pass, unless another process leads; return the counts."""
    return Service(settings, conninfo, clients).once()


def stop_on_signals(service: Service) -> None:
    """Let SIGTERM and SIGINT stop the service. Call it in the main thread."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: service.stop())
