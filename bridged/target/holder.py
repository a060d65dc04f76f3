"""Which process has a device, by what it has open, as far as /proc may be read, or by its lock file."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

_PROC = "/proc"
_LOCKS = "/run/lock"
_KERNEL_LOCKS = "/proc/locks"


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has the port open."""

    pid: int
    command: str


def find_holder(rdev: int, at_least: int = 1) -> Holder | None:
    """A process that has the device open, as far as /proc may be read (as root: everybody's; otherwise one's own).

    Other processes come first. Our own counts only from ``at_least`` descriptors on: 2 while we hold one for a trial.
    """
    own = os.getpid()
    for pid in _numbers(_PROC):
        if pid != own and _open_count(pid, rdev):
            return Holder(pid, _command(pid))
    return Holder(own, _command(own)) if _open_count(own, rdev) >= at_least else None


def lock_file_holder(path: str) -> Holder | None:
    """Who says by a lock file that the port is its own (FHS 3.0, 5.9: ``LCK..ttyS0``, the process id in ten ASCII characters).

    A file whose process is gone means nothing. Ours is none: the folder is read-only for the service, and flock is stronger.
    """
    for name in {os.path.basename(path), os.path.basename(os.path.realpath(path))}:
        try:
            with open(f"{_LOCKS}/LCK..{name}", encoding="ascii", errors="replace") as file:
                pid = int(file.read(64).split()[0])
            os.kill(pid, 0)
        except PermissionError:
            pass  # Somebody else's, so it lives.
        except (OSError, ValueError, IndexError, OverflowError):
            continue
        if 0 < pid != os.getpid():
            return Holder(pid, _command(pid))
    return None


def flock_pids(status: os.stat_result) -> list[int]:
    """Who has locked this file with flock, by the kernel's list, without opening it; not those of another container.

    The number is of the process that took the lock: a child that inherited it may be what is left.
    """
    where = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        with open(_KERNEL_LOCKS, encoding="ascii", errors="replace") as file:
            rows = [line.split() for line in file]
    except OSError:
        return []
    return [int(row[4]) for row in rows if len(row) > 5 and row[1] == "FLOCK" and row[5] == where]


def first_alive(pids: list[int]) -> Holder | None:
    for pid in pids:
        try:
            os.kill(pid, 0)
        except PermissionError:
            pass  # Somebody else's, so it lives.
        except OSError:
            continue
        return Holder(pid, _command(pid))
    return None


def _open_count(pid: int, rdev: int) -> int:
    count = 0
    for number in _numbers(f"{_PROC}/{pid}/fd"):
        link = f"{_PROC}/{pid}/fd/{number}"
        try:
            # Only below /dev, so that a file on a dead network mount is never looked at.
            if os.readlink(link).startswith("/dev/"):
                status = os.stat(link)
                count += stat.S_ISCHR(status.st_mode) and status.st_rdev == rdev
        except OSError:
            continue  # Closed in the meantime, or not ours to see.
    return count


def _numbers(folder: str) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(folder) if name.isdigit())
    except OSError:
        return []


def _command(pid: int) -> str:
    try:
        with open(f"{_PROC}/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
