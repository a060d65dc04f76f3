"""What every check of ``doctor`` looks at: the machine, the configuration, and who runs the daemon; each part is asked once.

Permissions are those of whoever runs the daemon: the user of the unit where one is installed, with the groups of the unit, and
the caller otherwise. Where both differ the caller's lack is a note only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from bridged import config
from bridged.doctor.machine import Account, Machine, Port, Unit
from bridged.errors import BridgedError, LineUnavailable
from bridged.findings import Finding
from bridged.target import gpio

Findings = Iterator[Finding]
SERVICE = "bridged.service"


@dataclass(frozen=True)
class Examination:
    """What every check needs."""

    machine: Machine
    config: config.Config

    @cached_property
    def unit(self) -> Unit | None:
        return self.machine.unit(SERVICE)

    @cached_property
    def service(self) -> Account | None:
        """The user of the unit, if there are both."""
        if self.unit is None:
            return None
        groups = [*self.unit.words("SupplementaryGroups"), self.unit.last("Group")]
        return self.machine.account(self.unit.last("User") or "root", groups)

    @cached_property
    def runner(self) -> Account:
        """Who runs the daemon, as far as can be known."""
        return self.service or self.machine.caller

    @cached_property
    def states(self) -> dict[str, str]:
        """What systemd says of the unit; empty where it does not run here."""
        return self.show(SERVICE)

    def show(self, unit: str) -> dict[str, str]:
        wanted = "--property=LoadState,ActiveState,SubState,UnitFileState,Result"
        return self.machine.properties("systemctl", "show", wanted, unit)

    @property
    def state_dir(self) -> str:
        return self.config.gateway.state_dir or str(config.DEFAULT_STATE)

    @cached_property
    def ports(self) -> dict[str, Port | None]:
        return {name: self.machine.port(target.port) for name, target in self.config.targets.items()}

    @cached_property
    def seen_lines(self) -> dict[str, dict[str, gpio.Seen | BridgedError] | LineUnavailable]:
        """The GPIO lines of each target that has any, by pin; or why none could be looked at."""
        seen: dict[str, dict[str, gpio.Seen | BridgedError] | LineUnavailable] = {}
        for name, target in self.config.targets.items():
            if target.lines.kind == "gpio":
                try:
                    looked = gpio.look(target.lines, dev=str(self.machine.at("/dev")))
                    seen[name] = {line.pin: what for line, what in looked.items()}
                except LineUnavailable as error:
                    seen[name] = error
        return seen


def unit_allows(unit: Unit, device: str, kinds: set[str]) -> bool:
    if not unit.words("DeviceAllow") and unit.last("DevicePolicy") in ("", "auto"):
        return True
    allowed = {line.split()[0] for line in unit.settings.get("DeviceAllow", [])}
    return device in allowed or any(fnmatchcase(kind, pattern) for kind in kinds for pattern in allowed)
