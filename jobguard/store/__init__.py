"""Protocols of the store, and their implementation in PostgreSQL; one file for each role."""
