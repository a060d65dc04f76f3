"""A serial port as the ROM loader needs it: raw, exclusive, non-blocking, and honest about what its driver really does.

Used by the daemon, which opens the port once and keeps it, and by the session process, which inherits the descriptor
(``Uart.inherit``); hence the standard library only, no ``asyncio``, no logging, no GPIO. It knows bytes, formats, modem
lines and error counters; it does not know AN3155, nor what DTR and RTS are wired to (``lines.py``).

Invariants:

- The descriptor stays O_NONBLOCK in every process (the flag is shared); waiting is ``poll``. VMIN is 1, so that an empty
  read means "hung up" and never "nothing yet".
- A format counts only after it was read back: the mini UART of a Raspberry Pi drops even parity without an error. A pty
  drops it too; there it is accepted, ``parity_real`` is False, and nobody may call it verified.
- Parity errors do not change bytes. INPCK stays off: with it a byte with wrong parity would arrive as 0x00, or vanish
  (IGNPAR), or PARMRK would make the count of bytes depend on their value. The intact byte is the better evidence (an
  application that prints at 8N1 stays readable), and the driver counts each error in either case: compare ``counters``.
- An exclusive port: TIOCEXCL stops further opens (not those of root; not on a pty), flock and a look at lock files (minicom,
  ser2net, pppd) find other careful programs, and a look through /proc those that opened it before us and lock nothing (getty,
  cat), as far as we may see them. The daemon, a user of its own, does not see what those of others have open: for that
  Linux wants CAP_SYS_PTRACE, which would let it look into every process; leases, which tell without, are for files only.
  `sudo bridged doctor` sees them.
- A device that is gone raises ``PortGone`` from whatever call meets it first.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import struct
import termios
import time
from array import array
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from typing import Any, NoReturn

from bridged.errors import (
    BaudUnavailable,
    LineUnavailable,
    LinkError,
    ParityUnavailable,
    PortBusy,
    PortForbidden,
    PortGone,
)
from bridged.target.holder import Holder, find_holder, first_alive, flock_pids, lock_file_holder

BAUD_TOLERANCE = 0.025  # A UART frame of 11 bits tolerates about 4.5 % in all; the target's clock needs its share.

# Linux uapi, asm-generic/ioctls.h and termbits.h: the same numbers on aarch64, armv7 and x86-64. `termios` lacks them.
_TCGETS2 = 0x802C542A
_TCSETS2 = 0x402C542B
_BOTHER = 0o010000
_CBAUD = 0o010017
_CIBAUD = _CBAUD << 16
_TERMIOS2 = struct.Struct("=4IB19s2I")
_TIOCGICOUNT = 0x545D
_ICOUNT_FORMAT = "=20i"  # cts dsr rng dcd rx tx frame overrun parity brk buf_overrun, 9 reserved
_ICOUNT_FIRST = 4
_TIOCSBRK, _TIOCCBRK = 0x5427, 0x5428
_SERIAL_STRUCT_BYTES = 128  # struct serial_struct is 72 bytes where `long` has 64 bits, 60 where it has 32.
_SERIAL_FLAGS_OFFSET = 16
_ASYNC_LOW_LATENCY = 1 << 13

_CMSPAR = 0o10000000000  # asm-generic/termbits.h; `termios` lacks it before Python 3.14
_FRAME_FLAGS = termios.CSIZE | termios.CSTOPB | termios.PARENB | termios.PARODD | _CMSPAR
_PARITY_FLAGS = {
    "N": 0,
    "E": termios.PARENB,
    "O": termios.PARENB | termios.PARODD,
    "M": termios.PARENB | _CMSPAR | termios.PARODD,
    "S": termios.PARENB | _CMSPAR,
}
_STOP_FLAGS = {1: 0, 2: termios.CSTOPB}
_SIZE_FLAGS = {5: termios.CS5, 6: termios.CS6, 7: termios.CS7, 8: termios.CS8}
_STANDARD_RATES: dict[int, int] = {
    int(name[1:]): value for name, value in vars(termios).items() if name[0] == "B" and name[1:].isdigit() and name != "B0"
}

_MODEM_INPUTS = {"cts": termios.TIOCM_CTS, "dsr": termios.TIOCM_DSR, "ri": termios.TIOCM_RI, "cd": termios.TIOCM_CD}

_GONE = frozenset({errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.EIO, errno.ENOTCONN, errno.ESHUTDOWN})
_PTY_MAJORS = range(128, 144)  # 128..135 Unix98 masters, 136..143 slaves (Documentation/admin-guide/devices.txt)
_LEGACY_PTY_MAJORS = (2, 3)
_PTMX = (5, 2)

_SYS_CHAR = "/sys/dev/char"
# Since Linux 6.5 a UART has two devices of the bus `serial-base` between itself and its tty.
_NOT_THE_DRIVER = frozenset({"port", "ctrl"})


def _ioctl(fd: int, request: int, argument: Any) -> int:
    """The one door to the driver's settings (a test puts a driver with bad habits behind it)."""
    result: int = fcntl.ioctl(fd, request, argument)
    return result


