"""The console of one target: who listens, who writes, what they are told, and what is remembered.

A client of any kind (a TCP connection, telnet with RFC 2217, CONSOLE of the line protocol) has a ``Seat`` here; its wire is a
``Sink``. Bytes of the target come from ``target.owner`` and go to the history, the log and every seat, in that order; bytes of
a seat go to the port if it may write. This module knows no socket, and of telnet that 0xFF is doubled there.

Invariants:

- Nobody waits for a reader. What a client leaves unread is bounded; beyond it bytes are dropped for it alone and counted; it
  is told how many once it reads again, and thrown out when it does not for ``STALL_S``.
- One writer, by the target's one lease (``target.lease``). What another one sends is dropped, counted, and told.
- A job takes the port from everybody. Clients stay; what they send meanwhile is dropped, never kept for the program that
  starts afterwards: a key that was meant for the old one must not stop a boot loader.
- A writer that is faster than the UART is held, not dropped: its sink is not read until there is room.
- What one client sets (speed, format) lasts until it leaves; then the configured settings are back.
- ``record`` is told who comes, writes, takes over, is refused and goes; never what anybody or the target said.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from bridged import config
from bridged.console.history import History, Log
from bridged.errors import LinkError, TargetBusy, TooMany
from bridged.protocol import telnet
from bridged.target.lease import Lease, Leases
from bridged.target.owner import Frame
from bridged.target.uart import Counters

log = logging.getLogger(__name__)

STALL_S = 60.0  # A client that fetches nothing for so long, with its buffer full, is thrown out.
LOOK_S = 0.25  # How often modem lines, error counters and stalled clients are looked at while anybody is there.
TELL_EVERY_S = 5.0  # Who writes without being allowed to is told so at most so often.

RESERVED_SEATS = 4  # Beyond ``console.clients``, for principals who have none: whoever has all the others locks nobody out.

READ_WRITE, READ_ONLY = "rw", "ro"

Record = Callable[[str, str, str, str, str, str], None]
"""For the audit log: principal, source, what, target, result, detail."""


class Sink(Protocol):
    """The wire of one client. None of it waits."""

    def write(self, data: bytes) -> None: ...
    def unread(self) -> int: ...
    def hold(self, held: bool) -> None: ...
    def notice(self, text: str) -> None: ...
    def suspend(self, suspended: bool) -> None: ...
    def look(self, modem: frozenset[str], errors: Counters | None) -> None: ...
    def drop(self, reason: str) -> None: ...


class TargetApi(Protocol):
    """What is needed of ``target.owner.Target``."""

    name: str
    state: str
    reason: str
    leases: Leases
    frame: Frame

    @property
    def talkable(self) -> bool: ...
    @property
    def congested(self) -> bool: ...
    def write(self, data: bytes) -> bool: ...
    def purge_output(self) -> None: ...
    def set_frame(self, frame: Frame | None) -> None: ...
    def wired_signals(self) -> frozenset[str]: ...
    def asserted(self, name: str) -> bool: ...
    def set_signal(self, name: str, asserted: bool) -> None: ...
    def restore_signals(self) -> None: ...
    def set_break(self, active: bool) -> None: ...
    def modem(self) -> frozenset[str]: ...
    def counters(self) -> Counters | None: ...
    async def lease_changed(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Figures:
    """What is counted, for metrics. ``dropped_bytes``: in either direction; ``errors``: since the start, without sessions."""

    readers: int
    writers: int
    bytes_in: int
    bytes_out: int
    dropped_bytes: int
    errors: Counters


_NO_ERRORS = Counters(0, 0, 0, 0, 0, 0, 0)
NOTHING_COUNTED = Figures(0, 0, 0, 0, 0, _NO_ERRORS)


class Seat:
    """One client at the console. Made by ``Console.sit``; ``leave`` when its wire is gone."""

    def __init__(
        self, console: Console, sink: Sink, name: str, principal: str, mode: str, *, source: str, escape: bool
    ) -> None:
        self.console, self.sink, self.name, self.principal, self.mode = console, sink, name, principal, mode
        self.source, self.escape = source, escape
        self.since, self.said = console.monotonic(), 0
        self._refused_by = ""
        self.muted = False  # RFC 2217: the client asked for a pause. Its wire keeps the bytes, within the same bound.
        self.lost = 0
        self._full_since = 0.0
        self._told = 0.0

    # --- from the target --------------------------------------------------------------------------------------------

    def deliver(self, data: bytes, now: float) -> None:
        unread, limit = self.sink.unread(), self.console.buffer_bytes
        # Once it was full, not before half of it was read: else each read would be followed by a gap of a few bytes.
        if unread + len(data) > limit or (self.lost and unread > limit // 2):
            self.console.drop_bytes(len(data))
            if not self.lost:
                self._full_since = now
                log.info("console of %s: %s does not keep up; bytes are dropped for it", self.console.name, self.name)
            self.lost += len(data)
            return
        if self.lost:
            lost, self.lost = self.lost, 0
            self.sink.notice(f"{lost} bytes were lost here: this client did not keep up")
        self.sink.write(data)

    def stalled(self, now: float) -> bool:
        return bool(self.lost) and not self.muted and now - self._full_since > STALL_S

    # --- to the target ----------------------------------------------------------------------------------------------

    @property
    def writing(self) -> bool:
        writer = self.console.target.leases.writer
        return writer is not None and writer.holder == self.name

    def claim(self, *, take: bool = False, right: bool = False) -> None:
        """Become the writer. Raises ``TargetBusy``."""
        before = self.console.target.leases.writer
        try:
            if self.mode == READ_ONLY:
                raise TargetBusy(f"{self.name} came to read only", owner=self.name)
            self.console.target.leases.write(self.name, self.principal, take=take, right=right)
        except TargetBusy as error:
            owner = str(error.facts["owner"])
            if owner != self._refused_by:  # Each key that is pressed comes here: the first for each owner is news.
                self._refused_by = owner
                self.note("console write", error.code, f"{owner} has it" if owner != self.name else "came to read only")
            raise
        self._refused_by = ""
        if before is None or before.holder != self.name:
            self.console.writer_changed(self, before.holder if before else "")

    def say(self, data: bytes) -> bool:
        """Whether the bytes are on their way to the target; dropped and counted where not."""
        console = self.console
        why = ""
        if not console.target.talkable:
            why = console.why_silent()
        else:
            try:
                self.claim()
            except TargetBusy as error:
                why = error.message
        if not why and console.target.write(data):
            console.bytes_out += len(data)
            self.said += len(data)
            if console.target.congested:
                console.hold(self)
            return True
        console.drop_bytes(len(data))
        now = console.monotonic()
        if why and now - self._told > TELL_EVERY_S:
            self._told = now
            self.sink.notice(f"not sent: {why}")
        return False

    def set_frame(self, **changes: str | int) -> Frame:
        """Speed and format of the port; what is in force afterwards. Raises ``TargetBusy`` or a ``LinkError``."""
        wanted = replace(self.console.target.frame, **changes)  # type: ignore[arg-type]
        if wanted != self.console.target.frame:
            self.claim()
            self.console.target.set_frame(wanted)
            self.console.frame_setter = self
            log.info("console of %s: %s set %s", self.console.name, self.name, shown(wanted))
        return self.console.target.frame

    def set_signal(self, name: str, asserted: bool) -> bool:
        """Move DTR or RTS, where the configuration leaves it to clients; whether it was moved."""
        console = self.console
        if console.signals == "none" or (console.signals == "unwired" and name in console.target.wired_signals()):
            return False
        if (
            console.target.asserted(name) is not asserted
        ):  # Who only connects says how it is already, and is no writer for that.
            self.claim()
            console.target.set_signal(name, asserted)
            console.signal_setter = self
        return True

    def set_break(self, active: bool) -> None:
        """Raises ``TargetBusy``; the end of a break does not, and ends no other one's."""
        if active:
            self.claim()
            self.console.breaking = self
            self.console.target.set_break(True)
        else:
            self.console.end_break(self)

    def done_writing(self) -> None:
        """It stays to read: what it held and had set is free."""
        self.mode = READ_ONLY
        self.console.give_up(self)

    def leave(self) -> None:
        self.console.unsit(self)

    def note(self, what: str, result: str = "ok", detail: str = "") -> None:
        self.console.record(self.principal, self.source, what, self.console.name, result, detail)


