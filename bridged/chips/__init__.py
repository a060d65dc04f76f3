"""What we know of each STM32, by product id (Get ID, 0x02): ``by_pid`` for a session, ``find`` for a configuration.

``model`` has the shape and the few computations, ``rows`` the vocabulary of the tables, ``table_*`` the facts. Tables are
loaded as look-ups need them, so that a session process pays for one or two and not for all.

This room knows nothing of images, targets or files, does no I/O, and imports nothing but errors.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Mapping

from bridged.chips.model import Chip
from bridged.errors import UnknownChip

# The likely ones first: a look-up stops at the table that has the product id.
TABLES = ("f2_f4_f7", "l", "g_c", "f0_f1_f3", "h", "u_w", "foreign")


class _Chips(Mapping[int, Chip]):
    """All rows by product id, read-only. A look-up loads one table after the other until it finds the product id."""

    def __init__(self) -> None:
        self._rows: dict[int, Chip] = {}
        self._unread = list(TABLES)

    def _load_next(self) -> None:
        chip: Chip
        for chip in importlib.import_module(f"bridged.chips.table_{self._unread[0]}").CHIPS:
            if chip.pid in self._rows:
                raise ValueError(f"product id {chip.pid:#x} has two rows: {self._rows[chip.pid].title}, {chip.title}")
            self._rows[chip.pid] = chip
        self._unread.pop(0)

    def _all(self) -> dict[int, Chip]:
        while self._unread:
            self._load_next()
        return self._rows

    def __getitem__(self, pid: int) -> Chip:
        while pid not in self._rows and self._unread:
            self._load_next()
        return self._rows[pid]

    def __iter__(self) -> Iterator[int]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


CHIPS: Mapping[int, Chip] = _Chips()


def by_pid(pid: int) -> Chip:
    """The chip that answered Get ID with ``pid``. Raises ``UnknownChip``."""
    chip = CHIPS.get(pid)
    if chip is None:
        raise UnknownChip(f"no table has the product id {pid:#05x}", pid=pid)
    return chip


def find(text: str) -> Chip:
    """The chip that a person means: ``0x449``, ``F756``, ``STM32F756ZG``, ``stm32l476rgt6``.

    A part number may be cut short as long as one product id is left. Raises ``UnknownChip``, which names the candidates where
    there are several and like names where there is none.
    """
    wanted = text.strip().upper()
    if re.fullmatch(r"0X[0-9A-F]{1,8}", wanted):
        return by_pid(int(wanted, 16))
    wanted = wanted.removeprefix("STM32") or wanted
    whole: dict[int, list[Chip]] = {}  # by length of the name: the longest name that fits is the most particular
    partly: list[Chip] = []
    for chip in CHIPS.values():
        for pattern in {p for name in chip.names for p in _patterns(name)}:
            compared = min(len(pattern), len(wanted))
            if not compared or not _fits(pattern[:compared], wanted[:compared]):
                continue
            if compared == len(pattern):
                whole.setdefault(len(pattern), []).append(chip)
            else:
                partly.append(chip)
    found = {chip.pid: chip for chip in (whole[max(whole)] if whole else partly)}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        listed = "; ".join(chip.title for chip in found.values())
        raise UnknownChip(f"chip {text!r} may be any of: {listed}", chip=text, candidates=len(found))
    like = _like(wanted)
    raise UnknownChip(f"no chip is called {text!r}" + (f"; did you mean {like}?" if like else ""), chip=text)


def wrong_choice(name: str, layout: str, ranges: Iterable[tuple[str, int, int]] = ()) -> Iterator[tuple[str, str]]:
    """What is wrong with ``chip`` and ``layout`` of a configuration, and with ``ranges`` of its flash (key, start, end): the
    key and a sentence (``config.ChipCheck``)."""
    if not name:
        if layout:
            yield "layout", "has a meaning only together with chip"
        return
    try:
        chip = find(name)
    except UnknownChip as error:
        yield "chip", error.message
        return
    known = list(dict.fromkeys(variant.name for variant in chip.layouts))
    if layout and layout not in known:
        yield "layout", f"{layout!r} is not a layout of {chip.title}; known: {', '.join(known) or 'none'}"
    flash_end = chip.flash_base + chip.flash_max_bytes
    for key, start, end in ranges if chip.flash_max_bytes else ():
        if end <= chip.flash_base or flash_end <= start:
            yield key, f"is no flash of {chip.title}, which lies at {chip.flash_base:#010x}..{flash_end - 1:#010x}"


def _patterns(name: str) -> list[str]:
    """``F103x8/B`` stands for ``F103x8`` and ``F103xB``; what follows the alternatives (``-A``) belongs to each."""
    match = re.fullmatch(r"([^/]*)(\w(?:/\w)+)(.*)", name)
    if match is None:
        return [name]
    return [match[1] + letter + match[3] for letter in match[2].split("/")]


def _fits(pattern: str, text: str) -> bool:
    """``x`` in a pattern is any character, as in ST's names."""
    return all(p == "x" or p.upper() == t for p, t in zip(pattern, text, strict=True))


def _like(wanted: str) -> str:
    """Names that a slip of the finger turns into ``wanted``; the beginning counts most, for the family is seldom wrong."""

    def likeness(name: str) -> int:
        name = name.upper()
        same = [a == b for a, b in zip(name, wanted, strict=False)]
        beginning = same.index(False) if False in same else len(same)
        swapped = sorted(name) == sorted(wanted[: len(name)])
        return 2 * beginning + sum(same) + 4 * swapped

    names = {name: likeness(name) for chip in CHIPS.values() for name in chip.names}
    best = sorted((name for name, score in names.items() if score >= 6), key=lambda name: -names[name])
    return ", ".join(best[:4])
