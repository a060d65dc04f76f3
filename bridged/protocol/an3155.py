"""The USART protocol of the STM32 ROM loader (ST AN3155), host side, complete.

Each command is a flow: a generator over the steps of ``flow.py``. It knows bytes, stages and their answers; it knows no chip,
no retry, no file descriptor. Times come in as arguments, because they belong to chips and to adapters.

Every command has its section in AN3155 under the name that it has here. Rules kept, all from AN3155 unless noted:

- 8E1. A command is its opcode and the complement; blocks end with the XOR of their bytes; multi-byte numbers are big-endian.
- The ACK of a stage is awaited before the next stage is sent, and before its payload is read: a NACK is one byte only, and a
  loader that programs or erases does not read its USART (one-byte receiver), so what is sent early is lost.
- Exactly the bytes that an answer has are read. A stale byte can therefore never be taken for the answer of a later step.
- After a NACK the line is listened to for a moment: some loaders send two under readout protection (AN2606).
- An erase, or a command that ends in an option-byte write, declares its hazard before its last frame is sent (P9). Who called
  it ends the hazard, when the loader has answered another command.

An ACK proves nothing about the content of the flash: ST's public code of this protocol acknowledges whatever the flash driver
returned. Only reading back, or a checksum computed on the target, proves it; that is the session's business.

One document, so one file: a command is found here under the name that it has there.
"""

from __future__ import annotations

import sys
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from bridged.errors import (
    ApplicationRunning,
    EraseTimeout,
    FactValue,
    Garbled,
    LoaderError,
    Loopback,
    Nack,
    NoReply,
    NoSync,
    SyncNoise,
    Unsupported,
)
from bridged.protocol.flow import Checkpoint, Drain, Flow, Hazard, Receive, Send

ACK = 0x79
ACK_BYTE = bytes((ACK,))
NACK = 0x1F
SYNC = 0x7F

MAX_BLOCK = 256  # One length byte, n - 1: AN3155
NACK_QUIET_S = 0.02  # Two NACKs come back to back; 20 ms is long against a byte at 1200 baud (9 ms).
STALE_QUIET_S = 0.005  # Before a list of sectors is sent: long against a byte, short against an erase.
GET_QUIET_S = 0.02  # "until the line is quiet": for a Get whose count is wrong (H743 loader V9.0, AN2606).


class Command(IntEnum):
    """Opcodes by their AN3155 names."""

    GET = 0x00
    GET_VERSION = 0x01
    GET_ID = 0x02
    READ_MEMORY = 0x11
    GO = 0x21
    WRITE_MEMORY = 0x31
    ERASE = 0x43
    EXTENDED_ERASE = 0x44
    SPECIAL = 0x50
    EXTENDED_SPECIAL = 0x51
    WRITE_PROTECT = 0x63
    WRITE_UNPROTECT = 0x73
    READOUT_PROTECT = 0x82
    READOUT_UNPROTECT = 0x92
    GET_CHECKSUM = 0xA1

    @property
    def title(self) -> str:
        return self.name.replace("_", " ").title()


class MassErase(IntEnum):
    """Special page counts of Extended Erase (AN3155)."""

    ALL = 0xFFFF
    BANK_1 = 0xFFFE
    BANK_2 = 0xFFFD


@dataclass(frozen=True, slots=True)
class Timing:
    """How long to wait, in seconds. ``byte_s`` is the time of one 11-bit frame at the session's baud rate."""

    byte_s: float
    sync_s: float = 0.15
    ack_s: float = 0.25
    data_s: float = 0.25

    @classmethod
    def at(cls, baud: int, *, adapter_s: float = 0.0) -> Timing:
        """The defaults at ``baud``, with twice the latency of an adapter added to each."""
        return cls(11 / baud, 0.15 + 2 * adapter_s, 0.25 + 2 * adapter_s, 0.25 + 2 * adapter_s)


@dataclass(frozen=True, slots=True)
class Loader:
    """What Get told. ``version``: e.g. 0x31 for 3.1. ``odd``: the announced count was not what came."""

    version: int
    commands: frozenset[int]
    announced: int
    odd: bool = False

    @property
    def version_text(self) -> str:
        return f"{self.version >> 4}.{self.version & 15}"

    @property
    def erase_command(self) -> Command:
        """Which of the two erase commands this loader has. Raises ``Unsupported`` when neither."""
        for command in (Command.EXTENDED_ERASE, Command.ERASE):
            if command in self.commands:
                return command
        raise Unsupported("the loader lists neither Erase (0x43) nor Extended Erase (0x44)")


