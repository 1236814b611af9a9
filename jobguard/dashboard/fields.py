"""Parameters of URLs and fields of forms: ids and names may be any text, also half a surrogate pair."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.requests import Request

from jobguard.errors import ConfigurationError


def fields_in(text: str) -> dict[str, str]:
    """Return the fields of an encoded text. Raises ConfigurationError."""
    try:
        return dict(parse_qsl(text, errors="surrogatepass", max_num_fields=100))
    except ValueError:
        raise ConfigurationError("these parameters cannot be read") from None


def words_of(fields: dict[str, Any]) -> str:
    """Return fields as an encoded text, without those that are empty."""
    given = {name: value for name, value in fields.items() if value not in (None, "", ())}
    return urlencode(given, errors="surrogatepass")


def query(request: Request) -> dict[str, str]:
    """Return the parameters of the URL. Raises ConfigurationError."""
    return fields_in(request.scope["query_string"].decode("latin-1"))


def link(root: str, path: str, **fields: Any) -> str:
    """Return the URL of a page of ours."""
    words = words_of(fields)
    return f"{root}{path}" + (f"?{words}" if words else "")
