"""The session process: runs one session over a real UART and real lines, and ends.

It inherits everything: the open UART, the control lines, the image in a sealed memfd, the board. No step of the dialogue waits
for the daemon, with one exception: before what destroys something new it waits for the journal (``Barrier``).

- It ends in order when its control socket closes (the daemon is gone): the current command is finished, the target released.
  SIGTERM, SIGINT and SIGABRT are ignored; systemd sends them to the whole group (SIGABRT when the watchdog runs out), and
  half a command would leave a deaf loader.
- Events go over the control socket, which never blocks: what does not fit waits in memory. Progress, result and recorder are on
  the board, readable after a SIGKILL.
- Small: standard library, protocol, chips, images and this room; no asyncio. The garbage collector is off (a session is short).

One blocking driver (``Driver``) carries out the steps of ``protocol.flow``; ``sim.virtual`` is its twin in virtual time.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, TypeVar

from bridged.errors import BridgedError, Canceled, Stopped, from_dict
from bridged.events import Event, PhaseStarted, StepDone, encode
from bridged.images.memfd import map_sealed
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
from bridged.protocol.recording import DONE, JOURNALED, counters_note, note_of, one_line
from bridged.target import lines, session
from bridged.target.board import NOTE, RECEIVED, Board
from bridged.target.request import Request
from bridged.target.uart import Counters, Uart

T = TypeVar("T")

BARRIER_LIMIT_S = 120.0  # An SD card can take seconds for a sync; minutes mean that the daemon hangs.
WRITE_LIMIT_S = 5.0  # For one frame into the kernel; 262 bytes at 1200 baud take 2.4 s. More means a port that is gone.
RECORD_AFTER_S = 0.002
RECORD_AT_MOST = 60  # Entries, each a frame or an answer.
SHORT_FRAME_BYTES = 5  # An opcode or an address: what is answered at once.
TURNAROUNDS = 4096  # The last ones are kept.
TOLD_TURNAROUNDS = 50  # Of a session, for the histogram.
AWAKE_BYTES = 8  # Of the end of a long answer.
AWAKE_S = 0.0002
ASLEEP_MOST_BYTES = 1024  # The kernel keeps 4095 for us.
HEARD_S = 0.03  # About one block at 115200 baud.
RT_PRIORITY = 10
MCL_CURRENT, MCL_ONFAULT = 1, 4  # mman.h, the same numbers on aarch64, armv7 and x86-64
LOCK_SPARE_BYTES = 16 << 20  # Of the limit for locked memory, for a stack that grows: 8 MiB at most, as a rule.
RT_LIMIT_US = 5_000_000  # CPU without a sleep at real-time priority; beyond it the kernel ends the process, not the gateway.


@dataclass(frozen=True, slots=True)
class Spec:
    """What the daemon tells a new session process, as JSON in a memfd: descriptors by number, and the request."""

    control: int
    board: int
    out: int
    uart: int
    uart_path: str
    uart_is_pty: bool
    lines: dict[str, Any]
    line_fds: list[int]
    image: int
    kept: int
    request: dict[str, Any]


class Control:
    """The socket to the daemon (SOCK_SEQPACKET): events up, ``cancel``, ``stop`` and answers to barriers down.

    ``fd``: its descriptor, which stays the caller's. read() and write() take and give whole packets; the module ``socket``
    would be a thirtieth of a session's memory, and of its start.
    """

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._heard = select.poll()
        self._heard.register(fd, select.POLLIN)
        self._waiting: deque[bytes] = deque()
        self._asked: BridgedError | None = None
        self._answer: dict[str, Any] | None = None
        self._gone = False
        self._polled = 0.0

    def tell(self, message: dict[str, Any]) -> None:
        self._waiting.append(json.dumps(message, separators=(",", ":")).encode())
        self.flush()

    def flush(self) -> None:
        while self._waiting and not self._gone:
            try:
                os.write(self._fd, self._waiting[0])
            except BlockingIOError:
                return
            except OSError:
                self._gone = True
                return
            self._waiting.popleft()

    def poll(self) -> None:
        """Take what the daemon said; its end counts as a stop."""
        self._polled = time.monotonic()
        # Asked first, since that nothing came is the rule, and an exception costs more than all the rest of a checkpoint.
        while not self._gone and self._heard.poll(0):
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self._gone = True
                break
            message = json.loads(data)
            if message.get("do") == "cancel":
                self._asked = Canceled("the job was canceled")
            elif message.get("do") == "stop":
                self._asked = Stopped("the daemon is stopping")
            else:
                self._answer = message
        if self._gone and self._asked is None:
            self._asked = Stopped("the daemon is gone")

    def checkpoint(self) -> None:
        """Raises what was asked for, once: the way back to the application must not be interrupted by it.

        What the daemon said before it answered a barrier was heard with the answer; else it may be ``HEARD_S`` old.
        """
        if self._waiting:
            self.flush()
        if time.monotonic() - self._polled > HEARD_S:
            self.poll()
        asked, self._asked = self._asked, None
        if asked is not None:
            raise asked

    def ask(self, message: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Send ``message`` and wait for the answer. Raises ``Stopped`` when the daemon is gone or silent."""
        self._answer = None
        self.tell(message)
        deadline = time.monotonic() + limit_s
        while self._answer is None:
            left = deadline - time.monotonic()
            if self._gone or left <= 0:
                raise Stopped("the daemon did not confirm that the journal is on disk", state=str(message.get("barrier")))
            if self._ready(select.POLLIN | (select.POLLOUT if self._waiting else 0), min(left, 1.0)) & ~select.POLLOUT:
                self.poll()
            self.flush()
        return self._answer

    def finish(self, limit_s: float) -> None:
        """Give the last events a chance, bounded: the result is on the board in any case."""
        deadline = time.monotonic() + limit_s
        while self._waiting and not self._gone and time.monotonic() < deadline:
            self._ready(select.POLLOUT, 0.1)
            self.flush()

    def _ready(self, events: int, timeout_s: float) -> int:
        """Which of ``events`` there are, after ``timeout_s`` at most.

        Not select(): it cannot take a descriptor beyond 1023, and a daemon with a thousand clients hands those over.
        """
        poller = select.poll()
        poller.register(self._fd, events)
        return sum(found for _, found in poller.poll(timeout_s * 1000))


