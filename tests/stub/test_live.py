"""A real session process and the real binary, in real time: a stop while sectors are erased and data stream.

The part is a pty; behind it the simulated ROM loader, and after Go the emulated core. Everything else about the second-stage
loader is tested in virtual time; what only processes can show is that the control socket is heard in the middle of a stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bridged import config, errors
from bridged.events import Event, SectorErased
from bridged.sim.device import Mode
from bridged.sim.pty import PtyDevice
from bridged.sim.wire import Burst, Format
from bridged.target.owner import Target
from tests.stub.whole import Whole
from tests.target.bench import make_image

LOOK_NS = 1_000_000  # The emulated core is never done: it is looked at again after so long.


class Live(Whole):
    """What ``PtyDevice`` asks beyond ``Whole``."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.resets_in_erase = 0
        self.port: PtyDevice | None = None

    @contextmanager
    def _time_stands_still(self) -> Iterator[None]:
        """The core is emulated slower than it would run; what that takes must not look like pauses on the line."""
        before = time.monotonic_ns()
        yield
        if self.port is not None:
            self.port._base_ns += time.monotonic_ns() - before

    def feed(self, data: bytes, start_ns: int, form: Format) -> None:
        with self._time_stands_still():
            super().feed(data, max(start_ns, self.now_ns), form)

    def output_end_ns(self) -> int | None:
        output: Any = self.machine.output if self.machine is not None else None
        return self.rom.output_end_ns() if output is None else output[-1].end_ns if output else None

    def next_ns(self) -> int | None:
        return self.rom.next_ns() if self.machine is None else self.machine.now_ns + LOOK_NS

    def collect(self, until_ns: int, receiver: Any = None) -> list[Burst]:
        with self._time_stands_still():
            return super().collect(max(until_ns, self.now_ns), receiver)

    def set_lines(self, at_ns: int, *, nrst: bool | None = None, boot0: bool | None = None, power: bool | None = None) -> None:
        at_ns = max(at_ns, self.now_ns)
        if self.machine is not None and nrst is False:
            self.machine.advance(at_ns)
            self.resets_in_erase += self.machine.flash.erasing
        super().set_lines(at_ns, nrst=nrst, boot0=boot0, power=power)


def test_a_stop_ends_a_stream_behind_the_erase_that_is_under_way(tmp_path: Path) -> None:
    part = Live("F407")
    part.rom.memory.load_flash(b"Z" * 0x40000)
    image = make_image(part.chip, 150_000)
    lines = config.Lines(kind="socket", socket=str(tmp_path / "lines"), nrst="nrst", boot0="boot0")
    settings = config.Target(
        port=str(tmp_path / "tty"),
        chip="F407",
        startup_s=0.03,
        baud=115200,
        lines=lines,
        application=config.Application(listen_s=0.3),
        stub="auto",
        supply_v=3.3,
    )
    erased: list[SectorErased] = []
    hazards: list[float] = []

    async def stop_while_it_erases(target: Target, port: PtyDevice) -> None:
        """Not the first sector, which nothing may follow yet."""
        while True:
            with port.lock:
                if erased and part.machine is not None and part.machine.flash.erasing:
                    return target.stop()
            await asyncio.sleep(0.01)

    async def run(target: Target, port: PtyDevice) -> None:
        async def barrier(_state: str, hazard_s: float, _kept: bytes) -> None:
            hazards.append(hazard_s)

        def told(event: Event) -> None:
            if isinstance(event, SectorErased):
                erased.append(event)

        await target.open()
        try:
            assert await target.wait_idle_hardware(5), target.reason
            stopper = asyncio.create_task(stop_while_it_erases(target, port))
            async with asyncio.timeout(60):
                params = {"outside": "discard"}
                with pytest.raises(errors.Stopped):
                    await target.run("flash", params, image, job_id="job-1", on_event=told, on_barrier=barrier)
                await stopper
            assert (target.state, target.session_pid) == ("idle", None)
        finally:
            await target.close()

    with PtyDevice(part, link=tmp_path / "tty", lines_path=tmp_path / "lines", paced=False) as port:  # type: ignore[arg-type]
        part.port = port
        asyncio.run(run(Target("bench", settings), port))
        with port.lock:
            part.rom.advance(part.rom.now_ns + 1_000_000_000)
            assert part.machine is None, "the target was reset"
            assert part.rom.mode is not Mode.LOADER
    assert part.starts == 1
    assert part.resets_in_erase == 0
    assert part.violations == []
    assert 2 <= part.erases < 6, "of the six sectors that the image needs"
    assert hazards[0] > 0
