"""SIGKILL of the daemon together with its sessions at each moment that matters: nothing is lost, nothing is run twice.

``tests.e2e.killed`` is the daemon that dies. The client here does what the documentation tells clients to do: connect again,
ask ``HAVE``, go on from there, submit with the same id, wait. A few moments of each kind in a normal run, all of them when
BRIDGED_SOAK is set.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sqlite3
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from bridged.images.model import Image
from tests.e2e.gateway import Client, Gateway, pairs

SOAK = bool(os.environ.get("BRIDGED_SOAK"))
ROUNDS = 6  # of a normal run
BASE = 0x08000000


class Dying(Gateway):
    """``plan``: at which moments the next daemons die; after the last one it lives."""

    def command(self) -> list[str]:
        program = str(Path(__file__).with_name("killed.py"))
        kill_at = self.plan.pop(0) if self.plan else 0
        return [sys.executable, program, str(kill_at), str(self.root / "points"), "--config", str(self.root / "bridged.toml")]

    def __enter__(self) -> Dying:
        self.plan: list[int] = []
        self.deaths: list[str] = []
        self.programs = 0  # What the part had programmed at the end of the last job.
        super().__enter__()
        return self

    def revive(self) -> None:
        """Where the daemon has died, of its own hand: start the next one, and the one after that when it dies at its start."""
        while True:
            if self.daemon is not None:
                assert self.daemon.wait(30) == -signal.SIGKILL, (self.root / "daemon.log").read_text()
                self.deaths.append(self.moments()[-1])
                self.daemon = None
                self.log.close()
            try:
                self.start()
                return
            except AssertionError:
                if self.daemon is None or self.daemon.poll() != -signal.SIGKILL:
                    raise

    def moments(self) -> list[str]:
        """Those that were passed since the last call."""
        path = self.root / "points"
        found = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return found


def one_round(gateway: Dying, number: int) -> tuple[int, int]:
    """Stage a large and a small file and flash the small one, however often the daemon dies. Gives its deaths and attempts."""
    rng = random.Random(number)
    small, large = rng.randbytes(3000), rng.randbytes(300_000)
    small = (0x20001000).to_bytes(4, "little") + (BASE + 0x201).to_bytes(4, "little") + small  # a vector table first
    told: dict[str, int] = {}
    job, deaths = "", 0
    while True:
        client = None
        try:
            client = gateway.connect()
            for name, data in (("large", large), (f"small{number}", small)):
                stage(client, data, name, told)
            if not deaths:  # Then nothing was submitted in this round yet.
                assert gateway.device("l4").stats.programs == gateway.programs, "a job that has ended is run again"
            code, text = client.do(f"FLASH l4 small{number} addr={BASE:#x} id=round-{number}")
            assert code == 250, text
            assert pairs(text)["job"] == job or not job, "the same id made a second job"
            job = pairs(text)["job"]
            code, text = client.do(f"WAIT {job} timeout=60")
            assert code in (250, 251), text
            assert (pairs(text)["state"], pairs(text)["evidence"]) == ("succeeded", "full")
            break
        except (OSError, EOFError):
            deaths += 1
            gateway.revive()
        finally:
            if client is not None:
                client.close()
    gateway.programs = gateway.device("l4").stats.programs
    assert gateway.holds("l4", Image.of([(BASE, small)]))
    lines = gateway.device("l4").lines
    assert (lines["nrst"], lines["boot0"]) == (True, False)
    with closing(sqlite3.connect(f"file:{gateway.root}/state/state.db?mode=ro", uri=True)) as db:
        states = [row[0] for row in db.execute("SELECT state FROM updates WHERE job = ? ORDER BY seq", (job,))]
        (attempts,) = db.execute("SELECT attempts FROM jobs WHERE id = ?", (job,)).fetchone()
        assert db.execute("SELECT count(*) FROM sessions").fetchone() == (0,), "a session is still noted"
    assert states.count("succeeded") == 1
    assert states[-1] == "succeeded"
    assert "failed" not in states
    return deaths, int(attempts)


def stage(client: Client, data: bytes, name: str, told: dict[str, int]) -> None:
    """Send what is missing. What was told once must not become less."""
    digest = hashlib.sha256(data).hexdigest()
    code, text = client.do(f"HAVE {digest}")
    offset = int(pairs(text)["offset"]) if code == 250 else 0
    assert offset >= told.get(digest, 0), f"{told[digest]} bytes were there, now {offset}"
    told[digest] = offset
    if offset < len(data) or code != 250 or pairs(text)["complete"] != "1":
        code, text = client.do(f"PUT {len(data)} {digest} name={name} offset={offset}", data[offset:])
        assert code == 250, text
    told[digest] = len(data)


def chosen(moments: list[str], rng: random.Random) -> list[int]:
    """Numbers of moments at which to die: all of them, or one of each of some kinds."""
    if SOAK:
        return list(range(1, len(moments) + 1))
    kinds: dict[str, list[int]] = {}
    for number, name in enumerate(moments, 1):
        kinds.setdefault(name, []).append(number)
    often = ["before a commit", "after a commit", "bytes of an upload", "fsync in sync_directory"]
    rare = rng.sample(sorted(set(kinds) - set(often)), ROUNDS - len(often))
    return sorted(rng.choice(kinds[name]) for name in often + rare)


@pytest.mark.timeout(14400 if SOAK else 240)
def test_killed_at_each_moment(tmp_path: Path) -> None:
    rng = random.Random(8)
    with Dying(tmp_path, {"l4": "L476"}, extra="[jobs]\nresume_limit = 100\n") as gateway:
        assert one_round(gateway, 0) == (0, 1)
        first = gateway.moments()
        deaths: Counter[str] = Counter()
        again = 0
        for number, moment in enumerate(chosen(first, rng), 1):
            gateway.stop()
            # The second one dies while it recovers what the first left, or soon after.
            gateway.plan = [moment, *([rng.randint(1, len(first) // 2)] if number % 2 else [])]
            gateway.moments()
            gateway.revive()
            _, attempts = one_round(gateway, number)
            again += attempts > 1
            deaths.update(gateway.deaths)
            gateway.deaths.clear()
        print(f"{len(first)} moments in a life; {deaths.total()} deaths, {again} jobs resumed: {dict(deaths)}")
    assert deaths.total() >= ROUNDS
    assert again >= 1
