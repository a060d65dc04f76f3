"""The Debian package: installing, upgrading with a running job, removing, purging; and pip. A container of its own for each."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from debian.build import build as build_package
from tests.support import missing
from tests.vm import build, container
from tests.vm.container import Container
from tests.vm.inside import flash, install, say, set_up, status, wait_for
from tests.vm.test_service import image, show

ROOT = Path(__file__).resolve().parents[2]
# What installing anything leaves behind, and what the machine writes by itself.
NOT_OURS = re.compile(
    r"^/(var/lib/dpkg|var/lib/systemd|var/log|var/cache|var/tmp|run|proc|sys|dev|tmp|root|agent)(/|$)|"
    r"^/etc/(group|gshadow|passwd|shadow|subuid|subgid|ld\.so\.cache|\.pwd\.lock|systemd/system)-?$|^/(etc|var/lib)$"
)


@pytest.fixture
def machine(guest: build.Guest, tmp_path: Path) -> Iterator[Container]:
    if reason := container.lacking():
        missing("a container", reason)
    with Container(guest, tmp_path / "container") as inside:
        yield inside


@pytest.fixture(scope="session")
def newer(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same package with a higher version, and a module that says so."""
    folder = tmp_path_factory.mktemp("newer")
    subprocess.run(["dpkg-deb", "-R", package, folder / "root"], check=True)
    control = folder / "root" / "DEBIAN" / "control"
    control.write_text(re.sub(r"^Version: .*$", "Version: 99.0", control.read_text(), flags=re.MULTILINE))
    (module,) = (folder / "root" / "opt").rglob("site-packages/bridged/__init__.py")
    module.write_text(module.read_text().replace("__version__ =", '__version__ = "99.0"  # was'))
    for code in (module.parent / "__pycache__").glob("__init__.*"):
        code.unlink()
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Zgzip", "--build", folder / "root", folder / "newer.deb"], check=True)
    return folder / "newer.deb"


def files(inside: Container) -> set[str]:
    found = inside.run("find / -xdev \\( -path /proc -o -path /sys -o -path /agent \\) -prune -o -print").splitlines()
    return {path for path in found if not NOT_OURS.search(path)}


def test_installing_is_enough_and_purging_leaves_nothing(machine: Container, package: Path) -> None:
    before = files(machine)
    users = machine.run("cat /etc/passwd")
    install(machine, package)
    # Enabled, running, answering; with nothing configured yet.
    assert (show(machine, "ActiveState"), show(machine, "UnitFileState")) == ("active", "enabled")
    assert "250 PONG" in say(machine, "PING")
    assert machine.run("bridged targets").strip() != ""
    assert machine.run("systemctl --failed --no-legend").strip() == ""
    machine.run("dpkg --verify bridged")
    machine.run(
        "/opt/bridged/bin/python3 -sP -c 'import nats.js; import cryptography.hazmat.primitives.asymmetric.ed25519'"
    )  # fleets, signatures
    machine.run("dpkg --remove bridged")
    assert machine.try_("systemctl is-active bridged").out.strip() == "inactive"
    assert machine.run("ls /etc/bridged/bridged.toml /var/lib/bridged/state.db"), "kept for the next installation"
    assert not [path for path in files(machine) if path.startswith(("/opt", "/usr/share/doc/bridged", "/usr/bin/bridged"))]
    machine.run("dpkg --purge bridged")
    assert files(machine) - before == set()
    assert machine.run("cat /etc/passwd") == users
    assert "loaded" not in machine.run("systemctl list-units --all --no-legend 'bridged*'")


def test_an_upgrade_with_a_running_job(machine: Container, package: Path, newer: Path) -> None:
    install(machine, package)
    set_up(machine)
    machine.run("echo '# mine' >> /etc/bridged/bridged.toml")
    machine.run("systemctl stop bridged && systemctl start bridged.socket bridged")
    machine.write("/root/newer.deb", newer.read_bytes())
    data = image(40 * 1024, 11)
    job = flash(machine, data, "app")
    wait_for(machine, job, phase="write")
    # As an unattended upgrade does: nobody is asked about the configuration that was changed.
    machine.run("DEBIAN_FRONTEND=noninteractive dpkg --force-confdef --force-confold -i /root/newer.deb")
    assert "220 bridged 99.0" in say(machine, "PING")
    end = wait_for(machine, job, state="succeeded|failed")
    assert end["state"] == "succeeded", end
    assert "state=interrupted" in say(machine, f"LOG {job}")
    assert machine.run("systemctl is-active bridged.socket").strip() == "active"
    assert "# mine" in machine.read("/etc/bridged/bridged.toml").decode()
    machine.run("systemctl stop bridged.socket bridged sim")
    assert machine.read("/var/lib/sim/flash")[: len(data)] == data


