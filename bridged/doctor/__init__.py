"""``bridged doctor``: why would a job fail on this machine? Asked before, or after, it did.

It runs as whoever calls it, with or without a daemon, and does nothing but look: no port is opened (that alone can reset a
target), no line is requested, no setting changed. What it looks at is in ``machine``, what it asks in ``checks``, what each
answer means in ``findings``, whose table is docs/doctor.md.

Output is for a tired engineer: problems first, each with what to do; what is right is only counted. ``--json`` prints all of
it as one list. Exit code 1 where there is a problem, else 0; 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bridged import config
from bridged.doctor.checks import examine
from bridged.doctor.machine import Machine
from bridged.errors import UnknownTarget
from bridged.findings import CATALOG, Finding, Level, reference

__all__ = ["CATALOG", "Finding", "Level", "Machine", "examine", "main", "reference", "report"]

EXAMPLES = """\
examples:
  bridged doctor                      this machine and every configured target
  bridged doctor motor1               only this target (and the machine)
  bridged doctor --config my.toml     before it is installed
  sudo bridged doctor                 also sees which programs of others hold a port
  bridged doctor --json               for programs: one list of findings

exit codes:
    0  no problem (warnings and notes are none)
    1  at least one problem
    2  wrong arguments, or no such target

Nothing is changed, and no port is opened: opening one can reset a target. Codes: docs/doctor.md
"""


def report(findings: Sequence[Finding], everything: bool = False, width: int = 0) -> str:
    """What people read. ``everything``: what is right as well; ``width``: of the terminal, 0: lines as long as they come."""
    shown = [finding for finding in findings if everything or finding.level is not Level.OK]
    names = max([len(finding.target or "machine") for finding in shown], default=0)
    out = []
    for finding in shown:
        head = f"{finding.level.value:7}  {finding.target or 'machine':{names}}  "
        out += _wrapped(f"{finding.text}  [{finding.code}]", head, len(head), width)
        # A note needs nothing to be done at once; its remedy is in the documentation and in --json.
        if finding.remedy and (everything or finding.level in (Level.PROBLEM, Level.WARNING)):
            out += _wrapped(finding.remedy, f"{'':{len(head)}}-> ", len(head) + 3, width)
    counts = Counter(finding.level for finding in findings)
    words = [f"{counts[level]} {level.value}{'' if counts[level] == 1 else 's'}" for level in list(Level)[:3] if counts[level]]
    words.append(f"{counts[Level.OK]} ok{'' if everything else ' (--all shows them)'}")
    return "\n".join([*out, *([""] if out else []), ", ".join(words)])


def _wrapped(text: str, head: str, indent: int, width: int) -> list[str]:
    if width <= indent + 30:
        return [head + text]
    # Commands, paths and codes are copied, so they are never cut.
    return textwrap.wrap(
        text,
        width,
        initial_indent=head,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def main(argv: Sequence[str] | None = None, machine: Machine | None = None) -> int:
    """The command; ``machine``: another one than this (for tests)."""
    parser = argparse.ArgumentParser(
        prog="bridged doctor",
        description="Look for what would keep jobs from working on this machine: ports, lines, permissions, other programs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", metavar="TARGET", nargs="*", help="only these targets (default: all that are configured)")
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"default: {config.DEFAULT_FILE}")
    parser.add_argument("--json", action="store_true", help="one list of findings, also of what is right")
    parser.add_argument("--all", action="store_true", help="show what is right as well")
    args = parser.parse_args(argv)
    try:
        findings = examine(machine or Machine(), args.config, args.targets)
    except UnknownTarget as error:
        parser.error(error.message)
    if args.json:
        print(json.dumps([finding.as_dict() for finding in findings], indent=1))
    else:
        print(report(findings, args.all, shutil.get_terminal_size().columns if sys.stdout.isatty() else 0))
    return 1 if any(finding.level is Level.PROBLEM for finding in findings) else 0
