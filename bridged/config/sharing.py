"""Targets that share wires: what each of them occupies, and whom a reset of one resets as well."""

from __future__ import annotations

from collections.abc import Mapping

from bridged.config import Target
from bridged.config.values import BY_HAND, INPUT_NAMES, LINE_NAMES


def neighbours(targets: Mapping[str, Target], name: str) -> tuple[str, ...]:
    """The other targets that a reset of ``name`` resets as well: they declare that they share, and it is NRST or the power.

    Where two that share have nothing in common by name (one line under two names) nobody can tell what it is: it counts.
    """
    target = targets[name]
    ours, resets = things(target), _resets(target)
    if not resets:
        return ()
    found = []
    for other in targets:
        if other != name and (other in target.shares or name in targets[other].shares):
            common = ours & things(targets[other])
            if not common or common & resets & _resets(targets[other]):
                found.append(other)
    return tuple(found)


def groups(targets: Mapping[str, Target]) -> list[set[str]]:
    """Who shares wires, directly or through others; alone who shares none."""
    found: dict[str, set[str]] = {name: {name} for name in targets}
    for name, target in targets.items():
        joined = set[str]().union(*(found[other] for other in (name, *target.shares) if other in found))
        for other in joined:
            found[other] = joined
    return list({id(group): group for group in found.values()}.values())


def things(target: Target) -> set[str]:
    """What of the gateway this target occupies, in words. Modem lines belong to the port and need no name of their own."""
    lines = target.lines
    found = {f"port {target.port}"} if target.port else set()
    if lines.kind == "gpio":
        found |= {f"line {v}" for n in (*LINE_NAMES, *INPUT_NAMES) if (v := getattr(lines, n)) not in ("", BY_HAND)}
    if lines.kind == "socket" and lines.socket:
        found.add(f"line box {lines.socket}")
    return found


def _resets(target: Target) -> set[str]:
    """What of ``things`` can reset it. A line box and the lines of a port are one thing: who has one moves all of it."""
    lines = target.lines
    wired = [v for v in (lines.nrst, lines.power) if v]
    match lines.kind if wired else "none":
        case "gpio":
            return {f"line {v}" for v in wired}
        case "modem":
            return {f"port {target.port}"}
        case "socket":
            return {f"line box {lines.socket}"}
    return set()
