"""Unfinished uploads on disk: how far each surely is, what it was promised, and which of them give way.

``uploads/<principal>/<sha256>.part`` is the file on its way, the ``.json`` beside it its announced size and synced offset. An
offset that was reported was on disk before, and is reported again after a power cut. After a crash only bytes that a completed
sync covers count: see ``_recover_part``.

It shares the lock of its ``Store``, and knows of staged images only what it is told of the room that they leave.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bridged.errors import BadRequest, StorageFull, TooMany
from bridged.images.durable import disk, modified_s, read_json, sync_directory, write_file
from bridged.images.parser import TYPE_HINTS
from bridged.images.staged import SHA256, Announced, Pending

SYNC_BYTES = 256 * 1024  # Each sync costs an SD card an erase block or so; a client on a bad link loses at most this much.
STALE_S = 24 * 3600.0  # An upload that nobody went on with for so long is given up.
MAX_PARTS = 256  # Unfinished uploads: two files and an entry of the index each.
MAX_PARTS_EACH = 64  # Of one principal, so that the others can still send something.
PARTS_SHARE = 2  # Unfinished uploads may promise 1/2 of the space; else a few first bytes would keep everybody out for a day.
GIVE_WAY_S = 600.0  # An upload paused for so long is given up when another one has no room; a bad link comes back sooner.

CheckRoom = Callable[[str, int, int, bool], None]  # principal, more bytes to promise, bytes to come, whether it is a new one


@dataclass(slots=True)
class Part:
    """An upload that is not complete. ``offset``: bytes that are surely on disk; ``noted``: what the sidecar there says.

    ``announced``: its sender was told that there is one, so it is kept before its first byte has come, too.
    """

    principal: str
    sha256: str
    size_bytes: int
    offset: int
    noted: int
    active: bool = False
    announced: bool = False
    name: str = ""
    type_hint: str = "auto"


class Parts:
    """``root``: the directory of uploads. ``limit_bytes``: what they may promise together. Principals are plain names here."""

    def __init__(self, root: Path, lock: threading.RLock, limit_bytes: int, now: Callable[[], float]) -> None:
        self._root = root
        self._lock = lock
        self._limit_bytes = limit_bytes
        self._now = now
        self._parts: dict[tuple[str, str], Part] = {}

    @property
    def promised_bytes(self) -> int:
        """What unfinished uploads will take when they are complete."""
        return sum(part.size_bytes for part in self._parts.values())

    @property
    def synced_bytes(self) -> int:
        return sum(part.offset for part in self._parts.values())

    def path(self, principal: str, sha256: str) -> Path:
        return self._root / principal / f"{sha256}.part"

    def furthest(self, sha256: str, principal: str | None = None) -> Part | None:
        """The upload of this file that got furthest, of ``principal`` or of anybody."""
        found = [p for p in self._parts.values() if p.sha256 == sha256 and principal in (None, p.principal)]
        return max(found, key=lambda p: p.offset, default=None)

    def pending(self, principal: str, sha256: str) -> Pending | None:
        part = self._parts.get((principal, sha256))
        if part is None:
            return None
        expires = (modified_s(self.path(principal, sha256)) or self._now()) + STALE_S
        return Pending(self.reported(part), part.size_bytes, part.name, part.type_hint, expires)

    def discard(self, principal: str, sha256: str) -> bool:
        """Whether there was one. Raises ``TooMany`` while its bytes come in."""
        part = self._parts.get((principal, sha256))
        if part is None:
            return False
        if part.active:
            raise TooMany(f"image {sha256[:12]} is being uploaded by another connection", offset=self.reported(part))
        self.forget(part)
        return True

    def open(
        self, principal: str, wanted: Announced, check_room: CheckRoom, announced: bool = False
    ) -> tuple[int, Part, Announced]:
        """The file at the offset that is asked for, its part, and what is known of it now.

        Raises ``TooMany`` (it is being uploaded now), ``BadRequest`` (the offset is another one), what ``check_room`` raises.
        """
        sha256, size, offset = wanted.sha256, wanted.size_bytes, wanted.offset
        path = self.path(principal, sha256)
        part = self._parts.get((principal, sha256))
        if part and part.active:
            raise TooMany(
                f"image {sha256[:12]} is being uploaded by another connection; wait for its end", offset=self.reported(part)
            )
        if part and (not path.exists() or path.stat().st_size < part.offset):
            self.forget(part)  # Somebody tidied up by hand, or the disk failed in the middle of a rename.
            part = None
        at = self.reported(part) if part else 0
        if offset and (part is None or offset != at or size != part.size_bytes):
            whole = f" of {part.size_bytes}" if part else ""
            raise BadRequest(
                f"the upload of {sha256[:12]} goes on at offset {at}{whole}, the request says {offset} of {size}", offset=at
            )
        if part:
            part.active = True  # Not one of those that give way.
        try:
            check_room(principal, size - (part.size_bytes if part else 0), size - offset, part is None)
        finally:
            if part:
                part.active = False
        announced = announced or (part is not None and part.announced)
        part = Part(
            principal,
            sha256,
            size,
            offset,
            noted=offset,
            active=True,
            announced=announced,
            name=wanted.name or (part.name if part else ""),
            type_hint=wanted.type_hint if part is None or wanted.type_hint != "auto" else part.type_hint,
        )
        wanted = replace(wanted, name=part.name, type_hint=part.type_hint)
        with disk("start an upload"):
            if not path.parent.exists():
                path.parent.mkdir(mode=0o700)
                sync_directory(path.parent.parent)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, offset)
                os.lseek(fd, offset, os.SEEK_SET)
                self._write_sidecar(path, part, offset)  # syncs the directory, and with it the name of the part
            except BaseException:
                os.close(fd)
                raise
        self._parts[(principal, sha256)] = part
        return fd, part, wanted

    def close(self, part: Part, synced: int) -> None:
        """An upload paused with ``synced`` bytes on disk."""
        path = self.path(part.principal, part.sha256)
        with self._lock:
            part.active = False
            part.offset = synced
            if not synced and not part.announced:
                self.forget(part)
                return
            with disk("pause an upload"):
                self._write_sidecar(path, part, synced)
            part.noted = synced

    def forget(self, part: Part) -> None:
        path = self.path(part.principal, part.sha256)
        with self._lock:
            part.active = False
            self._parts.pop((part.principal, part.sha256), None)
            with contextlib.suppress(OSError):  # What cannot be removed now is removed as stale later.
                path.unlink(missing_ok=True)
                path.with_suffix(".json").unlink(missing_ok=True)
                path.parent.rmdir()

    def reported(self, part: Part) -> int:
        """The offset that a client may be told. It is noted first: a power cut at a multiple of SYNC_BYTES leaves a length from
        which ``_recover_part`` must not conclude that the last step was synced, and the client would be told less than before.
        """
        with self._lock:
            offset = part.offset
            if offset <= part.noted:
                return offset
            try:
                self._write_sidecar(self.path(part.principal, part.sha256), part, offset)
            except OSError:
                return part.noted
            part.noted = offset
            return offset

    # --- room -------------------------------------------------------------------------------------------------

    def check(self, principal: str, more_bytes: int, new: bool) -> None:
        """Whether there may be one more, and of that size. Raises ``TooMany`` and ``StorageFull``."""
        if new and self._own_parts(principal) >= MAX_PARTS_EACH:
            raise TooMany(f"there are {MAX_PARTS_EACH} unfinished uploads of {principal} already", limit=MAX_PARTS_EACH)
        if new and len(self._parts) >= MAX_PARTS:
            raise TooMany(f"there are {MAX_PARTS} unfinished uploads already", limit=MAX_PARTS)
        pending = self.promised_bytes
        if pending + more_bytes > self._limit_bytes:
            raise StorageFull(
                f"{more_bytes} more bytes do not fit: unfinished uploads have {pending} of {self._limit_bytes} bytes",
                used_bytes=pending,
                limit_bytes=self._limit_bytes,
            )

    def make_way(self, principal: str, more_bytes: int, new: bool, room_bytes: int) -> None:
        """Where an upload would find no room, give up others that were paused for long, the longest paused first.

        ``room_bytes``: what is left for uploads as a whole, whatever each of them was promised.
        """
        paused = [(modified_s(self.path(p.principal, p.sha256)), p) for p in self._parts.values() if not p.active]
        for since, part in sorted(paused, key=lambda found: found[0]):
            full = new and len(self._parts) >= MAX_PARTS
            own = new and self._own_parts(principal) >= MAX_PARTS_EACH
            bytes_left = min(self._limit_bytes, room_bytes) - self.promised_bytes
            if self._now() - since < GIVE_WAY_S or not (full or own or more_bytes > bytes_left):
                return
            if full or more_bytes > bytes_left or part.principal == principal:
                self.forget(part)

    def give_up_stale(self) -> None:
        for part in [p for p in self._parts.values() if not p.active]:
            path = self.path(part.principal, part.sha256)
            if not path.exists() or self._now() - path.stat().st_mtime > STALE_S:
                self.forget(part)

    def _own_parts(self, principal: str) -> int:
        return sum(part.principal == principal for part in self._parts.values())

    # --- on disk ----------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Take up what an earlier life left, and remove what is none."""
        for path in self._root.glob("*/*.part"):
            self._recover_part(path)
        for path in self._root.glob("*/*.json"):
            if not path.with_suffix(".part").exists():
                path.unlink(missing_ok=True)
        self.give_up_stale()

    def _recover_part(self, path: Path) -> None:
        """How far an upload of an earlier life surely got.

        The length of the file proves nothing: a file system may have made it longer before the data was on disk. But the
        writer never went past a multiple of SYNC_BYTES before the sync of that multiple had returned, so all bytes before the
        last multiple below the length are there; and so is what the sidecar of an orderly pause says.
        """
        side = read_json(path.with_suffix(".json"))
        length = path.stat().st_size
        size, synced = side.get("size_bytes"), side.get("synced")
        noted = min(synced, length) if isinstance(synced, int) else 0
        offset = max(noted, max(0, length - 1) // SYNC_BYTES * SYNC_BYTES)
        announced, name, hint = side.get("announced") is True, side.get("name"), side.get("type")
        if not SHA256.fullmatch(path.stem) or not isinstance(size, int) or not (0 if announced else 1) <= offset <= size:
            path.unlink(missing_ok=True)
            return
        part = Part(path.parent.name, path.stem, size, offset, noted, announced=announced)
        part.name = name if isinstance(name, str) else ""
        part.type_hint = hint if hint in TYPE_HINTS else "auto"
        self._parts[(path.parent.name, path.stem)] = part

    def _write_sidecar(self, path: Path, part: Part, synced: int) -> None:
        data = {
            "size_bytes": part.size_bytes,
            "synced": synced,
            "announced": part.announced,
            "name": part.name,
            "type": part.type_hint,
        }
        write_file(path.with_suffix(".json"), json.dumps(data).encode())
