"""The gateway in a container: the package installed, one simulated target on a pty with a line box, no hardware."""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path

from tests.e2e.gateway import pairs
from tests.vm.container import Container

CONFIG = """[gateway]
name = "container"
{extra}
[targets.sim]
port = "/run/sim/tty"
chip = "F407"
baud = 115200
[targets.sim.lines]
kind = "socket"
socket = "/run/sim/lines"
nrst = "nrst"
boot0 = "boot0"
"""

# Runs as the daemon's user, so that the daemon may open what it makes.
SIM = """[Unit]
Description=A simulated target
[Service]
User=bridged
RuntimeDirectory=sim
StateDirectory=sim
ExecStart=/opt/bridged/bin/bridged sim --chip F407 --link /run/sim/tty --lines /run/sim/lines --flash-file /var/lib/sim/flash
"""

# The unit lets in serial ports and no ptys; and tests start it more often than anybody should have to.
DROP_IN = "[Unit]\nStartLimitIntervalSec=0\n[Service]\nDeviceAllow=char-pts rw\n"


def install(inside: Container, package: Path) -> None:
    inside.write("/root/bridged.deb", package.read_bytes())
    inside.run("dpkg -i /root/bridged.deb")


def set_up(inside: Container) -> None:
    """A target and a configuration for an installed package, and the daemon running with it."""
    inside.write("/etc/systemd/system/sim.service", SIM)
    inside.write("/etc/systemd/system/bridged.service.d/tests.conf", DROP_IN)
    inside.run("systemctl daemon-reload && systemctl start sim")
    configure(inside)


def configure(inside: Container, extra: str = "") -> None:
    inside.write("/etc/bridged/bridged.toml", CONFIG.format(extra=extra))
    inside.run("systemctl restart bridged")
    inside.wait_for("the target is idle", "printf 'TARGETS\\nQUIT\\n' | nc -N 127.0.0.1 7100 | grep -q 'target=sim state=idle'")


def say(inside: Container, request: str, payload: bytes = b"") -> str:
    return inside.run("nc -N 127.0.0.1 7100", stdin=request.encode() + b"\n" + payload + b"QUIT\n")


def flash(inside: Container, data: bytes, name: str) -> str:
    """Start a flash of ``data``; its job."""
    answer = say(inside, f"PUT {len(data)} {hashlib.sha256(data).hexdigest()} name={name}", data)
    assert "250 " in answer, answer
    answer = say(inside, f"FLASH sim {name} addr=0x08000000")
    found = re.search(r"^250 .*\bjob=(\S+)", answer, re.MULTILINE)
    assert found, answer
    return found[1]


def status(inside: Container, job: str) -> dict[str, str]:
    return pairs(" ".join(line[4:] for line in say(inside, f"STATUS {job}").splitlines()[1:]))


def wait_for(inside: Container, job: str, timeout_s: float = 90.0, **wanted: str) -> dict[str, str]:
    """Until STATUS says so: ``wait_for(inside, job, phase="write")``. ``state`` may name several, by ``|``."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = status(inside, job)
        if all(found.get(key) in value.split("|") for key, value in wanted.items()):
            return found
        assert time.monotonic() < deadline, f"{found}, and not {wanted} after {timeout_s:.0f} s"
        time.sleep(0.1)
