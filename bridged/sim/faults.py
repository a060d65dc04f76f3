"""Faults on request, by position: what a bad wire, a worn flash or an unlucky moment do to a session.

A fault is one text, the same on the command line and in a test; ``parse`` refuses what it does not know and says what would
be right. Each fault happens once, unless its last field is ``*``. Positions count from 0.

    lose:rx:N  lose:tx:N           byte number N is lost; rx: host to device, tx: device to host
    flip:rx:N[:MASK]               its bits in MASK (default 0x01) are flipped
    insert:rx:N[:VALUE]            a byte (default 0x00) comes before byte number N; tx likewise
    lose:OPCODE:K:STAGE            by command instead of byte: the ACK of STAGE of the K-th OPCODE command is lost
    flip:OPCODE:K:STAGE[:MASK]     that ACK arrives changed
    late:OPCODE:K:STAGE:SECONDS    that ACK comes late
    nack:OPCODE:K[:STAGE]          that stage (default ``opcode``) is refused
    hang:OPCODE:K[:STAGE]          the loader hangs before it answers that stage
    erase-hang:K                   the K-th erase command never ends
    reset:rx:N                     the target resets by itself (supply, watchdog) after byte number N from the host
    hang:rx:N                      it hangs there
    power:rx:N                     its supply fails there and stays off until somebody switches it on
    misprogram:ADDRESS[:MASK]      a bit of the byte at ADDRESS is programmed wrong (once; ``:*`` a stuck cell)
    misread:ADDRESS[:MASK]         a read-back of that byte is wrong once

STAGE: ``opcode``, ``address``, ``length``, ``data``, ``list``, ``words``, ``poly``, ``init``, ``done``.
This module decides only *whether* something happens; the device does it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from bridged.errors import BadRequest

STAGES = ("opcode", "address", "length", "data", "list", "words", "poly", "init", "done")
_BYTE_ACTIONS = ("lose", "flip", "insert", "reset", "hang", "power")
_STAGE_ACTIONS = ("lose", "flip", "late", "nack", "hang")
_CELL_ACTIONS = ("misprogram", "misread")


@dataclass(frozen=True, slots=True)
class ByteFault:
    """At byte ``index`` of ``direction`` (``rx`` or ``tx``). ``value``: the mask of a flip, the byte of an insert."""

    action: str
    direction: str
    index: int
    value: int = 0


@dataclass(frozen=True, slots=True)
class StageFault:
    """At ``stage`` of the ``occurrence``-th command ``opcode``. ``seconds`` for ``late``, ``mask`` for ``flip``."""

    action: str
    opcode: int
    occurrence: int
    stage: str
    mask: int = 0
    seconds: float = 0.0
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class CellFault:
    action: str
    address: int
    mask: int = 1
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class EraseHang:
    occurrence: int


Fault = ByteFault | StageFault | CellFault | EraseHang


def parse(text: str) -> Fault:
    """One fault from its text. Raises ``BadRequest`` with what would be right."""
    fields = text.strip().split(":")
    repeated = len(fields) > 1 and fields[-1] == "*"
    if repeated:
        fields.pop()
    action, rest = fields[0], fields[1:]
    try:
        if action == "erase-hang" and len(rest) == 1 and not repeated:
            return EraseHang(_number(rest[0]))
        if action in _CELL_ACTIONS and len(rest) in (1, 2):
            return CellFault(action, _number(rest[0]), _byte(rest[1]) if len(rest) == 2 else 1, repeated)
        if rest and rest[0] in ("rx", "tx") and action in _BYTE_ACTIONS and not repeated:
            return _byte_fault(action, rest)
        if action in _STAGE_ACTIONS and len(rest) >= 2:
            return _stage_fault(action, rest, repeated)
    except ValueError as error:
        raise BadRequest(f"fault {text!r}: {error}", fault=text) from error
    known = ", ".join(sorted({*_BYTE_ACTIONS, *_STAGE_ACTIONS, *_CELL_ACTIONS, "erase-hang"}))
    raise BadRequest(
        f"fault {text!r} is not understood; known: {known}; for example lose:rx:1234, nack:0x31:5, misprogram:0x08001000",
        fault=text,
    )


def _number(text: str) -> int:
    value = int(text, 0)
    if value < 0:
        raise ValueError(f"{text} is negative")
    return value


def _byte(text: str) -> int:
    value = _number(text)
    if value > 0xFF:
        raise ValueError(f"{text} is more than a byte")
    return value


def _byte_fault(action: str, rest: list[str]) -> ByteFault:
    takes_value = action in ("flip", "insert")
    if not 2 <= len(rest) <= 2 + takes_value:
        raise ValueError("expected DIRECTION:INDEX" + (":VALUE" if takes_value else ""))
    if action in ("reset", "hang", "power") and rest[0] != "rx":
        raise ValueError(f"{action} counts the bytes from the host: rx")
    value = _byte(rest[2]) if len(rest) == 3 else int(action == "flip")
    return ByteFault(action, rest[0], _number(rest[1]), value)


def _stage_fault(action: str, rest: list[str], repeated: bool) -> StageFault:
    opcode, occurrence = _byte(rest[0]), _number(rest[1])
    stage = rest[2] if len(rest) > 2 else "opcode"
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is none of {', '.join(STAGES)}")
    more = rest[3:]
    if action in ("lose", "flip", "late") and len(rest) < 3:
        raise ValueError("expected OPCODE:OCCURRENCE:STAGE")
    if action == "late":
        if len(more) != 1:
            raise ValueError("expected OPCODE:OCCURRENCE:STAGE:SECONDS")
        seconds = float(more[0])
        if not 0 <= seconds < 1e6:
            raise ValueError(f"{more[0]} is not a time in seconds")
        return StageFault(action, opcode, occurrence, stage, seconds=seconds, repeated=repeated)
    if len(more) > (action == "flip"):
        raise ValueError(f"too many fields: {':'.join(more)}")
    mask = _byte(more[0]) if more else 0x80
    return StageFault(action, opcode, occurrence, stage, mask=mask, repeated=repeated)


class Faults:
    """The faults of one device, asked at each place where one could happen. Remembers what did (``happened``)."""

    def __init__(self, faults: Iterable[Fault | str] = ()) -> None:
        self.happened: list[Fault] = []
        self._bytes: dict[str, list[ByteFault]] = {"rx": [], "tx": []}
        self._stages: list[StageFault] = []
        self._cells: list[CellFault] = []
        self._erases: list[EraseHang] = []
        self._count = {"rx": 0, "tx": 0}
        self._commands: Counter[int] = Counter()
        self._erase_count = 0
        for fault in faults:
            self.add(fault)

    def add(self, fault: Fault | str) -> None:
        known = parse(fault) if isinstance(fault, str) else fault
        if isinstance(known, ByteFault):
            self._bytes[known.direction].append(known)
            self._bytes[known.direction].sort(key=lambda f: f.index)
        elif isinstance(known, StageFault):
            self._stages.append(known)
        elif isinstance(known, CellFault):
            self._cells.append(known)
        else:
            self._erases.append(known)

    def next_bytes(self, direction: str, count: int) -> list[tuple[int, ByteFault]]:
        """Faults within the next ``count`` bytes of this direction, with their offsets; counts these bytes."""
        first = self._count[direction]
        self._count[direction] = first + count
        pending = self._bytes[direction]
        if not pending or pending[0].index >= first + count:
            return []
        hit = [f for f in pending if f.index < first + count]
        self._bytes[direction] = pending[len(hit) :]
        self.happened += [f for f in hit if f.index >= first]
        return [(f.index - first, f) for f in hit if f.index >= first]

    def command(self, opcode: int) -> None:
        """A command with this opcode begins."""
        self._commands[opcode] += 1

    def stage(self, opcode: int, stage: str) -> StageFault | None:
        """The fault for this stage of the command that began last, if any."""
        if not self._stages:
            return None
        occurrence = self._commands[opcode] - 1
        for fault in self._stages:
            if fault.opcode == opcode and fault.stage == stage:
                exact = fault.occurrence == occurrence
                if exact or (fault.repeated and occurrence >= fault.occurrence):
                    if not fault.repeated:
                        self._stages.remove(fault)
                    self.happened.append(fault)
                    return fault
        return None

    def erase_hangs(self) -> bool:
        """An erase command begins: does it ever end?"""
        number = self._erase_count
        self._erase_count += 1
        for fault in self._erases:
            if fault.occurrence == number:
                self.happened.append(fault)
                return True
        return False

    def cells(self, action: str, address: int, data: bytes) -> bytes:
        """``data`` as it is after the faults of cells in its range (``misprogram`` or ``misread``)."""
        if not self._cells:
            return data
        changed = bytearray(data)
        for fault in list(self._cells):
            if fault.action == action and address <= fault.address < address + len(data):
                changed[fault.address - address] ^= fault.mask
                self.happened.append(fault)
                if not fault.repeated:
                    self._cells.remove(fault)
        return bytes(changed)
