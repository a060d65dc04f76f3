"""Virtual time: run any flow of ``protocol/flow.py`` against a simulated device, and account for every nanosecond.

Time advances only by what happens on the wire and in the device; the host itself costs nothing unless ``turnaround_ns`` says
so. A mass erase of 20 s takes microseconds of real time, and the numbers are exact: bytes, turnarounds, overruns, time in
each phase. ``VirtualUart`` is the port by itself, for tests of single exchanges; ``run`` drives a whole flow over it.

A ``PowerCut`` ends a run as SIGKILL or a power failure of the gateway would: the flow is closed, not resumed, and none of its
later steps is carried out. (A ``finally`` block of the flow runs up to the first step that it asks for, and ends there.) The
device stays as it is; what becomes of the lines then is up to the caller.

As in the session process, ``SetLines`` waits for the end of a hazard (P9). Whether waiting was right is judged by the device:
a line that moves while it really erases is a violation, whatever was declared. This module knows no loader command.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bridged.errors import BridgedError
from bridged.events import Event, Phase, PhaseStarted
from bridged.protocol.flow import (
    DRAIN_BYTES,
    Barrier,
    Checkpoint,
    Drain,
    Flow,
    Hazard,
    Now,
    Overheard,
    Pause,
    Progress,
    ReadLine,
    Receive,
    Report,
    Send,
    SetFormat,
    SetLines,
    Step,
)
from bridged.sim.device import Device
from bridged.sim.wire import Burst, Format, hear

T = TypeVar("T")

_CLOSE_LIMIT = 100


def ns(seconds: float) -> int:
    return round(seconds * 1e9)


class PowerCut(Exception):
    """The gateway died here. Raise it from a hook, or ask for it with ``cut_after_exchange``."""


@dataclass(slots=True)
class Counts:
    """One phase's share, or all. Times in ns. ``waited_ns``: the device worked or was silent; ``wire_ns``: both directions."""

    bytes_out: int = 0
    bytes_in: int = 0
    sends: int = 0
    turnarounds: int = 0
    wire_ns: int = 0
    paused_ns: int = 0
    host_ns: int = 0
    timeouts: int = 0
    total_ns: int = 0

    @property
    def waited_ns(self) -> int:
        return self.total_ns - self.wire_ns - self.paused_ns - self.host_ns


@dataclass(slots=True)
class Account:
    """What a run cost, and what it did wrong.

    ``turnarounds``: how often the direction changed from host to device and back. ``host_ns``: time that the host added;
    0 unless a turnaround latency is modelled. ``hazard_waits``: how long (s) lines had to wait for the end
    of a hazard, each time. ``violations``: lines that moved while the device was erasing or writing option bytes.
    """

    all: Counts = field(default_factory=Counts)
    phases: dict[Phase | None, Counts] = field(default_factory=dict)
    overruns: int = 0
    barriers: list[Barrier] = field(default_factory=list)
    hazards: list[tuple[int, float]] = field(default_factory=list)
    hazard_waits: list[float] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    events: list[tuple[int, Event]] = field(default_factory=list)
    checkpoints: int = 0
    phase: Phase | None = None
    overheard: list[bytes] = field(default_factory=list)

    def both(self) -> tuple[Counts, Counts]:
        counts = self.phases.get(self.phase)
        if counts is None:
            counts = self.phases[self.phase] = Counts()
        return self.all, counts

    @property
    def total_s(self) -> float:
        return self.all.total_ns / 1e9


