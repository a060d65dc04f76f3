"""What a new configuration changes in a running daemon."""

from __future__ import annotations

from dataclasses import dataclass, fields

from bridged.config import Config


@dataclass(frozen=True, slots=True)
class Difference:
    """What a new configuration changes. ``restart``: settings that are read at start only, as ``api.listen``."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()


def difference(old: Config, new: Config) -> Difference:
    settings = [
        f"{table}.{spec.name}"
        for table in ("gateway", "api", "tls", "auth", "signing", "store", "jobs", "fleet", "hawkbit")
        for spec in fields(getattr(old, table))
        if getattr(getattr(old, table), spec.name) != getattr(getattr(new, table), spec.name)
    ]
    return Difference(
        added=tuple(name for name in new.targets if name not in old.targets),
        removed=tuple(name for name in old.targets if name not in new.targets),
        changed=tuple(name for name in new.targets if name in old.targets and old.targets[name] != new.targets[name]),
        restart=tuple(settings),
    )
