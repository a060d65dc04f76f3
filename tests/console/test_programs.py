"""Other people's programs at our console: nc, telnet, socat, and stm32flash through a pty that socat makes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from bridged import chips, config
from bridged.api.entrance import Entrance
from bridged.config.values import Listen
from bridged.console.room import Console
from bridged.console.server import Listeners, Telnet
from bridged.protocol.telnet import ECHO
from bridged.sim.device import Device, Mode
from bridged.sim.loader import Timing
from bridged.sim.pty import PtyDevice
from bridged.target.owner import Target
from tests.console.rig import Bench, admit_everybody, bench
from tests.support import require_tool
from tests.target.bench import make_image


def play(root: Path, act: Callable[[Bench], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), bench(root, **settings) as found:
            await act(found)

    asyncio.run(main())


async def answer(b: Bench, expected: bytes, answered: bytes) -> None:
    """As the target: wait for a line, say another."""
    assert await b.hear(len(expected), 20) == expected
    await b.say(answered)


def test_nc_asks_and_gets_an_answer(tmp_path: Path) -> None:
    require_tool("nc", "netcat-openbsd")

    async def act(b: Bench) -> None:
        nc = await asyncio.create_subprocess_exec(
            *("nc", "-N", "127.0.0.1", str(b.port)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        said, _ = (await asyncio.gather(nc.communicate(b"version\n"), answer(b, b"version\n", b"1.2.3\r\n")))[0]
        assert said == b"1.2.3\r\n"
        assert nc.returncode == 0

    play(tmp_path, act)


def test_telnet_talks_a_character_at_a_time_without_local_echo(tmp_path: Path) -> None:
    require_tool("telnet", "telnet")
    require_tool("socat", "socat")

    async def act(b: Bench) -> None:
        # telnet wants a terminal; socat gives it one.
        telnet = await asyncio.create_subprocess_exec(
            *("socat", "-", f"EXEC:telnet 127.0.0.1 {b.port},pty,setsid,ctty,stderr"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert telnet.stdin is not None
        assert telnet.stdout is not None
        async with asyncio.timeout(20):
            await telnet.stdout.readuntil(b"Escape character is")
            await telnet.stdout.readuntil(b"\n")
            await b.until(lambda: b.console.seats)
            wire = b.console.seats[0].sink
            assert isinstance(wire, Telnet)
            await b.until(lambda: wire._options.we_do(ECHO))
            await asyncio.sleep(0.2)  # It agrees first, and changes the mode of its terminal then.
            telnet.stdin.write(b"x")
            assert await b.hear(1) == b"x", "without a line end"
            telnet.stdin.write(b"\r")
            assert await b.hear(1) == b"\r"
            await b.say(b"and \xff back\r\n")
            assert await telnet.stdout.readuntil(b"back\r\n") == b"and \xff back\r\n", "and no echo before it"
        telnet.stdin.write(b"\x1d")
        telnet.stdin.write(b"quit\n")
        telnet.stdin.close()
        await b.until(lambda: not b.console.seats, 10)
        await telnet.wait()

    play(tmp_path, act, protocol="rfc2217", replay_kib=0)


def test_socat_makes_a_serial_device_of_the_unix_socket(tmp_path: Path) -> None:
    require_tool("socat", "socat")

    async def act(b: Bench) -> None:
        from bridged.api.unix import bind_unix

        await b.listeners.listen_unix(tmp_path / "console", bind_unix)
        assert (tmp_path / "console").stat().st_mode & 0o777 == 0o660
        link = tmp_path / "pty"
        socat = subprocess.Popen(["socat", f"pty,link={link},raw,echo=0", f"unix-connect:{tmp_path}/console"])
        try:
            await b.until(lambda: link.exists() and b.console.seats)
            port = os.open(link, os.O_RDWR | os.O_NOCTTY)
            every = bytes(range(256))
            os.write(port, every)
            assert await b.hear(256) == every
            await b.say(every)
            await b.until(lambda: b.console.bytes_in == 256)
            got = b""
            while len(got) < 256:
                got += await asyncio.to_thread(os.read, port, 256)
            assert got == every
            os.close(port)
        finally:
            socat.send_signal(signal.SIGTERM)
            socat.wait(10)

    play(tmp_path, act, replay_kib=0)


@pytest.mark.parametrize("chip", ["F756"])
def test_stm32flash_flashes_through_the_console(tmp_path: Path, chip: str) -> None:
    """The loader runs; the console passes every byte in time for a host that is strict about it.

    Even parity is the console's matter (``application.parity``); a pty has none, and stm32flash insists on what it sets.
    """
    require_tool("socat", "socat")
    stm32flash = require_tool("stm32flash", "stm32flash")
    image = make_image(chips.find(chip), 8 * 1024)
    file = tmp_path / "image.bin"
    file.write_bytes(image.segments[0].data)
    device = Device(chips.find(chip), powered=False, timing=Timing(sector_erase_s=0.05, spread=0, startup_s=0.01))

    async def main() -> None:
        settings = config.Target(
            port=str(tmp_path / "tty"),
            application=config.Application(baud=57600, parity="E"),
            console=config.Console(replay_kib=0, notices="off"),
        )
        target = Target("bench", settings)
        room = Console(target, settings.console)
        target.listener = room
        listeners = Listeners(room, admit_everybody, Entrance("A console"))
        await target.open()
        assert await target.wait_idle_hardware(5), target.reason
        port = await listeners.listen_tcp(Listen("127.0.0.1", 0))
        link = tmp_path / "pty"
        socat = subprocess.Popen(["socat", f"pty,link={link},raw,echo=0", f"tcp:127.0.0.1:{port}"])
        try:
            async with asyncio.timeout(60):
                # stm32flash says 0x7F once: it is to find a loader that has started (10 ms) and a way to it.
                while not (link.exists() and room.seats and device.mode is Mode.MEASURING):
                    await asyncio.sleep(0.01)
                flash = await asyncio.create_subprocess_exec(
                    *(stm32flash, "-b", "57600", "-m", "8n1", "-w", str(file), "-v", "-S", "0x08000000", str(link)),
                    stdout=subprocess.PIPE,
                )
                said, _ = await flash.communicate()
            assert flash.returncode == 0, said.decode()
        finally:
            socat.terminate()
            socat.wait(10)
            await listeners.close()
            await room.close()
            await target.close()

    with PtyDevice(device, link=tmp_path / "tty", paced=True, boot_loader=True) as sim:
        asyncio.run(main())
        assert sim.device.memory.read(image.segments[0].address, 8 * 1024) == image.segments[0].data
