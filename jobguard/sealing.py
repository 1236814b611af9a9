"""Seal envelopes and errors before they go to PostgreSQL, with Fernet keys that only we and the user hold.

The keys come from a file (one key a line, the newest first) or from a callable that returns them. The
newest key seals, and every key unseals. A text or an envelope that was stored before the setting was made
is returned as it is. Keys are never stored and never logged.
"""

from __future__ import annotations

import base64
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

from jobguard.errors import ConfigurationError, KeysUnavailable, Unsealable, is_host_interrupt
from jobguard.log import log_event

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet

Keys: TypeAlias = str | bytes | Iterable[str | bytes]
Encrypt: TypeAlias = str | Callable[[], Keys] | None

_MAGIC = b"\x00sealed:1:"
_TEXT = "sealed:1:"
_ASK_AGAIN = 60.0
"""Seconds for which the keys that a callable returned are used."""


class Sealer:
    """Seals and unseals. Without keys it seals nothing, and raises for what is sealed."""

    def __init__(self, encrypt: Encrypt) -> None:
        self._source = encrypt
        self._lock = threading.Lock()
        self._fernet: MultiFernet | None = None
        self._version: Any = None

    @property
    def active(self) -> bool:
        """True if everything that is stored is sealed."""
        return self._source is not None

    def check(self) -> None:
        """Load the keys of a file now. Raises ConfigurationError if that is impossible."""
        if isinstance(self._source, str):
            try:
                self._keys()
            except KeysUnavailable as error:
                raise ConfigurationError(str(error)) from None

    def seal(self, plain: bytes) -> bytes:
        """Return the sealed form. Raises KeysUnavailable."""
        if self._source is None:
            return plain
        # Fernet's own form is base64, which PostgreSQL does not need.
        return _MAGIC + base64.urlsafe_b64decode(self._keys().encrypt(plain))

    def unseal(self, stored: bytes) -> bytes:
        """Return the plain form. Raises Unsealable if no key fits, and KeysUnavailable."""
        if not stored.startswith(_MAGIC):
            return stored
        return self._decrypt(base64.urlsafe_b64encode(stored[len(_MAGIC) :]))

    def seal_text(self, plain: str | None) -> str | None:
        """Return the sealed form of a text. Raises KeysUnavailable."""
        if self._source is None or plain is None:
            return plain
        return _TEXT + self._keys().encrypt(plain.encode("utf-8", "replace")).decode("ascii")

    def unseal_text(self, stored: str) -> str:
        """Return the plain form of a text, or a note that it cannot be read here."""
        if not stored.startswith(_TEXT):
            return stored
        try:
            return self._decrypt(stored[len(_TEXT) :].encode("ascii", "replace")).decode()
        except (Unsealable, KeysUnavailable):
            return "(sealed: set JOBGUARD_ENCRYPT to read it)"

    def reseal(self, stored: bytes) -> bytes:
        """Return the form that the newest key makes; what it made already comes back unchanged."""
        if self._source is None:
            raise ConfigurationError("no key: set JOBGUARD_ENCRYPT to a file of keys")
        if stored.startswith(_MAGIC) and self._is_newest(
            base64.urlsafe_b64encode(stored[len(_MAGIC) :])
        ):
            return stored
        return self.seal(self.unseal(stored))

    def reseal_text(self, stored: str) -> str:
        """Return the form of a text that the newest key makes. Raises Unsealable."""
        if stored.startswith(_TEXT):
            token = stored[len(_TEXT) :].encode("ascii", "replace")
            if self._is_newest(token):
                return stored
            stored = self._decrypt(token).decode()
        sealed = self.seal_text(stored)
        assert sealed is not None
        return sealed

    def _is_newest(self, token: bytes) -> bool:
        from cryptography.fernet import InvalidToken

        try:
            self._keys()._fernets[0].decrypt(token)
        except InvalidToken:
            return False
        return True

    def _decrypt(self, token: bytes) -> bytes:
        if self._source is None:
            raise Unsealable
        from cryptography.fernet import InvalidToken

        try:
            return self._keys().decrypt(token)
        except InvalidToken:
            raise Unsealable("none of the keys of JOBGUARD_ENCRYPT fits") from None

    def _keys(self) -> MultiFernet:
        """Return the present keys. If they cannot be loaded again, the ones before are used."""
        with self._lock:
            version: Any = None
            try:
                version = self._present_version()
                if self._fernet is None or version != self._version:
                    self._fernet = _fernet(self._load())
                    self._version = version
            except Exception as error:  # of the user's callable, too: its text may hold a key
                if is_host_interrupt(error):
                    raise
                reason = error if isinstance(error, KeysUnavailable | OSError) else type(error)
                if self._fernet is None:
                    raise KeysUnavailable(f"encrypt: the keys cannot be read: {reason}") from None
                log_event("keys_unreadable", error=str(reason))
                if not isinstance(self._source, str):
                    self._version = version  # a callable may wait long: it is not called each time
            return self._fernet

    def _present_version(self) -> Any:
        if isinstance(self._source, str):
            found = os.stat(self._source)
            return found.st_mtime_ns, found.st_size, found.st_ino
        return time.monotonic() // _ASK_AGAIN

    def _load(self) -> list[bytes]:
        if isinstance(self._source, str):
            with open(self._source, "rb") as file:
                lines = [line.strip() for line in file]
            return [line for line in lines if line and not line.startswith(b"#")]
        assert self._source is not None
        given = self._source()
        several = [given] if isinstance(given, str | bytes) else given
        return [key.encode() if isinstance(key, str) else key for key in several]


def _fernet(keys: list[bytes]) -> MultiFernet:
    try:
        from cryptography.fernet import Fernet, MultiFernet
    except ImportError:
        raise KeysUnavailable("encrypt needs: pip install 'jobguard[encrypt]'") from None
    if not keys:
        raise KeysUnavailable("there is no key: make one with `jobguard encrypt new-key`")
    try:
        return MultiFernet([Fernet(key) for key in keys])
    except ValueError:
        raise KeysUnavailable(
            "a key is no Fernet key: make one with `jobguard encrypt new-key`"
        ) from None
