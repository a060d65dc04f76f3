"""The daemon, which kills itself and its session processes at the n-th moment that matters: run as a program by tests.

    killed.py N POINTS ARGUMENTS-OF-SERVE...

A moment is just before a call that puts something on disk, before and after each commit of the journal, at each event and each
progress of a session, and between two bytes of an upload. N = 0 kills at none; ``POINTS`` gets a line for each moment passed.
Nothing else is changed, and what follows from a moment is not foreseen: SIGKILL, as a power cut would, but for the page cache.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("fsync", "fdatasync", "replace", "rename", "ftruncate", "unlink", "mkdir")


class Moments:
    def __init__(self, kill_at: int, log: Path) -> None:
        self._kill_at = kill_at
        self._log = log
        self._passed = 0

    def passed(self, name: str) -> None:
        self._passed += 1
        with self._log.open("a") as log:
            log.write(f"{name}\n")
        if self._passed == self._kill_at:
            for child in children():
                os.kill(child, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.passed(name or f"{real.__name__} in {caller()}")
            return real(*arguments, **options)

        return wrapped


def children() -> list[int]:
    """Processes whose parent this is, whichever thread made them."""
    texts = [(task / "children").read_text() for task in Path("/proc/self/task").iterdir()]
    return [int(word) for text in texts for word in text.split()]


def caller() -> str:
    """The function of ours from which a call of ``os`` comes."""
    frame = sys._getframe(2)
    while frame.f_back is not None and "/bridged/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame.f_code.co_name


def main() -> int:
    from bridged import app
    from bridged.images.upload import Upload
    from bridged.jobs.book import Book
    from bridged.jobs.journal import Journal
    from bridged.jobs.run import Runner

    moments = Moments(int(sys.argv[1]), Path(sys.argv[2]))
    for name in CALLS:
        setattr(os, name, moments.before(getattr(os, name), ""))
    commit = Journal._commit

    def commit_and_tell(self: Journal, group: Any) -> None:
        moments.passed("before a commit")
        self.on_commit = lambda: moments.passed("after a commit")
        commit(self, group)

    Journal._commit = commit_and_tell  # type: ignore[method-assign]
    Upload.write = moments.before(Upload.write, "bytes of an upload")  # type: ignore[method-assign]
    Book.progress = moments.before(Book.progress, "progress of a session")  # type: ignore[method-assign]
    observe = Runner._observe

    def observe_and_tell(self: Runner, lane: Any, live: Any, event: Any) -> None:
        moments.passed(f"event {type(event).__name__} {getattr(event, 'phase', '')}".rstrip())
        observe(self, lane, live, event)

    Runner._observe = observe_and_tell  # type: ignore[method-assign]
    return app.serve(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
