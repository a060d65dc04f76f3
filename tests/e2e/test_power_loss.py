"""Power loss: every moment of a recorded life of the daemon, and what a disk may hold then.

One life is recorded by ``strace``: two processes with a SIGKILL between them, uploads that break off and go on, flashes, a
read, the clean-up of old images. ``tests.e2e.disk`` works out what the medium may hold at each moment; here journal and store
are opened on it, by the code that opens them in the field, and whatever a client had been told by then must be true.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from bridged import chips
from bridged.images import content
from bridged.images.store import Store
from bridged.jobs.journal import Journal
from bridged.jobs.model import TERMINAL, JobKind, JobState
from tests.e2e import disk
from tests.e2e.disk import Call, Disk, Loss, Tree
from tests.e2e.gateway import Gateway, pairs, wait_for
from tests.e2e.test_kill import in_phase
from tests.support import require_tool
from tests.target.bench import make_image

SOAK = bool(os.environ.get("BRIDGED_SOAK"))
LIMIT_BYTES = 1 << 20
SYNC_BYTES = 256 * 1024
# The daemon as it is, but it tidies its store at once and not after minutes.
DAEMON = """
import sys
from bridged import app
from bridged.images import store
app.TIDY_S, store.GRACE_S = 0.5, 0.0
sys.exit(app.serve(sys.argv[1:]))
"""


class Recorded(Gateway):
    """Each start of the daemon writes a recording of its own."""

    def command(self) -> list[str]:
        self.logs: list[Path] = [*getattr(self, "logs", []), self.root / f"calls-{len(getattr(self, 'logs', []))}"]
        return [
            *disk.command(self.logs[-1]),
            sys.executable,
            "-c",
            DAEMON,
            "--config",
            str(self.root / "bridged.toml"),
            "--state-dir",
            str(self.root / "disk" / "state"),
        ]


@dataclass
class Life:
    """What happened, as far as the test did it, and the recordings."""

    root: Path
    files: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    had: list[str] = field(default_factory=list)  # SHA-256 of each HAVE
    logs: list[Path] = field(default_factory=list)
    ends: list[Tree] = field(default_factory=list)  # what was really there at the end of each recording
    requests: dict[str, str] = field(default_factory=dict)  # idempotency id to canonical request
    ids: dict[str, str] = field(default_factory=dict)  # idempotency id to job


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    require_tool("strace", "strace")
    root = tmp_path_factory.mktemp("life")
    (root / "disk").mkdir()
    lived = Life(root)
    first, second = (make_image(chips.find("L476"), size).segments[0].data for size in (6000, 9000))
    rng = random.Random(4)
    big, bigger = rng.randbytes(470_000), rng.randbytes(400_000)
    for data in (first, second, big, bigger):
        lived.files[hashlib.sha256(data).hexdigest()] = data
    digest = hashlib.sha256(big).hexdigest()
    gateway = Recorded(root, {"l4": "L476"}, extra="[store]\nlimit_mib = 1\nimage_limit_mib = 1\n")
    with gateway:
        client = gateway.connect()

        def have() -> int:
            lived.had.append(digest)
            code, text = client.do(f"HAVE {digest}")
            return int(pairs(text)["offset"]) if code == 250 else -1

        def flash(name: str, id_: str) -> str:
            code, text = client.do(f"FLASH l4 {name} addr=0x08000000 id={id_}")
            assert code == 250, text
            return lived.ids.setdefault(id_, pairs(text)["job"])

        assert have() == -1
        client.put(first, "first.bin")
        job = flash("first.bin", "one")
        assert pairs(client.do(f"WAIT {job}")[1])["state"] == "succeeded"
        code, text = client.do("READ l4 0x08000000 300 id=read wait=1")
        assert code == 250, text
        client.put(second, "second.bin")
        sender = gateway.connect()
        sender.sock.sendall(f"PUT {len(big)} {digest} name=big\n".encode() + big[: SYNC_BYTES + 20_000])
        wait_for("the first sync of the upload", lambda: have() == SYNC_BYTES)
        job = flash("second.bin", "two")
        in_phase(gateway, job, "write")
        (session,) = wait_for("a session process", gateway.sessions)
        gateway.stop(signal.SIGKILL)
        os.kill(session, signal.SIGKILL)
        sender.close()
        client.close()
        wait_for("the end of the recording", lambda: disk.whole(gateway.logs[-1]))
        lived.ends.append(disk.tree_of(root / "disk"))

        gateway.start()
        client = gateway.connect()
        at = have()
        assert at == SYNC_BYTES
        sender = gateway.connect()
        sender.sock.sendall(f"PUT {len(big)} {digest} name=big offset={at}\n".encode() + big[at : at + 50_000])
        sender.sock.shutdown(socket.SHUT_WR)
        sender.file.read()
        sender.close()
        at = wait_for("an orderly pause", lambda: max(0, have() - SYNC_BYTES)) + SYNC_BYTES
        assert client.do(f"PUT {len(big)} {digest} name=big offset={at}", big[at:])[0] == 250
        assert flash("second.bin", "two") == job
        assert pairs(client.do(f"WAIT {job}")[1])["state"] == "succeeded"
        client.put(bigger, "bigger")
        wait_for("the clean-up", lambda: have() == -1)
        client.close()
        gateway.stop()
        lived.logs = gateway.logs
        wait_for("the end of the recording", lambda: disk.whole(gateway.logs[-1]))
        lived.ends.append(disk.tree_of(root / "disk"))
    with sqlite3.connect(f"file:{root}/disk/state/state.db?mode=ro", uri=True) as db:
        lived.requests = dict(db.execute("SELECT id, request FROM idempotency"))
        lived.ids |= dict(db.execute("SELECT id, job FROM idempotency"))
    db.close()
    return lived


# --- what was promised ------------------------------------------------------------------------------------------------


@dataclass
class Told:
    """All that anybody outside had been told, or had felt, before a cut."""

    staged: dict[str, str] = field(default_factory=dict)  # SHA-256 to name
    offsets: dict[str, int] = field(default_factory=dict)
    jobs: dict[str, set[str]] = field(default_factory=dict)  # job to the states that were shown
    low: set[str] = field(default_factory=set)  # lines that are not at idle
    erasing: bool = False  # an erase has been sent to the target, ever
    version: int = 0

    def call(self, call: Call, life: Life) -> None:
        """A reply counts from the moment at which it may reach the client: when the call begins."""
        if call.name == "unlink" and call.paths() and "/state/images/" in (path := call.paths()[-1]):
            if re.fullmatch("[0-9a-f]{64}", Path(path).name):
                self.staged.pop(Path(path).name, None)
                self.offsets.pop(Path(path).name, None)
                self.version += 1
        elif call.name == "write" and call.fd()[1].startswith("/dev/pts/"):
            if call.data() == b"\x44\xbb" and not self.erasing:
                self.erasing = True
                self.version += 1
        elif call.name in ("sendto", "write") and "socket:" in call.fd()[1]:
            for line in call.data().decode("ascii", "replace").splitlines():
                self._line(line, life)

    def _line(self, line: str, life: Life) -> None:
        before = (len(self.staged), dict(self.offsets), sum(map(len, self.jobs.values())), set(self.low))
        words = pairs(line)
        if found := re.fullmatch("(nrst|boot0) ([01])", line):
            idle = "1" if found[1] == "nrst" else "0"
            (self.low.discard if found[2] == idle else self.low.add)(found[1])
        elif re.match(r"250 image=sha256:", line):
            sha = words["image"].removeprefix("sha256:")
            self.staged[sha] = words.get("name", "")
            self.offsets[sha] = len(life.files[sha])
        elif re.match("(250 offset=|404 )", line):
            sha = life.had[self._haves]
            self._haves += 1
            if line.startswith("250"):
                self.offsets[sha] = int(words["offset"])
        elif re.match("(250|150)", line) and "job" in words and "state" in words and words.get("seq", "1") != "0":
            self.jobs.setdefault(words["job"], set()).add(words["state"])
        if before != (len(self.staged), self.offsets, sum(map(len, self.jobs.values())), self.low):
            self.version += 1

    _haves: int = 0


def check(root: Path, told: Told, life: Life) -> None:
    """Open what the cut left, as the next start does, and compare it with what was told."""
    journal = Journal.open(root / "state" / "state.db")  # refuses a damaged file
    try:
        _check_jobs(journal, told, life, Store(root / "state", LIMIT_BYTES, LIMIT_BYTES))
    finally:
        journal.close()


def _check_jobs(journal: Journal, told: Told, life: Life, store: Store) -> None:
    for staged in store.images():
        assert hashlib.sha256(staged.path.read_bytes()).hexdigest() == staged.sha256
        assert not staged.name or store.get(staged.name)
    for sha, name in told.staged.items():
        assert store.get(sha).size_bytes == len(life.files[sha]), "a staged image is not whole"
        assert not name or store.get(name).sha256 == sha, "a name was lost"
    for sha, offset in told.offsets.items():
        assert store.have(sha)[0] >= offset, f"{offset} bytes were announced, {store.have(sha)} are there"
    for part in (store.root / "uploads").glob("*/*.part"):
        offset = store.have(part.stem)[0]
        assert part.read_bytes()[:offset] == life.files[part.stem][:offset], "an offset is announced that is not on disk"
    found = {job.id: job for job in journal.jobs(limit=100)}
    for id_, job_id in life.ids.items():
        if job_id in told.jobs:
            assert journal.submitted(id_, life.requests[id_]) == job_id
    for job_id, states in told.jobs.items():
        job = found[job_id]
        logged = [update.state for update in journal.log(job_id)]
        assert states - {"interrupted"} <= set(logged)
        assert [state for state in logged if state in TERMINAL] == logged[-1:] * job.terminal
        for state in states & {state.value for state in TERMINAL}:
            assert job.state == state, "a terminal state changed"
    for job in found.values():
        assert len({update.seq for update in journal.log(job.id)}) == len(journal.log(job.id))
        for sha in content.files(job.image) if not job.terminal else ():
            assert hashlib.sha256(store.get(sha).path.read_bytes()).hexdigest() == sha
        if job.kind is JobKind.READ and job.state is JobState.SUCCEEDED:
            assert job.result is not None
            data = (store.root / "results" / f"{job.id}.bin").read_bytes()
            assert hashlib.sha256(data).hexdigest() == job.result["sha256"]
        journal.backup(job.id)  # raises where the bytes are not those that were kept
    if told.low:
        assert [session.target for session in journal.sessions()] == ["l4"], f"{told.low} moved and nobody knows of a session"
    if told.erasing:
        assert any(job.touched for job in found.values()), "an erase was sent before the journal had it"


@dataclass
class Tried:
    cuts: int = 0
    trees: int = 0
    failures: list[str] = field(default_factory=list)


def cuts(life: Life, ignored: str = "") -> Iterator[tuple[int, Disk, Told]]:
    """The disk and what was told, after each call that changed one of them."""
    model, told, number = Disk(life.root / "disk"), Told(), 0
    for index, log in enumerate(life.logs):
        calls = disk.recorded(log)
        starts = sorted(calls, key=lambda call: call.began)
        begun = 0
        for call in calls:
            version = told.version
            while begun < len(starts) and starts[begun].began <= call.ended:
                told.call(starts[begun], life)
                begun += 1
            if ignored and call.name in ("fsync", "fdatasync") and call.fd()[1].endswith(ignored):
                continue
            if model.do(call) or told.version != version:
                number += 1
                yield number, model, told
        assert model.crash(Loss.ALL, random.Random(0)) == life.ends[index], "the model is wrong"
        told.low.clear()  # The line box drops what a dead process held.
        model.next_recording(len(log.read_bytes().splitlines()))


def try_cuts(life: Life, scratch: Path, losses: list[Loss], ignored: str = "") -> Tried:
    """``ignored``: end of the path of files whose syncs do nothing."""
    tried, seen = Tried(), set[tuple[int, int]]()
    for number, model, told in cuts(life, ignored):
        tried.cuts += 1
        for place, loss in enumerate(losses):
            tree = model.crash(loss, random.Random(number * 100 + place))
            key = (told.version, hash((frozenset(tree.files.items()), tree.directories)))
            if key in seen:
                continue
            seen.add(key)
            tried.trees += 1
            root = scratch / "disk"
            tree.write(root)
            try:
                check(root, told, life)
            except Exception as error:
                tried.failures.append(f"cut {number}, {loss.value}: {type(error).__name__}: {str(error)[:300]}")
            shutil.rmtree(root)
    return tried


@pytest.fixture
def scratch() -> Iterator[Path]:
    """In memory where there is such a place: it is no disk that is tested here."""
    place = Path("/dev/shm")
    with TemporaryDirectory(dir=place if place.is_dir() else None) as folder:
        yield Path(folder)


@pytest.mark.timeout(1800 if SOAK else 180)
@pytest.mark.parametrize("loss", list(Loss), ids=lambda loss: loss.value)
def test_at_every_cut_all_that_was_told_is_true(life: Life, scratch: Path, loss: Loss) -> None:
    tried = try_cuts(life, scratch, [loss] * (20 if SOAK and loss is Loss.SOME else 1))
    print(f"{loss.value}: {tried.cuts} cuts, {tried.trees} different trees")
    assert tried.cuts > 300
    assert tried.failures == []


@pytest.mark.parametrize("ignored", ["state.db-wal", ".part", "/results", "/state"])
def test_a_disk_that_ignores_syncs_is_noticed(life: Life, scratch: Path, ignored: str) -> None:
    """The check has teeth: without the syncs of any one kind of file something that was told is not true."""
    tried = try_cuts(life, scratch, [Loss.SYNCED], ignored)
    assert tried.failures != []
