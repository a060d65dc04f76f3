"""The journal: jobs, their log, proven sectors, hazards and what is known of each target, in one SQLite file.

One thread writes (WAL, synchronous=FULL); whatever waits in its queue is committed together, since an SD card pays for each
commit and not for each row. A write returns a ``Future`` that is done when the bytes are on the medium. A ``Change`` is applied
whole or not at all: the kept bytes, the hazard and the state of the ``erasing`` barrier are one ``Change``. Reads use a second
connection and see what is committed.

What is written when is the business of others; this module knows nothing of queues, targets or clients. It does hold two
promises by itself, in the file, whatever its caller does (design, P5):

- a terminal state never changes (a trigger),
- an idempotency id names one job for as long as that job is remembered.

How the file is opened, and which is refused, is in ``database``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from bridged.errors import IdempotencyConflict, JournalError, StorageError, UnknownJob
from bridged.events import SectorProven
from bridged.jobs.database import ENDED, copied, open_database, translated
from bridged.jobs.model import TERMINAL, Job, JobKind, JobState, Update, update_of
from bridged.jobs.records import AuditEntry, Backup, Change, Credential, OpenSession, TargetRecord

T = TypeVar("T")

FILE_NAME = "state.db"  # In the state directory.
LIMIT_BYTES = 256 << 20  # 1000 jobs take some 4 MiB; the limit keeps a defect from filling the card.
GROUP_LIMIT = 64  # Most changes of one commit, so that the first of them does not wait for ever.

AUDIT_LIMIT = 10_000  # Entries of the audit log, and as many of failed logins, and of who comes and goes; 150 bytes each.


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
        writer, reader, lock_fd = open_database(path, limit_bytes)
        return cls(path, writer, reader, lock_fd)

    @classmethod
    @contextlib.contextmanager
    def copied(cls, path: Path, folder: Path) -> Iterator[Journal]:
        """Blocking. A copy in ``folder`` of a journal whose disk takes nothing any more; what is written there is lost.

        Raises as ``open`` does.
        """
        with copied(path, folder) as copy:
            journal = cls.open(copy)
            try:
                yield journal
            finally:
                journal.close()

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
        """Forget the oldest ended jobs beyond ``keep``, with their ids for idempotency; gives the ids that went.

        Not one that left its target in a session: what it did there is asked when that target can be released.
        """

        def operation(connection: sqlite3.Connection) -> list[str]:
            rows = connection.execute(
                f"SELECT n, id FROM jobs WHERE state IN ({ENDED}) AND id NOT IN (SELECT job FROM sessions) "
                "ORDER BY n DESC LIMIT -1 OFFSET ?",
                (keep,),
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
        """Failed logins have a room of their own, and so have those who come and go (logins, consoles): whoever causes many of
        them cannot push out what others did."""

        def operation(connection: sqlite3.Connection) -> None:
            added = connection.execute(_INSERT_AUDIT, {f: getattr(entry, f) for f in _AUDIT_FIELDS})
            if (added.lastrowid or 0) % 100 == 0:
                passing = "(what = 'login' OR what GLOB 'console*')"
                for kind in ("who = ''", f"who <> '' AND {passing}", f"who <> '' AND NOT {passing}"):
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
        return self._read(_job, f"SELECT {_JOB_COLUMNS} FROM jobs WHERE state NOT IN ({ENDED}) ORDER BY n")

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

    def submitted(self, idempotency_id: str, request: str | None = None) -> str:
        """The job that this id made before, empty for none. Raises ``IdempotencyConflict`` where ``request`` is another."""
        rows = self._read(dict, "SELECT job, request FROM idempotency WHERE id = ?", (idempotency_id,))
        if not rows or request is None:
            return str(rows[0]["job"]) if rows else ""
        return _same_request(idempotency_id, str(rows[0]["job"]), str(rows[0]["request"]), request)

    # --- the inside -----------------------------------------------------------------------------------------------

    def _read(self, make: Callable[[dict[str, Any]], T], sql: str, values: tuple[Any, ...] = ()) -> list[T]:
        """What ``make`` makes of each row. Raises ``JournalError`` and ``StorageError``."""
        with self._reading:
            try:
                return [make(dict(row)) for row in self._reader.execute(sql, values)]
            except (sqlite3.Error, ValueError, KeyError, TypeError, RecursionError) as error:
                # What a failing card changed within a page SQLite does not notice: a state that is none, half of a JSON.
                raise translated(error, f"reading the journal {self.path}", self.path) from error

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
            failure = translated(error, f"writing the journal {self.path}", self.path)
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
            found = translated(error, f"writing the journal {self.path}", self.path)
            if isinstance(found, StorageError) or not self._writer.in_transaction:
                raise
            self._writer.execute("ROLLBACK TO one")
            self._writer.execute("RELEASE one")
            return None, found
        self._writer.execute("RELEASE one")
        return value, None


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