@dataclass(frozen=True, slots=True)
class SyncAnswer:
    """``already``: the loader had been synchronised before, so it was not reset. ``junk``: bytes before the answer."""

    already: bool
    junk: bytes = b""


def complement(value: int) -> int:
    return value ^ 0xFF


def checksum(data: bytes) -> int:
    """XOR of all bytes (AN3155)."""
    # Folded as one long number: 2 us for a block, where a loop over its bytes takes 15, between an ACK and the next frame.
    value, bits = int.from_bytes(data, "little"), 4 << len(data).bit_length()
    while bits > 4:
        value, bits = (value >> bits) ^ (value & ((1 << bits) - 1)), bits // 2
    return value


def with_checksum(data: bytes) -> bytes:
    return data + bytes([checksum(data)])


def address_frame(address: int) -> bytes:
    """Four bytes, most significant first, and their XOR. Raises ``ValueError`` beyond 32 bits."""
    return with_checksum(address.to_bytes(4, "big"))


# --- building blocks ----------------------------------------------------------------------------------------------


def _describe(command: Command, stage: str, address: int | None) -> str:
    where = "" if address is None else f" at {address:#010x}"
    return f"{command.title} ({command:#04x}){where}, {stage}"


def expect_ack(
    command: Command,
    stage: str,
    timeout_s: float,
    *,
    address: int | None = None,
    silence: type[LoaderError] = NoReply,
) -> Flow[None]:
    """Wait for the ACK of ``stage``. Raises ``Nack``, ``Garbled``, or ``silence`` after ``timeout_s``."""
    got: bytes = yield Receive(1, timeout_s)
    if got != ACK_BYTE:
        yield from _refused(got, command, stage, timeout_s, address=address, silence=silence)


def _refused(
    got: bytes,
    command: Command,
    stage: str,
    timeout_s: float,
    *,
    address: int | None = None,
    silence: type[LoaderError] = NoReply,
) -> Flow[None]:
    """What came (nothing, or one byte) instead of the ACK of ``stage``, as an error with what follows it."""
    what = _describe(command, stage, address)
    facts: dict[str, FactValue] = {"command": command.title, "opcode": int(command), "stage": stage}
    if address is not None:
        facts["address"] = address
    if not got:
        raise silence(f"{what}: no answer within {timeout_s:.3g} s, expected ACK", timeout_s=timeout_s, **facts)
    rest: bytes = yield Drain(NACK_QUIET_S, 10 * NACK_QUIET_S)
    if got[0] == NACK:
        nacks = 1 + rest.count(NACK)
        raise Nack(f"{what}: NACK" + (f" ({nacks} times)" if nacks > 1 else ""), nacks=nacks, **facts)
    raise Garbled(f"{what}: {(got + rest).hex(' ')} came, expected ACK (79)", received=(got + rest).hex(), **facts)


_BETWEEN = Checkpoint()
_OPENINGS = {command: Send(bytes([command, complement(command)])) for command in Command}


def _start(command: Command, timing: Timing) -> Flow[None]:
    yield _OPENINGS[command]
    yield from expect_ack(command, "opcode", timing.ack_s)


def _frame(command: Command, stage: str, data: bytes, timeout_s: float, *, address: int | None = None) -> Flow[None]:
    yield Send(data)
    yield from expect_ack(command, stage, timeout_s, address=address)


def _payload(command: Command, stage: str, count: int, timing: Timing, *, address: int | None = None) -> Flow[bytes]:
    """Exactly ``count`` bytes that follow an ACK."""
    timeout_s = timing.data_s + count * timing.byte_s
    data: bytes = yield Receive(count, timeout_s)
    if len(data) < count:
        raise _cut_short(data, command, stage, count, timeout_s, address=address)
    return data


