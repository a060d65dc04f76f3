"""One file on its way into the store, from its first byte to the proof that it is what was announced."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator

from bridged.errors import BadRequest, BridgedError, DigestMismatch, StorageFailed
from bridged.images.durable import disk, hash_start
from bridged.images.parts import SYNC_BYTES, Part, Parts
from bridged.images.staged import Announced, StagedImage


class Upload:
    """One file on its way into the store; made by ``Store.open_upload``, used by one thread at a time.

    ``offset``: bytes of the file that were taken so far; ``synced``: how many of them are on disk. After an error of ``write``
    only ``abandon`` is left; what was synced can be resumed.

    It writes ``part`` to ``fd``; or, where the image is here already, adds what comes to ``digest``, which has the bytes before
    its offset. ``stage`` makes an image of a file that is proven; ``release`` is called at the end of a comparison.
    """

    def __init__(
        self,
        announced: Announced,
        parts: Parts,
        stage: Callable[[], StagedImage],
        *,
        fd: int = -1,
        part: Part | None = None,
        digest: hashlib._Hash | None = None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self.sha256 = announced.sha256
        self.size_bytes = announced.size_bytes
        self.offset = announced.offset
        self.synced = announced.offset
        self._announced = announced
        self._parts = parts
        self._stage = stage
        self._release = release
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
        with self._failing(), disk(f"write byte {self.offset} of an upload"):
            while view:  # never past a multiple of SYNC_BYTES without a sync; Parts builds on it
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
                return self._stage()
            with self._failing(), disk("prove an upload"):
                self._sync()
                found = hash_start(self._parts.path(self._part.principal, self.sha256)).hexdigest()
            try:
                self._compare(found)
            except DigestMismatch:
                self._parts.forget(self._part)
                raise
            return self._stage()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """End without staging: the client is gone. What is on disk can be resumed. May be called more than once."""
        if not self._open:
            return
        self._open = False
        if self._part is None:
            self._release()
            return
        try:
            if self._part.active:
                if not self._failed:
                    with contextlib.suppress(OSError):
                        self._sync()
                self._parts.close(self._part, self.synced)
        except BridgedError:
            pass  # The offset of the last orderly sidecar or the last whole step counts then; see Parts.
        finally:
            os.close(self._fd)

    def take_back(self) -> None:
        """End, and undo what was written: the bytes are not those that their sender meant. The upload goes on where it was."""
        if self._open and self._part is not None and not self._failed:
            with self._failing(), disk("take back what was written"):
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
