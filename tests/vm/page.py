"""Writes docs/reliability-vm.md from what a run of the VM tests recorded (``tests/vm/record.py``).

    python -m tests.vm.page FILE

The same accident in several runs is one row; each run is a row of its own at the end, with its date, revision and machine. An
accident whose end is none that was promised fails its test, and the page says which.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability-vm.md"
TARGETS = 2  # Each power cut catches so many, and is a row for each of them.

HEAD = """# Reliability on a real Linux

Written by `make vm-reliability`; do not edit. Real: Debian 12 with systemd as its first process, Debian's kernel, a GPIO chip,
two serial ports with parity and framing errors, the installed package, an ext4 disk whose power is cut. Not real: the machine
is emulated (QEMU without hardware acceleration, twenty times slower), and the targets are our simulated STM32s. No silicon.

Power cuts: {cuts}, each with two flashes under way. After each row, checked by the test: NRST and BOOT0 idle as the kernel has
them, no reset in the middle of an erase, and where the job succeeded the image in the target's flash, byte for byte. At no cut
had a half-written image its vector table.

| what happened | times | the jobs' ends |
|---|---|---|
"""

FIGURES = """
## An idle gateway, and what it writes

{rows}

Two targets, HTTP and metrics on, nothing to do. CPU time is that of the emulated machine, and what others took of the host's
CPU meanwhile counts with it; a real machine of its class needs about a twentieth. Context switches are wake-ups. Bytes are
those that the kernel counted, at the process or at the disk.
"""

RUNS = """
## When, and with what

{rows}

`make vm-test` tries the same with three power cuts and fifteen seconds of idling.
"""

FAILED = """
**Not held in these runs:** {names}. Rows above are from the tests that held.
"""


def page(text: str) -> str:
    entries = [json.loads(line) for line in text.splitlines()]
    ends: dict[str, Counter[str]] = {}
    figures: dict[str, str] = {}
    runs: dict[tuple[str, ...], Counter[str]] = {}
    run: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for entry in entries:
        if began := entry.get("run"):
            # A run of the same day, revision and machine adds to those before it.
            run = runs.setdefault((began["began"].split()[0], began["revision"], began["machine"]), Counter())
        run.update(set(entry))
        if test := entry.get("failed"):
            failed[test] += 1
        if tried := entry.get("tried"):
            end = tried["end"] + (f" (`{tried['code']}`)" if tried["code"] else "")
            ends.setdefault(tried["what"], Counter())[end] += 1
        if measured := entry.get("measured"):
            figures[measured["name"]] = measured["figure"]
    rows = []
    for what in sorted(ends, key=lambda what: ("power cut" not in what, what)):
        count = ends[what]
        said = ", ".join(f"{end} {times}" if len(count) > 1 else end for end, times in count.most_common())
        rows.append(f"| {what} | {count.total()} | {said} |")
    cuts = sum(count.total() for what, count in ends.items() if "power cut" in what) // TARGETS
    parts = [HEAD.format(cuts=cuts) + "\n".join(rows) + "\n"]
    if failed:
        parts.append(FAILED.format(names=", ".join(f"`{name}` ({times})" for name, times in failed.items())))
    if figures:
        parts.append(FIGURES.format(rows=_table(("", ""), list(figures.items()))))
    told = [
        (day, f"`{revision}`", machine, str(count["run"]), str(count["tried"]), str(count["measured"]))
        for (day, revision, machine), count in runs.items()
    ]
    parts.append(RUNS.format(rows=_table(("day", "revision", "machine", "runs", "jobs and accidents tried", "figures"), told)))
    return "".join(parts)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


if __name__ == "__main__":
    PAGE.write_text(page(Path(sys.argv[1]).read_text()))
    print(PAGE)
