"""What was tried in the VM and what it came to, collected over a run for docs/reliability-vm.md.

``BRIDGED_VM_RECORD=FILE`` appends one JSON object a line there; ``python -m tests.vm.page FILE`` makes the page of it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Tried:
    """``end``: the job's state, or what came of it in words; ``code``: of the error where the job failed."""

    what: str
    end: str
    code: str = ""


def record(tried: Tried) -> None:
    _append({"tried": asdict(tried)})


def measured(name: str, figure: str) -> None:
    """One figure for the page, with its unit."""
    _append({"measured": {"name": name, "figure": figure}})


def _append(entry: dict[str, object]) -> None:
    if name := os.environ.get("BRIDGED_VM_RECORD"):
        with Path(name).open("a") as file:
            file.write(json.dumps(entry) + "\n")
