"""The bytes that ``read`` jobs brought: one file for each job, durable before its job succeeds, bounded in all.

Blocking; called in threads. It knows nothing of jobs but their ids.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from bridged.errors import disk_error
from bridged.images.durable import sync_directory

LIMIT_BYTES = 64 << 20  # The largest flash is 4 MiB; the oldest files go first.
JOB_LIMIT_BYTES = 16 << 20  # Of one job; its bytes are in memory at once. At 115200 baud this takes 25 minutes.


class Results:
    def __init__(self, root: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._root = root
        self._limit_bytes = limit_bytes

    def path(self, job_id: str) -> Path:
        return self._root / f"{job_id}.bin"

    def save(self, job_id: str, data: bytes) -> dict[str, Any]:
        """``{sha256, size}`` once the file is on disk. Raises ``StorageError``."""
        path = self.path(job_id)
        part = path.with_suffix(".part")
        try:
            if not self._root.is_dir():
                self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
                sync_directory(self._root.parent)
            self._make_room(len(data))
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.rename(path)
            sync_directory(self._root)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise disk_error(error, f"saving the {len(data)} bytes that job {job_id} read") from error
        return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}

    def drop(self, job_id: str) -> None:
        with contextlib.suppress(OSError):
            self.path(job_id).unlink(missing_ok=True)

    def _make_room(self, more_bytes: int) -> None:
        found = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in self._root.iterdir()), key=lambda f: f[:2])
        used = sum(size for _, size, _ in found) + more_bytes
        for _, size, path in found:
            if used <= self._limit_bytes:
                return
            path.unlink(missing_ok=True)
            used -= size
