"""The flight recordings of the last few jobs that failed or were asked to keep theirs: one text file each.

Blocking; called in threads. It knows nothing of jobs but their ids, and does not read what it keeps: see ``protocol.trace``.
"""

from __future__ import annotations

import threading
from pathlib import Path

from bridged.images.durable import TMP, disk, write_file
from bridged.images.staged import plain_name


class Traces:
    """``keep``: how many; 0 for none."""

    def __init__(self, root: Path, keep: int) -> None:
        self._root = root
        self._keep = keep
        self._lock = threading.Lock()
        with disk(f"open the recordings in {root}"):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for half in root.glob(f"*{TMP}"):
                half.unlink(missing_ok=True)

    def save(self, job_id: str, text: str) -> Path | None:
        """Keep a recording and only the last few of them. None where none are kept. Raises ``StorageError``."""
        if self._keep <= 0:
            return None
        path = self._path(job_id)
        with self._lock, disk(f"keep the trace of job {job_id}"):
            write_file(path, text.encode("utf-8", "backslashreplace"))
            kept = sorted(self._root.glob("*.txt"), key=lambda p: (p.stat().st_mtime_ns, p.name))
            for old in [p for p in kept if p != path][: max(0, len(kept) - self._keep)]:
                old.unlink(missing_ok=True)
        return path

    def file(self, job_id: str) -> Path | None:
        """Where the recording of a job is, as long as it is one of the last few."""
        path = self._path(job_id)
        return path if path.is_file() else None

    def _path(self, job_id: str) -> Path:
        return self._root / f"{plain_name(job_id)}.txt"
