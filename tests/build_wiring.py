"""Draws docs/pictures/wiring-*.svg from the wiring tables in config/examples: ``python -m tests.build_wiring [--check]``.

One source for both, so that a picture and the configuration beside it cannot differ. Plain SVG: no script, no font, no file
from elsewhere; a white ground, so that it can be read on a dark page and on paper.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "config" / "examples"
PICTURES = ROOT / "docs" / "pictures"

ROW = re.compile(
    r"^#   (?P<pi>GND|GPIO\d+(?: [TR]XD)?) +pin (?P<pin>\d+) +(?P<there>\S+) +(?P<connector>CN\d+) pin (?P<number>\d+)"
    r"(?: \([^)]*\))? +(?P<why>\S.*)$",
    re.MULTILINE,
)
COLOURS = {"GND": "#222222", "GPIO14 TXD": "#0050b0", "GPIO15 RXD": "#00733e", "GPIO17": "#b00020", "GPIO27": "#8a4b00"}

# What the picture has to warn of: a few words each, longer in the example's head.
TRAPS = {
    "nucleo-l476rg": (
        "PA9/PA10 are free on this board; PA2/PA3 is the ST-LINK's virtual port, which this loader hears too.",
        "Without a working 32 kHz crystal the loader listens only 2.6 s after reset.",
    ),
    "nucleo-f756zg": (
        "NOT PA9/PA10: the USB connector CN13 (VBUS, ID) loads them. Leave CN13 unplugged.",
        "NOT the ST-LINK's virtual port (PD8/PD9): this loader does not hear it.",
        "No option byte needs a change: BOOT_ADD0 = 0x0040 would keep the application from ever starting.",
    ),
    "nucleo-h743zi": (
        "NOT PC10/PC11 (those are the F756's), NOT PA9/PA10 (USB connector CN13), NOT PA2 (Ethernet).",
        "NOT the ST-LINK's virtual port (PD8/PD9). PB15 must not be held low. The red LED (PB14) glows in the loader.",
        "No option byte needs a change: 0x0040 of an F7 is no memory on an H7.",
    ),
}


@dataclass(frozen=True)
class Wire:
    pi: str
    pin: int
    there: str
    connector: str
    number: int
    why: str


def wires(example: Path) -> list[Wire]:
    """The table in the head of an example configuration."""
    return [
        Wire(m["pi"], int(m["pin"]), m["there"], m["connector"], int(m["number"]), m["why"].split(" (")[0])
        for m in ROW.finditer(example.read_text())
    ]


def board(example: Path) -> str:
    return example.read_text().split("\n", 1)[0].removeprefix("# ").split(" at a ")[0]


class Svg:
    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" role="img">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        ]

    def rect(self, x: float, y: float, w: float, h: float, fill: str, stroke: str = "#444444", radius: float = 0) -> None:
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}" fill="{fill}" stroke="{stroke}"/>'
        )

    def text(
        self, x: float, y: float, text: str, size: int = 14, anchor: str = "start", fill: str = "#111111", bold: bool = False
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{weight}>{escape(text)}</text>'
        )

    def line(self, points: list[tuple[float, float]], colour: str, width: float = 2.5) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"/>')

    def circle(self, x: float, y: float, r: float, fill: str) -> None:
        self._parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{r:g}" fill="{fill}" stroke="#444444"/>')

    def end(self) -> str:
        return "\n".join([*self._parts, "</svg>"]) + "\n"


WIDTH, HEADER_X, HEADER_Y, PITCH = 960, 130, 112, 34
BOARD_X, BOARD_W = 640, 200


def draw(example: Path) -> str:
    name, found = board(example), wires(example)
    traps = TRAPS[example.stem]
    height = 500 + 24 * len(traps)
    svg = Svg(WIDTH, height, f"Wiring of a {name} at a Raspberry Pi: {'; '.join(f'{w.pi} to {w.there}' for w in found)}")
    svg.text(20, 34, f"{name} at a Raspberry Pi", 22, bold=True)
    svg.text(20, 58, "Not tried on silicon. Pin numbers of the board are from memory: compare them with its manual first.", 14)
    _header(svg, {w.pin: w for w in found})
    svg.rect(BOARD_X, HEADER_Y - 22, BOARD_W, 300, "#eef3fa", radius=10)
    svg.text(BOARD_X + BOARD_W / 2, HEADER_Y + 2, name.split(" (")[0], 15, "middle", bold=True)
    for number, wire in enumerate(found):
        _wire(svg, wire, number)
    top = 430
    svg.text(20, top, "Beware:", 15, bold=True)
    notes = ("3.3 V only; GND first, with the power off.", *traps)
    for number, text in enumerate(notes):
        svg.text(36, top + 24 * (number + 1), f"•  {text}", 14)
    return svg.end()


def _header(svg: Svg, used: dict[int, Wire]) -> None:
    """Pins 1 to 14: the end of the 40-pin header that is away from the USB sockets."""
    svg.rect(HEADER_X - 26, HEADER_Y - 22, 52 + PITCH, 7 * PITCH + 36, "#f3f3f3", radius=6)
    svg.text(HEADER_X + PITCH / 2, HEADER_Y - 30, "40-pin header, end at the SD card", 13, "middle")
    for pin in range(1, 15):
        x = HEADER_X + PITCH * ((pin - 1) % 2)
        y = HEADER_Y + PITCH * ((pin - 1) // 2)
        wire = used.get(pin)
        svg.circle(x, y, 11, COLOURS[wire.pi] if wire else "#ffffff")
        svg.text(x, y + 4, str(pin), 11, "middle", "#ffffff" if wire else "#555555")
        if wire and pin % 2:
            svg.text(HEADER_X - 34, y + 5, wire.pi, 13, "end", COLOURS[wire.pi])


def _wire(svg: Svg, wire: Wire, number: int) -> None:
    colour = COLOURS[wire.pi]
    x = HEADER_X + PITCH * ((wire.pin - 1) % 2)
    y = HEADER_Y + PITCH * ((wire.pin - 1) // 2)
    to_y = HEADER_Y + 40 + 52 * number
    # Each wire turns in a column of its own, so that none lies on another.
    column = 330 + 14 * (5 - number)
    start = x + 11
    if wire.pin % 2:  # From the left column, between the pins of the right one.
        svg.line([(start, y), (start + 4, y), (start + 10, y + PITCH / 2), (column, y + PITCH / 2), (column, to_y)], colour)
    else:
        svg.line([(start, y), (column, y), (column, to_y)], colour)
    svg.line([(column, to_y), (BOARD_X, to_y)], colour)
    svg.text(400, to_y - 8, f"{wire.pi} → {wire.there}", 13, fill=colour, bold=True)
    svg.circle(BOARD_X, to_y, 6, colour)
    svg.text(BOARD_X + 14, to_y + 1, wire.there, 15, bold=True)
    svg.text(BOARD_X + 84, to_y + 1, f"{wire.connector} pin {wire.number}", 14)
    svg.text(BOARD_X + 14, to_y + 18, wire.why, 12, fill="#444444")
    if wire.there == "BOOT0":
        svg.rect(565, to_y - 7, 40, 14, "#ffffff", colour)
        svg.text(585, to_y + 4, "1 kΩ", 11, "middle")
        svg.line([(BOARD_X - 18, to_y), (BOARD_X - 18, to_y + 18)], colour)
        svg.rect(BOARD_X - 25, to_y + 18, 14, 32, "#ffffff", colour)
        svg.text(BOARD_X - 32, to_y + 38, "10 kΩ, always: a line that nobody drives must be low", 12, "end")
        svg.line([(BOARD_X - 18, to_y + 50), (BOARD_X - 18, to_y + 58)], colour)
        svg.line([(BOARD_X - 30, to_y + 58), (BOARD_X - 6, to_y + 58)], "#222222", 3)
        svg.text(BOARD_X - 2, to_y + 62, "GND", 11)
    if wire.there == "NRST":
        svg.text(400, to_y + 16, "pulled low or let go, never pushed high", 12)


def pictures() -> dict[Path, str]:
    return {PICTURES / f"wiring-{path.stem}.svg": draw(path) for path in sorted(EXAMPLES.glob("nucleo-*.toml"))}


def stale() -> list[str]:
    return [path.name for path, text in pictures().items() if not path.exists() or path.read_text() != text]


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(f"run: python -m tests.build_wiring ({', '.join(stale())})" if stale() else 0)
    for file, content in pictures().items():
        file.write_text(content)
        print(file.relative_to(ROOT))
