"""The board: one memfd that the session process writes and the daemon reads, also after a SIGKILL of either.

It holds what must outlive the session process: how far it is, until when a hazard lasts (P9), whether a line could not be
driven, its result, and the flight recorder: the latest bytes of the dialogue with their times. Image content that was sent
is recorded as a reference (address and length), not again.

Layout: a header of one page, the result as JSON up to ``RESULT_BYTES``, then two halves of the recorder in turn.
Times are ``CLOCK_MONOTONIC`` seconds,
which all processes of one boot share. Standard library only.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridged.protocol.flow import Send

HEADER_BYTES = 4096
RESULT_BYTES = 128 * 1024  # Of JSON. An error that quotes 4 KiB of noise twice in hexadecimal has some 20 KiB.
HALF_BYTES = 512 * 1024  # The recorder keeps one to two of these; what was sent of the image is a reference.
SIZE_BYTES = HEADER_BYTES + RESULT_BYTES + 2 * HALF_BYTES
MAX_HAZARD_S = 600.0  # Twice the longest erase of the chip table is 129 s; a torn or mad entry must not stop a target for ever.
MAGIC = b"BRBOARD1"

_MAGIC = struct.Struct("<8s")
_PROGRESS = struct.Struct("<QQ")  # done, beat
_HAZARD = struct.Struct("<d")
_LENGTH = struct.Struct("<Q")
_RECORD = struct.Struct("<dBI")  # time, kind, length of what follows

_AT_PROGRESS, _AT_HAZARD, _AT_LINES, _AT_RESULT, _AT_HALF, _AT_USED = 16, 40, 48, 56, 64, 72
_RING = HEADER_BYTES + RESULT_BYTES
SENT, RECEIVED, REFERENCE, NOTE, BARE = 1, 2, 3, 4, 5


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of the flight recorder. ``kind``: SENT, RECEIVED, REFERENCE (address and length), BARE (the same, of content
    whose frame has entries of its own) or NOTE (text)."""

    at: float
    kind: int
    data: bytes