def test_an_upgrade_resets_no_target_that_has_no_job(machine: Container, package: Path, newer: Path) -> None:
    install(machine, package)
    set_up(machine)
    job = flash(machine, image(4096, 12), "app")
    wait_for(machine, job, state="succeeded")
    # The application says its banner at every reset.
    machine.run("systemd-run --quiet --unit=listener sh -c 'exec cat /run/sim/tty > /root/heard' && sleep 0.5")
    machine.write("/root/newer.deb", newer.read_bytes())
    machine.run("dpkg --force-confold -i /root/newer.deb && sleep 1")
    assert machine.read("/root/heard") == b""
    assert status(machine, job)["state"] == "succeeded"


def test_who_disabled_it_is_not_surprised_by_an_upgrade(machine: Container, package: Path, newer: Path) -> None:
    install(machine, package)
    machine.run("systemctl disable --now bridged")
    machine.write("/root/newer.deb", newer.read_bytes())
    machine.run("dpkg -i /root/newer.deb")
    assert show(machine, "UnitFileState") == "disabled"


def test_a_secret_and_a_drop_in_go_with_a_purge_only(machine: Container, package: Path) -> None:
    install(machine, package)
    machine.run("echo s > /etc/bridged/credentials/key; systemctl enable bridged.socket")
    machine.run("dpkg --remove bridged")
    assert machine.read("/etc/bridged/credentials/key") == b"s\n"
    machine.run("dpkg --purge bridged")
    assert machine.try_("ls /etc/bridged").status != 0
    assert machine.try_("find /etc/systemd -name 'bridged*' | grep .").status != 0


SOURCES = ("bridged", "config", "shell", "systemd", "pyproject.toml", "README.md", "LICENSE", "requirements.lock", "install.sh")


def test_the_script_for_a_bare_machine(machine: Container, tmp_path: Path) -> None:
    """Also the way of pip: an environment, the locked packages, and the service made by what the wheel brought along.

    The container has no network; what pip would fetch is laid beside it, and hashes are checked as ever.
    """
    wheels = tmp_path / "wheels"
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--only-binary", ":all:"]
    fetch += ["--python-version", "3.11", "--implementation", "cp", "--platform", "manylinux_2_28_x86_64"]
    fetch += ["--platform", "manylinux_2_17_x86_64", "--platform", "manylinux2014_x86_64", "--no-deps"]
    subprocess.run([*fetch, "--require-hashes", "-r", ROOT / "requirements.lock", "-d", wheels], check=True)
    subprocess.run(["tar", "-C", ROOT, "--exclude=__pycache__", "-cf", tmp_path / "source.tar", *SOURCES], check=True)
    machine.write("/root/source.tar", (tmp_path / "source.tar").read_bytes())
    for wheel in wheels.iterdir():
        machine.write(f"/root/wheels/{wheel.name}", wheel.read_bytes())
    machine.run("mkdir /root/source && tar -xf /root/source.tar -C /root/source")
    install_it = "cd /root/source && PIP_NO_INDEX=1 PIP_FIND_LINKS=/root/wheels ./install.sh"
    said = machine.run(install_it)
    assert "sudo bridged init" in said
    assert "its serial ports are as they were" in said, "this is no Raspberry Pi"
    machine.run("systemctl enable --now bridged")
    assert (show(machine, "ActiveState"), show(machine, "UnitFileState")) == ("active", "enabled")
    assert "250 PONG" in say(machine, "PING")
    assert machine.run("bridged --version").startswith("bridged ")
    assert "0 targets" in machine.run("bridged check-config /etc/bridged/bridged.toml")
    # Again, as for an upgrade: what was configured stays, and the daemon goes on.
    machine.run("echo '# mine' >> /etc/bridged/bridged.toml")
    machine.run(install_it + " --no-uart && systemctl restart bridged")
    assert "# mine" in machine.read("/etc/bridged/bridged.toml").decode()
    assert "250 PONG" in say(machine, "PING")
    # And away again, but for what was configured and what happened.
    machine.run("systemctl enable bridged-http.socket bridged-console@m1.socket")
    machine.run("/opt/bridged/share/bridged/install-service.sh --remove")
    assert machine.try_("systemctl cat bridged.service").status != 0
    assert machine.try_("find /etc/systemd /usr/local -name '*bridged*' | grep -v ^/usr/local/lib/bridged-vm").status != 0
    assert "# mine" in machine.read("/etc/bridged/bridged.toml").decode()
    machine.run("test -e /var/lib/bridged/state.db")


def test_the_package_for_arm64_is_put_together_here(tmp_path: Path) -> None:
    """Each library in it is for aarch64 (the build refuses others). It is executed nowhere."""
    made = build_package("arm64", "3.11", tmp_path, "1.2.3")
    fields = subprocess.run(
        ["dpkg-deb", "-f", made, "Architecture", "Version", "Depends"], capture_output=True, text=True, check=True
    )
    assert "Architecture: arm64" in fields.stdout
    assert "python3 (>= 3.11~), python3 (<< 3.12~)" in fields.stdout
    listed = subprocess.run(["dpkg-deb", "-c", made], capture_output=True, text=True, check=True).stdout
    assert re.search(r"gpiod/_ext\.cpython-311-aarch64-linux-gnu\.so", listed)
    assert "x86_64" not in listed
