"""Every URL that RQ, Celery and Dramatiq accept is read, and no part of a password is printed."""

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
    """Return the keyword arguments of our own client's connections."""
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
    """The address is the same as that of the host's own client."""
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
    """An ssl option alone switches TLS on, as in kombu."""
    where = "h:1/main/0" if scheme == "sentinel" else "h:1/0"
    client = client_from_url(f"{scheme}://{where}?ssl_cert_reqs={word}", timeout=0.1)
    pool = client.connection_pool
    assert pool.connection_kwargs["ssl_cert_reqs"] == reqs
    assert issubclass(pool.connection_class, redis.SSLConnection)


def test_a_plain_url_has_no_tls() -> None:
    """An option of the host's client does not switch TLS on."""
    pool = client_from_url("redis://h/0?socket_timeout=3", timeout=0.1).connection_pool
    assert not issubclass(pool.connection_class, redis.SSLConnection)
    assert pool.connection_kwargs["socket_timeout"] == 0.1


def test_unknown_options_are_named() -> None:
    """Options of the host's client are not named."""
    url = "redis://h/0?socket_timeout=3&visibility_timeout=9&db=1&protcol=3"
    assert parse(url).unknown == ("protcol",)


def test_sentinels_and_their_own_account() -> None:
    """Sentinels are read as Celery lists them; the account in the URL is that of Redis."""
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
    """The file is read each time, because the token of a cloud changes every few minutes."""
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


def test_a_credential_provider_is_refused_with_an_alternative() -> None:
    """The reconciler imports no code of the user."""
    with pytest.raises(ConfigurationError, match="password_file="):
        parse("redis://h/0?credential_provider=module.Class")


def test_several_urls_in_one_text() -> None:
    """A list of sentinels is one URL; a list of brokers is several URLs."""
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
def test_an_error_shows_a_correct_form(url: str, word: str) -> None:
    """The error is raised before anything is connected."""
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
    """The address, the repr and the error show no part of a password that is not encoded."""
    url = form.replace("{}", secret)
    try:
        shown = repr(parse(url)) + address_of(client_from_url(url, timeout=0.1))
    except ConfigurationError as error:
        shown = str(error)
    assert "S3cr" not in shown
    assert "t0k" not in shown


@pytest.mark.parametrize("rest", ["#x", "?x=y", "/0?x=y", "/0", "?", "/0#"])
def test_a_password_that_looks_like_a_port(rest: str) -> None:
    """Another parser would read such a URL as localhost:4711."""
    with pytest.raises(ConfigurationError) as refused:
        parse(f"redis://:4711{rest}@h:6379/0")
    assert "4711" not in str(refused.value)
    assert "%23" in str(refused.value)
