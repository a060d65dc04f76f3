"""The journal: jobs, their log, proven sectors, hazards and what is known of each target, in one SQLite file.

One thread writes (WAL, synchronous=FULL); whatever waits in its queue is committed together, since an SD card pays for each
commit and not for each row. A write returns a ``Future`` that is done when the bytes are on the medium. A ``Change`` is applied
whole or not at all: the kept bytes, the hazard and the state of the ``erasing`` barrier are one ``Change``. Reads use a second
connection and see what is committed.

What is written when is the business of ``service``; this module knows nothing of queues, targets or clients. It does hold
three promises by itself, in the file, whatever its caller does (design, P5):

- a terminal state never changes (a trigger),
- an idempotency id names one job for as long as that job is remembered,
- a file of a newer version, of somebody else, or a damaged one is refused and left as it is.

What passes is a ``StorageError`` (disk full, read-only or failing, the file locked by somebody); all else is ``JournalError``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import queue
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from bridged.errors import (
    BridgedError,
    IdempotencyConflict,
    JournalError,
    StorageError,
    StorageFailed,
    StorageFull,
    UnknownJob,
    disk_error,
)
from bridged.events import SectorProven
from bridged.jobs.model import TERMINAL, Job, JobKind, JobState, Update
from bridged.jobs.results import sync_directory

T = TypeVar("T")

APPLICATION_ID = 0x42524447  # "BRDG": `file` and a curious person can tell what this is.
LIMIT_BYTES = 256 << 20  # 1000 jobs take some 4 MiB; the limit keeps a defect from filling the card.
GROUP_LIMIT = 64  # Most changes of one commit, so that the first of them does not wait for ever.
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
_ENDED = ", ".join(f"'{state}'" for state in sorted(TERMINAL))

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
    CREATE TRIGGER terminal_is_final BEFORE UPDATE ON jobs WHEN OLD.state IN ({_ENDED})
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
)
VERSION = len(MIGRATIONS)
AUDIT_LIMIT = 10_000  # Entries of the audit log, and as many of failed logins beside it; some 150 bytes each.


@dataclass(frozen=True, slots=True)
class OpenSession:
    """A target in the hands of a session: it is released at the next start if nobody closes this entry before (P4).

    ``hazard_s``: the longest that any one command of the running stage may need (P9), 0 where nothing is at risk.
    ``since_boot_s``: CLOCK_BOOTTIME of this boot, ``boot_id``, when the entry was written; ``at`` the same in UTC seconds.
    """

    target: str
    job: str
    hazard_s: float
    since_boot_s: float
    boot_id: str
    at: float


@dataclass(frozen=True, slots=True)
class TargetRecord:
    """What was last seen in one target. ``content`` is empty while nobody knows what is in its flash.

    ``content``, ``image``, ``image_name``, ``evidence``, ``proven`` (UTC seconds) describe the last proof and are voided when
    an erase begins or another chip answers. What begins with ``good_`` outlives that: the last content that was proven and
    healthy, all that is needed to build it again, and the chip that it was proven in. ``good_content`` is empty for none.
    ``version``: the highest signed one that was ever proven there; nothing voids it.
    """

    name: str
    pid: int = 0
    family: str = ""
    names: str = ""
    uid: str = ""
    flash_bytes: int = 0
    layout: str = ""
    loader: str = ""
    identified: float = 0.0
    content: str = ""
    image: str = ""
    image_name: str = ""
    evidence: str = ""
    proven: float = 0.0
    good_image: str = ""
    good_type: str = ""
    good_patch: str = ""
    good_content: str = ""
    good_name: str = ""
    good_pid: int = 0
    good_uid: str = ""
    version: str = ""
    rates: str = ""


@dataclass(frozen=True, slots=True)
class Backup:
    """What an interrupted job needs to go on: the bytes it keeps (P6), and from which chip they were read."""

    uid: str = ""
    kept: bytes = b""


@dataclass(frozen=True, slots=True)
class Change:
    """One transaction. ``updates``, ``proven`` and ``backup`` belong to ``job``; a job that ends loses its proofs and backup.

    ``anew``: what was proven and kept for the job until now goes first, for it will work on other content from here on.
    ``session`` opens or rewrites the entry of its target; ``close`` names the target whose entry goes.
    """

    job: Job | None = None
    updates: tuple[Update, ...] = ()
    proven: tuple[SectorProven, ...] = ()
    backup: Backup | None = None
    session: OpenSession | None = None
    close: str = ""
    target: TargetRecord | None = None
    anew: bool = False


@dataclass(frozen=True, slots=True)
class Credential:
    """What opens this gateway. ``key``: ``sha256:HEX`` of a token, or ``cert:NAME`` of a client certificate.

    ``scopes``, ``targets``: words by comma; no targets means all. ``expires``: UTC seconds, 0 for never.
    """

    name: str
    key: str
    scopes: str
    targets: str
    created: float
    expires: float = 0.0
    made_by: str = ""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Who did what from where, and what came of it. ``who`` is empty for somebody who could not say who it is."""

    at: float
    who: str
    source: str
    what: str
    target: str = ""
    job: str = ""
    result: str = "ok"
    detail: str = ""


