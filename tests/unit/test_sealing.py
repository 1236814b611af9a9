"""What is sealed can be read with a key only, and no key is shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from jobguard.errors import ConfigurationError, KeysUnavailable, Unsealable
from jobguard.sealing import Sealer
from jobguard.settings import settings_from


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Give a file with one key."""
    path = tmp_path / "keys"
    path.write_bytes(b"# of the shop\n\n" + Fernet.generate_key() + b"\n")
    return path


def test_bytes_and_texts_come_back(file: Path) -> None:
    """A sealed value shows nothing of the plain one, and the same key reads it."""
    sealer = Sealer(str(file))
    sealed, text = sealer.seal(b"secret argument"), sealer.seal_text("an error: π")
    assert b"secret" not in sealed
    assert text is not None and "error" not in text
    assert (sealer.unseal(sealed), sealer.unseal_text(text)) == (b"secret argument", "an error: π")
    assert sealer.seal_text(None) is None


def test_what_was_stored_before_stays_readable(file: Path) -> None:
    """Values that were never sealed come back unchanged, with and without keys."""
    for sealer in (Sealer(str(file)), Sealer(None)):
        assert (sealer.unseal(b"\x01plain"), sealer.unseal_text("plain")) == (b"\x01plain", "plain")
    assert Sealer(None).seal(b"plain") == b"plain"


def test_without_the_key_nothing_is_read(file: Path, tmp_path: Path) -> None:
    """Another key, or no key, gives an error that names the setting, and a note in place of a text."""
    sealer = Sealer(str(file))
    sealed, text = sealer.seal(b"x"), sealer.seal_text("x")
    assert text is not None
    for other in (Sealer(None), Sealer(Fernet.generate_key)):
        with pytest.raises(Unsealable, match="JOBGUARD_ENCRYPT"):
            other.unseal(sealed)
        assert "JOBGUARD_ENCRYPT" in other.unseal_text(text)


def test_a_new_key_in_front_seals_and_the_old_one_still_reads(file: Path) -> None:
    """The file is read again when it changes, and reseal() moves a value to the newest key."""
    sealer = Sealer(str(file))
    old = sealer.seal(b"x")
    assert sealer.reseal(old) == old
    file.write_bytes(Fernet.generate_key() + b"\n" + file.read_bytes())
    new = sealer.reseal(old)
    assert new != old
    newest = Sealer(file.read_bytes().split()[0].decode)
    assert newest.unseal(new) == b"x"
    assert newest.unseal(newest.reseal(b"plain")) == b"plain"
    with pytest.raises(Unsealable):
        newest.unseal(old)


def test_a_file_that_vanishes_leaves_the_keys_in_use(file: Path) -> None:
    """Keys that were read once are used further; a process that never read them gets an error."""
    sealer = Sealer(str(file))
    sealed = sealer.seal(b"x")
    file.unlink()
    assert sealer.unseal(sealed) == b"x"
    with pytest.raises(KeysUnavailable, match="cannot be read"):
        Sealer(str(file)).seal(b"x")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Sealer(str(file)).check()


def test_no_error_shows_a_key(file: Path) -> None:
    """A key in place of a path, a broken key and a failing callable are refused without the key."""
    key = Fernet.generate_key().decode()
    with pytest.raises(ConfigurationError, match="put it into a file") as refused:
        settings_from({"encrypt": key})
    assert key not in str(refused.value)
    file.write_text(key[:-3])

    def failing() -> str:
        raise ValueError(key)

    for sealer in (Sealer(str(file)), Sealer(failing), Sealer(lambda: [])):
        with pytest.raises(KeysUnavailable) as broken:
            sealer.seal(b"x")
        assert key[:20] not in str(broken.value)
