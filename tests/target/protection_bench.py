"""Sessions in virtual time on parts that have protection and option bytes."""

from __future__ import annotations

from typing import Any

from bridged.chips.option_rows import LAYOUTS
from bridged.images.model import Image
from bridged.sim.loader import Timing
from bridged.target.request import Result
from bridged.target.wishes import wishes_of
from tests.target.bench import Bench, make_image

CONSENT: dict[str, Any] = {"force": "erase-everything"}
WHOLE: dict[str, Any] = {"unprotect": True, "protect": True, **CONSENT}
PARTS: dict[str, dict[str, Any]] = {
    "0x410": {},
    "F072": {},
    "F303xC": {},
    "F407": {},
    "F446": {},
    "F756": {},
    "G071": {"options": {"nBOOT_SEL": 0}},
    "C011": {"options": {"nBOOT_SEL": 0}},
}
# One field to change on each part, to a value that the factory did not give it.
FAST = Timing(mass_erase_s=1.0)
FIELDS = {
    "0x410": "nRST_STOP:0",
    "F072": "nRST_STDBY:0",
    "F303xC": "WDG_SW:0",
    "F407": "BOR_LEV:1",
    "F446": "nRST_STOP:0",
    "F756": "IWDG_STOP:0",
    "G071": "IWDG_STDBY:0",
    "C011": "BORR_LEV:1",
}


def one(part: str, faults: tuple[str, ...] = (), *, rdp: int = 0, **settings: Any) -> Bench:
    bench = Bench(part, {**PARTS.get(part, {}), "rate_error": 0.0, "faults": faults, **settings})
    bench.put(make_image(bench.chip, 768, seed=5))
    bench.device.memory.set_rdp(rdp)
    return bench


def ask(bench: Bench, kind: str, image: Image | None = None, kept: bytes = b"", **params: Any) -> Result:
    """A session with ``params`` as a client gives them."""
    hooks = {
        name: params.pop(name) for name in ("barrier", "checkpoint", "cut_after_exchange", "protect_ranges") if name in params
    }
    force = frozenset(str(params.get("force") or "").split(",")) - {""}
    protect = hooks.pop("protect_ranges", ())
    return bench.run(kind, image, kept, wishes=wishes_of(kind, params), force=force, protect=protect, **hooks)


def block(bench: Bench) -> bytes:
    """What is stored, seen from inside the part."""
    spot, content = bench.device.memory._options[0]
    assert spot.covers(LAYOUTS[bench.chip.pid].block.start, LAYOUTS[bench.chip.pid].block.end)
    return bytes(content)


def unharmed(bench: Bench) -> None:
    """No reset in the middle of anything, no byte for deaf ears, and the application runs."""
    assert bench.device.stats.hazard_resets == []
    assert bench.account.violations == []
    assert not bench.device.lines["boot0"]
    assert bench.device.lines["nrst"]
