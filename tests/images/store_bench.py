"""A store on a small quota, with a parser in this process and a clock that stands."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridged.images import formats
from bridged.images.model import Image
from bridged.images.staged import StagedImage
from bridged.images.store import Store

MIB = 1 << 20
BASE = 0x08000000
DATA = random.Random(1).randbytes(600 * 1024)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Clock:
    """Time as a value. It starts at the real time, because files get their times from the system."""

    def __init__(self) -> None:
        self.at = 1_800_000_000.0

    def __call__(self) -> float:
        return self.at


class InProcess:
    """The parser without its process; counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, fd: int, size_bytes: int, type_hint: str = "auto", base_address: int | None = None, /) -> Image:
        self.calls += 1
        return formats.parse(os.pread(fd, size_bytes, 0), type_hint, base_address)


def opened(root: Path, limit: int = 8 * MIB, image_limit: int = 4 * MIB, **more: Any) -> Store:
    return Store(root, limit, image_limit, **({"parse": InProcess()} | more))


def put(
    into: Store, data: bytes, name: str = "", principal: str = "anna", offset: int = 0, step: int = 70_000, hint: str = "auto"
) -> StagedImage:
    upload = into.open_upload(principal, len(data), sha(data), offset, name, hint)
    for at in range(offset, len(data), step):
        upload.write(data[at : at + step])
    return upload.finish()


def files(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


def failing(monkeypatch: pytest.MonkeyPatch, name: str, code: int, after: int = 0) -> None:
    """``os.<name>`` fails with ``code`` from the call number ``after`` on."""
    real: Callable[..., Any] = getattr(os, name)
    calls = 0

    def fail(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(code, os.strerror(code))
        return real(*args, **more)

    monkeypatch.setattr(os, name, fail)
