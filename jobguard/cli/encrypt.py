"""``jobguard encrypt``: the keys with which envelopes and errors are sealed."""

from __future__ import annotations

import os
from dataclasses import asdict

import click

from jobguard.cli.common import json_option, postgres_option, print_json, settings_of
from jobguard.conninfo import postgres_conninfo
from jobguard.errors import ConfigurationError, StoreUnavailable


@click.group()
def command() -> None:
    """Make keys, and seal stored jobs with them.

    The setting `encrypt` (JOBGUARD_ENCRYPT) names a file of keys, the newest first. The newest key seals,
    and every key unseals. A job whose key is lost cannot be put back.
    """


@command.command("new-key")
@click.argument("file", type=click.Path(dir_okay=False))
def new_key(file: str) -> None:
    """Put a new key in front of the keys in FILE.

    Give every process the new file first, and then run `jobguard encrypt rotate`.
    """
    from cryptography.fernet import Fernet

    before = b""
    if os.path.exists(file):
        with open(file, "rb") as old:
            before = old.read()
    temporary = f"{file}.new"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as new:
        new.write(Fernet.generate_key() + b"\n" + before)
    os.replace(temporary, file)
    click.echo(f"{file} has {len((before).split()) + 1} keys; keep a copy of it in a safe place")


@command.command()
@postgres_option
@click.option("--dry-run", is_flag=True, help="Only count.")
@json_option
def rotate(postgres: str | None, dry_run: bool, as_json: bool) -> None:
    """Seal everything that is stored with the newest key.

    Afterwards older keys may be removed from the file. The exit code is 1 if something was found that no
    key unseals.
    """
    import psycopg

    from jobguard.sealing import Sealer
    from jobguard.store.reseal import reseal

    sealer = Sealer(settings_of().encrypt)
    if not sealer.active:
        raise ConfigurationError("no key: set JOBGUARD_ENCRYPT to a file of keys")
    sealer.check()
    try:
        done = reseal(postgres_conninfo(postgres), sealer, dry_run=dry_run)
    except psycopg.Error as error:
        raise StoreUnavailable(str(error)) from error
    if as_json:
        print_json(asdict(done))
    else:
        click.echo(
            f"{done.seen} rows, {done.sealed} {'to be sealed' if dry_run else 'sealed now'}, "
            f"{done.unreadable} without a key"
        )
    if done.unreadable:
        raise click.exceptions.Exit(1)
