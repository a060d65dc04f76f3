"""Connections on their way through TLS: bounded before anybody can be told why.

asyncio shows a connection to its server when the handshake is over. Whoever connects and says nothing would be counted by
nobody until ``tls.HANDSHAKE_S`` is over, and a few thousand of them take every descriptor that the daemon may have, those of a
session that is about to start too. So TLS listens on sockets of this module, which count what they accept until ``taken`` or
closed, and close at once what is too much. It knows no TLS and no protocol.
"""

from __future__ import annotations

import socket
from collections import Counter

from bridged.api.auth import Peer, is_loopback

PENDING_EACH = 16  # Handshakes of one address at once; a browser opens six, and each is over within seconds.
PENDING = 128  # Handshakes of all addresses elsewhere; this machine is not kept out by them.


class Handshakes:
    """Those of one server, all its listeners together."""

    def __init__(self) -> None:
        self._pending: dict[int, str] = {}
        self._of_host: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._pending)

    def over(self, sock: socket.socket) -> Listening:
        """A listening socket as one of ours."""
        ours = Listening(fileno=sock.detach())
        ours.handshakes = self
        ours.setblocking(False)
        return ours

    def admit(self, fd: int, host: str) -> bool:
        local = is_loopback(host)
        if self._of_host[host] >= PENDING_EACH * (4 if local else 1) or (len(self._pending) >= PENDING and not local):
            return False
        self._pending[fd] = host
        self._of_host[host] += 1
        return True

    def taken(self, fd: int) -> None:
        """The handshake is over, well or not."""
        host = self._pending.pop(fd, None)
        if host is not None:
            self._of_host[host] -= 1
            if not self._of_host[host]:
                del self._of_host[host]


class Listening(socket.socket):
    """Its ``accept`` gives connections that are counted, and closes those that are too many."""

    handshakes: Handshakes

    def accept(self) -> tuple[socket.socket, object]:
        while True:
            plain, address = super().accept()
            found = _Accepted(fileno=plain.detach())
            if self.handshakes.admit(found.fileno(), Peer(str(address[0])).host):
                found.handshakes = self.handshakes
                return found, address
            found.close()


class _Accepted(socket.socket):
    handshakes: Handshakes | None = None

    def close(self) -> None:
        if self.handshakes is not None:
            self.handshakes.taken(self.fileno())
        super().close()