def _cut_short(
    data: bytes, command: Command, stage: str, count: int, timeout_s: float, *, address: int | None = None
) -> LoaderError:
    return NoReply(
        f"{_describe(command, stage, address)}: {len(data)} of {count} bytes came within {timeout_s:.3g} s",
        command=command.title,
        opcode=int(command),
        stage=stage,
        address=address,
        received_bytes=len(data),
        expected_bytes=count,
    )


# --- synchronisation ----------------------------------------------------------------------------------------------


def synchronise(timing: Timing) -> Flow[SyncAnswer]:
    """Send 0x7F until the loader answers: once, and once more after silence (AN3155).

    After silence the second 0x7F tells two cases apart without a reset: if the first was lost it is answered with ACK, if the
    first ACK was lost (or the loader had been synchronised long ago) the pair 7F 7F is no command and is answered with NACK.

    Raises ``NoSync`` (silence), ``Loopback`` (our own byte came back), ``ApplicationRunning`` (text came) or ``SyncNoise``
    (anything else: the loader measured a wrong rate, or the line is noisy).
    """
    junk = b""
    for _ in range(2):
        yield Send(bytes([SYNC]))
        got: bytes = yield Receive(1, timing.sync_s)
        if not got:
            continue
        if got[0] == ACK:
            return SyncAnswer(already=False, junk=junk)
        if got[0] == NACK:
            return SyncAnswer(already=True, junk=junk)
        # One junk byte, mostly 0x00 from the moment when the target enables its TX, may come before the answer. An
        # application's text or an echo is longer; the short silence afterwards tells.
        junk += got + (yield Drain(NACK_QUIET_S, 0.2))
        if junk[0] == SYNC:
            break  # Our own byte: an echo, whatever follows.
        if junk[-1] in (ACK, NACK) and len(junk) <= 4 and not looks_like_text(junk[:-1]):
            return SyncAnswer(already=junk[-1] == NACK, junk=junk[:-1])
        break
    if not junk:
        raise NoSync(f"no byte came within {timing.sync_s:.3g} s after 0x7F, nor after a second one")
    raise _diagnose(junk)


def looks_like_text(data: bytes) -> bool:
    """Whether it is an application that speaks: at least 4 bytes, nearly all of them printable ASCII."""
    printable = sum(32 <= b < 127 or b in b"\r\n\t" for b in data)
    return len(data) >= 4 and printable >= 0.9 * len(data)


def _diagnose(junk: bytes) -> LoaderError:
    shown = junk[:64].hex(" ")
    if junk[0] == SYNC:
        return Loopback(f"0x7F came back ({shown}): what is sent is received", received=shown)
    if looks_like_text(junk.strip(b"\x00\x7f")):
        text = junk[:200].decode("ascii", "replace").strip()
        return ApplicationRunning(f"text came instead of an ACK: {text!r}", received=text)
    return SyncNoise(f"{shown} came after 0x7F, expected ACK (79)", received=shown)


def resynchronise(timing: Timing, keep_out: bytes = b"") -> Flow[Loader]:
    """Without NRST: bring a loader that waits for the rest of a command back to a command boundary.

    It has no time-out between bytes, so its command is filled up, one byte at a time, until it is refused. The filler must not
    occur in the frame that may be half received (``keep_out``, the data of a Write Memory): with one byte lost, the checksum
    would match exactly when the filler equals that byte, and rubbish would be programmed. Never use it while a list of sectors
    may be pending. In the end FF 00 must be refused exactly once, and Get answered.

    Raises ``NoReply`` when no filler is left or nothing helps.
    """
    frame = with_checksum(bytes([max(0, len(keep_out) - 1)]) + keep_out)
    # 0x00 and 0xFF are the commonest bytes of firmware, and opcode or complement of Get; they come last.
    filler = next((f for f in (0x5A, 0xA5, *range(1, 255)) if f not in frame), None)
    if filler is None:
        raise NoReply("the loader waits for the rest of a block in which every byte value occurs; only a reset helps")
    yield Drain(0.05, 0.5)
    for _ in range(MAX_BLOCK + 5):
        yield Send(bytes([filler]))
        got: bytes = yield Receive(1, 0.01)
        if got and got[0] == NACK:
            break
    else:
        raise NoReply(f"{MAX_BLOCK + 5} bytes {filler:#04x} were not refused: the loader does not listen; only a reset helps")
    yield Drain(0.05, 0.5)
    yield Send(b"\xff\x00")
    refused: bytes = yield Drain(0.05, 0.5)
    if refused != bytes([NACK]):
        raise Garbled(f"{refused.hex(' ') or 'nothing'} came after FF 00, expected one NACK (1F)", received=refused.hex())
    return (yield from get(timing))


