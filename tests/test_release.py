"""What is released: one version everywhere, the same bytes from every machine, and a wheel that needs nothing but Python."""

from __future__ import annotations

import email.parser
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from bridged import __version__
from tests import build_release
from tests.support import missing

ROOT = build_release.ROOT
UV = [sys.executable, "-m", "uv", "--quiet", "--no-config"]
# Of the environment in which a user installs: neither our lock's hashes nor what this one has.
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("VIRTUAL_ENV")}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with sdist and wheel, which were compared."""
    work = tmp_path_factory.mktemp("release")
    first, second = build_release.twice(work)
    assert sorted(name.rpartition("-")[2] for name in first) == [f"{__version__}.tar.gz", "any.whl"]
    assert first == second, "files of a release depend on the machine that builds them"
    return work / "first"


def test_the_same_bytes_and_nothing_of_the_machine_in_them(release: Path) -> None:
    when = int(build_release.epoch())
    (sdist,), (wheel,) = release.glob("*.tar.gz"), release.glob("*.whl")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = [member.name for member in members]
    assert {member.mtime for member in members} == {when}
    assert {(member.uid, member.gid, member.uname, member.gname) for member in members} == {(0, 0, "", "")}
    assert {member.mode & 0o777 for member in members if member.isfile()} == {0o644, 0o755}
    with zipfile.ZipFile(wheel) as archive_of_wheel:
        infos = archive_of_wheel.infolist()
        assert len({info.date_time for info in infos}) == 1
    # Whoever has only the archive can run the demo, the tests and the check.
    inside = {name.partition("/")[2] for name in names}
    wanted = ("Makefile", "README.md", "LICENSE", "CHANGELOG.md", "install.sh", "docs/README.md", "docs/CONTRIBUTING.md")
    for name in (*wanted, "requirements.lock", "requirements-dev.lock", "tests/test_release.py", "systemd/bridged.service"):
        assert name in inside, name
    assert not [name for name in names if "__pycache__" in name or ".cache" in name or ".venv" in name]


def test_one_version_everywhere(release: Path) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    heading = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None
    assert heading[1] == __version__
    (wheel,) = release.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.parser.Parser().parsestr(archive.read(f"bridged-{__version__}.dist-info/METADATA").decode())
    assert metadata["Version"] == __version__
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_the_wheel_works_in_an_environment_that_has_nothing(release: Path, tmp_path: Path) -> None:
    """Installed as a user would, wheels only, so no compiler is asked for; then a flash is staged, done, proven and counted."""
    (wheel,) = release.glob("*.whl")
    made = subprocess.run(
        [*UV, "venv", "--python", sys.executable, "bare"], cwd=tmp_path, env=PLAIN, capture_output=True, check=False
    )
    assert made.returncode == 0, made.stderr.decode()
    command = [
        *UV,
        "pip",
        "install",
        "--python",
        "bare",
        "--only-binary",
        ":all:",
        "-c",
        str(ROOT / "requirements.lock"),
        str(wheel),
    ]
    ran = subprocess.run(command, cwd=tmp_path, env=PLAIN, capture_output=True, text=True, timeout=100, check=False)
    reachable(ran)
    assert ran.returncode == 0, ran.stderr
    program = tmp_path / "bare" / "bin" / "bridged"
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(program), *words]
        return subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=100, check=False)

    assert run("--version").stdout == f"bridged {__version__}\n"
    demo = run("demo", "--chip", "F756", "--fast")
    assert demo.returncode == 0, demo.stdout + demo.stderr
    for page in ("man1/bridged.1", "man5/bridged.toml.5"):
        assert (tmp_path / "bare" / "share" / "man" / page).exists()


def resolve(platform: str, text: str, tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "wanted.in").write_text(text)
    command = [
        *UV,
        "pip",
        "compile",
        "wanted.in",
        "--only-binary",
        ":all:",
        "--python-platform",
        platform,
        "--python-version",
        "3.11",
    ]
    ran = subprocess.run([*command, *words], cwd=tmp_path, env=PLAIN, capture_output=True, text=True, timeout=100, check=False)
    reachable(ran)
    return ran


def reachable(ran: subprocess.CompletedProcess[str]) -> None:
    if ran.returncode and re.search("dns error|Failed to fetch|tunnel|connect", ran.stderr, re.IGNORECASE):
        missing("a registry of Python packages", "see that pip reaches one")


@pytest.mark.parametrize("platform", ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"])
def test_everything_has_a_wheel(platform: str, tmp_path: Path) -> None:
    """With the extras but `systemd`, in the versions of the lock: neither a gateway nor a desk needs a compiler."""
    wanted = f"bridged[sign,fleet] @ file://{ROOT}\n"
    ran = resolve(
        platform,
        wanted,
        tmp_path,
        "-c",
        str(ROOT / "requirements-dev.lock"),
        "--no-binary",
        "bridged",
        "--no-header",
        "--no-annotate",
    )
    assert ran.returncode == 0, ran.stderr
    found = set(re.findall(r"^([\w-]+)==", ran.stdout, re.MULTILINE))
    assert {
        "aiohttp",
        "gpiod",
        "pyserial-asyncio",
        "prometheus-client",
        "bincopy",
        "pyelftools",
        "cryptography",
        "nats-py",
    } <= found


def test_that_check_can_fail(tmp_path: Path) -> None:
    """It has a source archive only, which is why nobody needs it: sd_notify is a few lines of ours where it is missing."""
    ran = resolve("aarch64-unknown-linux-gnu", "systemd-python==235\n", tmp_path)
    assert ran.returncode != 0
    assert "no usable wheels" in " ".join(ran.stderr.split()), ran.stderr
