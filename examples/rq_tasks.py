"""The tasks of the RQ examples. Workers import this module."""

import os

import psycopg

import jobguard


def send_mail(address: str) -> str:
    """Send one mail. A killed worker starts this again from the beginning."""
    jobguard.current().progress(0.5, address=address)
    return f"mail to {address}"


def bill(customer: str) -> str:
    """Charge a customer and book it. A run that starts again charges and books nothing twice."""
    receipt = jobguard.once("charge", lambda: {"customer": customer, "cents": 700})
    with (
        psycopg.connect(os.environ["JOBGUARD_POSTGRES_URL"]) as connection,
        jobguard.once("book", conn=connection) as first,
    ):
        if first:
            connection.execute("create table if not exists bookings (customer text, cents int)")
            connection.execute("insert into bookings values (%(customer)s, %(cents)s)", receipt)
    return f"{customer} pays {receipt['cents']}"
