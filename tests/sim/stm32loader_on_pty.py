"""Runs stm32loader with DTR and RTS wired to a line box instead of a port that has none (a pty refuses modem lines).

Nothing else of it is changed. Wiring as on its reference boards: DTR asserted pulls NRST low, RTS asserted pulls BOOT0 low.
Usage: ``python stm32loader_on_pty.py LINE_BOX ARGUMENTS OF STM32LOADER…``
"""

from __future__ import annotations

import importlib
import socket
import sys
from typing import Any


def wire(box: socket.socket) -> None:
    def drive(pin: str, asserted: bool) -> None:
        box.sendall(f"{pin} {int(not asserted)}\n".encode())
        answer = box.recv(100)
        if answer != b"ok\n":
            raise OSError(f"line box: {answer!r}")

    port: Any = importlib.import_module("serial.serialposix").Serial
    port._update_dtr_state = lambda self: drive("nrst", self._dtr_state)
    port._update_rts_state = lambda self: drive("boot0", self._rts_state)


def main() -> None:
    box = socket.socket(socket.AF_UNIX)
    box.settimeout(10)
    box.connect(sys.argv[1])
    wire(box)
    importlib.import_module("stm32loader.main").main(*sys.argv[2:])


if __name__ == "__main__":
    main()