@dataclass(frozen=True, slots=True)
class Counters:
    """What the driver counted since it was loaded; ``after - before`` is what happened in between."""

    rx: int
    tx: int
    frame: int
    overrun: int
    parity: int
    brk: int
    buf_overrun: int

    def __sub__(self, before: Counters) -> Counters:
        return Counters(*((a - b) & 0xFFFFFFFF for a, b in zip(astuple(self), astuple(before), strict=True)))

    @property
    def errors(self) -> int:
        """Received characters that were damaged or lost."""
        return self.frame + self.overrun + self.parity + self.buf_overrun


@dataclass(frozen=True, slots=True)
class _Settings:
    """``struct termios2`` of the kernel."""

    iflag: int
    oflag: int
    cflag: int
    lflag: int
    line: int
    cc: bytes
    ispeed: int
    ospeed: int


class Uart:
    """One open serial port. Make it with ``Uart.open`` (the owner) or ``Uart.inherit`` (the session process)."""

    def __init__(self, fd: int, path: str, is_pty: bool, *, owned: bool) -> None:
        self.fd = fd
        self.path = path
        self.is_pty = is_pty
        self.low_latency = False
        self._owned = owned
        # One for all waits: making and registering one costs as much as the wait itself, 6,000 times in a flash of 256 KiB.
        self._readable = select.poll()
        if fd >= 0:  # Else it was made for what needs no port.
            self._readable.register(fd, select.POLLIN)

    # --- life ----------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str) -> Uart:
        """Open ``path`` for ourselves alone and make it raw; format and speed stay until ``set_format``.

        Linux raises DTR and RTS here, whatever we do; HUPCL is cleared so that closing does not drop them as well.
        Raises ``PortGone``, ``PortBusy``, ``PortForbidden``, or ``LinkError`` where it is no serial port.
        """
        try:
            # A look first: opening a device that is no tty can have effects (a watchdog starts to run).
            if not stat.S_ISCHR(os.stat(path).st_mode):
                raise LinkError(f"Opening {path}: a serial device was expected, this is none", path=path)
            fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise _open_error(path, error) from error
        uart = cls(fd, path, is_pty_device(os.fstat(fd).st_rdev), owned=True)
        try:
            uart._take()
        except BaseException:
            # Without TCOFLUSH: on a port that turned out to be another's, its bytes are not ours to discard.
            os.close(fd)
            raise
        return uart

    @classmethod
    def inherit(cls, fd: int, path: str, is_pty: bool) -> Uart:
        """The same open port in another process; nothing is changed, locks and settings came with the descriptor."""
        return cls(fd, path, is_pty, owned=False)

    def _take(self) -> None:
        rdev = os.fstat(self.fd).st_rdev
        # 1. Lock, before anything is changed: if the port is another's, its settings must not move.
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _busy(self.path, find_holder(rdev, at_least=2), "locked") from error
        try:
            # 2. Is it a serial port at all, and one that nothing in the kernel sits on?
            discipline = array("i", [0])
            _ioctl(self.fd, termios.TIOCGETD, discipline)
            if discipline[0] != 0:
                raise PortBusy(
                    f"Opening {self.path}: line discipline {discipline[0]} is attached to it (Bluetooth, SLIP, PPP …), "
                    "a plain serial port was expected",
                    path=self.path,
                    discipline=discipline[0],
                )
            # 3. Who opened it before us and does not flock? A simulator rightly keeps its pty open, so not there.
            if not self.is_pty:
                _refuse_held(self.path, rdev, at_least=2)
            # 4. Ours: exclusive, raw, at once.
            # Not on a pty: the flag outlives us where somebody keeps the other end's device open, as a simulator does.
            if not self.is_pty:
                _ioctl(self.fd, termios.TIOCEXCL, 0)
            self._put(_raw(self._get()))
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                raise LinkError(
                    f"Opening {self.path}: a serial port was expected, this device is none", path=self.path
                ) from error
            raise _open_error(self.path, error) from error
        self.low_latency = self._ask_low_latency()

    def _ask_low_latency(self) -> bool:
        """Whether the driver now delivers at once (FTDI: 1 ms instead of 16 ms). Asked for, never required."""
        block = bytearray(_SERIAL_STRUCT_BYTES)
        try:
            _ioctl(self.fd, termios.TIOCGSERIAL, block)
            (flags,) = struct.unpack_from("=i", block, _SERIAL_FLAGS_OFFSET)
            if not flags & _ASYNC_LOW_LATENCY:
                struct.pack_into("=i", block, _SERIAL_FLAGS_OFFSET, flags | _ASYNC_LOW_LATENCY)
                _ioctl(self.fd, termios.TIOCSSERIAL, block)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close and never block: what was not sent yet is discarded (the kernel would wait up to 30 s for it).

        An inherited descriptor is closed without discarding, since its owner goes on. Calling it again does nothing.
        """
        if self.fd < 0:
            return
        fd, self.fd = self.fd, -1
        if self._owned:
            with suppress(OSError):  # The device may be gone, and its bytes with it.
                _ioctl(fd, termios.TCFLSH, termios.TCOFLUSH)
                # The flag is the device's, not the descriptor's: while anybody has it open it would keep us out, too.
                _ioctl(fd, termios.TIOCNXCL, 0)
        os.close(fd)

    def describe(self) -> dict[str, str | int | bool]:
        """JSON-ready facts about the port, for status, traces and error reports."""
        facts: dict[str, str | int | bool] = {
            "path": self.path,
            "driver": self.driver,
            "is_pty": self.is_pty,
            "parity_real": self.parity_real,
            "low_latency": self.low_latency,
        }
        try:
            settings = self._get()
        except OSError:
            return facts
        return {**facts, "baud": settings.ospeed, "format": _frame_name(settings.cflag)}

    @property
    def driver(self) -> str:
        """Name of the kernel driver, such as ``uart-pl011``, ``bcm2835-aux-uart`` or ``ftdi_sio``; ``pty``; else empty."""
        if self.is_pty:
            return "pty"
        try:
            return driver_name(os.fstat(self.fd).st_rdev)
        except OSError:
            return ""

    @property
    def parity_real(self) -> bool:
        """Whether the parity that ``set_format`` accepted is on a wire: False on a pty, which has none."""
        return not self.is_pty

    # --- format --------------------------------------------------------------------------------------------------

    def set_format(self, baud: int, parity: str, stop_bits: int = 1, data_bits: int = 8, flow: str = "") -> None:
        """``baud`` with parity ``"N"``, ``"E"`` or ``"O"`` (``"M"``, ``"S"``: mark, space); raw; at once, without touching any
        buffer. ``flow``: who may hold the bytes back: nobody, ``rts`` (RTS/CTS) or ``xon`` (XON/XOFF).

        Everything is set again, since a console may have changed it. Then it is read back: ``BaudUnavailable`` where the
        driver made another rate (more than 2.5 % off), ``ParityUnavailable`` where it made another frame.
        """
        frame = _SIZE_FLAGS[data_bits] | _PARITY_FLAGS[parity] | _STOP_FLAGS[stop_bits]
        asked = f"{baud} baud {data_bits}{parity}{stop_bits}"
        # A standard rate by its constant: drivers that never heard of BOTHER know it, and so does `stty`.
        speed = _STANDARD_RATES.get(baud, _BOTHER)
        try:
            raw = _raw(self._get())
            cflag = (raw.cflag & ~(_FRAME_FLAGS | _CBAUD | _CIBAUD)) | frame | speed
            cflag |= termios.CRTSCTS if flow == "rts" else 0
            iflag = termios.IXON | termios.IXOFF if flow == "xon" else 0
            self._put(replace(raw, iflag=iflag, cflag=cflag, ispeed=baud, ospeed=baud))
            got = self._get()
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise BaudUnavailable(
                    f"Setting {self.path} to {asked}: the driver ({self.driver or 'unknown'}) refused it",
                    path=self.path,
                    baud=baud,
                    driver=self.driver,
                ) from error
            self._fail(f"Setting the format {asked}", error)
        if abs(got.ospeed - baud) > baud * BAUD_TOLERANCE:
            raise BaudUnavailable(
                f"Setting {self.path} to {asked}: the driver ({self.driver or 'unknown'}) made {got.ospeed} baud of it",
                path=self.path,
                baud=baud,
                got=got.ospeed,
                driver=self.driver,
            )
        # A pty has neither parity nor size of a character.
        compared = termios.CSTOPB if self.is_pty else _FRAME_FLAGS
        if (got.cflag ^ frame) & compared:
            raise ParityUnavailable(
                f"Setting {self.path} to {asked}: the driver ({self.driver or 'unknown'}) accepted it and then reads back "
                f"{_frame_name(got.cflag)}",
                path=self.path,
                asked=f"{data_bits}{parity}{stop_bits}",
                got=_frame_name(got.cflag),
                driver=self.driver,
            )

    def _get(self) -> _Settings:
        block = bytearray(_TERMIOS2.size)
        _ioctl(self.fd, _TCGETS2, block)
        return _Settings(*_TERMIOS2.unpack(block))

    def _put(self, settings: _Settings) -> None:
        _ioctl(self.fd, _TCSETS2, _TERMIOS2.pack(*astuple(settings)))

    # --- bytes ---------------------------------------------------------------------------------------------------

    def write_all(self, data: bytes, timeout_s: float) -> None:
        """Hand ``data`` to the kernel, in one ``write`` where it fits; ``LinkError`` when it takes longer than allowed."""
        try:
            # All of it at once, which is what happens: a frame is 260 bytes at most.
            written = os.write(self.fd, data)
        except BlockingIOError:
            written = 0
        except OSError as error:
            self._fail(f"Writing {len(data)} bytes", error)
        if written == len(data):
            return
        deadline = time.monotonic() + timeout_s
        rest = memoryview(data)[written:]
        while rest:
            try:
                rest = rest[os.write(self.fd, rest) :]
                continue
            except BlockingIOError:
                pass
            except OSError as error:
                self._fail(f"Writing {len(data)} bytes", error)
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not self._poll(select.POLLOUT, left_s):
                written = len(data) - len(rest)
                raise LinkError(
                    f"Writing to {self.path}: after {timeout_s:g} s the port had taken {written} of {len(data)} bytes "
                    "(the adapter stalls, or flow control holds it)",
                    path=self.path,
                    written=written,
                    size=len(data),
                )

    def read(self, count: int) -> bytes:
        """At most ``count`` bytes that are there already; ``b""`` means none. Never waits, never reads beyond."""
        if count <= 0:
            return b""
        try:
            data = os.read(self.fd, count)
        except BlockingIOError:
            return b""
        except OSError as error:
            self._fail("Reading", error)
        if not data:
            raise PortGone(f"Reading from {self.path}: the device hung up", path=self.path, errno=0)
        return data

    def receive(self, count: int, timeout_s: float) -> bytes:
        """At most ``count`` (1 or more) bytes as soon as there are any, ``b""`` after ``timeout_s``: one look and one read.

        The way of every answer of the loader, so nothing is done twice here. Errors as in ``read``.
        """
        found = self._readable.poll(timeout_s * 1000 if timeout_s > 0 else 0)
        if not found:
            return b""
        if not found[0][1] & select.POLLIN:
            self._found(found, select.POLLIN)  # Raises.
        return self.read(count)

    def wait_readable(self, timeout_s: float) -> bool:
        """Whether bytes came within ``timeout_s``; ``PortGone`` on a hang-up with nothing left to read."""
        return self._found(self._readable.poll(max(0, timeout_s) * 1000), select.POLLIN)

    def _poll(self, events: int, timeout_s: float) -> bool:
        poller = select.poll()
        poller.register(self.fd, events)
        return self._found(poller.poll(max(0, timeout_s) * 1000), events)

    def _found(self, found: list[tuple[int, int]], events: int) -> bool:
        if not found:
            return False
        if found[0][1] & events:
            return True
        raise PortGone(f"Waiting for {self.path}: the device hung up", path=self.path, errno=0)

    def flush_input(self) -> None:
        """Discard what came and was not read."""
        self._flush(termios.TCIFLUSH)

    def discard_output(self) -> None:
        """Discard what was written and is not on the wire yet."""
        self._flush(termios.TCOFLUSH)

    def _flush(self, queue: int) -> None:
        try:
            _ioctl(self.fd, termios.TCFLSH, queue)
        except OSError as error:
            self._fail("Flushing", error)

    # --- counters and modem lines --------------------------------------------------------------------------------

    def counters(self) -> Counters | None:
        """The driver's counters; None where it keeps none (a pty, some USB adapters)."""
        block = bytearray(struct.calcsize(_ICOUNT_FORMAT))
        try:
            _ioctl(self.fd, _TIOCGICOUNT, block)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                return None
            self._fail("Reading the error counters", error)
        return Counters(*struct.unpack(_ICOUNT_FORMAT, block)[_ICOUNT_FIRST : _ICOUNT_FIRST + 7])

    def set_modem(self, dtr: bool | None = None, rts: bool | None = None) -> None:
        """Assert (True) or release (False) DTR and RTS; None leaves one as it is.

        Both in one call where they go the same way; otherwise the released one moves first.
        """
        for request, asserted in ((termios.TIOCMBIC, False), (termios.TIOCMBIS, True)):
            bits = (termios.TIOCM_DTR if dtr is asserted else 0) | (termios.TIOCM_RTS if rts is asserted else 0)
            if not bits:
                continue
            try:
                _ioctl(self.fd, request, array("i", [bits]))
            except OSError as error:
                if error.errno in (errno.ENOTTY, errno.EINVAL):
                    raise LineUnavailable(
                        f"Setting DTR/RTS of {self.path}: the driver ({self.driver or 'unknown'}) has no modem lines",
                        path=self.path,
                        driver=self.driver,
                    ) from error
                self._fail("Setting DTR/RTS", error)

    def modem(self) -> frozenset[str]:
        """Which of cts, dsr, ri and cd the other side asserts; none where the driver has no modem lines (a pty)."""
        bits = array("i", [0])
        try:
            _ioctl(self.fd, termios.TIOCMGET, bits)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                return frozenset()
            self._fail("Reading the modem lines", error)
        return frozenset(name for name, bit in _MODEM_INPUTS.items() if bits[0] & bit)

    def set_break(self, active: bool) -> None:
        """Hold TX low (True) or end that. A driver that cannot do it says nothing; a pty cannot."""
        try:
            _ioctl(self.fd, _TIOCSBRK if active else _TIOCCBRK, 0)
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                self._fail("Sending a break", error)

    def write(self, data: bytes) -> int:
        """As much of ``data`` as the kernel takes at once; 0 when it is full."""
        try:
            return os.write(self.fd, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._fail(f"Writing {len(data)} bytes", error)

    def _fail(self, attempted: str, error: OSError) -> NoReturn:
        cls = PortGone if error.errno in _GONE else LinkError
        raise cls(f"{attempted} on {self.path}: {_reason(error)}", path=self.path, errno=error.errno or 0) from error


def _raw(settings: _Settings) -> _Settings:
    """No translation, no echo, no flow control, no signals; receiver on, carrier ignored, lines kept at close."""
    cc = bytearray(settings.cc)
    cc[termios.VMIN] = 1
    cc[termios.VTIME] = 0
    cflag = settings.cflag & ~(termios.CSIZE | termios.CRTSCTS | termios.HUPCL)
    return replace(
        settings, iflag=0, oflag=0, lflag=0, cflag=cflag | termios.CS8 | termios.CREAD | termios.CLOCAL, cc=bytes(cc)
    )


def _frame_name(cflag: int) -> str:
    """Such as ``8E1``."""
    bits = {termios.CS5: 5, termios.CS6: 6, termios.CS7: 7, termios.CS8: 8}[cflag & termios.CSIZE]
    odd, marked = bool(cflag & termios.PARODD), bool(cflag & _CMSPAR)
    parity = ("SM" if marked else "EO")[odd] if cflag & termios.PARENB else "N"
    return f"{bits}{parity}{2 if cflag & termios.CSTOPB else 1}"


def _reason(error: OSError) -> str:
    return f"{os.strerror(error.errno)} ({errno.errorcode.get(error.errno, error.errno)})" if error.errno else str(error)


def is_pty_device(rdev: int) -> bool:
    """Whether a device number belongs to a pseudo terminal, by the kernel's list of assigned numbers."""
    major = os.major(rdev)
    return major in _PTY_MAJORS or major in _LEGACY_PTY_MAJORS or (major, os.minor(rdev)) == _PTMX


def driver_name(rdev: int) -> str:
    """Name of the driver behind a tty's device number, found in sysfs (works for udev links alike); empty: not told."""
    node = os.path.realpath(f"{_SYS_CHAR}/{os.major(rdev)}:{os.minor(rdev)}/device")
    for _ in range(4):
        try:
            name = os.path.basename(os.readlink(f"{node}/driver"))
        except OSError:
            return ""
        if name not in _NOT_THE_DRIVER:
            return name
        node = os.path.dirname(node)
    return ""


def look(path: str) -> None:
    """Raise what ``Uart.open`` would, as far as it can be known without opening: that alone raises DTR and RTS in the kernel,
    perhaps in the middle of another program's erase, and we ask once a second until the port is free."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise _open_error(path, error) from error
    if not stat.S_ISCHR(status.st_mode):
        return  # ``open`` says it, and opens it no more than this.
    if pids := flock_pids(status):
        raise _busy(path, first_alive(pids), "locked")
    if not is_pty_device(status.st_rdev):
        _refuse_held(path, status.st_rdev, at_least=1)


def _refuse_held(path: str, rdev: int, *, at_least: int) -> None:
    """``at_least``: see ``find_holder``."""
    locker = lock_file_holder(path)
    if locker is not None:
        raise _busy(path, locker, "locked, says its file in /run/lock")
    holder = find_holder(rdev, at_least=at_least)
    if holder is not None:
        raise _busy(path, holder, "open")


def _busy(path: str, holder: Holder | None, how: str) -> PortBusy:
    if holder is None:
        return PortBusy(f"Opening {path}: another process has it {how}; which one may not be seen from here", path=path)
    return PortBusy(
        f"Opening {path}: process {holder.pid} ({holder.command or 'unknown'}) has it {how}",
        path=path,
        pid=holder.pid,
        command=holder.command,
    )


def _open_error(path: str, error: OSError) -> LinkError:
    if error.errno in _GONE:
        return PortGone(f"Opening {path}: {_reason(error)}", path=path, errno=error.errno or 0)
    if error.errno == errno.EBUSY:
        try:
            return _busy(path, find_holder(os.stat(path).st_rdev), "exclusively open")
        except OSError:
            return PortBusy(f"Opening {path}: {_reason(error)}", path=path)
    if error.errno in (errno.EACCES, errno.EPERM):
        return PortForbidden(
            f"Opening {path} as user {os.geteuid()}: {_reason(error)}", path=path, errno=error.errno, user=os.geteuid()
        )
    return LinkError(f"Opening {path}: {_reason(error)}", path=path, errno=error.errno or 0)
