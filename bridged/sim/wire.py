"""Bytes as they are on a UART line: frame formats, bursts with times, and what a receiver with another setting hears.

A *burst* is a run of bytes sent back to back. As long as both ends agree on rate and parity a burst is handed on as it is;
only where they differ is it taken apart into bits and sampled again with the receiver's clock (``hear``), as a UART does:
falling edge, then the middle of each bit. Wrong parity, a missing stop bit and garbled values come out by themselves, and
with them the pattern that a host at 8N1 sees (the document of the loader: sync works, Get is refused).

Time is in integer nanoseconds everywhere. This module knows neither loader nor host.
"""

from __future__ import annotations

from dataclasses import dataclass

# A receiver samples the stop bit 10.5 bit times after the edge; with half a bit of error there it reads the wrong bit.
# One sixteenth of a bit is lost to oversampling: (0.5 - 0.0625) / 10.5 = 4.2 %.
RATE_TOLERANCE = 0.042


@dataclass(frozen=True, slots=True)
class Format:
    """``parity``: ``E``, ``N``, ``O``, or ``?`` where the transport cannot tell (a pty): it then counts as right."""

    baud: float
    parity: str = "E"
    stop_bits: int = 1

    @property
    def bits(self) -> int:
        """Bit times of one byte on the wire. An unknown parity is taken as one bit: the loader's 8E1."""
        return 9 + (self.parity != "N") + self.stop_bits

    @property
    def byte_ns(self) -> int:
        return round(self.bits * 1e9 / self.baud)

    def agrees(self, other: Format) -> bool:
        """Whether a receiver set to ``other`` hears every byte of a sender set to this one as it was sent."""
        if abs(self.baud / other.baud - 1) > RATE_TOLERANCE:
            return False
        return self.parity == other.parity or "?" in (self.parity, other.parity)


@dataclass(frozen=True, slots=True)
class Burst:
    """``data`` sent back to back; byte number k (from 0) is complete at ``start_ns + (k + 1) * byte_ns``."""

    start_ns: int
    byte_ns: int
    data: bytes
    format: Format

    @property
    def end_ns(self) -> int:
        return self.start_ns + len(self.data) * self.byte_ns

    def split(self, at_ns: int) -> tuple[Burst | None, Burst | None]:
        """The bytes that are complete at ``at_ns``, and the rest."""
        count = max(0, min(len(self.data), (at_ns - self.start_ns) // self.byte_ns))
        if count == len(self.data):
            return self, None
        if count == 0:
            return None, self
        return (
            Burst(self.start_ns, self.byte_ns, self.data[:count], self.format),
            Burst(self.start_ns + count * self.byte_ns, self.byte_ns, self.data[count:], self.format),
        )


@dataclass(frozen=True, slots=True)
class Heard:
    """One byte as a receiver took it: when, which value, and whether parity and stop bit were right."""

    at_ns: int
    value: int
    good: bool


def parity_bit(value: int, parity: str) -> int:
    return (value.bit_count() & 1) ^ (parity == "O")


def hear(burst: Burst, receiver: Format) -> list[Heard]:
    """What a receiver set to ``receiver`` takes from ``burst``, on a line that is idle (high) before and after."""
    sender = burst.format
    levels: list[int] = []
    for value in burst.data:
        levels.append(0)
        levels.extend((value >> bit) & 1 for bit in range(8))
        if sender.parity != "N":
            # An unknown parity is whatever the receiver wants to see.
            levels.append(parity_bit(value, receiver.parity if sender.parity == "?" else sender.parity))
        levels.extend([1] * sender.stop_bits)
    bit_ns = 1e9 / sender.baud
    ratio = sender.baud / receiver.baud  # length of the receiver's bit, in bits of the sender
    has_parity = receiver.parity not in "N?"
    found: list[Heard] = []
    at, count = 0.0, len(levels)

    def level(position: float) -> int:
        index = int(position)
        return levels[index] if index < count else 1

    while True:
        # The next falling edge: the line must have been high before.
        index = int(at) + (at > int(at))
        while index < count and (levels[index] or (index > 0 and not levels[index - 1])):
            index += 1
        if index >= count:
            return found
        edge = float(index)
        if level(edge + 0.5 * ratio):  # too short for a start bit: noise, as the UART's majority vote sees it
            at = edge + 0.5 * ratio
            continue
        value = sum(level(edge + (bit + 1.5) * ratio) << bit for bit in range(8))
        good = not has_parity or level(edge + 9.5 * ratio) == parity_bit(value, receiver.parity)
        stop = edge + (9.5 + has_parity) * ratio
        good = good and bool(level(stop))
        found.append(Heard(burst.start_ns + round((stop + 0.5 * ratio) * bit_ns), value, good))
        at = stop
