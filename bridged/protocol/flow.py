"""Steps that a flow may ask for, and nothing about how they are carried out.

A flow is a plain generator: it yields a step, is resumed with the step's answer, and returns its value or raises a
typed error. It never touches a file descriptor, a clock or a log. A driver runs it: the session process over a real UART
(``target/worker.py``), or the simulator in virtual time (``sim/virtual.py``). Both drivers run the very same flows, so what
is proven in virtual time is what runs on the wire.

Invariants that every driver keeps:

- ``Send`` hands the bytes over in one piece (one ``write`` a frame: an FTDI adapter costs a USB frame per write).
- ``Receive`` never reads beyond ``count``: what the target says later stays for later.
- ``Checkpoint`` is the only place where a cancel, a stop or the loss of the daemon may end a flow (by an exception thrown
  into it there). A command of the loader is therefore never left half sent.
- ``Hazard`` is remembered outside the process before the next step is carried out (P9).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from bridged.events import Event

T = TypeVar("T")

DRAIN_BYTES = 4096  # What one ``Drain`` gives at most: enough to say what noise is.


@dataclass(frozen=True, slots=True)
class Send:
    """Send ``data`` in one write; answered with ``None``.

    ``payload_address``: set where bytes of it are image content for this address, so that a recorder can store a reference.
    ``before`` and ``behind``: how many are around them; of AN3155 their length and the checksum.
    """

    data: bytes
    payload_address: int | None = None
    before: int = 1
    behind: int = 1


@dataclass(frozen=True, slots=True)
class Receive:
    """Receive up to ``count`` bytes within ``timeout_s``, counted from the end of transmission of what was sent.

    Answered with the bytes that came; fewer than ``count`` means that the time ran out.
    """

    count: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Drain:
    """Receive until the line was quiet for ``quiet_s``, for at most ``limit_s``; answered with ``DRAIN_BYTES`` at most."""

    quiet_s: float
    limit_s: float


@dataclass(frozen=True, slots=True)
class Pause:
    """Let ``seconds`` pass without touching anything."""

    seconds: float


@dataclass(frozen=True, slots=True)
class SetLines:
    """Drive control lines; ``None`` leaves one as it is. Answered with ``None``; raises ``LineUnavailable``.

    ``reset``: True holds the target in reset (NRST low), False releases it. ``boot0``: True selects the loader (pin
    high), False the application. ``power``: True on. Polarity and open-drain are the driver's business.
    """

    reset: bool | None = None
    boot0: bool | None = None
    power: bool | None = None


@dataclass(frozen=True, slots=True)
class ReadLine:
    """Whether a line that the target drives is active (logical): ``safe`` or ``alive``. Raises ``LineUnavailable``."""

    line: str


@dataclass(frozen=True, slots=True)
class SetFormat:
    """Baud rate in bit/s and parity of the port (``"E"`` even, ``"N"`` none, ``"O"`` odd; 8 data bits).

    ``stop_bits`` 1 or 2. Answered with ``None``; raises ``ParityUnavailable`` or ``BaudUnavailable`` when the driver of the
    port did not accept it (read back).
    """

    baud: int
    parity: str
    stop_bits: int = 1


@dataclass(frozen=True, slots=True)
class Report:
    """Tell an event; answered with ``None`` at once, whether or not anybody listens."""

    event: Event


@dataclass(frozen=True, slots=True)
class Progress:
    """``done`` bytes of the current phase's total; cheap enough for every block."""

    done: int


@dataclass(frozen=True, slots=True)
class Overheard:
    """What the application said while a flow held the port: it belongs to those who look on at the console, in this order.

    Answered with ``None`` at once. Bytes of the loader's dialogue are never told.
    """

    data: bytes


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Between two commands: the one place where a flow may be ended from outside (``Canceled``, ``Stopped``)."""


@dataclass(frozen=True, slots=True)
class Barrier:
    """Wait until the daemon has ``state`` (and ``kept``, bytes to survive a power cut) safely on disk.

    ``hazard_s``: the longest time that any single command of the coming stage may need until the target may be reset.
    Answered with ``None``; raises ``StorageError`` or ``Stopped`` when the journal cannot take it.
    """

    state: str
    hazard_s: float = 0.0
    kept: bytes = b""


@dataclass(frozen=True, slots=True)
class Hazard:
    """For ``seconds`` from now nobody may move NRST, BOOT0 or the power; 0 ends it (P9)."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Now:
    """Answered with the driver's monotonic time in seconds (float)."""


Step = (
    Send
    | Receive
    | Drain
    | Pause
    | SetLines
    | ReadLine
    | SetFormat
    | Report
    | Progress
    | Overheard
    | Checkpoint
    | Barrier
    | Hazard
    | Now
)

Flow = Generator[Step, Any, T]
