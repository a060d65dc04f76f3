"""Talking with the application on its own UART: say something, wait for an answer. One mechanism for everything that needs it.

The interlock before the first reset ("safe to stop"), the entry into the loader through the application, and the health probe
after a start are all a ``Conversation``. What comes back is told to the console, too. Flows without I/O; the format of the port
is the caller's business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bridged.protocol.flow import Flow, Now, Overheard, Receive, Send

SLICE_S = 0.1
RESEND_S = 1.0
TICK_S = 1e-6  # Shorter waits are none: a clock in nanoseconds may never reach a deadline in binary fractions.
KEPT_BYTES = 8192  # Of what the application says; an expression is looked for in these.


@dataclass(frozen=True, slots=True)
class Conversation:
    """``send``: bytes to say, may be empty. ``expect``: a regular expression over what comes back, empty for none.

    ``within_s``: how long to wait for it. ``quiet_s``: how long to listen on afterwards (a second match then is told).
    """

    send: bytes = b""
    expect: str = ""
    within_s: float = 1.0
    quiet_s: float = 0.0

    def __bool__(self) -> bool:
        """Whether anything is asked: without an expectation there is nothing to wait for."""
        return bool(self.expect)


@dataclass(frozen=True, slots=True)
class Heard:
    """``matches``: how often the expression was found, each time behind the last. ``text``: everything, printable."""

    matches: int
    text: str


def talk(what: Conversation, before: bytes = b"") -> Flow[Heard]:
    """Hold ``what``; ``before``: bytes that came already and count. It ends at the first match, or ``quiet_s`` after it.

    What is sent is sent again each second until it is answered: an application that has just been started does not listen yet.
    More than one answer then means nothing, so ``quiet_s`` is for conversations in which nothing is sent.
    """
    said = bytearray(before)
    pattern = re.compile(what.expect.encode()) if what.expect else None
    now: float = yield Now()
    deadline = now + what.within_s
    send_at = now
    matches = 0
    while True:
        if what.send and not matches and now >= send_at:
            yield Send(what.send)
            send_at = now + RESEND_S
        found = list(pattern.finditer(said)) if pattern else []
        if len(found) > matches:
            if not matches:
                deadline = now + (0.0 if what.send else what.quiet_s)
            matches = 1 if what.send else len(found)
        if deadline - now < TICK_S:
            break
        heard: bytes = yield Receive(256, min(SLICE_S, deadline - now))
        if heard:
            yield Overheard(heard)
            said += heard
        del said[: max(0, len(said) - KEPT_BYTES)]
        now = yield Now()
    return Heard(matches, printable(bytes(said)))


def printable(data: bytes) -> str:
    """What an application said, as one line for people."""
    return " ".join("".join(chr(b) if 32 <= b < 127 else " " for b in data).split())
