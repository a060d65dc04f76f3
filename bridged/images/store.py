"""The store of staged images on disk, whole files under the digest of their bytes (design, section 3).

Layout below ``root``::

    images/<sha256>                      a whole file, re-hashed before it got this name
    images/<sha256>.json                 its name, size, type hint and the digests of its content by base address
    images/<sha256>.<content digest>.img the encoded content, a cache that may vanish at any time
    uploads/                             files on their way: see ``parts``
    names.json                           the last image of each name

Promises, each with a test that tries to break it:

- A file appears under its final name only when its content is synced and hashes to that name: write to a temporary name,
  fsync, rename, fsync the directory. Whatever a power cut leaves half done is found and removed at the next start.
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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from bridged.errors import (
    BadRequest,
    BridgedError,
    DigestMismatch,
    EmptyImage,
    ImageTooLarge,
    StorageFull,
    UnknownImage,
)
from bridged.images import parser
from bridged.images.durable import TMP, disk, hash_start, read_json, sync_directory, write_file
from bridged.images.model import Image
from bridged.images.parts import PARTS_SHARE, Part, Parts
from bridged.images.staged import (
    NAME_CHARS,
    SHA256,
    Announced,
    Pending,
    StagedImage,
    checked_name,
    checked_sha256,
    content_key,
    plain_name,
)
from bridged.images.upload import Upload

GRACE_S = 600.0  # An image that was just sent or named is not collected for so long: its job may still be on its way.
MAX_IMAGES = 4096  # Bounds the directory and the index, which a stream of tiny images would otherwise fill.
MAX_CONTENTS = 32  # Ways in which one file was read (type, base address), noted beside it; the oldest goes.
MAX_NAMES = 4096  # The index of names is one file, written anew for each new name; the oldest name goes.
PREFIX_CHARS = 8  # Fewer digits of a SHA-256 name no image: 4096 images share the first three by chance.

_HEX = re.compile(r"[0-9a-f]+")
_CACHED = re.compile(r"([0-9a-f]{64})\.([0-9a-f]{64})\.img")


class Parse(Protocol):
    """``parser.parse_file``, or what a test puts in its place."""

    def __call__(self, fd: int, size_bytes: int, type_hint: str = ..., base_address: int | None = ..., /) -> Image: ...


class Store:
    """See the module docstring."""

    def __init__(
        self,
        root: Path,
        limit_bytes: int,
        image_limit_bytes: int,
        *,
        parse: Parse | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.root = root
        self.limit_bytes = limit_bytes
        self.image_limit_bytes = image_limit_bytes
        limits = replace(parser.DEFAULT_LIMITS, unpacked_bytes=image_limit_bytes)
        self._parse = parse or functools.partial(parser.parse_file, limits=limits)
        self._now = now
        self._lock = threading.RLock()
        self._images: dict[str, StagedImage] = {}
        uploads_limit_bytes = max(limit_bytes // PARTS_SHARE, image_limit_bytes)
        self._parts = Parts(root / "uploads", self._lock, uploads_limit_bytes, now)
        self._names: dict[str, str] = {}
        self._named = 0
        self._in_use: dict[str, int] = {}
        with disk(f"open the image store {root}"):
            for name in ("images", "uploads"):
                (root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._recover()

    # --- looking ----------------------------------------------------------------------------------------------

    @property
    def usage_bytes(self) -> int:
        """What images and uploads take on disk, cached content included."""
        with self._lock, disk("measure the image store"):
            return self._cached_bytes() + self._staged_bytes() + self._parts.synced_bytes

    @property
    def free_bytes(self) -> int:
        """What the file system has left for us, whatever our own limit says."""
        with disk("ask for free space"):
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
            best = self._parts.furthest(sha256, None if principal is None else plain_name(principal))
            return (self._parts.reported(best), best.size_bytes, False) if best else (0, None, False)

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
            if named and not SHA256.fullmatch(digits) and not ref.lower().startswith("sha256:"):
                return named
        raise UnknownImage(f"no staged image has the name or SHA-256 {ref[:NAME_CHARS]!r}", image=ref[:NAME_CHARS])

    def use(self, ref: str) -> StagedImage:
        """As ``get``, for a job that is about to be taken: ``collect`` leaves the image alone for ``GRACE_S``."""
        with self._lock:
            staged = self.get(ref)
            self._used_now(staged)
            return staged

    def _used_now(self, staged: StagedImage) -> None:
        with contextlib.suppress(OSError):
            os.utime(staged.path, (self._now(), self._now()))

    def images(self) -> list[StagedImage]:
        """All staged images, the last used one first."""
        with self._lock:
            return sorted(self._images.values(), key=lambda s: s.used, reverse=True)

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
            return self._begin(principal, wanted)

    def announce(self, principal: str, size: int, sha256: str, name: str = "", type_hint: str = "auto") -> bool:
        """Take note of a file whose bytes come later, from the first on, and keep room for it. Raises as ``open_upload`` does.

        False: the image is here already, and there is nothing to keep. An unfinished upload of the file is begun afresh.
        """
        wanted = self._checked(size, sha256, 0, name, type_hint)
        with self._lock:
            if wanted.sha256 in self._images:
                return False
            upload = self._begin(principal, wanted, announced=True)
        upload.abandon()
        return True

    def pending(self, principal: str, sha256: str) -> Pending | None:
        """The unfinished upload of this file by ``principal``."""
        with self._lock:
            return self._parts.pending(plain_name(principal), checked_sha256(sha256))

    def discard(self, principal: str, sha256: str) -> bool:
        """Give an unfinished upload up; whether there was one. Raises ``TooMany`` while its bytes come in."""
        with self._lock:
            return self._parts.discard(plain_name(principal), checked_sha256(sha256))

    def _checked(self, size: int, sha256: str, offset: int, name: str, type_hint: str) -> Announced:
        wanted = Announced(checked_sha256(sha256), size, offset, checked_name(name), type_hint)
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

    def _open_known(self, staged: StagedImage, wanted: Announced) -> Upload:
        """The image is complete: the bytes that come are hashed after those we have and thrown away."""
        if wanted.size_bytes != staged.size_bytes or not 0 <= wanted.offset <= staged.size_bytes:
            raise BadRequest(
                f"image {staged.sha256[:12]} is complete with {staged.size_bytes} bytes; a file of {wanted.size_bytes} bytes "
                f"from offset {wanted.offset} cannot be the same",
                offset=staged.size_bytes,
                size_bytes=staged.size_bytes,
            )
        with disk("read a staged image"):
            digest = hash_start(staged.path, wanted.offset)
        self._hold(staged.sha256)
        return Upload(
            wanted,
            self._parts,
            lambda: self._renamed(wanted),
            digest=digest,
            release=lambda: self._release(staged.sha256),
        )

    def _begin(self, principal: str, wanted: Announced, announced: bool = False) -> Upload:
        fd, part, known = self._parts.open(plain_name(principal), wanted, self._check_room, announced)
        return Upload(known, self._parts, lambda: self._adopt(part, known), fd=fd, part=part)

    def _check_room(self, principal: str, more_bytes: int, to_come_bytes: int, new: bool) -> None:
        """Room for an upload. Cached content gives way; images do not, only ``collect`` knows what is still needed."""
        self._parts.make_way(principal, more_bytes, new, self.limit_bytes - self._staged_bytes())
        promised = self._promised_bytes()
        if promised + more_bytes > self.limit_bytes:
            raise StorageFull(
                f"{more_bytes} more bytes do not fit: images and uploads have {promised} of {self.limit_bytes} bytes",
                used_bytes=promised,
                limit_bytes=self.limit_bytes,
            )
        if new and len(self._images) >= MAX_IMAGES:
            raise StorageFull(f"there are {MAX_IMAGES} staged images already", limit=MAX_IMAGES)
        self._parts.check(principal, more_bytes, new)
        if promised + more_bytes + self._cached_bytes() > self.limit_bytes or to_come_bytes > self.free_bytes:
            self._drop_cached()
        if to_come_bytes > (free := self.free_bytes):
            raise StorageFull(f"{to_come_bytes} bytes do not fit: the disk has {free} left", free_bytes=free)

    def _adopt(self, part: Part, announced: Announced) -> StagedImage:
        """A proven, synced part becomes an image. The sidecar comes first: an image on disk is a complete one."""
        with self._lock:
            if part.sha256 in self._images:  # somebody else sent the same file meanwhile
                self._parts.forget(part)
                return self._renamed(announced)
            path = self.root / "images" / part.sha256
            staged = StagedImage(
                part.sha256, announced.name, part.size_bytes, announced.type_hint, path, named=self._next_named()
            )
            with disk("stage an image"):
                self._write_sidecar(staged)
                source = self._parts.path(part.principal, part.sha256)
                os.utime(source, (self._now(), self._now()))
                os.rename(source, path)
                self._images[part.sha256] = staged
                sync_directory(path.parent)  # When this fails the client is told so; sending it again syncs again.
                sync_directory(source.parent)
            self._parts.forget(part)
            self._set_name(announced.name, part.sha256)
            return staged

    def _renamed(self, announced: Announced) -> StagedImage:
        """The same file came again; what was said about it last holds."""
        sha256, hint = announced.sha256, announced.type_hint
        with self._lock:
            staged = self._images.get(sha256)
            if staged is None:
                raise UnknownImage(f"image {sha256[:12]} was removed while it was sent again", image=sha256)
            wanted = replace(staged, name=announced.name or staged.name, type_hint=hint if hint != "auto" else staged.type_hint)
            if announced.name and self._names.get(announced.name) != sha256:
                wanted = replace(wanted, named=self._next_named())
            with disk("stage an image"):
                os.utime(staged.path, (self._now(), self._now()))
                if wanted != staged:
                    self._write_sidecar(wanted)
                sync_directory(staged.path.parent)
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
        write_file(staged.path.with_name(f"{staged.sha256}.json"), json.dumps(data, sort_keys=True).encode())

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
        with disk("write the index of names"):
            # No image has an empty name: that key is free for the number of the last naming.
            write_file(self.root / "names.json", json.dumps(names | {"": self._named}).encode())
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
            self._used_now(known)
            cached = self._read_cached(known, known.contents.get(key))
            if cached is not None:
                return cached
            image = self._parse_staged(known, hint, base_address)
            self._remember(known.sha256, key, image)
            return image
        finally:
            self._release(staged.sha256)

    def at_hand(self, staged: StagedImage, base_address: int | None = None, type_hint: str = "auto") -> bool:
        """Whether ``load`` will answer, or refuse, without a parser."""
        with self._lock:
            known = self._images.get(staged.sha256)
        content = known.content(base_address, type_hint) if known else None
        return known is None or (content is not None and self._cache_path(known.sha256, content).exists())

    def _parse_staged(self, staged: StagedImage, hint: str, base_address: int | None) -> Image:
        with disk("read a staged image"):
            found = hash_start(staged.path).hexdigest()
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
                write_file(self._cache_path(sha256, image.digest), encoded)

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
        with self._lock, disk("collect old images"):
            self._parts.give_up_stale()
            promised = self._promised_bytes()
            for staged in reversed(self.images()):
                if self.limit_bytes - promised >= wanted and len(self._images) < MAX_IMAGES:
                    break
                needed = staged.sha256 in pinned or not pinned.isdisjoint(staged.contents.values())
                fresh = self._now() - staged.used < GRACE_S
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
            sync_directory(staged.path.parent)  # A power cut must not bring the image back without its name.
            self._write_names({name: sha for name, sha in self._names.items() if sha != staged.sha256})

    def _promised_bytes(self) -> int:
        """Images and uploads, these with the size that they will have: what the limit is compared with."""
        return self._staged_bytes() + self._parts.promised_bytes

    def _staged_bytes(self) -> int:
        return sum(s.size_bytes for s in self._images.values())

    def _cached_bytes(self) -> int:
        return sum(p.stat().st_size for p in (self.root / "images").glob("*.img"))

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
        for path in [*self.root.glob(f"*{TMP}"), *self.root.glob(f"*/*{TMP}"), *self.root.glob(f"*/*/*{TMP}")]:
            path.unlink(missing_ok=True)
        images = self.root / "images"
        for directory in (self.root, images, self.root / "uploads", *(self.root / "uploads").iterdir()):
            if directory.is_dir():
                sync_directory(directory)
        for path in list(images.iterdir()):
            if SHA256.fullmatch(path.name):
                self._images[path.name] = self._recovered_image(path)
        for path in list(images.iterdir()):
            owner = path.name.partition(".")[0]
            if owner not in self._images or (path.suffix == ".img" and not _CACHED.fullmatch(path.name)):
                path.unlink(missing_ok=True)
        self._parts.recover()
        names = read_json(self.root / "names.json")
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
        side = read_json(path.with_name(f"{path.name}.json"))
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