def shown(frame: Frame) -> str:
    flow = {"": "", "rts": " RTS/CTS", "xon": " XON/XOFF"}[frame.flow]
    return f"{frame.baud} baud {frame.data_bits}{frame.parity}{frame.stop_bits}{flow}"


class Console:
    """See the module docstring. It is the ``listener`` of its target."""

    def __init__(self, target: TargetApi, settings: config.Console, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.target, self.name, self.settings, self.monotonic = target, target.name, settings, monotonic
        self.buffer_bytes = settings.buffer_kib * 1024
        self.signals = settings.signals
        self.history = History(settings.history_kib * 1024)
        self.bytes_in = self.bytes_out = self.dropped = 0
        self.frame_setter: Seat | None = None
        self.breaking: Seat | None = None
        self.signal_setter: Seat | None = None
        self._log: Log | None = None
        if settings.log:
            self._log = Log(Path(settings.log), settings.log_limit_mib << 20, settings.log_files, name=target.name)
        self.record: Record = lambda *_: None
        self._last_writer: Seat | None = None
        self._seats: list[Seat] = []
        self._held: list[Seat] = []
        self._numbers = itertools.count(1)
        self._view: tuple[str, str] = (target.state, "")
        self._last_counters: Counters | None = None
        self._errors = _NO_ERRORS
        self._looking: asyncio.Task[None] | None = None

    # --- clients ----------------------------------------------------------------------------------------------------

    @property
    def seats(self) -> tuple[Seat, ...]:
        return tuple(self._seats)

    def sit(
        self,
        sink: Sink,
        who: str,
        principal: str,
        mode: str = READ_WRITE,
        *,
        escape: bool = False,
        replay: int | None = None,
    ) -> Seat:
        """A new client. It gets the end of the history first (``replay`` bytes, or as configured). Raises ``TooMany``.

        ``who``: where from, for people; ``principal``: whose rights. ``escape``: it takes its bytes in telnet's form, 0xFF
        doubled.
        """
        name = f"{who}#{next(self._numbers)}"
        seat = Seat(self, sink, name, principal, mode, source=who, escape=escape)
        taken = len(self._seats)
        reserved = 0 if any(other.principal == principal for other in self._seats) else RESERVED_SEATS
        if taken >= self.settings.clients + reserved:
            error = TooMany(f"{taken} clients are at the console of {self.name}, which is the limit")
            seat.note("console", error.code)
            raise error
        tail = self.history.tail(self.settings.replay_kib * 1024 if replay is None else replay)
        if tail:
            sink.write(telnet.escape(tail) if escape else tail)
        self._seats.append(seat)
        log.info("console of %s: %s came", self.name, seat.name)
        seat.note("console", detail=f"{mode} as {seat.name}")
        if not self.target.talkable:
            sink.notice(self.why_silent())
            sink.suspend(True)
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look(), name=f"console of {self.name}")
        return seat

    def unsit(self, seat: Seat) -> None:
        if seat not in self._seats:
            return
        self._seats.remove(seat)
        if seat in self._held:
            self._held.remove(seat)
        log.info("console of %s: %s left", self.name, seat.name)
        seat.note("console end", detail=f"{seat.name} after {self.monotonic() - seat.since:.0f} s, {seat.said} bytes sent")
        self.give_up(seat)
        if self._last_writer is seat:
            self._last_writer = None

    def give_up(self, seat: Seat) -> None:
        """What it held is free, and what it had set is as it was."""
        self.target.leases.stop_writing(seat.name)
        self.end_break(seat)
        if self.signal_setter is seat:
            self.signal_setter = None
            self.target.restore_signals()
        if self.frame_setter is seat:
            self.frame_setter = None
            try:
                self.target.set_frame(None)
            except LinkError as error:
                log.warning("console of %s: the configured format could not be set: %s", self.name, error.message)

    async def close(self) -> None:
        """The daemon ends."""
        for seat in self.seats:
            seat.sink.drop("the daemon is stopping")
            self.unsit(seat)
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        if self._log is not None:
            await self._log.close()

    # --- what the target tells (``target.owner.Listener``) --------------------------------------------------------------

    def heard(self, data: bytes) -> None:
        self.bytes_in += len(data)
        self.history.add(data)
        if self._log is not None:
            self._log.feed(data)
        if not self._seats:
            return
        now = self.monotonic()
        escaped = telnet.escape(data)  # Once for all of them.
        for seat in self.seats:
            seat.deliver(escaped if seat.escape else data, now)

    def room(self) -> None:
        """The port takes bytes again."""
        held, self._held = self._held, []
        for seat in held:
            seat.sink.hold(False)

    def told(self, text: str) -> None:
        """Something that everybody here has to know."""
        for seat in self.seats:
            seat.sink.notice(text)

    def changed(self) -> None:
        """The target's state changed: tell those who can no longer write, or can again."""
        target = self.target
        # The reason why a device is absent may change while nothing else does; which job has the port is news.
        view = ("", "") if target.talkable else (target.state, target.reason if target.state == "busy" else "")
        if view == self._view:
            return
        before, self._view = self._view, view
        if view == ("", ""):
            # What the kernel counted meanwhile belongs to the session, which tells it itself.
            self._last_counters = target.counters()
            text = "the port is back" if before[0] != "busy" else f"{before[1]} has given the port back"
        else:
            self._count_errors()
            text = self.why_silent()
            self.room()  # What was held would not be sent now: it is dropped, counted and told.
        if self._log is not None:
            self._log.note(text)
        for seat in self.seats:
            seat.sink.notice(text)
            seat.sink.suspend(view != ("", ""))

    def why_silent(self) -> str:
        target = self.target
        if target.state == "busy":
            return f"{target.reason} has the port"
        return f"the target is {target.state}" + (f": {target.reason}" if target.reason else "")

    # --- for seats ------------------------------------------------------------------------------------------------------

    def hold(self, seat: Seat) -> None:
        if seat not in self._held:
            self._held.append(seat)
            seat.sink.hold(True)

    def drop_bytes(self, count: int) -> None:
        self.dropped += count

    def end_break(self, seat: Seat) -> None:
        """``seat`` holds TX low no longer, if it did."""
        if self.breaking is seat:
            self.breaking = None
            self.target.set_break(False)

    def writer_changed(self, writer: Seat, before: str) -> None:
        if self.breaking is not None and self.breaking is not writer:
            self.end_break(self.breaking)
        log.info("console of %s: %s writes", self.name, writer.name)
        if self._last_writer is not writer or before:  # Who was silent for a while and goes on is no news.
            self._last_writer = writer
            writer.note("console write", detail=f"taken over from {before}" if before else f"as {writer.name}")
        for seat in self._seats:
            if seat.name == before:
                seat.sink.notice(f"{writer.name} has taken over and writes now")

    # --- locks (the line protocol's LOCK and UNLOCK) -------------------------------------------------------------------

    async def lock(self, principal: str, ttl_s: float, note: str, *, right: bool) -> Lease:
        """Raises ``TargetBusy``."""
        lease = self.target.leases.take_lock(principal, ttl_s, note, right=right)
        log.info("target %s: locked by %s for %.0f s%s", self.name, principal, ttl_s, f" ({note})" if note else "")
        await self.target.lease_changed()
        return lease

    async def unlock(self, principal: str, *, right: bool) -> bool:
        """Whether there was a lock. Raises ``TargetBusy``."""
        dropped = self.target.leases.drop_lock(principal, right=right)
        if dropped:
            log.info("target %s: unlocked by %s", self.name, principal)
            await self.target.lease_changed()
        return dropped

    @property
    def holder(self) -> Lease | None:
        return self.target.leases.holder

    # --- looking after it ------------------------------------------------------------------------------------------------

    def figures(self) -> Figures:
        if not self._seats:  # Else it is done several times a second, and clients are told.
            self._count_errors()
        writers = sum(seat.writing for seat in self._seats)
        return Figures(
            len(self._seats) - writers, writers, self.bytes_in, self.bytes_out, self.dropped + self._log_dropped(), self._errors
        )

    def _log_dropped(self) -> int:
        return self._log.dropped if self._log is not None else 0

    def _count_errors(self) -> Counters | None:
        """What the kernel counted since the last look; None where it does not count, or a session has the port."""
        if not self.target.talkable:
            return None
        now = self.target.counters()
        before, self._last_counters = self._last_counters, now
        if now is None or before is None:
            return None
        new = now - before
        if new.errors or new.brk:
            e = self._errors
            self._errors = Counters(
                *(
                    getattr(e, name) + getattr(new, name)
                    for name in ("rx", "tx", "frame", "overrun", "parity", "brk", "buf_overrun")
                )
            )
        return new

    async def _look(self) -> None:
        while self._seats:
            await asyncio.sleep(LOOK_S)
            now = self.monotonic()
            new, modem = self._count_errors(), self.target.modem()
            for seat in self.seats:
                seat.sink.look(modem, new)
                if seat.stalled(now):
                    log.warning("console of %s: %s fetched nothing for %g s and is thrown out", self.name, seat.name, STALL_S)
                    seat.sink.drop("it fetched nothing for too long")
                    self.unsit(seat)
        self._looking = None
