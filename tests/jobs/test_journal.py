"""The journal alone: what it accepted survives a SIGKILL and a torn write, and what it must refuse it leaves as it is."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridged.errors import IdempotencyConflict, JournalError, StorageFull, UnknownJob
from bridged.events import SectorProven
from bridged.jobs.database import VERSION
from bridged.jobs.journal import Journal
from bridged.jobs.model import TERMINAL, Job, JobKind, JobState, advance, note, update_of
from bridged.jobs.records import Backup, Change, OpenSession, TargetRecord

SECTOR = SectorProven(0x08000000, 16384, "ab" * 32)


def a_job(number: int = 0, target: str = "m1") -> Job:
    params = {"addr": 0x08000000, "force": "vectors"}
    return Job(f"job{number:04}", JobKind.FLASH, target, JobState.QUEUED, 1, "f" * 64, "", params, "me", 100.0 + number)


def admit(journal: Journal, job: Job, id: str = "", request: str = "{}") -> str:
    return journal.admit(job, id, request).result(10)


def apply(journal: Journal, change: Change) -> None:
    journal.apply(change).result(10)


def snapshot(source: Path, into: Path) -> None:
    """The files as a crash would leave them; called where nothing writes."""
    into.mkdir(parents=True)
    for path in source.glob("state.db*"):
        if not path.name.endswith((".lock", "-shm")):
            shutil.copy(path, into / path.name)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("state.db")}


def test_a_job_comes_back_as_it_was(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "state.db")
    job = a_job()
    assert admit(journal, job) == job.id
    running = advance(job, JobState.RUNNING, phase="erase", started=101.0, attempts=1, touched=True, done=5, total=10)
    session = OpenSession("m1", job.id, 4.0, "boot", 101.0)
    record = TargetRecord("m1", pid=0x449, uid="0011", good_image="f" * 64)
    backup = Backup("0011", b"\x00\xffkept")
    apply(journal, Change(running, (update_of(running, 101.0),), (SECTOR,), backup, session, target=record))
    journal.close()
    again = Journal.open(tmp_path / "state.db")
    assert again.job(job.id) == running
    assert again.active() == [running]
    assert again.proven(job.id) == (SECTOR,)
    assert again.backup(job.id) == backup
    assert again.sessions() == [session]
    assert again.targets() == [record]
    assert [u.state for u in again.log(job.id)] == [JobState.QUEUED, JobState.RUNNING]
    assert [u.seq for u in again.log(job.id, 2)] == [2]
    failed = advance(running, JobState.FAILED, ended=102.0, error={"code": "NACK", "facts": {}})
    apply(again, Change(failed, close="m1"))
    assert (again.proven(job.id), again.backup(job.id), again.sessions()) == ((), Backup(), [])
    assert again.job(job.id) == failed
    assert again.active() == []
    with pytest.raises(UnknownJob):
        again.job("nobody")
    again.close()


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_the_file_itself_keeps_terminal_states(tmp_path: Path, state: JobState) -> None:
    journal = Journal.open(tmp_path / "state.db")
    job = a_job()
    admit(journal, job)
    ended = advance(advance(job, JobState.RUNNING), state)
    apply(journal, Change(ended))
    with pytest.raises(JournalError, match="terminal state never changes"):
        apply(journal, Change(replace(ended, state=JobState.RUNNING, seq=99)))
    with pytest.raises(JournalError, match="not in the journal"):
        apply(journal, Change(a_job(7)))
    assert journal.job(job.id) == ended
    journal.close()


def test_a_change_is_whole_or_nothing(tmp_path: Path) -> None:
    """The last part of the change cannot be written, so none of it is; others of the same commit are."""
    journal = Journal.open(tmp_path / "state.db")
    first, second = a_job(1), a_job(2)
    admit(journal, first)
    admit(journal, second)
    bad = Change(note(first, touched=True), backup=Backup("u", b"kept"), target=TargetRecord("m1", pid="no number"))  # type: ignore[arg-type]
    good = Change(note(second, phase="lock"))
    refused, taken = journal.apply(bad), journal.apply(good)
    with pytest.raises(JournalError):
        refused.result(10)
    taken.result(10)
    assert (journal.job(first.id), journal.backup(first.id), journal.targets()) == (first, Backup(), [])
    assert journal.job(second.id).phase == "lock"
    journal.close()


def test_one_id_names_one_job(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "state.db")
    assert admit(journal, a_job(1), "order-1", '{"a":1}') == "job0001"
    assert admit(journal, a_job(2), "order-1", '{"a":1}') == "job0001"
    with pytest.raises(IdempotencyConflict, match="job0001"):
        admit(journal, a_job(3), "order-1", '{"a":2}')
    assert [job.id for job in journal.jobs()] == ["job0001"]
    journal.close()
    again = Journal.open(tmp_path / "state.db")
    assert again.submitted("order-1", '{"a":1}') == "job0001"
    assert again.submitted("order-2", '{"a":1}') == ""
    with pytest.raises(IdempotencyConflict):
        again.submitted("order-1", '{"a":2}')
    again.close()


def test_old_jobs_go_with_all_that_was_theirs(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "state.db")
    for number in range(6):
        job = a_job(number)
        admit(journal, job, f"order-{number}")
        if number != 1:
            apply(journal, Change(advance(job, JobState.CANCELED)))
    assert journal.prune(2).result(10) == ["job0003", "job0002", "job0000"]
    assert [job.id for job in journal.jobs()] == ["job0005", "job0004", "job0001"]
    assert journal.log("job0000") == []
    assert journal.submitted("order-0", "other") == ""
    assert journal.submitted("order-1", "{}") == "job0001"
    assert [j.id for j in journal.jobs(state=JobState.CANCELED, limit=1)] == ["job0005"]
    assert journal.jobs(target="m2") == []
    journal.close()


def test_a_newer_journal_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    Journal.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    connection.close()
    before = digests(tmp_path)
    with pytest.raises(JournalError, match=f"version {VERSION + 1}"):
        Journal.open(path)
    assert digests(tmp_path) == before


def test_somebody_elses_database_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    before = digests(tmp_path)
    with pytest.raises(JournalError, match="another program"):
        Journal.open(path)
    assert digests(tmp_path) == before


def test_damage_is_found_at_open(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    journal = Journal.open(path)
    for number in range(200):
        admit(journal, a_job(number))
    journal.close()
    data = bytearray(path.read_bytes())
    data[8192:20480] = b"\x5a" * 12288
    path.write_bytes(data)
    with pytest.raises(JournalError):
        Journal.open(path)
    assert path.read_bytes() == data


def test_no_database_at_all(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_text("a text that somebody put here by mistake, long enough to be read as a header of a database file\n" * 9)
    with pytest.raises(JournalError):
        Journal.open(path)


def test_two_processes_never_share_a_journal(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "state.db")
    with pytest.raises(JournalError, match="in use"):
        Journal.open(tmp_path / "state.db")
    journal.close()
    Journal.open(tmp_path / "state.db").close()


def test_altered_kept_bytes_are_not_given_out(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    journal = Journal.open(path)
    admit(journal, a_job())
    apply(journal, Change(advance(a_job(), JobState.RUNNING), backup=Backup("0011", b"kept")))
    journal.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE backups SET kept = X'00'")
    connection.close()
    again = Journal.open(path)
    with pytest.raises(JournalError, match="digest"):
        again.backup("job0000")
    again.close()


def test_a_full_disk_is_said_and_changes_nothing(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "state.db", limit_bytes=400_000)
    accepted: list[str] = []

    def fill() -> None:
        for number in range(100_000):
            accepted.append(admit(journal, replace(a_job(number), params={"note": "x" * 2000})))

    with pytest.raises(StorageFull):
        fill()
    assert accepted
    assert {job.id for job in journal.active()} == set(accepted)
    for job in journal.active()[: len(accepted) // 2]:
        apply(journal, Change(advance(job, JobState.CANCELED, params={})))  # Smaller than before: it fits.
    journal.prune(0).result(10)
    assert admit(journal, a_job(999_999)) == "job999999"
    journal.close()


def test_a_closed_journal_says_so(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "state.db")
    last = journal.admit(a_job(), "", "{}")
    journal.close()
    assert last.result(0) == "job0000", "what was handed in before is written"
    with pytest.raises(JournalError, match="closed"):
        journal.ping().result(0)
    with pytest.raises(JournalError):
        journal.active()
    journal.close()


def test_nobody_who_stops_waiting_undoes_a_write(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "state.db")

    async def impatient() -> None:
        waiting = asyncio.wrap_future(journal.admit(a_job(), "", "{}"))
        waiting.cancel()
        await asyncio.wrap_future(journal.ping())

    asyncio.run(impatient())
    assert [job.id for job in journal.active()] == ["job0000"]
    journal.close()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_torn_write_loses_only_what_was_never_acknowledged(data: st.DataObject) -> None:
    """The write-ahead log is cut at any byte: whatever was acknowledged within that length is there, whole."""
    with TemporaryDirectory() as folder:
        root = Path(folder)
        journal = Journal.open(root / "live" / "state.db")
        wal = root / "live" / "state.db-wal"
        marks: list[tuple[int, str, JobState]] = []
        for number in range(6):
            job = a_job(number)
            admit(journal, job)
            marks.append((wal.stat().st_size, job.id, JobState.QUEUED))
            ended = advance(advance(job, JobState.RUNNING), JobState.SUCCEEDED)
            apply(journal, Change(ended, (update_of(ended, 1.0),)))
            marks.append((wal.stat().st_size, job.id, JobState.SUCCEEDED))
        snapshot(root / "live", root / "torn")
        journal.close()
        cut = data.draw(st.integers(0, marks[-1][0]))
        with open(root / "torn" / "state.db-wal", "r+b") as file:
            file.truncate(cut)
        again = Journal.open(root / "torn" / "state.db")
        found = {job.id: job.state for job in again.jobs()}
        expected: dict[str, JobState] = {}
        for size, job_id, state in marks:
            if size <= cut:
                expected[job_id] = state
        assert found == expected
        assert {job_id: again.log(job_id)[-1].state for job_id in found} == expected
        again.close()


CHILD = """
    import sys
    from dataclasses import replace
    from pathlib import Path
    from bridged.jobs.journal import Journal
    from bridged.jobs.records import Change
    from bridged.jobs.model import Job, JobKind, JobState, advance, update_of

    journal = Journal.open(Path(sys.argv[1]))
    number = 0
    while True:
        job = Job(f"job{number:04}", JobKind.FLASH, "m1", JobState.QUEUED, 1, "", "", {}, "", 1.0)
        journal.admit(job, f"order-{number}", "{}").result()
        print(job.id, "queued", flush=True)
        ended = advance(advance(job, JobState.RUNNING), JobState.SUCCEEDED)
        journal.apply(Change(ended, (update_of(ended, 2.0),))).result()
        print(job.id, "succeeded", flush=True)
        number += 1