class VirtualUart:
    """The host's serial port and its three lines, wired to ``device``.

    ``wire_parity``: what the port really sends whatever is asked for (a mini UART: ``N``). ``loopback``: TX and RX shorted.
    ``buffered``: ``send`` returns at once and the bytes go out while time passes, as behind a kernel; without it a flow sees
    nothing of what comes while it sends, which is quicker and the same wherever host and device take turns.
    """

    def __init__(
        self,
        device: Device,
        form: Format | None = None,
        *,
        account: Account | None = None,
        turnaround_ns: int = 0,
        wire_parity: str | None = None,
        loopback: bool = False,
        buffered: bool = False,
    ) -> None:
        self.device = device
        self.buffered = buffered
        self._outgoing: deque[tuple[int, int, Format]] = deque()  # Start, value and format of each byte.
        self._out_until_ns = 0  # When the last one of them is out.
        self._sent_until_ns = 0  # What the host believes of that: an answer proves it, as in the session process.
        self.account = account or Account()
        self.turnaround_ns = turnaround_ns
        self.wire_parity = wire_parity
        self.loopback = loopback
        self.now_ns = device.now_ns
        self.inbox = bytearray()
        self._awaiting = False
        self._overruns_before = device.stats.overruns
        self.format = Format(115200, "E")
        self.set_format(form or self.format)

    def set_format(self, form: Format) -> None:
        self._collect(self.now_ns)
        self.format = Format(form.baud, self.wire_parity or form.parity, form.stop_bits)

    def send(self, data: bytes) -> None:
        if not data:
            return
        if self.turnaround_ns:
            self._spend(self.now_ns + self.turnaround_ns, "host_ns")
        byte_ns = self.format.byte_ns
        length = len(data) * byte_ns
        for counts in self.account.both():
            counts.bytes_out += len(data)
            counts.sends += 1
            counts.wire_ns += length
        if self.buffered:
            start = max(self.now_ns, self._out_until_ns)
            self._outgoing.extend((start + n * byte_ns, value, self.format) for n, value in enumerate(data))
            self._out_until_ns = start + length
            self._sent_until_ns = max(self.now_ns, self._sent_until_ns) + length
        else:
            self.device.feed(data, self.now_ns, self.format)
            self._spend(self.now_ns + length)
        self._awaiting = True
        if self.loopback:
            self.inbox += data
        self.account.overruns = self.device.stats.overruns - self._overruns_before

    def receive(self, count: int, timeout_s: float) -> bytes:
        """Up to ``count`` bytes; the timeout runs from the end of the last transmission, or from now if that is over."""
        deadline = max(self.now_ns, self._sent_until_ns) + ns(timeout_s)
        if len(self.inbox) < count:
            self._collect(self.now_ns)
        while len(self.inbox) < count and self.now_ns < deadline:
            self._spend(self._next_ns(count - len(self.inbox), deadline))
        found = bytes(self.inbox[:count])
        del self.inbox[:count]
        self._sent_until_ns = 0 if found else self._sent_until_ns
        if len(found) < count:
            for counts in self.account.both():
                counts.timeouts += 1
        self._count_in(found)
        return found

    def drain(self, quiet_s: float, limit_s: float) -> bytes:
        end = self.now_ns + ns(limit_s)
        quiet_at = self.now_ns + ns(quiet_s)
        self._collect(self.now_ns)
        had = len(self.inbox)
        while self.now_ns < min(quiet_at, end) and len(self.inbox) < DRAIN_BYTES:
            self._spend(self._next_ns(1, min(quiet_at, end)))
            if len(self.inbox) > had:
                had = len(self.inbox)
                quiet_at = self.now_ns + ns(quiet_s)
        found = bytes(self.inbox[:DRAIN_BYTES])
        del self.inbox[:DRAIN_BYTES]
        self._count_in(found)
        return found

    def pause(self, seconds: float) -> None:
        self._spend(self.now_ns + ns(seconds), "paused_ns")

    def set_lines(self, *, reset: bool | None = None, boot0: bool | None = None, power: bool | None = None) -> None:
        self.device.set_lines(self.now_ns, nrst=None if reset is None else not reset, boot0=boot0, power=power)

    def level(self, name: str) -> bool:
        """A line that the target drives; high is active here."""
        self._collect(self.now_ns)
        return self.device.level(name)

    def _next_ns(self, count: int, limit_ns: int) -> int:
        """When something happens next: ``count`` bytes are there, or one of ours is out, which the device may answer."""
        when = self.device.arrival_ns(count, self.format)
        if self._outgoing:
            start, _, form = self._outgoing[0]
            when = start + form.byte_ns if when is None else min(when, start + form.byte_ns)
        return limit_ns if when is None else min(max(when, self.now_ns), limit_ns)

    def _count_in(self, found: bytes) -> None:
        if not found:
            return
        for counts in self.account.both():
            counts.bytes_in += len(found)
            counts.turnarounds += self._awaiting
        self._awaiting = False

    def _spend(self, until_ns: int, kind: str = "") -> None:
        spent = until_ns - self.now_ns
        self.now_ns = until_ns
        for counts in self.account.both():
            counts.total_ns += spent
            if kind:
                setattr(counts, kind, getattr(counts, kind) + spent)
        self._collect(until_ns)

    def _collect(self, until_ns: int) -> None:
        while self._outgoing and self._outgoing[0][0] + self._outgoing[0][2].byte_ns <= until_ns:
            start, value, form = self._outgoing.popleft()
            self.device.feed(bytes((value,)), start, form)
            self.account.overruns = self.device.stats.overruns - self._overruns_before
        for burst in self.device.collect(until_ns, self.format):
            if burst.format.agrees(self.format):
                self.inbox += burst.data
            else:
                self._hear(burst)
            for counts in self.account.both():
                counts.wire_ns += len(burst.data) * burst.byte_ns

    def _hear(self, burst: Burst) -> None:
        # Without INPCK a serial driver hands on bytes with a wrong parity or stop bit like any other.
        self.inbox += bytes(h.value for h in hear(burst, self.format))


