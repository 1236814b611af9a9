from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psycopg.conninfo
import psycopg.pq
import pytest
from hypothesis import given as given_some
from hypothesis import strategies as st

from jobguard.conninfo import KEYWORDS, describe, normalise, postgres_conninfo
from jobguard.errors import ConfigurationError, StoreUnavailable


def libpq_reads(conninfo: str) -> dict[str, Any]:
    """Return the options that libpq reads from this string."""
    return dict(psycopg.conninfo.conninfo_to_dict(conninfo))


@pytest.mark.parametrize(
    "scheme",
    [
        "postgres",
        "postgresql",
        "postgresql+asyncpg",
        "postgresql+psycopg",
        "postgresql+psycopg2",
        "postgresql+psycopg2cffi",
        "postgis",
        "POSTGRES",
    ],
)
def test_every_usual_scheme_is_read_by_libpq(scheme: str) -> None:
    """Libpq reads the same database from a URL that was made for another driver."""
    read = libpq_reads(normalise(f"{scheme}://ann:s%40cret@db.example:6543/shop?sslmode=require"))
    assert read == {
        "user": "ann",
        "password": "s@cret",
        "host": "db.example",
        "port": "6543",
        "dbname": "shop",
        "sslmode": "require",
    }


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        ("pgbouncer=true&schema=public&connection_limit=5", {}),
        ("schema=public&connect_timeout=3", {"connect_timeout": "3"}),
        ("options=-c%20search_path%3Dx+y", {"options": "-c search_path=x+y"}),
        ("application_name=a%26b", {"application_name": "a&b"}),
        ("ssl=true", {"sslmode": "require"}),
        ("ssl=verify-full", {"sslmode": "verify-full"}),
        ("ssl=true&sslmode=verify-ca", {"sslmode": "verify-ca"}),
        ("sslmode=no-verify", {"sslmode": "require"}),
    ],
)
def test_unknown_options_are_dropped_and_tls_is_kept(query: str, kept: dict[str, str]) -> None:
    """Options of other drivers neither break the connection nor switch TLS off."""
    read = libpq_reads(normalise(f"postgresql://h/d?{query}"))
    assert read == {"host": "h", "dbname": "d", **kept}


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://a:1,b:2/d?target_session_attrs=read-write",
        "postgresql+asyncpg:///d?host=a:1&host=b:2&target_session_attrs=read-write",
        "postgresql:///d?host=a,b&port=1,2&target_session_attrs=read-write",
    ],
)
def test_several_hosts_stay_several(url: str) -> None:
    """Several hosts are kept in libpq's spelling and in SQLAlchemy's spelling."""
    assert libpq_reads(normalise(url)) == {
        "host": "a,b",
        "port": "1,2",
        "dbname": "d",
        "target_session_attrs": "read-write",
    }


@pytest.mark.parametrize(
    "given",
    [
        {"host": "h", "port": 6543, "dbname": "d", "user": "u", "password": r"it's \ 1"},
        {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": "d",
            "USER": "u",
            "PASSWORD": r"it's \ 1",
            "HOST": "h",
            "PORT": "6543",
            "CONN_MAX_AGE": 60,
            "TEST": {"NAME": "t"},
            "OPTIONS": {"pool": True},
        },
        {"host": "h", "port": 6543, "database": "d", "username": "u", "password": r"it's \ 1"},
    ],
)
def test_a_mapping_is_read_in_psycopgs_keys_and_in_djangos(given: Mapping[str, Any]) -> None:
    """The database settings of an application can be passed unchanged."""
    assert libpq_reads(normalise(given)) == {
        "host": "h",
        "port": "6543",
        "dbname": "d",
        "user": "u",
        "password": r"it's \ 1",
    }


def test_djangos_options_reach_libpq() -> None:
    """Options for TLS in DATABASES["…"]["OPTIONS"] are kept."""
    given = {"NAME": "d", "HOST": "", "OPTIONS": {"sslmode": "verify-full", "isolation_level": 1}}
    assert libpq_reads(normalise(given)) == {"dbname": "d", "sslmode": "verify-full"}


