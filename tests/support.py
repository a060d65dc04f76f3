"""What tests of several rooms share: descriptors, ports, and tools of the system that may be missing.

A test that needs a program which is not installed is skipped with the remedy in the reason, so that the summary of a run
lists what a person would have to install. In CI a missing tool is an error: there a skip would hide a hole.
"""

from __future__ import annotations

import os
import random
import re
import select
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import pytest


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in {"1", "true", "yes"}


def unit_environment() -> dict[str, str]:
    """What the shipped unit puts into the daemon's environment, for tests and figures of a daemon as it is installed."""
    unit = Path(__file__).parents[1] / "systemd" / "bridged.service"
    found = re.findall(r"^Environment=(\w+)=(.*)$", unit.read_text(), re.MULTILINE)
    assert found
    return {**os.environ, **dict(found)}


@contextmanager
def unread_pipe() -> Iterator[int]:
    """The end to write to of a pipe whose reader has gone, as behind ``| head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


def _ports() -> Iterator[int]:
    """TCP ports of loopback that nobody has, each of them once, and not those of another worker of this run of the tests."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 20_000 + worker % 8 * 1_500
    for port in islice(cycle(range(first, first + 1_500)), random.randrange(1_500), None):
        try:
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", port))
        except OSError:
            continue
        yield port


_PORTS = _ports()


def free_port() -> int:
    """A port for a server that is started later, perhaps twice.

    Below those that the kernel gives to anybody who connects: a server that was killed finds its own free again.
    """
    return next(_PORTS)


def take(fd: int, count: int, within_s: float = 20.0) -> bytes:
    """The next ``count`` bytes of a descriptor, fewer when no more came in time.

    What one end of a pty wrote the kernel hands to the other end later and in pieces of its own: one read may find a part.
    ``within_s`` is for what takes milliseconds, on a machine that is busy with something else.
    """
    found, deadline = b"", time.monotonic() + within_s
    while len(found) < count and (left := deadline - time.monotonic()) > 0:
        if select.select([fd], [], [], left)[0]:
            found += os.read(fd, count - len(found))
    return found


def missing(what: str, remedy: str) -> None:
    """Skip the running test because ``what`` is not there; in CI fail instead."""
    reason = f"{what} is missing; {remedy}"
    if in_ci():
        pytest.fail(f"{reason} (an error because CI is set)", pytrace=False)
    pytest.skip(reason)


def require_tool(tool: str, package: str) -> str:
    """Path of a program of the system. ``package``: what Debian calls the package that has it."""
    path = shutil.which(tool)
    if path is None:
        missing(tool, f"apt install {package}")
        raise AssertionError("unreachable: missing() ends the test")
    return path
