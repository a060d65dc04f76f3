"""What systemd and the daemon say to each other: readiness and status, passed sockets, the watchdog.

The library systemd-python (Debian: python3-systemd, extra ``systemd``) is used where it is installed. It has no wheel on any
platform, so nobody needs it: without it one datagram of ours says the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping

from bridged.logs import Notice, note

try:
    from systemd import daemon as library  # type: ignore[attr-defined]  # mypy takes our folder systemd/ for it.
except ImportError:
    library = None

log = logging.getLogger("bridged")

Beat = Callable[[], Awaitable[object]]
"""Comes back when one part of the daemon has made a turn."""


class Notifier:
    """sd_notify(3): one datagram a message to the socket in $NOTIFY_SOCKET; without one nothing is sent."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        # The library knows the environment of its process and no other.
        self._library = library if environment is os.environ else None
        address = environment.get("NOTIFY_SOCKET", "")
        # "@" stands for the zero byte with which an address in the abstract namespace begins.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        owner = environment.get("WATCHDOG_PID", str(os.getpid()))
        usec = environment.get("WATCHDOG_USEC", "") if owner == str(os.getpid()) else ""
        self.watchdog_s = int(usec) / 1e6 if usec.isdigit() else 0.0

    def send(self, *assignments: str) -> None:
        if not self._address:
            return
        # A notification that is lost is no reason to stop: systemd has its own time-outs.
        with contextlib.suppress(OSError):
            if self._library:
                self._library.notify("\n".join(assignments))
                return
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.sendto("\n".join(assignments).encode(), self._address)

    def status(self, text: str) -> None:
        self.send(f"STATUS={text}")


def passed_sockets(environment: Mapping[str, str] = os.environ, first_fd: int = 3) -> dict[str, list[socket.socket]]:
    """Listening sockets from socket activation (sd_listen_fds(3)) by their names; those for another process are not ours."""
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = int(environment.get("LISTEN_FDS", "0") or 0)
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, list[socket.socket]] = {}
    for index in range(count):
        os.set_inheritable(first_fd + index, False)
        sock = socket.socket(fileno=first_fd + index)
        sock.setblocking(False)
        found.setdefault(names[index] if index < len(names) else "", []).append(sock)
    return found


async def watch_over(notifier: Notifier, beats: Mapping[str, Beat]) -> None:
    """Feed systemd's watchdog for as long as every beat comes. A beat belongs to a part that all targets share."""
    if not notifier.watchdog_s:
        return
    period_s = notifier.watchdog_s / 3
    silent = ""
    while True:
        missing = await _missing(beats, period_s)
        if not missing:
            notifier.send("WATCHDOG=1")
        if missing != silent:
            silent = missing
            if missing:
                text = "no progress for %.0f s: %s; the watchdog is not fed"
                log.critical(text, period_s, missing, extra=note(Notice.STARVED))
            else:
                log.warning("progress again; the watchdog is fed")
        await asyncio.sleep(period_s)


async def _missing(beats: Mapping[str, Beat], limit_s: float) -> str:
    """Names of the parts whose beat did not come within ``limit_s``."""
    tasks = {name: asyncio.ensure_future(beat()) for name, beat in beats.items()}
    try:
        await asyncio.wait(tasks.values(), timeout=limit_s)
        return ", ".join(name for name, task in tasks.items() if not task.done() or task.cancelled() or task.exception())
    finally:
        for task in tasks.values():
            task.cancel()
