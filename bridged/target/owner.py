"""The owner of one target in the daemon: its UART and lines for as long as they exist, its lease, and its sessions.

``Target`` opens the device when it is there, notices when it vanishes, starts a session process for each job, hands it the open
descriptors, and watches it: it answers its barriers, ends it at its deadline, and when it dies without a result waits out the
hazard (P9) and brings the target back to its application itself (P4). It knows nothing of clients, queues and journals: events,
progress and barriers go to the callables of the caller.

While no session has the port the console has it: what the target says goes to ``listener``, and so does what it said to a
session (``Overheard``), in the order in which it was said. The ``leases`` say who may write, and whose jobs wait.

States: ``absent`` (no device, or somebody else has it; tried again by itself), ``idle``, ``busy``, ``broken`` (lines could not
be brought back to idle; only ``clear`` or a restart gets out of it). Opening moves the lines to idle and resets nothing.

A target that ``shares`` its port or a line with another cannot keep them open. It takes them once to bring the lines to idle,
then for each session only; the caller runs such targets one at a time. All of them have one lock (``wires``), which whoever has
the lines open holds: a device that comes back in the middle of a neighbour's session moves nothing before its end.

It is one file because keeper, console and session hand the same port and lines to each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from bridged import config
from bridged.errors import (
    BridgedError,
    DeadlineExceeded,
    LineUnavailable,
    LinkError,
    PortBusy,
    PortGone,
    SessionDied,
    TargetBroken,
    TargetBusy,
    TargetError,
    from_dict,
)
from bridged.events import Event, Phase, PhaseStarted, SectorProven
from bridged.images.model import Image, Span
from bridged.protocol.flow import Pause, SetLines
from bridged.target import lines as wires
from bridged.target.configured import request_of, wiring_of
from bridged.target.lease import Leases
from bridged.target.lines_open import open_lines
from bridged.target.port import Port
from bridged.target.process import Barrier, Session
from bridged.target.request import NO_PAST, Past, Request
from bridged.target.uart import Counters, Uart, look

NOT_OPENED = "not opened yet"
RETRY_S = 1.0  # How often an absent device is looked for, and a present one is looked after.
RETRY_MOST_S = 30.0  # Each opening raises DTR and RTS: what was opened several times in vain is opened less and less often.
SOON_TRIES = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Frame:
    """How the application speaks: what a console may set. ``flow``: "", ``rts`` or ``xon``."""

    baud: int
    parity: str = "N"
    data_bits: int = 8
    stop_bits: int = 1
    flow: str = ""


class Listener(Protocol):
    """The console's side of a target. All of it is called in the event loop's thread and must not wait."""

    def heard(self, data: bytes) -> None: ...
    def room(self) -> None: ...
    def told(self, text: str) -> None: ...
    def changed(self) -> None: ...


class Target:
    """See the module docstring. Create it in the event loop's thread; ``open`` starts the keeper."""

    def __init__(self, name: str, settings: config.Target, *, on_change: Callable[[], None] = lambda: None) -> None:
        self.name = name
        self.config = settings
        self.state = "absent"
        self.reason = NOT_OPENED
        self.leases = Leases(time.monotonic, time.time, settings.console.writer_idle_s)
        self.listener: Listener | None = None
        self.frame = Frame(settings.application.baud, settings.application.parity)
        self._signals: dict[str, bool] = {}  # DTR and RTS, where a console writer set them.
        self._signals_due = False  # Set back while the console did not have the port.
        self.last_trace = ""
        self.unreleased = False  # The port went with the lines on it: when it is back ``release_after`` is owed.
        self._on_change = on_change
        self._port: Port | None = None
        self._uart: Uart | None = None
        self._lines: wires.Lines | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._look = asyncio.Event()  # The keeper looks at once: the device said that it is gone.
        self._not_before = 0.0
        self._tries = 0  # How often the port was opened in vain.
        self._session: Session | None = None
        self._asked = ""
        self._shared = bool(settings.shares)
        self.wires = asyncio.Lock()  # Whoever puts targets together gives one to all that share.

    # --- life -----------------------------------------------------------------------------------------------------

    def hold_off(self, hazard_s: float) -> None:
        """Touch neither port nor lines for ``hazard_s`` from now: a killed session left a hazard. Call it before ``open``."""
        self._not_before = max(self._not_before, time.monotonic() + hazard_s)

    async def open(self) -> None:
        """Start looking after the device. Returns at once; a missing device is no error."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), name=f"keeper of {self.name}")

    async def close(self) -> None:
        """Give port and lines back. A running session is not waited for: stop it first."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        await self._drop()
        await self._set("absent", "closed")

    def clear(self) -> None:
        """A person has looked at a broken target: try it again."""
        if self.state == "broken":
            self.state, self.reason = "absent", "cleared, opening again"
            self._detach()
            self._let_go()
            self._on_change()

    async def _keep(self) -> None:
        while True:
            if self.state == "absent":
                wait_s = self._not_before - time.monotonic()
                if wait_s > 0:
                    self.reason = f"waiting {wait_s:.0f} s for the end of a hazard"
                    await asyncio.sleep(wait_s)
                if self._shared and self.wires.locked():
                    await self._set("absent", "a target that shares its wires has them")
                try:
                    async with self._wired():
                        await asyncio.to_thread(self._take)
                except BridgedError as error:
                    if error.message != self.reason:
                        await self._set("absent", error.message)
                except Exception as error:  # A defect must not end the looking after.
                    await self._set("absent", f"{type(error).__name__}: {error}")
                else:
                    if not self._shared:
                        await self._attach()
                    await self._set("idle", "")
            elif self.state == "idle" and (lost := self._lost()):
                await self._gone(lost)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s):
                    await self._look.wait()
            self._look.clear()

    @property
    def _pause_s(self) -> float:
        return min(RETRY_S * 2.0 ** min(max(0, self._tries - SOON_TRIES), 10), RETRY_MOST_S)

    async def _gone(self, reason: str) -> None:
        await self._drop()
        await self._set("absent", reason)

    async def _attach(self) -> None:
        """Let the console have the open port."""
        if self._uart is not None and self._port is None:
            self._port = await Port.attach(self._uart, self._heard, self._look.set, self._room)
            self._apply_frame()
            self._apply_signals()

    def _detach(self) -> None:
        if self._port is not None:
            self._port.close()
            self._port = None

    async def _drop(self) -> None:
        self._detach()
        await asyncio.to_thread(self._let_go)

    def _heard(self, data: bytes) -> None:
        if self.listener is not None:
            self.listener.heard(data)

    def _room(self) -> None:
        if self.listener is not None:
            self.listener.room()

    def _take(self) -> None:
        """Open port and lines, both idle. Blocking. Nothing stays open on failure."""
        try:
            look(self.config.port)
        except PortGone:
            self._tries = 0  # What comes is another one.
            raise
        self._tries += 1
        uart = Uart.open(self.config.port)
        lines: wires.Lines | None = None
        try:
            # First: Linux raised DTR and RTS, and whatever fails afterwards must not leave a target held in reset by them.
            lines = open_lines(self.config.lines, uart, f"bridged:{self.name}")
            uart.set_format(self.config.application.baud, self.config.application.parity)
        except BaseException:
            if lines is not None:
                lines.close()
            uart.close()
            raise
        self._uart, self._lines, self._tries = uart, lines, 0

    def _let_go(self) -> None:
        for part in (self._lines, self._uart):
            if part is not None:
                with contextlib.suppress(OSError, LinkError):
                    part.close()
        self._lines = self._uart = None

    def _lost(self) -> str:
        """What of the port and the lines that were taken is no more, in words; empty: nothing."""
        vanished = f"{self.config.port} vanished"
        if self._uart is None:
            return "" if os.path.exists(self.config.port) else vanished
        try:
            if os.stat(self.config.port).st_rdev != os.fstat(self._uart.fd).st_rdev:
                return vanished
            # A device that hung up is readable, and its bytes are not ours to take.
            self._uart.wait_readable(0)
        except (OSError, LinkError):
            return vanished
        if self._port is not None and not self._port.alive:
            return vanished
        return self._lines.gone() if self._lines is not None else ""

    async def _set(self, state: str, reason: str) -> None:
        async with self._changed:
            self.state, self.reason = state, reason
            self._changed.notify_all()
        self._tell()

    def _tell(self) -> None:
        self._on_change()
        if self.listener is not None:
            self.listener.changed()

    async def wait_present(self) -> None:
        """Until the device is there (or the target broken)."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.state != "absent")

    async def wait_idle_hardware(self, timeout_s: float) -> bool:
        """After a restart: until port and lines could be taken, which an old session process may still hold."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.wait_present()
        except TimeoutError:
            return False
        return self.state == "idle"

    async def release_after(self, hazard_s: float, empty: str = "", *, erased: bool = False) -> None:
        """Bring a target that an interrupted session left back to its application, after ``hazard_s``.

        ``empty``: the chip, where its flash was empty before that session and it may therefore be in its loader again after the
        reset (AN2606); a session starts it then as after a flash. ``erased``: its job had begun to erase; where nothing but the
        application leads into the loader it is not reset then, for nobody would reach it any more (P10).

        Raises ``LineUnavailable``, and the target is marked broken then; ``PortGone`` where the port has vanished or somebody
        else has it: the target is absent, and the release is owed still.
        """
        await asyncio.sleep(hazard_s)
        async with self._wired():
            try:
                await self._open_shared()
                if self._lines is None:
                    raise PortGone(f"target {self.name}: {self.reason}")
                await self._back_to_application(erased=erased)
                self.unreleased = False
                if empty:
                    await self._start_empty(empty)
            except LinkError as error:
                # What could not be had is not what could not be driven: it is tried again when the port is back.
                if isinstance(error, PortGone | PortBusy) or self._lost():
                    await self._gone(error.message)
                    said = f"{self.config.port} could not be had while the target was released: {error.message}"
                    raise PortGone(said) from error
                await self._set("broken", f"after an interrupted session: {error.message}")
                raise

    async def _start_empty(self, chip: str) -> None:
        """Lines are idle by now, so nothing that goes wrong here makes the release undone."""
        assert self._lines is not None
        request = replace(request_of(self.config, self._lines, "reset", {}), chip=chip)
        await self._set("busy", "started after an interrupted session")
        try:
            await self._run(request, None, b"", lambda _event: None, lambda _done: None, None)
        except BridgedError as error:
            log.warning("target %s may be in its loader still: %s", self.name, error.message)
        finally:
            if self.state == "busy":
                self._give_back()
                await self._set("idle", "")

    async def _open_shared(self) -> None:
        if self._shared and self._uart is None:
            await asyncio.to_thread(self._take)

    @contextlib.asynccontextmanager
    async def _wired(self) -> AsyncIterator[None]:
        """Alone with shared wires; they are given back at the end."""
        if not self._shared:
            yield
            return
        async with self.wires:
            try:
                yield
            finally:
                await self._drop()

    async def _back_to_application(self, *, erased: bool) -> None:
        assert self._lines is not None
        assert self._uart is not None
        with contextlib.suppress(LinkError):
            self._uart.set_format(self.config.application.baud, self.config.application.parity)
        if erased and self.config.application.enter and not (self._lines.has_boot0 or self._lines.boot0_by_hand):
            await asyncio.to_thread(self._lines.idle)
            return
        trouble: LinkError | None = None
        for step in wiring_of(self.config.lines, self._lines).leave:
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                continue
            try:
                await asyncio.to_thread(self._move, step)
            except LinkError as error:  # One line must not keep the others from going idle.
                trouble = trouble or error
        if trouble is not None:
            raise trouble

    def _move(self, step: SetLines) -> None:
        assert self._lines is not None
        assert self._uart is not None
        if step.reset is False or step.power:
            # What is there yet was said to a dead session, by the loader: the console is to begin with the application.
            with contextlib.suppress(LinkError):
                self._uart.flush_input()
        self._lines.set(reset=step.reset, boot0=step.boot0, power=step.power)

    # --- the console's side ---------------------------------------------------------------------------------------

    @property
    def talkable(self) -> bool:
        """Whether the console has the port now."""
        return self._port is not None and self.state == "idle"

    @property
    def congested(self) -> bool:
        return self._port is not None and self._port.full

    def write(self, data: bytes) -> bool:
        """What a console writer says; whether it was taken."""
        return self._port is not None and self.state == "idle" and self._port.write(data)

    def purge_output(self) -> None:
        """Throw away what was written and is not on the wire yet."""
        if self.talkable and self._port is not None:
            with contextlib.suppress(LinkError):
                self._port.discard_output()

    def set_frame(self, frame: Frame | None) -> None:
        """How the console speaks from now on; None: as configured. Without a port it is remembered until there is one.

        Raises ``BaudUnavailable``, ``ParityUnavailable`` or another ``LinkError``; the frame stays as it was then. With
        RTS/CTS the driver moves RTS by itself: never where that is NRST, BOOT0 or the power.
        """
        if frame is not None and frame.flow == "rts" and (taken := self._taken_by_lines() & {"rts", "cts"}):
            raise LineUnavailable(
                f"RTS/CTS flow control of {self.config.port}: {' and '.join(sorted(taken)).upper()} is a line of the target",
                path=self.config.port,
            )
        before = self.frame
        self.frame = frame or Frame(self.config.application.baud, self.config.application.parity)
        try:
            if self.talkable and self.frame != before:
                self._set_uart(self.frame)
        except LinkError:
            self.frame = before
            with contextlib.suppress(LinkError):
                self._set_uart(before)
            raise

    def _set_uart(self, frame: Frame) -> None:
        assert self._uart is not None
        self._uart.set_format(frame.baud, frame.parity, frame.stop_bits, frame.data_bits, frame.flow)

    def _apply_frame(self) -> None:
        """The port as the console believes it to be, whatever had it before: a session that ended in the loader leaves the
        loader's format. What was set meanwhile and cannot be done is told, and it is as configured again."""
        configured = Frame(self.config.application.baud, self.config.application.parity)
        try:
            self._set_uart(self.frame)
        except LinkError as error:
            if isinstance(error, PortGone):
                return  # The keeper finds out; the frame is for the one that comes.
            log.warning("target %s: what the console had set is not in force: %s", self.name, error.message)
            if self.frame != configured:
                self.frame = configured
                with contextlib.suppress(LinkError):
                    self._set_uart(configured)
            if self.listener is not None:
                self.listener.told(f"the format is as configured again: {error.message}")

    def _give_back(self) -> None:
        """After a session: the console has the port again."""
        if self._port is not None:
            self._apply_frame()
            self._apply_signals()
            self._port.resume()

    def wired_signals(self) -> frozenset[str]:
        """Which of dtr and rts drive NRST, BOOT0 or the power."""
        return self._taken_by_lines() & {"dtr", "rts"}

    def _taken_by_lines(self) -> frozenset[str]:
        lines = self.config.lines
        if lines.kind != "modem":
            return frozenset()
        return frozenset(getattr(lines, line.pin).removeprefix("!") for line in (*wires.wired(lines), *wires.inputs(lines)))

    def asserted(self, name: str) -> bool:
        """Whether DTR or RTS is asserted, or will be once the console has the port. Linux raises both at open."""
        return self._signals.get(name, True)

    def set_signal(self, name: str, asserted: bool) -> None:
        """DTR or RTS for a console writer; who may is the caller's business. It is remembered while a session has the port, or
        there is none."""
        self._signals[name] = asserted
        if self.talkable and self._uart is not None:
            with contextlib.suppress(LinkError):  # A port without modem lines, as most on-chip UARTs.
                self._uart.set_modem(dtr=asserted if name == "dtr" else None, rts=asserted if name == "rts" else None)

    def restore_signals(self) -> None:
        """DTR and RTS as they were before a console writer moved them: lines of the target idle, the others asserted."""
        self._signals.clear()
        self._signals_due = not self.talkable
        if self.talkable and self._lines is not None:
            with contextlib.suppress(LinkError):
                if self.wired_signals():
                    self._lines.idle()
                self._put_signals()

    def _apply_signals(self) -> None:
        """After a session, or the opening. Lines of the target are idle then and stay it (P4), however a client held them."""
        for name in self.wired_signals():
            self._signals.pop(name, None)
        if self._signals or self._signals_due:
            self._signals_due = False
            with contextlib.suppress(LinkError):
                self._put_signals()

    def _put_signals(self) -> None:
        assert self._uart is not None
        wired = self.wired_signals()
        dtr, rts = (None if name in wired else self.asserted(name) for name in ("dtr", "rts"))
        self._uart.set_modem(dtr=dtr, rts=rts)

    def set_break(self, active: bool) -> None:
        if self.talkable and self._uart is not None:
            with contextlib.suppress(LinkError):
                self._uart.set_break(active)

    def modem(self) -> frozenset[str]:
        """Which of cts, dsr, ri and cd are asserted, as far as the console can know."""
        if self.talkable and self._uart is not None:
            with contextlib.suppress(LinkError):
                return self._uart.modem()
        return frozenset()

    def counters(self) -> Counters | None:
        """The kernel's counters of the port; None where there is no port, or none is counted."""
        if self._uart is not None:
            with contextlib.suppress(LinkError):
                return self._uart.counters()
        return None

    def keeps_from(self, principal: str) -> bool:
        """Whether a lock keeps new jobs of ``principal`` waiting."""
        return self.leases.keeps_from(principal)

    async def wait_free(self, principal: str) -> None:
        """Until no lock of another keeps jobs of ``principal`` away."""
        while (lock := self.leases.lock) is not None and self.leases.keeps_from(principal):
            async with self._changed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.01, lock.until - time.monotonic())):
                        await self._changed.wait()

    async def lease_changed(self) -> None:
        """Somebody locked or unlocked it: whoever waits looks again."""
        async with self._changed:
            self._changed.notify_all()
        self._tell()

    # --- sessions -------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Ask the running session to end at its next checkpoint: ``run`` raises ``Canceled``."""
        self._ask("cancel")

    def stop(self) -> None:
        """The same for a stop of the daemon: ``run`` raises ``Stopped``."""
        self._ask("stop")

    def _ask(self, what: str) -> None:
        if self._session is not None:
            self._session.ask(what)
        elif self.leases.job is not None:
            self._asked = what  # It is being started; it hears this as the first thing.

    @property
    def session_pid(self) -> int | None:
        return self._session.pid if self._session is not None else None

    async def run(
        self,
        kind: str,
        params: dict[str, Any],
        image: Image | None,
        *,
        job_id: str,
        kept: bytes = b"",
        proven: tuple[SectorProven, ...] = (),
        spans: tuple[Span, ...] = (),
        past: Past = NO_PAST,
        on_event: Callable[[Event], None] = lambda _event: None,
        on_progress: Callable[[int], None] = lambda _done: None,
        on_barrier: Barrier | None = None,
    ) -> dict[str, Any]:
        """Run one session and return ``Result.to_dict()``, with ``uart_errors`` (what the kernel counted), ``uart_bytes``
        (in both directions), ``turnaround_us`` (median from a short frame to its ACK), ``cost`` (the session's CPU time and the
        most memory that it had, shared pages included) and, for kind read, ``data`` (bytes).

        ``on_barrier(state, hazard_s, kept)`` must not return before the state is on disk; what it raises ends the session.
        Raises what the session raised; ``SessionDied`` or ``DeadlineExceeded`` after the target was released.
        """
        if self.state == "broken":
            raise TargetBroken(f"target {self.name} is marked broken: {self.reason}", target=self.name)
        if self.leases.job is not None or self.state == "busy":
            holder = self.leases.job.holder if self.leases.job else "another session"
            raise TargetBusy(f"target {self.name} is held by {holder}", target=self.name, holder=holder)
        if self.state == "absent":
            raise PortGone(f"target {self.name}: {self.reason}", target=self.name, port=self.config.port)
        self.leases.begin_job(job_id)
        try:
            await self._set("busy", f"job {job_id}")
            on_event(PhaseStarted(Phase.LOCK))
            async with self._wired():
                await self._open_shared()
                assert self._lines is not None
                request = request_of(self.config, self._lines, kind, params, proven, spans, past)
                return await self._run(request, image, kept, on_event, on_progress, on_barrier)
        finally:
            self._asked = ""
            self.leases.end_job()
            if self.state == "busy":
                if lost := self._lost():
                    await self._gone(lost)
                else:
                    self._give_back()
                    await self._set("idle", "")

    async def _run(
        self,
        request: Request,
        image: Image | None,
        kept: bytes,
        on_event: Callable[[Event], None],
        on_progress: Callable[[int], None],
        on_barrier: Barrier | None,
    ) -> dict[str, Any]:
        assert self._uart is not None
        assert self._lines is not None
        if self._port is not None:
            self._port.pause()
        self._uart.set_break(False)
        self._uart.discard_output()
        before = self._uart.counters()
        session = self._new_session(request, on_event, on_progress, on_barrier)
        self._session = session
        if self._asked:
            session.ask(self._asked)
        try:
            await session.run(image, kept)
            # Between here and the next statement nothing may be awaited that can be cancelled: the target must be released.
            outcome = session.board.result()
            self.last_trace = session.board.trace()
            if outcome is None:
                await self._after_death(session)
                if session.past_deadline:
                    raise DeadlineExceeded(f"the session was ended after {session.limit_s:.0f} s", limit_s=session.limit_s)
                raise SessionDied(f"the session process ended with {session.ending} and left no result", ending=session.ending)
            if session.board.lines_failed:
                await self._after_death(session)
            elif self._lost():
                await self._idle(session)
            errors = self._uart_errors(before)
            if "error" in outcome:
                error = from_dict(outcome["error"])
                if isinstance(error, TargetError) and (counted := _counted(errors)):
                    error = type(error)(f"{error.message}; the kernel counted {counted}", **error.facts)
                error.facts.update({f"uart_{name}_errors": count for name, count in errors.items() if count})
                if isinstance(error, LinkError) and not isinstance(error, PortGone) and (lost := self._lost()):
                    # A line box or GPIO chip on the adapter may have noticed first that it was unplugged.
                    raise PortGone(f"{lost}: {error.message}", **error.facts) from error
                raise error
            result: dict[str, Any] = {**outcome["result"], "uart_errors": errors, "uart_bytes": outcome["uart_bytes"]}
            result |= {name: outcome[name] for name in ("turnaround_us", "cost")}
            if outcome["data_bytes"]:
                result["data"] = os.pread(session.out, int(outcome["data_bytes"]), 0)
            return result
        finally:
            self._session = None
            session.close()

    def _new_session(
        self,
        request: Request,
        on_event: Callable[[Event], None],
        on_progress: Callable[[int], None],
        on_barrier: Barrier | None,
    ) -> Session:
        """Where tests put one in virtual time in the place of the process."""
        assert self._uart is not None
        assert self._lines is not None
        return Session(self._uart, self._lines, request, on_event, on_progress, on_barrier, self._heard)

    def _uart_errors(self, before: Counters | None) -> dict[str, int]:
        """What the kernel counted on the port during the session; empty where the driver does not count (a pty)."""
        assert self._uart is not None
        with contextlib.suppress(LinkError):
            after = self._uart.counters()
            if before is not None and after is not None:
                new = after - before
                return {"frame": new.frame, "parity": new.parity, "overrun": new.overrun + new.buf_overrun, "brk": new.brk}
        return {}

    async def _idle(self, session: Session) -> None:
        """The port is gone, its lines may live: whatever the session did, nothing is held in reset until it is back (P4)."""
        assert self._lines is not None
        await asyncio.sleep(session.board.hazard_left_s)
        with contextlib.suppress(LinkError):
            await asyncio.to_thread(self._lines.idle)

    async def _after_death(self, session: Session) -> None:
        """P9, then P4, by the daemon, which has the same descriptors."""
        await asyncio.sleep(session.board.hazard_left_s)
        try:
            await self._back_to_application(erased=session.erased)
        except LinkError as error:
            if isinstance(error, PortGone) or self._lost():
                self.unreleased = True  # The keeper finds out; the lines went with the port, the target stays in its loader.
            else:
                await self._set("broken", f"the lines could not be brought back to idle: {error.message}")


def _counted(errors: Mapping[str, int]) -> str:
    """What the kernel's counters say about a session that failed, in words; empty where they say nothing."""
    reasons = {"frame": "the other end has another rate, or the line is noisy", "parity": "it has another parity, or noise"}
    counts = [f"{count} {name} errors ({reasons[name]})" for name, count in errors.items() if name in reasons and count]
    lost = [f"{count} bytes lost to overruns" for name, count in errors.items() if name == "overrun" and count]
    return ", ".join(counts + lost)
