"""``bridged check-config``: every mistake of a file, what is probably not meant, or that it is as it should be."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from bridged.config.file import ChipCheck, InvalidConfig, load, warnings_of
from bridged.errors import ConfigError


def report(path: Path, check_chip: ChipCheck, *, as_json: bool = False) -> bool:
    """Print every mistake of a file, or that there is none; whether it may be used. ``as_json``: an object a line."""
    mistakes: list[dict[str, object]] = []
    warnings: list[str] = []
    targets = 0
    try:
        loaded = load(path, check_chip=check_chip)
        warnings, targets = list(warnings_of(loaded)), len(loaded.targets)
    except InvalidConfig as error:
        mistakes = [{**asdict(mistake), "said": str(mistake)} for mistake in error.errors]
    except ConfigError as error:
        mistakes = [{"file": str(path), "line": 0, "column": 0, "key": "", "text": error.message, "said": error.message}]
    if as_json:
        for mistake in mistakes:
            print(json.dumps({"level": "mistake", **{key: value for key, value in mistake.items() if key != "said"}}))
        for warning in warnings:
            print(json.dumps({"level": "warning", "file": str(path), "text": warning}))
        print(json.dumps({"level": "result", "file": str(path), "ok": not mistakes, "targets": targets}))
    else:
        for mistake in mistakes:
            print(mistake["said"], file=sys.stderr)
        for warning in warnings:
            print(f"{path}: warning: {warning}", file=sys.stderr)
        if not mistakes:
            print(f"ok: {targets} target{'' if targets == 1 else 's'}")
    return not mistakes
