"""Files that survive a power cut: whole or not at all, and on the medium before anybody is told of them.

A file is written under a temporary name, synced and renamed, and then its directory is synced: only that puts the name on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bridged.errors import disk_error
from bridged.images.memfd import write_all

TMP = ".tmp"  # What ends so was being written when the power went, and is removed at the next start.
CHUNK_BYTES = 1 << 20


@contextlib.contextmanager
def disk(doing: str) -> Iterator[None]:
    """Translate what the disk says."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, doing) from error


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """The whole file or none of it, also across a power cut."""
    tmp = path.with_name(path.name + TMP)
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
    sync_directory(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a sidecar; empty when there is none or it cannot be understood: all of it can be made again."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def hash_start(path: Path, count: int | None = None) -> hashlib._Hash:
    """SHA-256 over the first ``count`` bytes of a file (all of it without), in pieces."""
    digest = hashlib.sha256()
    left = count if count is not None else 1 << 62
    with path.open("rb", buffering=0) as file:
        while left and (chunk := file.read(min(CHUNK_BYTES, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest


def modified_s(path: Path) -> float:
    """UTC seconds; 0 when the file has gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