class Driver:
    """Carries out the steps of a flow on a UART and lines; see ``protocol.flow`` for what each step promises."""

    def __init__(self, uart: Uart, wires: lines.Lines, board: Board, control: Control, out_fd: int) -> None:
        self._uart, self._wires, self._board, self._control, self._out = uart, wires, board, control, out_fd
        self.bytes_out = self.bytes_in = 0
        self._sent_until = 0.0
        self._frame_s = 11 / 115200
        # What was done, sent and received, and is not on the board yet: see ``_record``.
        self._done: int | None = None
        self._unrecorded: list[tuple[Send | bytes, float]] = []
        # Seconds from the last bit of a short frame to its ACK: what adapter, driver and loader add to every stage.
        self.turnarounds: deque[float] = deque(maxlen=TURNAROUNDS)
        self._levels: dict[str, bool] = {}
        self._do: dict[type[Any], Any] = {
            Send: self._send,
            Receive: self._receive,
            Drain: self._drain,
            Pause: self._pause,
            SetLines: self._set_lines,
            ReadLine: self._read_line,
            SetFormat: self._set_format,
            Report: self._report,
            Progress: self._progress,
            Overheard: self._overheard,
            Checkpoint: lambda _step: self._control.checkpoint(),
            Barrier: self._barrier,
            Hazard: self._hazard,
            Now: lambda _step: time.monotonic(),
        }

    def run(self, flow: Flow[T]) -> T:
        """Run ``flow`` to its end and return its value, or raise what it raises. Errors of a step are thrown into it, also
        those that nobody foresaw: only the flow can release the target."""
        try:
            step: Step = next(flow)
            while True:
                try:
                    answer = self._do[type(step)](step)
                except Exception as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as end:
            value: T = end.value
            return value
        finally:
            self._record()

    def _send(self, step: Send) -> None:
        began = time.monotonic()
        try:
            self._uart.write_all(step.data, WRITE_LIMIT_S)
        finally:
            self._unrecorded.append((step, began))
        if len(self._unrecorded) > RECORD_AT_MOST:
            self._record()
        self.bytes_out += len(step.data)
        # write() returns when the kernel has the bytes; the answer cannot come before they were on the wire.
        self._sent_until = max(self._sent_until, began) + len(step.data) * self._frame_s

    def _receive(self, step: Receive) -> bytes:
        count = step.count
        now = time.monotonic()
        deadline = max(self._sent_until, now) + step.timeout_s
        uart = self._uart
        # Without a look first: nothing is there yet, as a rule, and the look would cost a call and an exception.
        got = uart.receive(count, min(deadline - now, RECORD_AFTER_S))
        if len(got) < count:
            got = self._rest(got, count, deadline)
        now = time.monotonic()
        if got:
            # An answer proves that all was sent, also on a pty that is faster than its baud rate. Where that need not hold (a
            # window of frames, XMODEM) the flow has deadlines of its own.
            self._sent_until = 0.0
        self.bytes_in += len(got)
        self._unrecorded.append((got, now))
        return got

    def _rest(self, got: bytes, count: int, deadline: float) -> bytes:
        """The rest of an answer that is not there at once, of which ``got`` is."""
        began = time.monotonic()
        self._record()
        if got:
            # It takes its time on the wire, whatever we do, and waking for every few bytes would cost a Pi Zero half its
            # CPU. The last bytes are waited for awake, so that what comes next is not late.
            asleep_s = (min(count - len(got), ASLEEP_MOST_BYTES) - AWAKE_BYTES) * self._frame_s - (time.monotonic() - began)
            if asleep_s > AWAKE_S:
                time.sleep(min(asleep_s - AWAKE_S, max(0, deadline - began)))
        while len(got) < count:
            left_s = deadline - time.monotonic()
            piece = self._uart.receive(count - len(got), left_s)
            if not piece and left_s <= 0:
                break
            got = got + piece if got else piece
        return got

    def _record(self) -> None:
        """Bring the board up to date, and hear what the daemon says.

        Not between an answer and the next frame, where every microsecond is added to the time of the job, but while a long
        answer comes in, in a wait of more than ``RECORD_AFTER_S``, and before every step that is no exchange.
        """
        sent: tuple[int, float] | None = None
        for what, at in self._unrecorded:
            if not isinstance(what, bytes):
                sent = len(what.data), at
            elif sent and len(what) == 1 and sent[0] <= SHORT_FRAME_BYTES:
                self.turnarounds.append(max(0.0, at - sent[1] - (sent[0] + 1) * self._frame_s))
                sent = None
            if isinstance(what, bytes):
                self._board.record(RECEIVED, what, at)
            else:
                self._board.record_sent(what, at)
        self._unrecorded.clear()
        if self._done is not None:
            self._board.set_progress(self._done)
            self._done = None
        self._control.poll()

    def _progress(self, step: Progress) -> None:
        self._done = step.done

    def _overheard(self, step: Overheard) -> None:
        self._control.tell({"heard": step.data.decode("latin-1")})

    def note(self, text: str) -> None:
        """Put what is no exchange on the recorder, in the words of ``protocol.recording``."""
        self._record()
        self._board.record(NOTE, text.encode())

    def _drain(self, step: Drain) -> bytes:
        self._record()
        parts = bytearray()
        now = time.monotonic()
        deadline = now + step.limit_s
        while now < deadline and len(parts) < DRAIN_BYTES:
            if not self._uart.wait_readable(min(step.quiet_s, deadline - now)):
                break
            parts += self._uart.read(DRAIN_BYTES - len(parts))
            now = time.monotonic()
        self.bytes_in += len(parts)
        self._board.record(RECEIVED, bytes(parts))
        return bytes(parts)

    def _pause(self, step: Pause) -> None:
        self._record()
        time.sleep(step.seconds)

    def _set_lines(self, step: SetLines) -> None:
        """Move lines, but not before the end of a hazard: whoever asks, the flash is still at work (P9)."""
        left = self._board.hazard_left_s
        if left:
            self.note(f"waiting {left:.3f} s for the end of the hazard")
            time.sleep(left)
            self._board.set_hazard(0)
        self.note(note_of(step))
        try:
            self._wires.set(reset=step.reset, boot0=step.boot0, power=step.power)
        except Exception:  # LineUnavailable; PortGone where DTR and RTS went with the port.
            self._board.set_lines_failed()
            raise

    def _read_line(self, step: ReadLine) -> bool:
        active = self._wires.active(lines.Line(step.line))
        if self._levels.get(step.line) is not active:  # It is asked again and again until it is as it should be.
            self._levels[step.line] = active
            self.note(f"line {step.line} is {'active' if active else 'inactive'}")
        return active

    def _set_format(self, step: SetFormat) -> None:
        self.note(note_of(step))
        self._uart.set_format(step.baud, step.parity, step.stop_bits)
        self._frame_s = (10 + (step.parity != "N")) / step.baud

    def _report(self, step: Report) -> None:
        self.tell(step.event)

    def tell(self, event: Event) -> None:
        if isinstance(event, PhaseStarted):
            self._board.set_progress(0)
            self._done = None
        if text := note_of(event):
            self.note(text)
        self._control.tell(encode(event))

    @property
    def turnaround_us(self) -> int:
        """The median; 0 where no short frame was answered."""
        found = sorted(self.turnarounds)
        return round(found[len(found) // 2] * 1e6) if found else 0

    def tell_turnarounds(self) -> None:
        """A few of all, from the fastest to the slowest, so that the daemon's histogram has their distribution."""
        found = sorted(self.turnarounds)
        for seconds in found[:: max(1, -(-len(found) // TOLD_TURNAROUNDS))]:
            self.tell(StepDone("ack", seconds))

    def _barrier(self, step: Barrier) -> None:
        self.note(note_of(step))
        if step.kept:
            os.ftruncate(self._out, 0)
            os.pwrite(self._out, step.kept, 0)
        message = {"barrier": step.state, "hazard_s": step.hazard_s, "kept_bytes": len(step.kept)}
        answer = self._control.ask(message, BARRIER_LIMIT_S)
        if "error" in answer:
            raise from_dict(answer["error"])
        self.note(f"{JOURNALED} {step.state}")

    def _hazard(self, step: Hazard) -> None:
        self._board.set_hazard(time.monotonic() + step.seconds if step.seconds else 0)
        self.note(note_of(step))


def main(argv: list[str]) -> int:
    """``argv``: the number of the descriptor with the ``Spec``."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGQUIT, signal.SIGABRT):
        signal.signal(number, signal.SIG_IGN)
    gc.disable()
    _prefer()
    spec_fd = int(argv[0])
    spec = Spec(**json.loads(os.pread(spec_fd, os.fstat(spec_fd).st_size, 0)))
    board = Board.attach(spec.board)
    control = Control(spec.control)
    result: dict[str, Any] = {}
    driver: Driver | None = None
    counted: Counters | None = None
    ending = DONE
    try:
        uart = Uart.inherit(spec.uart, spec.uart_path, spec.uart_is_pty)
        wires = lines.inherit(spec.lines, spec.line_fds, uart)
        request = Request.from_dict(spec.request)
        image = map_sealed(spec.image) if spec.image >= 0 else None
        kept = os.pread(spec.kept, os.fstat(spec.kept).st_size, 0) if spec.kept >= 0 else b""
        driver = Driver(uart, wires, board, control, spec.out)
        driver.note(f"session {request.kind}")
        with contextlib.suppress(BridgedError):
            counted = uart.counters()
        done = driver.run(session.run(request, image, kept))
        if done.data:
            os.ftruncate(spec.out, 0)
            _write_whole(spec.out, done.data)
        result = {"result": done.to_dict(), "data_bytes": len(done.data)}
    except BridgedError as error:
        result = {"error": error.as_dict()}
        ending = one_line(f"{DONE} {error.code}: {error.message}")
    except Exception as error:  # A defect of ours ends its job and nothing else; the lines were released on the way.
        import traceback  # With what it needs a fifth of a MiB, for what should not happen.

        text = "".join(traceback.format_exception(error))
        sys.stderr.write(text)
        failure = BridgedError(f"{type(error).__name__}: {error}", traceback=text[-4000:])
        result = {"error": failure.as_dict()}
        ending = one_line(f"{DONE} {failure.code}: {failure.message}")
    if driver is not None:
        with contextlib.suppress(BridgedError):  # The port may be gone, and its counters with it.
            if counted is not None and (now := uart.counters()) is not None:
                new = now - counted
                lost = new.overrun + new.buf_overrun
                driver.note(counters_note(frame=new.frame, parity=new.parity, overrun=lost, breaks=new.brk))
        driver.tell_turnarounds()
        driver.note(ending)
        result |= {"uart_bytes": {"out": driver.bytes_out, "in": driver.bytes_in}, "turnaround_us": driver.turnaround_us}
        result["cost"] = _cost()
    board.set_result(result)
    control.finish(1.0)
    return 0


def _cost() -> dict[str, float]:
    """CPU time, and the most memory at once, shared pages included. Not ``ru_maxrss``, which begins with that of the daemon."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak_kib = 0
    with contextlib.suppress(OSError), open("/proc/self/status", "rb") as file:
        peak_kib = next((int(line.split()[1]) for line in file if line.startswith(b"VmHWM:")), 0)
    return {"cpu_s": round(used.ru_utime + used.ru_stime, 3), "memory_kib": peak_kib}


def _write_whole(fd: int, data: bytes) -> None:
    view, at = memoryview(data), 0
    while at < len(view):
        at += os.pwrite(fd, view[at:], at)


def _prefer() -> None:
    """Real-time scheduling and locked memory, where this process may; without them it only waits a little longer.

    No CPU of its own: the kernel moves a real-time process to one that is free, and would not be allowed to. Where the unit has
    ``CPUAffinity=``, it is inherited.
    """
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_RTTIME, (RT_LIMIT_US, RT_LIMIT_US))
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(RT_PRIORITY))
    with contextlib.suppress(OSError, ValueError, ImportError):
        _lock_memory()


def _lock_memory() -> None:
    """Keep what is touched in memory: a gateway that runs short drops code first, and reads it again from its SD card in the
    middle of the dialogue.

    Only what is mapped now, and only when it has been touched: nothing is loaded for it, and no later allocation can fail for
    want of the right to lock it. The limit is looked at first, because a locked stack that may not grow is a crash.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    with open("/proc/self/statm", "rb") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    if soft != resource.RLIM_INFINITY and mapped + LOCK_SPARE_BYTES > soft and os.geteuid():
        return
    import ctypes  # Costs a quarter of a MiB, so only who may lock loads it.

    ctypes.CDLL(None).mlockall(MCL_CURRENT | MCL_ONFAULT)  # A refusal changes nothing.


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
