"""Console and jobs on one port, with the real daemon, session processes and a paced simulated part: the hand-over both ways."""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import re
import socket
import sqlite3
import struct
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import serial  # type: ignore[import-untyped]

from bridged import chips
from bridged.sim.application import Behaviour
from bridged.sim.device import Mode
from bridged.sim.pty import PtyDevice
from bridged.sim.wire import Burst
from tests.e2e.gateway import Client, Gateway, pairs, wait_for
from tests.support import free_port
from tests.target.bench import make_image

CHIP = "L476"


class Listener:
    """A console client that keeps all that it hears, in a thread of its own."""

    def __init__(self, address: int | str) -> None:
        if isinstance(address, int):
            self.sock = socket.create_connection(("127.0.0.1", address))
        else:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(address)
        self.heard = bytearray()
        self.ended = False
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            try:
                data = self.sock.recv(65536)
            except OSError:
                data = b""
            if not data:
                self.ended = True
                return
            self.heard += data

    def say(self, data: bytes) -> None:
        self.sock.sendall(data)

    def talk(self) -> None:
        """A line, its answer, the next line, until a job is told."""
        for n in range(1000):
            self.say(b"%03d %s\n" % (n, b"x" * 200))
            wait_for("the answer", lambda n=n: b"ok %03d" % n in self.heard or b"[bridged: " in self.heard)
            if b"[bridged: " in self.heard:
                return

    def wait(self, text: bytes, within_s: float = 20.0) -> bytes:
        wait_for(f"{text!r}", lambda: text in self.heard or self.ended, within_s)
        assert text in self.heard, bytes(self.heard)
        return bytes(self.heard)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # A close alone does not wake the thread.
        self._thread.join(5)
        self.sock.close()


class Wire:
    """What the simulated part puts on its TX while its application runs; the loader's words are left out."""

    def __init__(self, port: PtyDevice) -> None:
        self.application = bytearray()
        self._device, self._send = port.device, port._port.send
        port._port.send = self._record  # type: ignore[method-assign]

    def _record(self, burst: Burst) -> int:
        if self._device.mode is Mode.APPLICATION:
            self.application += burst.data
        return self._send(burst)


@dataclass
class Site:
    gateway: Gateway
    port: int
    client: Client

    def flash(self, banner: bytes, wait: int = 1) -> tuple[int, str]:
        image = make_image(chips.find(CHIP), 2000, banner=banner)
        name = banner.replace(b" ", b"-").decode() + ".bin"
        self.client.put(image.segments[0].data, name)
        return self.client.do(f"FLASH m {name}@0x08000000 outside=discard wait={wait}")

    def job_ends(self, text: str) -> None:
        code, said = self.client.do(f"WAIT {pairs(text)['job']}")
        assert code == 250, said


@contextmanager
def site(
    root: Path, *, console: str = "", application: str = "listen_s = 0.5", baud: int = 115200, paced: bool = True
) -> Iterator[Site]:
    """One target with an application in flash that greets, and answers ``ok LINE``."""
    port = free_port()
    extra = f'[targets.m.console]\nlisten = "127.0.0.1:{port}"\nsocket = "{root}/m.console"\n{console}'
    settings: dict[str, Any] = {"application": Behaviour(baud=baud)}
    with Gateway(root, {"m": CHIP}, settings, paced=paced, extra=extra, application=application) as gateway:
        client = gateway.connect()
        found = Site(gateway, port, client)
        wait_for("the target", lambda: client.do("INFO m") and "state=idle" in client.lines)
        image = make_image(chips.find(CHIP), 2000, banner=b"version one")
        with gateway.ports["m"].lock:
            gateway.device("m").memory.load_flash(image.segments[0].data)
        code, text = client.do("RESET m wait=1")
        assert code == 250, text
        yield found
        client.close()


NOTICE = re.compile(rb"\r\n\[bridged: [^\]]*\]\r\n")