"""


@pytest.mark.parametrize("lines", [1, 2, 7, 30, 101])
def test_what_was_acknowledged_survives_sigkill(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "state.db"
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(path)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        told = [child.stdout.readline().split() for _ in range(lines)]
        child.send_signal(signal.SIGKILL)
        told += [line.split() for line in child.stdout.read().splitlines() if line.count(" ") == 1]
    journal = Journal.open(path)
    expected = {job_id: JobState(state) for job_id, state in told}
    found = {job.id: job.state for job in journal.jobs(limit=100_000)}
    later = {job_id: state for job_id, state in found.items() if job_id not in expected}
    assert len(later) <= 1, "at most the one that was being written"
    for job_id, state in expected.items():
        assert found[job_id] in (state, JobState.SUCCEEDED)
        assert journal.submitted(f"order-{int(job_id[3:])}", "{}") == job_id
    journal.close()


def cut_in_the_first_transaction(path: Path, foreign: bool) -> None:
    """What a power cut leaves in the middle of the transaction that makes a file: pages, and the journal to take them back."""
    live = path.with_name("live.db")
    with sqlite3.connect(live, isolation_level=None) as connection:
        if foreign:
            connection.execute("CREATE TABLE recipes (name TEXT)")
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("PRAGMA cache_spill = 1")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("CREATE TABLE big (data BLOB)")
        connection.executemany("INSERT INTO big VALUES (?)", [(bytes(5000),)] * 20)
        shutil.copy(live, path)
        shutil.copy(f"{live}-journal", f"{path}-journal")
        connection.execute("ROLLBACK")
    connection.close()
    assert path.stat().st_size > 8192
    assert path.with_name(f"{path.name}-journal").read_bytes()[:8] == bytes.fromhex("d9d505f920a163d7")


def test_a_power_cut_in_the_very_first_transaction_is_taken_back(tmp_path: Path) -> None:
    """It was refused as read-only, at every start, until somebody removed the files by hand."""
    path = tmp_path / "state.db"
    cut_in_the_first_transaction(path, foreign=False)
    journal = Journal.open(path)
    assert admit(journal, a_job()) == "job0000"
    journal.close()


def test_an_interrupted_transaction_of_somebody_else_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    cut_in_the_first_transaction(path, foreign=True)
    before = {p.name: p.read_bytes() for p in (path, path.with_name("state.db-journal"))}
    with pytest.raises(JournalError, match="another program"):
        Journal.open(path)
    assert {p.name: p.read_bytes() for p in (path, path.with_name("state.db-journal"))} == before
