"""Results on disk: one file for each *setting*, a line for each run, so that a measurement can be made in slices.

A setting is everything that two runs must have in common to be compared: our code, the compiled device, the programs of the
benchmark that are measured or measure, the versions of the other hosts, and the machine. Its digest is the name of the file, so
results of another revision are never mixed with these: they are in another file, and stay there.

``docs/benchmarks-history.jsonl`` has one line for each setting that was ever reported.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.bench.figures import Run, Verdict
from tests.bench.rig import BUILT, ROOT

MEASURED = ("device.c", "naive.py", "ours.py", "load.py", "rig.py", "run.py", "figures.py")


def code_digest(root: Path = ROOT) -> str:
    """Of what runs while something is measured: all of our package, and the benchmark but for its words and pictures."""
    told = hashlib.sha256()
    package = sorted(path for path in (root / "bridged").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    for path in (*package, *(root / "tests/bench" / name for name in MEASURED)):
        told.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return told.hexdigest()


def commit(root: Path = ROOT) -> str:
    """For people; empty where this is no checkout. A page that was written is no change of what is measured."""

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "bridged", "tests")
        return git("describe", "--always", "--abbrev=10") + ("+changes" if changed else "")
    except OSError:
        return ""


def setting_id(code: str, machine: Mapping[str, str]) -> str:
    told = json.dumps([code, sorted(machine.items())]).encode()
    return hashlib.sha256(told).hexdigest()[:12]


class Results:
    """Facts (the last one of a name counts) and runs, each a line; read when it is made, appended afterwards."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}
        self.runs: list[Run] = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    told = json.loads(line)
                except ValueError:
                    continue  # The machine went down in the middle of a line; that run is made again.
                if "run" in told:
                    self.runs.append(Run(**told["run"]))
                else:
                    self.facts |= told

    @classmethod
    def of_setting(cls, identity: str, folder: Path = BUILT / "results") -> Results:
        return cls(folder / f"{identity}.jsonl")

    def add_run(self, run: Run) -> None:
        self.runs.append(run)
        self._append({"run": asdict(run)})

    def put(self, **facts: Any) -> None:
        self.facts |= facts
        self._append(facts)

    def begin_anew(self) -> None:
        """What was there is kept beside it, under a name that nobody reads."""
        if self.path.exists():
            number = 1 + sum(1 for _ in self.path.parent.glob(f"{self.path.stem}.old*"))
            self.path.rename(self.path.with_suffix(f".old{number}"))
        self.facts, self.runs = {}, []

    def _append(self, line: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A line that was cut off is not to take the next one with it.
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")


# --- history ------------------------------------------------------------------------------------------------------


def history_line(results: Results, verdicts: Iterable[Verdict], identity: str, *, look: bool) -> dict[str, Any]:
    """Medians of what counts, as they are compared from one revision to the next."""
    cells: dict[str, Any] = {}
    for cell in sorted({run.cell for run in results.runs}):
        these = [run for run in results.runs if run.cell == cell and not run.rejected]
        if these:
            cells[str(cell)] = {
                "runs": len(these),
                "dialogue_s": round(statistics.median(run.dialogue_s for run in these), 4),
                "share": round(statistics.median(run.share for run in these), 4),
                "gap_p50_us": round(statistics.median(run.gap_p50_us for run in these), 1),
                "cpu_s": round(statistics.median(run.cpu_s for run in these), 3),
            }
    return {
        "id": identity,
        "commit": results.facts.get("commit", ""),
        "date": results.facts.get("date", ""),
        "machine": results.facts.get("machine", {}),
        "look": look,
        "missed": [verdict.text for verdict in verdicts if verdict.met is False],
        "cost": {key: value for key, value in results.facts.get("cost", {}).items() if isinstance(value, int | float)},
        "cells": cells,
    }


def write_history(path: Path, line: Mapping[str, Any]) -> None:
    """One line for each setting; a second slice of the same one takes the place of the first."""
    before = path.read_text().splitlines() if path.exists() else []
    kept = [old for old in before if old.strip() and json.loads(old).get("id") != line["id"]]
    path.write_text("\n".join([*kept, json.dumps(line, ensure_ascii=False)]) + "\n")


def read_history(path: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []
