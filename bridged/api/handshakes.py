"""Connections on their way through TLS: bounded before anybody can be told why.

asyncio shows a connection to its server when the handshake is over. Whoever connects and says nothing would be counted by
nobody until ``tls.HANDSHAKE_S`` is over, and a few thousand of them take every descriptor that the daemon may have, those of a
session that is about to start too. So TLS listens on sockets of this module, which count what they accept until ``taken`` or
closed, and close at once what is too much. It knows no TLS and no protocol.
"""

from __future__ import annotations

import errno
import socket
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from bridged.api.auth import Peer, is_loopback

BACKLOG = 128  # Connections that the kernel holds until we take them.
PENDING_EACH = 16  # Handshakes of one address at once; a browser opens six, and each is over within seconds.
PENDING = 128  # Handshakes of all addresses elsewhere; this machine is not kept out by them.
# ip(7) and linux/in6.h; the module socket has no name for them.
FREEBIND = {socket.AF_INET: (socket.IPPROTO_IP, 15), socket.AF_INET6: (socket.IPPROTO_IPV6, 78)}

S = TypeVar("S", bound=socket.socket)


def listening(host: str, port: int, make: Callable[[int, int, int], S]) -> list[S]:
    """A socket for each address that ``host`` has, also for one that this machine will only get: after a power cut DHCP or a
    tunnel may be slower than we are, and the targets need their daemon before that. Raises ``OSError``."""
    kind, passive = socket.SOCK_STREAM, socket.AI_PASSIVE
    found = dict.fromkeys(socket.getaddrinfo(host.strip("[]") or None, port, type=kind, flags=passive))
    sockets: list[S] = []
    try:
        for family, _, protocol, _, address in found:
            try:
                sock = make(family, kind, protocol)
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT and len(found) > 1:
                    continue  # This machine was started without IPv6, and its resolver does not know.
                raise
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(*FREEBIND[family], 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
            sock.setblocking(False)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def is_of_this_machine(host: str) -> bool:
    """Whether an interface has this address now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host.strip("[]"), 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


class Handshakes:
    """Those of one server, all its listeners together."""

    def __init__(self) -> None:
        self._pending: dict[int, str] = {}
        self._of_host: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._pending)

    def listen(self, host: str, port: int) -> list[Listening]:
        """See ``listening``."""
        sockets = listening(host, port, Listening)
        for sock in sockets:
            sock.handshakes = self
        return sockets

    def over(self, sock: socket.socket) -> Listening:
        """A listening socket that was passed in, as one of ours."""
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
