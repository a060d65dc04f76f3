"""The journal over the years: a file of every version that there was, an upgrade cut off in the middle, and a long history.

The steps between versions are frozen by their digests: a gateway in the field may have a file of any of them, made by exactly
this SQL. A new step is a new entry at the end.
"""

from __future__ import annotations

import hashlib
import os
import resource
import sqlite3
from pathlib import Path

import pytest

from bridged.events import SectorProven
from bridged.jobs import database
from bridged.jobs.database import APPLICATION_ID, MIGRATIONS, VERSION
from bridged.jobs.journal import Journal
from bridged.jobs.model import JobState

FROZEN = (
    "3682e20d01a1b8fe",
    "78d9187587dfc9d2",
    "b4067df85b66e6e4",
    "b399cbc55831f9b1",
    "8c4eb6bfc1c4a2bc",
    "61ea25c91701b466",
    "ad772829dbc1b500",
    "0dde85b341f44d6f",
)

# Rows as the first version wrote them.
ROWS = """
INSERT INTO jobs (id, kind, target, state, seq, image, content, params, principal, created, started, ended, phase, reason, done,
    total, attempts, touched, error, result) VALUES
    ('old1', 'flash', 'm1', 'succeeded', 9, 'f00d', 'c0de', '{"addr": 134217728}', 'me', 1.5, 2.5, 3.5, 'release', '',
    7, 7, 1, 1, NULL, '{"evidence": "full"}'),
    ('old2', 'flash', 'm1', 'interrupted', 5, 'f00d', 'c0de', '{"addr": 134217728}', 'me', 4.5, 5.5, 0, 'write', '',
    3, 7, 1, 1, NULL, NULL);
INSERT INTO idempotency VALUES ('release-42', 'old1', '{}');
INSERT INTO updates VALUES ('old1', 9, 'm1', 3.5, 'succeeded', 'release', 7, 7, 0, '', 'null');
INSERT INTO proven VALUES ('old2', 134217728, 16384, 'abcd');
INSERT INTO backups VALUES ('old2', '0011', x'00ff', 'DIGEST');
INSERT INTO sessions VALUES ('m1', 'old2', 4.0, 77.0, 'boot', 101.0);
INSERT INTO targets (name, pid, family, names, uid, flash_bytes, layout, loader, identified, content, image, image_name,
    evidence, proven, good_image) VALUES
    ('m1', 1097, 'F7', 'F756', '0011', 1048576, '', '9.0', 2.0, 'c0de', 'f00d', 'app', 'full', 3.0, 'f00d');
""".replace("DIGEST", hashlib.sha256(b"\x00\xff").hexdigest())


