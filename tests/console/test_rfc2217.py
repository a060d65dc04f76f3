"""RFC 2217: pyserial's client in everything that it documents, against us, and the same set against ser2net as the reference.

The port is a pty in both cases: it has no modem lines, no break and no parity. What can be told apart on a pty is looked at
on it (bytes, speed, stop bits); the rest is what the client is answered. Modem lines, break and error counters are tested below
with a port of the test's own.

ser2net 4.3 does not answer SET-CONTROL for DTR, RTS and break where the port has none of these, so that pyserial gives up;
its client has the option ``ign_set_control`` for such servers, with which the reference runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import socket
import struct
import subprocess
import threading
import time
import tty
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import serial  # type: ignore[import-untyped]

from bridged import config
from bridged.protocol import rfc2217, telnet
from bridged.protocol.rfc2217 import Command, Control
from bridged.target.owner import Target
from bridged.target.uart import Counters
from tests.console.rig import Bench, Client, bench
from tests.support import free_port, require_tool, take

_TCGETS2 = 0x802C542A


@dataclass
class Site:
    """``master``: the target's end of the wire. ``name``: of the server."""

    name: str
    port: int
    master: int

    def open(self, options: str = "", answer_s: int = 10, **settings: Any) -> Any:
        options += "&ign_set_control" if self.name == "ser2net" else ""
        url = f"rfc2217://127.0.0.1:{self.port}?timeout={answer_s}{options}"
        return serial.serial_for_url(url, **{"timeout": 5, **settings})

    def say(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            select.select([], [self.master], [], 5)
            view = view[os.write(self.master, view) :]

    def hear(self, count: int) -> bytes:
        return take(self.master, count)

    @property
    def settings(self) -> tuple[int, int]:
        """Speed and cflag of the port."""
        block = bytearray(44)
        fcntl.ioctl(self.master, _TCGETS2, block)
        return struct.unpack_from("=I", block, 40)[0], struct.unpack_from("=I", block, 8)[0]


@contextmanager
def ours(root: Path) -> Iterator[Site]:
    """Our console, with its loop in a thread."""
    ready: list[Site] = []
    begun, end = threading.Event(), threading.Event()

    async def main() -> None:
        application = config.Application(baud=9600, listen_s=0.0)
        async with bench(root, protocol="rfc2217", replay_kib=0, application=application) as b:
            os.set_blocking(b.master, True)
            ready.append(Site("bridged", b.port, b.master))
            begun.set()
            await asyncio.to_thread(end.wait)

    def run() -> None:
        try:
            asyncio.run(main())
        finally:
            begun.set()

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait(10)
    try:
        yield ready[0]
    finally:
        end.set()
        thread.join(10)


@contextmanager
def ser2net(root: Path) -> Iterator[Site]:
    """ser2net 4 from Debian on a pty of its own."""
    master, slave = os.openpty()
    tty.setraw(slave)
    port = free_port()
    file = root / "ser2net.yaml"
    file.write_text(
        f"""connection: &one
  accepter: telnet(rfc2217),tcp,127.0.0.1,{port}
  connector: serialdev,{os.ttyname(slave)},9600n81,local
  options:
    kickolduser: true
"""
    )
    server = subprocess.Popen(["ser2net", "-n", "-c", str(file), "-P", str(root / "pid")], stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "ser2net does not listen"
                assert server.poll() is None, "ser2net ended"
                time.sleep(0.05)
        yield Site("ser2net", port, master)
    finally:
        server.terminate()
        server.wait(10)
        os.close(master)
        os.close(slave)


@pytest.fixture(params=["bridged", "ser2net"], scope="module")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if request.param == "ser2net":
        require_tool("ser2net", "ser2net")
    with {"bridged": ours, "ser2net": ser2net}[request.param](tmp_path_factory.mktemp(request.param)) as found:
        yield found


# --- what pyserial documents, against both ------------------------------------------------------------------------


def test_bytes_of_every_value_both_ways(site: Site) -> None:
    every = bytes(range(256)) * 4 + b"\xff" * 50
    with site.open(baudrate=115200) as port:
        assert port.write(every) == len(every)
        assert site.hear(len(every)) == every
        site.say(every)
        assert port.read(len(every)) == every


def test_settings_at_open_and_later(site: Site) -> None:
    with site.open(baudrate=57600, stopbits=serial.STOPBITS_TWO) as port:
        speed, cflag = site.settings
        assert speed == 57600
        assert cflag & 0o100  # CSTOPB
        port.stopbits = serial.STOPBITS_ONE
        assert not site.settings[1] & 0o100
        for baud in (300, 9600, 38400, 115200, 230400, 921600):
            port.baudrate = baud
            assert site.settings[0] == baud
        for parity in (serial.PARITY_EVEN, serial.PARITY_ODD, serial.PARITY_NONE):
            port.parity = parity
        port.bytesize = serial.EIGHTBITS
        saved = port.get_settings()
        port.apply_settings({**saved, "baudrate": 19200})
        assert site.settings[0] == 19200


def test_timeouts_and_in_waiting(site: Site) -> None:
    with site.open(timeout=0.2) as port:
        began = time.monotonic()
        assert port.read(10) == b""
        assert 0.15 < time.monotonic() - began < 2
        site.say(b"abc")
        began = time.monotonic()
        assert port.read(10) == b"abc"
        site.say(b"12345")
        deadline = time.monotonic() + 5
        while port.in_waiting < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert port.in_waiting == 5
        port.timeout = 0
        assert port.read(1) == b"1"
        port.timeout = 5
        assert port.read_until(b"5") == b"2345"
        site.say(b"line one\nline two\n")
        assert port.readline() == b"line one\n"
        assert port.readlines(1) == [b"line two\n"]


def test_buffers_are_purged(site: Site) -> None:
    with site.open() as port:
        site.say(b"old")
        deadline = time.monotonic() + 5
        while port.in_waiting < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        port.reset_input_buffer()
        assert port.in_waiting == 0
        port.reset_output_buffer()
        port.flush()
        site.say(b"new")
        assert port.read(3) == b"new"


def test_lines_break_and_flow_control_are_acknowledged(site: Site) -> None:
    """On a pty nothing moves, and every request must be answered as it was asked, or pyserial raises."""
    with site.open() as port:
        for level in (False, True):
            port.dtr = level
            port.rts = level
            assert (port.dtr, port.rts) == (level, level)
        port.break_condition = True
        port.break_condition = False
        port.send_break(0.01)
        port.xonxoff = True
        port.xonxoff = False
        port.write(b"after")
        assert site.hear(5) == b"after"


def test_modem_state_is_told_without_being_asked(tmp_path: Path) -> None:
    """By us, also on a port without modem lines, where ser2net 4.3 keeps silent and pyserial's ``cts`` raises."""
    with ours(tmp_path) as site, site.open() as port:
        deadline = time.monotonic() + 5
        while port._modemstate is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (port.cts, port.dsr, port.ri, port.cd) == (False, False, False, False)


def test_modem_state_can_be_polled(site: Site) -> None:
    with site.open(timeout=1, options="&poll_modem", answer_s=3) as port:  # ser2net does not answer here: it is waited out.
        time.sleep(0.4)  # Until what came by itself is old for pyserial.
        # ser2net tells it now and then (docs/console.md); we always do.
        with contextlib.suppress(*(serial.SerialException,) if site.name == "ser2net" else ()):
            assert port.cts in (False, True)


def test_it_opens_again_and_again(site: Site) -> None:
    for number in range(3):
        with site.open(baudrate=115200) as port:
            port.write(b"%d" % number)
            assert site.hear(1) == b"%d" % number


def test_four_hundred_kilobytes_through_it(site: Site) -> None:
    data = bytes(range(256)) * 400
    with site.open(baudrate=921600, timeout=20) as port:
        talker = threading.Thread(target=site.say, args=(data,))
        talker.start()
        assert port.read(len(data)) == data
        talker.join()
        writer = threading.Thread(target=port.write, args=(data,))
        writer.start()
        assert site.hear(len(data)) == data
        writer.join()


# --- ours alone -----------------------------------------------------------------------------------------------------


def sub(payload: bytes) -> bytes:
    return telnet.subnegotiation(telnet.COM_PORT, payload)


SPEAKS = bytes((255, telnet.WILL, telnet.COM_PORT, 255, telnet.DO, telnet.BINARY, 255, telnet.WILL, telnet.BINARY))


class Peer:
    """A client that says exactly what a test wants, and sorts what it hears."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.data = b""
        self.subs: list[bytes] = []
        self._parser = telnet.Parser()
        self._parser.binary = True
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while piece := await self.client.reader.read(65536):
            for item in self._parser.feed(piece):
                if isinstance(item, telnet.Data):
                    self.data += item.data
                elif isinstance(item, telnet.Subnegotiation):
                    self.subs.append(item.payload)

    def ask(self, command: Command, value: bytes = b"") -> None:
        self.client.say(sub(bytes((command,)) + value))

    async def answer(self, command: Command, within_s: float = 5.0) -> bytes:
        """The value of the next answer or notification of this kind; those before it are dropped."""
        async with asyncio.timeout(within_s):
            while True:
                for at, payload in enumerate(self.subs):
                    if payload[0] == command + rfc2217.SERVER:
                        del self.subs[: at + 1]
                        return payload[1:]
                await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def peers(root: Path, count: int = 1, **settings: Any) -> AsyncIterator[tuple[Bench, list[Peer]]]:
    async with asyncio.timeout(30), bench(root, protocol="rfc2217", **settings) as b:
        found = []
        for _ in range(count):
            client = await b.connect()
            client.say(SPEAKS)
            found.append(Peer(client))
            await found[-1].answer(Command.NOTIFY_MODEMSTATE)
        yield b, found


def test_a_reader_learns_the_settings_and_changes_none(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path, 2) as (b, (one, two)):
            one.ask(Command.SET_BAUDRATE, (38400).to_bytes(4, "big"))
            assert await one.answer(Command.SET_BAUDRATE) == (38400).to_bytes(4, "big")
            two.ask(Command.SET_BAUDRATE, bytes(4))
            assert await two.answer(Command.SET_BAUDRATE) == (38400).to_bytes(4, "big")
            two.ask(Command.SET_BAUDRATE, (9600).to_bytes(4, "big"))
            assert b"writes on its console" in await two.answer(Command.SIGNATURE)
            assert await two.answer(Command.SET_BAUDRATE) == (38400).to_bytes(4, "big")
            two.ask(Command.SET_PARITY, b"\x03")
            assert await two.answer(Command.SET_PARITY) == b"\x01"
            two.ask(Command.SET_CONTROL, bytes((Control.RTS_OFF,)))
            assert await two.answer(Command.SET_CONTROL) == bytes((Control.RTS_ON,))
            assert b.target.frame.baud == 38400
            # What one client set lasts until it leaves.
            await one.client.close()
            await b.until(lambda: b.target.frame.baud == 115200)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("command", "asked", "answered"),
    [
        (Command.SET_BAUDRATE, 1, 115200),
        (Command.SET_BAUDRATE, 2**32 - 1, 115200),
        (Command.SET_DATASIZE, 9, 8),
        (Command.SET_DATASIZE, 7, 7),
        (Command.SET_PARITY, 9, 1),
        (Command.SET_PARITY, 5, 5),
        (Command.SET_STOPSIZE, 3, 3),
        (Command.SET_STOPSIZE, 0, 1),
        (Command.SET_CONTROL, Control.FLOW_RTS, Control.FLOW_RTS),
        (Command.SET_CONTROL, Control.ASK_FLOW_IN, Control.FLOW_IN_NONE),
        (Command.SET_CONTROL, Control.FLOW_DCD, Control.FLOW_NONE),
        (Command.SET_CONTROL, Control.ASK_BREAK, Control.BREAK_OFF),
    ],
)
def test_the_answer_is_what_is_in_force(tmp_path: Path, command: Command, asked: int, answered: int) -> None:
    width = 4 if command is Command.SET_BAUDRATE else 1

    async def main() -> None:
        async with peers(tmp_path) as (_, (peer,)):
            peer.ask(command, asked.to_bytes(width, "big"))
            assert int.from_bytes(await peer.answer(command), "big") == answered

    asyncio.run(main())


def test_what_nobody_knows_is_not_answered_and_hurts_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path) as (b, (peer,)):
            for payload in (b"", b"\x20\x01", b"\x01\x02", bytes((Command.SET_CONTROL, 99)), bytes((Command.PURGE_DATA, 9))):
                peer.client.say(sub(payload))
            peer.client.say(b"\xff\xfb\x1f\xff\xfa\x1f\x00\x50\x00\x18\xff\xf0\xff\xf6")
            peer.ask(Command.SIGNATURE)
            assert (await peer.answer(Command.SIGNATURE)).startswith(b"bridged ")
            assert not any(payload[0] in (Command.SET_CONTROL + 100, Command.PURGE_DATA + 100) for payload in peer.subs)
            peer.client.say(b"x")
            assert await b.hear(1) == b"x"
            await b.until(lambda: b"[bridged: yes]" in peer.data)

    asyncio.run(main())


def test_who_asks_and_does_not_read_is_closed(tmp_path: Path) -> None:
    async def body() -> None:
        async with bench(tmp_path, protocol="rfc2217", buffer_kib=16) as b:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, ("127.0.0.1", b.port))
            await b.until(lambda: b.console.seats)
            most = 0
            with contextlib.suppress(ConnectionError):
                for _ in range(200):
                    await loop.sock_sendall(sock, b"\xff\xf6" * 1000)  # "Are you there?"
                    most = max([most, *(seat.sink.unread() for seat in b.console.seats)])
                    await asyncio.sleep(0)
            await b.until(lambda: not b.console.seats)
            assert most < (16 + 64 + 512) * 1024
            sock.close()

    asyncio.run(body())


def test_a_client_may_pause_us_and_gets_what_came_meanwhile(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path, 2) as (b, (one, two)):
            one.ask(Command.FLOWCONTROL_SUSPEND)
            await b.until(lambda: any(seat.muted for seat in b.console.seats))
            await b.say(b"while it waits\xff")
            await b.until(lambda: two.data == b"while it waits\xff")
            assert one.data == b""
            one.ask(Command.FLOWCONTROL_RESUME)
            await b.until(lambda: one.data == b"while it waits\xff")

    asyncio.run(main())


class Lines:
    """Stands between the target and its UART: what a pty does not have."""

    def __init__(self, b: Bench) -> None:
        self.inputs: frozenset[str] = frozenset()
        self.moved: list[str] = []
        self.errors = Counters(0, 0, 0, 0, 0, 0, 0)
        uart = b.target._uart
        assert uart is not None
        uart.modem = lambda: self.inputs  # type: ignore[method-assign]
        uart.counters = lambda: self.errors  # type: ignore[method-assign]
        uart.set_break = lambda active: self.moved.append(f"break {active}")  # type: ignore[method-assign]

        def set_modem(dtr: bool | None = None, rts: bool | None = None) -> None:
            self.moved.extend(f"{name} {state}" for name, state in (("dtr", dtr), ("rts", rts)) if state is not None)

        uart.set_modem = set_modem  # type: ignore[method-assign]
        # What was counted before the console had the port is not its own.
        b.console._last_counters = self.errors


def test_lines_break_and_errors_with_a_port_that_has_them(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path) as (b, (peer,)):
            lines = Lines(b)
            lines.inputs = frozenset({"cts", "dsr"})
            assert await peer.answer(Command.NOTIFY_MODEMSTATE) == b"\x33"
            lines.inputs = frozenset({"dsr"})
            assert await peer.answer(Command.NOTIFY_MODEMSTATE) == b"\x21"
            peer.ask(Command.NOTIFY_MODEMSTATE)
            assert await peer.answer(Command.NOTIFY_MODEMSTATE) == b"\x20"
            peer.ask(Command.SET_LINESTATE_MASK, b"\x1e")
            assert await peer.answer(Command.SET_LINESTATE_MASK) == b"\x1e"
            lines.errors = Counters(rx=9, tx=0, frame=1, overrun=0, parity=2, brk=0, buf_overrun=1)
            assert await peer.answer(Command.NOTIFY_LINESTATE) == b"\x0e"
            lines.errors = Counters(rx=9, tx=0, frame=1, overrun=0, parity=2, brk=1, buf_overrun=1)
            assert await peer.answer(Command.NOTIFY_LINESTATE) == b"\x10"
            errors = b.console.figures().errors
            assert (errors.frame, errors.parity, errors.brk, errors.buf_overrun) == (1, 2, 1, 1)
            for control in (Control.DTR_ON, Control.DTR_OFF, Control.BREAK_ON):
                peer.ask(Command.SET_CONTROL, bytes((control,)))
                assert await peer.answer(Command.SET_CONTROL) == bytes((control,))
            assert lines.moved == ["dtr False", "break True"], "DTR is on already when a port was opened"
            lines.moved.clear()
            await peer.client.close()
            await b.until(lambda: not b.console.seats)
            assert lines.moved == ["break False", "dtr True", "rts True"], "everything as it was"

    asyncio.run(main())


@pytest.mark.parametrize(("signals", "moved"), [("unwired", ["rts False"]), ("none", []), ("all", ["dtr False", "rts False"])])
def test_lines_of_the_target_are_not_at_a_clients_mercy(tmp_path: Path, signals: str, moved: list[str]) -> None:
    """DTR drives NRST here. Every request is acknowledged, or no client could connect; what moves is configured."""

    async def main() -> None:
        # Ready-made: a pty refuses DTR, so the target would not come up with these lines.
        async with peers(tmp_path, signals=signals) as (b, (peer,)):
            lines = Lines(b)
            b.target.wired_signals = lambda: frozenset({"dtr"})  # type: ignore[method-assign]
            for control in (Control.DTR_OFF, Control.RTS_OFF):
                peer.ask(Command.SET_CONTROL, bytes((control,)))
                assert await peer.answer(Command.SET_CONTROL) == bytes((control,))
            assert lines.moved == moved

    asyncio.run(main())


def test_which_signals_are_wired_is_read_from_the_configuration() -> None:
    lines = config.Lines(kind="modem", nrst="!rts", boot0="dtr")
    assert Target("t", config.Target(port="/dev/x", lines=lines)).wired_signals() == {"dtr", "rts"}
    lines = config.Lines(kind="modem", nrst="rts", boot0="by-hand")
    assert Target("t", config.Target(port="/dev/x", lines=lines)).wired_signals() == {"rts"}
    lines = config.Lines(kind="gpio", nrst="GPIO17")
    assert Target("t", config.Target(port="/dev/x", lines=lines)).wired_signals() == frozenset()


def test_a_job_is_told_out_of_band(tmp_path: Path) -> None:
    """Suspend and a signature with the reason; nothing among the data; resume when the port is back."""

    async def main() -> None:
        async with peers(tmp_path) as (b, (peer,)):
            b.target.leases.begin_job("1f2e")
            await b.target._set("busy", "job 1f2e")
            assert await peer.answer(Command.SIGNATURE) == b"bridged: job 1f2e has the port"
            assert await peer.answer(Command.FLOWCONTROL_SUSPEND) == b""
            b.target.leases.end_job()
            await b.target._set("idle", "")
            assert await peer.answer(Command.SIGNATURE) == b"bridged: job 1f2e has given the port back"
            assert await peer.answer(Command.FLOWCONTROL_RESUME) == b""
            await b.say(b"after")
            await b.until(lambda: peer.data == b"after")

    asyncio.run(main())


def test_a_plain_telnet_client_types_and_reads(tmp_path: Path) -> None:
    """Without BINARY its return key is CR NUL, and it needs one after a CR of ours."""

    async def main() -> None:
        async with asyncio.timeout(30), bench(tmp_path, protocol="rfc2217") as b:
            client = await b.connect()
            offered = await client.take(15)
            assert offered == bytes.fromhex("fffb01 fffb03 fffb00 fffd00 fffd2c")
            client.say(bytes.fromhex("fffd01 fffd03 fffe00 fffc00 fffc2c") + b"help\r\0")
            assert await b.hear(5) == b"help\r"
            await b.say(b"a\rb\r\n\xff")
            assert await client.take(8) == b"a\r\0b\r\n\xff\xff"

    asyncio.run(main())
