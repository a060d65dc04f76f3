"""Whole sessions on a whole part: the simulated ROM loader, and behind Go the real binary in the emulated core."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from bridged.images.model import Image
from bridged.protocol.flow import Barrier, Checkpoint
from bridged.protocol.stub import FRAME_BYTES, HEAD_BYTES
from bridged.sim import virtual
from bridged.sim.device import Mode
from bridged.sim.virtual import Account, VirtualUart
from bridged.target import session
from bridged.target.request import Request, Result
from tests.stub.whole import Whole
from tests.target.bench import WIRED, check_proofs


class Sessions:
    """One part, and what its last session cost in ``account``. ``settings``: see ``Whole``."""

    def __init__(self, name: str, **settings: Any) -> None:
        self.whole = Whole(name, **settings)
        self.chip = self.whole.chip
        self.uart = VirtualUart(self.whole)  # type: ignore[arg-type]
        self.account = Account()

    def run(
        self,
        kind: str,
        image: Image | None,
        kept: bytes = b"",
        *,
        checkpoint: Callable[[Checkpoint], None] | None = None,
        barrier: Callable[[Barrier], None] | None = None,
        before: Callable[[int, Any], None] | None = None,
        **request: Any,
    ) -> Result:
        wanted = Request(**{"kind": kind, "wiring": WIRED, "second_stage": "auto", "listen_s": 0.3, "supply_v": 3.3, **request})
        assert Request.from_dict(wanted.to_dict()) == wanted
        self.account = Account()
        try:
            return virtual.run(
                session.run(wanted, image, kept),
                self.uart,
                account=self.account,
                checkpoint=checkpoint,
                barrier=barrier,
                before=before,
            )
        finally:
            assert self.whole.violations == [], "; ".join(self.whole.violations)
            assert self.account.violations == []
            check_proofs([e for _, e in self.account.events])

    def load(self, content: bytes) -> None:
        """What was in flash when the power came on; the rest is blank."""
        self.whole.end()
        self.whole.rom.memory.load_flash(content)
        self.uart.set_lines(power=False)
        self.uart.pause(0.5)
        self.uart.set_lines(power=True)

    def events(self, kind: type[Any]) -> list[Any]:
        return [e for _, e in self.account.events if isinstance(e, kind)]

    @property
    def flash(self) -> bytes:
        self.whole.end()
        return bytes(self.whole.rom.memory.flash)

    def holds(self, image: Image) -> bool:
        flash = self.flash
        base = self.chip.flash_base
        return all(flash[s.address - base : s.end - base] == s.data for s in image.segments)

    def boots(self) -> bool:
        self.uart.set_lines(boot0=False, reset=True)
        self.uart.pause(0.01)
        self.uart.set_lines(reset=False)
        self.uart.pause(1.0)
        return self.whole.rom.mode is Mode.APPLICATION


def hits(seed: int, one_in: int) -> Callable[[bytes], bytes]:
    """Of the frames that the host sends one in so many has a byte changed, lost or doubled."""
    rng = random.Random(seed)

    def spoil(frame: bytes) -> bytes:
        if not frame or rng.randrange(one_in):
            return frame
        at = rng.randrange(len(frame))
        return frame[:at] + _hit(rng, frame[at]) + frame[at + 1 :]

    return spoil


def hits_back(seed: int, one_in: int) -> Callable[[int, int], bytes]:
    """The same for the frames of the loader, which come byte by byte: where one ends is in its header."""
    rng = random.Random(seed)
    head = bytearray()
    left, at = 0, -1

    def spoil(_number: int, value: int) -> bytes:
        nonlocal left, at
        if not left:
            head.append(value)
            if len(head) == 1:
                at = rng.randrange(HEAD_BYTES) if rng.randrange(one_in) == 0 else -1
            place = len(head) - 1
            if len(head) == HEAD_BYTES:
                left = int.from_bytes(head[3:5], "little") + FRAME_BYTES - HEAD_BYTES
                if at >= 0 and rng.randrange(HEAD_BYTES + left) >= HEAD_BYTES:
                    at = HEAD_BYTES + rng.randrange(left)
                head.clear()
                size[0] = HEAD_BYTES + left
        else:
            place = size[0] - left
            left -= 1
        return _hit(rng, value) if place == at else bytes([value])

    size = [0]
    return spoil


def _hit(rng: random.Random, value: int) -> bytes:
    return rng.choice((bytes([value ^ 1 << rng.randrange(8)]), b"", bytes([value, rng.randrange(256)])))
