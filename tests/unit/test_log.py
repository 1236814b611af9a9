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
from jobguard.log import EVENTS, Event, log_again, log_event

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a table of test events, so that new sentences of the product break no test."""
    own = {
        "kettle_boils": Event(logging.INFO, "the water is hot"),
        "kettle_empty": Event(logging.ERROR, "there is no water"),
        "kettle_idle": Event(logging.DEBUG, "nothing to do"),
    }
    if "every_event" not in request.node.name:
        monkeypatch.setattr(log, "EVENTS", own)


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Restore the logging of the process after the test."""
    root, ours = logging.getLogger(), logging.getLogger("jobguard")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a separate Python process."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)


def test_an_event_reaches_the_hosts_logging_with_its_level_sentence_and_fields(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A log record has a text for people and a mapping for handlers."""
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
    """The log of an error that quotes a URL does not contain its password."""
    log_event("kettle_empty", error=OSError("no route to postgresql://u:hidden@h/d"))
    assert "hidden" not in caplog.text
    assert "OSError" in caplog.text


def test_a_level_that_is_off_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """An event below the level of the logger makes no record."""
    log_event("kettle_idle", tables=["jobs"])
    assert caplog.records == []


ERROR = "from jobguard import log; log.EVENTS = {'e': log.Event(40, 'broken'), 'i': log.Event(20, 'x')}; "


def test_without_logging_set_up_an_error_is_printed() -> None:
    """It is printed on stderr in one readable line; events below a warning are not printed."""
    done = run(ERROR + "log.log_event('e', job_id=0); log.log_event('i')")
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
    """The host's logging decides where a line goes, and whether it is written at all."""
    done = run(f"import logging, sys; {ERROR}{setup}; log.log_event('e')")
    assert done.stderr == ""
    assert done.stdout.count("broken") == 1


def test_an_error_is_printed_where_a_configuration_disabled_our_logger() -> None:
    """logging.config disables every logger that it does not name, unless an option forbids it."""
    config = "logging.config.dictConfig({'version': 1, 'root': {'level': 'INFO'}})"
    done = run(f"import logging.config; {ERROR}{config}; log.log_event('e'); log.log_event('i')")
    assert done.stderr == "jobguard: ERROR: broken\n"


def test_events_before_the_logging_setup_are_logged_after_it() -> None:
    """guard() often runs before the host configures logging: its event is logged afterwards."""
    done = run(
        "import logging; from jobguard.log import log_event\n"
        "log_event('guarded', source='s')\n"
        "logging.basicConfig(level='INFO', format='%(message)s')\n"
        "log_event('worker_started', name='w'); log_event('worker_left', name='w')"
    )
    assert done.stderr.splitlines() == [
        "a source is guarded source='s'",
        "a guarded worker starts name='w'",
        "a guarded worker left name='w'",
    ]


@pytest.mark.parametrize(
    ("environ", "coloured"), [({}, False), ({"FORCE_COLOR": "1"}, True), ({"NO_COLOR": "1"}, False)]
)
def test_a_log_that_goes_to_a_file_has_no_colours(
    environ: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FORCE_COLOR switches the colours on."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    done = run("from jobguard import log; log.configure(); log.log_event('worker_left', name='w')")
    assert "worker left" in done.stderr
    assert ("\x1b[" in done.stderr) is coloured


def test_a_log_on_a_terminal_is_coloured_without_no_color(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NO_COLOR switches the colours off."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert log._colours()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not log._colours()


def test_logging_an_event_loads_no_structlog() -> None:
    """The import of structlog takes 150 ms, and a host must not lose them in an outage."""
    done = run(
        "import logging, sys; logging.basicConfig(); from jobguard.log import log_event\n"
        "log_event('anything', error='x'); print('structlog' in sys.modules)"
    )
    assert done.stdout == "False\n"
    assert "anything error='x'" in done.stderr


def test_our_command_line_logs_json_lines_to_stderr(
    own_logging: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line is an object with event, level, time and fields; of other libraries, only warnings."""
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
    """A line has the sentence first and then the fields."""
    log.configure("debug")
    log_event("kettle_idle", tables=["jobs"])
    reported = capsys.readouterr().err
    assert "nothing to do" in reported
    assert "tables" in reported and "_record" not in reported


@pytest.mark.parametrize("json", [False, True])
def test_a_traceback_shows_no_values(
    own_logging: None, capsys: pytest.CaptureFixture[str], json: bool
) -> None:
    """The local variables of a failed step may be arguments of jobs or addresses with passwords."""
    log.configure("info", json=json)
    secret = "hunter" * 2
    try:
        secret.index("x")
    except ValueError as error:
        log_event("kettle_boils", exc_info=error)
    written = capsys.readouterr().err
    assert "ValueError" in written and "secret.index" in written
    assert secret not in written


def test_an_event_that_is_not_in_the_table_is_still_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An unknown event name raises no exception in the host's process."""
    log_event("no_such_event", x=1)
    assert caplog.records[0].getMessage() == "no_such_event x=1"


def test_every_event_that_the_code_logs_is_in_the_table() -> None:
    """Each call of log_event() or contain_errors() has a literal event name of EVENTS."""
    wrong = []
    for folder in ("jobguard", "adapters", "schema", "demo"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            if not any(name in text for name in ("jobguard.log", "import log", "contain_errors")):
                continue  # another function of this name
            for node in ast.walk(ast.parse(text)):
                if not isinstance(node, ast.Call):
                    continue
                called = node.func
                name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
                if name == "contain_errors":
                    named = [keyword.value for keyword in node.keywords if keyword.arg == "event"]
                elif name == "log_event" and file.name != "host_safety.py":
                    named = node.args[:1]
                else:
                    continue
                for event in named:
                    if not (isinstance(event, ast.Constant) and event.value in EVENTS):
                        wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []


def test_every_event_has_a_level_and_a_sentence() -> None:
    """Names are lower-case words joined by underscores; sentences end without a full stop."""
    for name, event in EVENTS.items():
        assert name.replace("_", "").isalpha() and name.islower(), name
        assert event.level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
        assert event.sentence and not event.sentence.endswith("."), name


def test_events_without_a_handler_are_logged_again(own_logging: None) -> None:
    """A library may set up its logging late. Debug events and delivered events are not repeated."""
    messages: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    root = logging.getLogger()
    root.handlers[:] = []
    log_again()
    log_event("kettle_empty", where="kitchen")
    log_event("kettle_boils")
    log_event("kettle_idle")
    root.handlers[:] = [Recorder()]
    root.setLevel(logging.INFO)
    log_event("kettle_boils", times=2)
    log_again()
    log_again()
    assert messages == [
        "there is no water where='kitchen'",
        "the water is hot",
        "the water is hot times=2",
    ]
