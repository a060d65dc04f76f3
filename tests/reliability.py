"""``make reliability``: what one fault does to a session, tried at position after position, written to docs/reliability.md.

Virtual time, seven kinds of parts, the session that runs in the field. Each run flashes a short image over an older one with
one fault; a second table tries the other kinds of jobs, a third a supply that fails where it can be switched. *Recovered*: the
job succeeded, and the device agrees. *Failed cleanly*: a typed error, lines idle. A *false success* or a *hang* (more virtual
time than the session states, see ``tests.target.kinds.overtime``) would be a defect; the command ends with 1 then.

The rows for stm32flash 0.7 and stm32loader 0.7.1 are measurements on a modelled device with one fault at one position each.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from bridged.errors import BridgedError
from bridged.sim.application import Behaviour
from bridged.sim.loader import Timing
from bridged.target.request import Result, Wiring
from tests import product
from tests.target.bench import WIRED, Bench, make_image
from tests.target.kinds import (
    KINDS,
    PARTS,
    POWER_ONLY,
    POWERED,
    SIZE,
    bench_of,
    judge,
    overtime,
    run_kind,
    traffic_of,
)
from tests.vm.record import revision

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
traffic = cache(traffic_of)
NAMES = {"0x410": "F103", "G071": "G071"}


@dataclass(frozen=True)
class Row:
    """One kind of fault. ``peers``: what stm32flash 0.7 and stm32loader 0.7.1 did with it."""

    title: str
    peers: tuple[str, str] = ("", "")
    permanent: bool = False

    def faults(self, part: str, most: int) -> Iterator[list[str]]:
        raise NotImplementedError


@dataclass(frozen=True)
class Bytes(Row):
    """At every byte of the session (or at ``most`` of them, evenly spread)."""

    way: str = "lose"
    side: str = "rx"
    values: tuple[str, ...] = ("",)

    def faults(self, part: str, most: int) -> Iterator[list[str]]:
        count = traffic(part, "flash", WIRED)[self.side == "tx"]
        step = max(1, count * len(self.values) // most)
        for position in range(0, count, step):
            for value in self.values:
                yield [f"{self.way}:{self.side}:{position}{value}"]


@dataclass(frozen=True)
class Stages(Row):
    """At every stage of the first commands of each kind."""

    way: str = "nack"
    after: str = ""

    def faults(self, part: str, most: int) -> Iterator[list[str]]:  # noqa: ARG002
        erase = "0x43" if part == "0x410" else "0x44"
        table = {
            "0x00": ("opcode",),
            "0x02": ("opcode",),
            "0x11": ("opcode", "address", "length"),
            "0x31": ("opcode", "address", "data"),
            erase: ("opcode", "list"),
        }
        for opcode, stages in table.items():
            for stage in stages:
                for which in range(4 if opcode in ("0x11", "0x31") else 1):
                    yield [f"{self.way}:{opcode}:{which}:{stage}{self.after}"]


@dataclass(frozen=True)
class Cells(Row):
    """At cells all over the image."""

    way: str = "misprogram"
    after: str = ""

    def faults(self, part: str, most: int) -> Iterator[list[str]]:  # noqa: ARG002
        for offset in range(0, SIZE, max(1, SIZE // most)):
            yield [f"{self.way}:{0x08000000 + offset:#x}{self.after}"]


@dataclass(frozen=True)
class Given(Row):
    """Exactly these."""

    what: tuple[tuple[str, ...], ...] = ()

    def faults(self, part: str, most: int) -> Iterator[list[str]]:  # noqa: ARG002
        yield from (list(w) for w in self.what)


ROWS: tuple[Row, ...] = (
    Bytes("byte lost, host to target", ("failed", "failed"), way="lose", side="rx"),
    Bytes("bit flipped, host to target", ("failed", "failed"), way="flip", side="rx", values=(":0x01", ":0x80")),
    Bytes("extra byte, host to target", way="insert", side="rx", values=(":0x00", ":0x7f", ":0xff")),
    Bytes("byte lost, target to host (ACKs, lost sync ACK too)", ("failed", "failed"), way="lose", side="tx"),
    Bytes("bit flipped, target to host (corrupt ACK)", ("failed", "failed"), way="flip", side="tx", values=(":0x01", ":0x80")),
    Bytes(
        "extra byte, target to host (noise before an ACK)",
        ("failed", "failed"),
        way="insert",
        side="tx",
        values=(":0x00", ":0x79", ":0x1f"),
    ),
    Stages("NACK once, each stage", ("failed", "failed"), way="nack"),
    Stages("ACK late by 1 s, each stage", way="late", after=":1"),
    Bytes("target resets by itself", way="reset", side="rx"),
    Bytes("loader wedged until reset", way="hang", side="rx"),
    Cells("word misprogrammed once", ("recovered by rewriting the block", "failed"), way="misprogram"),
    Cells("read-back glitch", ("recovered by REWRITING the block", "failed although flash was right"), way="misread"),
    Given("erase that never answers, once", ("failed", "failed"), what=(("erase-hang:0",), ("erase-hang:1",))),
    Cells("word that cannot be programmed", ("failed", "failed"), permanent=True, way="misprogram", after=":0x01:*"),
    Given(
        "erase that never answers, ever",
        ("failed", "failed"),
        permanent=True,
        what=(tuple(f"erase-hang:{n}" for n in range(6)),),
    ),
)


@dataclass
class Tally:
    tried: int = 0
    recovered: int = 0
    codes: Counter[str] | None = None
    false: int = 0
    hangs: int = 0

    def add(self, bench: Bench) -> None:
        image = make_image(bench.chip, SIZE)
        self.codes = self.codes if self.codes is not None else Counter()
        self.tried += 1
        try:
            bench.run("flash", image, discard_outside=True)
        except BridgedError as error:
            self.codes[error.code] += 1
        else:
            self.recovered += bench.holds(image)
            self.false += not bench.holds(image)
        self.hangs += overtime(bench) != ""

    def take(self, bench: Bench, name: str, wiring: Wiring) -> None:
        """The same for any kind of job."""
        self.codes = self.codes if self.codes is not None else Counter()
        self.tried += 1
        result: Result | None = None
        error: BridgedError | None = None
        try:
            result = run_kind(bench, name, wiring)
        except BridgedError as caught:
            error = caught
            self.codes[error.code] += 1
        wrong = judge(bench, name, result, error)
        late = overtime(bench) != ""
        self.hangs += late
        self.false += bool(wrong) and not late
        self.recovered += result is not None and not wrong

    def text(self) -> str:
        failed = self.tried - self.recovered - self.false
        return f"{self.recovered}/{self.tried}" + (f" ({failed} failed)" if failed else "")


# Every way in which one byte can go wrong, for the jobs that are not a plain flash.
WAYS = (
    *(("lose", side, "") for side in ("rx", "tx")),
    *(("flip", side, value) for side in ("rx", "tx") for value in (":0x01", ":0x80")),
    *(("insert", side, value) for side in ("rx", "tx") for value in (":0x00", ":0x79", ":0x7f")),
    ("reset", "rx", ""),
    ("hang", "rx", ""),
)
FEW = ("0x410", "L476", "F756", "H743")
SUPPLY = (("supply fails, NRST and power wired", POWERED), ("supply fails, power wired and no NRST", POWER_ONLY))


def positions(part: str, name: str, wiring: Wiring, side: str, most: int) -> range:
    """Where in the job; of a reset into the loader not its last byte: what happens after its last answer nobody sees."""
    count = traffic(part, name, wiring)[side == "tx"] - (name == "reset into the loader" and side == "rx")
    return range(0, count, max(1, count // most))


def other_kinds(most: int) -> Iterator[tuple[str, list[Tally]]]:
    """A row for each kind of job: all ways together, ``most`` positions for each."""
    for name in KINDS:
        if name == "flash":
            continue
        tallies = []
        for part in FEW:
            tally = Tally(codes=Counter())
            for way, side, value in WAYS:
                for position in positions(part, name, WIRED, side, most):
                    tally.take(bench_of(part, [f"{way}:{side}:{position}{value}"]), name, WIRED)
            tallies.append(tally)
        yield name, tallies


def supplies(most: int) -> Iterator[tuple[str, list[Tally]]]:
    """The supply of the target fails at a byte, and stays off until it is switched on again."""
    for title, wiring in SUPPLY:
        for name in ("flash", "verify", "erase"):
            tallies = []
            for part in FEW:
                tally = Tally(codes=Counter())
                for position in positions(part, name, wiring, "rx", most):
                    tally.take(bench_of(part, [f"power:rx:{position}"]), name, wiring)
                tallies.append(tally)
            yield f"{title}: {name}", tallies


def situations() -> list[tuple[str, str, str, str]]:
    """Cases that are no positions: title, what ours does, stm32flash, stm32loader."""
    found = []
    slow = Bench("F756", {"timing": Timing(sector_erase_s=20.0, spread=0)})
    slow.run("flash", make_image(slow.chip, 4000), discard_outside=True)
    found.append(("one sector erase takes 20 s (12 s for the peers)", "waited for", "failed, deaf device", "mass erases only"))
    echo = Bench("G071", {"application": Behaviour(echo=True)})  # From the factory a G0 ignores its BOOT0 pin.
    echo.put(make_image(echo.chip, SIZE))
    found.append(("application runs and echoes", _code(echo), "failed", "failed"))
    found.append(("readout protection", _code(Bench("F407", {"rdp": 1})), "failed, no reason", "failed, with a hint"))
    found.append(("another chip than configured", _code(Bench("F407"), chip="L476"), "-", "-"))
    return found


def _code(bench: Bench, **request: Any) -> str:
    try:
        bench.run("flash", make_image(bench.chip, SIZE), discard_outside=True, **request)
    except BridgedError as error:
        return f"`{error.code}`"
    return "succeeded"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=125, help="positions tried for each fault and part (default 125)")
    parser.add_argument("--flashes", type=int, default=10_000, help="flashes through the whole product (default 10000)")
    parser.add_argument("--print", action="store_true", help="print the page instead of writing it")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    lines = []
    bad = runs = 0
    total = Tally(codes=Counter())
    for row in ROWS:
        cells = []
        for part in PARTS:
            tally = Tally()
            for faults in row.faults(part, args.most):
                tally.add(bench_of(part, faults))
            bad += tally.false + tally.hangs
            runs += tally.tried
            total.false += tally.false
            total.hangs += tally.hangs
            if not row.permanent:
                total.tried += tally.tried
                total.recovered += tally.recovered
            codes = ", ".join(f"`{code}` {count}" for code, count in sorted((tally.codes or {}).items()))
            cells.append(codes if row.permanent else tally.text())
        lines.append(f"| {row.title} | " + " | ".join([*cells, *(p or "not tried" for p in row.peers)]) + " |")
        print(f"{time.monotonic() - begun:6.0f} s  {row.title}", file=sys.stderr)
    more: list[str] = []
    for title, tallies in chain(other_kinds(max(1, args.most // 5)), supplies(args.most)):
        more.append(f"| {title} | " + " | ".join(tally.text() for tally in tallies) + " |")
        for tally in tallies:
            bad += tally.false + tally.hangs
            runs += tally.tried
            total.tried += tally.tried
            total.recovered += tally.recovered
            total.false += tally.false
            total.hangs += tally.hangs
        print(f"{time.monotonic() - begun:6.0f} s  {title}", file=sys.stderr)
    whole = product.run(args.flashes)
    bad += len(whole.wrong)
    print("\n".join([f"{time.monotonic() - begun:6.0f} s  the whole product", *whole.wrong[:50]]), file=sys.stderr)
    text = page(lines, more, situations(), runs, total, args.most, whole.text())
    if args.print:
        print(text)
    else:
        PAGE.write_text(text)
    return 1 if bad else 0


def page(
    lines: list[str],
    more: list[str],
    cases: list[tuple[str, str, str, str]],
    runs: int,
    total: Tally,
    most: int,
    whole: str,
) -> str:
    parts = [NAMES.get(part, part) for part in PARTS]
    head = "| fault | " + " | ".join([*parts, "stm32flash 0.7", "stm32loader 0.7.1"]) + " |"
    return f"""# Reliability