def run(
    flow: Flow[T],
    device: Device | VirtualUart,
    *,
    account: Account | None = None,
    checkpoint: Callable[[Checkpoint], None] | None = None,
    barrier: Callable[[Barrier], None] | None = None,
    report: Callable[[Event], None] | None = None,
    progress: Callable[[int], None] | None = None,
    before: Callable[[int, Step], None] | None = None,
    cut_after_exchange: int | None = None,
) -> T:
    """Run ``flow`` to its end; its value, or the error that it raises.

    Hooks may raise: a ``BridgedError`` is thrown into the flow at that step, as the worker does with a cancel or a full disk;
    a ``PowerCut`` (or anything else) ends the run at once. ``before`` sees the number and the step before it is carried out.
    ``cut_after_exchange`` n: the power is cut when the flow wants to send its (n+1)-th frame.
    """
    uart = device if isinstance(device, VirtualUart) else VirtualUart(device, account=account)
    if account is not None:
        uart.account = account
    driver = _Driver(
        uart,
        checkpoint=checkpoint,
        barrier=barrier,
        report=report,
        progress=progress,
        cut_after_exchange=cut_after_exchange,
    )
    number = 0
    answer: Any = None
    error: BridgedError | None = None
    while True:
        try:
            step = flow.send(answer) if error is None else flow.throw(error)
        except StopIteration as stop:
            value: T = stop.value
            return value
        answer, error = None, None
        try:
            if before is not None:
                before(number, step)
            answer = driver.steps[type(step)](step)
        except BridgedError as raised:
            error = raised
        except BaseException:
            _abandon(flow)
            raise
        number += 1


def _abandon(flow: Generator[Step, Any, Any]) -> None:
    """Close a flow without carrying out any step that its ``finally`` blocks ask for, each at its first one."""
    for _ in range(_CLOSE_LIMIT):
        try:
            flow.close()
        except RuntimeError:  # it asked for a step instead of ending
            continue
        except Exception:
            return
        return


class _Driver:
    """Carries out one step; a method for each kind."""

    def __init__(
        self,
        uart: VirtualUart,
        *,
        checkpoint: Callable[[Checkpoint], None] | None,
        barrier: Callable[[Barrier], None] | None,
        report: Callable[[Event], None] | None,
        progress: Callable[[int], None] | None,
        cut_after_exchange: int | None,
    ) -> None:
        self.uart = uart
        self.account = uart.account
        self._checkpoint = checkpoint
        self._barrier = barrier
        self._report = report
        self._progress = progress
        self._sends_left = cut_after_exchange
        self._hazard_until_ns: int | None = None
        self.steps: dict[type[Any], Callable[[Any], Any]] = {
            Send: self.send,
            Receive: lambda s: uart.receive(s.count, s.timeout_s),
            Drain: lambda s: uart.drain(s.quiet_s, s.limit_s),
            Pause: lambda s: uart.pause(s.seconds),
            SetLines: self.set_lines,
            ReadLine: lambda s: uart.level(s.line),
            SetFormat: lambda s: uart.set_format(Format(s.baud, s.parity, s.stop_bits)),
            Report: self.report,
            Progress: self.progress,
            Overheard: lambda s: self.account.overheard.append(s.data),
            Checkpoint: self.checkpoint,
            Barrier: self.barrier,
            Hazard: self.hazard,
            Now: lambda _: uart.now_ns / 1e9,
        }

    def send(self, step: Send) -> None:
        if self._sends_left is not None:
            if self._sends_left == 0:
                raise PowerCut("the gateway lost power between two exchanges")
            self._sends_left -= 1
        self.uart.send(step.data)

    def set_lines(self, step: SetLines) -> None:
        until = self._hazard_until_ns
        if until is not None and self.uart.now_ns < until:
            left_s = (until - self.uart.now_ns) / 1e9
            self.account.hazard_waits.append(left_s)
            self.uart.pause(left_s)
        self._hazard_until_ns = None
        work = self.uart.device.hazard
        if work:
            self.account.violations.append(f"{step} at {self.uart.now_ns / 1e9:.6f} s during {work}")
        self.uart.set_lines(reset=step.reset, boot0=step.boot0, power=step.power)

    def hazard(self, step: Hazard) -> None:
        self.account.hazards.append((self.uart.now_ns, step.seconds))
        self._hazard_until_ns = self.uart.now_ns + ns(step.seconds) if step.seconds else None

    def report(self, step: Report) -> None:
        if isinstance(step.event, PhaseStarted):
            self.account.phase = step.event.phase
        self.account.events.append((self.uart.now_ns, step.event))
        if self._report is not None:
            self._report(step.event)

    def progress(self, step: Progress) -> None:
        if self._progress is not None:
            self._progress(step.done)

    def checkpoint(self, step: Checkpoint) -> None:
        self.account.checkpoints += 1
        if self._checkpoint is not None:
            self._checkpoint(step)

    def barrier(self, step: Barrier) -> None:
        self.account.barriers.append(step)
        if self._barrier is not None:
            self._barrier(step)