@pytest.mark.parametrize("job", ["RESET m", "flash"])
def test_every_byte_of_the_application_is_heard_in_order_up_to_the_reset_and_from_it_on(tmp_path: Path, job: str) -> None:
    """It talks while the job comes, and greets after it. Nothing is missing, and nothing of the loader is among it."""
    with site(tmp_path, console="replay_kib = 0") as found:
        wire = Wire(found.gateway.ports["m"])
        tcp, unix = Listener(found.port), Listener(f"{tmp_path}/m.console")
        tcp.say(b"hello\n")
        tcp.wait(b"ok hello\r\n")
        # One line after the other without a pause, and the job in the middle of it. Not ahead: a simulated part reads all
        # from its pty at once, as if it were on the wire already, where a UART's driver would discard it.
        talk = threading.Thread(target=tcp.talk, daemon=True)
        talk.start()
        tcp.wait(b"ok 003")
        code, text = found.flash(b"version two", wait=0) if job == "flash" else found.client.do(job)
        assert code == 250, text
        found.job_ends(text)
        banner = b"version two\r\n" if job == "flash" else b"version one\r\n"
        for listener in (tcp, unix):
            listener.wait(banner + b"\r\n[bridged: ")
            listener.wait(b"has given the port back]\r\n")
            assert NOTICE.sub(b"", bytes(listener.heard)) == bytes(wire.application)
        talk.join(10)
        # The one who wrote before writes on.
        tcp.say(b"again\n")
        unix.wait(b"ok again\r\n")
        tcp.close()
        unix.close()


def test_what_is_sent_during_a_job_is_dropped_and_told_and_the_writer_writes_on(tmp_path: Path) -> None:
    with site(tmp_path, application="listen_s = 1.5") as found:
        listener = Listener(found.port)
        listener.say(b"first\n")
        listener.wait(b"ok first\r\n")
        code, text = found.client.do("RESET m")
        assert code == 250
        listener.wait(b"has the port]\r\n")
        listener.say(b"stop autoboot\n")
        listener.wait(b"[bridged: not sent: job ")
        found.job_ends(text)
        listener.wait(b"has given the port back]\r\n")
        listener.say(b"second\n")
        heard = listener.wait(b"ok second\r\n")
        assert b"ok stop" not in heard
        listener.close()


def test_the_application_has_its_own_speed_and_a_job_leaves_it_so(tmp_path: Path) -> None:
    """The loader is spoken to at 115200 baud, the application at 57600, before and after."""
    with site(tmp_path, application="baud = 57600", baud=57600, console="replay_kib = 0") as found:
        listener = Listener(found.port)
        code, text = found.flash(b"version two")
        assert code == 250, text
        listener.wait(b"version two\r\n")
        listener.say(b"hello\n")
        listener.wait(b"ok hello\r\n")
        listener.close()


def test_pyserials_client_lives_through_a_flash_and_keeps_its_settings(tmp_path: Path) -> None:
    """Nothing but the application's bytes is in what it reads; it hears of the job beside them, and its speed is back."""
    console = 'protocol = "rfc2217"\nreplay_kib = 0'
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(site(tmp_path, paced=False, console=console))
        url = f"rfc2217://127.0.0.1:{found.port}?timeout=10"
        port = stack.enter_context(serial.serial_for_url(url, baudrate=115200, timeout=10))
        port.write(b"hello\n")
        assert port.read_until(b"\n") == b"ok hello\r\n"
        port.stopbits = serial.STOPBITS_TWO
        code, text = found.flash(b"version two")
        assert code == 250, text
        assert port.read_until(b"\n") == b"version two\r\n"
        port.write(b"again\n")
        assert port.read_until(b"\n") == b"ok again\r\n"
        settings = array.array("B", bytes(44))
        with open(f"{tmp_path}/m", "rb", buffering=0, opener=lambda path, _: os.open(path, os.O_RDONLY | os.O_NOCTTY)) as tty:
            fcntl.ioctl(tty, 0x802C542A, settings)  # TCGETS2
        (cflag,) = struct.unpack_from("=I", settings, 8)
        assert cflag & termios.CSTOPB, "what the client set before the job is set again"


