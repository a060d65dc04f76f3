"""What is shipped: the wheel, the locked packages, the units for systemd."""

from __future__ import annotations

import configparser
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from bridged.doctor import boards
from tests.support import missing, require_tool

ROOT = Path(__file__).resolve().parent.parent
UNITS = ("bridged.service", "bridged.socket", "bridged-http.socket", "bridged-console@.socket")
LOCKS = ("requirements.lock", "requirements-dev.lock")


def tracked() -> list[Path]:
    """Files of the repository. An unpacked source archive has no history, and then there is nothing to compare with."""
    git = require_tool("git", "git")
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    out = subprocess.run([git, "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True, text=True).stdout
    return [ROOT / name for name in out.split("\0") if name and (ROOT / name).exists()]


# --- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_has_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    package = {str(path.relative_to(ROOT)) for path in tracked() if path.is_relative_to(ROOT / "bridged")}
    assert "bridged/py.typed" in names, "our types are for users too"
    assert package - names == set(), "tracked, but not in the wheel"
    strangers = {name for name in names if not name.startswith("bridged/") and ".dist-info/" not in name}
    places = {"share/bash-completion/completions/bridged", "share/zsh/site-functions/_bridged"}
    places |= {"share/man/man1/bridged.1", "share/man/man5/bridged.toml.5"}
    shared = {name.partition(".data/data/")[2] for name in strangers}
    assert {name for name in shared if not name.startswith("share/bridged/")} == places
    assert not {name for name in names if name.endswith(".pyc")}


def test_the_wheel_has_the_second_stage_loader(wheel: zipfile.ZipFile) -> None:
    """Only the binary is needed to use it; the source and the manifest are its proof."""
    manifest = json.loads(wheel.read("bridged/stub/manifest.json"))
    assert hashlib.sha256(wheel.read("bridged/stub/stub.bin")).hexdigest() == manifest["sha256"]
    assert hashlib.sha256(wheel.read("bridged/stub/stub.c")).hexdigest() == manifest["sources"]["stub.c"]
    assert "bridged/stub/stub.map" in wheel.namelist()


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    info = next(name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert scripts["console_scripts"]["bridged"] == "bridged.cli:main"
    assert any(name.startswith(info) and name.endswith("LICENSE") for name in wheel.namelist())


# --- the service, where pip installed it, and a bare Raspberry Pi


def install_service(wheel: zipfile.ZipFile, prefix: Path, root: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """As from an environment at ``prefix``, into the tree at ``root``."""
    for name in wheel.namelist():
        place = name.partition(".data/data/")[2]
        if place.startswith("share/"):
            path = prefix / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(wheel.read(name))
    (prefix / "bin").mkdir(exist_ok=True)
    (prefix / "bin" / "bridged").write_text("#!/bin/sh\n")
    (prefix / "bin" / "bridged").chmod(0o755)
    script = prefix / "share" / "bridged" / "install-service.sh"
    return subprocess.run(["sh", script, "--root", root, *more], capture_output=True, text=True, check=False)


def test_the_wheel_makes_a_service_of_itself(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    prefix, root = tmp_path / "opt" / "elsewhere", tmp_path / "root"
    ran = install_service(wheel, prefix, root)
    assert ran.returncode == 0, ran.stderr
    unit = (root / "etc/systemd/system/bridged.service").read_text()
    assert f"ExecStart={prefix}/bin/bridged serve" in unit
    assert "/opt/bridged/" not in unit
    found = {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}
    installed = {f"etc/systemd/system/{name}" for name in UNITS}
    assert installed < found
    assert {"etc/sysusers.d/bridged.conf", "etc/tmpfiles.d/bridged.conf", "etc/udev/rules.d/60-bridged.rules"} < found
    manual = root / "usr/local/share/man/man5/bridged.toml.5"
    assert manual.resolve() == prefix / "share/man/man5/bridged.toml.5"
    assert (root / "usr/local/share/bash-completion/completions/bridged").exists()
    # Its own configuration is kept when the next version is installed.
    (root / "etc/bridged/bridged.toml").write_text("# mine\n")
    assert install_service(wheel, prefix, root).returncode == 0
    assert (root / "etc/bridged/bridged.toml").read_text() == "# mine\n"
    # So are device rules, which have a file of their own, also those that were written into ours.
    rules = root / "etc/udev/rules.d"
    ours = (rules / "60-bridged.rules").read_text()
    mine = 'SUBSYSTEM=="tty", SUBSYSTEMS=="usb", KERNELS=="1-1.4", SYMLINK+="bridged/motor1"\n'
    changed = f"{ours}# the left one\n{mine}"
    (rules / "60-bridged.rules").write_text(changed)
    said = install_service(wheel, prefix, root).stdout
    assert "61-bridged-local.rules" in said
    for _ in range(2):  # Repeated, it moves nothing, and says nothing.
        there = {path.name: path.read_text() for path in rules.iterdir()}
        assert there == {"60-bridged.rules": ours, "60-bridged.rules.bak": changed, "61-bridged-local.rules": mine}
        assert "rules" not in install_service(wheel, prefix, root).stdout
    # What somebody else has put there stays, too.
    (root / "usr/local/share/zsh/site-functions/_bridged").unlink()
    (root / "usr/local/share/zsh/site-functions/_bridged").write_text("# mine\n")
    assert install_service(wheel, prefix, root, "--remove").returncode == 0
    left = {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}
    kept = {"etc/udev/rules.d/60-bridged.rules.bak", "etc/udev/rules.d/61-bridged-local.rules"}
    assert left == {"etc/bridged/bridged.toml", "usr/local/share/zsh/site-functions/_bridged", *kept}
    assert install_service(wheel, prefix, root, "--nonsense").returncode == 2


def test_an_environment_in_a_home_directory_is_no_place_for_a_service(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    install_service(wheel, tmp_path, tmp_path / "root")
    script = tmp_path / "share" / "bridged" / "install-service.sh"
    environment = {"BRIDGED_PREFIX": "/home/pi/.local/share/pipx/venvs/bridged", "PATH": "/usr/bin:/bin"}
    ran = subprocess.run(["sh", script], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "may not look into home directories" in ran.stderr


CMDLINE = "console=serial0,115200 console=tty1 root=PARTUUID=1-02 rootfstype=ext4 rootwait\n"


@pytest.mark.parametrize("pi", boards.PIS, ids=lambda pi: pi.name)
def test_the_script_for_a_bare_pi_frees_the_uart_and_does_it_once(pi: boards.Pi, tmp_path: Path) -> None:
    boot = tmp_path / "boot" / "firmware"
    boot.mkdir(parents=True)
    (boot / "config.txt").write_text("# mine\ndtparam=audio=on\n[cm4]\notg_mode=1\n")
    (boot / "cmdline.txt").write_text(CMDLINE)
    command: list[str | Path] = [
        ROOT / "install.sh",
        "--uart-only",
        "--root",
        tmp_path,
        "--model",
        f"{pi.name} Model B Rev 1.0",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "/dev/ttyAMA0, after a reboot" in said
    config = (boot / "config.txt").read_text()
    assert config.startswith("# mine\ndtparam=audio=on\n")
    # Behind a filter that the file ended with, or it would hold for one model only.
    assert config.split("[all]")[1].split() == ["#", "for", "bridged", *pi.config_lines]
    assert (boot / "cmdline.txt").read_text() == "console=tty1 root=PARTUUID=1-02 rootfstype=ext4 rootwait\n"
    assert (boot / "cmdline.txt.before-bridged").read_text() == CMDLINE
    assert "after a reboot" not in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (boot / "config.txt").read_text() == config


def test_the_script_leaves_other_machines_alone(tmp_path: Path) -> None:
    command: list[str | Path] = [ROOT / "install.sh", "--uart-only", "--root", tmp_path, "--model", "Some Board"]
    assert "as they were" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert subprocess.run([ROOT / "install.sh", "--nonsense"], capture_output=True, check=False).returncode == 2


# --- the Debian package

# What a script calls is noted; was-enabled and the stops succeed, and bridged.socket is what runs.
CALLED = """#!/bin/sh
echo "$(basename "$0") $*" >>"$CALLS"
case "$*" in *list-units*) echo "bridged.socket loaded active running x" ;; esac
"""


@pytest.mark.parametrize(
    ("before", "taken_back"),
    [("upgrade 2.0", "abort-upgrade 2.0"), ("remove", "abort-remove"), ("upgrade 2.0", "configure 1.0")],
)
def test_what_the_package_stopped_is_started_again_also_where_dpkg_failed(tmp_path: Path, before: str, taken_back: str) -> None:
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    tools = tmp_path / "bin"
    tools.mkdir()
    names = ["systemctl", "udevadm", "modprobe", "journalctl", "systemd-sysusers", "systemd-tmpfiles"]
    for name in (*names, "deb-systemd-helper", "deb-systemd-invoke"):
        (tools / name).write_text(CALLED)
        (tools / name).chmod(0o755)

    def run(name: str, words: str) -> list[str]:
        """A maintainer script with a /run of its own; what it called."""
        script = tmp_path / name
        script.write_text((ROOT / "debian" / name).read_text().replace("/run/", f"{tmp_path}/run/"))
        calls = tmp_path / f"calls-{name}"
        environment = {"PATH": f"{tools}:/usr/bin:/bin", "CALLS": str(calls)}
        subprocess.run(["sh", script, *words.split()], env=environment, check=True, capture_output=True)
        return calls.read_text().splitlines()

    stopped = run("prerm", before)
    assert {"deb-systemd-invoke stop bridged.socket", "deb-systemd-invoke stop bridged.service"} < set(stopped)
    started = run("postinst", taken_back)
    assert started[-2:] == ["systemctl start bridged.socket", "deb-systemd-invoke start bridged.service"]
    # Nothing is left behind, neither then nor where a removal succeeds.
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "systemd"]
    run("prerm", "remove")
    run("postrm", "remove")
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "systemd"]


# --- locked packages


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_hashes_and_no_address(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert "://" not in text
    assert not re.findall(r"^-", text, re.MULTILINE), "an option line would choose where packages come from"
    entries = re.split(r"\n(?=[a-z0-9])", text.replace("\\\n", " "))
    assert len(entries) > 15
    for entry in entries:
        assert re.match(r"[a-z0-9-]+==\S+ ", entry), entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry


def test_the_lock_covers_what_the_project_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]

    def names(requirements: list[object]) -> set[str]:
        return {normal(re.match(r"[\w.-]+", text)[0]) for text in requirements if isinstance(text, str)}  # type: ignore[index]

    locked = {lock: set(re.findall(r"^([a-z0-9-]+)==", (ROOT / lock).read_text(), re.MULTILINE)) for lock in LOCKS}
    run = names(project["project"]["dependencies"]) | names(groups["setup"])
    assert run <= locked["requirements.lock"], 'run "make lock"'
    assert run | names(groups["dev"]) | names(groups["firmware"]) <= locked["requirements-dev.lock"], 'run "make lock"'


def test_both_locks_choose_the_same_versions() -> None:
    run, dev = (dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / lock).read_text(), re.MULTILINE)) for lock in LOCKS)
    assert {name: dev.get(name) for name in run} == run


def test_no_file_names_a_registry() -> None:
    """Where packages come from is the affair of the machine (its own mirror, for one), not of the project."""
    hosts = ("pypi" + ".org", "pythonhosted" + ".org", "registry.npmjs" + ".org", "piwheels" + ".org", "proxy.golang" + ".org")
    found = [f"{path.relative_to(ROOT)}: {host}" for path in tracked() for host in hosts if host.encode() in path.read_bytes()]
    assert found == []


# --- systemd


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units with a program that exists here, as ``systemd-analyze verify`` looks for it."""
    for name in UNITS:
        text = (ROOT / "systemd" / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/bridged/bin/bridged", shutil.which("true") or "/bin/true"))
    return tmp_path


def analyze(*args: str | Path) -> subprocess.CompletedProcess[str]:
    tool = require_tool("systemd-analyze", "systemd")
    ran = subprocess.run([tool, *args], capture_output=True, text=True, check=False)
    if "offline" in ran.stderr and "unrecognized option" in ran.stderr:
        missing("systemd-analyze of systemd 250 or newer", "use Debian 12 or newer")
    return ran


def test_systemd_accepts_the_units(units: Path) -> None:
    ran = analyze("verify", "--man=no", *(units / name for name in UNITS))
    # Complaints about other units of this machine are not ours.
    assert [line for line in ran.stderr.splitlines() if "bridged" in line] == []
    assert ran.returncode == 0


def test_systemd_accepts_the_examples_of_drop_ins(units: Path) -> None:
    folder = units / "bridged.service.d"
    folder.mkdir()
    examples = sorted((ROOT / "systemd" / "examples").glob("*.conf"))
    assert len(examples) >= 5
    for example in examples:
        name = re.search(r"^# /etc/systemd/system/bridged\.service\.d/(\S+)$", example.read_text(), re.MULTILINE)
        assert name is not None, "its first line says where it goes"
        assert name[1] == example.name
        (folder / example.name).write_text(example.read_text())
    ran = analyze("verify", "--man=no", units / "bridged.service")
    assert [line for line in ran.stderr.splitlines() if "bridged" in line] == []
    (folder / "wrong.conf").write_text("[Service]\nReadWritePath=/data\n")
    assert "ReadWritePath" in analyze("verify", "--man=no", units / "bridged.service").stderr, "a drop-in is read at all"


def test_the_service_is_locked_down(units: Path) -> None:
    ran = analyze("security", "--offline=true", "--threshold=20", "--no-pager", units / "bridged.service")
    assert "Overall exposure level" in ran.stdout, ran.stderr
    assert ran.returncode == 0, ran.stdout


def service() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (ROOT / "systemd" / "bridged.service").read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def test_stopping_waits_longer_than_any_erase() -> None:
    """P9: until twice the worst case of the chip table nobody may reset a target, systemd's SIGKILL included."""
    from bridged import chips

    runs = [run for chip in chips.CHIPS.values() for layout in chip.layouts for bank in layout.banks for run in bank.runs]
    longest_s = max(*(chip.mass_erase_max_s for chip in chips.CHIPS.values()), *(run.erase_max_s for run in runs))
    assert longest_s > 10
    assert int(service()["TimeoutStopSec"][0]) > 2 * longest_s


def test_the_service_does_what_the_design_says() -> None:
    unit = service()
    assert unit["Type"] == ["notify"]
    assert unit["WatchdogSec"] == ["30"]
    assert unit["KillMode"] == ["control-group"], "mixed would kill a session in the middle of an erase"
    assert unit["DevicePolicy"] == ["closed"]
    assert unit["DeviceAllow"] == ["char-tty[A-Z]* rw", "char-gpiochip rw"]
    assert "PrivateDevices" not in unit
    assert "BindsTo" not in unit
    assert unit["ExecStopPost"][0].endswith("--release-only")
    assert unit["RuntimeDirectoryPreserve"] == ["yes"], "or a stop removes the socket that bridged.socket holds"