@pytest.mark.parametrize("given", ["host=h dbname='my db'", "service=prod", "dbname = d"])
def test_a_libpq_string_is_passed_on_unchanged(given: str) -> None:
    """A string that libpq reads is not rewritten."""
    assert normalise(given) == given


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ("sqlite:///db.sqlite3", "sqlite"),
        ("sqlite::memory:", "sqlite"),
        ("mysql+pymysql://u:hidden@h/d", "mysql"),
        ({"ENGINE": "django.db.backends.sqlite3", "NAME": "x"}, "sqlite"),
        ("hidden", "libpq"),
        ({"pool": 5}, "mapping"),
    ],
)
def test_another_database_is_refused(given: str | dict[str, Any], word: str) -> None:
    """The message names the other database and contains no password."""
    with pytest.raises(ConfigurationError, match=word) as refused:
        postgres_conninfo(given, {})
    assert "hidden" not in str(refused.value)


def test_the_argument_wins_then_the_file_then_our_variable_then_everybodys(tmp_path: Path) -> None:
    """Four places are read, in the order of the manual."""
    file = tmp_path / "url"
    file.write_text("postgresql://file/d\n")
    environ = {
        "JOBGUARD_POSTGRES_URL_FILE": str(file),
        "JOBGUARD_POSTGRES_URL": "postgresql://ours/d",
        "DATABASE_URL": "postgresql://theirs/d",
    }
    assert postgres_conninfo("postgresql://argument/d", environ)() == "postgresql://argument/d"
    for host in ("file", "ours", "theirs"):
        assert postgres_conninfo(None, environ)() == f"postgresql://{host}/d"
        del environ[next(iter(environ))]
    with pytest.raises(ConfigurationError, match=r"JOBGUARD_POSTGRES_URL.*DATABASE_URL"):
        postgres_conninfo(None, environ)


def test_a_variable_that_is_set_to_nothing_counts_as_unset() -> None:
    """A variable with the empty string is ignored, because compose files set such variables."""
    environ = {"JOBGUARD_POSTGRES_URL": "", "DATABASE_URL": "postgresql://h/d"}
    assert postgres_conninfo(None, environ)() == "postgresql://h/d"


def test_a_secrets_file_is_read_again_at_each_connect(tmp_path: Path) -> None:
    """A rotated password is used from the next connect on."""
    file = tmp_path / "url"
    conninfo = postgres_conninfo(None, {"JOBGUARD_POSTGRES_URL_FILE": str(file)})
    with pytest.raises(StoreUnavailable, match="JOBGUARD_POSTGRES_URL_FILE"):
        conninfo()
    for password in ("old", "new"):
        file.write_text(f"postgres://u:{password}@h/d")
        assert conninfo() == f"postgresql://u:{password}@h/d"


def test_a_function_is_called_at_each_connect_and_its_secrets_are_not_shown() -> None:
    """A callable can return short-lived tokens; if it fails, this counts as an outage."""
    tokens = iter(["one", "two"])
    conninfo = postgres_conninfo(lambda: {"host": "h", "password": next(tokens)}, {})
    assert [conninfo(), conninfo()] == ["host=h password=one", "host=h password=two"]

    def fails() -> str:
        raise RuntimeError("the token is hidden")

    with pytest.raises(StoreUnavailable, match="RuntimeError") as failed:
        postgres_conninfo(fails, {})()
    assert "hidden" not in str(failed.value)


@pytest.mark.parametrize(
    ("conninfo", "place"),
    [
        ("postgresql://u:hidden@h:6543/d?sslmode=require", "h:6543/d"),
        ("postgresql://u:hid@den@h/d", "h:5432/d"),
        ("postgresql:///d", "localhost:5432/d"),
        ("postgresql://u@/", "localhost:5432/u"),
        ("postgresql://a:1,b:2/d", "a:1,b:2/d"),
        ("postgresql://a,b/d", "a:5432,b:5432/d"),
        ("postgresql://[::1]:6543/d", "[::1]:6543/d"),
        ("postgresql:///d?host=/run/pg", "/run/pg:5432/d"),
        ("postgresql://%2Frun%2Fpg/d", "/run/pg:5432/d"),
        ("host=h port=6543 dbname='my db' password='hid den'", "h:6543/my db"),
        ("garbage", "localhost:5432/"),
    ],
)
def test_a_place_is_described_without_its_password(conninfo: str, place: str) -> None:
    """Logs and messages contain only host, port and database."""
    assert describe(conninfo, {}) == place


