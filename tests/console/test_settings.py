"""What console clients do to the port beside bytes (format, flow control, break, DTR, RTS), and what a job leaves of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path

import pytest

from bridged import config
from bridged.errors import BaudUnavailable
from bridged.protocol.rfc2217 import Command, Control
from tests.console.test_rfc2217 import Lines, peers


@pytest.mark.parametrize(
    "lines",
    [
        config.Lines(kind="modem", nrst="rts", boot0="!dtr"),
        config.Lines(kind="modem", nrst="dtr", boot0="!rts"),
        config.Lines(kind="modem", nrst="dtr", safe="cts"),
    ],
)
def test_flow_control_does_not_hand_a_line_of_the_target_to_the_driver(tmp_path: Path, lines: config.Lines) -> None:
    async def main() -> None:
        async with peers(tmp_path) as (b, (peer,)):
            b.target.config = replace(b.target.config, lines=lines)
            peer.ask(Command.SET_CONTROL, bytes((Control.FLOW_RTS,)))
            assert b"is a line of the target" in await peer.answer(Command.SIGNATURE)
            assert await peer.answer(Command.SET_CONTROL) == bytes((Control.FLOW_NONE,))
            assert b.target.frame.flow == ""
            peer.ask(Command.SET_CONTROL, bytes((Control.FLOW_XON,)))
            assert await peer.answer(Command.SET_CONTROL) == bytes((Control.FLOW_XON,))

    asyncio.run(main())


def test_the_port_has_the_format_that_the_console_tells_after_a_session_that_ended_in_the_loader(tmp_path: Path) -> None:
    """RESET with mode=boot leaves the loader's rate on the port."""

    async def main() -> None:
        async with peers(tmp_path) as (b, (peer,)):
            uart = b.target._uart
            assert uart is not None
            await b.target._set("busy", "job 1f2e")
            uart.set_format(57600, "E")
            b.target._give_back()
            await b.target._set("idle", "")
            assert uart.describe()["baud"] == 115200
            peer.ask(Command.SET_BAUDRATE, bytes(4))
            assert int.from_bytes(await peer.answer(Command.SET_BAUDRATE), "big") == 115200

    asyncio.run(main())


def test_a_format_of_a_job_s_time_that_cannot_be_set_afterwards_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path) as (b, (peer,)):
            uart = b.target._uart
            assert uart is not None
            real = uart.set_format

            def picky(baud: int, parity: str, stop_bits: int = 1, data_bits: int = 8, flow: str = "") -> None:
                real(baud, parity, stop_bits, data_bits, flow)  # It is half done by then.
                if baud == 12345:
                    raise BaudUnavailable("the driver made 12000 of it")

            uart.set_format = picky  # type: ignore[method-assign]
            await b.target._set("busy", "job 1f2e")
            peer.ask(Command.SET_BAUDRATE, (12345).to_bytes(4, "big"))
            assert int.from_bytes(await peer.answer(Command.SET_BAUDRATE), "big") == 12345
            b.target._give_back()
            await b.target._set("idle", "")
            while b"as configured again: the driver made" not in await peer.answer(Command.SIGNATURE):
                pass
            assert (b.target.frame.baud, uart.describe()["baud"]) == (115200, 115200)
            peer.ask(Command.SET_BAUDRATE, bytes(4))
            assert int.from_bytes(await peer.answer(Command.SET_BAUDRATE), "big") == 115200

    asyncio.run(main())


def test_a_break_ends_with_the_turn_of_its_writer(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path, 2) as (b, (one, two)):
            lines = Lines(b)
            one.ask(Command.SET_CONTROL, bytes((Control.BREAK_ON,)))
            await one.answer(Command.SET_CONTROL)
            first, second = b.console.seats
            second.claim(take=True)
            assert lines.moved == ["break True", "break False"], "else TX stays low, and what the new one writes is lost"
            lines.moved.clear()
            two.client.say(b"reboot\n")
            assert await b.hear(7) == b"reboot\n"
            one.ask(Command.SET_CONTROL, bytes((Control.BREAK_OFF,)))
            assert await one.answer(Command.SET_CONTROL) == bytes((Control.BREAK_OFF,))
            second.set_break(True)
            first.set_break(False)  # As at the end of a pulse, in a callback where nobody could catch anything.
            assert lines.moved == ["break True"], "a break of another is not ended"
            second.set_break(False)

    asyncio.run(main())


@pytest.mark.parametrize("wired", [frozenset[str](), frozenset({"rts"})])
def test_what_is_asked_of_dtr_and_rts_during_a_job_is_done_after_it(tmp_path: Path, wired: frozenset[str]) -> None:
    async def main() -> None:
        async with peers(tmp_path, 2, signals="all") as (b, (one, two)):
            lines = Lines(b)
            b.target.wired_signals = lambda: wired  # type: ignore[method-assign]

            async def ask(control: Control) -> None:
                one.ask(Command.SET_CONTROL, bytes((control,)))
                assert await one.answer(Command.SET_CONTROL) == bytes((control,))

            async def job(act: Awaitable[None]) -> list[str]:
                await b.target._set("busy", "job 1f2e")
                lines.moved.clear()
                await act
                assert lines.moved == [], "nobody moves anything during a job"
                b.target._give_back()
                await b.target._set("idle", "")
                return lines.moved

            async def leave() -> None:
                await one.client.close()
                await b.until(lambda: len(b.console.seats) == 1)

            assert await job(asyncio.sleep(0)) == []
            await ask(Control.DTR_OFF)
            assert lines.moved == ["dtr False"]
            moved = await job(ask(Control.RTS_OFF))
            assert moved == (["dtr False"] if wired else ["dtr False", "rts False"]), "a line of the target stays idle"
            assert (b.target.asserted("dtr"), b.target.asserted("rts")) == (False, bool(wired))
            assert await job(leave()) == (["dtr True"] if wired else ["dtr True", "rts True"])
            assert b.target.asserted("dtr")
            two.ask(Command.SET_CONTROL, bytes((Control.DTR_OFF,)))
            assert await two.answer(Command.SET_CONTROL) == bytes((Control.DTR_OFF,))
            assert lines.moved[-1] == "dtr False", "it is not taken to be so already"

    asyncio.run(main())