def of_version(path: Path, version: int) -> None:
    """A file as daemons of all versions up to that one left it."""
    with sqlite3.connect(path) as connection:
        connection.executescript("PRAGMA journal_mode = WAL;" + "".join([MIGRATIONS[0], ROWS, *MIGRATIONS[1:version]]))
        connection.executescript(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {version};")
    connection.close()


def test_no_step_that_was_released_has_changed() -> None:
    digests = tuple(hashlib.sha256(" ".join(step.split()).encode()).hexdigest()[:16] for step in MIGRATIONS)
    assert digests[: len(FROZEN)] == FROZEN, "a file in the field was made by the old one; add a step instead"
    assert len(digests) == len(FROZEN), "freeze the new step here"


def check(journal: Journal) -> None:
    ended, open_ = journal.job("old1"), journal.job("old2")
    assert (ended.state, ended.result, ended.params["addr"]) == (JobState.SUCCEEDED, {"evidence": "full"}, 0x08000000)
    assert [job.id for job in journal.active()] == ["old2"]
    assert (open_.state, open_.phase, open_.touched) == (JobState.INTERRUPTED, "write", True)
    assert journal.submitted("release-42", "{}") == "old1", "asking again still finds the same job"
    assert [update.seq for update in journal.log("old1")] == [9]
    assert journal.proven("old2") == (SectorProven(0x08000000, 16384, "abcd"),)
    assert journal.backup("old2").uid == "0011"
    assert [session.job for session in journal.sessions()] == ["old2"], "its lines are still to be brought back to idle"
    (target,) = journal.targets()
    assert (target.pid, target.uid, target.content, target.good_image) == (0x449, "0011", "c0de", "f00d")
    assert (target.version, target.rates, target.good_pid) == ("", "", 0), "what the old version did not know"


@pytest.mark.parametrize("version", range(1, VERSION + 1))
def test_a_file_of_every_version_goes_on(tmp_path: Path, version: int) -> None:
    path = tmp_path / "state.db"
    of_version(path, version)
    for _ in range(2):  # Upgraded, and then as it is.
        journal = Journal.open(path)
        check(journal)
        journal.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone()[0] == VERSION
        # An upgraded file and a new one are the same to the next version.
        fresh = sqlite3.connect(":memory:")
        fresh.executescript("".join(MIGRATIONS))
        sql = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name"
        assert connection.execute(sql).fetchall() == fresh.execute(sql).fetchall()
        fresh.close()
    connection.close()


@pytest.mark.parametrize("broken", range(1, VERSION))
def test_an_upgrade_that_is_cut_off_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int) -> None:
    """A step and its number are one transaction. Here the step fails at its end, as a full disk or a power cut makes it."""
    path = tmp_path / "state.db"
    of_version(path, 1)
    steps = [*MIGRATIONS[:broken], MIGRATIONS[broken] + "; INSERT INTO no_such_table VALUES (1)", *MIGRATIONS[broken + 1 :]]
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", tuple(steps))
        with pytest.raises(Exception, match="no_such_table"):
            Journal.open(path)
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone()[0] == broken
    connection.close()
    journal = Journal.open(path)
    check(journal)
    journal.close()


def test_ten_thousand_jobs_of_history(tmp_path: Path) -> None:
    """``jobs.keep`` may be that much. Memory and the reads that clients wait for must not grow with it; the file does."""
    path = tmp_path / "state.db"
    of_version(path, VERSION)
    with sqlite3.connect(path) as connection:
        columns = (
            "kind, target, state, seq, image, content, params, principal, created, started, ended, phase, reason, done, total,"
        )
        columns += " attempts, touched, error, result"
        connection.execute(
            "WITH RECURSIVE c(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM c WHERE i < 10000)"
            f" INSERT INTO jobs (id, {columns}) SELECT printf('h%05d', i), {columns} FROM c, jobs WHERE id = 'old1'"
        )
        # A flash leaves some fourteen entries in its log.
        connection.execute(
            "WITH RECURSIVE c(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM c WHERE i < 14)"
            " INSERT INTO updates SELECT id, i, target, created, 'running', 'write', i, 14, 1.0, '', 'null', '' FROM c, jobs"
            " WHERE id LIKE 'h%'"
        )
    connection.close()
    size = os.path.getsize(path)
    assert size < 64 << 20, f"{size / 2**20:.0f} MiB; the journal's own limit is 256"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    journal = Journal.open(path)
    try:
        for sql, values in (
            ("SELECT * FROM jobs WHERE id = ?", ("h05000",)),
            ("SELECT * FROM jobs WHERE target = ? ORDER BY n DESC LIMIT 50", ("m1",)),
            ("SELECT * FROM jobs WHERE state = ? ORDER BY n DESC LIMIT 50", ("failed",)),
            ("SELECT * FROM jobs ORDER BY n DESC LIMIT 50", ()),
            ("SELECT * FROM updates WHERE job = ? AND seq >= 0 ORDER BY seq", ("h05000",)),
        ):
            plan = " ".join(str(row[3]) for row in journal._reader.execute(f"EXPLAIN QUERY PLAN {sql}", values))
            # By an index, or backwards along the table until there are enough.
            assert "USING" in plan or plan == "SCAN jobs", plan
            assert "TEMP B-TREE" not in plan, plan
        assert [job.id for job in journal.jobs(limit=2)] == ["h10000", "h09999"]
        assert [job.id for job in journal.jobs(limit=2, before="h05000")] == ["h04999", "h04998"]
        assert len(journal.log("h05000")) == 14
        gone = journal.prune(1000).result(60)
        assert len(gone) == 9001
        assert len(journal.jobs(limit=20000)) == 1001, "the interrupted one is kept, however old"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 96 << 10
    finally:
        journal.close()
