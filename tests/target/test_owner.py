"""The owner and real session processes, on a pty that is paced like a UART: hand-over, cancel, stop, SIGKILL, deadline.

It is one file because all of it goes through one rig.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from bridged import chips, config, errors
from bridged.events import Event, Phase, PhaseStarted, Planned, SectorErased, Synced, Warned, encode
from bridged.images.model import Image
from bridged.protocol import trace
from bridged.protocol.flow import SetLines
from bridged.sim.device import Device, Mode
from bridged.sim.loader import Timing
from bridged.sim.pty import PtyDevice
from bridged.target import owner, process
from bridged.target.lines_open import open_lines
from bridged.target.owner import Target
from bridged.target.request import Request
from bridged.target.uart import Uart
from tests.target.bench import make_image

# Much longer than an L476 needs: long enough to be killed in, short enough for a test.
ERASE_S = 0.2
# For who does something within a phase: as fast as a wire, and slow enough to answer that on a busy machine the phase is not
# over before the test hears of it.
SLOWLY: dict[str, Any] = {
    "paced": True,
    "timing": Timing(sector_erase_s=ERASE_S, spread=0, startup_s=0.01, reply_s=0.01, sync_reply_s=0.1),
}


@dataclass
class Rig:
    """A target and the simulated part behind it."""

    target: Target
    port: PtyDevice
    events: list[Event] = field(default_factory=list)
    barriers: list[tuple[str, float]] = field(default_factory=list)

    @property
    def device(self) -> Device:
        return self.port.device

    def holds(self, image: Image) -> bool:
        with self.port.lock:
            return all(self.device.memory.read(s.address, len(s.data)) == s.data for s in image.segments)

    def mode(self) -> Mode:
        with self.port.lock:
            return self.device.mode

    async def run(
        self, kind: str, image: Image | None = None, *, on: Callable[[Event], None] = lambda _event: None, **params: Any
    ) -> dict[str, Any]:
        async def barrier(state: str, hazard_s: float, _kept: bytes) -> None:
            self.barriers.append((state, hazard_s))

        def event(told: Event) -> None:
            self.events.append(told)
            on(told)

        return await self.target.run(kind, params, image, job_id="job-1", on_event=event, on_barrier=barrier)


@contextmanager
def simulated(tmp_path: Path, chip: str = "L476", paced: bool = False, **settings: Any) -> Iterator[Rig]:
    settings.setdefault("timing", Timing(sector_erase_s=ERASE_S, spread=0, startup_s=0.01))
    device = Device(chips.find(chip), powered=False, **settings)
    with PtyDevice(device, link=tmp_path / "tty", lines_path=tmp_path / "lines", paced=paced) as port:
        wired = config.Lines(kind="socket", socket=str(tmp_path / "lines"), nrst="nrst", boot0="boot0")
        application = config.Application(listen_s=0.3)
        settings_ = config.Target(
            port=str(tmp_path / "tty"), chip=chip, startup_s=0.03, baud=115200, lines=wired, application=application
        )
        yield Rig(Target("bench", settings_), port)


def play(tmp_path: Path, act: Callable[[Rig], Awaitable[None]], chip: str = "L476", **settings: Any) -> Rig:
    """Run ``act`` with an open target; afterwards no session process is left."""
    with simulated(tmp_path, chip, **settings) as rig:

        async def main() -> None:
            await rig.target.open()
            assert await rig.target.wait_idle_hardware(5), rig.target.reason
            try:
                async with asyncio.timeout(60):
                    await act(rig)
                assert rig.target.session_pid is None
                assert rig.target.leases.job is None
            finally:
                await rig.target.close()

        asyncio.run(main())
    return rig


def test_flash_through_a_session_process(tmp_path: Path) -> None:
    image = make_image(chips.find("L476"), 10_000)

    async def act(rig: Rig) -> None:
        result = await rig.run("flash", image, outside="discard")
        assert (result["evidence"], result["changed"], result["content"]) == ("full", True, image.digest)
        assert result["banner"] == "bench application"
        assert rig.barriers[0][0] == "erasing"
        assert rig.barriers[0][1] >= 2 * ERASE_S
        assert rig.target.state == "idle"
        assert "> 7F" in rig.target.last_trace
        assert "= 0x08000100 256" in rig.target.last_trace, "image content is a reference in the recorder"

    rig = play(tmp_path, act)
    assert rig.holds(image)
    assert rig.device.stats.overruns == 0
    assert rig.device.stats.hazard_resets == []


def test_a_target_that_does_not_say_that_it_may_be_stopped_is_left_alone(tmp_path: Path) -> None:
    image = make_image(chips.find("L476"), 3000)

    async def act(rig: Rig) -> None:
        lines = replace(rig.target.config.lines, safe="safe", alive="alive")
        asking = config.Application(interlock=config.Talk(within_s=0.3), health=config.Talk(within_s=5))
        rig.target.config = replace(rig.target.config, lines=lines, application=asking)
        assert rig.target._uart is not None
        rig.target._lines = open_lines(lines, rig.target._uart, "bench")
        with pytest.raises(errors.NotSafeToStop, match="line safe did not become active"):
            await rig.run("flash", image, outside="discard")
        assert not rig.device.stats.resets
        assert (await rig.run("flash", image, outside="discard", force="interlock"))["health"] == "passed"
        assert (await rig.run("verify", image))["health"] == "passed"
        assert "line safe is active" in rig.target.last_trace

    play(tmp_path, act)


def test_where_the_second_stage_loader_does_not_greet_the_job_goes_on(tmp_path: Path) -> None:
    """``bridged sim`` runs no code in RAM, as a part whose row is wrong would not."""
    image = make_image(chips.find("L476"), 6000)

    async def act(rig: Rig) -> None:
        rig.target.config = replace(rig.target.config, stub="auto")
        result = await rig.run("flash", image, outside="discard")
        assert (result["evidence"], result["proof"], result["boot"]) == ("full", "read-back", "reset")
        assert "did not greet within 1 s" in result["second_stage"]
        assert "SECOND_STAGE_FAILED" in {e.code for e in rig.events if isinstance(e, Warned)}
        assert trace.decode(rig.target.last_trace).ended

    rig = play(tmp_path, act)
    assert rig.holds(image)
    assert rig.device.stats.hazard_resets == []


def test_read_brings_its_bytes(tmp_path: Path) -> None:
    async def act(rig: Rig) -> None:
        result = await rig.run("read", address=0x08000000, length=1000)
        assert result["data"] == b"\xff" * 1000

    play(tmp_path, act)


def when(phase: Phase, do: Callable[[], None]) -> Callable[[Event], None]:
    """Do something once, when ``phase`` starts."""
    done = False

    def on(event: Event) -> None:
        nonlocal done
        if isinstance(event, PhaseStarted) and event.phase is phase and not done:
            done = True
            do()

    return on


@pytest.mark.parametrize(("ask", "error"), [("cancel", errors.Canceled), ("stop", errors.Stopped)])
def test_cancel_and_stop_finish_the_command_and_release(tmp_path: Path, ask: str, error: type[Exception]) -> None:
    image = make_image(chips.find("L476"), 10_000)

    async def act(rig: Rig) -> None:
        with pytest.raises(error):
            await rig.run("flash", image, on=when(Phase.ERASE, getattr(rig.target, ask)), outside="discard")
        assert rig.target.state == "idle"

    rig = play(tmp_path, act, **SLOWLY)
    assert rig.device.stats.hazard_resets == []
    assert sum(rig.device.stats.erases.values()) < 5
    assert not rig.device.lines["boot0"]


@pytest.mark.parametrize("phase", [Phase.SYNC, Phase.IDENTIFY, Phase.ERASE, Phase.WRITE, Phase.VERIFY, Phase.BOOT])
def test_sigkill_of_the_session_at_every_phase(tmp_path: Path, phase: Phase) -> None:
    """The daemon waits the hazard out, releases the target and says so; the next job works."""
    image = make_image(chips.find("L476"), 3_000)

    async def act(rig: Rig) -> None:
        def kill() -> None:
            pid = rig.target.session_pid
            assert pid is not None
            # A little later, so that the erase command is really on its way.
            asyncio.get_running_loop().call_later(0.1 if phase is Phase.ERASE else 0, os.kill, pid, signal.SIGKILL)

        begun = time.monotonic()
        with pytest.raises(errors.SessionDied, match="signal 9"):
            await rig.run("flash", image, on=when(phase, kill), outside="discard")
        if phase is Phase.ERASE:
            assert time.monotonic() - begun >= ERASE_S
        assert rig.target.state == "idle"
        assert not rig.device.lines["boot0"]
        assert rig.device.stats.hazard_resets == []
        result = await rig.run("flash", image, outside="discard")
        assert result["evidence"] == "full"
        # A bound that a session with an event loop or OpenSSL would not keep.
        assert 0 < result["cost"]["cpu_s"] < 30
        assert 8_000 < result["cost"]["memory_kib"] < 20_000

    rig = play(tmp_path, act, **SLOWLY)
    assert rig.holds(image)


def test_a_session_past_its_deadline_is_ended_and_the_target_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "enter_limit_s", lambda _request: 0.5)

    async def act(rig: Rig) -> None:
        with pytest.raises(errors.DeadlineExceeded):
            await rig.run("identify")
        assert rig.target.state == "idle"
        assert not rig.device.lines["boot0"]

    play(tmp_path, act, timing=Timing(startup_s=60))


def test_a_lower_rate_gives_what_is_left_as_much_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    nothing: Any = None
    session = process.Session(nothing, nothing, Request("flash"), lambda _event: None, nothing, nothing, nothing)

    def say(event: Event) -> None:
        session._take(json.dumps(encode(event)).encode())

    say(Synced(921600, 1, ""))
    say(Planned(1, 2048, 2048, 0, 10.0, 100.0))
    assert session._deadline == 1100.0
    now = 1040.0
    say(Synced(921600, 1, ""))
    assert session._deadline == 1100.0
    say(Synced(230400, 1, ""))
    assert (session._deadline, session.limit_s) == (1040.0 + 4 * 60, 280.0)
    say(Synced(230400, 1, ""))
    say(Synced(921600, 1, ""))
    assert session._deadline == 1280.0, "never shorter, and never twice for the same"
    session.close()


def test_lines_that_fail_mark_the_target_broken(tmp_path: Path) -> None:
    async def act(rig: Rig) -> None:
        with pytest.MonkeyPatch.context() as patch:

            def stick() -> None:
                patch.setattr(rig.port, "_command", lambda _line: b"error stuck")

            with pytest.raises(errors.LineUnavailable, match="stuck"):
                await rig.run("identify", on=when(Phase.IDENTIFY, stick))
        assert rig.target.state == "broken"
        with pytest.raises(errors.TargetBroken):
            await rig.run("identify")
        rig.target.clear()
        assert await rig.target.wait_idle_hardware(5)
        assert (await rig.run("identify"))["pid"] == 0x415

    play(tmp_path, act, **SLOWLY)


def test_lines_that_vanish_are_waited_for_and_the_release_is_owed(tmp_path: Path) -> None:
    """A line box that is started anew, or a GPIO chip on an adapter of its own: the port is still there."""

    async def act(rig: Rig) -> None:
        def unplug() -> None:
            for connection, _ in list(rig.port._connections.values()):
                connection.shutdown(2)

        with pytest.raises(errors.PortGone, match="closed the connection"):
            await rig.run("identify", on=when(Phase.IDENTIFY, unplug))
        assert rig.target.state == "absent"
        assert "closed the connection" in rig.target.reason
        assert rig.target.unreleased
        assert await rig.target.wait_idle_hardware(5)
        await rig.target.release_after(0)
        assert not rig.target.unreleased
        assert (await rig.run("identify"))["pid"] == 0x415

    play(tmp_path, act, **SLOWLY)


def test_a_port_that_is_gone_leaves_no_line_as_its_session_left_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session tries to release it, too: this is the second net."""

    async def act(rig: Rig) -> None:
        class Dying(process.Session):
            async def run(self, image: Image | None, kept: bytes) -> None:
                assert (image, kept) == (None, b"")
                rig.target._lines.set(boot0=True, reset=True)  # type: ignore[union-attr]
                (tmp_path / "tty").unlink()
                self.board.set_result({"error": errors.PortGone("unplugged").as_dict()})

        def dying(*rest: Any) -> process.Session:
            given: tuple[Any, ...] = (rig.target._uart, rig.target._lines, *rest, rig.target._heard)
            return Dying(*given)

        let_go, left = rig.target._let_go, []

        def look() -> None:  # This line box lets go of its lines when its client closes; others do not.
            left.append((rig.device.lines["nrst"], rig.device.lines["boot0"]))
            let_go()

        monkeypatch.setattr(rig.target, "_new_session", dying)
        monkeypatch.setattr(rig.target, "_let_go", look)
        with pytest.raises(errors.PortGone, match="unplugged"):
            await rig.run("identify")
        assert (left, rig.target.state) == ([(True, False)], "absent")

    play(tmp_path, act)


