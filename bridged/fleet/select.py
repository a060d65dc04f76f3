"""Which targets: by labels and inventory; and which of them run something else than they should. Pure: no I/O, no clock.

A selector is terms that must all hold, each KEY and a comparison: ``site=berlin``, ``chip=F7*``, ``image_name!=blinky-2*``,
``version<1.2``. ``=`` and ``!=`` compare with a pattern of the shell, ``<`` and its like compare versions of numbers and dots.
Keys are the fields of the inventory (``FIELDS``), and any other is a label. A key that a target does not have is empty text: it
equals ``""`` and ``*``, differs from everything else, and is older than every version.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from bridged.errors import BadRequest

FIELDS = (
    *("gateway", "target", "state", "chip", "pid", "family", "names", "uid", "flash_bytes", "loader"),
    *("content", "image", "image_name", "version", "evidence", "bridged"),
)
_TERM = re.compile(r"([A-Za-z0-9_.-]{1,32})(!=|<=|>=|=|<|>)(.*)")

Row = Mapping[str, Any]  # What a gateway said of one target: ``connector.INVENTORY``, gateway, target, labels.


@dataclass(frozen=True, slots=True)
class Term:
    key: str
    how: str
    value: str

    def holds(self, row: Row) -> bool:
        found = value_of(row, self.key)
        match self.how:
            case "=":
                return fnmatchcase(found, self.value)
            case "!=":
                return not fnmatchcase(found, self.value)
        ours, theirs = _version(found), _version(self.value)
        return {"<": ours < theirs, "<=": ours <= theirs, ">": ours > theirs, ">=": ours >= theirs}[self.how]


def terms(words: Iterable[str]) -> list[Term]:
    """Raises ``BadRequest``."""
    found = []
    for word in words:
        parts = _TERM.fullmatch(word)
        if parts is None:
            raise BadRequest(f"{word[:60]!r} selects nothing: expected KEY=PATTERN, KEY!=PATTERN or KEY<VERSION (also <= > >=)")
        term = Term(*parts.groups())
        if term.how in ("<", "<=", ">", ">=") and not _version(term.value):
            raise BadRequest(f"{word[:60]!r}: {term.value[:20]!r} is no version of numbers and dots")
        found.append(term)
    return found


def chosen(rows: Iterable[Row], wanted: Sequence[Term]) -> list[Row]:
    return [row for row in rows if all(term.holds(row) for term in wanted)]


def value_of(row: Row, key: str) -> str:
    labels = row.get("labels")
    value = row.get(key) if key in FIELDS else labels.get(key) if isinstance(labels, Mapping) else None
    return "" if value is None else f"{value:#05x}" if key == "pid" and isinstance(value, int) else str(value)


def _version(text: str) -> tuple[int, ...]:
    parts = text.removeprefix("v").split(".")
    if not all(part.isascii() and part.isdigit() for part in parts):
        return ()
    found = [int(part) for part in parts]
    while len(found) > 1 and not found[-1]:
        found.pop()
    return tuple(found)


# --- drift ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Drift:
    """``wanted``: SHA-256 of the artifact that the last roll-out gave this target, and ``rollout`` its name. ``runs``: what was
    last proven there, empty where nothing is known. ``what``: ``as wanted``, ``drifted``, ``unknown`` (nothing is proven), or
    ``missing`` (the gateway has no such target any more)."""

    gateway: str
    target: str
    wanted: str
    rollout: str
    runs: str
    what: str


def drift(desired: Mapping[tuple[str, str], tuple[str, str]], rows: Iterable[Row]) -> list[Drift]:
    """``desired``: artifact and roll-out for each gateway and target."""
    known = {(str(row.get("gateway")), str(row.get("target"))): row for row in rows}
    found = []
    for (gateway, target), (wanted, rollout) in sorted(desired.items()):
        row = known.get((gateway, target))
        runs = str(row.get("image") or "") if row is not None else ""
        # Of one image without an address the inventory has its SHA-256 and nothing else; of others also where they belong.
        what = "missing" if row is None else "unknown" if not runs else "as wanted" if wanted in runs else "drifted"
        found.append(Drift(gateway, target, wanted, rollout, runs, what))
    return found
