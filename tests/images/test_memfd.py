"""Sealed images: nobody can change what was checked, and nothing unsealed is believed."""

from __future__ import annotations

import fcntl
import os
import struct
import tempfile

import pytest

from bridged.errors import CorruptImage, ImageTooLarge, OverlappingImage
from bridged.images import memfd
from bridged.images.model import MAGIC, Image

IMAGE = Image.of([(0x08000000, bytes(range(256)) * 8), (0x08010000, b"tail")])
OVERLAP = MAGIC + struct.pack("<5I", 2, 0, 2, 1, 2) + b"abcd"


def test_seal_and_map() -> None:
    fd = memfd.seal(IMAGE)
    try:
        os.lseek(fd, 7, os.SEEK_SET)
        assert memfd.map_sealed(fd) == IMAGE
        assert memfd.map_sealed(fd).digest == IMAGE.digest
        assert os.lseek(fd, 0, os.SEEK_CUR) == 7, "the offset is shared with other processes and stays untouched"
    finally:
        os.close(fd)


def test_sealed_memory_cannot_be_changed() -> None:
    fd = memfd.seal(IMAGE)
    try:
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 1)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 1 << 20)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    finally:
        os.close(fd)


def test_what_is_not_sealed_is_refused() -> None:
    fd = memfd.create("test")
    try:
        memfd.write_all(fd, IMAGE.encode())
        with pytest.raises(CorruptImage, match="not sealed"):
            memfd.map_sealed(fd)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with pytest.raises(CorruptImage, match="not sealed"):
            memfd.map_sealed(fd)
    finally:
        os.close(fd)
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as file, pytest.raises(CorruptImage, match=r"not sealed|no memfd"):
        memfd.map_sealed(file.fileno())
    with pytest.raises(CorruptImage, match="no memfd"):
        memfd.map_sealed(reader)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("content", [b"", b"rubbish", IMAGE.encode()[:-1], IMAGE.encode() + b"x", OVERLAP])
def test_sealed_rubbish_is_no_image(content: bytes) -> None:
    fd = memfd.create("test")
    try:
        memfd.write_all(fd, content)
        memfd.seal_fd(fd)
        with pytest.raises(CorruptImage if content != OVERLAP else OverlappingImage):
            memfd.map_sealed(fd)
    finally:
        os.close(fd)


def test_limit() -> None:
    fd = memfd.seal(IMAGE)
    try:
        assert memfd.map_sealed(fd, len(IMAGE.encode())) == IMAGE
        with pytest.raises(ImageTooLarge):
            memfd.map_sealed(fd, len(IMAGE.encode()) - 1)
    finally:
        os.close(fd)