def test_idle_lines_that_vanish_are_noticed(tmp_path: Path) -> None:
    async def act(rig: Rig) -> None:
        resets = rig.device.stats.resets
        for connection, _ in list(rig.port._connections.values()):
            connection.shutdown(2)
        async with asyncio.timeout(10):
            while rig.target.state != "absent":
                await asyncio.sleep(0.02)
        assert await rig.target.wait_idle_hardware(5)
        assert rig.device.stats.resets == resets

    play(tmp_path, act)


def test_a_port_that_takes_its_lines_along_leaves_a_debt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DTR and RTS of an adapter that was pulled: the target stays in its loader until ``release_after`` can be done."""

    def gone(_step: object) -> None:
        raise errors.PortGone("unplugged")

    async def act(rig: Rig) -> None:
        def kill() -> None:
            assert rig.target.session_pid is not None
            os.kill(rig.target.session_pid, signal.SIGKILL)

        with monkeypatch.context() as patch:
            patch.setattr(rig.target, "_move", gone)
            with pytest.raises(errors.SessionDied):
                await rig.run("identify", on=when(Phase.IDENTIFY, kill))
        assert (rig.target.unreleased, rig.target.state) == (True, "idle")
        assert rig.mode() is Mode.LOADER
        await rig.target.release_after(0)
        assert not rig.target.unreleased
        assert rig.mode() is not Mode.LOADER

    play(tmp_path, act, **SLOWLY)


def test_a_session_that_dies_in_a_power_cycle_leaves_no_target_without_power(tmp_path: Path) -> None:
    async def act(rig: Rig) -> None:
        assert rig.target._uart is not None
        wired = replace(rig.target.config.lines, power="power")
        rig.target.config = replace(rig.target.config, lines=wired)
        lines = rig.target._lines = open_lines(wired, rig.target._uart, "bench")

        def kill() -> None:
            assert rig.target.session_pid is not None
            os.kill(rig.target.session_pid, signal.SIGKILL)
            lines.set(power=False)  # Not before: two at once would take each other's answers off the line box.

        with pytest.raises(errors.SessionDied):
            await rig.run("identify", on=when(Phase.IDENTIFY, kill))
        assert rig.target.state == "idle"
        assert rig.device.lines["power"]
        assert (await rig.run("identify"))["uid"]

    play(tmp_path, act, **SLOWLY)


def test_a_part_that_was_empty_is_started_after_a_crash_although_a_reset_does_not_start_it(tmp_path: Path) -> None:
    image = make_image(chips.find("G071"), 3000)

    async def act(rig: Rig) -> None:
        with rig.port.lock:
            for segment in image.segments:  # All is written and proven, and the power was never cycled.
                rig.device.memory.program(segment.address, segment.data)
        await rig.target.release_after(0)
        async with asyncio.timeout(10):
            while rig.mode() is not Mode.MEASURING:
                await asyncio.sleep(0.02)
        await rig.target.release_after(0, "G071")
        assert (rig.mode(), rig.target.state) == (Mode.APPLICATION, "idle")
        with rig.port.lock:
            rig.device.faults.add("nack:0x21:0:opcode:*")
        await rig.target.release_after(0, "G071")
        assert rig.target.state == "idle", "lines are idle: that it was not started breaks nothing"

    play(tmp_path, act, "G071", options={"nBOOT_SEL": 0})


def test_after_a_crash_nobody_resets_a_target_whose_erased_application_alone_led_into_the_loader(tmp_path: Path) -> None:
    async def act(rig: Rig) -> None:
        settings = rig.target.config
        rig.target._detach()
        rig.target._let_go()
        application = replace(settings.application, enter="bootloader\n")
        rig.target.config = replace(settings, application=application, lines=replace(settings.lines, boot0=""))
        rig.target._take()
        resets = rig.device.stats.resets
        await rig.target.release_after(0, erased=True)
        assert rig.device.stats.resets == resets
        await rig.target.release_after(0)
        assert rig.device.stats.resets == resets + 1
        assert rig.device.lines["nrst"]

    play(tmp_path, act)


@pytest.mark.parametrize("error", [errors.PortGone("unplugged"), errors.PortBusy("a getty has it")])
def test_a_port_that_cannot_be_had_leaves_the_target_absent_and_is_tried_again(tmp_path: Path, error: errors.LinkError) -> None:
    async def act(rig: Rig) -> None:
        def refuse() -> None:
            raise error

        rig.target._let_go()
        rig.target._shared = True
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rig.target, "_take", refuse)
            with pytest.raises(errors.PortGone):
                await rig.target.release_after(0)
            assert rig.target.state == "absent"
        rig.target._shared = False
        assert await rig.target.wait_idle_hardware(5)
        await rig.target.release_after(0)
        assert rig.target.state == "idle"

    play(tmp_path, act)


def test_a_line_that_fails_does_not_keep_the_others_from_going_idle(tmp_path: Path) -> None:
    moved: list[SetLines] = []

    def move(step: SetLines) -> None:
        moved.append(step)
        if step.boot0 is not None:
            raise errors.LineUnavailable("its relay is gone")

    async def act(rig: Rig) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rig.target, "_move", move)
            with pytest.raises(errors.LineUnavailable, match="relay"):
                await rig.target.release_after(0)
        assert rig.target.state == "broken"
        assert [m.reset for m in moved if m.reset is not None] == [True, False]

    play(tmp_path, act)


def test_a_listener_that_fails_does_not_keep_a_target_from_being_released(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []

    async def act(rig: Rig) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context))

        def fail(event: Event) -> None:
            if rig.target.session_pid is None:
                return  # Not started yet.
            if isinstance(event, PhaseStarted) and event.phase is Phase.IDENTIFY:
                os.kill(rig.target.session_pid, signal.SIGKILL)
            raise RuntimeError("a defect of the listener")

        with pytest.raises(errors.SessionDied):
            await rig.target.run("identify", {}, None, job_id="j", on_event=fail)
        assert rig.target.state == "idle"
        assert not rig.device.lines["boot0"]
        assert told

    play(tmp_path, act, **SLOWLY)


def test_a_session_takes_no_code_from_where_the_daemon_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "select.py").write_text("raise SystemExit('not the one that was meant')")
    monkeypatch.chdir(tmp_path)

    async def act(rig: Rig) -> None:
        assert (await rig.run("identify"))["pid"] == 0x415

    play(tmp_path, act)


def test_one_session_at_a_time(tmp_path: Path) -> None:
    async def act(rig: Rig) -> None:
        first = asyncio.ensure_future(rig.run("identify"))
        await asyncio.sleep(0)
        with pytest.raises(errors.TargetBusy, match="job-1"):
            await rig.run("identify")
        assert (await first)["pid"] == 0x415

    play(tmp_path, act)


def test_without_a_journal_nothing_is_erased(tmp_path: Path) -> None:
    image = make_image(chips.find("L476"), 4000)

    async def act(rig: Rig) -> None:
        with pytest.raises(errors.BadRequest, match="journal"):
            await rig.target.run("flash", {}, image, job_id="j")

    rig = play(tmp_path, act)
    assert not rig.device.stats.erases


def test_events_survive_a_daemon_that_is_slow_to_read(tmp_path: Path) -> None:
    image = make_image(chips.find("L476"), 20_000)

    async def act(rig: Rig) -> None:
        await rig.run("flash", image, on=lambda _event: time.sleep(0.02), outside="discard")
        assert len([e for e in rig.events if isinstance(e, SectorErased)]) == 10

    assert play(tmp_path, act).holds(image)


def test_a_device_may_come_late_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "RETRY_S", 0.05)
    settings = config.Target(port=str(tmp_path / "tty"), chip="F407", lines=config.Lines())

    async def main() -> None:
        target = Target("late", settings)
        await target.open()
        assert not await target.wait_idle_hardware(0.3)
        assert "tty" in target.reason
        with pytest.raises(errors.PortGone):
            await target.run("identify", {}, None, job_id="j")
        with PtyDevice(Device(chips.find("F407"), powered=False), link=tmp_path / "tty"):
            assert await target.wait_idle_hardware(5)
        async with asyncio.timeout(5):
            while target.state != "absent":
                await asyncio.sleep(0.05)
        await target.close()

    asyncio.run(main())


def test_two_targets_that_share_a_port_take_turns(tmp_path: Path) -> None:
    with simulated(tmp_path) as rig:
        settings = replace(rig.target.config, shares=["other"])
        first, second = Target("one", settings), Target("two", settings)

        async def main() -> None:
            for target in (first, second):
                await target.open()
                assert await target.wait_idle_hardware(5), target.reason
            for target in (first, second, first):
                assert (await target.run("identify", {}, None, job_id="j"))["pid"] == 0x415
                assert target.state == "idle"
            for target in (first, second):
                await target.close()

        asyncio.run(main())


def test_a_port_that_somebody_has_locked_is_not_opened_before_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening alone raises DTR and RTS, once a second, perhaps in the middle of another program's erase."""
    monkeypatch.setattr(owner, "RETRY_S", 0.01)
    opened: list[str] = []
    real = Uart.open

    def note(path: str) -> Uart:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(Uart, "open", note)
    master, slave = os.openpty()
    fcntl.flock(slave, fcntl.LOCK_EX)

    async def main() -> None:
        target = Target("t", config.Target(port=os.ttyname(slave), lines=config.Lines()))
        await target.open()
        async with asyncio.timeout(5):
            while f"process {os.getpid()} " not in target.reason:
                await asyncio.sleep(0.01)
        assert not opened
        assert "has it locked" in target.reason
        fcntl.flock(slave, fcntl.LOCK_UN)
        await target.wait_present()
        assert opened == [os.ttyname(slave)]
        await target.close()

    asyncio.run(main())
    os.close(master)
    os.close(slave)


