"""Hooks: what is put over a library's own functions, and taken off again entry for entry."""

from __future__ import annotations

from jobguard.patching import Hooks, Make

__all__ = ["Hooks", "Make"]
