"""Real firmware of strangers, flashed in virtual time onto the parts that it was made for: LEGO hubs that run Pybricks.

These images belong behind the vendor's bootloader, so they start at an offset and share no sector with the flash base.
"""

from __future__ import annotations

from bridged import chips
from bridged.images.model import Image
from bridged.sim.device import Device
from bridged.sim.virtual import Account, run
from bridged.target import session
from bridged.target.request import Request
from tests import firmware_npm
from tests.target.bench import WIRED


def test_flashed_behind_their_bootloader_and_proven() -> None:
    hubs = firmware_npm.hubs()
    assert {hub.chip for hub in hubs} >= {"F070", "F030", "L431", "F413"}
    for hub in hubs:
        chip = chips.by_pid(hub.pid)
        device = Device(chip, flash_bytes=hub.flash_bytes, options={"nSWBOOT0": 1} if chip.family in ("L4",) else None)
        image = Image.of([(hub.address, hub.data)])
        bootloader = bytes(range(1, 200)) if hub.address > chip.flash_base else b""
        if bootloader:
            device.memory.program(chip.flash_base, bootloader + bytes(-len(bootloader) % 8))
        account = Account()
        result = run(session.run(Request("flash", WIRED), image), device, account=account)
        assert result.evidence == "full", hub
        assert device.memory.read(hub.address, len(hub.data)) == hub.data
        assert device.memory.read(chip.flash_base, len(bootloader) or 1)[: len(bootloader)] == bootloader
        assert account.overruns == 0
        assert account.violations == []
