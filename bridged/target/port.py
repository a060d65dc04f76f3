"""The open serial port on the event loop, for the console: bytes in both directions while no session holds the port.

``Port`` is the one small interface; behind it is pyserial-asyncio's transport, over the descriptor that the owner opened
(``Uart``). A second open would raise DTR and RTS again and fight with our own exclusive lock, so the transport gets what it
needs of a ``serial.Serial`` from ``_AsSerial``: ten lines, which also keep its habits away from us (``close`` would wait in
``tcdrain`` for a full buffer, on the loop; setting a time-out would write a whole termios).

While a session has the descriptor nobody here reads or writes it: ``pause`` first takes everything that is there, so that it
is told in order, and throws away what was not sent yet; ``resume`` goes on. Daemon only. It knows nothing of clients.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import serial  # type: ignore[import-untyped]
import serial_asyncio  # type: ignore[import-untyped]

from bridged.errors import BridgedError
from bridged.target.uart import Uart

READ_BYTES = 16384  # At once. The transport asks for 1 KiB, which at 3 Mbaud would be 300 turns of the loop a second.
LAST_READS = 16  # What the kernel holds at most (68 KiB), in pieces of a pty's 4 KiB.
WRITE_HIGH_BYTES = 4096  # Not sent yet, beyond which writers are held: 0.35 s at 115200 baud, which a job would throw away.


class _AsSerial:
    """What pyserial-asyncio 0.6 uses of a ``serial.Serial``, on our open port."""

    def __init__(self, uart: Uart) -> None:
        self.timeout: float | None = 0
        self.write_timeout: float | None = 0
        self._uart = uart
        self._fd = uart.fd

    def fileno(self) -> int:
        return self._fd

    def read(self, _size: int) -> bytes:
        try:
            return self._uart.read(READ_BYTES)
        except BridgedError as error:
            raise serial.SerialException(error.message) from error

    def write(self, data: bytes) -> int:
        try:
            return self._uart.write(data)
        except BridgedError:
            # A device that is gone says so on the next read, which ends the connection in order. The transport would report a
            # failed write as a defect, with a traceback, each time that somebody unplugs an adapter while another types.
            return len(data)

    def flush(self) -> None:
        """Nothing is waited for: what is not sent when a port closes is thrown away by ``Uart.close``."""

    def close(self) -> None:
        """The descriptor is the owner's."""


class Port(asyncio.Protocol):
    """One open port on the loop. ``on_data`` gets what the target says, ``on_lost`` is told once when the device is gone,
    ``on_room`` when there is room again after ``write`` said that there is none."""

    def __init__(
        self, uart: Uart, on_data: Callable[[bytes], None], on_lost: Callable[[], None], on_room: Callable[[], None]
    ) -> None:
        self.uart = uart
        self.full = False
        self._on_data, self._on_lost, self._on_room = on_data, on_lost, on_room
        self._open = True
        self._paused = False
        loop = asyncio.get_running_loop()
        self._transport = serial_asyncio.SerialTransport(loop, self, _AsSerial(uart))
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)

    @classmethod
    async def attach(
        cls, uart: Uart, on_data: Callable[[bytes], None], on_lost: Callable[[], None], on_room: Callable[[], None]
    ) -> Port:
        port = cls(uart, on_data, on_lost, on_room)
        await asyncio.sleep(0)  # The transport begins to read in the next turn: a ``pause`` before that would be forgotten.
        return port

    @property
    def alive(self) -> bool:
        return self._open

    def write(self, data: bytes) -> bool:
        """Whether it was taken; while a session has the port, or after its end, nothing is."""
        if self._paused or not self._open:
            return False
        self._transport.write(data)
        return True

    def discard_output(self) -> None:
        if self._open:
            self._transport.flush()
            self.uart.discard_output()

    def pause(self) -> None:
        """Leave the port to a session. Raises ``PortGone``."""
        if self._paused or not self._open:
            return
        self._paused = True
        self._transport.pause_reading()
        self._transport.flush()
        for _ in range(LAST_READS):  # Not until there is no more: a target that talks without end would never let go.
            data = self.uart.read(READ_BYTES)
            if not data:
                break
            self._on_data(data)

    def resume(self) -> None:
        if self._paused and self._open:
            self._paused = False
            self._transport.resume_reading()

    def close(self) -> None:
        """Before the descriptor is closed: from here on the loop does not look at it any more."""
        if self._open:
            self._open = False
            self._transport.abort()

    # --- what the transport tells -----------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._on_data(data)

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        self._on_room()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if self._open:
            self._open = False
            self._on_lost()