def test_a_rate_that_the_port_cannot_do_leaves_no_target_in_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """DTR drives NRST here, and Linux raised it at the open: lines are idle before anything else can fail."""
    moved: list[tuple[bool | None, bool | None]] = []

    def refuse(_self: Uart, baud: int, *_rest: object) -> None:
        raise errors.BaudUnavailable(f"{baud} baud", baud=baud)

    monkeypatch.setattr(Uart, "set_modem", lambda _self, dtr=None, rts=None: moved.append((dtr, rts)))
    monkeypatch.setattr(Uart, "set_format", refuse)
    master, slave = os.openpty()
    target = Target("t", config.Target(port=os.ttyname(slave), lines=config.Lines(kind="modem", nrst="dtr")))
    before = set(os.listdir("/proc/self/fd"))
    pauses = []
    for _ in range(9):
        with pytest.raises(errors.BaudUnavailable):
            target._take()
        pauses.append(target._pause_s)
    assert moved == [(False, None)] * 9
    assert pauses == [1, 1, 1, 2, 4, 8, 16, 30, 30], "each opening is a pulse on NRST"
    assert set(os.listdir("/proc/self/fd")) == before
    os.close(master)
    os.close(slave)


def test_a_neighbour_that_is_plugged_in_moves_no_shared_line_before_the_end_of_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "RETRY_S", 0.02)
    seen: list[str] = []
    master, slave = os.openpty()

    def told(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.phase is Phase.IDENTIFY:
            (tmp_path / "late").symlink_to(os.ttyname(slave))
        if isinstance(event, PhaseStarted) and event.phase is Phase.BOOT:
            seen.append(f"{second.state}: {second.reason}")

    with simulated(tmp_path, **SLOWLY) as rig:
        settings = replace(rig.target.config, shares=["two"])
        first = Target("one", settings)
        second = Target("two", replace(settings, port=str(tmp_path / "late"), shares=["one"]))
        second.wires = first.wires
        boxes = rig.port._connections

        async def main() -> None:
            for target in (first, second):
                await target.open()
            await first.wait_present()
            most = 0

            def count(event: Event) -> None:
                nonlocal most
                told(event)
                most = max(most, len(boxes))

            # Read slowly enough that a keeper has many turns in it.
            result = await first.run("read", {"address": 0x08000000, "length": 4096}, None, job_id="j", on_event=count)
            assert result["data"] == b"\xff" * 4096
            assert seen == ["absent: a target that shares its wires has them"]
            assert most == 1, "nobody else was connected to the line box"
            await second.wait_present()
            assert second.state == "idle"
            for target in (first, second):
                await target.close()

        asyncio.run(main())
    os.close(master)
    os.close(slave)
