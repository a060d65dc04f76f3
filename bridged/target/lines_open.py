"""Opening the control lines of a target as its configuration says, already idle.

Daemon only: this is where GPIO requests are made and line boxes are connected. Afterwards everything goes through
``lines.Lines``, in this process and in the session process, which inherits the descriptors and opens nothing.

Opening brings the lines to idle (BOOT0 low, power on, NRST released) and resets nothing by itself. Whoever may not touch the
lines yet, because a killed session left a hazard (P9), must not call this yet; nor open the serial port when NRST hangs on
DTR or RTS, since Linux raises both at open.
"""

from __future__ import annotations

import errno
import socket
import time

from bridged import config
from bridged.errors import LineUnavailable
from bridged.target.gpio import open_gpio
from bridged.target.lines import ANSWER_TIMEOUT_S, BY_HAND, Lines, ModemLines, NoLines, SocketLines
from bridged.target.uart import Uart

CONNECT_RETRY_S = 0.05


def open_lines(lines: config.Lines, uart: Uart, consumer: str) -> Lines:
    """The driver for ``lines``, idle. ``consumer``: our name in ``gpioinfo``. Blocking: call it off the event loop.

    Raises ``LineUnavailable`` or ``ConfigError``; ``PortGone`` where a modem line's port vanished. Nothing stays open then.
    """
    opened: Lines
    match lines.kind:
        case "gpio":
            return open_gpio(lines, consumer)  # Idle since the request itself.
        case "modem":
            opened = ModemLines.of(lines, uart)
        case "socket":
            opened = SocketLines.of(lines, _connect(lines.socket))
        case _:
            return NoLines(lines.boot0 == BY_HAND)
    try:
        opened.idle()
    except BaseException:
        opened.close()
        raise
    return opened


def _connect(path: str) -> int:
    """A connected, non-blocking descriptor. A box whose backlog is full is asked again for a while."""
    box = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    box.setblocking(False)
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    try:
        while True:
            try:
                box.connect(path)
            except BlockingIOError:  # A Unix socket connects at once or says EAGAIN; there is nothing to poll for.
                if time.monotonic() < deadline:
                    time.sleep(CONNECT_RETRY_S)
                    continue
                raise
            return box.detach()
    except OSError as error:
        reason = "nobody listens there" if error.errno == errno.ECONNREFUSED else error.strerror or str(error)
        raise LineUnavailable(f"Connecting to the line box {path}: {reason}", socket=path, errno=error.errno or 0) from error
    finally:
        box.close()