class Board:
    """Both ends of the shared memory. ``create`` in the daemon, ``attach`` in the session process."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, SIZE_BYTES)
        self._half = self._used = 0

    @classmethod
    def create(cls) -> Board:
        fd = os.memfd_create("bridged-board", os.MFD_CLOEXEC)
        os.ftruncate(fd, SIZE_BYTES)
        board = cls(fd)
        _MAGIC.pack_into(board._map, 0, MAGIC)
        return board

    @classmethod
    def attach(cls, fd: int) -> Board:
        board = cls(fd)
        if _MAGIC.unpack_from(board._map, 0)[0] != MAGIC:
            raise ValueError("descriptor is not a board of this version")
        return board

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)

    # --- written by the session process ---------------------------------------------------------------------------

    def set_progress(self, done: int) -> None:
        beat = _PROGRESS.unpack_from(self._map, _AT_PROGRESS)[1]
        _PROGRESS.pack_into(self._map, _AT_PROGRESS, done, beat + 1)

    def set_hazard(self, until: float) -> None:
        """``until``: monotonic time, 0 for none."""
        _HAZARD.pack_into(self._map, _AT_HAZARD, until)

    def set_lines_failed(self) -> None:
        self._map[_AT_LINES] = 1

    def set_result(self, data: dict[str, Any]) -> None:
        text = json.dumps(data).encode()
        if len(text) > RESULT_BYTES:
            raise ValueError(f"a result of {len(text)} bytes does not fit into {RESULT_BYTES}")
        self._map[HEADER_BYTES : HEADER_BYTES + len(text)] = text
        _LENGTH.pack_into(self._map, _AT_RESULT, len(text))  # Last: a reader sees a whole result or none.

    def record(self, kind: int, data: bytes, at: float | None = None) -> None:
        """Append to the recorder. When a half is full the other, older half is given up: a record is never cut in two."""
        data = data[: HALF_BYTES // 4]
        size = _RECORD.size + len(data)
        if self._used + size > HALF_BYTES:
            self._half, self._used = 1 - self._half, 0
            _LENGTH.pack_into(self._map, _AT_HALF, self._half)
        start = _RING + self._half * HALF_BYTES + self._used
        _RECORD.pack_into(self._map, start, time.monotonic() if at is None else at, kind, len(data))
        self._map[start + _RECORD.size : start + size] = data
        self._used += size
        _LENGTH.pack_into(self._map, _AT_USED + 8 * self._half, self._used)

    def record_sent(self, step: Send, at: float) -> None:
        """Append what was sent: image content by its address, since who looks at it has the image."""
        if step.payload_address is None:
            self.record(SENT, step.data, at)
            return
        content = reference(step.payload_address, len(step.data) - step.before - step.behind)
        if (step.before, step.behind) == (1, 1):
            self.record(REFERENCE, content, at)
            return
        self.record(SENT, step.data[: step.before], at)
        self.record(BARE, content, at)
        self.record(SENT, step.data[-step.behind :], at)

    # --- read by the daemon ---------------------------------------------------------------------------------------

    @property
    def done(self) -> int:
        return int(_PROGRESS.unpack_from(self._map, _AT_PROGRESS)[0])

    @property
    def hazard_until(self) -> float:
        return float(_HAZARD.unpack_from(self._map, _AT_HAZARD)[0])

    @property
    def hazard_left_s(self) -> float:
        """Of an entry that makes no sense the longest time is taken: too long only costs time (P9)."""
        left = self.hazard_until - time.monotonic()
        return max(0.0, left) if left <= MAX_HAZARD_S else MAX_HAZARD_S

    @property
    def lines_failed(self) -> bool:
        return bool(self._map[_AT_LINES])

    def result(self) -> dict[str, Any] | None:
        length = int(_LENGTH.unpack_from(self._map, _AT_RESULT)[0])
        if not 0 < length <= RESULT_BYTES:
            return None
        try:
            data = json.loads(self._map[HEADER_BYTES : HEADER_BYTES + length])
        except (ValueError, RecursionError):
            return None
        return data if isinstance(data, dict) else None

    def records(self) -> list[Record]:
        """The flight recorder, oldest first. A record that was being written when its writer was killed is left out."""
        now = int(_LENGTH.unpack_from(self._map, _AT_HALF)[0]) & 1
        found: list[Record] = []
        for half in (1 - now, now):
            used = min(int(_LENGTH.unpack_from(self._map, _AT_USED + 8 * half)[0]), HALF_BYTES)
            at = 0
            while at + _RECORD.size <= used:
                when, kind, length = _RECORD.unpack_from(self._map, _RING + half * HALF_BYTES + at)
                at += _RECORD.size
                if at + length > used:
                    break
                start = _RING + half * HALF_BYTES + at
                found.append(Record(when, kind, bytes(self._map[start : start + length])))
                at += length
        return found

    def trace(self) -> str:
        """The recorder as text, in the form of the golden transcripts: ``> `` to the target, ``< `` from it, ``= `` image
        content sent (address, length), ``# `` what the session did. First column: seconds from the first record."""
        records = self.records()
        start = records[0].at if records else 0.0
        lines = []
        for record in records:
            if record.kind == NOTE:
                text = "# " + record.data.decode("utf-8", "replace")
            elif record.kind == REFERENCE and len(record.data) == _REFERENCE.size:
                address, count = _REFERENCE.unpack(record.data)
                text = f"= {address:#010x} {count}"
            elif record.kind == BARE and len(record.data) == _REFERENCE.size:
                address, count = _REFERENCE.unpack(record.data)
                text = f"= {address:#010x} {count} 0"
            else:
                text = ("> " if record.kind == SENT else "< ") + record.data.hex(" ").upper()
            lines.append(f"{record.at - start:12.6f} {text}")
        return "\n".join(lines) + ("\n" if lines else "")


_REFERENCE = struct.Struct("<II")


def reference(address: int, count: int) -> bytes:
    """The data of a REFERENCE record."""
    return _REFERENCE.pack(address, count)
