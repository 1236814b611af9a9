"""Every URL that RQ, Celery and Dramatiq take is read; no part of a password is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from jobguard.clients import address_of, client_from_url
from jobguard.errors import ConfigurationError
from jobguard.redis_urls import FilePassword, parse, split_urls


def kwargs_of(url: str) -> dict[str, Any]:
    """Return what a connection of our own client is made with."""
    return dict(client_from_url(url, timeout=0.1).connection_pool.connection_kwargs)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("REDIS://h", "h:6379/0"),
        ("redis://h//3", "h:6379/3"),
        ("redis://h?db=2", "h:6379/2"),
        ("redis://h/1?virtual_host=2", "h:6379/2"),
        ("redis://[2001:db8::1]:7/1", "2001:db8::1:7/1"),
        ("unix://user:pw@/run/r.sock?db=3", "unix:/run/r.sock/3"),
        ("redis+socket:///run/r.sock", "unix:/run/r.sock/0"),
        ("redis+socket:///run/r.sock?virtual_host=/2", "unix:/run/r.sock/2"),
        ("socket:///run/r.sock?db=1", "unix:/run/r.sock/1"),
        ("sentinel://a:1;sentinel://b:2/4?master_name=main", "sentinel:main/4"),
        ("sentinel://:p;w@a:1;sentinel://:p;w@b:2/?master_name=main;", "sentinel:main/0"),
        ("sentinel://a;sentinel://b/main/1", "sentinel:main/1"),
    ],
)
def test_an_address(url: str, address: str) -> None:
    """The one that the host's own client has."""
    assert address_of(client_from_url(url, timeout=0.1)) == address


@pytest.mark.parametrize(
    ("word", "reqs"),
    [
        ("CERT_NONE", "none"),
        ("none", "none"),
        ("CERT_REQUIRED", "required"),
        ("Optional", "optional"),
    ],
)
@pytest.mark.parametrize("scheme", ["redis", "rediss", "sentinel"])
def test_certificates_in_the_spelling_of_each_library(scheme: str, word: str, reqs: str) -> None:
    """An ssl option asks for TLS by itself, as with kombu."""
    where = "h:1/main/0" if scheme == "sentinel" else "h:1/0"
    client = client_from_url(f"{scheme}://{where}?ssl_cert_reqs={word}", timeout=0.1)
    pool = client.connection_pool
    assert pool.connection_kwargs["ssl_cert_reqs"] == reqs
    assert issubclass(pool.connection_class, redis.SSLConnection)


def test_a_plain_url_has_no_tls() -> None:
    """An option of the host's client changes nothing."""
    pool = client_from_url("redis://h/0?socket_timeout=3", timeout=0.1).connection_pool
    assert not issubclass(pool.connection_class, redis.SSLConnection)
    assert pool.connection_kwargs["socket_timeout"] == 0.1


def test_options_that_mean_nothing_to_us_are_named() -> None:
    """What belongs to the host's client is not."""
    url = "redis://h/0?socket_timeout=3&visibility_timeout=9&db=1&protcol=3"
    assert parse(url).unknown == ("protcol",)


def test_sentinels_and_their_own_account() -> None:
    """As Celery lists them; the account in the URL is that of Redis."""
    url = "sentinel://u:p%40@a:1;sentinel://b/0?master_name=m&sentinel_password=s"
    pool: Any = client_from_url(url, timeout=0.1).connection_pool
    asked = [one.connection_pool.connection_kwargs for one in pool.sentinel_manager.sentinels]
    assert [(one["host"], one["port"], one["password"]) for one in asked] == [
        ("a", 1, "s"),
        ("b", 26379, "s"),
    ]
    assert [one["socket_timeout"] for one in asked] == [0.1, 0.1]
    assert (pool.connection_kwargs["username"], pool.connection_kwargs["password"]) == ("u", "p@")


def test_a_password_file_is_read_at_each_connect(tmp_path: Path) -> None:
    """The token of a cloud changes every few minutes."""
    path = tmp_path / "token"
    path.write_text("first\n")
    credentials = kwargs_of(f"redis://me@h/0?password_file={path}")["credential_provider"]
    assert isinstance(credentials, FilePassword)
    assert credentials.get_credentials() == ("me", "first")
    path.write_text("second")
    assert credentials.get_credentials() == ("me", "second")
    path.unlink()
    with pytest.raises(redis.AuthenticationError, match="password_file"):
        credentials.get_credentials()


def test_a_credential_provider_is_refused_with_a_way_out() -> None:
    """The reconciler imports no code of the user's."""
    with pytest.raises(ConfigurationError, match="password_file="):
        parse("redis://h/0?credential_provider=module.Class")


def test_several_urls_in_one_text() -> None:
    """A list of sentinels is one URL, a list of brokers is several."""
    text = "redis://a;redis://:p;w@b sentinel://c:1;sentinel://d:2/m\nprod=redis://e"
    assert split_urls(text) == [
        "redis://a",
        "redis://:p;w@b",
        "sentinel://c:1;sentinel://d:2/m",
        "prod=redis://e",
    ]


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("amqp://guest@h//", "amqp:// is not Redis"),
        ("h:6379", "begins with redis://"),
        ("redis://h/one", "number of a database"),
        ("redis://h:70000/0", "host:port"),
        ("redis://h?db=one", "option db"),
        ("rediss://h?ssl_cert_reqs=maybe", "CERT_NONE"),
        ("redis+socket://run/r.sock", "three slashes"),
        ("sentinel://a:1;sentinel://b:2", "master_name=SERVICE"),
        ("sentinel://a:1/0", "master_name=SERVICE"),
    ],
)
def test_an_error_says_what_would_work(url: str, word: str) -> None:
    """Before anything is connected to."""
    with pytest.raises(ConfigurationError, match=word):
        parse(url)


SECRET = st.text("Zz9/@#?%:;&=+,[] 'é", min_size=1).map(lambda tail: f"S3cr{tail}t0k")
FORMS = st.sampled_from(
    [
        "redis://:{}@h:6379/0",
        "redis://user:{}@h/0",
        "rediss://user:{}@h:1/0?ssl_cert_reqs=none",
        "unix://:{}@/run/r.sock?db=1",
        "redis+socket://:{}@/run/r.sock",
        "sentinel://:{}@a:1,b:2/main/0",
        "sentinel://:{}@a:1;sentinel://:{}@b:2/0?master_name=m",
        "redis://h/0?password={}",
        "redis://:12{}@h/0",
        "redis://:{}",
        "{}",
        "redis://h/{}",
        "redis://h?credential_provider={}",
        "redis://h?db={}",
    ]
)


@given(FORMS, SECRET)
def test_no_part_of_a_password_is_printed(form: str, secret: str) -> None:
    """Neither by the address, nor the repr, nor the error; whatever is not encoded."""
    url = form.replace("{}", secret)
    try:
        shown = repr(parse(url)) + address_of(client_from_url(url, timeout=0.1))
    except ConfigurationError as error:
        shown = str(error)
    assert "S3cr" not in shown
    assert "t0k" not in shown


@pytest.mark.parametrize("rest", ["#x", "?x=y", "/0?x=y", "/0", "?", "/0#"])
def test_a_password_that_looks_like_a_port(rest: str) -> None:
    """What another parser would take for localhost:4711."""
    with pytest.raises(ConfigurationError) as refused:
        parse(f"redis://:4711{rest}@h:6379/0")
    assert "4711" not in str(refused.value)
    assert "%23" in str(refused.value)
