"""Talking with the application on its own UART: say something, wait for an answer. One mechanism for everything that needs it.

The interlock before the first reset ("safe to stop"), the entry into the loader through the application, and the health probe
after a start are all a ``Conversation``. What comes back is told to the console, too. Flows without I/O; the format of the port
is the caller's business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bridged.protocol.flow import Flow, Now, Overheard, ReadLine, Receive, Send

SLICE_S = 0.1
RESEND_S = 1.0
TICK_S = 1e-6  # Shorter waits are none: a clock in nanoseconds may never reach a deadline in binary fractions.
KEPT_BYTES = 8192  # Of what the application says; an expression is looked for in these.


@dataclass(frozen=True, slots=True)
class Conversation:
    """``send``: bytes to say, may be empty. ``expect``: a regular expression over what comes back, empty for none.

    ``within_s``: how long to wait for it. ``quiet_s``: how long to listen on afterwards (a second match then is told).
    ``line``: the name of an input that has to be active, too, empty for none; it alone is enough to ask for.
    """

    send: bytes = b""
    expect: str = ""
    within_s: float = 1.0
    quiet_s: float = 0.0
    line: str = ""

    def __bool__(self) -> bool:
        """Whether anything is asked: without an expectation there is nothing to wait for."""
        return bool(self.expect or self.line)


@dataclass(frozen=True, slots=True)
class Heard:
    """``good``: everything that was asked for came. ``matches``: how often the expression was found, each time behind the last.
    ``active``: the line, at the end; True where none is asked. ``text``: everything that was said, printable."""

    good: bool
    matches: int
    active: bool
    text: str

    def lacks(self, what: Conversation) -> str:
        """What did not come of ``what``, for people; empty when all of it did."""
        missing = [f"{what.expect!r} did not come"] if what.expect and not self.matches else []
        if not self.active:
            missing.append(f"line {what.line} {'went inactive again' if self.good else 'did not become active'}")
        return " and ".join(missing)


def talk(what: Conversation, before: bytes = b"") -> Flow[Heard]:
    """Hold ``what``; ``before``: bytes that came already and count. It ends when all came, or ``quiet_s`` later.

    What is sent is sent again each second until it is answered: an application that has just been started does not listen yet.
    More than one answer then means nothing, so ``quiet_s`` is for conversations in which nothing is sent.
    """
    said = bytearray(before)
    pattern = re.compile(what.expect.encode()) if what.expect else None
    now: float = yield Now()
    deadline = now + what.within_s
    send_at = now
    matches = 0
    good, active = False, True
    while True:
        if what.send and not matches and now >= send_at:
            yield Send(what.send)
            send_at = now + RESEND_S
        if pattern:
            found = len(list(pattern.finditer(said)))
            # What is asked again is answered again; and who does not watch for a crash loop may find a word twice.
            matches = max(matches, found if what.quiet_s and not what.send else min(found, 1))
        if what.line:
            active = yield ReadLine(what.line)
        if not good and active and (matches or pattern is None):
            good = True
            deadline = now + (0.0 if what.send else what.quiet_s)
        if deadline - now < TICK_S or (good and not active):
            break
        heard: bytes = yield Receive(256, min(SLICE_S, deadline - now))
        if heard:
            yield Overheard(heard)
            said += heard
        del said[: max(0, len(said) - KEPT_BYTES)]
        now = yield Now()
    return Heard(good, matches, active, printable(bytes(said)))


def printable(data: bytes) -> str:
    """What an application said, as one line for people."""
    return " ".join("".join(chr(b) if 32 <= b < 127 else " " for b in data).split())
