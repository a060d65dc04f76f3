"""Recordings of simulated sessions in virtual time, as the session process would have made them.

``python -m tests.protocol.recorder`` writes the golden recordings of ``tests/protocol/recordings`` anew, and what the decoder
makes of them; look at the difference before you commit it. The text comes from the real recorder (``target/board.py``) and the
real words (``protocol.recording``); only the times are virtual, with 80 us for each of the host's turns.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bridged.errors import BridgedError
from bridged.images.model import Image
from bridged.protocol.flow import (
    Barrier,
    Drain,
    Flow,
    Hazard,
    Now,
    Pause,
    Receive,
    Report,
    Send,
    SetFormat,
    SetLines,
)
from bridged.protocol.recording import DONE, JOURNALED, note_of, one_line
from bridged.protocol.trace import decode
from bridged.protocol.trace_text import table
from bridged.sim import virtual
from bridged.sim.virtual import VirtualUart
from bridged.target import session
from bridged.target.board import NOTE, RECEIVED, Board
from bridged.target.expect import Conversation
from bridged.target.request import Receiver, Request
from tests.stub.sessions import Sessions
from tests.target.bench import WIRED, Bench, make_image
from tests.target.own_bootloader import OwnBootloader, good_image

T = TypeVar("T")
FOLDER = Path(__file__).parent / "recordings"
TURN_S = 80e-6
RECEIVER = Receiver(
    enter=Conversation(b"x", "boot> ", 5.0),
    begin=Conversation(b"load\n", "send it now", 5.0),
    success=Conversation(b"", "image good", 5.0),
)


def recorded(flow: Flow[T], board: Board) -> Flow[T]:
    """``flow`` with every step on the recorder, as ``target.worker.Driver`` puts it there."""
    answer: Any = None
    error: BridgedError | None = None
    while True:
        try:
            step = flow.send(answer) if error is None else flow.throw(error)
        except StopIteration as stop:
            value: T = stop.value
            return value
        answer, error = None, None
        if isinstance(step, Send):
            yield Pause(TURN_S)
        at: float = yield Now()
        noted = step.event if isinstance(step, Report) else step
        if isinstance(step, Send):
            board.record_sent(step, at)
        elif isinstance(step, SetLines | SetFormat | Hazard | Barrier | Report) and (text := note_of(noted)):  # type: ignore[arg-type]
            board.record(NOTE, text.encode(), at)
        try:
            answer = yield step
        except BridgedError as raised:
            error = raised
        at = yield Now()
        if isinstance(step, Receive | Drain):
            board.record(RECEIVED, answer, at)
        elif isinstance(step, Barrier) and error is None:
            board.record(NOTE, f"{JOURNALED} {step.state}".encode(), at)


def record(bench: Bench, kind: str, size: int = 0, *, mini_uart: bool = False, **request: Any) -> str:
    """The recording of one session, which may fail. ``mini_uart``: no parity on the wire, whatever was asked for."""
    wanted = Request(**{"kind": kind, "wiring": WIRED, "chip": bench.chip_name, **bench.request, **request})
    uart = VirtualUart(bench.device, wire_parity="N" if mini_uart else None)
    return _record(uart, wanted, make_image(bench.chip, size) if size else None)


def _record(uart: VirtualUart, wanted: Request, image: Image | None) -> str:
    board = Board.create()
    try:
        board.record(NOTE, f"session {wanted.kind}".encode(), uart.now_ns / 1e9)
        ending = DONE
        try:
            virtual.run(recorded(session.run(wanted, image, b""), board), uart)
        except BridgedError as error:
            ending = one_line(f"{DONE} {error.code}: {error.message}")
        board.record(NOTE, ending.encode(), uart.now_ns / 1e9)
        return board.trace()
    finally:
        board.close()


def second_stage() -> str:
    """The real loader in emulation, on a line that spoils two of the frames that it is sent and one of its answers."""
    s = Sessions("L476", spoil_frames=_nth(40, 52), spoil_bytes=lambda n, value: b"" if n == 700 else bytes([value]))
    s.load(bytes(range(256)) * 64)
    wanted = Request(kind="flash", wiring=WIRED, chip="L476", second_stage="auto", listen_s=0.1, discard_outside=True)
    return _record(s.uart, wanted, make_image(s.chip, 30_000))


def _nth(*numbers: int) -> Callable[[bytes], bytes]:
    """Of what is sent at once, these are spoilt."""
    count = 0

    def spoil(data: bytes) -> bytes:
        nonlocal count
        count += 1
        return data[:-1] + bytes([data[-1] ^ 1]) if count in numbers else data

    return spoil


def xmodem() -> str:
    """To a bootloader of the target's own; a byte of the third block is changed."""
    target = OwnBootloader(spoil=lambda there, n, value: bytes([value ^ (there and n == 2500)]))
    wanted = Request(kind="xmodem", wiring=WIRED, receiver=RECEIVER, listen_s=0.1)
    return _record(VirtualUart(target), wanted, Image.of([(0, good_image(5000))]))  # type: ignore[arg-type]


def _bench(*faults: str, chip: str = "F756") -> Bench:
    return Bench(chip, {"rate_error": 0.0, "faults": list(faults)}, {"discard_outside": True})


# A session for each thing that a person may have to find in a recording.
SESSIONS: dict[str, Callable[[], str]] = {
    "good-flash": lambda: record(_bench(), "flash", 9000),
    "nack": lambda: record(_bench("nack:0x31:3:data"), "flash", 2000),
    "refused": lambda: record(_bench("nack:0x31:0:address:*"), "flash", 2000),
    "lost-byte": lambda: record(_bench("lose:rx:900"), "flash", 2000),
    "wrong-parity": lambda: record(_bench(), "identify", mini_uart=True),
    "second-stage": second_stage,
    "xmodem": xmodem,
    "erase-timeout": lambda: record(_bench("erase-hang:0", "erase-hang:1", "erase-hang:2"), "flash", 2000),
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, make in SESSIONS.items():
        text = make()
        (FOLDER / f"{name}.txt").write_text(text)
        (FOLDER / f"{name}.table").write_text(table(decode(text)))
        print(f"{name}: {text.count(chr(10))} entries")


if __name__ == "__main__":
    main()
