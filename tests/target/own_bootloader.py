"""A target whose own flash holds a bootloader that takes XMODEM, for sessions in virtual time. Strict, and no friend of hosts.

After a reset it says so and waits two seconds for a key, else it starts its application. At its prompt ``load`` makes it
receive: it asks every three seconds, answers each block, counts a block that comes twice once, cancels when blocks are missing,
erases at the first block (which takes ``erase_s``), and says at the end whether the image has the CRC-32 that stands in its
first word.
It is written from the protocol's description and shares nothing with ``protocol.xmodem``.
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace

from bridged.sim.wire import Burst, Format

S = 1_000_000_000


def good_image(count: int, seed: int = 1) -> bytes:
    """Starts with the CRC-32 of all that follows, and its length: padding behind it does not matter."""
    import random

    body = random.Random(seed).randbytes(count - 8)
    return struct.pack("<II", zlib.crc32(body), len(body)) + body


class OwnBootloader:
    """Has what ``sim.virtual`` asks of a device. ``spoil``: what becomes of byte ``n``, there (True) or back. ``hasty``: it
    refuses a bad block, and each byte with which none can begin, at once, where others wait until the line is quiet."""

    def __init__(
        self,
        *,
        baud: int = 115200,
        crc: bool = True,
        erase_s: float = 0.4,
        spoil: Callable[[bool, int, int], bytes] = lambda _there, _n, value: bytes([value]),
        mute: bool = False,
        hasty: bool = False,
    ) -> None:
        self.hasty = hasty
        self.form, self.crc, self.erase_s, self.spoil, self.mute = Format(baud, "N"), crc, erase_s, spoil, mute
        self.stats = SimpleNamespace(overruns=0)
        self.now_ns = 0
        self.hazard = ""
        self.busy_until = 0
        self.out: deque[Burst] = deque()
        self.free_ns = 0
        self.counts = {True: 0, False: 0}
        self.flash = b"old application"
        self.runs = "application"
        self.timer = 0
        self.line = bytearray()
        self.resets = self.silent = self.cans = 0
        self.canceled = False
        self.number, self.got, self.data = 1, b"", b""
        self.block, self.refused = bytearray(), False

    # --- the wire

    def feed(self, data: bytes, start_ns: int, form: Format) -> None:
        self.advance(start_ns)
        for n, value in enumerate(data):
            self.advance(start_ns + (n + 1) * form.byte_ns)
            for heard in self._through(True, value):
                if form.agrees(self.form) and self.now_ns >= self.busy_until:
                    self._byte(heard)

    def _through(self, there: bool, value: int) -> bytes:
        self.counts[there] += 1
        return self.spoil(there, self.counts[there] - 1, value)

    def say(self, data: bytes) -> None:
        if self.mute:
            return
        sent = b"".join(self._through(False, value) for value in data)
        start = max(self.now_ns, self.free_ns)
        if sent:
            self.out.append(Burst(start, self.form.byte_ns, sent, self.form))
        self.free_ns = start + len(data) * self.form.byte_ns

    def collect(self, until_ns: int, _receiver: Format | None = None) -> list[Burst]:
        self.advance(until_ns)
        taken = []
        while self.out and self.out[0].end_ns <= until_ns:
            taken.append(self.out.popleft())
        return taken

    def arrival_ns(self, count: int, _receiver: Format | None = None) -> int | None:
        at = 0
        for burst in self.out:
            at += len(burst.data)
            if at >= count:
                return burst.end_ns
        if self.out:
            return self.out[-1].end_ns
        return self.timer or None

    def set_lines(self, at_ns: int, *, nrst: bool | None = None, **_others: bool | None) -> None:
        self.advance(at_ns)
        if nrst is False:
            assert self.now_ns >= self.busy_until, "reset while it erases"
            self.runs, self.timer = "", 0
            self.out.clear()
        if nrst is True and self.runs == "":
            self.resets += 1
            self.runs, self.timer = "waiting", at_ns + 2 * S
            self.say(b"\r\nOwn bootloader 1.0, press x to stay\r\n")

    # --- its program

    def advance(self, until_ns: int) -> None:
        while self.timer and self.timer <= until_ns:
            self.now_ns, self.timer = self.timer, 0
            self._time_over()
        self.now_ns = max(self.now_ns, until_ns)
        self.hazard = "erase" if self.now_ns < self.busy_until else ""

    def _time_over(self) -> None:
        if self.runs == "waiting":
            self._start_application()
        elif self.runs == "asking":
            self.say(b"C" if self.crc else b"\x15")
            self.timer = self.now_ns + 3 * S
        elif self.runs == "receiving":
            if self.block or self.refused:  # The rest of a block did not come, or the line is quiet after a bad one.
                self.block.clear()
                self.refused = False
                self.say(b"\x15")
            self.silent += 1
            if self.silent > 10:
                self._give_up()
            else:
                self.timer = self.now_ns + 10 * S
        elif self.runs == "writing":
            self.runs = "receiving"
            self._accept()

    def _start_application(self) -> None:
        self.runs = "application"
        self.say(b"running " + self.flash[:8].hex().encode() + b"\r\n")

    def _byte(self, value: int) -> None:
        if self.runs == "waiting" and value == ord("x"):
            self.runs, self.timer = "prompt", 0
            self.line.clear()
            self.say(b"boot> ")
        elif self.runs == "prompt":
            self.line.append(value)
            if value in b"\r\n":
                if self.line.strip() == b"load":
                    self.say(b"\r\nsend it now\r\n")
                    self.runs, self.timer = "asking", self.now_ns + S
                    self.got, self.number, self.silent = b"", 1, 0
                    self.block, self.refused, self.cans = bytearray(), False, 0
                else:
                    self.say(b"?\r\nboot> ")
                self.line.clear()
        elif self.runs in ("asking", "receiving"):
            self._transfer(value)

    def _transfer(self, value: int) -> None:
        self.timer = self.now_ns + S
        if self.refused:
            return  # Until it is quiet.
        if not self.block:
            self.cans = self.cans + 1 if value == 0x18 else 0
            if self.cans == 2:
                self.runs, self.timer, self.canceled = "prompt", 0, True
                self.say(b"\r\ncanceled\r\nboot> ")
            elif value == 4 and self.runs == "receiving":
                self.say(b"\x06")
                self._finish()
            elif value in (1, 2):
                self.block.append(value)
                self.runs = "receiving"
            elif self.runs == "asking":
                self.timer = self.now_ns + 3 * S
            elif self.hasty and value != 0x18:
                self.say(b"\x15")
            return
        self.block.append(value)
        size = 128 if self.block[0] == 1 else 1024
        if len(self.block) == 3 + size + (2 if self.crc else 1):
            self._whole(size)

    def _whole(self, size: int) -> None:
        block, self.block = bytes(self.block), bytearray()
        number, inverse, data, check = block[1], block[2], block[3 : 3 + size], block[3 + size :]
        crc = 0
        for byte in data:
            crc ^= byte << 8
            for _ in range(8):
                crc = (crc << 1 ^ 0x1021 if crc & 0x8000 else crc << 1) & 0xFFFF
        right = check == (struct.pack(">H", crc) if self.crc else bytes([sum(data) & 0xFF]))
        if number ^ inverse != 0xFF or not right:
            self.refused = not self.hasty
            if self.hasty:
                self.say(b"\x15")
            return
        self.silent = 0
        if number == (self.number - 1) & 0xFF and self.got:
            self.say(b"\x06")
        elif number != self.number & 0xFF:
            self._give_up()
        else:
            self.data = data
            if not self.got:
                self.flash = b""
                self.runs, self.busy_until = "writing", self.now_ns + round(self.erase_s * S)
                self.timer = self.busy_until
            else:
                self._accept()

    def _accept(self) -> None:
        self.got += self.data
        self.number += 1
        self.say(b"\x06")
        self.timer = self.now_ns + 10 * S

    def _give_up(self) -> None:
        self.runs, self.timer = "prompt", 0
        self.say(b"\x18\x18\x18\r\nfailed\r\nboot> ")

    def _finish(self) -> None:
        self.flash = self.got
        crc, size = struct.unpack_from("<II", self.got)
        good = zlib.crc32(self.got[8 : 8 + size]) == crc and len(self.got) >= 8 + size
        self.runs, self.timer = "prompt", 0
        self.say(b"\r\nimage good\r\nboot> " if good else b"\r\nimage BAD\r\nboot> ")