_CREDENTIAL_FIELDS = tuple(Credential.__dataclass_fields__)
_AUDIT_FIELDS = tuple(AuditEntry.__dataclass_fields__)
_JOB_FIELDS = tuple(Job.__dataclass_fields__)
_JOB_COLUMNS = ", ".join(_JOB_FIELDS)
_UPDATE_FIELDS = tuple(Update.__dataclass_fields__)
_TARGET_FIELDS = tuple(TargetRecord.__dataclass_fields__)
_SESSION_FIELDS = tuple(OpenSession.__dataclass_fields__)


def _marks(fields: tuple[str, ...]) -> str:
    return ", ".join(f":{f}" for f in fields)


_INSERT_JOB = f"INSERT INTO jobs ({_JOB_COLUMNS}) VALUES ({_marks(_JOB_FIELDS)})"
_UPDATE_JOB = (
    "UPDATE jobs SET " + ", ".join(f"{f} = :{f}" for f in _JOB_FIELDS if f != "id") + " WHERE id = :id AND seq <= :seq"
)
_INSERT_UPDATE = f"INSERT OR IGNORE INTO updates ({', '.join(_UPDATE_FIELDS)}) VALUES ({_marks(_UPDATE_FIELDS)})"
_PUT_SESSION = f"INSERT OR REPLACE INTO sessions ({', '.join(_SESSION_FIELDS)}) VALUES ({_marks(_SESSION_FIELDS)})"
_PUT_TARGET = f"INSERT OR REPLACE INTO targets ({', '.join(_TARGET_FIELDS)}) VALUES ({_marks(_TARGET_FIELDS)})"

_PUT_CREDENTIAL = f"INSERT INTO credentials ({', '.join(_CREDENTIAL_FIELDS)}) VALUES ({_marks(_CREDENTIAL_FIELDS)})"
_INSERT_AUDIT = f"INSERT INTO audit ({', '.join(_AUDIT_FIELDS)}) VALUES ({_marks(_AUDIT_FIELDS)})"

_Operation = Callable[[sqlite3.Connection], Any]


