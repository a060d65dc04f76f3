"""Writes docs/reliability-vm.md from what a run of the VM tests recorded (``tests/vm/record.py``).

    python -m tests.vm.page FILE

The same accident in several runs is one row. An accident whose end is none that was promised never gets here: its test fails.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability-vm.md"

HEAD = """# Reliability on a real Linux

Written by `make vm-reliability`; do not edit. Real: Debian 12 with systemd as its first process, Debian's kernel, a GPIO chip,
two serial ports with parity and framing errors, the installed package, an ext4 disk whose power is cut. Not real: the machine
is emulated (QEMU without hardware acceleration, twenty times slower), and the targets are our simulated STM32s. No silicon.

After each row, checked by the test: NRST and BOOT0 idle as the kernel has them, no reset in the middle of an erase, and where
the job succeeded the image in the target's flash, byte for byte. At no cut had a half-written image its vector table.

| what happened | times | the jobs' ends |
|---|---|---|
"""

FIGURES = """
## An idle gateway, and what it writes

{rows}

Two targets, HTTP and metrics on, nothing to do. CPU time is that of the emulated machine: divide by about twenty for a real one
of its class. Bytes are those that the kernel counted, at the process or at the disk.
"""


def page(text: str) -> str:
    entries = [json.loads(line) for line in text.splitlines()]
    ends: dict[str, Counter[str]] = {}
    figures: dict[str, str] = {}
    for entry in entries:
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
    lines = "\n".join(["| | |", "|---|---|", *(f"| {name} | {figure} |" for name, figure in figures.items())])
    return HEAD + "\n".join(rows) + "\n" + (FIGURES.format(rows=lines) if figures else "")


if __name__ == "__main__":
    PAGE.write_text(page(Path(sys.argv[1]).read_text()))
    print(PAGE)
