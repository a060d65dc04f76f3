"""SIGKILL of the session, of the daemon, of both, in every phase: lines released, the job resumed, nothing left over."""

from __future__ import annotations

import os
import signal
import sqlite3
from pathlib import Path

import pytest

from bridged import chips
from tests.e2e.gateway import Gateway, pairs, wait_for
from tests.target.bench import make_image

PHASES = ["sync", "identify", "erase", "write", "verify", "boot"]
SIZE = 10_000


@pytest.mark.parametrize("victim", ["session", "daemon", "both"])
@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_any_phase_the_job_ends_once_and_the_next_one_works(tmp_path: Path, phase: str, victim: str) -> None:
    image = make_image(chips.find("L476"), SIZE)
    with Gateway(tmp_path, {"l4": "L476"}) as gateway:
        client = gateway.connect()
        client.put(image.segments[0].data, "app.bin")
        code, text = client.do("FLASH l4 app.bin addr=0x08000000 id=once")
        assert code == 250, text
        job = pairs(text)["job"]
        in_phase(gateway, job, phase)
        (session,) = wait_for("a session process", gateway.sessions)
        if victim in ("daemon", "both"):
            gateway.stop(signal.SIGKILL)
        if victim in ("session", "both"):
            os.kill(session, signal.SIGKILL)
        if victim != "session":
            client.close()
            gateway.start()
            client = gateway.connect()
        # The same id finds the same job, across the restart.
        assert pairs(client.do("FLASH l4 app.bin addr=0x08000000 id=once")[1])["job"] == job
        code, text = client.do(f"WAIT {job} timeout=60")
        assert code in (250, 251), text
        assert pairs(text)["state"] == "succeeded"
        assert pairs(text)["evidence"] == "full"
        wait_for("the end of all session processes", lambda: not gateway.sessions())
        assert gateway.holds("l4", image)
        assert not gateway.device("l4").lines["boot0"]
        assert gateway.device("l4").lines["nrst"]
        code, text = client.do("ENSURE l4 app.bin addr=0x08000000 wait=1")
        assert (code, pairs(text)["changed"]) == (251, "0"), text
        client.close()
        gateway.stop()
        terminal_once(tmp_path, job)


def in_phase(gateway: Gateway, job: str, phase: str) -> None:
    """Return when the job is in ``phase``; a job that ends before that fails the test."""
    watcher = gateway.connect()
    watcher.sock.sendall(f"WATCH {job}\n".encode())
    while True:
        raw = watcher.file.readline().decode()
        assert raw.startswith("150"), raw
        if f"phase={phase} " in raw:
            break
    watcher.close()


def terminal_once(root: Path, job: str) -> None:
    """The journal is whole, and the job reached exactly one terminal state."""
    with sqlite3.connect(f"file:{root}/state/state.db?mode=ro", uri=True) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        states = [row[0] for row in db.execute("SELECT state FROM updates WHERE job = ? ORDER BY seq", (job,))]
    assert states.count("succeeded") == 1
    assert states[-1] == "succeeded"
    assert "failed" not in states
