"""A client behind 2 s of round trip, stalls and drops, who then disappears: the ROM dialogue is the same, byte for byte.

The session starts only when the whole image is staged and checked, so the link cannot reach it. The recordings of two jobs are
compared: one submitted from here, one through a link that delays everything, stalls, breaks twice during the upload and is
gone for good the moment the job is accepted.
"""

from __future__ import annotations

import hashlib
import re
import select
import socket
import threading
import time
from pathlib import Path

import pytest

from bridged import chips
from tests.e2e.gateway import Client, Gateway, pairs, wait_for
from tests.target.bench import make_image

pytestmark = pytest.mark.alone

DELAY_S = 1.0  # each way


class BadLink:
    """Connects to a Unix socket through a delay; ``break_after`` bytes to the daemon it drops the connection."""

    def __init__(self, path: Path, break_after: int | None = None, stall_at: int | None = None) -> None:
        self.client, self._inside = socket.socketpair()
        self._far = socket.socket(socket.AF_UNIX)
        self._far.connect(str(path))
        self._break_after, self._stall_at = break_after, stall_at
        self.passed = 0
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def _carry(self) -> None:
        waiting: list[tuple[float, socket.socket, bytes]] = []
        while True:
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, to, data = waiting.pop(0)
                try:
                    to.sendall(data)
                except OSError:
                    return self._end()
            left = waiting[0][0] - now if waiting else 1.0
            readable, _, _ = select.select([self._inside, self._far], [], [], max(0.0, left))
            for sock in readable:
                try:
                    data = sock.recv(4096)
                except OSError:
                    data = b""
                if not data:
                    return self._end()
                late = DELAY_S
                if sock is self._inside:
                    self.passed += len(data)
                    if self._stall_at is not None and self.passed > self._stall_at:
                        self._stall_at, late = None, DELAY_S + 1.5
                    if self._break_after is not None and self.passed > self._break_after:
                        return self._end()
                at = max(time.monotonic() + late, waiting[-1][0] if waiting else 0.0)
                waiting.append((at, self._far if sock is self._inside else self._inside, data))

    def _end(self) -> None:
        for sock in (self._inside, self._far):
            sock.close()

    def join(self) -> None:
        self._thread.join(30)


def dialogue(root: Path, job: str) -> list[str]:
    """The recording without its times."""
    (found,) = (root / "state" / "traces").glob(f"{job}*")
    lines = [re.sub(r"^ *[\d.]+ ", "", text) for text in found.read_text().splitlines()]
    assert sum(text.startswith("= ") for text in lines) > 30, "no payload was recorded"
    return lines


def local(root: Path, data: bytes) -> list[str]:
    with Gateway(root, {"f7": "F756"}) as gateway:
        client = gateway.connect()
        client.put(data, "app.bin")
        code, text = client.do("FLASH f7 app.bin addr=0x08000000 trace=1 wait=1")
        assert code == 250, text
        return dialogue(root, pairs(text)["job"])


def remote(root: Path, data: bytes) -> list[str]:
    digest = hashlib.sha256(data).hexdigest()
    with Gateway(root, {"f7": "F756"}) as gateway:
        path = root / "bridged.sock"
        breaks: list[int | None] = [5000, 6000, None]
        for broken in breaks:
            link = BadLink(path, break_after=broken, stall_at=2000)
            try:
                client = Client(link.client)
                code, text = client.do(f"HAVE {digest}")
                offset = int(pairs(text).get("offset", "0")) if code == 250 else 0
                code, text = client.do(f"PUT {len(data)} {digest} offset={offset} name=app.bin", data[offset:])
                assert code == 250, text
            except (EOFError, OSError):
                assert broken is not None
                link.join()
                continue
            break
        client.sock.sendall(b"FLASH f7 app.bin addr=0x08000000 trace=1 id=far-away\n")
        near = gateway.connect()
        job = wait_for("the job", lambda: pairs(" ".join(_jobs(near))).get("job"), 10)
        link.client.close()  # gone, without waiting for an answer
        assert (
            wait_for("the end of the job", lambda: near.status(job)["state"] not in ("queued", "running") and near.status(job))[
                "state"
            ]
            == "succeeded"
        )
        return dialogue(root, job)


def _jobs(client: Client) -> list[str]:
    client.do("JOBS")
    return client.lines


def test_a_bad_link_never_reaches_the_dialogue(tmp_path: Path) -> None:
    data = make_image(chips.find("F756"), 16_000).segments[0].data
    for name in ("near", "far"):
        (tmp_path / name).mkdir()
    assert remote(tmp_path / "far", data) == local(tmp_path / "near", data)
