"""XMODEM against lrzsz's ``rx``: blocks, retries, cancels, as another program understands them."""

from __future__ import annotations

import os
import random
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from bridged.errors import BridgedError, Canceled, TransferFailed
from bridged.protocol import xmodem
from bridged.protocol.flow import Checkpoint, Drain, Flow, Hazard, Now, Progress, Receive, Send
from bridged.protocol.xmodem import How, Sent
from tests.support import require_tool

T = TypeVar("T")


def test_the_check_value_of_the_crc() -> None:
    assert xmodem.crc16(b"123456789") == 0x31C3


def test_blocks() -> None:
    assert xmodem.frame(1, b"A" * 128, crc=False) == b"\x01\x01\xfe" + b"A" * 128 + bytes([128 * 65 & 0xFF])
    block = xmodem.frame(257, b"A" * 1024, crc=True)
    assert (block[:3], len(block)) == (b"\x02\x01\xfe", 1029)


@pytest.mark.parametrize(
    ("count", "crc", "sizes"),
    [
        (1, True, [128]),
        (128, True, [128]),
        (896, True, [128] * 7),
        (897, True, [1024]),
        (2050, True, [1024, 1024, 128]),
        (2050, False, [128] * 17),
    ],
)
def test_how_content_is_cut(count: int, crc: bool, sizes: list[int]) -> None:
    found = xmodem.pieces(b"\x55" * count, How(), crc=crc)
    assert [len(block) for block in found] == sizes
    assert b"".join(found) == b"\x55" * count + b"\xff" * (sum(sizes) - count)


# --- against rx


class Pipe:
    """Carries out the steps of a flow on the two pipes of a program, as fast as it takes them."""

    def __init__(self, program: subprocess.Popen[bytes], spoil: Callable[[bytes], bytes] = lambda data: data) -> None:
        assert program.stdin is not None
        assert program.stdout is not None
        self.into, self.out, self.spoil = program.stdin.fileno(), program.stdout.fileno(), spoil
        self.progress: list[int] = []
        self.checkpoints = 0
        self.stop_at = -1
        self.left = b""

    def run(self, flow: Flow[T]) -> T:
        answer: Any = None
        error: BridgedError | None = None
        while True:
            try:
                step = flow.send(answer) if error is None else flow.throw(error)
            except StopIteration as ended:
                value: T = ended.value
                return value
            answer, error = None, None
            match step:
                case Send():
                    os.write(self.into, self.spoil(step.data))
                case Receive():
                    answer = self.receive(step.count, step.timeout_s)
                case Drain():
                    answer = self.receive(4096, step.quiet_s)
                case Now():
                    answer = time.monotonic()
                case Progress():
                    self.progress.append(step.done)
                case Checkpoint():
                    self.checkpoints += 1
                    error = Canceled("enough") if self.checkpoints == self.stop_at else None
                case Hazard():
                    pass
                case _:
                    raise AssertionError(step)

    def receive(self, count: int, timeout_s: float) -> bytes:
        if not self.left and select.select([self.out], [], [], timeout_s)[0]:
            self.left = os.read(self.out, 4096)
        found, self.left = self.left[:count], self.left[count:]
        return found


def rx(path: Path, *options: str) -> subprocess.Popen[bytes]:
    program = require_tool("rx", "lrzsz")
    # A name with a path in it rx takes for an attack.
    return subprocess.Popen(
        [program, *options, path.name],
        cwd=path.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    )


def transfer(data: bytes, how: How) -> Flow[Sent]:
    crc = yield from xmodem.invitation(how)
    return (yield from xmodem.send(data, how, crc=crc, byte_s=10 / 115200))


@pytest.mark.parametrize(
    ("options", "how", "crc", "blocks"),
    [
        (("-c",), How(), True, 32),
        (("-c",), How(block=128, pad=0x1A), True, 235),
        ((), How(), False, 235),
        ((), How(check="checksum"), False, 235),
    ],
)
def test_rx_receives_it(tmp_path: Path, options: tuple[str, ...], how: How, crc: bool, blocks: int) -> None:
    data = random.Random(1).randbytes(30_001)
    with rx(tmp_path / "got", *options) as program:
        pipe = Pipe(program)
        sent = pipe.run(transfer(data, how))
        assert program.wait(10) == 0
    got = (tmp_path / "got").read_bytes()
    assert got[: len(data)] == data
    assert got[len(data) :] == bytes([how.pad]) * sent.padded
    assert (sent.crc, sent.resent, sent.blocks) == (crc, 0, blocks)
    assert pipe.progress[-1] == len(data)


def test_rx_gets_blocks_that_were_hit_again(tmp_path: Path) -> None:
    data = random.Random(2).randbytes(9000)
    rng = random.Random(3)
    hit = 0

    def spoil(frame: bytes) -> bytes:
        nonlocal hit
        if len(frame) < 100 or rng.randrange(4):
            return frame
        hit += 1
        at = rng.randrange(3, len(frame))
        return frame[:at] + bytes([frame[at] ^ 0x20]) + frame[at + 1 :]

    with rx(tmp_path / "got", "-c") as program:
        sent = Pipe(program, spoil).run(transfer(data, How()))
        assert program.wait(10) == 0
    assert (tmp_path / "got").read_bytes()[: len(data)] == data
    assert sent.resent == hit > 0


def test_our_cancel_ends_rx(tmp_path: Path) -> None:
    with rx(tmp_path / "got", "-c") as program:
        pipe = Pipe(program)
        pipe.stop_at = 6
        with pytest.raises(Canceled):
            pipe.run(transfer(b"\x55" * 20_000, How()))
        assert program.wait(20) != 0


def test_a_gap_makes_rx_cancel_and_that_is_told(tmp_path: Path) -> None:
    """The same block number as before the last one: rx says CAN."""
    frames = 0

    def skip(frame: bytes) -> bytes:
        nonlocal frames
        frames += len(frame) > 100
        return xmodem.frame(9, b"\0" * 1024, crc=True) if frames == 3 and len(frame) > 100 else frame

    with rx(tmp_path / "got", "-c") as program:
        with pytest.raises(TransferFailed, match="the receiver canceled at block 3 of 8"):
            Pipe(program, skip).run(transfer(b"\x55" * 8192, How(answer_s=30)))
        program.kill()
