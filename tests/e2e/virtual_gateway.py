"""The whole product but for processes and wires: jobs, queue, journal on a disk, store, owner, and sessions in virtual time.

``VirtualTarget`` is the real owner of ``target.owner``. Where it would start a session process, the same session runs in a
thread over a simulated part: with the real control socket, the real board, the image sealed in a real memfd, and the request
through JSON. Seconds of virtual time cost microseconds, so that ten thousand flashes with all that they write to the journal
take minutes. A killed session (``kill_after``) leaves what a SIGKILL leaves: a board without a result, a hazard, lines as they
were. So does a gateway that dies as a whole (``crash``), of which only the parts and the disk are left for the next one.

What this does not show is what only processes and wires can: tests/e2e/test_kill_points.py, tests/target/test_owner.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from bridged import chips, config
from bridged.errors import BridgedError, PortGone, Stopped, from_dict
from bridged.events import Event, encode
from bridged.images import memfd
from bridged.images.memfd import map_sealed
from bridged.images.model import Image
from bridged.images.staged import StagedImage
from bridged.images.store import Store
from bridged.jobs.journal import Journal
from bridged.jobs.model import Job, JobKind, Submission
from bridged.jobs.ports import Clock
from bridged.jobs.service import Jobs
from bridged.protocol.flow import Barrier as BarrierStep
from bridged.protocol.flow import Step
from bridged.sim import virtual
from bridged.sim.device import Device
from bridged.sim.faults import Fault, Faults
from bridged.sim.virtual import Account, PowerCut, VirtualUart
from bridged.target import owner, session
from bridged.target.board import MAX_HAZARD_S, Board
from bridged.target.lines import Line, Lines, inputs, wired
from bridged.target.process import Session
from bridged.target.request import Request
from bridged.target.uart import Uart
from bridged.target.worker import BARRIER_LIMIT_S, Control

PULSE_S = 0.02  # The owner's own pauses pass in real time; the part must see its reset held for a while all the same.
NOWHERE = "/dev/null"


class Life:
    """Of one gateway. ``end`` is a SIGKILL of all its processes: from then on nothing of it moves a line or writes to disk."""

    def __init__(self) -> None:
        self.over = False
        self.violations: list[str] = []  # of P9
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def end(self) -> None:
        if not self.over:
            self.over = True
            self._loop.call_soon_threadsafe(self.ended.set)


class _Port:
    """What the owner asks of a port that is no port: it is always there."""

    def __init__(self) -> None:
        self.fd = os.open(NOWHERE, os.O_RDWR | os.O_CLOEXEC)
        self.path, self.is_pty = NOWHERE, False

    def close(self) -> None:
        os.close(self.fd)

    def set_format(self, *_: object) -> None: ...
    def set_break(self, _active: bool) -> None: ...
    def discard_output(self) -> None: ...
    def flush_input(self) -> None: ...
    def wait_readable(self, _timeout_s: float) -> bool:
        return False

    def counters(self) -> None:
        return None


class _Wires(Lines):
    """The lines of a simulated part, as the owner moves them after a death."""

    kind = "virtual"

    def __init__(self, device: Device, driven: Sequence[Line], life: Life) -> None:
        super().__init__(driven)
        self._device = device
        self._life = life

    def _drive(self, line: Line, state: bool) -> None:
        if self._life.over:
            raise PortGone("the gateway is dead")
        uart = VirtualUart(self._device)
        uart.pause(PULSE_S)
        if self._device.hazard and state and line is not Line.BOOT0:
            self._life.violations.append(f"{line} moved during {self._device.hazard}")
        match line:
            case Line.RESET:
                uart.set_lines(reset=state)
            case Line.BOOT0:
                uart.set_lines(boot0=state)
            case Line.POWER:
                uart.set_lines(power=state)
        uart.pause(PULSE_S)

    def _read(self, line: Line) -> bool:
        return self._device.level(line.pin)


class _VirtualBoard(Board):
    """A hazard passes in the time of the part."""

    device: Device
    hazard_until_ns = 0

    @property
    def hazard_left_s(self) -> float:
        left_s = min(MAX_HAZARD_S, max(0.0, (self.hazard_until_ns - self.device.now_ns) / 1e9))
        if left_s:
            VirtualUart(self.device).pause(left_s)
        self.hazard_until_ns = 0
        return 0.0


class _VirtualSession(Session):
    """A session that runs in a thread, in virtual time."""

    def __init__(self, target: VirtualTarget, *rest: Any) -> None:
        super().__init__(*rest)
        self.board.close()
        board = _VirtualBoard.create()
        assert isinstance(board, _VirtualBoard)
        board.device = target.device
        self.board = board
        self._target = target

    async def run(self, image: Image | None, kept: bytes) -> None:
        loop = asyncio.get_running_loop()
        image_fd = memfd.seal(image) if image is not None else -1
        loop.add_reader(self._mine.fileno(), self._read)
        try:
            await asyncio.to_thread(self._work, image_fd, kept)
        finally:
            if image_fd >= 0:
                os.close(image_fd)
            self._read()
            loop.remove_reader(self._mine.fileno())
            for task in self._tasks:
                task.cancel()

    def _work(self, image_fd: int, kept: bytes) -> None:
        """What ``worker.main`` does."""
        target, board = self._target, cast(_VirtualBoard, self.board)
        account = target.account = Account()
        target.started_ns = target.device.now_ns
        control_fd = os.dup(self._theirs.fileno())
        control = Control(control_fd)
        request = Request.from_dict(json.loads(json.dumps(self._request.to_dict())))
        image = map_sealed(image_fd) if image_fd >= 0 else None
        kill_at, target.kill_after = target.kill_after, None

        def barrier(step: BarrierStep) -> None:
            if step.kept:
                os.ftruncate(self.out, 0)
                os.pwrite(self.out, step.kept, 0)
            message = {"barrier": step.state, "hazard_s": step.hazard_s, "kept_bytes": len(step.kept)}
            try:
                answer = control.ask(message, BARRIER_LIMIT_S)
            except Stopped:
                if target.life.over:
                    raise PowerCut from None
                raise
            if "error" in answer:
                raise from_dict(answer["error"])

        def before(number: int, _step: Step) -> None:
            if target.crash_after is not None and (target.device.hazard or not target.crash_erasing):
                target.crash_after -= 1
                if target.crash_after < 0:
                    target.crash_after = None
                    target.life.end()
            if target.life.over or number == kill_at:
                raise PowerCut

        def tell(event: Event) -> None:
            control.tell(encode(event))

        outcome: dict[str, Any]
        try:
            done = virtual.run(
                session.run(request, image, kept),
                target.device,
                account=account,
                checkpoint=lambda _step: control.checkpoint(),
                barrier=barrier,
                report=tell,
                progress=board.set_progress,
                before=before,
            )
            os.ftruncate(self.out, 0)
            os.pwrite(self.out, done.data, 0)
            outcome = {"result": done.to_dict(), "data_bytes": len(done.data)}
        except BridgedError as error:
            outcome = {"error": error.as_dict()}
        except PowerCut:
            hazards = [at + virtual.ns(seconds) if seconds else 0 for at, seconds in account.hazards]
            board.hazard_until_ns = hazards[-1] if hazards else 0
            os.close(control_fd)
            self.ending = "signal 9"
            return
        counts = {"out": account.all.bytes_out, "in": account.all.bytes_in}
        board.set_result(outcome | {"uart_bytes": counts, "turnaround_us": 0, "cost": {}})
        control.finish(1.0)
        os.close(control_fd)


class VirtualTarget(owner.Target):
    """``kill_after``: the next session is killed at its step of this number. ``crash_after``: the whole gateway is, so many
    steps of this target's sessions from now, or of its steps while the part erases (``crash_erasing``)."""

    def __init__(self, name: str, device: Device, settings: config.Target, life: Life) -> None:
        super().__init__(name, settings)
        self.device = device
        self.life = life
        self.account = Account()
        self.started_ns = 0
        self.kill_after: int | None = None
        self.crash_after: int | None = None
        self.crash_erasing = False

    def hold_off(self, hazard_s: float) -> None:
        """Passes in the time of the part."""
        VirtualUart(self.device).pause(hazard_s)

    def _take(self) -> None:
        self._uart = cast(Uart, _Port())
        self._lines = _Wires(self.device, (*wired(self.config.lines), *inputs(self.config.lines)), self.life)

    async def _attach(self) -> None:
        """No console: there is no port that it could have."""

    def _new_session(self, *rest: Any) -> Session:
        return _VirtualSession(self, self._uart, self._lines, *rest, self._heard)


