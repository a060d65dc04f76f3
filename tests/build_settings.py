"""Every setting, from the dataclasses of ``bridged/config``: ``docs/configuration.md`` and ``shell/bridged.toml.5``.

``tests.build_docs`` writes the page, ``tests.build_shell`` the manual page; ``config/bridged.toml`` (``make reference``) has
the same as a file to begin with.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bridged import config
from bridged.config.reference import NAME_RULE

HEAD = """\
# Configuration

<!-- Made from bridged/config by: python -m tests.build_docs -->

One TOML file, `/etc/bridged/bridged.toml` (`bridged serve --config FILE` reads another). `sudo bridged init` writes one by
looking at the machine; [config/examples](../config/examples) has one for each of three NUCLEO boards, and
[config/bridged.toml](../config/bridged.toml) is this page as a file. The same is in `man bridged.toml`.

<!-- not run: looks at or changes this machine -->
```sh
bridged check-config bridged.toml         # every mistake at once: line, column, what is allowed, what was probably meant
bridged doctor --config bridged.toml      # and whether this machine has what it names
```

- **Restart after a change**: `sudo systemctl restart bridged`. That resets no target; jobs that run go on afterwards.
  `systemctl reload bridged` reads renewed certificates, gives a *broken* target another chance, and says which other changes
  wait for a restart. A file with mistakes changes nothing at a reload; at a start the daemon ends with 78.
- **Secrets** (tokens, keys, passwords) never stand in the file, but where they are: a path, or `credential:NAME` as systemd's
  `LoadCredential=` gives it. With the shipped unit `/etc/bridged/credentials/FILE` is `credential:bridged_FILE`.
- **Only a target is needed**: its `port`, its `chip`, and the two lines. All else has a default that works.
"""
FOOT = """\
How many of each thing there may be, and what happens beyond, is in [limits](limits.md).
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """``default`` in TOML; ``allowed`` empty where the text says it."""

    name: str
    default: str
    allowed: str
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """One table of the file."""

    name: str
    text: str
    settings: tuple[Setting, ...]


def tables() -> Iterator[Table]:
    kinds = typing.get_type_hints(config.Config)
    for spec in dataclasses.fields(config.Config):
        kind = kinds[spec.name]
        if dataclasses.is_dataclass(kind):
            yield from _tables(typing.cast(type[Any], kind), spec.name, spec.metadata["help"])
        else:
            yield from _tables(config.Target, f"{spec.name}.NAME", f"{spec.metadata['help']} {NAME_RULE}")


def _tables(cls: type[Any], name: str, text: str) -> Iterator[Table]:
    kinds = typing.get_type_hints(cls)
    doc = cls.__doc__ or ""
    about = text if doc.startswith(f"{cls.__name__}(") or not doc else doc  # A dataclass without one has its signature there.
    own = [spec for spec in dataclasses.fields(cls) if not dataclasses.is_dataclass(kinds[spec.name])]
    settings = tuple(_setting(kinds[spec.name], spec) for spec in own)
    yield Table(name, " ".join(about.replace("``", "`").split()), settings)
    for spec in dataclasses.fields(cls):
        if dataclasses.is_dataclass(kinds[spec.name]):
            yield from _tables(typing.cast(type[Any], kinds[spec.name]), f"{name}.{spec.name}", spec.metadata["help"])


def _setting(kind: Any, spec: dataclasses.Field[Any]) -> Setting:
    meta = spec.metadata
    default = spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()
    allowed = ""
    if meta["choices"]:
        allowed = " or ".join(json.dumps(choice) for choice in meta["choices"])
    elif meta["low"] is not None:
        allowed = f"{'0, or ' * meta['zero']}{meta['low']:.15g} to {meta['high']:.15g}"
    elif kind is str and meta["high"] is not None:
        allowed = f"At most {meta['high']} characters"
    return Setting(spec.name, "" if meta["required"] else json.dumps(default), allowed, meta["help"])


def page() -> str:
    out = [HEAD]
    for table in tables():
        out += [f"## `[{table.name}]`\n", f"{table.text}\n", "| setting | default | what |", "|---|---|---|"]
        for one in table.settings:
            default = f"`{one.default}`" if one.default else "**required**"
            text = f"{one.text} {one.allowed}." if one.allowed else one.text
            out.append(f"| `{one.name}` | {default} | {text.replace('|', chr(92) + '|')} |")
        out.append("")
    return "\n".join([*out, FOOT])
