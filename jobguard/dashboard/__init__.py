"""The page: what `jobguard top`, `jobs` and the commands show and do, in a browser.

``jobguard.dashboard.app(...)`` is an ASGI application of its own or mounted in another one. Its extra is
``jobguard[dashboard]``; nothing else in jobguard imports this package.
"""

from jobguard.dashboard.application import app

__all__ = ["app"]
