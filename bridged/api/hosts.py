"""By which names a browser may address this gateway.

An address cannot be rebound to another machine, a name can (DNS rebinding): so names must be known, and everything that answers
browsers asks here. Pure.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable

_HOST = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[a-z0-9._-]{1,253}))(?::\d{1,5})?")


class Hosts:
    """``names``: besides addresses, localhost and the name of this machine."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = {name.lower().rstrip(".") for name in ("localhost", socket.gethostname(), *names) if name}

    def ours(self, host: str) -> bool:
        """``host``: the header of a request, with its port where that is said."""
        found = _HOST.fullmatch(host.lower())
        if found is None:
            return False
        try:
            ipaddress.ip_address(found["address"] or found["name"])
        except ValueError:
            return bool(found["name"]) and found["name"].rstrip(".") in self._names
        return True
