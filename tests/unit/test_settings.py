from __future__ import annotations

from dataclasses import fields

import pytest

from jobguard.errors import ConfigurationError
from jobguard.settings import Settings, disabled, settings_from, unknown_variables


def test_an_argument_wins_over_the_environment_and_that_over_the_default() -> None:
    """The priorities are those of the manual."""
    environ = {"JOBGUARD_NAMESPACE": "env", "JOBGUARD_LEASE": "20"}
    settings = settings_from({"namespace": "argument"}, environ)
    assert (settings.namespace, settings.lease, settings.page) == ("argument", 20.0, 2000)


def test_none_as_an_argument_is_not_given() -> None:
    """If an option is missing on the command line, the variable is used."""
    assert settings_from({"namespace": None}, {"JOBGUARD_NAMESPACE": "env"}).namespace == "env"


def test_every_setting_has_its_variable_and_its_meaning() -> None:
    """Each default can be given by the environment and gives the same value."""
    default = Settings()
    for field in fields(Settings):
        value = getattr(default, field.name)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        environ = {} if value is None else {f"JOBGUARD_{field.name.upper()}": text}
        assert getattr(settings_from({}, environ), field.name) == value, field.name
        assert field.metadata["meaning"]


@pytest.mark.parametrize(
    ("word", "value"), [("1", True), ("no", False), ("ON", True), ("False", False)]
)
def test_a_switch_is_read_in_the_usual_words(word: str, value: bool) -> None:
    """A switch is true, yes, on, 1 or an opposite, in upper or lower case."""
    assert settings_from({}, {"JOBGUARD_POOLER": word}).pooler is value


def test_a_list_is_separated_by_commas() -> None:
    """A list of waits is written as 0,30,300."""
    assert settings_from({}, {"JOBGUARD_CRASH_BACKOFF": "0, 5,60"}).crash_backoff == (
        0.0,
        5.0,
        60.0,
    )


def test_all_problems_are_reported_at_once_each_with_its_source() -> None:
    """One run of the program shows every wrong setting."""
    environ = {"JOBGUARD_LEASE": "soon", "JOBGUARD_POOLER": "perhaps"}
    with pytest.raises(ConfigurationError) as refused:
        settings_from({"wroker_timeout": 5, "mode": "guess"}, environ)
    reported = str(refused.value)
    assert "did you mean 'worker_timeout'?" in reported
    assert "mode='guess'" in reported and "'observe'" in reported
    assert "JOBGUARD_LEASE='soon'" in reported
    assert "JOBGUARD_POOLER='perhaps'" in reported


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"lease": 0}, "lease must be more than 0"),
        ({"page": -1}, "page must be more than 0"),
        ({"worker_timeout": 4.0, "beat_interval": 3.0}, "twice beat_interval"),
        ({"namespace": "  "}, "namespace must not be empty"),
        ({"crash_backoff": (0.0, -1.0)}, "crash_backoff"),
    ],
)
def test_values_that_make_no_sense_together_are_refused(
    arguments: dict[str, object], word: str
) -> None:
    """A valid number can be wrong together with another setting."""
    with pytest.raises(ConfigurationError, match=word):
        settings_from(arguments, {})


def test_the_fingerprint_has_the_settings_that_must_be_equal() -> None:
    """It has namespace and mode, and no duration; "fence=true" is for processes of earlier versions."""
    assert Settings().fingerprint() == "namespace=default fence=true mode=guard"
    assert Settings(lease=1.0).fingerprint() == Settings().fingerprint()
    assert Settings(mode="observe").fingerprint() != Settings().fingerprint()


@pytest.mark.parametrize(
    ("arguments", "environ"),
    [
        ({"recover": {"app.charge": "dead", "app.report": "never"}}, {}),
        ({}, {"JOBGUARD_RECOVER": "app.charge=dead, app.report=never"}),
    ],
)
def test_rules_for_tasks(arguments: dict[str, object], environ: dict[str, str]) -> None:
    """A task without a rule has none."""
    rule = settings_from(arguments, environ).recover_rule
    assert [rule("app.charge"), rule("app.report"), rule("app.mail")] == ["dead", "never", None]
    assert Settings().recover_rule("app.charge") is None


@pytest.mark.parametrize(
    "given", [{"app.charge": "no"}, "app.charge", "=dead", ["app.charge"], {1: "dead"}]
)
def test_a_wrong_rule_is_refused(given: object) -> None:
    """The error says what to write."""
    with pytest.raises(ConfigurationError, match=r"recover=.*dead"):
        settings_from({"recover": given}, {})


@pytest.mark.parametrize("word", ["0", "false", "off", "perhaps"])
def test_the_fence_cannot_be_switched_off(word: str) -> None:
    """JOBGUARD_FENCE was a setting once; JOBGUARD_FENCE=0 is an error that names mode='observe'."""
    for arguments, environ in (({}, {"JOBGUARD_FENCE": word}), ({"fence": word}, {})):
        with pytest.raises(ConfigurationError, match=r"always on.*mode='observe'"):
            settings_from(arguments, environ)


@pytest.mark.parametrize("value", [True, "1", "true"])
def test_a_fence_that_is_on_is_accepted(value: object) -> None:
    """The value true changes nothing."""
    assert settings_from({"fence": value}, {"JOBGUARD_FENCE": "1"}) == Settings()


@pytest.mark.parametrize(("word", "off"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_one_variable_switches_everything_off(word: str, off: bool) -> None:
    """JOBGUARD_DISABLED is read separately from the settings."""
    assert disabled({"JOBGUARD_DISABLED": word}) is off
    assert not disabled({})


@pytest.mark.parametrize(
    ("environ", "word"),
    [
        ({"JOBGUARD_LEASE": "0"}, "JOBGUARD_LEASE must be more than 0"),
        ({"JOBGUARD_WORKER_TIMEOUT": "1"}, r"JOBGUARD_WORKER_TIMEOUT \(1.0\).*twice beat_interval"),
        ({"JOBGUARD_CRASH_BACKOFF": "-1"}, "JOBGUARD_CRASH_BACKOFF must be"),
        ({"JOBGUARD_CRASH_BACKOFF": "1;2"}, "JOBGUARD_CRASH_BACKOFF='1;2': must be numbers"),
        ({"JOBGUARD_NAMESPACE": " "}, "JOBGUARD_NAMESPACE must not be empty"),
    ],
)
def test_a_problem_names_the_variable_that_it_came_from(environ: dict[str, str], word: str) -> None:
    """The message names the variable that has to be changed."""
    with pytest.raises(ConfigurationError, match=word):
        settings_from({}, environ)


def test_an_unknown_variable_is_named_with_the_most_similar_one() -> None:
    """The value, which may be a secret, is not shown."""
    environ = {
        "JOBGUARD_POSTGRES": "hidden",
        "JOBGUARD_LEASE": "9",
        "JOBGUARD_DISABELD": "1",
        "JOBGUARD_DEAD_LIST_LIMIT": "5",
        "JOBGUARD_XYZZY": "1",
        "JOBGUARD_SERVICE_HOST": "10.0.0.1",
        "JOBGUARD_PORT_80_TCP": "tcp://10.0.0.1:80",
        "JOBGUARD_WEB_PORT": "tcp://10.0.0.1:80",
        "OTHER": "1",
    }
    assert unknown_variables(environ) == [
        "JOBGUARD_DISABELD (did you mean JOBGUARD_DISABLED?)",
        "JOBGUARD_POSTGRES (did you mean JOBGUARD_POSTGRES_URL?)",
        "JOBGUARD_XYZZY",
    ]
