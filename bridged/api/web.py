"""The server half of aiohttp, without its client: what the HTTP modules use of it, from one place.

``import aiohttp`` runs its package file, which imports the client with its connectors, cookies and tracing: 6.6 MiB of the 45
that an idle daemon may have, and 0.1 s on a laptop, for nothing that is used here. So the package is put in place unexecuted,
its server modules are imported from below it, and whoever asks the package for more gets all of it after all (``_Package``).
Measured on CPython 3.11 with aiohttp 3.14; a test holds both halves of that sentence.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any


class _Package(types.ModuleType):
    """Runs the package's own file when something is asked for that only that has."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        if name.startswith("__") or spec is None or spec.loader is None or self.__dict__.get("_whole"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        folder = Path(next(iter(self.__path__)))
        if any(folder.glob(f"{name}.*")) or (folder / name).is_dir():
            raise AttributeError(name)  # A module: the import that asks will load it.
        self._whole = True
        spec.loader.exec_module(self)
        return getattr(self, name)


def _put_in_place() -> None:
    if "aiohttp" in sys.modules:
        return
    spec = importlib.util.find_spec("aiohttp")
    if spec is None or spec.submodule_search_locations is None:
        return  # The import below says what is wrong.
    package = _Package("aiohttp")
    package.__spec__, package.__loader__, package.__file__ = spec, spec.loader, spec.origin
    package.__path__ = list(spec.submodule_search_locations)
    # Its server modules ask for the version; ``importlib.metadata`` would cost what is saved here.
    said = re.search(r'^__version__ = "([^"]+)"', Path(str(spec.origin)).read_text(), re.MULTILINE)
    package.__dict__["__version__"] = said[1] if said else "3"
    sys.modules["aiohttp"] = package


_put_in_place()

from aiohttp.client_exceptions import ClientPayloadError  # noqa: E402
from aiohttp.http_exceptions import HttpProcessingError  # noqa: E402
from aiohttp.http_websocket import WSCloseCode, WSMsgType  # noqa: E402
from aiohttp.web_protocol import RequestHandler, RequestPayloadError  # noqa: E402
from aiohttp.web_request import BaseRequest  # noqa: E402
from aiohttp.web_response import Response, StreamResponse  # noqa: E402
from aiohttp.web_server import Server  # noqa: E402
from aiohttp.web_ws import WebSocketResponse  # noqa: E402

# How aiohttp says that a body did not come to its end.
BROKEN_OFF = (ConnectionError, RequestPayloadError, HttpProcessingError, ClientPayloadError)

__all__ = [
    "BROKEN_OFF",
    "BaseRequest",
    "RequestHandler",
    "Response",
    "Server",
    "StreamResponse",
    "WSCloseCode",
    "WSMsgType",
    "WebSocketResponse",
]