def test_console_lock_and_unlock_on_the_line_protocol(tmp_path: Path) -> None:
    with site(tmp_path, paced=False) as found:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(f"{tmp_path}/bridged.sock")
        writer = Client(sock)
        code, text = writer.do("CONSOLE m rw replay=0")
        assert (code, pairs(text)["mode"]) == (101, "rw")
        sock.sendall(b"hello\n")
        assert writer.file.readline() == b"ok hello\r\n"
        code, text = found.client.do("INFO m")
        assert any(line.startswith("owner_kind=console") for line in found.client.lines)
        other = found.gateway.connect()
        code, text = other.do("CONSOLE m")
        assert code == 423, text
        assert "writes on its console" in text
        code, text = other.do("CONSOLE m ro replay=8")
        assert (code, pairs(text)["mode"]) == (101, "ro")
        assert other.file.read(8) == b" hello\r\n"
        other.sock.sendall(b"no\n")
        assert b"came to read only" in other.file.readline() + other.file.readline()
        third = found.gateway.connect()
        code, text = third.do("CONSOLE m rw replay=0 force=1")
        assert code == 101, text
        third.sock.sendall(b"mine\n")
        assert third.file.readline() == b"ok mine\r\n"
        assert b"has taken over and writes now" in writer.file.readline() + writer.file.readline()
        for client in (writer, other, third):
            client.close()
        code, text = found.client.do("LOCK m ttl=60 note=measuring")
        assert (code, pairs(text)["ttl"]) == (250, "60")
        found.client.do("INFO m")
        assert "owner_kind=lock" in found.client.lines
        assert "owner_note=measuring" in found.client.lines
        assert found.client.do("UNLOCK m")[0] == 250
        assert found.client.do("UNLOCK m")[0] == 251
        assert found.client.do("CONSOLE nobody")[0] == 404


def test_a_thousand_come_and_go_while_jobs_run(tmp_path: Path) -> None:
    """No seat, no lease, no descriptor and no memory is left behind; the jobs succeed, and say what they say else."""
    with site(tmp_path, paced=False, console="clients = 40", application="listen_s = 0.1") as found:
        daemon = found.gateway.daemon
        assert daemon is not None
        descriptors = Path(f"/proc/{daemon.pid}/fd")
        done = threading.Event()
        results: list[int] = []

        def jobs() -> None:
            client = found.gateway.connect()
            while not done.is_set():
                results.append(client.do("ID m wait=1")[0])
            client.close()

        def visit(count: int) -> None:
            kept: list[socket.socket] = []
            for n in range(count):
                sock = socket.create_connection(("127.0.0.1", found.port))
                if n % 3 == 0:
                    sock.sendall(b"hi\n")
                if n % 5 == 0:  # Gone without a good-bye.
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                kept.append(sock)
                if len(kept) > n % 20:
                    kept.pop(0).close()
            for sock in kept:
                sock.close()

        def settled() -> bool:
            # One look at the metrics is not needed: INFO tells who holds it, and descriptors tell who is there.
            found.client.do("INFO m")
            return "state=idle" in found.client.lines and not any("owner=" in line for line in found.client.lines)

        assert found.client.do("ID m wait=1")[0] == 250
        visit(50)
        wait_for("the first ones to be gone", settled)
        time.sleep(0.5)
        before, memory = len(list(descriptors.iterdir())), found.gateway.rss_bytes()
        worker = threading.Thread(target=jobs)
        worker.start()
        visit(1000)
        done.set()
        worker.join(60)
        wait_for("the last ones to be gone", settled)
        wait_for("their descriptors to be closed", lambda: len(list(descriptors.iterdir())) <= before)
        assert len(results) >= 3
        assert set(results) == {250}
        assert found.gateway.rss_bytes() - memory < 8 << 20
        with contextlib.closing(sqlite3.connect(f"file:{tmp_path}/state/state.db?mode=ro", uri=True)) as db:
            rows = db.execute("SELECT result FROM jobs WHERE kind = 'identify' ORDER BY created")
            calm, *sent = [json.loads(row[0])["uart_bytes"]["out"] for row in rows]
        assert sent.count(calm) > 0.8 * len(sent), "a byte that the machine was late for is asked again; clients add none"
        listener = Listener(found.port)
        listener.say(b"still there\n")
        listener.wait(b"ok still there\r\n")
        listener.close()
