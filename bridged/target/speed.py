"""How fast a target is spoken to: the rates worth trying, the next lower one, and the width in which its flash is programmed.

Pure decisions on what is configured, what the chip table says and what this target did before; ``entry`` and ``dialogue``
carry them out. The rate is measured by the loader on the first byte after each reset (AN3155), so every try costs a reset, and
without NRST nothing is tried. Rates above 115200 are outside of what ST tests (AN3155): each must prove itself, and is
remembered.

Documents: AN3155 (baud rate), AN2606 (how each loader measures it; the voltage range of F2, F4 and F7).
"""

from __future__ import annotations

from bridged.chips.model import Chip
from bridged.target.request import Request

# A loader that times the edges by software is off by up to 6 % at 115200 and by more above (AN2606); users report 256000 as
# the last rate that works with some. Beyond it only what this very target has done before.
SOFTWARE_MOST_BAUD = 256000
STEP_DOWN_AFTER = 3  # Reconnections at one rate, until a lower one is taken.
CHECK_BYTES = 64  # Read twice before a high rate is believed.

VOLTAGE_ADDRESS = 0xFFFF0000  # A virtual location of the loaders of F2, F4 and F7 (AN2606).
VOLTAGE_FAMILIES = frozenset({"F2", "F4", "F7"})
_VOLTAGE_CODES = ((2.7, 3), (2.4, 2), (2.1, 1))  # Lowest supply in volts; 4 would ask for 9 V on VPP and is never sent.


def first_baud(request: Request, chip: Chip | None) -> int:
    """The rate that is safe: configured, or preferred by the chip."""
    return request.baud or (chip.first_baud if chip else 115200)


def faster_bauds(request: Request, chip: Chip | None) -> tuple[int, ...]:
    """Rates above the safe one that are worth a reset, highest first."""
    if not request.bauds or not (request.wiring.has_reset or request.wiring.has_power):
        return ()
    safe = first_baud(request, chip)
    most = max(request.bauds)
    if chip is None or not chip.hardware_autobaud:
        # A chip whose table says 57600 has a loader that misses higher rates now and then (F7).
        most = safe if chip and chip.first_baud < 115200 else SOFTWARE_MOST_BAUD
    found = {baud for baud in request.bauds if safe < baud and (baud <= most or baud in request.past.good_bauds)}
    return tuple(sorted(found - set(request.past.bad_bauds), reverse=True))


def lower_baud(baud: int, request: Request, chip: Chip | None) -> int:
    """The rate to go on with when ``baud`` makes too many errors; the same one where there is none but the safe one's own."""
    lower = [other for other in (*faster_bauds(request, chip), first_baud(request, chip)) if other < baud]
    return max(lower, default=baud)


def voltage_code(request: Request, chip: Chip) -> int:
    """What to write to ``VOLTAGE_ADDRESS``; 0 for nothing: supply unknown, another family, or what the loader assumes."""
    if chip.family not in VOLTAGE_FAMILIES or chip.foreign:
        return 0
    return next((code for volts, code in _VOLTAGE_CODES if request.supply_v >= volts), 0)
