"""3 Mbaud in and out through a pty with 20 readers, one of which stalls: no byte lost to the good ones, memory bounded.

A pty has no speed, so the target's end is paced here, on absolute deadlines: 300,000 bytes a second in each direction at once,
for half a minute in tests and for ``SOAK_MINUTES`` with ``BRIDGED_SOAK=1`` (``make soak``). The daemon is a process of its own.
"""

from __future__ import annotations

import hashlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
import tty
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.gateway import wait_for
from tests.support import free_port

pytestmark = pytest.mark.alone

BYTES_A_SECOND = 300_000  # 3 Mbaud, 8N1
READERS = 20
PIECE_S = 0.005


def soak_s() -> float:
    return float(os.environ.get("SOAK_MINUTES", "10")) * 60 if os.environ.get("BRIDGED_SOAK") == "1" else 30.0


@dataclass
class Far:
    """The target's end of the wire: talks and listens at a rate."""

    master: int
    seconds: float
    said: Any = field(default_factory=hashlib.sha256)
    heard: Any = field(default_factory=hashlib.sha256)
    count_said: int = 0
    count_heard: int = 0
    late_s: float = 0.0
    stop: bool = False

    def talk(self) -> None:
        pattern = os.urandom(1 << 20)
        began = time.monotonic()
        piece = int(BYTES_A_SECOND * PIECE_S)
        turns = int(self.seconds / PIECE_S)
        for turn in range(turns):
            due = began + turn * PIECE_S
            if (left := due - time.monotonic()) > 0:
                time.sleep(left)
            else:
                self.late_s = max(self.late_s, -left)
            at = self.count_said % (len(pattern) - piece)
            view = memoryview(pattern)[at : at + piece]
            self.said.update(view)
            self.count_said += piece
            while view:
                select.select([], [self.master], [])
                view = view[os.write(self.master, view) :]

    def listen(self) -> None:
        while not self.stop:
            if select.select([self.master], [], [], 0.05)[0]:
                data = os.read(self.master, 65536)
                self.heard.update(data)
                self.count_heard += len(data)


class Reader:
    """A client that only counts and digests."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.digest, self.count = hashlib.sha256(), 0
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while data := self.sock.recv(1 << 18):
            self.digest.update(data)
            self.count += len(data)


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_three_megabaud_both_ways_with_twenty_readers_and_one_that_stalls(tmp_path: Path) -> None:
    master, slave = os.openpty()
    tty.setraw(slave)
    (tmp_path / "tty").symlink_to(os.ttyname(slave))
    port = free_port()
    (tmp_path / "bridged.toml").write_text(
        f'[gateway]\nstate_dir = "{tmp_path}/state"\n[api]\nlisten = ""\nhttp = ""\nmetrics = ""\n'
        f'[targets.m]\nport = "{tmp_path}/tty"\n[targets.m.application]\nbaud = 3000000\n'
        f'[targets.m.console]\nlisten = "127.0.0.1:{port}"\nreplay_kib = 0\n'
        'notices = "off"\nbuffer_kib = 1024\n'
    )
    daemon = subprocess.Popen(
        [sys.executable, "-m", "bridged", "serve", "--config", str(tmp_path / "bridged.toml")],
        stdin=subprocess.DEVNULL,
        stderr=(tmp_path / "log").open("wb"),
    )
    try:

        def up() -> bool:
            assert daemon.poll() is None, (tmp_path / "log").read_text()
            try:
                socket.create_connection(("127.0.0.1", port)).close()
            except OSError:
                return False
            return "target m is there" in (tmp_path / "log").read_text()

        wait_for("the daemon", up, 30)
        readers = [Reader(port) for _ in range(READERS - 1)]
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", port))
        wait_for("everybody to sit", lambda: (tmp_path / "log").read_text().count(" came\n") >= READERS + 1)
        far = Far(master, soak_s())
        before = rss_bytes(daemon.pid)
        listener = threading.Thread(target=far.listen)
        listener.start()
        talker = threading.Thread(target=far.talk)
        talker.start()
        # The other direction: one of the readers writes as fast as it is let.
        sent, sent_digest = 0, hashlib.sha256()
        piece = bytes(range(256)) * 16
        began = time.monotonic()
        while talker.is_alive():
            readers[0].sock.sendall(piece)
            sent_digest.update(piece)
            sent += len(piece)
            time.sleep(max(0.0, began + sent / BYTES_A_SECOND - time.monotonic()))
        talker.join()
        wait_for("the last byte", lambda: all(r.count >= far.count_said for r in readers) and far.count_heard >= sent, 30)
        far.stop = True
        listener.join()
        grown = rss_bytes(daemon.pid) - before
        for reader in readers:
            assert reader.count == far.count_said
            assert reader.digest.digest() == far.said.digest()
        assert (far.count_heard, far.heard.digest()) == (sent, sent_digest.digest())
        assert far.count_said == int(soak_s() / PIECE_S) * int(BYTES_A_SECOND * PIECE_S)
        assert (tmp_path / "log").read_text().count("does not keep up") == 1
        # Nineteen that keep up within what a busy machine makes of it, and one at its bound.
        assert grown < (8 << 20) + READERS * (1 << 20)
        stalled.close()
    finally:
        daemon.terminate()
        daemon.wait(20)
        os.close(master)
        os.close(slave)
