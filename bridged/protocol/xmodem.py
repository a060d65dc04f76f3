"""XMODEM, the sending side: checksum, CRC and 1K. A flow without I/O, for bootloaders that targets have of their own.

Documents: Ward Christensen's protocol as Chuck Forsberg wrote it down ("XMODEM/YMODEM Protocol Reference", 1988), and lrzsz
(``rx``), against which the tests run it.

The receiver leads: it asks for the first block, by C for blocks with a CRC or NAK for blocks with a checksum, and answers each.
What the sender must not do is to count one answer twice, or for another block than its own. ``Send`` returns before the wire
has the bytes, and at 9600 baud a large block takes a second, so it keeps in mind when a block is out, from the rate:

- What came before a block was sent is dropped, for it answers nothing.
- A NAK before the block is out answers something else (noise in front of it, the end of another one). Its own answer is waited
  for, and only where none comes the block goes again. An ACK counts at any time: a USB device is faster than its rate says.
- A receiver that asks again and again may do so while block 1 is on its way. Such a C within ``SETTLE_S`` is no NAK.
- After a block that was sent twice two ACKs may come; the second one is waited for before the next block goes, and it comes
  when the second copy is out.
- One CAN may be noise. Two in a row are the receiver's word.

An ACK says that a block came, and nothing about flash: whether the whole went well is for the caller to find out.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass
from enum import IntEnum

from bridged.errors import BridgedError, TransferFailed
from bridged.protocol.flow import Checkpoint, Drain, Flow, Hazard, Now, Progress, Receive, Send


class Byte(IntEnum):
    SOH = 0x01  # a block of 128 bytes
    STX = 0x02  # one of 1024
    EOT = 0x04
    ACK = 0x06
    NAK = 0x15
    CAN = 0x18
    CRC = 0x43  # "C"


SMALL, LARGE = 128, 1024
FRAME_MOST_BYTES = LARGE + 5
ALMOST = 896  # A rest of more than this goes as one large block, padded, and not as seven small ones.
SETTLE_S = 1.0  # Receivers ask every three seconds.
MOMENT_S = 0.001  # Less is not waited for.
TWICE_S = 0.5  # After a block is out: how long one more answer is waited for, where one came that was not its own.
CANCEL = bytes([Byte.CAN]) * 8 + b"\b" * 8  # The backspaces are for a prompt that gets them.
CHECKS = ("auto", "crc", "checksum")


@dataclass(frozen=True, slots=True)
class How:
    """``block``: 128 or 1024, the largest that is sent; with a checksum it is always 128. ``check``: one of ``CHECKS``.

    ``start_s``: how long the receiver may take to ask; ``answer_s``: for one answer, in which it may erase its flash.
    ``tries``: of one block.
    """

    block: int = LARGE
    check: str = "auto"
    pad: int = 0xFF
    start_s: float = 60.0
    answer_s: float = 10.0
    tries: int = 10


@dataclass(frozen=True, slots=True)
class Sent:
    """``crc``: what the receiver asked for. ``padded``: bytes that it got beyond the content. ``resent``: blocks."""

    blocks: int
    padded: int
    resent: int
    crc: bool


def crc16(data: bytes) -> int:
    """Polynomial 0x1021, initial value 0, most significant bit first: what the standard library calls ``crc_hqx``."""
    return binascii.crc_hqx(data, 0)


def frame(number: int, data: bytes, *, crc: bool) -> bytes:
    """One block; ``data`` has 128 or 1024 bytes."""
    head = bytes([Byte.STX if len(data) == LARGE else Byte.SOH, number & 0xFF, ~number & 0xFF])
    check = crc16(data).to_bytes(2, "big") if crc else bytes([sum(data) & 0xFF])
    return head + data + check


def pieces(data: bytes, how: How, *, crc: bool) -> list[bytes]:
    """``data`` in blocks, the last one padded."""
    found: list[bytes] = []
    at = 0
    while at < len(data):
        left = len(data) - at
        size = LARGE if crc and how.block == LARGE and left > ALMOST else SMALL
        found.append(data[at : at + size].ljust(size, bytes([how.pad])))
        at += size
    return found


def send(data: bytes, how: How, *, crc: bool, byte_s: float) -> Flow[Sent]:
    """Send ``data`` to a receiver that has asked, and end the transfer. ``Progress`` counts bytes that were acknowledged.
    ``byte_s``: of one byte on the wire.

    Raises ``TransferFailed``. Whoever ends it at a ``Checkpoint``, and every failure of ours, cancels the receiver.
    """
    blocks = pieces(data, how, crc=crc)
    resent = done = 0
    try:
        for number, block in enumerate(blocks, start=1):
            yield Checkpoint()
            what = f"block {number} of {len(blocks)}"
            again, out_at = yield from _deliver(frame(number, block, crc=crc), what, number == 1, how, byte_s)
            if again:
                now: float = yield Now()
                left_s = max(0.0, out_at - now) + TWICE_S
                yield Drain(left_s, left_s)
            resent += again
            done += len(block)
            yield Progress(min(done, len(data)))
        yield from _deliver(bytes([Byte.EOT]), "the end of the transfer", False, how, byte_s)
    except BridgedError as error:
        yield from _cancel(error)
        raise
    return Sent(len(blocks), done - len(data), resent, crc)


def invitation(how: How) -> Flow[bool]:
    """Wait until the receiver asks; True when it wants CRCs. Raises ``TransferFailed``."""
    try:
        return (yield from _invitation(how))
    except BridgedError as error:
        yield from _cancel(error)
        raise


def _cancel(error: BridgedError) -> Flow[None]:
    if error.facts.get("canceled_by") != "receiver":
        yield Send(CANCEL)


def _invitation(how: How) -> Flow[bool]:
    now: float = yield Now()
    deadline = now + how.start_s
    before, others = -1, 0
    while now < deadline:
        yield Checkpoint()
        got: bytes = yield Receive(1, min(0.5, deadline - now))
        now = yield Now()
        if not got:
            continue
        byte = got[0]
        if byte == Byte.CAN and before == Byte.CAN:
            raise _canceled("before the first block")
        if (byte == Byte.CRC and how.check != "checksum") or (byte == Byte.NAK and how.check != "crc"):
            # A bootloader may print its last words behind a C; what is heard is an invitation only when nothing follows it.
            behind: bytes = yield Drain(0.05, 1.0)
            if not behind.strip(bytes([byte])):
                return byte == Byte.CRC
            byte, others = behind[-1], others + len(behind)
        others += 1
        before = byte
    wanted = {"auto": "C or NAK", "crc": "C", "checksum": "NAK"}[how.check]
    raise TransferFailed(
        f"XMODEM: the receiver did not ask for the first block ({wanted}) within {how.start_s:g} s"
        + (f"; {others} other bytes came" if others else "; nothing came"),
        stage="start",
    )


def _deliver(data: bytes, what: str, first: bool, how: How, byte_s: float) -> Flow[tuple[int, float]]:
    """Send ``data`` until it is acknowledged; how often it was sent again, and when the last copy of it is out."""
    for attempt in range(how.tries):
        yield Drain(0.0, 0.05)
        # Whatever the receiver does with it: nobody resets it while it may be erasing or programming (P9).
        yield Hazard(len(data) * byte_s + how.answer_s)
        now: float = yield Now()
        out_at = now + len(data) * byte_s
        yield Send(data)
        if (yield from _answer(what, first, how, out_at)) == Byte.ACK:
            yield Hazard(0)
            return attempt, out_at
        yield Checkpoint()
    yield Hazard(0)
    raise TransferFailed(f"XMODEM: {what} was not acknowledged, sent {how.tries} times", stage="block", tries=how.tries)


def _answer(what: str, first: bool, how: How, out_at: float) -> Flow[int | None]:
    """ACK, NAK, or None after silence; anything else is noise."""
    now: float = yield Now()
    deadline = out_at + how.answer_s
    before = -1
    while deadline - now > MOMENT_S:
        got: bytes = yield Receive(1, deadline - max(now, out_at))  # It counts from when the block is out.
        now = yield Now()
        if not got:
            continue
        byte = got[0]
        if byte == Byte.ACK or (byte == Byte.NAK and now >= out_at):
            return byte
        if byte == Byte.NAK:
            deadline = min(deadline, out_at + TWICE_S)
        if byte == Byte.CRC and first and now - out_at > SETTLE_S:
            return Byte.NAK
        if byte == Byte.CAN and before == Byte.CAN:
            yield Hazard(0)
            raise _canceled(f"at {what}")
        before = byte
    return None


def _canceled(where: str) -> TransferFailed:
    return TransferFailed(f"XMODEM: the receiver canceled {where}", stage="canceled", canceled_by="receiver")
