"""The file of the journal: opened, locked, checked and brought up to date before anybody reads or writes it.

A file of a newer version, of somebody else, or a damaged one is refused and left as it is. What passes is a ``StorageError``
(disk full, read-only or failing, the file locked by somebody); all else is ``JournalError``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from bridged.errors import BridgedError, JournalError, StorageError, StorageFailed, StorageFull, disk_error
from bridged.images.durable import sync_directory
from bridged.jobs.model import TERMINAL

APPLICATION_ID = 0x42524447  # "BRDG": `file` and a curious person can tell what this is.
BUSY_S = 5.0
ROOM_BYTES = 64 << 10  # SQLite says "I/O error" where it could not make its index file larger: with less than this it is full.
# What passes when somebody makes room, changes the disk, or lets go of the file (a curious person's `sqlite3`).
_STORAGE: dict[int, type[StorageError]] = {
    sqlite3.SQLITE_FULL: StorageFull,
    sqlite3.SQLITE_READONLY: StorageFailed,
    sqlite3.SQLITE_IOERR: StorageFailed,
    sqlite3.SQLITE_CANTOPEN: StorageFailed,
    sqlite3.SQLITE_PERM: StorageFailed,
    sqlite3.SQLITE_BUSY: StorageError,
}
ENDED = ", ".join(f"'{state}'" for state in sorted(TERMINAL))

# Each entry brings a file from the version of its index to the next; an entry that was released never changes.
MIGRATIONS: tuple[str, ...] = (
    f"""
    CREATE TABLE jobs (
        n INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, target TEXT NOT NULL, state TEXT NOT NULL, seq INTEGER NOT NULL,
        image TEXT NOT NULL, content TEXT NOT NULL, params TEXT NOT NULL, principal TEXT NOT NULL,
        created REAL NOT NULL, started REAL NOT NULL, ended REAL NOT NULL, phase TEXT NOT NULL, reason TEXT NOT NULL,
        done INTEGER NOT NULL, total INTEGER NOT NULL, attempts INTEGER NOT NULL, touched INTEGER NOT NULL,
        error TEXT, result TEXT
    ) STRICT;
    CREATE INDEX jobs_by_target ON jobs (target, n);
    CREATE INDEX jobs_by_state ON jobs (state, n);
    CREATE TRIGGER terminal_is_final BEFORE UPDATE ON jobs WHEN OLD.state IN ({ENDED})
        BEGIN SELECT RAISE(ABORT, 'a terminal state never changes'); END;
    CREATE TABLE idempotency (
        id TEXT PRIMARY KEY, job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, request TEXT NOT NULL
    ) STRICT;
    CREATE INDEX idempotency_by_job ON idempotency (job);
    CREATE TABLE updates (
        job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, seq INTEGER NOT NULL, target TEXT NOT NULL, at REAL NOT NULL,
        state TEXT NOT NULL, phase TEXT NOT NULL, done INTEGER NOT NULL, total INTEGER NOT NULL, rate REAL NOT NULL,
        code TEXT NOT NULL, event TEXT NOT NULL, PRIMARY KEY (job, seq)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE proven (
        job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, address INTEGER NOT NULL, size_bytes INTEGER NOT NULL,
        digest TEXT NOT NULL, PRIMARY KEY (job, address)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE backups (
        job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE, uid TEXT NOT NULL, kept BLOB NOT NULL,
        digest TEXT NOT NULL
    ) STRICT;
    CREATE TABLE sessions (
        target TEXT PRIMARY KEY, job TEXT NOT NULL, hazard_s REAL NOT NULL, since_boot_s REAL NOT NULL, boot_id TEXT NOT NULL,
        at REAL NOT NULL
    ) STRICT;
    CREATE TABLE targets (
        name TEXT PRIMARY KEY, pid INTEGER NOT NULL, family TEXT NOT NULL, names TEXT NOT NULL, uid TEXT NOT NULL,
        flash_bytes INTEGER NOT NULL, layout TEXT NOT NULL, loader TEXT NOT NULL, identified REAL NOT NULL,
        content TEXT NOT NULL, image TEXT NOT NULL, image_name TEXT NOT NULL, evidence TEXT NOT NULL, proven REAL NOT NULL,
        good_image TEXT NOT NULL
    ) STRICT;
    """,
    "".join(
        f"ALTER TABLE targets ADD COLUMN {column} NOT NULL DEFAULT {default};"
        for column, default in (
            ("good_type TEXT", "''"),
            ("good_patch TEXT", "''"),
            ("good_content TEXT", "''"),
            ("good_name TEXT", "''"),
            ("good_pid INTEGER", "0"),
            ("good_uid TEXT", "''"),
        )
    ),
    """
    ALTER TABLE jobs ADD COLUMN source TEXT NOT NULL DEFAULT '';
    CREATE TABLE credentials (
        name TEXT PRIMARY KEY, key TEXT NOT NULL UNIQUE, scopes TEXT NOT NULL, targets TEXT NOT NULL, created REAL NOT NULL,
        expires REAL NOT NULL, made_by TEXT NOT NULL
    ) STRICT;
    CREATE TABLE audit (
        n INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, who TEXT NOT NULL, source TEXT NOT NULL, what TEXT NOT NULL,
        target TEXT NOT NULL, job TEXT NOT NULL, result TEXT NOT NULL, detail TEXT NOT NULL
    ) STRICT;
    """,
    "ALTER TABLE targets ADD COLUMN version TEXT NOT NULL DEFAULT '';",
    """
    ALTER TABLE targets ADD COLUMN rates TEXT NOT NULL DEFAULT '';
    CREATE TABLE sectors (
        target TEXT NOT NULL, address INTEGER NOT NULL, size_bytes INTEGER NOT NULL, digest TEXT NOT NULL,
        PRIMARY KEY (target, address)
    ) STRICT, WITHOUT ROWID;
    """,
    "ALTER TABLE targets ADD COLUMN second_stage TEXT NOT NULL DEFAULT '';",
    # Nobody ever read it: of a hazard counts when the daemon died, not when its stage began.
    "ALTER TABLE sessions DROP COLUMN since_boot_s;",
    "ALTER TABLE updates ADD COLUMN reason TEXT NOT NULL DEFAULT '';",
)
VERSION = len(MIGRATIONS)


def open_database(path: Path, limit_bytes: int) -> tuple[sqlite3.Connection, sqlite3.Connection, int]:
    """Blocking: a connection that writes, one that reads, and the lock on the file. Makes it where there is none.

    Raises ``JournalError`` (newer version, damaged, not ours, used by another process) and ``StorageError``.
    """
    if sqlite3.sqlite_version_info < (3, 37):
        raise JournalError(f"SQLite {sqlite3.sqlite_version} is too old: STRICT tables need 3.37")
    try:
        _make_directory(path.parent)
        lock_fd = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise disk_error(error, f"opening the journal {path}") from error
    opened: list[sqlite3.Connection] = []
    try:
        _take(lock_fd, path)
        _inspect(path)
        writer = _connect(path, opened)
        _set_up(writer, limit_bytes)
        _migrate(writer, path)
        reader = _connect(path, opened)
        reader.execute("PRAGMA query_only = ON")
        _check(reader, path)
        return writer, reader, lock_fd
    except BaseException as error:
        for connection in opened:
            connection.close()
        os.close(lock_fd)
        if not isinstance(error, Exception) or isinstance(error, BridgedError):
            raise
        # A damaged file shows as all kinds of errors.
        raise translated(error, f"opening the journal {path}", path) from error


@contextlib.contextmanager
def copied(path: Path, folder: Path) -> Iterator[Path]:
    """Blocking: a copy in ``folder`` of a file whose disk takes nothing any more. Raises as ``open_database`` does."""
    with TemporaryDirectory(dir=folder) as place, contextlib.ExitStack() as stack:
        try:
            # flock needs no right to write: a daemon that lives is kept apart all the same.
            lock_fd = os.open(path.with_name(path.name + ".lock"), os.O_RDONLY)
            stack.callback(os.close, lock_fd)
            _take(lock_fd, path)
            for name in (path.name, f"{path.name}-wal"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(path.with_name(name), Path(place, name))
        except OSError as error:
            raise disk_error(error, f"copying the journal {path}") from error
        yield Path(place, path.name)


def _make_directory(path: Path) -> None:
    """SQLite syncs the names of its files in this directory; that the directory itself is there is for us to sync."""
    if path.is_dir():
        return
    path.mkdir(parents=True, exist_ok=True)
    sync_directory(path.parent)


def _take(lock_fd: int, path: Path) -> None:
    """Two daemons on one journal would run each job twice."""
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise JournalError(f"the journal {path} is in use by another process", path=str(path)) from error


def _inspect(path: Path) -> None:
    """Refuse what is not ours to write, before anything that could change the file."""
    if not path.exists() or not path.stat().st_size:
        return
    try:
        version, owner, tables = _identity(path, "ro")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
            raise
        # The first transaction of a file, which sets up write-ahead logging, was cut off and is to be rolled back. Whose file
        # this is can be told after that only, so it is done in a copy first.
        with TemporaryDirectory() as folder:
            for name in (path.name, f"{path.name}-journal"):
                shutil.copyfile(path.with_name(name), Path(folder, name))
            version, owner, tables = _identity(Path(folder, path.name), "rw")
    if owner != APPLICATION_ID and (owner or version or tables):
        raise JournalError(f"{path} is a database of another program (application id {owner:#x})", path=str(path))
    if version > VERSION:
        raise JournalError(
            f"the journal {path} has version {version}, this bridged knows up to {VERSION}; it was left as it is",
            path=str(path),
            version=version,
            known=VERSION,
        )


def _identity(path: Path, mode: str) -> tuple[int, int, int]:
    """Version, application id, and how many tables and the like there are."""
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True)) as connection:
        asked = ("PRAGMA user_version", "PRAGMA application_id", "SELECT count(*) FROM sqlite_master")
        version, owner, tables = (int(connection.execute(sql).fetchone()[0]) for sql in asked)
    return version, owner, tables


def _connect(path: Path, opened: list[sqlite3.Connection]) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    opened.append(connection)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _set_up(connection: sqlite3.Connection, limit_bytes: int) -> None:
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise JournalError(f"SQLite refuses write-ahead logging here (it says {mode!r}); is this a network file system?")
    connection.execute("PRAGMA synchronous = FULL")
    page_bytes = int(connection.execute("PRAGMA page_size").fetchone()[0])
    connection.execute(f"PRAGMA max_page_count = {max(limit_bytes // page_bytes, 1)}")


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Each step is one transaction together with its version number, so a crash in between repeats it whole."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    for number in range(version, VERSION):
        script = f"BEGIN IMMEDIATE; {MIGRATIONS[number]}; PRAGMA application_id = {APPLICATION_ID};"
        connection.executescript(f"{script} PRAGMA user_version = {number + 1}; COMMIT;")
    os.chmod(path, 0o600)


def _check(connection: sqlite3.Connection, path: Path) -> None:
    found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(5)")]
    orphans = connection.execute("PRAGMA foreign_key_check").fetchall()
    if found != ["ok"] or orphans:
        what = "; ".join(found) if found != ["ok"] else f"{len(orphans)} rows belong to no job"
        raise JournalError(f"the journal {path} is damaged: {what}", path=str(path))


def translated(error: BaseException, attempted: str, path: Path) -> BaseException:
    if isinstance(error, BridgedError):
        return error
    kind = _STORAGE.get((getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF)
    if isinstance(error, OSError):
        found: BridgedError = disk_error(error, attempted)
    elif kind is not None:
        kind = StorageFull if kind is StorageFailed and _no_room(path) else kind
        found = kind(f"{attempted}: {error}")
    else:
        found = JournalError(f"{attempted}: {error}")
    found.__cause__ = error
    return found


def _no_room(path: Path) -> bool:
    try:
        disk = os.statvfs(path.parent)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < ROOM_BYTES
