"""What was tried in the VM and what it came to, collected over a run for docs/reliability-vm.md.

``BRIDGED_VM_RECORD=FILE`` appends one JSON object a line there; ``python -m tests.vm.page FILE`` makes the page of it. Several
runs may add to one file: each begins with an entry that says when, with what revision and on what machine it was.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("bridged", "systemd", "debian", "config", "requirements.lock")


@dataclass(frozen=True)
class Tried:
    """``end``: the job's state, or what came of it in words; ``code``: of the error where the job failed."""

    what: str
    end: str
    code: str = ""


@dataclass(frozen=True)
class Run:
    """``began``: UTC. ``revision``: the last one that changed the product (``PRODUCT``), with ``+`` where there were
    changes that are in no commit."""

    began: str
    revision: str
    machine: str


def record(tried: Tried) -> None:
    _append({"tried": asdict(tried)})


def measured(name: str, figure: str) -> None:
    """One figure for the page, with its unit."""
    _append({"measured": {"name": name, "figure": figure}})


def failed(test: str) -> None:
    """A test that did not hold: the page must not look as if it had never been run."""
    _append({"failed": test})


_runs: dict[str, Run] = {}  # By file: what this process has written there already.


def _append(entry: dict[str, object]) -> None:
    name = os.environ.get("BRIDGED_VM_RECORD")
    if not name:
        return
    entries = [entry]
    if name not in _runs:
        _runs[name] = Run(f"{datetime.now(UTC):%Y-%m-%d %H:%M}", revision(), _machine())
        entries.insert(0, {"run": asdict(_runs[name])})
    with Path(name).open("a") as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in entries))


def revision() -> str:
    found = _output("git", "-C", str(ROOT), "log", "-1", "--format=%h", "--abbrev=10", "--", *PRODUCT) or "unknown"
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", *PRODUCT)
    return found + ("+" if changed else "")


def _machine() -> str:
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    version = re.search(r"version (\S+)", _output("qemu-system-x86_64", "--version"))
    cores = len(os.sched_getaffinity(0))
    processor = found[1] if found else platform.machine()
    return f"{processor}, {cores} cores, Linux {platform.release()}, QEMU {version[1] if version else 'missing'}"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