class _Loaded:
    """The real store, which parses each of its few images once: what parsers do is shown elsewhere."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._images: dict[tuple[Any, ...], Image] = {}

    def get(self, ref: str) -> StagedImage:
        return self._store.get(ref)

    def at_hand(self, staged: Any, base_address: int | None = None, type_hint: str = "auto") -> bool:
        return (staged.sha256, base_address, type_hint) in self._images

    def use(self, ref: str) -> StagedImage:
        return self._store.use(ref)

    def load(self, staged: Any, base_address: int | None = None, type_hint: str = "auto") -> Image:
        key = (staged.sha256, base_address, type_hint)
        if key not in self._images:
            self._images[key] = self._store.load(staged, base_address, type_hint)
        return self._images[key]


@dataclass
class VirtualGateway:
    """Use it with ``async with``. ``parts``: by name of the target the chip and settings of its ``Device``. ``devices``: those
    that are there already, which another gateway had."""

    root: Path
    parts: dict[str, tuple[str, dict[str, Any]]]
    settings: config.Target = field(default_factory=lambda: config.Target(port=NOWHERE))
    limits: config.Jobs = field(default_factory=config.Jobs)
    devices: dict[str, Device] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.life = Life()
        wired = config.Lines(kind="socket", socket=NOWHERE, nrst="nrst", boot0="boot0")
        self.targets: dict[str, VirtualTarget] = {}
        configured = {}
        for name, (chip, settings) in self.parts.items():
            lines = replace(wired, power="power") if name.endswith("-power") else wired
            configured[name] = replace(self.settings, port=NOWHERE, chip=chip, lines=lines)
            device = self.devices.setdefault(name, Device(chips.find(chip), **settings))
            self.targets[name] = VirtualTarget(name, device, configured[name], self.life)
        self.config = config.Config(targets=configured, jobs=self.limits)
        self.store = Store(self.root, 64 << 20, 1 << 20)
        self.journal = Journal.open(self.root / "state.db")
        clock = Clock(sleep=lambda _seconds: asyncio.sleep(0))
        self.jobs = Jobs(self.config, self.journal, _Loaded(self.store), self.targets, clock=clock)

    async def __aenter__(self) -> VirtualGateway:
        await self.jobs.start()
        for target in self.targets.values():
            await target.open()
            assert await target.wait_idle_hardware(10), target.reason
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.jobs.stop()
        for target in self.targets.values():
            await target.close()

    async def crash(self) -> None:
        """Clear away what is left of a gateway whose ``life`` is over; only its disk and the parts are used afterwards."""
        assert self.life.over
        vars(self.journal)["_enqueue"] = lambda _operation: Future()  # Nothing is written, and nobody hears of it.
        tasks = [*self.jobs._tasks.values(), *self.jobs._book.errands]
        for target in self.targets.values():
            if target._session is not None:
                target._session._mine.shutdown(socket.SHUT_RDWR)
        while any(target._session is not None for target in self.targets.values()):
            for task in tasks:
                task.cancel()
            await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for target in self.targets.values():
            await target.close()
        await asyncio.to_thread(self.journal.close)

    def stage(self, name: str, data: bytes) -> str:
        """A raw binary, uploaded as a client would. Its SHA-256."""
        sha256 = hashlib.sha256(data).hexdigest()
        upload = self.store.open_upload("test", len(data), sha256, name=name, type_hint="bin")
        upload.write(data)
        return str(upload.finish().sha256)

    async def job(self, kind: JobKind, target: str, image: str = "", **params: Any) -> Job:
        job = await self.jobs.submit(Submission(kind, target, image, params, "", "test"))
        return await self.jobs.wait(job.id, 120)

    def inject(self, target: str, faults: Sequence[Fault | str]) -> Faults:
        """Faults whose positions count from the next byte on."""
        device = self.targets[target].device
        device.faults = Faults(faults)
        return device.faults
