"""How fast a target is spoken to: rates worth trying and their order, the next lower one, how wide its flash is programmed.

Pure decisions on what is configured, what the chip table says and what this target did before; ``entry`` and ``dialogue``
carry them out. The rate is measured by the loader on the first byte after each reset (AN3155), so every try costs a reset, and
without NRST nothing is tried. Rates above 115200 are outside of what ST tests (AN3155): each must prove itself, and is
remembered.

Documents: AN3155 (baud rate), AN2606 (how each loader measures it; the voltage range of F2, F4 and F7).
"""

from __future__ import annotations

from collections.abc import Sequence

from bridged.chips.model import Chip
from bridged.target.request import Request

# A loader that times the edges by software is off by up to 6 % at 115200 and by more above (AN2606); users report 256000 as
# the last rate that works with some. Beyond it only what this very target has done before.
SOFTWARE_MOST_BAUD = 256000
HARDWARE_MOST_BAUD = 1_000_000  # What a configuration takes.
# Below what is safe, each half of the one before. 115200 is what ST tests; AN2606 advises 56000/57600 where the autobaud misses
# that; still lower rates are for long wires.
DESCENT = (460800, 230400, 115200, 57600, 38400, 19200, 9600)
# Reconnections at one rate until a lower one is taken: close together, or in all. One costs half a second, a lower rate doubles
# the time of all that is left; and a session has no more than 40 accidents.
STEP_DOWN_AFTER, STEP_DOWN_WITHIN_S, STEP_DOWN_MOST = 3, 10.0, 10
CHECK_BYTES = 64  # Read twice before a high rate is believed.

TESTED_BAUD = 115200  # The highest that ST tests (AN3155): worth a second reset before going lower, for one may miss it (F7).
UNKNOWN_STARTUP_S = (0.1, 0.6, 2.6)  # AN2606: most parts < 0.1 s, H7A3 0.545 s, L47x without a crystal 2.56 s.
STARTUP_MARGIN = 1.2
STARTUP_LEAST_S = 0.02

VOLTAGE_ADDRESS = 0xFFFF0000  # A virtual location of the loaders of F2, F4 and F7 (AN2606).
VOLTAGE_FAMILIES = frozenset({"F2", "F4", "F7"})
_VOLTAGE_CODES = ((2.7, 3), (2.4, 2), (2.1, 1))  # Lowest supply in volts; 4 would ask for 9 V on VPP and is never sent.


def first_baud(request: Request, chip: Chip | None) -> int:
    """The rate that is safe: configured, or preferred by the chip."""
    return request.baud or _usual(chip)


def start_baud(request: Request, chip: Chip | None) -> int:
    """The safe rate, or the one that took its place where it failed not long ago: nobody climbs down twice."""
    safe, bad = first_baud(request, chip), request.past.bad_bauds
    if safe not in bad:
        return safe
    return next((baud for baud in lower_bauds(safe, request, chip) if baud not in bad), safe)


def faster_bauds(request: Request, chip: Chip | None) -> tuple[int, ...]:
    """Rates above the safe one that are worth a reset, highest first."""
    if not request.bauds or not (request.wiring.has_reset or request.wiring.has_power):
        return ()
    safe, most = first_baud(request, chip), _most(chip)
    if chip and chip.first_baud < 115200:
        most = safe  # Its loader misses higher rates now and then (F7), or knows none.
    found = {baud for baud in request.bauds if safe < baud and (baud <= most or baud in request.past.good_bauds)}
    return tuple(sorted(found - set(request.past.bad_bauds), reverse=True))


def lower_bauds(below: int, request: Request, chip: Chip | None) -> tuple[int, ...]:
    """Rates to come down to, highest first, so that a session is no slower than its wire: the steps that everybody has, and
    those of the configured ladder. What failed here before is not among them while something else is."""
    most = _most(chip)
    found = {baud for baud in (*DESCENT, *request.bauds) if baud < below and (baud <= most or baud in request.past.good_bauds)}
    return tuple(sorted(found - set(request.past.bad_bauds) or found, reverse=True))