# --- asking -------------------------------------------------------------------------------------------------------


def get(timing: Timing) -> Flow[Loader]:
    """Get: protocol version and command codes (AN3155).

    Unknown codes are kept; the number of codes is not fixed. Where the ACK is not where the count says (H743 loader V9.0
    announces 13 for 11, AN2606), the answer is read until the line is quiet and its last byte must be the ACK.
    """
    yield from _start(Command.GET, timing)
    (count,) = yield from _payload(Command.GET, "count", 1, timing)
    body: bytes = yield Receive(count + 2, timing.data_s + (count + 2) * timing.byte_s)
    odd = len(body) != count + 2 or body[-1] != ACK
    if odd:
        body += yield Drain(GET_QUIET_S, 0.5)
        if len(body) < 2 or body[-1] != ACK:
            raise Garbled(
                f"Get (0x00): count {count}, then {body.hex(' ') or 'nothing'}; expected {count + 1} bytes and an ACK",
                announced=count,
                received=body.hex(),
            )
    return Loader(version=body[0], commands=frozenset(body[1:-1]), announced=count, odd=odd)


def get_version(timing: Timing) -> Flow[tuple[int, bytes]]:
    """Get Version: protocol version and two bytes that are always 0 now (AN3155): no sign of protection."""
    yield from _start(Command.GET_VERSION, timing)
    data = yield from _payload(Command.GET_VERSION, "version", 3, timing)
    yield from expect_ack(Command.GET_VERSION, "end", timing.ack_s)
    return data[0], data[1:]


def get_id(timing: Timing) -> Flow[int]:
    """Get ID: the product id (AN3155). Where three or four bytes come (WB0, BlueNRG) the third is the product."""
    yield from _start(Command.GET_ID, timing)
    (count,) = yield from _payload(Command.GET_ID, "count", 1, timing)
    if count > 3:
        rest: bytes = yield Drain(GET_QUIET_S, 0.5)
        raise Garbled(
            f"Get ID (0x02): count {count}, then {rest.hex(' ')}; expected a count of 1", announced=count, received=rest.hex()
        )
    data = yield from _payload(Command.GET_ID, "product id", count + 1, timing)
    yield from expect_ack(Command.GET_ID, "end", timing.ack_s)
    return int.from_bytes(data, "big") if len(data) <= 2 else data[2]


# --- memory -------------------------------------------------------------------------------------------------------


def read_memory(address: int, count: int, timing: Timing) -> Flow[bytes]:
    """Read Memory: ``count`` (1..256) bytes from ``address`` (AN3155)."""
    found: list[bytes] = []

    def keep(_address: int, data: bytes) -> Flow[bool]:
        found.append(data)
        return True
        yield

    yield from read_blocks(deque([(address, count)]), timing, keep)
    return found[0]


def write_memory(address: int, data: bytes, timing: Timing, *, ack_max_s: float = 2.0) -> Flow[None]:
    """Write Memory: 1..256 bytes to ``address`` (AN3155). The last ACK comes after programming, and is no proof.

    ``ack_max_s``: the longest time that programming may take. Alignment is the caller's business.
    """
    yield from write_blocks(deque([(address, data)]), timing, _nothing, ack_max_s=ack_max_s)


def _nothing(_count: int) -> Flow[None]:
    return
    yield


# A flash job is thousands of blocks, and the time between an ACK and the next frame is all that a host adds to the wire. So a
# run of blocks is one flat flow: the frames of a block, and the caller's business with the block before, are done while the
# opcode is on the wire, when nobody waits. (Measured against one flow a block: 45 us less a block at 921600 baud.)


