"""The console of a target on this terminal, or between two pipes: what is typed goes there, what the target says comes here.

On a terminal every key goes to the target, Ctrl-C too; Ctrl-] leaves. Without one (`echo reset | bridged console motor1`) the
input is sent as it is, and its end only means that nothing more is said. It ends by itself when the target has said what was
waited for, or when the time is over.

It knows nothing of gateways, jobs or the line protocol: it gets a connection that carries bytes (``client.Console``).
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from enum import Enum
from typing import Protocol

LEAVE = b"\x1d"  # Ctrl-], as in telnet.
PIECE_BYTES = 4096
REMEMBERED_BYTES = 64 * 1024  # Of what the target said, for what is waited for.


class End(Enum):
    """Why a conversation ended; a link that broke is an error instead."""

    LEFT = "left"
    SAID = "said"
    TIME = "time"


class Wire(Protocol):
    """What is needed of a connection."""

    def fileno(self) -> int: ...
    def read(self) -> bytes: ...
    def write(self, data: bytes) -> None: ...


@contextlib.contextmanager
def raw_keys() -> Iterator[bool]:
    """Keys one by one, unechoed and without meaning, as it was afterwards; whether there is a terminal at all."""
    stdin = sys.stdin.fileno()
    try:
        before = termios.tcgetattr(stdin)
    except (termios.error, OSError):
        yield False
        return
    try:
        tty.setraw(stdin)
        yield True
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)


class Talk:
    """One conversation, across as many connections as it takes. ``until``: what ends it, said by the target; ``within_s``: its
    time, from the first connection on."""

    def __init__(self, keys: bool, listening: bool, until: re.Pattern[bytes] | None, within_s: float | None) -> None:
        self.keys, self.until, self.within_s = keys, until, within_s
        self._began = 0.0
        self._input_ended = listening
        self._said = bytearray()

    def over(self, wire: Wire) -> End:
        """Until it ends. Raises what ``wire`` raises when the connection is gone; then this may be called with the next one."""
        stdin, stdout = sys.stdin.fileno(), sys.stdout.fileno()
        self._began = self._began or time.monotonic()
        while True:
            # Before waiting: what came right behind the answer of the gateway is not on the descriptor any more.
            data = wire.read()
            try:
                _write(stdout, data)
            except BrokenPipeError:
                if self.until is None:
                    raise
                # Nobody reads on, and whether the target says what is waited for is still to be told.
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stdout)
                os.close(nowhere)
            if self.until is not None and self._heard(data):
                return End.SAID
            left_s = None if self.within_s is None else self._began + self.within_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                return End.TIME
            # A terminal is read even where nothing may be said: somebody has to see Ctrl-].
            sources: list[int] = [wire.fileno()]
            if self.keys or not self._input_ended:
                sources.append(stdin)
            ready, _, _ = select.select(sources, [], [], left_s)
            if stdin in ready:
                typed = os.read(stdin, PIECE_BYTES)
                if self.keys and (not typed or LEAVE in typed):
                    if not self._input_ended:
                        wire.write(typed.partition(LEAVE)[0])
                    return End.LEFT
                if not typed:
                    self._input_ended = True
                elif not self._input_ended:
                    wire.write(typed)

    def _heard(self, data: bytes) -> bool:
        assert self.until is not None
        self._said += data
        del self._said[:-REMEMBERED_BYTES]
        return self.until.search(self._said) is not None


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
