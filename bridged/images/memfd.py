"""Images in sealed memory: how a whole, checked ``Image`` goes from one process to the next (design, sections 2 and 3).

The parser process fills a memfd, the daemon seals it, a session process inherits the descriptor. A seal is the kernel's
promise that nobody can change, grow or shrink the content any more, not even through another descriptor of the same memory.

Invariants:

- What ``map_sealed`` returns was sealed before the first byte was looked at; an unsealed descriptor is refused.
- Content is mapped, never ``read()``: the file offset is shared by everybody who inherited the descriptor.
- Standard library only: the session process imports this module.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from bridged.errors import BridgedError, CorruptImage, ImageTooLarge
from bridged.images.model import Image

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def create(name: str) -> int:
    """A new, empty memfd that can be sealed later. ``name`` shows in /proc only."""
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """``os.write`` until everything is written: one call writes at most 2 GiB and may write less."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def seal_fd(fd: int) -> None:
    """Put every seal on ``fd``. Raises ``OSError`` (EBUSY) while somebody has it mapped for writing."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)


def seal(image: Image) -> int:
    """A sealed memfd with the encoded image. The caller owns the descriptor (close-on-exec; pass it with ``pass_fds``)."""
    fd = create("bridged-image")
    try:
        write_all(fd, image.encode())
        seal_fd(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def map_sealed(fd: int, limit_bytes: int = 1 << 32) -> Image:
    """The image in a sealed memfd, checked; the descriptor stays open and its offset untouched.

    Raises ``CorruptImage`` when the descriptor is no sealed memfd or its content no encoded image, ``ImageTooLarge`` beyond
    ``limit_bytes``.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise CorruptImage(f"descriptor {fd} cannot carry an image: it is no memfd ({error.strerror})") from error
    if seals & SEALS != SEALS:
        raise CorruptImage(f"descriptor {fd} carries an image that is not sealed (seals {seals:#x}, expected {SEALS:#x})")
    size_bytes = os.fstat(fd).st_size
    if size_bytes > limit_bytes:
        raise ImageTooLarge(
            f"the encoded image has {size_bytes} bytes, at most {limit_bytes} were expected", size_bytes=size_bytes
        )
    if not size_bytes:  # mmap refuses a length of 0
        raise CorruptImage("the encoded image is empty: 0 bytes")
    mapped = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    try:
        return Image.decode(memoryview(mapped))
    except BridgedError as error:
        # Without its traceback, whose frames hold views of the mapping: close() would raise BufferError instead.
        raise error.with_traceback(None) from None
    finally:
        mapped.close()
