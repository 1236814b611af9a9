from __future__ import annotations

import ast
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from jobguard import log
from jobguard.log import EVENTS, Event, get_logger, log_event, say_again

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell events of our own, so that rewording the product's breaks no test."""
    own = {
        "kettle_boils": Event(logging.INFO, "the water is hot"),
        "kettle_empty": Event(logging.ERROR, "there is no water"),
        "kettle_idle": Event(logging.DEBUG, "nothing to do"),
    }
    if "every_event" not in request.node.name:
        monkeypatch.setattr(log, "EVENTS", own)


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Put the process' logging back as it was."""
    root, ours = logging.getLogger(), logging.getLogger("jobguard")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python of its own."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)


def test_an_event_reaches_the_hosts_logging_with_its_level_sentence_and_fields(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Text for people, and a mapping for handlers that want more."""
    token = UUID(int=7)
    with caplog.at_level("INFO", logger="jobguard"):
        log_event("kettle_boils", job_id="j%s1", queue="mail", token=token)
    (record,) = caplog.records
    assert record.name == "jobguard"
    assert record.levelno == logging.INFO
    assert record.getMessage() == f"the water is hot job_id='j%s1' queue='mail' token='{token}'"
    assert (
        record.funcName
        == "test_an_event_reaches_the_hosts_logging_with_its_level_sentence_and_fields"
    )
    reported = vars(record)["jobguard"]
    assert reported["event"] == "kettle_boils"
    assert reported["job_id"] == "j%s1"


def test_secrets_in_fields_are_masked(caplog: pytest.LogCaptureFixture) -> None:
    """An error that quotes a URL does not publish its password."""
    log_event("kettle_empty", error=OSError("no route to postgresql://u:hidden@h/d"))
    assert "hidden" not in caplog.text
    assert "OSError" in caplog.text


def test_a_bound_logger_tells_events_the_same_way(caplog: pytest.LogCaptureFixture) -> None:
    """get_logger() is structlog's, and writes through the standard logger."""
    with caplog.at_level("INFO", logger="jobguard"):
        get_logger(source=5).bind(queue="mail").info("kettle_boils")
        try:
            raise ValueError("broken")
        except ValueError:
            get_logger().exception("kettle_empty", part="pulse")
    boils, failed = caplog.records
    assert boils.getMessage() == "the water is hot source=5 queue='mail'"
    assert failed.exc_info is not None and failed.levelno == logging.ERROR


def test_a_level_that_is_off_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """An idle tick says nothing above debug."""
    log_event("kettle_idle", tables=["jobs"])
    assert caplog.records == []


ERROR = "from jobguard import log; log.EVENTS = {'e': log.Event(40, 'broken'), 'i': log.Event(20, 'x')}; "


def test_without_logging_set_up_an_error_is_printed() -> None:
    """On stderr, in one readable line; nothing below a warning."""
    done = run(ERROR + "log.say('e', job_id=0); log.say('i')")
    assert (done.stdout, done.stderr) == ("", "jobguard: ERROR: broken job_id=0\n")


@pytest.mark.parametrize(
    "setup",
    [
        "logging.basicConfig(stream=sys.stdout)",
        "logging.getLogger('jobguard').addHandler(logging.StreamHandler(sys.stdout))",
        "logging.lastResort = None; print('broken')",
    ],
)
def test_where_a_handler_gets_it_stderr_stays_empty(setup: str) -> None:
    """The host's logging decides, and that includes silence."""
    done = run(f"import logging, sys; {ERROR}{setup}; log.say('e')")
    assert done.stderr == ""
    assert done.stdout.count("broken") == 1


def test_an_error_is_printed_where_a_configuration_disabled_our_logger() -> None:
    """logging.config disables every logger that it does not name, unless it is told otherwise."""
    config = "logging.config.dictConfig({'version': 1, 'root': {'level': 'INFO'}})"
    done = run(f"import logging.config; {ERROR}{config}; log.say('e'); log.say('i')")
    assert done.stderr == "jobguard: ERROR: broken\n"


def test_that_a_process_is_guarded_is_said_when_somebody_can_hear_it() -> None:
    """guard() often runs before the host configures logging."""
    done = run(
        "import logging; from jobguard.log import log_event\n"
        "say('guarded', source='s'); logging.basicConfig(level='INFO', format='%(message)s')\n"
        "say('worker_started', name='w'); say('worker_left', name='w')"
    )
    assert done.stderr.splitlines() == [
        "guarding source='s'",
        "a guarded worker begins name='w'",
        "a guarded worker said goodbye name='w'",
    ]


@pytest.mark.parametrize(
    ("environ", "coloured"), [({}, False), ({"FORCE_COLOR": "1"}, True), ({"NO_COLOR": "1"}, False)]
)
def test_a_log_that_goes_to_a_file_has_no_colours(
    environ: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless they are asked for."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    done = run("from jobguard import log; log.configure(); log.say('worker_left', name='w')")
    assert "goodbye" in done.stderr
    assert ("\x1b[" in done.stderr) is coloured


def test_a_log_on_a_terminal_is_coloured_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NO_COLOR wins."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert log._colours()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not log._colours()


def test_saying_something_loads_no_structlog() -> None:
    """The first line of an outage does not cost a host 150 ms."""
    done = run(
        "import logging, sys; logging.basicConfig(); from jobguard.log import log_event\n"
        "log_event('anything', error='x'); print('structlog' in sys.modules)"
    )
    assert done.stdout == "False\n"
    assert "anything error='x'" in done.stderr


def test_our_command_line_logs_json_lines_to_stderr(
    own_logging: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """One object a line, with the event's name, level, time and fields; of others, warnings."""
    log.configure("info", json=True)
    log_event("kettle_boils", namespace="default", term=3)
    log_event("kettle_idle", tables=[])
    logging.getLogger("other").info("chatter")
    logging.getLogger("other").warning("trouble")
    captured = capsys.readouterr()
    assert captured.out == ""
    ours, other = map(json.loads, captured.err.splitlines())
    assert ours["event"] == "kettle_boils"
    assert ours["sentence"] == "the water is hot"
    assert (ours["level"], ours["term"]) == ("info", 3)
    assert ours["timestamp"].endswith("Z")
    assert other["event"] == "trouble"


def test_our_command_line_logs_for_people(
    own_logging: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentence comes first, then the fields."""
    log.configure("debug")
    log_event("kettle_idle", tables=["jobs"])
    reported = capsys.readouterr().err
    assert "nothing to do" in reported
    assert "tables" in reported and "_record" not in reported


def test_an_event_that_is_not_in_the_table_is_still_told(caplog: pytest.LogCaptureFixture) -> None:
    """A mistake of ours is no exception in somebody else's process."""
    log_event("no_such_event", x=1)
    assert caplog.records[0].getMessage() == "no_such_event x=1"


def test_every_event_that_the_code_tells_is_in_the_table() -> None:
    """Each call of say() names an event of EVENTS, in so many letters."""
    wrong = []
    for folder in ("jobguard", "adapters", "schema", "demo"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            if "jobguard.log" not in text and "import log" not in text:
                continue  # a say() of its own
            for node in ast.walk(ast.parse(text)):
                if not isinstance(node, ast.Call):
                    continue
                called = node.func
                name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
                if name != "say":
                    continue
                event = node.args[0] if node.args else None
                if not (isinstance(event, ast.Constant) and event.value in EVENTS):
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []


def test_every_event_has_a_level_and_a_sentence() -> None:
    """Names are words joined by underscores; sentences end without a full stop."""
    for name, event in EVENTS.items():
        assert name.replace("_", "").isalpha() and name.islower(), name
        assert event.level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
        assert event.sentence and not event.sentence.endswith("."), name


def test_what_nobody_could_hear_is_said_again(own_logging: None) -> None:
    """A library may set up its logging late; what a handler took is not repeated, nor what is no news."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    root = logging.getLogger()
    root.handlers[:] = []
    say_again()
    log_event("kettle_empty", where="kitchen")
    log_event("kettle_boils")
    log_event("kettle_idle")
    root.handlers[:] = [Ear()]
    root.setLevel(logging.INFO)
    log_event("kettle_boils", times=2)
    say_again()
    say_again()
    assert heard == [
        "there is no water where='kitchen'",
        "the water is hot",
        "the water is hot times=2",
    ]