Written by `make reliability`; do not edit. Every figure is from the simulator in virtual time, none from silicon.
What a real Linux adds, power cuts, kills and devices that vanish, is in [reliability-vm.md](reliability-vm.md).
Last tried on {datetime.now(UTC):%Y-%m-%d}, on the product of revision `{revision()}`; the machine does not matter.

Each run flashes a {SIZE}-byte image over an older one, reads everything back and starts it, with **one** fault at one position,
some {most} positions for each fault and part, spread over the whole session from the first 0x7F to the last proof. The cells
say recovered/tried: recovered means that the job ended as `succeeded` **and** the flash held the image. A fault that stays is
no accident; those rows name the errors that the jobs ended in.

**{runs} runs: {total.false} false successes, {total.hangs} hangs** (a hang would be more virtual time than the session itself
states: 120 s until its plan, then what the plan says).
Of {total.tried} runs with a fault that happens once, {total.recovered} were recovered without help.

{head}
|{"---|" * (len(parts) + 3)}
{chr(10).join(lines)}

The other kinds of jobs: one byte lost, flipped or added in either direction, a target that resets or hangs, some
{max(1, most // 5)} positions for each way. Recovered means that the job did what it should, judged by the simulated part, and
that the application runs afterwards. The last rows: the supply of the target fails at a byte and stays off until switched on.

| job | {" | ".join(NAMES.get(part, part) for part in FEW)} |
|{"---|" * (len(FEW) + 1)}
{chr(10).join(more)}

The whole product (jobs, queue, journal, store, owner; the session in virtual time in the place of its process; eight targets
side by side): {whole}

| situation | bridged | stm32flash 0.7 | stm32loader 0.7.1 |
|---|---|---|---|
{chr(10).join(f"| {a} | {b} | {c} | {d} |" for a, b, c, d in cases)}

The last two columns are measurements of those programs on a modelled device, one fault at one position each (16 KiB image);
"not tried" is what it says. With verification off, both reported success for a word that had been misprogrammed; here it cannot
be turned off.

What is done about an accident, from cheap to dear: the command is repeated after a NACK; after silence or garbage the target is
reset and the session goes on at the block; a block is read before it is written again, and a sector that holds something else
is erased and written anew; where there is a power line, it is the last resort. Without NRST a reading session fills up the
loader's half command, and a destructive one ends in its error. `tests/target/test_faults.py` draws faults at random, also
several at once; `BRIDGED_FAULTS=10000` sets how many.
"""


if __name__ == "__main__":
    sys.exit(main())
