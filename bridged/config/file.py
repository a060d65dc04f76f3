"""A configuration file, read into the dataclasses of ``bridged.config``: all its mistakes are reported at once.

Each mistake has line, column, what is allowed and the nearest known name. Whether a chip exists is asked of ``check_chip``,
which the caller gives; whether a device exists is not asked at all, because a target may be plugged in later.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bridged.config import Config, Lines, Target, Xmodem
from bridged.config.places import BARE_KEY, KeyPath, places_of
from bridged.config.sharing import things
from bridged.config.values import (
    BY_HAND,
    CERTIFICATES_ONLY,
    FLEET_NAME,
    INPUT_NAMES,
    LINE_NAMES,
    MAX_ITEMS,
    did_you_mean,
    listeners,
    parse_range,
    shown,
    wrong_item,
    wrong_line,
    wrong_server,
    wrong_value,
)
from bridged.errors import ConfigError

LIMIT_BYTES = 1 << 20  # A thousand targets with every option set are a third of this; more is not a configuration.
MAX_TARGETS = 256  # Each has a port, a lane and up to a session process; a gateway with more wires is several gateways.
TARGET_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")

ChipCheck = Callable[[str, str, list[tuple[str, int, int]]], Iterable[tuple[str, str]]]
"""Given the ``chip`` and ``layout`` of a target, and (key, start, end) of each range of its flash: yields (key, what is wrong
with it). Its owner knows the chips; we do not."""

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Mistake:
    """One mistake of a configuration file; ``line`` and ``column`` count from 1."""

    file: str
    line: int
    column: int
    key: str
    text: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}"
        return f"{where}: {self.key}: {self.text}" if self.key else f"{where}: {self.text}"


class InvalidConfig(ConfigError):
    """Everything that is wrong with one configuration file, in the order of its lines."""

    def __init__(self, file: str, mistakes: Iterable[Mistake]) -> None:
        self.errors = tuple(sorted(set(mistakes), key=lambda m: (m.line, m.column, m.key, m.text)))
        first = self.errors[0]
        count = len(self.errors)
        head = f"reading the configuration {file}: {count} mistake{'s' if count > 1 else ''}"
        super().__init__(
            "\n".join([head, *(f"  {mistake}" for mistake in self.errors)]),
            file=file,
            mistakes=count,
            line=first.line,
            column=first.column,
            key=first.key,
        )


def load(source: str | Path, *, check_chip: ChipCheck | None = None) -> Config:
    """The configuration in ``source``: a ``Path`` to a file, or the TOML text itself.

    Raises ``InvalidConfig`` (a ``ConfigError``) that names every mistake; ``ConfigError`` when the file cannot be read.
    """
    file, text = _read(source)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: its own, and a number with thousands of digits
        raise InvalidConfig(file, [_syntax_mistake(file, text, error)]) from error
    loader = _Loader(file, places_of(text))
    config = loader.table(Config, data, ())
    loader.cross_check(config, check_chip)
    if loader.mistakes:
        raise InvalidConfig(file, loader.mistakes)
    return config


def warnings_of(config: Config) -> list[str]:
    """What is allowed but probably not meant, one sentence each."""
    found = [] if config.targets else ["no target is configured: add a table [targets.NAME]"]
    for name, target in config.targets.items():
        lines = target.lines
        if lines.boot0 and lines.boot0 != BY_HAND and not (lines.nrst or lines.power):
            found.append(
                f"targets.{name}.lines: boot0 is wired but neither nrst nor power; a chip looks at BOOT0 only while it leaves"
                " reset, so somebody has to reset it by hand for each job"
            )
        if re.fullmatch(r"/dev/tty(USB|ACM)\d+", target.port):
            found.append(
                f"targets.{name}.port: {target.port} is numbered in the order of plugging in; take its name under"
                " /dev/serial/by-id"
            )
        if target.shares and (target.console.listen or target.console.socket):
            found.append(
                f"targets.{name}.console: a target that shares its wires has its port open for jobs only, so its console stays"
                " silent"
            )
        xmodem = target.xmodem
        if xmodem != Xmodem() and not xmodem.success.expect:
            found.append(f"targets.{name}.xmodem: without success.expect no job of kind xmodem is accepted")
        for use, talk in (("interlock", target.application.interlock), ("health", target.application.health)):
            if talk.send and not talk.expect:
                found.append(
                    f"targets.{name}.application.{use}: without `expect` nothing is asked, so `send` is not sent either"
                )
    return found


def _read(source: str | Path) -> tuple[str, str]:
    if isinstance(source, str):
        return "configuration", source
    try:
        with source.open("rb") as stream:
            raw = stream.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"reading the configuration {source}: {error.strerror or error}", file=str(source)) from error
    if len(raw) > LIMIT_BYTES:
        raise ConfigError(f"reading the configuration {source}: larger than {LIMIT_BYTES} bytes", file=str(source))
    try:
        return str(source), raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        text = f"byte {raw[error.start]:#04x} is not UTF-8; TOML files are"
        raise InvalidConfig(str(source), [Mistake(str(source), line, column, "", text)]) from error


def _syntax_mistake(file: str, text: str, error: Exception) -> Mistake:
    """tomllib says where in words only: "... (at line 3, column 5)" or "... (at end of document)"."""
    if isinstance(error, RecursionError):
        return Mistake(file, 1, 1, "", "arrays or tables are nested too deeply")
    said = str(error)
    found = re.search(r"\s*\(at line (\d+), column (\d+)\)", said)
    if found:
        return Mistake(file, int(found[1]), int(found[2]), "", f"not valid TOML: {said[: found.start()]}")
    lines = text.split("\n")
    return Mistake(file, len(lines), len(lines[-1]) + 1, "", f"not valid TOML: {said}")


class _Loader:
    """Builds dataclasses from tables; a wrong value is noted and replaced by its default, so that the rest is checked too."""

    def __init__(self, file: str, places: Mapping[KeyPath, tuple[int, int]]) -> None:
        self.file = file
        self.places = places
        self.mistakes: list[Mistake] = []
        self.wrong: set[KeyPath] = set()

    def note(self, path: KeyPath, text: str) -> None:
        # The key itself may be absent (something required is missing): then the nearest table around it is shown.
        place = next((self.places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.places), (1, 1))
        self.wrong.add(path)
        self.mistakes.append(Mistake(self.file, *place, _dotted(path), text))

    def table(self, cls: type[C], data: Mapping[str, Any], path: KeyPath) -> C:
        fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
        kinds = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for key in data:
            if key not in fields:
                self.note((*path, key), f"no such key{did_you_mean(key, fields)}; known here: {', '.join(fields)}")
        for name, spec in fields.items():
            if name in data:
                self._field(kinds[name], spec.metadata, data[name], (*path, name), values)
            elif spec.metadata["required"]:
                self.note((*path, name), f"is required: {spec.metadata['help']}")
        return cls(**values)

    def _field(self, kind: Any, meta: Mapping[str, Any], value: Any, path: KeyPath, values: dict[str, Any]) -> None:
        """Puts the value into ``values`` when it is right."""
        name = path[-1]
        if dataclasses.is_dataclass(kind) or kind == dict[str, Target]:
            if not isinstance(value, dict):
                self.note(path, f"must be a table, not {shown(value)}")
            elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
                values[name] = self.table(kind, value, path)
            else:
                values[name] = self._targets(value, path)
        elif kind in (list[str], list[int]):
            if not isinstance(value, list):
                what = "strings" if kind == list[str] else "integers"
                self.note(path, f"must be a list of {what}, not {shown(value)}")
                return
            if len(value) > MAX_ITEMS:
                self.note(path, f"has {len(value)} items, at most {MAX_ITEMS} are allowed")
                return
            bad = [
                (index, text)
                for index, item in enumerate(value)
                if (text := wrong_item(item, meta) if kind == list[str] else wrong_value(int, meta, item))
            ]
            for index, text in bad:
                self.note((*path, str(index)), text)
            if not bad:
                values[name] = value
        elif text := wrong_value(kind, meta, value):
            self.note(path, text)
        else:
            values[name] = float(value) if kind is float else value

    def _targets(self, data: Mapping[str, Any], path: KeyPath) -> dict[str, Target]:
        found: dict[str, Target] = {}
        if len(data) > MAX_TARGETS:
            self.note(path, f"has {len(data)} targets, at most {MAX_TARGETS} are allowed")
            return found
        for name, value in data.items():
            here = (*path, name)
            if not TARGET_NAME.fullmatch(name):
                self.note(here, "not a name for a target: 1 to 32 of A-Z a-z 0-9 _ -")
            if isinstance(value, dict):
                found[name] = self.table(Target, value, here)
            else:
                self.note(here, f"must be a table, not {shown(value)}; write [targets.{name}]")
        return found

    # --- rules about more than one value

    def cross_check(self, config: Config, check_chip: ChipCheck | None) -> None:
        api, store = config.api, config.store
        taken: dict[tuple[str, int], str] = {}
        for key in ("listen", "http", "metrics"):
            if ("api", key) in self.wrong:
                continue
            for listen in listeners(getattr(api, key)):
                first = taken.setdefault((listen.host, listen.port), key) if listen.port else key
                if first != key:
                    self.note(("api", key), f"{listen} is taken by api.{first} already")
        self._closed(config)
        self._fleet(config)
        if store.image_limit_mib > store.limit_mib:
            self.note(("store", "image_limit_mib"), f"exceeds store.limit_mib, which is {store.limit_mib}")
        for name, target in config.targets.items():
            path = ("targets", name)
            if not target.port and not {(*path, "port"), path} & self.wrong:
                self.note((*path, "port"), "must not be empty")
            self._lines(target.lines, (*path, "lines"))
            if not config.signing.keys and ("signing", "keys") not in self.wrong:
                for key in ("signature", "no_downgrade", "board"):
                    if getattr(target.policy, key):
                        self.note((*path, "policy", key), "needs signing.keys: by whom may an image be signed?")
            self._console(name, target, config)
            if check_chip is not None and not {(*path, "chip"), (*path, "layout")} & self.wrong:
                for key, text in check_chip(target.chip, target.layout, _ranges(target)):
                    self.note((*path, *key.split(".")), text)
        self._sharing(config.targets)

    def _closed(self, config: Config) -> None:
        """P7: beyond loopback nothing is said in plain text unless the file asks for it in so many words."""
        tls = config.tls
        for key, other in (("certificate", "key"), ("key", "certificate"), ("client_ca", "certificate")):
            if getattr(tls, key) and not getattr(tls, other) and ("tls", other) not in self.wrong:
                self.note(("tls", other), f"is required with tls.{key}")
        if tls.client_required and not tls.client_ca:
            self.note(("tls", "client_required"), "needs tls.client_ca: whose certificates are asked for?")
        tables: list[tuple[KeyPath, Any]] = [(("api",), config.api)]
        tables += [(("targets", name, "console"), target.console) for name, target in config.targets.items()]
        for path, table in tables:
            for spec in dataclasses.fields(table):
                here = (*path, spec.name)
                if spec.metadata["kind"] != "listen" or here in self.wrong:
                    continue
                for listen in listeners(getattr(table, spec.name)):
                    if path[0] == "targets" and not listen.loopback:
                        if listen.scheme == "plaintext" or not (tls.certificate and tls.client_ca):
                            self.note(here, f"{listen}: {CERTIFICATES_ONLY}")
                    elif not tls.certificate and (listen.scheme == "tls" or (not listen.scheme and not listen.loopback)):
                        self.note(
                            here,
                            f"{listen} needs TLS: set tls.certificate and tls.key, or say plaintext:{listen} where everybody on"
                            " the network may read tokens and firmware; or stay on 127.0.0.1 and use ssh -L",
                        )

    def _fleet(self, config: Config) -> None:
        fleet, path = config.fleet, ("fleet",)
        for index, server in enumerate(fleet.servers):
            if text := wrong_server(server):
                self.note((*path, "servers", str(index)), text)
        if fleet.servers and not FLEET_NAME.fullmatch(config.gateway.name) and ("gateway", "name") not in self.wrong:
            self.note(
                ("gateway", "name"),
                "a member of a fleet needs a name of its own: 1 to 64 of A-Z a-z 0-9 _ - (it becomes a part of subjects)",
            )
        for key, other in (("certificate", "key"), ("key", "certificate")):
            if getattr(fleet, key) and not getattr(fleet, other) and (*path, other) not in self.wrong:
                self.note((*path, other), f"is required with fleet.{key}")
        if config.hawkbit.url and not FLEET_NAME.fullmatch(config.gateway.name) and ("gateway", "name") not in self.wrong:
            self.note(("gateway", "name"), "hawkBit needs a name of this gateway: 1 to 64 of A-Z a-z 0-9 _ -")
        for table, names in (("fleet", fleet.targets), ("hawkbit", config.hawkbit.targets)):
            for index, name in enumerate(names):
                if name not in config.targets:
                    self.note((table, "targets", str(index)), f"no such target{did_you_mean(name, config.targets)}")

    def _lines(self, lines: Lines, path: KeyPath) -> None:
        if (*path, "kind") in self.wrong:
            return  # Whatever is said of the lines depends on it.
        for name in (*LINE_NAMES, *INPUT_NAMES):
            value = getattr(lines, name)
            if value and (*path, name) not in self.wrong and (text := wrong_line(lines.kind, name, value)):
                self.note((*path, name), text)
        if lines.kind == "socket" and not lines.socket and (*path, "socket") not in self.wrong:
            self.note((*path, "socket"), 'is required with kind = "socket": path of the Unix stream socket of the line box')
        if lines.kind != "socket" and lines.socket:
            self.note((*path, "socket"), f'has a meaning only with kind = "socket"; here kind is "{lines.kind}"')
        for key in ("enter", "leave"):
            for index, item in enumerate(getattr(lines, key)):
                name = item.partition("=")[0].strip()
                if name in LINE_NAMES and getattr(lines, name) in ("", BY_HAND):
                    self.note((*path, key, str(index)), f"drives {name}, but {name} is not wired")

    def _console(self, name: str, target: Target, config: Config) -> None:
        """No two listeners at one place; port 0 is another one each time."""
        path, console = ("targets", name, "console"), target.console
        taken = {config.api.socket: "api.socket"}
        for key in ("listen", "http", "metrics"):
            taken |= dict.fromkeys(self._bound(("api", key), getattr(config.api, key)), f"api.{key}")
        for other, found in config.targets.items():
            if other == name:
                break
            there = ("targets", other, "console")
            taken |= dict.fromkeys(self._bound((*there, "listen"), found.console.listen), f"targets.{other}.console.listen")
            taken |= {found.console.socket: f"targets.{other}.console.socket"}
            taken |= {found.console.log: f"targets.{other}.console.log"}
        for key in ("listen", "socket", "log"):
            value = getattr(console, key)
            for place in self._bound((*path, key), value) if key == "listen" else [value]:
                if place and place in taken:
                    self.note((*path, key), f"{place} is taken by {taken[place]} already")
        if console.replay_kib > console.history_kib and (*path, "replay_kib") not in self.wrong:
            self.note((*path, "replay_kib"), f"exceeds history_kib, which is {console.history_kib}")

    def _bound(self, path: KeyPath, value: str) -> list[str]:
        """The places of its listeners, those aside of which each is another one (port 0)."""
        return [] if path in self.wrong else [str(listen) for listen in listeners(value) if listen.port]

    def _sharing(self, targets: Mapping[str, Target]) -> None:
        for name, target in targets.items():
            for index, other in enumerate(target.shares):
                path = ("targets", name, "shares", str(index))
                if other == name:
                    self.note(path, "a target cannot share with itself")
                elif other not in targets:
                    self.note(path, f"no such target{did_you_mean(other, targets)}")
                elif name not in targets[other].shares and ("targets", other, "shares") not in self.wrong:
                    self.note(path, f'{other} must say so too: add shares = ["{name}"] to targets.{other}')
        users: dict[str, list[str]] = {}
        for name, target in targets.items():
            for thing in sorted(things(target)):
                users.setdefault(thing, []).append(name)
        for thing, names in users.items():
            for name in names[1:]:
                first = targets[names[0]]
                if names[0] not in targets[name].shares and name not in first.shares:
                    self.note(
                        ("targets", name),
                        f"uses {thing}, as targets.{names[0]} does: both must declare it, here"
                        f' shares = ["{names[0]}"] and there shares = ["{name}"]',
                    )


def _ranges(target: Target) -> list[tuple[str, int, int]]:
    """What is said about pieces of its flash, with the key below the target."""
    texts = [(f"protect.{n}", text) for n, text in enumerate(target.protect)]
    texts += [(f"policy.patch.{n}", text) for n, text in enumerate(target.policy.patch)]
    return [(key, *parse_range(text)) for key, text in texts]


def _dotted(path: KeyPath) -> str:
    """As in TOML, with the place in an array in brackets: ``targets.m1.lines.enter[2]``."""
    text = ""
    for part in path:
        if part.isdigit() and text:
            text += f"[{part}]"
        else:
            shown = part if BARE_KEY.fullmatch(part) else json.dumps(part)
            text += f".{shown}" if text else shown
    return text