def read_blocks(queue: deque[tuple[int, int]], timing: Timing, take: Callable[[int, bytes], Flow[bool]]) -> Flow[None]:
    """Read Memory for each (address, 1..256 bytes) of ``queue``, which is left with what was not read.

    ``take`` is given each block's address and bytes, most of them after the next opcode was sent: it may report, and ends
    the run by False (after the command that was begun); it must not touch the line.
    A ``Checkpoint`` is between two blocks; the caller's is before the first.
    """
    command = Command.READ_MEMORY
    opening, ack = _OPENINGS[command], Receive(1, timing.ack_s)
    before: tuple[int, bytes] | None = None
    more = True
    while queue and more:
        address, count = queue[0]
        if not 1 <= count <= MAX_BLOCK:
            raise ValueError(f"Read Memory takes 1 to {MAX_BLOCK} bytes, not {count}")
        if before is not None:
            yield _BETWEEN
        yield opening
        where, length = Send(address_frame(address)), Send(bytes((count - 1, complement(count - 1))))
        payload = Receive(count, timing.data_s + count * timing.byte_s)
        if before is not None:
            more = yield from take(*before)
            before = None
        if (got := (yield ack)) != ACK_BYTE:
            yield from _refused(got, command, "opcode", timing.ack_s)
        yield where
        if (got := (yield ack)) != ACK_BYTE:
            yield from _refused(got, command, "address", timing.ack_s, address=address)
        yield length
        if (got := (yield ack)) != ACK_BYTE:
            yield from _refused(got, command, "length", timing.ack_s, address=address)
        data: bytes = yield payload
        if len(data) < count:
            raise _cut_short(data, command, "data", count, payload.timeout_s, address=address)
        if more:  # Else it was asked for before anybody knew that it is not wanted.
            queue.popleft()
            before = address, data
    if before is not None:
        yield from take(*before)


def write_blocks(
    queue: deque[tuple[int, bytes]], timing: Timing, written: Callable[[int], Flow[None]], *, ack_max_s: float
) -> Flow[None]:
    """Write Memory for each (address, 1..256 bytes) of ``queue``, which is left with what was not acknowledged.

    ``written`` is told the size of each block that was, most of them after the next opcode was sent: it may report, and must
    not touch the line. ``ack_max_s``: as in ``write_memory``. Checkpoints as in ``read_blocks``.
    """
    command = Command.WRITE_MEMORY
    opening, ack, programmed = _OPENINGS[command], Receive(1, timing.ack_s), Receive(1, ack_max_s)
    before = 0
    while queue:
        address, data = queue[0]
        if not 1 <= len(data) <= MAX_BLOCK:
            raise ValueError(f"Write Memory takes 1 to {MAX_BLOCK} bytes, not {len(data)}")
        if before:
            yield _BETWEEN
        yield opening
        where = Send(address_frame(address))
        block = Send(with_checksum(bytes((len(data) - 1,)) + data), payload_address=address)
        if before:
            yield from written(before)
            before = 0
        if (got := (yield ack)) != ACK_BYTE:
            yield from _refused(got, command, "opcode", timing.ack_s)
        yield where
        if (got := (yield ack)) != ACK_BYTE:
            yield from _refused(got, command, "address", timing.ack_s, address=address)
        yield block
        if (got := (yield programmed)) != ACK_BYTE:
            yield from _refused(got, command, "data", ack_max_s, address=address)
        queue.popleft()
        before = len(data)
    if before:
        yield from written(before)


def go(address: int, timing: Timing) -> Flow[None]:
    """Go: load SP from ``address`` and jump to the word after it (AN3155). The ACK precedes the jump."""
    yield from _start(Command.GO, timing)
    yield from _frame(Command.GO, "address", address_frame(address), timing.ack_s, address=address)


_MIRRORED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


def checksum_of(data: bytes) -> int:
    """What Get Checksum answers for ``data``, whole words: CRC-32 of polynomial 0x04C11DB7 and initial value 0xFFFFFFFF over
    little-endian words, most significant bit first (the CRC unit of an STM32; AN3155).

    zlib has the same polynomial the other way round, so bits and bytes are mirrored before and after: a MiB takes 10 ms.
    """
    words = array("I", data)
    words.byteswap()
    if sys.byteorder == "big":
        words.byteswap()
    mirrored = zlib.crc32(words.tobytes().translate(_MIRRORED)) ^ 0xFFFFFFFF
    return int.from_bytes(mirrored.to_bytes(4, "little").translate(_MIRRORED), "big")


