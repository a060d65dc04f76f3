"""The commented reference configuration, config/bridged.toml, from the dataclasses of ``bridged.config``."""

from __future__ import annotations

import dataclasses
import json
import textwrap
import typing
from typing import Any

from bridged.config import Config, Target

_HEAD = """\
Reference configuration of bridged: every setting with its default. Generated from bridged/config; change it there.
A setting that is commented out has the value that is shown. Read by `bridged serve --config FILE`; `bridged check-config
FILE` lists every mistake at once. SIGHUP (`systemctl reload bridged`) reads it again.
Ready examples for a Raspberry Pi with three NUCLEO boards are in config/examples/.
"""
NAME_RULE = "NAME: 1 to 32 of A-Z a-z 0-9 _ -. A target whose device is absent is picked up when it appears."


def reference() -> str:
    """The commented reference configuration. It is valid, and equal to an empty file."""
    out = [_comment(_HEAD)]
    for spec in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[spec.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            out.append(f"\n# {spec.metadata['help']}\n[{spec.name}]\n{_settings(kind)}")
        else:
            out.append("\n" + _comment(f"{spec.metadata['help']} {NAME_RULE}") + _example_table(Target, "targets.motor1"))
    return "".join(out)


def _example_table(cls: type[Any], name: str) -> str:
    tables = [s for s in dataclasses.fields(cls) if dataclasses.is_dataclass(typing.get_type_hints(cls)[s.name])]
    out = [f"#[{name}]\n{_settings(cls)}"]
    for spec in tables:
        kind = typing.get_type_hints(cls)[spec.name]
        doc = kind.__doc__ or ""
        about = "" if doc.startswith(f"{kind.__name__}(") else _comment(" ".join(doc.replace("``", "`").split()))
        out.append(f"\n{about or _comment(spec.metadata['help'])}{_example_table(kind, f'{name}.{spec.name}')}")
    return "".join(out)


def _settings(cls: type[Any]) -> str:
    out = []
    for spec in dataclasses.fields(cls):
        meta, kind = spec.metadata, typing.get_type_hints(cls)[spec.name]
        if dataclasses.is_dataclass(kind):
            continue
        limits = ""
        if meta["choices"]:
            limits = f" One of {', '.join(map(json.dumps, meta['choices']))}."
        elif meta["low"] is not None:
            limits = f" {'0, or ' if meta['zero'] else ''}{meta['low']:.15g} to {meta['high']:.15g}."
        elif meta["high"] is not None:
            limits = f" At most {meta['high']} characters."
        value = spec.default if spec.default is not dataclasses.MISSING else []
        value = value if meta["example"] is None else meta["example"]
        note = " Required." if meta["required"] else ""
        out.append(f"{_comment(meta['help'] + limits + note)}#{spec.name} = {json.dumps(value)}\n")
    return "".join(out)


def _comment(text: str) -> str:
    lines = textwrap.wrap(" ".join(text.split()), 100, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)
