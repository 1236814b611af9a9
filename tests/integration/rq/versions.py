"""The version of RQ under test."""

from __future__ import annotations

import re
from importlib.metadata import version

VERSION_OF_RQ = tuple(int(part) for part in re.findall(r"\d+", version("rq"))[:2])
