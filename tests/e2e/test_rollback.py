"""The real daemon and real sessions: a new image does not answer the health probe, and the one before comes back.

Flash is looked into from outside: the good image, the bytes of the shared last sector that belong to neither image, and the
lines. The daemon is killed in the middle of the restore, and its session with it.
"""

from __future__ import annotations

import os
import signal
import sqlite3
from pathlib import Path

import pytest

from bridged import chips
from bridged.cli import main as cli
from bridged.cli.exits import Exit
from bridged.images.model import Image
from tests.e2e.gateway import Client, Gateway, pairs, wait_for
from tests.target.bench import make_image

L476 = chips.find("L476")
GOOD = make_image(L476, 10_000, seed=1, banner=b"good application")
BAD = make_image(L476, 9_000, seed=2, banner=b"bad application")
LONG = make_image(L476, 15_000, seed=3, banner=b"bad application")
MINE = Image.of(
    [(0x08000000 + 10_104, b"bytes of the unit".ljust(24))]
)  # in the last sector of GOOD and beyond it; LONG covers it
FAR = Image.of(
    [(0x08000000 + 15_104, b"more of them".ljust(24))]
)  # in the last sector of LONG, which the restore does not touch
PROBE = '[targets.l4.application.health]\nexpect = "good application"\nwithin_s = 1.0'


def staged(gateway: Gateway) -> Client:
    """A gateway whose target runs ``GOOD``."""
    client = gateway.connect()
    for name, image in (("good.bin", GOOD), ("bad.bin", BAD), ("long.bin", LONG)):
        client.put(image.segments[0].data, name)
    with gateway.ports["l4"].lock:
        for image in (MINE, FAR):
            gateway.device("l4").memory.program(image.start, image.segments[0].data)
    code, text = client.do("FLASH l4 good.bin addr=0x08000000 wait=1")
    assert (code, pairs(text)["health"]) == (250, "passed"), text
    return client


def until(gateway: Gateway, job: str, words: str) -> None:
    watcher = gateway.connect()
    watcher.sock.sendall(f"WATCH {job}\n".encode())
    while words not in (raw := watcher.file.readline().decode()):
        assert raw.startswith("150"), raw
    watcher.close()


@pytest.mark.parametrize("name", ["bad.bin", "long.bin"])
def test_the_image_before_comes_back(tmp_path: Path, name: str) -> None:
    with Gateway(tmp_path, {"l4": "L476"}, extra=PROBE) as gateway:
        client = staged(gateway)
        code, text = client.do(f"FLASH l4 {name} addr=0x08000000 wait=1")
        assert (code, text.split()[0]) == (400, "UNHEALTHY"), text
        told = pairs(text)
        assert (told["state"], told["phase"]) == ("rolled_back", "restore")
        assert "it said 'bad application'; good.bin was restored and proven, and is healthy" in told["message"]
        assert (told["result.evidence"], told["result.restored"], told["result.health"]) == ("full", "good.bin", "passed")
        assert gateway.holds("l4", GOOD)
        assert gateway.holds("l4", FAR)
        assert gateway.holds("l4", MINE) == (name == "bad.bin"), "LONG itself overwrote it, as it was asked to"
        client.do("INFO l4")
        assert "image_name=good.bin" in " ".join(client.lines)
        code, text = client.do("ENSURE l4 good.bin addr=0x08000000 wait=1")
        assert (code, pairs(text)["changed"]) == (251, "0"), text


@pytest.mark.parametrize("step", ["identify", "erase", "write", "verify", "boot"])
def test_killed_in_the_middle_of_the_restore(tmp_path: Path, step: str) -> None:
    with Gateway(tmp_path, {"l4": "L476"}, extra=PROBE) as gateway:
        client = staged(gateway)
        code, text = client.do("FLASH l4 bad.bin addr=0x08000000")
        assert code == 250, text
        job = pairs(text)["job"]
        until(gateway, job, f"event=Restoring step={step}")
        assert client.do(f"CANCEL {job}")[1].startswith("NOT_CANCELLABLE")
        (session,) = wait_for("a session process", gateway.sessions)
        gateway.stop(signal.SIGKILL)
        os.kill(session, signal.SIGKILL)
        client.close()
        gateway.start()
        client = gateway.connect()
        code, text = client.do(f"WAIT {job} timeout=60")
        assert (code, pairs(text)["state"]) == (400, "rolled_back"), text
        assert gateway.holds("l4", GOOD)
        assert gateway.holds("l4", MINE)
        assert gateway.holds("l4", FAR)
        assert not gateway.device("l4").lines["boot0"]
        client.close()
        gateway.stop()
        with sqlite3.connect(f"file:{tmp_path}/state/state.db?mode=ro", uri=True) as db:
            states = [row[0] for row in db.execute("SELECT state FROM updates WHERE job = ? ORDER BY seq", (job,))]
        assert (states.count("rolled_back"), states[-1]) == (1, "rolled_back")


def test_the_command_line_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Gateway(tmp_path, {"l4": "L476"}, extra=PROBE) as gateway:
        staged(gateway).close()
        (tmp_path / "bad.bin").write_bytes(BAD.segments[0].data)
        code = cli(["--gateway", f"unix:{tmp_path}/bridged.sock", "flash", "l4", f"{tmp_path}/bad.bin@0x08000000"])
        said = capsys.readouterr()
        assert code == Exit.ROLLED_BACK, said
        assert "good.bin was restored and proven, and is healthy" in said.out + said.err
