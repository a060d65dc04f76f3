"""What a gateway remembers of its fleet: which message became which job, and what has not been told yet.

One SQLite file beside the journal, with a row for each target of each roll-out. It is why one message never becomes two jobs,
whatever the broker does: a message is written here before it is acknowledged, and a message that is here is not taken again.
The journal's own idempotency (``Command.id``) covers the moment between a job that was submitted and its row.

It is bounded: of more than ``LIMIT`` commands the oldest that have ended and were told go. What goes leaves its time behind:
a message from before that time can have been one of those, so it is refused (``FleetStale``) and never carried out twice. The
times are the broker's, stored with each message, so a gateway whose own clock jumps is not deceived; they also say which time
it is at least (``now``), for a gateway that wakes up in 1970.

The rows are the outbox, too: a report is the last state of its row and not a list of events, so that a month without a broker
leaves one message for each row, however much happened. All methods block and may be called from any thread.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bridged.errors import FleetStale, JournalError, StorageFull
from bridged.fleet.wire import ENDED, FLASHING, Cancel, Command, Report, received, report
from bridged.jobs.database import translated

VERSION = 1
LIMIT = 10_000  # Some 1 KiB each: one roll-out a week to a gateway with 40 targets is five years.
TAKEN = "taken"  # Not submitted yet.

_SCHEMA = """
CREATE TABLE commands (
    rollout TEXT NOT NULL, target TEXT NOT NULL, round INTEGER NOT NULL, subject TEXT NOT NULL, body BLOB NOT NULL,
    at REAL NOT NULL, job TEXT NOT NULL DEFAULT '', state TEXT NOT NULL, report BLOB NOT NULL, dirty INTEGER NOT NULL,
    canceled INTEGER NOT NULL DEFAULT 0, number INTEGER PRIMARY KEY AUTOINCREMENT, UNIQUE (rollout, target)
) STRICT;
CREATE TABLE notes (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One command and what became of it. ``canceled``: taken back before it was submitted, or to be taken back."""

    number: int
    command: Command
    job: str
    report: Report
    canceled: bool = False


class Ledger:
    """Raises ``JournalError`` where the file cannot be used, and leaves a newer one as it is. ``limit``: for tests."""

    def __init__(self, path: Path, gateway: str, *, limit: int = LIMIT) -> None:
        self._gateway, self._limit, self._lock, self._path = gateway, limit, threading.RLock(), path
        self._wanted: dict[str, tuple[str, str]] | None = None
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
            elif version != VERSION:
                raise JournalError(f"{path} has version {version}, this bridged understands {VERSION}; it is left as it is")
        except sqlite3.Error as error:
            raise JournalError(f"opening {path}: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._wanted = None
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                raise translated(error, "writing the ledger of the fleet", self._path) from error

    # --- commands -------------------------------------------------------------------------------------------------

    def take(self, command: Command, at: float) -> bool:
        """Whether it is news; either way it may be acknowledged after this. ``at``: when the broker got it.

        Raises ``FleetStale`` (it may be acknowledged, too), and ``StorageError`` where it cannot be remembered now.
        """
        with self._change() as db:
            self._saw(at)
            row = db.execute(
                "SELECT round, state FROM commands WHERE rollout = ? AND target = ?", (command.rollout, command.target)
            ).fetchone()
            if row is not None:
                if command.round <= row[0] or row[1] != "canceled":
                    # A later round says it again to those who were taken back; this one was not, and its end stands.
                    return False
                db.execute("DELETE FROM commands WHERE rollout = ? AND target = ?", (command.rollout, command.target))
            elif at <= self._number("floor"):
                text = f"command {command.id} of {at:.0f} is older than what is remembered here"
                raise FleetStale(text, rollout=command.rollout, target=command.target)
            self._make_room()
            first = Report(self._gateway, command.rollout, command.target, command.round, "accepted", at=self.now(0.0))
            db.execute(
                "INSERT INTO commands (rollout, target, round, subject, body, at, state, report, dirty)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, 1)",
                (command.rollout, command.target, command.round, command.subject, command.encode(), at, TAKEN, first.encode()),
            )
        return True

    def take_back(self, cancel: Cancel, at: float) -> Entry | None:
        """Mark what is to be canceled; the entry where there is one that has not ended.

        A command that comes after its cancellation (two machines drove the roll-out) is taken back, too: it leaves its mark.
        Raises ``StorageError`` as ``take`` does.
        """
        with self._change() as db:
            self._saw(at)
            where = (cancel.rollout, cancel.target)
            row = db.execute("SELECT round, state FROM commands WHERE rollout = ? AND target = ?", where).fetchone()
            earlier = row is not None and row[1] == "canceled" and row[0] < cancel.round  # The mark of an earlier round.
            if at > self._number("floor") and (row is None or earlier):
                db.execute("DELETE FROM commands WHERE rollout = ? AND target = ?", where)
                mark = Command(cancel.gateway, cancel.rollout, cancel.target, cancel.round)
                said = Report(self._gateway, cancel.rollout, cancel.target, cancel.round, "canceled", at=self.now(0.0))
                self._make_room()
                db.execute(
                    "INSERT INTO commands (rollout, target, round, subject, body, at, state, report, dirty)"
                    " VALUES (?, ?, ?, ?, ?, ?, 'canceled', ?, 1)",
                    (*where, cancel.round, mark.subject, mark.encode(), at, said.encode()),
                )
            db.execute(
                "UPDATE commands SET canceled = 1 WHERE rollout = ? AND target = ? AND round <= ?",
                (cancel.rollout, cancel.target, cancel.round),
            )
        found = self._entries("rollout = ? AND target = ? AND canceled", (cancel.rollout, cancel.target))
        return next((entry for entry in found if not entry.report.ended), None)

    def waiting(self) -> list[Entry]:
        """What was not submitted yet, in the order in which it came."""
        return self._entries("state = ?", (TAKEN,))

    def running(self) -> list[Entry]:
        """What was submitted and has not ended, as far as was written here."""
        return self._entries("job != '' AND state = 'submitted'", ())

    def submitted(self, entry: Entry, job: str) -> Entry:
        with self._change() as db:
            where = f"number = ? AND state = '{TAKEN}'"
            db.execute(f"UPDATE commands SET job = ?, state = 'submitted' WHERE {where}", (job, entry.number))
        return replace(entry, job=job)

    def note(self, entry: Entry, now: Report) -> bool:
        """How it is now, to be told. An end stands: nothing is written over it, and that is False."""
        with self._change() as db:
            state = f", state = '{now.state}'" if now.ended else ""
            done = db.execute(
                f"UPDATE commands SET report = ?, dirty = abs(dirty) + 1{state} WHERE number = ?"
                f" AND state IN ('{TAKEN}', 'submitted')",
                (now.encode(), entry.number),
            )
        return done.rowcount > 0

    # --- the outbox -----------------------------------------------------------------------------------------------
    # ``dirty`` is a version that only grows; below zero the broker has it. (Were it to begin anew, a late ``told`` of an
    # earlier version could be taken for one of the last.)

    def untold(self, limit: int = 100) -> list[tuple[int, int, Report]]:
        """Number, version and report of what was not told, the oldest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT number, dirty, report FROM commands WHERE dirty > 0 ORDER BY number LIMIT ?", (limit,)
            ).fetchall()
        return [(number, dirty, _report(raw)) for number, dirty, raw in rows]

    def told(self, number: int, dirty: int) -> None:
        """The broker has it, unless it has changed since."""
        with self._change() as db:
            db.execute("UPDATE commands SET dirty = -dirty WHERE number = ? AND dirty = ?", (number, dirty))

    # --- questions ------------------------------------------------------------------------------------------------

    def counts(self) -> tuple[int, int]:
        """How many commands have no job yet, and how many reports were not told."""
        with self._lock:
            row = self._db.execute("SELECT coalesce(sum(state = ?), 0), coalesce(sum(dirty > 0), 0) FROM commands", (TAKEN,))
            waiting, untold = row.fetchone()
        return int(waiting), int(untold)

    def wanted(self) -> dict[str, tuple[str, str]]:
        """For each target the SHA-256 of what its last roll-out wanted there, and the name of that. What was taken back does
        not count; what failed does."""
        with self._lock:
            if self._wanted is None:
                self._wanted = {}
                missing = {target for (target,) in self._db.execute("SELECT DISTINCT target FROM commands")}
                rows = self._db.execute(
                    "SELECT target, rollout, body FROM commands WHERE state != 'canceled' ORDER BY number DESC"
                )
                for target, rollout, body in rows:
                    if target in missing:
                        data = json.loads(body)
                        if data["kind"] in FLASHING and data.get("artifact"):
                            self._wanted[target] = (data["artifact"]["sha256"], rollout)
                            missing.discard(target)
                    if not missing:
                        break
            return dict(self._wanted)

    # --- notes ----------------------------------------------------------------------------------------------------

    def get(self, key: str) -> Any:
        with self._lock:
            row = self._db.execute("SELECT value FROM notes WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def put(self, key: str, value: Any) -> None:
        """``None``: forget it."""
        with self._change() as db:
            if value is None:
                db.execute("DELETE FROM notes WHERE key = ?", (key,))
            else:
                db.execute("REPLACE INTO notes VALUES (?, ?)", (key, json.dumps(value)))

    def now(self, clock: float) -> float:
        """The time: never before the newest that the broker has shown."""
        return max(clock, self._number("newest"))

    def _saw(self, at: float) -> None:
        if at > self._number("newest"):
            self._db.execute("REPLACE INTO notes VALUES ('newest', ?)", (json.dumps(at),))

    def _number(self, key: str) -> float:
        return float(self.get(key) or 0.0)

    def _make_room(self) -> None:
        (count,) = self._db.execute("SELECT count(*) FROM commands").fetchone()
        if count < self._limit:
            return
        ended = ", ".join(f"'{state}'" for state in sorted(ENDED))
        row = self._db.execute(
            f"SELECT number, at FROM commands WHERE dirty <= 0 AND state IN ({ended}) ORDER BY at LIMIT 1"
        ).fetchone()
        if row is None:
            raise StorageFull(f"{count} commands of the fleet have not ended; no more are taken", limit=self._limit)
        self._db.execute("DELETE FROM commands WHERE number = ?", (row[0],))
        self._db.execute("REPLACE INTO notes VALUES ('floor', ?)", (json.dumps(max(row[1], self._number("floor"))),))

    def _entries(self, where: str, values: Sequence[Any]) -> list[Entry]:
        with self._lock:
            rows = self._db.execute(
                f"SELECT number, subject, body, job, report, canceled FROM commands WHERE {where} ORDER BY number", values
            ).fetchall()
        found = []
        for number, subject, body, job, said, canceled in rows:
            command = received(body, subject, self._gateway)
            assert isinstance(command, Command)
            found.append(Entry(number, command, job, _report(said), bool(canceled)))
        return found


def _report(raw: bytes) -> Report:
    fields = json.loads(raw)
    made = Report(fields["gateway"], fields["rollout"], fields["target"], fields["round"], fields["state"])
    return report(raw, made.subject)
