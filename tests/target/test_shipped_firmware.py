"""The applications that this project ships really run: what a session has flashed is executed, and the probe hears that code.

The simulated part hands its flash to the Unicorn engine (a strict machine with the registers of the board, no other) instead
of looking for a banner in it. So the health probe's answer comes from the machine code that went over the wire.
"""

from __future__ import annotations

from typing import Any

import pytest

from bridged import errors
from bridged.images.formats import parse
from bridged.sim import device as simulated
from bridged.sim.application import Application, Behaviour
from bridged.sim.demo_images import demo_image
from bridged.sim.memory import Memory
from bridged.target.expect import Conversation
from tests.sim.test_firmware import BOARDS, CHIPS, FLASH_BYTES, Machine
from tests.target.bench import Bench


class Executed(Application):
    """An application whose every byte is computed by the flashed machine code."""

    def __init__(self, machine: Machine, behaviour: Behaviour) -> None:
        super().__init__(b"", behaviour)
        self.machine = machine

    def start(self) -> bytes:
        return self.machine.run()

    def receive(self, data: bytes) -> bytes:
        self.machine.received += data
        return self.machine.run()


@pytest.fixture(params=CHIPS)
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A part of each demo board that executes its flash."""
    chip = str(request.param)

    def load(memory: Memory, _address: int, behaviour: Behaviour) -> Application | None:
        flash = bytes(memory.flash[:FLASH_BYTES])
        return None if flash[:8] == b"\xff" * 8 else Executed(Machine(BOARDS[chip], flash), behaviour)

    monkeypatch.setattr(simulated, "load", load)
    return Bench(chip)


def test_the_flashed_code_answers_the_health_probe(bench: Bench) -> None:
    shipped = demo_image(bench.chip_name)
    image = parse(shipped.read(), "elf", None)
    result = bench.run("flash", image, health=Conversation(expect=shipped.banner.replace(".", r"\.")))
    assert result.banner == shipped.banner
    assert bench.holds(image)
    asked = bench.run("ensure", image, health=Conversation(b"ping\n", "ok ping", 5))
    assert (asked.changed, asked.evidence) == (False, "full")


def test_flashed_code_that_says_something_else_is_unhealthy(bench: Bench) -> None:
    shipped = demo_image(bench.chip_name)
    image = parse(shipped.read(), "elf", None)
    settings: dict[str, Any] = {"health": Conversation(expect="version 2", within_s=0.5)}
    with pytest.raises(errors.Unhealthy, match="version 1"):
        bench.run("flash", image, **settings)
