"""In the guest: a simulated STM32 on a real tty, /dev/ttyNM1 of uartpair, beside the gateway that is tested.

The simulated part keeps its own time and judges what it hears bit by bit by the host's frame format; what it sends leaves in
the format of the part, so that a host which is set otherwise gets parity and framing errors from its kernel. Run it with the
Python of the installed package:

    python target.py CHIP LINE-BOX STATE-FILE [FAULT | parity=N|E|O | rate=X]...

Its flash is memory that the host shares with this machine (ivshmem), for flash does not forget when the power is cut: a file in
here would lose what Linux had not written yet. STATE-FILE tells the tests what happened so far.

``parity`` and ``rate``: a part (or an adapter between) that speaks with another parity, or off by a factor.

It ends with 0 on SIGTERM, and with 1 where a reset came in the middle of an erase (P9).
"""

from __future__ import annotations

import array
import fcntl
import json
import mmap
import os
import re
import signal
import struct
import sys
import threading
import tty
from dataclasses import replace
from pathlib import Path
from typing import Any

from bridged.chips import find
from bridged.sim.device import Device
from bridged.sim.pty import PtyDevice, PtyPort
from bridged.sim.wire import Burst, Format

OURS, HOSTS = "ttyNM1", "ttyNM0"
TCGETS2, TCSETS2 = 0x802C542A, 0x402C542B
CBAUD, BOTHER, PARENB, PARODD, CS8, CSTOPB = 0o010017, 0o010000, 0o400, 0o1000, 0o60, 0o100


class PairPort(PtyPort):
    """Our end of uartpair."""

    def __init__(self) -> None:  # Not the pty's: nothing of it is wanted.
        self.fd = os.open(f"/dev/{OURS}", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        self.path = f"/dev/{HOSTS}"
        tty.setraw(self.fd)
        Path(f"/sys/class/tty/{OURS}/model").write_text("1")
        self._format: Format | None = None

    def host_format(self) -> Format:
        text = Path(f"/sys/class/tty/{HOSTS}/frame").read_text()
        baud, parity, stop_bits = re.fullmatch(r"(\d+) 8([NEO])([12])\n", text).groups()  # type: ignore[union-attr]
        return Format(float(baud), parity, int(stop_bits))

    def receiver(self) -> Format | None:
        return None

    def send(self, burst: Burst) -> int:
        if burst.format != self._format:
            self._set(burst.format)
            self._format = burst.format
        return len(burst.data) - self._write(burst.data)

    def _set(self, form: Format) -> None:
        block = array.array("B", bytes(44))
        fcntl.ioctl(self.fd, TCGETS2, block, True)
        fields = list(struct.unpack("=4IB19s2I", block))
        frame = CS8 | (PARENB if form.parity != "N" else 0) | (PARODD if form.parity == "O" else 0)
        fields[2] = (fields[2] & ~(CBAUD | CBAUD << 16 | PARENB | PARODD | CSTOPB)) | BOTHER | frame
        fields[6] = fields[7] = round(form.baud)
        fcntl.ioctl(self.fd, TCSETS2, struct.pack("=4IB19s2I", *fields))

    def close(self) -> None:
        os.close(self.fd)


def shared(size_bytes: int) -> mmap.mmap:
    """The memory behind the one PCI device of this kind, from its begin."""
    for device in Path("/sys/bus/pci/devices").iterdir():
        if (device / "vendor").read_text() == "0x1af4\n" and (device / "device").read_text() == "0x1110\n":
            (device / "enable").write_text("1")
            with (device / "resource2").open("r+b", buffering=0) as file:
                return mmap.mmap(file.fileno(), size_bytes)
    raise FileNotFoundError("this machine has no ivshmem device")


def main(name: str, box: str, state: str, *options: str) -> int:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    own = dict(option.split("=") for option in options if option.startswith(("parity=", "rate=")))
    chip = replace(find(name), parity=own.get("parity", "E"))
    error = float(own["rate"]) - 1 if "rate" in own else None
    faults = [option for option in options if option.partition("=")[0] not in own]
    device = Device(chip, powered=False, faults=faults, rate_error=error)
    device.memory.flash = shared(len(device.memory.flash))  # type: ignore[assignment]  # It is sliced, and no more.
    runner = PtyDevice(device, lines_path=Path(box), port=PairPort())
    with runner:
        print("ready", flush=True)
        told = ""
        while not stop.wait(0.3):
            # For the tests: what happened so far.
            stats = device.stats
            seen: dict[str, Any] = {
                "mode": device.mode.value,
                "resets": stats.resets,
                "hazard_resets": len(stats.hazard_resets),
            }
            seen |= {
                "syncs": stats.syncs,
                "parity_errors": stats.parity_errors,
                "overruns": stats.overruns,
                "lines": device.lines,
            }
            if (text := json.dumps(seen)) != told:
                told = text
                part = Path(f"{state}.part")
                part.write_text(text)
                part.replace(state)
    return 1 if device.stats.hazard_resets else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
