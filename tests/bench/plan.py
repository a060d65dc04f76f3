"""What is measured, in which order of importance, and what of it fits into the time there is. Pure.

A *group* is a set of cells that are compared with each other, so they are run in one *round*: every host once in each
condition, in an order that turns with the round, so that what the machine does meanwhile meets all alike. ``ORDER`` says up to
how many runs that count each group is brought before the next one has its turn; a measurement of any length is therefore the
most important part of a longer one, and a later one goes on where the earlier one ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.bench.figures import BITS_PER_BYTE, Cell, Run

ENOUGH_RUNS = 7
ATTEMPTS = 3  # For each run that is wanted: on a machine with no quiet moment a measurement ends nevertheless.
BLOCK_BYTES, FRAMED_BYTES = 256, 268  # Of Write and of Read Memory
PROGRAM_S = 16e-6 / 4  # A byte, see device.c
SCENE_S = 4.0  # A daemon, its devices and its load, for all hosts of one condition
COST_S = 200.0  # What the daemon costs, and growth; measured once

# What a run takes beyond the wire's time, at most as a rule; only to foresee whether it fits.
SLOWER = {"idle": 1.08, "api": 1.2, "hogs": 1.35}
START_S = 1.2

ALL = ("session", "daemon", "stm32flash", "stm32flash-rt", "stm32loader", "streams")
OURS_AND_REFERENCE = ("session", "daemon", "stm32flash")


@dataclass(frozen=True, slots=True)
class Group:
    name: str
    what: str
    cells: tuple[Cell, ...]


def _cells(
    hosts: Sequence[str], bauds: Sequence[int], conditions: Sequence[str], kib: int, targets: Sequence[int] = (1,)
) -> tuple[Cell, ...]:
    return tuple(Cell(h, b, c, kib, t) for b in bauds for c in conditions for t in targets for h in hosts)


GROUPS = {
    group.name: group
    for group in (
        Group("fast", "every host at 921600 baud, idle and under API load", _cells(ALL, (921600,), ("idle", "api"), 256)),
        Group("slow", "at 115200 baud", _cells(OURS_AND_REFERENCE, (115200,), ("idle", "api"), 256)),
        Group(
            "hogs",
            "921600 baud beside two processes that never sleep",
            _cells((*ALL[:4], "session-plain"), (921600,), ("hogs",), 256),
        ),
        Group(
            "parallel",
            "several targets at once",
            _cells(("daemon",), (115200,), ("idle",), 64, (1, 2, 4, 8))
            + _cells(("daemon",), (921600,), ("idle",), 128, (1, 2))
            + _cells(("stm32flash",), (115200,), ("idle",), 64, (1, 8)),
        ),
        Group(
            "rates",
            "from 57600 to 921600 baud",
            _cells(("session", "stm32flash"), (57600, 230400, 460800, 921600), ("idle",), 64),
        ),
    )
}
COST = "cost"

# (group, runs that count): the order of importance.
ORDER: tuple[tuple[str, int], ...] = (
    ("fast", 3),
    ("parallel", 1),
    ("slow", 1),
    (COST, 1),
    ("hogs", 3),
    ("fast", 7),
    ("hogs", 7),
    ("slow", 2),
    ("parallel", 3),
    ("slow", 3),
    ("rates", 2),
    ("parallel", 7),
    ("slow", 7),
    ("rates", 7),
)


@dataclass(frozen=True, slots=True)
class Round:
    """``cells``: in the order in which they are run; those of one scene (rate, condition, targets) are neighbours."""

    group: str
    number: int
    cells: tuple[Cell, ...]
    seconds: float


def scene_of(cell: Cell) -> tuple[int, str, int, int]:
    return cell.baud, cell.condition, cell.kib, cell.targets


def wire_s(cell: Cell) -> float:
    size = cell.kib * 1024
    return size // BLOCK_BYTES * 2 * FRAMED_BYTES * BITS_PER_BYTE / cell.baud + size * PROGRAM_S


def expected_s(cell: Cell, took: Mapping[Cell, Sequence[float]]) -> float:
    """As long as it took before, or by arithmetic."""
    if known := took.get(cell):
        return sum(known) / len(known)
    return wire_s(cell) * SLOWER[cell.condition] + START_S


def round_s(cells: Iterable[Cell], took: Mapping[Cell, Sequence[float]]) -> float:
    chosen = tuple(cells)
    return sum(expected_s(cell, took) for cell in chosen) + SCENE_S * len({scene_of(cell) for cell in chosen})


def turned(cells: Sequence[Cell], number: int) -> Iterator[Cell]:
    """Scene by scene; in each, another host comes first in every round."""
    scenes: dict[tuple[int, str, int, int], list[Cell]] = {}
    for cell in cells:
        scenes.setdefault(scene_of(cell), []).append(cell)
    for scene in scenes.values():
        at = number % len(scene)
        yield from (*scene[at:], *scene[:at])


def next_round(
    runs: Sequence[Run],
    left_s: float,
    *,
    cost_done: bool,
    groups: Iterable[str] = (*GROUPS, COST),
    hosts: Iterable[str] = (*ALL, "session-plain"),
    most_runs: int = ENOUGH_RUNS,
) -> Round | None:
    """The most important round that fits into ``left_s``; None when nothing is wanted or nothing fits.

    A cell whose run was rejected comes again in a round of the cells that lack one, until it has had its ``ATTEMPTS``.
    """
    wanted_groups, wanted_hosts = frozenset(groups), frozenset(hosts)
    counted = Counter(run.cell for run in runs if not run.rejected)
    tried = Counter(run.cell for run in runs)
    took: dict[Cell, list[float]] = {}
    for run in runs:
        took.setdefault(run.cell, []).append(run.took_s)
    for name, level in ORDER:
        if name not in wanted_groups:
            continue
        if name == COST:
            if not cost_done and left_s >= COST_S:
                return Round(COST, 0, (), COST_S)
            continue
        most = min(level, most_runs)
        cells = [cell for cell in GROUPS[name].cells if cell.host in wanted_hosts and tried[cell] < ATTEMPTS * most]
        short = [cell for cell in cells if counted[cell] < most]
        if not short:
            continue
        # Those that have the fewest first, so that a round is whole unless a run was rejected.
        number = min(counted[cell] for cell in short)
        chosen = tuple(turned([cell for cell in short if counted[cell] == number], max(tried[cell] for cell in short)))
        if (seconds := round_s(chosen, took)) <= left_s:
            return Round(name, number, chosen, seconds)
    return None
