"""Boards whose wiring is a trap for the loader's UART, as rows; the pins that a loader hears are in ``chips``.

What stands in docs/wiring.md for people stands here for ``doctor``. Loader pins are ST's (AN2606); where a board leads its
virtual port and what else hangs on a pin is from board files, forum reports and memory, and was not tried on silicon.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# USB ids of the ST-LINK/V2-1 and V3 as udev rules have them: vendor 0483, products 374x and 375x.
STLINK_VENDOR = "0483"
STLINK_PRODUCTS = ("374", "375")

# TX/RX of the target behind the virtual port, by the usual size of the board.
USUAL_VIRTUAL_PORTS = {"PA2/PA3": "NUCLEO-64 and NUCLEO-32", "PD8/PD9": "NUCLEO-144"}


@dataclass(frozen=True, slots=True)
class Board:
    """``chip``: as a configuration names its part; ``virtual_port``: pins behind the ST-LINK's virtual port, empty without one;
    ``traps``: a sentence."""

    name: str
    pid: int
    chip: str
    virtual_port: str
    traps: str


BOARDS = (
    Board("NUCLEO-L476RG", 0x415, "L476", "PA2/PA3", "its virtual port leads to PA2/PA3, which the loader hears"),
    Board(
        "NUCLEO-F756ZG",
        0x449,
        "F756",
        "PD8/PD9",
        "use PC10/PC11 or PB10/PB11; PA9/PA10 are loaded by its USB connector (VBUS, ID), and its virtual port (PD8/PD9) is not"
        " heard",
    ),
    Board(
        "NUCLEO-H743ZI",
        0x450,
        "H743",
        "PD8/PD9",
        "use PB10/PB11; PA9/PA10 are loaded by its USB connector (VBUS, ID), PA2 is Ethernet, PB15 must not be low, and its"
        " virtual port (PD8/PD9) is not heard",
    ),
    Board("Blue Pill", 0x410, "F103C8", "", "the BOOT1 jumper must be at 0"),
)

MINI_UART = "bcm2835-aux-uart"  # Driver, and end of the name in the device tree.


@dataclass(frozen=True, slots=True)
class Pi:
    """A Raspberry Pi: how its model begins, and what /boot/firmware/config.txt needs so that a PL011 is on pins 8 and 10.
    From Raspberry Pi's documentation, the Pi 5 from memory."""

    name: str
    config_lines: tuple[str, ...]


PIS = (
    Pi("Raspberry Pi 3", ("enable_uart=1", "dtoverlay=disable-bt")),
    Pi("Raspberry Pi 4", ("enable_uart=1", "dtoverlay=disable-bt")),
    Pi("Raspberry Pi 5", ("dtparam=uart0=on",)),
    Pi("Raspberry Pi Zero 2 W", ("enable_uart=1", "dtoverlay=disable-bt")),
)


def pi_of(model: str) -> Pi | None:
    """``model``: as the device tree has it, ``Raspberry Pi 4 Model B Rev 1.4``."""
    return next((pi for pi in PIS if re.match(rf"{pi.name}\b", model)), None)


def board_of(pid: int) -> Board | None:
    """The board of which traps are known for this product id."""
    return next((board for board in BOARDS if board.pid == pid), None)


def is_stlink(vendor: str, product: str) -> bool:
    return vendor == STLINK_VENDOR and product.startswith(STLINK_PRODUCTS)