def get_checksum(
    address: int, count: int, timing: Timing, *, compute_s: float, polynomial: int = 0x04C11DB7, initial: int = 0xFFFFFFFF
) -> Flow[int]:
    """Get Checksum (protocol 3.3 and later, AN3155): CRC over ``count`` bytes, a multiple of 4, not 0.

    The size travels in 32-bit words. ``compute_s``: how long the target may compute. Raises ``Garbled`` when the answer's own
    checksum is wrong.
    """
    if count <= 0 or count % 4 or address % 4:
        raise ValueError(f"Get Checksum works on whole words, not on {count} bytes at {address:#x}")
    command = Command.GET_CHECKSUM
    yield from _start(command, timing)
    yield from _frame(command, "address", address_frame(address), timing.ack_s, address=address)
    yield from _frame(command, "size", address_frame(count // 4), timing.ack_s, address=address)
    yield from _frame(command, "polynomial", address_frame(polynomial), timing.ack_s, address=address)
    yield from _frame(command, "initial value", address_frame(initial), timing.ack_s, address=address)
    yield from expect_ack(command, "computation", compute_s, address=address)
    data = yield from _payload(command, "checksum", 5, timing, address=address)
    if checksum(data):
        raise Garbled(f"Get Checksum (0xa1): the answer {data.hex(' ')} has a wrong checksum", received=data.hex())
    return int.from_bytes(data[:4], "big")


# --- erasing ------------------------------------------------------------------------------------------------------


def _erase(command: Command, stage: str, frame: bytes, timing: Timing, wait_s: float) -> Flow[None]:
    """Opcode, then the list, with a hazard of ``wait_s`` from the list on.

    The caller ends the hazard when the loader has answered another command: noise can look like an ACK or a NACK while the
    flash is still at work. For the same reason nothing may be waiting on the line before the list is sent.
    """
    yield from _start(command, timing)
    stale: bytes = yield Drain(STALE_QUIET_S, 0.1)
    if stale:
        raise Garbled(
            f"{_describe(command, stage, None)}: {stale.hex(' ')} came before it was sent", stage="stale", received=stale.hex()
        )
    yield Hazard(wait_s)
    yield Send(frame)
    yield from expect_ack(command, stage, wait_s, silence=EraseTimeout)


def erase(pages: Sequence[int], timing: Timing, *, wait_s: float) -> Flow[None]:
    """Erase (loaders before 3.0; AN3155): 1..255 page numbers of one byte. ``wait_s``: twice the worst case."""
    if not 1 <= len(pages) <= 255:
        raise ValueError(f"Erase takes 1 to 255 pages, not {len(pages)}")
    frame = with_checksum(bytes([len(pages) - 1, *pages]))
    yield from _erase(Command.ERASE, "page list", frame, timing, wait_s)


def erase_all(timing: Timing, *, wait_s: float) -> Flow[None]:
    """Erase, everything. FF followed by anything but 00 would be acknowledged and do nothing (AN3155)."""
    yield from _erase(Command.ERASE, "global erase", b"\xff\x00", timing, wait_s)


def extended_erase(pages: Sequence[int], timing: Timing, *, wait_s: float) -> Flow[None]:
    """Extended Erase (AN3155): page numbers of two bytes.

    At most 128 a command: ST's public code keeps only the last 581 of a longer list and acknowledges all the same, and a short
    list bounds the time without news. Raises ``ValueError`` outside 1..128.
    """
    if not 1 <= len(pages) <= 128:
        raise ValueError(f"Extended Erase is used with 1 to 128 pages, not {len(pages)}")
    body = (len(pages) - 1).to_bytes(2, "big") + b"".join(page.to_bytes(2, "big") for page in pages)
    yield from _erase(Command.EXTENDED_ERASE, "page list", with_checksum(body), timing, wait_s)


def extended_erase_special(what: MassErase, timing: Timing, *, wait_s: float) -> Flow[None]:
    """Extended Erase of a bank or of everything (AN3155)."""
    frame = with_checksum(what.to_bytes(2, "big"))
    yield from _erase(Command.EXTENDED_ERASE, f"{what.name.lower()} erase", frame, timing, wait_s)


# --- special commands ---------------------------------------------------------------------------------------------


def _counted(data: bytes) -> bytes:
    """Two bytes of length, the data, the XOR of all (AN3155)."""
    return with_checksum(len(data).to_bytes(2, "big") + data)


def _subcode(command: Command, subcode: int, timing: Timing) -> Flow[None]:
    yield from _start(command, timing)
    yield from _frame(command, "sub-code", with_checksum(subcode.to_bytes(2, "big")), timing.ack_s)


def _answer(command: Command, stage: str, timing: Timing) -> Flow[bytes]:
    length = int.from_bytes((yield from _payload(command, f"{stage} length", 2, timing)), "big")
    return (yield from _payload(command, stage, length, timing)) if length else b""


def special(subcode: int, data: bytes, timing: Timing, *, wait_s: float) -> Flow[tuple[bytes, bytes]]:
    """Special (AN3155): sub-code and up to 128 bytes; returns (data, status).

    ``wait_s``: how long the ACK of the data may take, which is when the function is carried out; it is declared as a hazard,
    because sub-codes change option bytes and product states (AN2606). Never send one on a guess.
    """
    if len(data) > 128:
        raise ValueError(f"Special takes up to 128 bytes, not {len(data)}")
    command = Command.SPECIAL
    yield from _subcode(command, subcode, timing)
    yield Hazard(wait_s)
    yield from _frame(command, "data", _counted(data), wait_s)
    answer = yield from _answer(command, "answer", timing)
    status = yield from _answer(command, "status", timing)
    yield from expect_ack(command, "end", timing.ack_s)
    yield Hazard(0)
    return answer, status


def extended_special(subcode: int, first: bytes, second: bytes, timing: Timing, *, wait_s: float) -> Flow[bytes]:
    """Extended Special (AN3155): sub-code, up to 128 and up to 1024 bytes; returns the status."""
    if len(first) > 128 or len(second) > 1024:
        raise ValueError(f"Extended Special takes up to 128 and 1024 bytes, not {len(first)} and {len(second)}")
    command = Command.EXTENDED_SPECIAL
    yield from _subcode(command, subcode, timing)
    yield from _frame(command, "first data", _counted(first), timing.ack_s)
    yield Hazard(wait_s)
    yield from _frame(command, "second data", _counted(second), wait_s)
    status = yield from _answer(command, "status", timing)
    yield from expect_ack(command, "end", timing.ack_s)
    yield Hazard(0)
    return status


# --- protection: each of these ends in a system reset of the target -----------------------------------------------


def _protection(command: Command, timing: Timing, wait_s: float) -> Flow[None]:
    """Two ACKs, the second when it is done, or before (AN3155; ST's public code sends both first).

    The hazard is therefore *not* ended here: the caller lets ``wait_s`` pass, resets the target and synchronises from nothing.
    """
    yield Hazard(wait_s)
    yield from _start(command, timing)
    yield from expect_ack(command, "end", wait_s)


def write_protect(sectors: Sequence[int], timing: Timing, *, wait_s: float) -> Flow[None]:
    """Write Protect (AN3155): replaces the former set; 1..256 sector codes. The target resets."""
    if not 1 <= len(sectors) <= 256:
        raise ValueError(f"Write Protect takes 1 to 256 sectors, not {len(sectors)}")
    command = Command.WRITE_PROTECT
    yield from _start(command, timing)
    yield Hazard(wait_s)
    yield from _frame(command, "sector list", with_checksum(bytes([len(sectors) - 1, *sectors])), wait_s)


def write_unprotect(timing: Timing, *, wait_s: float) -> Flow[None]:
    """Write Unprotect (AN3155). The target resets."""
    yield from _protection(Command.WRITE_UNPROTECT, timing, wait_s)


def readout_protect(timing: Timing, *, wait_s: float) -> Flow[None]:
    """Readout Protect, level 1 (AN3155). The target resets."""
    yield from _protection(Command.READOUT_PROTECT, timing, wait_s)


def readout_unprotect(timing: Timing, *, wait_s: float) -> Flow[None]:
    """Readout Unprotect (AN3155): erases the whole flash and the RAM, then the target resets."""
    yield from _protection(Command.READOUT_UNPROTECT, timing, wait_s)
