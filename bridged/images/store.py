"""The store of staged images on disk, and what else of a job must survive a power cut (design, section 3).

Layout below ``root``::

    images/<sha256>                      a whole file, re-hashed before it got this name
    images/<sha256>.json                 its name, size, type hint and the digests of its content by base address
    images/<sha256>.<content digest>.img the encoded content, a cache that may vanish at any time
    uploads/<principal>/<sha256>.part    a file on its way, and beside it a .json: announced size, synced offset
    names.json                           the last image of each name
    traces/<job>.txt                     flight recordings, the last few

Promises, each with a test that tries to break it:

- A file appears under its final name only when its content is synced and hashes to that name: write to a temporary name,
  fsync, rename, fsync the directory. Whatever a power cut leaves half done is found and removed at the next start.
- An offset that was reported was on disk before, and is reported again after a power cut. Uploads are synced every 256 KiB;
  after a crash only bytes that a completed sync covers count.
- The sum of images and uploads, counted with the sizes that were announced, stays within the limit.
- ``collect`` removes nothing that is pinned, in use, or so new that its job may still be on its way.

All methods block and may be called from any thread; the caller keeps them off the event loop. One ``Store`` a directory.
It knows nothing of jobs, targets or chips, and runs no parser itself: ``load`` has the parser process do that.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from bridged.errors import (
    BadRequest,
    BridgedError,
    DigestMismatch,
    EmptyImage,
    ImageTooLarge,
    StorageFailed,
    StorageFull,
    TooMany,
    UnknownImage,
    disk_error,
)
from bridged.images import parser
from bridged.images.memfd import write_all
from bridged.images.model import Image

SYNC_BYTES = 256 * 1024  # Each sync costs an SD card an erase block or so; a client on a bad link loses at most this much.
CHUNK_BYTES = 1 << 20
STALE_S = 24 * 3600.0  # An upload that nobody went on with for so long is given up.
GRACE_S = 600.0  # A new image is not collected for so long: its job may still be on its way.
MAX_IMAGES = 4096  # Bounds the directory and the index, which a stream of tiny images would otherwise fill.
MAX_PARTS = 256  # Unfinished uploads: two files and an entry of the index each.
MAX_PARTS_EACH = 64  # Of one principal, so that the others can still send something.
PARTS_SHARE = 2  # Unfinished uploads may promise 1/2 of the space; else a few first bytes would keep everybody out for a day.
GIVE_WAY_S = 600.0  # An upload paused for so long is given up when another one has no room; a bad link comes back sooner.
MAX_CONTENTS = 32  # Ways in which one file was read (type, base address), noted beside it; the oldest goes.
MAX_NAMES = 4096  # The index of names is one file, written anew for each new name; the oldest name goes.
NAME_CHARS = 128  # Of one name: as much as the line protocol takes.
PREFIX_CHARS = 8  # Fewer digits of a SHA-256 name no image: 4096 images share the first three by chance.

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HEX = re.compile(r"[0-9a-f]+")
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")
_CACHED = re.compile(r"([0-9a-f]{64})\.([0-9a-f]{64})\.img")
_HASHED = "hash-"
_TMP = ".tmp"


class Parse(Protocol):
    """``parser.parse_file``, or what a test puts in its place."""

    def __call__(self, fd: int, size_bytes: int, type_hint: str = ..., base_address: int | None = ..., /) -> Image: ...


@dataclass(frozen=True, slots=True)
class StagedImage:
    """One whole file in the store. ``contents``: digest of the content by ``content_key(type hint, base address)``.

    ``named``: the number of the naming that gave it its name; the index says up to which one it was written.
    """

    sha256: str
    name: str
    size_bytes: int
    type_hint: str
    path: Path
    contents: dict[str, str] = field(default_factory=dict)
    named: int = 0

    @property
    def used(self) -> float:
        """When it was last used, UTC seconds; 0 when it has gone."""
        try:
            return self.path.stat().st_mtime
        except OSError:
            return 0.0

    def content(self, base_address: int | None, type_hint: str = "auto") -> str | None:
        """Digest of the content if it was parsed this way before."""
        return self.contents.get(content_key(self.type_hint if type_hint == "auto" else type_hint, base_address))


def content_key(type_hint: str, base_address: int | None) -> str:
    return type_hint if base_address is None else f"{type_hint}@{base_address:#010x}"


@contextlib.contextmanager
def _disk(doing: str) -> Iterator[None]:
    """Translate what the disk says."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, doing) from error


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_file(path: Path, data: bytes) -> None:
    """The whole file or none of it, also across a power cut."""
    tmp = path.with_name(path.name + _TMP)
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a sidecar; empty when there is none or it cannot be understood: all of it can be made again."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _hash_start(path: Path, count: int | None = None) -> hashlib._Hash:
    """SHA-256 over the first ``count`` bytes of a file (all of it without), in pieces."""
    digest = hashlib.sha256()
    left = count if count is not None else 1 << 62
    with path.open("rb", buffering=0) as file:
        while left and (chunk := file.read(min(CHUNK_BYTES, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest


def plain_name(text: str) -> str:
    """``text`` as a file name: itself where it is harmless, else its hash. Different texts stay different."""
    if _PLAIN.fullmatch(text) and not text.startswith(_HASHED) and not text.endswith((_TMP, ".json", ".part")):
        return text
    return _HASHED + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def checked_sha256(text: str) -> str:
    sha256 = text.lower().removeprefix("sha256:")
    if not _SHA256.fullmatch(sha256):
        raise BadRequest(f"expected a SHA-256 of 64 hexadecimal digits, found {text[:80]!r}")
    return sha256


def checked_name(name: str) -> str:
    if len(name) > NAME_CHARS or not name.isprintable():
        raise BadRequest(f"an image name has at most {NAME_CHARS} printable characters, found {name[:NAME_CHARS]!r}")
    return name


@dataclass(slots=True)
class _Part:
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


@dataclass(frozen=True, slots=True)
class Pending:
    """What a client may know of its unfinished upload. ``expires``: UTC seconds; later it may be gone."""

    offset: int
    size_bytes: int
    name: str
    type_hint: str
    expires: float


@dataclass(frozen=True, slots=True)
class _Announced:
    """What a client says about the file that it is about to send."""

    sha256: str
    size_bytes: int
    offset: int
    name: str
    type_hint: str


class Store:
    """See the module docstring. ``traces``: how many flight recordings are kept."""

    def __init__(
        self,
        root: Path,
        limit_bytes: int,
        image_limit_bytes: int,
        *,
        traces: int = 20,
        parse: Parse | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.root = root
        self.limit_bytes = limit_bytes
        self.image_limit_bytes = image_limit_bytes
        self._traces_kept = traces
        limits = replace(parser.DEFAULT_LIMITS, unpacked_bytes=image_limit_bytes)
        self._parse = parse or functools.partial(parser.parse_file, limits=limits)
        self._now = now
        self._lock = threading.RLock()
        self._images: dict[str, StagedImage] = {}
        self._parts: dict[tuple[str, str], _Part] = {}
        self._names: dict[str, str] = {}
        self._named = 0
        self._in_use: dict[str, int] = {}
        with _disk(f"open the image store {root}"):
            for name in ("images", "uploads", "traces"):
                (root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._recover()

    # --- looking ----------------------------------------------------------------------------------------------

    @property
    def usage_bytes(self) -> int:
        """What images and uploads take on disk, cached content included."""
        with self._lock, _disk("measure the image store"):
            staged = sum(s.size_bytes for s in self._images.values())
            return self._cached_bytes() + staged + sum(p.offset for p in self._parts.values())

    @property
    def free_bytes(self) -> int:
        """What the file system has left for us, whatever our own limit says."""
        with _disk("ask for free space"):
            found = os.statvfs(self.root)
            return found.f_bavail * found.f_frsize

    def have(self, sha256: str, principal: str | None = None) -> tuple[int, int | None, bool]:
        """(offset, size, complete): how much of this file is here, and thus where an upload goes on.

        ``principal``: whose upload; None: the one that got furthest. The size is None where nothing is known.
        """
        sha256 = checked_sha256(sha256)
        with self._lock:
            if staged := self._images.get(sha256):
                return staged.size_bytes, staged.size_bytes, True
            parts = [p for p in self._parts.values() if p.sha256 == sha256]
            if principal is not None:
                parts = [p for p in parts if p.principal == plain_name(principal)]
            best = max(parts, key=lambda p: p.offset, default=None)
            return (self._reported(best), best.size_bytes, False) if best else (0, None, False)

    def get(self, ref: str) -> StagedImage:
        """The image that ``ref`` means: SHA-256 (also ``sha256:…``) or a unique prefix of one, or the last image of that name.

        Digits come first, and a whole SHA-256 is never a name: anybody may give his image the digits of another as its name.
        """
        with self._lock:
            digits = ref.lower().removeprefix("sha256:")
            if staged := self._images.get(digits):
                return staged
            if len(digits) >= PREFIX_CHARS and _HEX.fullmatch(digits):
                found = [s for sha, s in self._images.items() if sha.startswith(digits)]
                if len(found) == 1:
                    return found[0]
                if found:
                    raise UnknownImage(f"{len(found)} staged images start with {digits}; give more digits", image=ref)
            named = self._images.get(self._names.get(ref, ""))
            if named and not _SHA256.fullmatch(digits) and not ref.lower().startswith("sha256:"):
                return named
        raise UnknownImage(f"no staged image has the name or SHA-256 {ref[:NAME_CHARS]!r}", image=ref[:NAME_CHARS])

    def images(self) -> list[StagedImage]:
        """All staged images, the last used one first."""
        with self._lock:
            return sorted(self._images.values(), key=lambda s: self._used(s.path), reverse=True)

    # --- upload -----------------------------------------------------------------------------------------------

    def open_upload(
        self, principal: str, size: int, sha256: str, offset: int = 0, name: str = "", type_hint: str = "auto"
    ) -> Upload:
        """Take a file of ``size`` bytes from ``offset`` on. The caller ends it with ``finish`` or ``abandon``.

        Offset 0 always starts afresh; any other must be the one that ``have`` tells. Where the image is here already, the bytes
        are only compared. Raises ``EmptyImage``, ``ImageTooLarge``, ``StorageFull``,
        ``BadRequest`` (the offset is not where the upload ended; the facts say where), ``TooMany`` (it is being uploaded now).
        """
        wanted = self._checked(size, sha256, offset, name, type_hint)
        with self._lock:
            staged = self._images.get(wanted.sha256)
            if staged:
                return self._open_known(staged, wanted)
            return self._open_part(plain_name(principal), wanted)

    def announce(self, principal: str, size: int, sha256: str, name: str = "", type_hint: str = "auto") -> bool:
        """Take note of a file whose bytes come later, from the first on, and keep room for it. Raises as ``open_upload`` does.

        False: the image is here already, and there is nothing to keep. An unfinished upload of the file is begun afresh.
        """
        wanted = self._checked(size, sha256, 0, name, type_hint)
        with self._lock:
            if wanted.sha256 in self._images:
                return False
            upload = self._open_part(plain_name(principal), wanted, announced=True)
        upload.abandon()
        return True

    def pending(self, principal: str, sha256: str) -> Pending | None:
        """The unfinished upload of this file by ``principal``."""
        owner, sha256 = plain_name(principal), checked_sha256(sha256)
        with self._lock:
            part = self._parts.get((owner, sha256))
            if part is None:
                return None
            expires = (self._used(self._part_path(owner, sha256)) or self._now()) + STALE_S
            return Pending(self._reported(part), part.size_bytes, part.name, part.type_hint, expires)

    def discard(self, principal: str, sha256: str) -> bool:
        """Give an unfinished upload up; whether there was one. Raises ``TooMany`` while its bytes come in."""
        owner, sha256 = plain_name(principal), checked_sha256(sha256)
        with self._lock:
            part = self._parts.get((owner, sha256))
            if part is None:
                return False
            if part.active:
                raise TooMany(f"image {sha256[:12]} is being uploaded by another connection", offset=self._reported(part))
            self._forget_part(part)
            return True

    def _checked(self, size: int, sha256: str, offset: int, name: str, type_hint: str) -> _Announced:
        wanted = _Announced(checked_sha256(sha256), size, offset, checked_name(name), type_hint)
        if type_hint not in parser.TYPE_HINTS:
            raise BadRequest(f"unknown image type {type_hint[:40]!r}, expected one of {', '.join(parser.TYPE_HINTS)}")
        if size <= 0:
            raise EmptyImage("the announced file has no bytes")
        if size > self.image_limit_bytes:
            raise ImageTooLarge(
                f"the announced file has {size} bytes, at most {self.image_limit_bytes} are accepted",
                size_bytes=size,
                limit_bytes=self.image_limit_bytes,
            )
        return wanted

    def _open_known(self, staged: StagedImage, wanted: _Announced) -> Upload:
        """The image is complete: the bytes that come are hashed after those we have and thrown away."""
        if wanted.size_bytes != staged.size_bytes or not 0 <= wanted.offset <= staged.size_bytes:
            raise BadRequest(
                f"image {staged.sha256[:12]} is complete with {staged.size_bytes} bytes; a file of {wanted.size_bytes} bytes "
                f"from offset {wanted.offset} cannot be the same",
                offset=staged.size_bytes,
                size_bytes=staged.size_bytes,
            )
        with _disk("read a staged image"):
            digest = _hash_start(staged.path, wanted.offset)
        self._hold(staged.sha256)
        return Upload(self, wanted, digest=digest)

    def _open_part(self, principal: str, wanted: _Announced, announced: bool = False) -> Upload:
        sha256, size, offset = wanted.sha256, wanted.size_bytes, wanted.offset
        path = self._part_path(principal, sha256)
        part = self._parts.get((principal, sha256))
        if part and part.active:
            raise TooMany(
                f"image {sha256[:12]} is being uploaded by another connection; wait for its end", offset=self._reported(part)
            )
        if part and (not path.exists() or path.stat().st_size < part.offset):
            self._forget_part(part)  # Somebody tidied up by hand, or the disk failed in the middle of a rename.
            part = None
        at = self._reported(part) if part else 0
        if offset and (part is None or offset != at or size != part.size_bytes):
            whole = f" of {part.size_bytes}" if part else ""
            raise BadRequest(
                f"the upload of {sha256[:12]} goes on at offset {at}{whole}, the request says {offset} of {size}", offset=at
            )
        if part:
            part.active = True  # Not one of those that give way.
        try:
            self._check_room(principal, size - (part.size_bytes if part else 0), size - offset, new=part is None)
        finally:
            if part:
                part.active = False
        announced = announced or (part is not None and part.announced)
        part = _Part(
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
        with _disk("start an upload"):
            if not path.parent.exists():
                path.parent.mkdir(mode=0o700)
                _sync_directory(path.parent.parent)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, offset)
                os.lseek(fd, offset, os.SEEK_SET)
                self._write_part_sidecar(path, part, offset)  # syncs the directory, and with it the name of the part
            except BaseException:
                os.close(fd)
                raise
        self._parts[(principal, sha256)] = part
        return Upload(self, wanted, fd=fd, part=part)

    def _write_part_sidecar(self, path: Path, part: _Part, synced: int) -> None:
        data = {
            "size_bytes": part.size_bytes,
            "synced": synced,
            "announced": part.announced,
            "name": part.name,
            "type": part.type_hint,
        }
        _write_file(path.with_suffix(".json"), json.dumps(data).encode())

    def _reported(self, part: _Part) -> int:
        """The offset that a client may be told. It is noted first: a power cut at a multiple of SYNC_BYTES leaves a length from
        which ``_recover_part`` must not conclude that the last step was synced, and the client would be told less than before.
        """
        with self._lock:
            offset = part.offset
            if offset <= part.noted:
                return offset
            try:
                self._write_part_sidecar(self._part_path(part.principal, part.sha256), part, offset)
            except OSError:
                return part.noted
            part.noted = offset
            return offset

    def _own_parts(self, principal: str) -> int:
        return sum(part.principal == principal for part in self._parts.values())

    def _pending_bytes(self) -> int:
        """What unfinished uploads have been promised."""
        return sum(part.size_bytes for part in self._parts.values())

    @property
    def _pending_limit_bytes(self) -> int:
        return max(self.limit_bytes // PARTS_SHARE, self.image_limit_bytes)

    def _let_give_way(self, principal: str, more_bytes: int, new: bool) -> None:
        """Where an upload would find no room, give up others that were paused for long, the longest paused first."""
        paused = [(self._used(self._part_path(p.principal, p.sha256)), p) for p in self._parts.values() if not p.active]
        for since, part in sorted(paused, key=lambda found: found[0]):
            full = new and len(self._parts) >= MAX_PARTS
            own = new and self._own_parts(principal) >= MAX_PARTS_EACH
            bytes_left = min(self._pending_limit_bytes - self._pending_bytes(), self.limit_bytes - self._promised_bytes())
            if self._now() - since < GIVE_WAY_S or not (full or own or more_bytes > bytes_left):
                return
            if full or more_bytes > bytes_left or part.principal == principal:
                self._forget_part(part)

    def _check_room(self, principal: str, more_bytes: int, to_come_bytes: int, new: bool) -> None:
        """Room for an upload. Cached content gives way; images do not, only ``collect`` knows what is still needed."""
        self._let_give_way(principal, more_bytes, new)
        promised = self._promised_bytes()
        if promised + more_bytes > self.limit_bytes:
            raise StorageFull(
                f"{more_bytes} more bytes do not fit: images and uploads have {promised} of {self.limit_bytes} bytes",
                used_bytes=promised,
                limit_bytes=self.limit_bytes,
            )
        if new and len(self._images) >= MAX_IMAGES:
            raise StorageFull(f"there are {MAX_IMAGES} staged images already", limit=MAX_IMAGES)
        if new and self._own_parts(principal) >= MAX_PARTS_EACH:
            raise TooMany(f"there are {MAX_PARTS_EACH} unfinished uploads of {principal} already", limit=MAX_PARTS_EACH)
        if new and len(self._parts) >= MAX_PARTS:
            raise TooMany(f"there are {MAX_PARTS} unfinished uploads already", limit=MAX_PARTS)
        pending = self._pending_bytes()
        if pending + more_bytes > self._pending_limit_bytes:
            raise StorageFull(
                f"{more_bytes} more bytes do not fit: unfinished uploads have {pending} of {self._pending_limit_bytes} bytes",
                used_bytes=pending,
                limit_bytes=self._pending_limit_bytes,
            )
        if promised + more_bytes + self._cached_bytes() > self.limit_bytes or to_come_bytes > self.free_bytes:
            self._drop_cached()
        if to_come_bytes > (free := self.free_bytes):
            raise StorageFull(f"{to_come_bytes} bytes do not fit: the disk has {free} left", free_bytes=free)

    def _part_path(self, principal: str, sha256: str) -> Path:
        return self.root / "uploads" / principal / f"{sha256}.part"

    def _close_part(self, part: _Part, synced: int) -> None:
        """An upload paused with ``synced`` bytes on disk."""
        path = self._part_path(part.principal, part.sha256)
        with self._lock:
            part.active = False
            part.offset = synced
            if not synced and not part.announced:
                self._forget_part(part)
                return
            with _disk("pause an upload"):
                self._write_part_sidecar(path, part, synced)
            part.noted = synced

    def _forget_part(self, part: _Part) -> None:
        path = self._part_path(part.principal, part.sha256)
        with self._lock:
            part.active = False
            self._parts.pop((part.principal, part.sha256), None)
            with contextlib.suppress(OSError):  # What cannot be removed now is removed as stale later.
                path.unlink(missing_ok=True)
                path.with_suffix(".json").unlink(missing_ok=True)
                path.parent.rmdir()

    def _adopt(self, part: _Part, announced: _Announced) -> StagedImage:
        """A proven, synced part becomes an image. The sidecar comes first: an image on disk is a complete one."""
        with self._lock:
            if part.sha256 in self._images:  # somebody else sent the same file meanwhile
                self._forget_part(part)
                return self._renamed(announced)
            path = self.root / "images" / part.sha256
            staged = StagedImage(
                part.sha256, announced.name, part.size_bytes, announced.type_hint, path, named=self._next_named()
            )
            with _disk("stage an image"):
                self._write_sidecar(staged)
                source = self._part_path(part.principal, part.sha256)
                os.utime(source, (self._now(), self._now()))
                os.rename(source, path)
                self._images[part.sha256] = staged
                _sync_directory(path.parent)  # When this fails the client is told so; sending it again syncs again.
                _sync_directory(source.parent)
            self._forget_part(part)
            self._set_name(announced.name, part.sha256)
            return staged

    def _renamed(self, announced: _Announced) -> StagedImage:
        """The same file came again; what was said about it last holds."""
        sha256, hint = announced.sha256, announced.type_hint
        with self._lock:
            staged = self._images.get(sha256)
            if staged is None:
                raise UnknownImage(f"image {sha256[:12]} was removed while it was sent again", image=sha256)
            wanted = replace(staged, name=announced.name or staged.name, type_hint=hint if hint != "auto" else staged.type_hint)
            if announced.name and self._names.get(announced.name) != sha256:
                wanted = replace(wanted, named=self._next_named())
            with _disk("stage an image"):
                os.utime(staged.path, (self._now(), self._now()))
                if wanted != staged:
                    self._write_sidecar(wanted)
                _sync_directory(staged.path.parent)
            self._images[sha256] = wanted
            self._set_name(announced.name, sha256)
            return wanted

    def _write_sidecar(self, staged: StagedImage) -> None:
        data = {
            "name": staged.name,
            "size_bytes": staged.size_bytes,
            "type": staged.type_hint,
            "contents": staged.contents,
            "named": staged.named,
        }
        _write_file(staged.path.with_name(f"{staged.sha256}.json"), json.dumps(data, sort_keys=True).encode())

    def _next_named(self) -> int:
        self._named += 1
        return self._named

    def _set_name(self, name: str, sha256: str) -> None:
        if not name or self._names.get(name) == sha256:
            return
        self._write_names(self._with_name(name, sha256))

    def _with_name(self, name: str, sha256: str) -> dict[str, str]:
        names = {n: s for n, s in self._names.items() if n != name} | {name: sha256}
        while len(names) > MAX_NAMES:
            del names[next(iter(names))]
        return names

    def _write_names(self, names: dict[str, str]) -> None:
        with _disk("write the index of names"):
            # No image has an empty name: that key is free for the number of the last naming.
            _write_file(self.root / "names.json", json.dumps(names | {"": self._named}).encode())
        self._names = names

    # --- content ----------------------------------------------------------------------------------------------

    def load(self, staged: StagedImage, base_address: int | None = None, type_hint: str = "auto") -> Image:
        """The content of a staged image, digest-checked. ``type_hint`` auto: what was said when it was sent.

        Raises what the parser says, ``DigestMismatch`` when the disk does not give back what was staged, ``UnknownImage``.
        """
        hint = staged.type_hint if type_hint == "auto" else type_hint
        key = content_key(hint, base_address)
        with self._lock:
            known = self._images.get(staged.sha256)
            if known is None:
                raise UnknownImage(f"image {staged.sha256[:12]} has been removed", image=staged.sha256)
            self._hold(staged.sha256)
        try:
            with contextlib.suppress(OSError):
                os.utime(known.path, (self._now(), self._now()))
            cached = self._read_cached(known, known.contents.get(key))
            if cached is not None:
                return cached
            image = self._parse_staged(known, hint, base_address)
            self._remember(known.sha256, key, image)
            return image
        finally:
            self._release(staged.sha256)

    def _parse_staged(self, staged: StagedImage, hint: str, base_address: int | None) -> Image:
        with _disk("read a staged image"):
            found = _hash_start(staged.path).hexdigest()
            if found != staged.sha256:
                with self._lock:  # It is no use to anybody, and while it is here nobody can send it again.
                    if staged.sha256 in self._images:
                        self._remove(staged)
                raise DigestMismatch(
                    f"the staged file {staged.sha256[:12]} reads back as {found[:12]}: the disk changed it; send it again",
                    expected=staged.sha256,
                    found=found,
                )
            fd = os.open(staged.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return self._parse(fd, staged.size_bytes, hint, base_address)
        finally:
            os.close(fd)

    def _cache_path(self, sha256: str, content: str) -> Path:
        return self.root / "images" / f"{sha256}.{content}.img"

    def _read_cached(self, staged: StagedImage, content: str | None) -> Image | None:
        if content is None:
            return None
        path = self._cache_path(staged.sha256, content)
        try:
            encoded = path.read_bytes()
            if hashlib.sha256(encoded).hexdigest() == content:
                return Image.decode(encoded)
        except (OSError, BridgedError):
            pass
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)  # A cache that is damaged is no cache; the file itself is parsed again.
        return None

    def _remember(self, sha256: str, key: str, image: Image) -> None:
        """Note the digest and cache the content where there is room. Failing to do so fails nothing."""
        with self._lock, contextlib.suppress(OSError, BridgedError):
            staged = self._images.get(sha256)
            if staged is None:
                return
            contents = {k: d for k, d in staged.contents.items() if k != key} | {key: image.digest}
            while len(contents) > MAX_CONTENTS:
                del contents[next(iter(contents))]
            staged = replace(staged, contents=contents)
            self._images[sha256] = staged
            self._write_sidecar(staged)
            encoded = image.encode()
            if self._promised_bytes() + self._cached_bytes() + len(encoded) <= self.limit_bytes:
                _write_file(self._cache_path(sha256, image.digest), encoded)

    def _drop_cached(self, sha256: str = "") -> None:
        with contextlib.suppress(OSError):
            for path in (self.root / "images").glob(f"{sha256}*.img"):
                path.unlink(missing_ok=True)

    # --- making room ------------------------------------------------------------------------------------------

    def collect(self, pinned: set[str], room_bytes: int | None = None) -> tuple[str, ...]:
        """Make room: give up stale uploads, then remove the longest unused images until ``room_bytes`` are free.

        ``pinned``: SHA-256 of files or digests of contents that jobs or a last-known-good need. ``room_bytes`` None: a quarter
        of the limit. Returns the SHA-256 of what was removed.
        """
        wanted = self.limit_bytes // 4 if room_bytes is None else room_bytes
        removed: list[str] = []
        with self._lock, _disk("collect old images"):
            self._give_up_stale()
            promised = self._promised_bytes()
            for staged in reversed(self.images()):
                if self.limit_bytes - promised >= wanted and len(self._images) < MAX_IMAGES:
                    break
                needed = staged.sha256 in pinned or not pinned.isdisjoint(staged.contents.values())
                fresh = self._now() - self._used(staged.path) < GRACE_S
                if needed or fresh or self._in_use.get(staged.sha256):
                    continue
                self._remove(staged)
                promised -= staged.size_bytes
                removed.append(staged.sha256)
        return tuple(removed)

    def _remove(self, staged: StagedImage) -> None:
        del self._images[staged.sha256]
        staged.path.unlink(missing_ok=True)  # first: a sidecar alone is no image
        staged.path.with_name(f"{staged.sha256}.json").unlink(missing_ok=True)
        self._drop_cached(staged.sha256)
        if staged.sha256 in self._names.values():
            _sync_directory(staged.path.parent)  # A power cut must not bring the image back without its name.
            self._write_names({name: sha for name, sha in self._names.items() if sha != staged.sha256})

    def _give_up_stale(self) -> None:
        for part in [p for p in self._parts.values() if not p.active]:
            path = self._part_path(part.principal, part.sha256)
            if not path.exists() or self._now() - path.stat().st_mtime > STALE_S:
                self._forget_part(part)

    def _promised_bytes(self) -> int:
        """Images and uploads, these with the size that they will have: what the limit is compared with."""
        return sum(s.size_bytes for s in self._images.values()) + sum(p.size_bytes for p in self._parts.values())

    def _cached_bytes(self) -> int:
        return sum(p.stat().st_size for p in (self.root / "images").glob("*.img"))

    def _used(self, path: Path) -> float:
        try:
            return path.stat().st_mtime
        except OSError:
            return 0.0

    def _hold(self, sha256: str) -> None:
        with self._lock:
            self._in_use[sha256] = self._in_use.get(sha256, 0) + 1

    def _release(self, sha256: str) -> None:
        with self._lock:
            left = self._in_use.pop(sha256, 1) - 1
            if left > 0:
                self._in_use[sha256] = left

    # --- after a start ----------------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Read what is on disk and remove what a crash left half done.

        What is read here may be in the page cache only: the process may have died between a rename and its sync. Clients are
        told of it from now on, so the directories are synced first, as after every change of them.
        """
        for path in [*self.root.glob(f"*{_TMP}"), *self.root.glob(f"*/*{_TMP}"), *self.root.glob(f"*/*/*{_TMP}")]:
            path.unlink(missing_ok=True)
        images = self.root / "images"
        for directory in (self.root, images, self.root / "uploads", *(self.root / "uploads").iterdir()):
            if directory.is_dir():
                _sync_directory(directory)
        for path in list(images.iterdir()):
            if _SHA256.fullmatch(path.name):
                self._images[path.name] = self._recovered_image(path)
        for path in list(images.iterdir()):
            owner = path.name.partition(".")[0]
            if owner not in self._images or (path.suffix == ".img" and not _CACHED.fullmatch(path.name)):
                path.unlink(missing_ok=True)
        for path in (self.root / "uploads").glob("*/*.part"):
            self._recover_part(path)
        for path in (self.root / "uploads").glob("*/*.json"):
            if not path.with_suffix(".part").exists():
                path.unlink(missing_ok=True)
        self._give_up_stale()
        names = _read_json(self.root / "names.json")
        self._names = {n: s for n, s in names.items() if isinstance(s, str) and s in self._images}
        written = names.get("")
        self._recover_names(written if isinstance(written, int) else 0)

    def _recover_names(self, written: int) -> None:
        """An image is complete before the index has its name. Who asks after a crash in between is told that it is complete; a
        job that is then started by that name must not find an older image, or none. ``written``: the last naming in the index.
        """
        late = sorted((s for s in self._images.values() if s.name and s.named > written), key=lambda found: found.named)
        self._named = max([written, *(staged.named for staged in late)])
        for staged in late:
            self._names = self._with_name(staged.name, staged.sha256)
        if late:
            with contextlib.suppress(BridgedError):  # A full disk keeps nobody from starting; the next start does this again.
                self._write_names(self._names)

    def _recovered_image(self, path: Path) -> StagedImage:
        side = _read_json(path.with_name(f"{path.name}.json"))
        hint, contents, named = side.get("type"), side.get("contents"), side.get("named")
        return StagedImage(
            path.name,
            str(side.get("name", "")),
            path.stat().st_size,
            hint if hint in parser.TYPE_HINTS else "auto",
            path,
            {str(k): str(v) for k, v in contents.items()} if isinstance(contents, dict) else {},
            named if isinstance(named, int) else 0,
        )

    def _recover_part(self, path: Path) -> None:
        """How far an upload of an earlier life surely got.

        The length of the file proves nothing: a file system may have made it longer before the data was on disk. But the
        writer never went past a multiple of SYNC_BYTES before the sync of that multiple had returned, so all bytes before the
        last multiple below the length are there; and so is what the sidecar of an orderly pause says.
        """
        side = _read_json(path.with_suffix(".json"))
        length = path.stat().st_size
        size, synced = side.get("size_bytes"), side.get("synced")
        noted = min(synced, length) if isinstance(synced, int) else 0
        offset = max(noted, max(0, length - 1) // SYNC_BYTES * SYNC_BYTES)
        announced, name, hint = side.get("announced") is True, side.get("name"), side.get("type")
        if not _SHA256.fullmatch(path.stem) or not isinstance(size, int) or not (0 if announced else 1) <= offset <= size:
            path.unlink(missing_ok=True)
            return
        part = _Part(path.parent.name, path.stem, size, offset, noted, announced=announced)
        part.name = name if isinstance(name, str) else ""
        part.type_hint = hint if hint in parser.TYPE_HINTS else "auto"
        self._parts[(path.parent.name, path.stem)] = part

    # --- traces of jobs -------------------------------------------------------------------------------------------

    def save_trace(self, job_id: str, text: str) -> Path | None:
        """Keep a flight recording and only the last few of them. None where none are kept."""
        if self._traces_kept <= 0:
            return None
        path = self.root / "traces" / f"{plain_name(job_id)}.txt"
        with self._lock, _disk(f"keep the trace of job {job_id}"):
            _write_file(path, text.encode("utf-8", "backslashreplace"))
            kept = sorted((self.root / "traces").glob("*.txt"), key=lambda p: (p.stat().st_mtime_ns, p.name))
            for old in [p for p in kept if p != path][: max(0, len(kept) - self._traces_kept)]:
                old.unlink(missing_ok=True)
        return path

    def trace_file(self, job_id: str) -> Path | None:
        """Where the recording of a job is, as long as it is one of the last few."""
        path = self.root / "traces" / f"{plain_name(job_id)}.txt"
        return path if path.is_file() else None

    def load_trace(self, job_id: str) -> str | None:
        path = self.root / "traces" / f"{plain_name(job_id)}.txt"
        try:
            return path.read_text("utf-8", "backslashreplace")
        except FileNotFoundError:
            return None


class Upload:
    """One file on its way into the store; made by ``Store.open_upload``, used by one thread at a time.

    ``offset``: bytes of the file that were taken so far; ``synced``: how many of them are on disk. After an error of ``write``
    only ``abandon`` is left; what was synced can be resumed.
    """

    def __init__(
        self,
        store: Store,
        announced: _Announced,
        *,
        fd: int = -1,
        part: _Part | None = None,
        digest: hashlib._Hash | None = None,
    ) -> None:
        self.sha256 = announced.sha256
        self.size_bytes = announced.size_bytes
        self.offset = announced.offset
        self.synced = announced.offset
        self._announced = announced
        self._store = store
        self._fd = fd
        self._part = part
        self._digest = digest
        self._open = True
        self._failed = False

    @property
    def known(self) -> bool:
        """Whether the image was here before, so that the bytes are only compared."""
        return self._part is None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes. Raises ``StorageFull`` or ``StorageFailed``; more bytes than announced are a ``BadRequest``."""
        self._check_open()
        view = memoryview(data)
        if self.offset + len(view) > self.size_bytes:
            raise BadRequest(f"the upload of {self.sha256[:12]} was announced with {self.size_bytes} bytes, more came")
        if self._digest is not None:
            self._digest.update(view)
            self.offset += len(view)
            return
        if self._failed:
            raise StorageFailed(f"the upload of {self.sha256[:12]} failed before; only abandon is left")
        with self._failing(), _disk(f"write byte {self.offset} of an upload"):
            while view:  # never past a multiple of SYNC_BYTES without a sync; _recover_part builds on it
                room = SYNC_BYTES - self.offset % SYNC_BYTES
                count = os.write(self._fd, view[:room])
                self.offset += count
                view = view[count:]
                if self.offset % SYNC_BYTES == 0:
                    self._sync()

    def finish(self) -> StagedImage:
        """Prove the whole file and stage it. Raises ``DigestMismatch`` (nothing is kept) or what the disk says.

        With bytes missing it is a ``BadRequest``; like every failure but the first it leaves what is synced for resuming.
        """
        self._check_open()
        try:
            if self.offset != self.size_bytes:
                raise BadRequest(
                    f"the upload of {self.sha256[:12]} ends at {self.offset} of {self.size_bytes} bytes", offset=self.offset
                )
            if self._part is None:
                assert self._digest is not None
                self._compare(self._digest.hexdigest())
                return self._store._renamed(self._announced)
            with self._failing(), _disk("prove an upload"):
                self._sync()
                found = _hash_start(self._store._part_path(self._part.principal, self.sha256)).hexdigest()
            try:
                self._compare(found)
            except DigestMismatch:
                self._store._forget_part(self._part)
                raise
            return self._store._adopt(self._part, self._announced)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """End without staging: the client is gone. What is on disk can be resumed. May be called more than once."""
        if not self._open:
            return
        self._open = False
        if self._part is None:
            self._store._release(self.sha256)
            return
        try:
            if self._part.active:
                if not self._failed:
                    with contextlib.suppress(OSError):
                        self._sync()
                self._store._close_part(self._part, self.synced)
        except BridgedError:
            pass  # The offset of the last orderly sidecar or the last whole step counts then; see _recover_part.
        finally:
            os.close(self._fd)

    def take_back(self) -> None:
        """End, and undo what was written: the bytes are not those that their sender meant. The upload goes on where it was."""
        if self._open and self._part is not None and not self._failed:
            with self._failing(), _disk("take back what was written"):
                os.ftruncate(self._fd, self._announced.offset)
                os.lseek(self._fd, self._announced.offset, os.SEEK_SET)
                self.offset = self._announced.offset
                self._sync()
        self.abandon()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """After a failed sync the kernel may call the next one a success without the lost data: never sync again then."""
        try:
            yield
        except BaseException:
            self._failed = True
            raise

    def _compare(self, found: str) -> None:
        if found != self.sha256:
            raise DigestMismatch(
                f"the {self.size_bytes} bytes that came have SHA-256 {found[:16]}…, announced was {self.sha256[:16]}…",
                expected=self.sha256,
                found=found,
            )

    def _sync(self) -> None:
        os.fdatasync(self._fd)
        self.synced = self.offset
        if self._part is not None:
            self._part.offset = self.synced

    def _check_open(self) -> None:
        if not self._open:
            raise BadRequest(f"the upload of {self.sha256[:12]} was ended before")
