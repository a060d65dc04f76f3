"""Where a server may listen and what it speaks there: one way for the line protocol, HTTP and the consoles.

An ``Entrance`` opens the listeners of one server, or takes those that were passed in (socket activation), by the rule that it
is given (``tls.transport`` or ``tls.by_certificate``: P7). Where that says TLS, handshakes are bounded (``handshakes``), and
the server calls ``taken`` for each connection that it has counted itself; from then on the kernel looks whether the other end
still lives. It knows no protocol.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from bridged.api.auth import is_loopback
from bridged.api.handshakes import Handshakes
from bridged.api.tls import HANDSHAKE_S, Tls, transport
from bridged.config.values import Listen
from bridged.errors import ConfigError

log = logging.getLogger(__name__)

# A client whose machine vanished is found within 30 + 3 * 10 s, also while nobody has anything to say to it.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 30, 10, 3
SHUTDOWN_S = 1.0  # For the other side's farewell in TLS; asyncio alone waits 30 s for who does not say one.
# ip(7) and linux/in6.h; the module socket has no name for them.
FREEBIND = {socket.AF_INET: (socket.IPPROTO_IP, 15), socket.AF_INET6: (socket.IPPROTO_IPV6, 78)}

Serve = Callable[..., Awaitable[asyncio.Server]]
"""Makes a server, as ``loop.create_server`` does: of ``host`` and ``port``, or of ``sock``, and with what TLS needs."""

Rule = Callable[[Listen, Tls | None, str], ssl.SSLContext | None]


class Entrance:
    """``what``: whose, for messages."""

    def __init__(self, what: str, tls: Tls | None = None, rule: Rule = transport) -> None:
        self.handshakes = Handshakes()
        self._what, self._tls, self._rule = what, tls, rule

    def secure(self, listen: Listen) -> bool:
        """Whether TLS is spoken there. Raises ``NotAllowed`` (P7)."""
        return self._rule(listen, self._tls, self._what) is not None

    def _wanted(self, listen: Listen) -> dict[str, Any]:
        context = self._rule(listen, self._tls, self._what)
        if context is None:
            return {}
        return {"ssl": context, "ssl_handshake_timeout": HANDSHAKE_S, "ssl_shutdown_timeout": SHUTDOWN_S}

    async def open(self, listen: Listen, serve: Serve) -> list[asyncio.Server]:
        """At least one, each listening. Raises ``NotAllowed`` (P7) or ``ConfigError``."""
        secure = self._wanted(listen)
        try:
            if is_loopback(listen.host) and not secure:
                return [await serve(host=listen.host, port=listen.port)]
            sockets = bound(listen.host, listen.port)
            if not is_loopback(listen.host) and not is_of_this_machine(listen.host):
                log.warning(
                    "%s listens on %s, which no interface has yet; it answers there as soon as one has", self._what, listen
                )
            return [await serve(sock=self.handshakes.over(sock) if secure else sock, **secure) for sock in sockets]
        except OSError as error:
            text = f"listening on {listen} failed: {error.strerror or error}"
            raise ConfigError(text, host=listen.host, port=listen.port) from error

    async def take(self, sock: socket.socket, scheme: str, serve: Serve) -> asyncio.Server:
        """A TCP socket that was passed in; the same rule holds for it. ``scheme``: as in ``Listen``."""
        secure = self._wanted(Listen(str(sock.getsockname()[0]), int(sock.getsockname()[1]), scheme))
        return await serve(sock=self.handshakes.over(sock) if secure else sock, **secure)

    def taken(self, info: Callable[[str], Any]) -> None:
        """``info``: ``get_extra_info`` of a connection that its server bounds from here on."""
        sock = info("socket")
        self.handshakes.taken(sock.fileno())
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            keep_alive(sock)


def bound(host: str, port: int) -> list[socket.socket]:
    """A socket for each address that ``host`` has, also for one that this machine will only get: after a power cut DHCP or a
    tunnel may be slower than we are, and the targets need their daemon before that. Raises ``OSError``."""
    kind, passive = socket.SOCK_STREAM, socket.AI_PASSIVE
    found = dict.fromkeys(socket.getaddrinfo(host.strip("[]") or None, port, type=kind, flags=passive))
    sockets: list[socket.socket] = []
    try:
        for family, _, protocol, _, address in found:
            try:
                sock = socket.socket(family, kind, protocol)
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


def keep_alive(sock: socket.socket) -> None:
    """Have the kernel find clients whose machine or link died without a word."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    # A client with bytes on their way to it is not asked by keep-alive: these count from the oldest unacknowledged one.
    user_timeout_ms = (KEEPALIVE_IDLE_S + KEEPALIVE_PROBES * KEEPALIVE_INTERVAL_S) * 1000
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout_ms)


def port_of(servers: list[asyncio.Server]) -> int:
    """The port that was bound, where any that is free was asked for."""
    port: int = servers[0].sockets[0].getsockname()[1]
    return port
