"""Boards whose wiring is a trap for the loader's UART, as rows; the pins that a loader hears are in ``chips``.

What stands in docs/wiring.md for people stands here for ``doctor``. Loader pins are ST's (AN2606); where a board leads its
virtual port and what else hangs on a pin is from board files, forum reports and memory, and was not tried on silicon.
"""

from __future__ import annotations

from dataclasses import dataclass

# USB ids of the ST-LINK/V2-1 and V3 as udev rules have them: vendor 0483, products 374x and 375x.
STLINK_VENDOR = "0483"
STLINK_PRODUCTS = ("374", "375")

# TX/RX of the target behind the virtual port, by the usual size of the board.
USUAL_VIRTUAL_PORTS = {"PA2/PA3": "NUCLEO-64 and NUCLEO-32", "PD8/PD9": "NUCLEO-144"}


@dataclass(frozen=True, slots=True)
class Board:
    """``virtual_port``: pins behind the ST-LINK's virtual port, empty without one; ``traps``: a sentence."""

    name: str
    pid: int
    virtual_port: str
    traps: str


BOARDS = (
    Board("NUCLEO-L476RG", 0x415, "PA2/PA3", "its virtual port leads to PA2/PA3, which the loader hears"),
    Board(
        "NUCLEO-F756ZG",
        0x449,
        "PD8/PD9",
        "use PC10/PC11 or PB10/PB11; PA9/PA10 are loaded by its USB connector (VBUS, ID), and its virtual port (PD8/PD9) is not"
        " heard",
    ),
    Board(
        "NUCLEO-H743ZI",
        0x450,
        "PD8/PD9",
        "use PB10/PB11; PA9/PA10 are loaded by its USB connector (VBUS, ID), PA2 is Ethernet, PB15 must not be low, and its"
        " virtual port (PD8/PD9) is not heard",
    ),
    Board("Blue Pill", 0x410, "", "the BOOT1 jumper must be at 0"),
)


def board_of(pid: int) -> Board | None:
    """The board of which traps are known for this product id."""
    return next((board for board in BOARDS if board.pid == pid), None)


def is_stlink(vendor: str, product: str) -> bool:
    return vendor == STLINK_VENDOR and product.startswith(STLINK_PRODUCTS)