def test_a_place_left_to_libpq_is_described_by_libpqs_variables() -> None:
    """The description uses PGHOST and similar variables if libpq uses them."""
    environ = {"PGHOST": "h", "PGPORT": "6543", "PGDATABASE": "d"}
    assert describe("postgresql://", environ) == "h:6543/d"


def test_no_keyword_of_the_installed_libpq_is_dropped() -> None:
    """Every keyword of the installed libpq is in our list."""
    installed = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
    assert installed <= KEYWORDS


@pytest.mark.parametrize("password", ["p@ss", "50%", "a:b", "100%zz", "it's", "p#q", "[x]"])
def test_a_password_with_one_possible_reading_is_accepted(password: str) -> None:
    """Libpq itself would cut such a password at the first @, or print it as a wrong encoding."""
    read = libpq_reads(normalise(f"postgresql://me@srv:{password}@db:5/shop"))
    assert read == {
        "user": "me@srv",
        "password": password,
        "host": "db",
        "port": "5",
        "dbname": "shop",
    }


@pytest.mark.parametrize("rest", ["/x", "?x", "?x=y", "/?host=x", "?=&"])
def test_a_password_that_looks_like_a_port_is_refused(rest: str) -> None:
    """Libpq would read such a URL as the host `user` and its port."""
    with pytest.raises(ConfigurationError, match="%2F") as refused:
        normalise(f"postgresql://user:4711{rest}@db/shop")
    assert "4711" not in str(refused.value)


def test_an_account_in_the_query_may_hold_an_at_sign() -> None:
    """Names of users on Azure contain an at sign."""
    read = libpq_reads(normalise("postgresql://db/shop?user=me@srv&password=a@b"))
    assert (read["user"], read["password"]) == ("me@srv", "a@b")


def test_an_unknown_keyword_is_refused_before_libpq_prints_it() -> None:
    """The keyword may be the rest of a password with a space."""
    with pytest.raises(ConfigurationError, match="did you mean password") as refused:
        normalise("host=h pasword=hidden")
    assert "hidden" not in str(refused.value)


SECRET = st.text("Zz9/@#?%:;&=+,[] '\\é", min_size=1).map(lambda tail: f"S3cr{tail}t0k")
FORMS = st.sampled_from(
    [
        "postgresql://user:{}@h:5432/d",
        "postgres://:{}@h,g:1/d?sslmode=require",
        "postgresql+asyncpg://user:{}@[::1]/d",
        "postgresql://h/d?user=u&password={}",
        "postgresql://user:12{}@h/d",
        "postgresql://user:{}",
        "postgresql://{}",
        "{}",
        "host=h password={} dbname=d",
        "host=h password='{}' dbname=d",
        "host=h password={}",
    ]
)


@given_some(FORMS, SECRET)
def test_no_part_of_a_password_is_printed(form: str, secret: str) -> None:
    """Neither jobguard, nor libpq, nor the description shows a part of an unencoded password."""
    url = form.replace("{}", secret)
    try:
        conninfo = normalise(url)
        shown = describe(conninfo, {})
        libpq_reads(conninfo)
    except (ConfigurationError, psycopg.ProgrammingError) as error:
        shown = str(error)
    if form != "postgresql://{}":  # with this form the text is the name of the host
        assert "S3cr" not in shown
    assert "t0k" not in shown or form == "postgresql://{}"


def test_a_string_within_the_name_of_the_database_is_not_shown() -> None:
    """Libpq reads a connection string in place of the database name."""
    given = {"dbname": "postgresql://u:hidden@h/d", "host": "x"}
    assert "hidden" not in describe(normalise(given), {})