class Journal:
    """See the module docstring. ``open`` one, ``close`` it; blocking methods say so, the others never wait for the disk."""

    def __init__(self, path: Path, writer: sqlite3.Connection, reader: sqlite3.Connection, lock_fd: int) -> None:
        self.path = path
        self._writer = writer
        self._reader = reader
        self._reading = threading.Lock()
        self._lock_fd = lock_fd
        self._todo: queue.SimpleQueue[tuple[_Operation, Future[Any]] | None] = queue.SimpleQueue()
        self._closed = False
        self.on_commit: Callable[[], None] = lambda: None  # in the writer thread, after each commit: tests copy the file there
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, path: Path, *, limit_bytes: int = LIMIT_BYTES) -> Journal:
        """Blocking. Makes the file where there is none, brings an older one up to date.

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
            return cls(path, writer, reader, lock_fd)
        except BaseException as error:
            for connection in opened:
                connection.close()
            os.close(lock_fd)
            if not isinstance(error, Exception) or isinstance(error, BridgedError):
                raise
            # A damaged file shows as all kinds of errors.
            raise _translated(error, f"opening the journal {path}", path) from error

    @classmethod
    @contextlib.contextmanager
    def copied(cls, path: Path, folder: Path) -> Iterator[Journal]:
        """Blocking. A copy in ``folder`` of a journal whose disk takes nothing any more; what is written there is lost.

        Raises as ``open`` does.
        """
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
            journal = cls.open(Path(place, path.name))
            stack.callback(journal.close)
            yield journal

    def close(self) -> None:
        """Blocking: what was handed in is written first. A second close does nothing."""
        if self._closed:
            return
        self._closed = True
        self._todo.put(None)
        self._thread.join()
        with self._reading:
            self._reader.close()
        self._writer.close()
        os.close(self._lock_fd)

    # --- writing: at once queued, done when the future is ---------------------------------------------------------

    def admit(self, job: Job, idempotency_id: str, request: str) -> Future[str]:
        """Remember a new job. The future gives its id, or that of the job which the same id and request made before.

        ``request``: canonical text of what was asked. Fails with ``IdempotencyConflict`` when it differs from the first one.
        """

        def operation(connection: sqlite3.Connection) -> str:
            if idempotency_id:
                row = connection.execute("SELECT job, request FROM idempotency WHERE id = ?", (idempotency_id,)).fetchone()
                if row is not None:
                    return _same_request(idempotency_id, str(row["job"]), str(row["request"]), request)
            connection.execute(_INSERT_JOB, _job_row(job))
            connection.execute(_INSERT_UPDATE, _update_row(update_of(job, job.created)))
            if idempotency_id:
                connection.execute("INSERT INTO idempotency VALUES (?, ?, ?)", (idempotency_id, job.id, request))
            return job.id

        return self._enqueue(operation)

    def apply(self, change: Change) -> Future[None]:
        """All of ``change`` or nothing. Fails with ``JournalError`` where it would alter an ended job or go back in ``seq``."""
        return self._enqueue(lambda connection: _apply(connection, change))

    def prune(self, keep: int) -> Future[list[str]]:
        """Forget the oldest ended jobs beyond ``keep``, with their ids for idempotency; gives the ids that went."""

        def operation(connection: sqlite3.Connection) -> list[str]:
            rows = connection.execute(
                f"SELECT n, id FROM jobs WHERE state IN ({_ENDED}) ORDER BY n DESC LIMIT -1 OFFSET ?", (keep,)
            ).fetchall()
            connection.executemany("DELETE FROM jobs WHERE n = ?", [(row["n"],) for row in rows])
            return [str(row["id"]) for row in rows]

        return self._enqueue(operation)

    def put_credential(self, credential: Credential) -> Future[None]:
        """Fails with ``JournalError`` where its name or key is taken."""
        row = {f: getattr(credential, f) for f in _CREDENTIAL_FIELDS}
        return self._enqueue(lambda connection: _done(connection.execute(_PUT_CREDENTIAL, row)))

    def drop_credential(self, name: str) -> Future[None]:
        return self._enqueue(lambda connection: _done(connection.execute("DELETE FROM credentials WHERE name = ?", (name,))))

    def note_audit(self, entry: AuditEntry) -> Future[None]:
        """Failed logins have a room of their own: whoever causes many of them cannot push out what others did."""

        def operation(connection: sqlite3.Connection) -> None:
            added = connection.execute(_INSERT_AUDIT, {f: getattr(entry, f) for f in _AUDIT_FIELDS})
            if (added.lastrowid or 0) % 100 == 0:
                for kind in ("who = ''", "who <> ''"):
                    older = f"SELECT n FROM audit WHERE {kind} ORDER BY n DESC LIMIT -1 OFFSET {AUDIT_LIMIT}"
                    connection.execute(f"DELETE FROM audit WHERE n IN ({older})")

        return self._enqueue(operation)

    def ping(self) -> Future[None]:
        """Done when the writer thread has come round: the watchdog asks so whether it still lives."""
        return self._enqueue(lambda _connection: None)

    # --- reading: at once, a few hundred microseconds for a row by its key ----------------------------------------

    def job(self, job_id: str) -> Job:
        found = self._read(_job, f"SELECT {_JOB_COLUMNS} FROM jobs WHERE id = ?", (job_id,))
        if not found:
            raise UnknownJob(f"there is no job {job_id!r}", job=job_id[:64])
        return found[0]

    def active(self) -> list[Job]:
        """All jobs that have not ended, oldest first."""
        return self._read(_job, f"SELECT {_JOB_COLUMNS} FROM jobs WHERE state NOT IN ({_ENDED}) ORDER BY n")

    def jobs(self, target: str | None = None, state: JobState | None = None, limit: int = 50, before: str = "") -> list[Job]:
        """Newest first. ``before``: only those that were submitted before the job with this id. Raises ``UnknownJob``."""
        where = [f"{column} = ?" for column, value in (("target", target), ("state", state)) if value is not None]
        values: list[Any] = [value for value in (target, state) if value is not None]
        if before:
            self.job(before)
            where.append("n < (SELECT n FROM jobs WHERE id = ?)")
            values.append(before)
        clause = f"WHERE {' AND '.join(where)}" if where else ""
        return self._read(_job, f"SELECT {_JOB_COLUMNS} FROM jobs {clause} ORDER BY n DESC LIMIT ?", (*values, limit))

    def log(self, job_id: str, from_seq: int = 0, limit: int | None = None) -> list[Update]:
        sql = "SELECT * FROM updates WHERE job = ? AND seq >= ? ORDER BY seq LIMIT ?"
        return self._read(_update, sql, (job_id, from_seq, -1 if limit is None else limit))

    def proven(self, job_id: str) -> tuple[SectorProven, ...]:
        sql = "SELECT address, size_bytes, digest FROM proven WHERE job = ? ORDER BY address"
        return tuple(self._read(lambda row: SectorProven(**row), sql, (job_id,)))

    def backup(self, job_id: str) -> Backup:
        """Empty where there is none. Raises ``JournalError`` when the medium changed it: those bytes would go into flash."""
        found = self._read(_backup, "SELECT job, uid, kept, digest FROM backups WHERE job = ?", (job_id,))
        return found[0] if found else Backup()

    def sessions(self) -> list[OpenSession]:
        """Targets that nobody has released yet."""
        return self._read(lambda row: OpenSession(**row), "SELECT * FROM sessions ORDER BY at")

    def targets(self) -> list[TargetRecord]:
        return self._read(lambda row: TargetRecord(**row), "SELECT * FROM targets ORDER BY name")

    def sectors(self, target: str) -> list[SectorProven]:
        """What was last proven in the flash of ``target``, sector by sector; empty where nothing is known."""
        sql = "SELECT address, size_bytes, digest FROM sectors WHERE target = ? ORDER BY address"
        return self._read(lambda row: SectorProven(**row), sql, (target,))

    def in_doubt(self, target: str) -> bool:
        """Whether a job on ``target`` that may have begun an erase did not end well. What it left in its sectors nobody knows,
        whatever was proven in others since; it is forgotten with the job."""
        ill = ", ".join(f"'{state}'" for state in sorted(TERMINAL - {JobState.SUCCEEDED, JobState.ROLLED_BACK}))
        sql = f"SELECT 1 AS one FROM jobs WHERE target = ? AND touched = 1 AND state IN ({ill}) LIMIT 1"
        return bool(self._read(dict, sql, (target,)))

    def credentials(self) -> list[Credential]:
        return self._read(lambda row: Credential(**row), "SELECT * FROM credentials ORDER BY name")

    def audit(self, limit: int) -> list[AuditEntry]:
        """Newest first."""
        sql = f"SELECT {', '.join(_AUDIT_FIELDS)} FROM audit ORDER BY n DESC LIMIT ?"
        return self._read(lambda row: AuditEntry(**row), sql, (limit,))

    def submitted(self, idempotency_id: str, request: str) -> str:
        """The job that this id made before, empty for none. Raises ``IdempotencyConflict`` for another request."""
        rows = self._read(dict, "SELECT job, request FROM idempotency WHERE id = ?", (idempotency_id,))
        return _same_request(idempotency_id, str(rows[0]["job"]), str(rows[0]["request"]), request) if rows else ""

    # --- the inside -----------------------------------------------------------------------------------------------

    def _read(self, make: Callable[[dict[str, Any]], T], sql: str, values: tuple[Any, ...] = ()) -> list[T]:
        """What ``make`` makes of each row. Raises ``JournalError`` and ``StorageError``."""
        with self._reading:
            try:
                return [make(dict(row)) for row in self._reader.execute(sql, values)]
            except (sqlite3.Error, ValueError, KeyError, TypeError, RecursionError) as error:
                # What a failing card changed within a page SQLite does not notice: a state that is none, half of a JSON.
                raise _translated(error, f"reading the journal {self.path}", self.path) from error

    def _enqueue(self, operation: Callable[[sqlite3.Connection], T]) -> Future[T]:
        future: Future[T] = Future()
        if self._closed:
            future.set_exception(JournalError(f"the journal {self.path} is closed"))
        else:
            self._todo.put((operation, future))
        return future

    def _write(self) -> None:
        """The writer thread: take what waits, commit it together, then tell each who asked."""
        ending = False
        while not ending:
            group: list[tuple[_Operation, Future[Any]]] = []
            item = self._todo.get()
            while item is not None:
                group.append(item)
                if len(group) == GROUP_LIMIT or self._todo.empty():
                    break
                item = self._todo.get()
            ending = item is None
            if group:
                self._commit(group)

    def _commit(self, group: list[tuple[_Operation, Future[Any]]]) -> None:
        answers: list[tuple[Future[Any], Any, BaseException | None]] = []
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for operation, future in group:
                answers.append((future, *self._one(operation)))
            self._writer.execute("COMMIT")
        except Exception as error:
            # Nothing of the group is on disk; who asked may ask again.
            with contextlib.suppress(sqlite3.Error):
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
            failure = _translated(error, f"writing the journal {self.path}", self.path)
            answers = [(future, None, failure) for _, future in group]
        else:
            self.on_commit()
        for future, value, problem in answers:
            if not future.set_running_or_notify_cancel():
                continue  # Nobody waits any more; it is written all the same.
            if problem is None:
                future.set_result(value)
            else:
                future.set_exception(problem)

    def _one(self, operation: _Operation) -> tuple[Any, BaseException | None]:
        """One operation within the group. Only a failing disk takes the others with it."""
        self._writer.execute("SAVEPOINT one")
        try:
            value = operation(self._writer)
        except Exception as error:
            found = _translated(error, f"writing the journal {self.path}", self.path)
            if isinstance(found, StorageError) or not self._writer.in_transaction:
                raise
            self._writer.execute("ROLLBACK TO one")
            self._writer.execute("RELEASE one")
            return None, found
        self._writer.execute("RELEASE one")
        return value, None


def update_of(job: Job, at: float, *, rate: float = 0.0, event: dict[str, Any] | None = None) -> Update:
    """The ``Update`` that shows ``job`` as it is."""
    code = str((job.error or {}).get("code", ""))
    return Update(job.id, job.target, job.seq, at, job.state, job.phase, job.done, job.total, rate, code, event or {})


# --- the file -----------------------------------------------------------------------------------------------------


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


def _translated(error: BaseException, attempted: str, path: Path) -> BaseException:
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


# --- rows ---------------------------------------------------------------------------------------------------------


def _same_request(idempotency_id: str, job_id: str, first: str, request: str) -> str:
    if first != request:
        raise IdempotencyConflict(
            f"id {idempotency_id!r} was used before, for job {job_id} and another request: {first}", job=job_id
        )
    return job_id


def _done(_cursor: sqlite3.Cursor) -> None:
    """A statement whose answer is that it is done."""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _apply(connection: sqlite3.Connection, change: Change) -> None:
    job = change.job
    if job is not None:
        if connection.execute(_UPDATE_JOB, _job_row(job)).rowcount != 1:
            raise JournalError(f"job {job.id} is not in the journal, or it is ahead of seq {job.seq}", job=job.id)
        connection.executemany(_INSERT_UPDATE, [_update_row(u) for u in change.updates])
        if change.anew:
            connection.execute("DELETE FROM proven WHERE job = ?", (job.id,))
            connection.execute("DELETE FROM backups WHERE job = ?", (job.id,))
        connection.executemany(
            "INSERT OR REPLACE INTO proven VALUES (?, ?, ?, ?)",
            [(job.id, p.address, p.size_bytes, p.digest) for p in change.proven],
        )
        if change.backup is not None:
            saved = change.backup
            row = (job.id, saved.uid, saved.kept, _digest(saved.kept))
            connection.execute("INSERT OR REPLACE INTO backups VALUES (?, ?, ?, ?)", row)
        if job.terminal:
            if job.state in (JobState.SUCCEEDED, JobState.ROLLED_BACK):
                _keep_sectors(connection, job)
            connection.execute("DELETE FROM proven WHERE job = ?", (job.id,))
            connection.execute("DELETE FROM backups WHERE job = ?", (job.id,))
    if change.close:
        connection.execute("DELETE FROM sessions WHERE target = ?", (change.close,))
    if change.session is not None:
        connection.execute(_PUT_SESSION, {f: getattr(change.session, f) for f in _SESSION_FIELDS})
    if change.target is not None:
        connection.execute(_PUT_TARGET, {f: getattr(change.target, f) for f in _TARGET_FIELDS})
        if not change.target.content:
            connection.execute("DELETE FROM sectors WHERE target = ?", (change.target.name,))


def _keep_sectors(connection: sqlite3.Connection, job: Job) -> None:
    """What a job proved, sector by sector, outlives it as what is known of its target."""
    where = "SELECT ?, address, size_bytes, digest FROM proven WHERE job = ?"
    if connection.execute("SELECT 1 FROM proven WHERE job = ? LIMIT 1", (job.id,)).fetchone():
        connection.execute("DELETE FROM sectors WHERE target = ?", (job.target,))
        connection.execute(f"INSERT INTO sectors {where}", (job.target, job.id))


def _job_row(job: Job) -> dict[str, Any]:
    row = {f: getattr(job, f) for f in _JOB_FIELDS}
    for name in ("params", "error", "result"):
        row[name] = None if row[name] is None else json.dumps(row[name], separators=(",", ":"))
    row["kind"], row["state"], row["touched"] = job.kind.value, job.state.value, int(job.touched)
    return row


def _job(row: dict[str, Any]) -> Job:
    for name in ("params", "error", "result"):
        row[name] = None if row[name] is None else json.loads(row[name])
    row["kind"], row["state"], row["touched"] = JobKind(row["kind"]), JobState(row["state"]), bool(row["touched"])
    return Job(**row)


def _update(row: dict[str, Any]) -> Update:
    return Update(**{**row, "state": JobState(row["state"]), "event": json.loads(row["event"])})


def _backup(row: dict[str, Any]) -> Backup:
    if row["digest"] != _digest(row["kept"]):
        text = f"the bytes kept for job {row['job']} do not match their digest; see the medium"
        raise JournalError(text, job=row["job"])
    return Backup(row["uid"], row["kept"])


def _update_row(update: Update) -> dict[str, Any]:
    row = {f: getattr(update, f) for f in _UPDATE_FIELDS}
    row["state"], row["event"] = update.state.value, json.dumps(update.event, separators=(",", ":"))
    return row
