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
from bridged.target.board import NOTE, RECEIVED, REFERENCE, SENT, Board, reference
from bridged.target.request import Request
from tests.target.bench import WIRED, Bench, make_image

T = TypeVar("T")
FOLDER = Path(__file__).parent / "recordings"
TURN_S = 80e-6


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
            if step.payload_address is None:
                board.record(SENT, step.data, at)
            else:
                board.record(REFERENCE, reference(step.payload_address, len(step.data) - 2), at)
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
    board = Board.create()
    try:
        uart = VirtualUart(bench.device, wire_parity="N" if mini_uart else None)
        image = make_image(bench.chip, size) if size else None
        board.record(NOTE, f"session {kind}".encode(), uart.now_ns / 1e9)
        ending = DONE
        try:
            virtual.run(recorded(session.run(wanted, image, b""), board), uart)
        except BridgedError as error:
            ending = one_line(f"{DONE} {error.code}: {error.message}")
        board.record(NOTE, ending.encode(), uart.now_ns / 1e9)
        return board.trace()
    finally:
        board.close()


def _bench(*faults: str, chip: str = "F756") -> Bench:
    return Bench(chip, {"rate_error": 0.0, "faults": list(faults)}, {"discard_outside": True})


# A session for each thing that a person may have to find in a recording.
SESSIONS: dict[str, Callable[[], str]] = {
    "good-flash": lambda: record(_bench(), "flash", 9000),
    "nack": lambda: record(_bench("nack:0x31:3:data"), "flash", 2000),
    "refused": lambda: record(_bench("nack:0x31:0:address:*"), "flash", 2000),
    "lost-byte": lambda: record(_bench("lose:rx:900"), "flash", 2000),
    "wrong-parity": lambda: record(_bench(), "identify", mini_uart=True),
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