def lower_baud(baud: int, request: Request, chip: Chip | None) -> int:
    """The rate to go on with when ``baud`` makes too many errors. Below what the chip prefers only where the configured ladder
    goes there: a wire that loses bytes at the usual rate does so at a lower one, and takes longer."""
    usual = min(_usual(chip), first_baud(request, chip))
    lower = (*faster_bauds(request, chip), first_baud(request, chip), *lower_bauds(baud, request, chip))
    return max((other for other in lower if other < baud and (other >= usual or other in request.bauds)), default=baud)


def too_many(reconnections: Sequence[float]) -> bool:
    """Whether so many at one rate, at these times, are worth a lower one."""
    close = reconnections[-STEP_DOWN_AFTER:]
    return len(reconnections) >= STEP_DOWN_MOST or (
        len(close) == STEP_DOWN_AFTER and close[-1] - close[0] <= STEP_DOWN_WITHIN_S
    )


def attempts(request: Request, chip: Chip | None, again_at: int | None, *, erased: bool) -> list[tuple[int, float]]:
    """(baud, start-up wait) of each attempt: the waits that this chip may need, then lower rates, each once (AN2606, autobaud).

    ``again_at``: the rate at which the loader was reached before in this session. The rate is measured anew at each reset, so
    it gets some tries. Otherwise the rates that are faster than the safe one come first, each once, or twice where it worked
    before; and where the safe one failed not long ago, it comes last. ``erased``: see ``entry.enter``.
    """
    first = again_at or start_baud(request, chip)
    if request.startup_s:
        waits = [request.startup_s]
    else:
        waits = [max(STARTUP_LEAST_S, s * STARTUP_MARGIN) for s in (chip.startup_s if chip else UNKNOWN_STARTUP_S)]
    plan = []
    for baud in () if again_at else faster_bauds(request, chip):
        plan += [(baud, waits[0])] * (2 if baud in request.past.good_bauds else 1)
    plan += [(first, wait) for wait in waits]
    plan += [(first, waits[0])] * (2 if again_at else 1)
    for baud in lower_bauds(first, request, chip):
        plan += [(baud, waits[0])] * (2 if baud == TESTED_BAUD else 1)
    if not again_at and first != (safe := first_baud(request, chip)):
        plan.append((safe, waits[0]))
    if (request.wiring.has_reset or request.wiring.has_power) and not erased:
        return plan
    return [(first, max(waits))] * (1 if erased else 2) if request.by_application else [(first, waits[0])]


def must_prove(baud: int, safe: int, chip: Chip | None) -> bool:
    """Whether answers to Get and Get ID are too little to believe in ``baud``: it is above what is ``safe`` or usual."""
    return baud > min(safe, _usual(chip))


def likely_baud(request: Request, chip: Chip | None) -> int:
    """What a session will probably end up with: for an estimate beforehand."""
    known = [baud for baud in faster_bauds(request, chip) if baud in request.past.good_bauds]
    return max(known, default=start_baud(request, chip))


def _usual(chip: Chip | None) -> int:
    return chip.first_baud if chip else 115200


def _most(chip: Chip | None) -> int:
    """The highest rate that is tried unasked. The row of an F7 prefers 57600, because its loader measures 115200 wrong now and
    then: after a reset it may be right (AN2606), but twice as wrong at twice the rate is beyond any receiver."""
    if chip is None:
        return SOFTWARE_MOST_BAUD
    if chip.first_baud < 115200:
        return chip.max_baud
    return HARDWARE_MOST_BAUD if chip.hardware_autobaud else SOFTWARE_MOST_BAUD


def voltage_code(request: Request, chip: Chip) -> int:
    """What to write to ``VOLTAGE_ADDRESS``; 0 for nothing: supply unknown, another family, or what the loader assumes."""
    if chip.family not in VOLTAGE_FAMILIES or chip.foreign:
        return 0
    return next((code for volts, code in _VOLTAGE_CODES if request.supply_v >= volts), 0)
