"""Real firmware for tests: the STM32 hubs of Pybricks (MIT), from the npm package ``@pybricks/firmware``.

Fetched at test time through npm into ``.cache/`` (git-ignored), never committed. The version and the digest of the package are
pinned, so that a run of next year tests the same bytes. Without npm or a network the tests are skipped with the remedy; in CI
that is an error.

The images are linked behind a bootloader. The package does not say where, so the addresses are written down here; the test of
the vectors checks them against the reset vectors.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bridged.chips.model import Range
from tests.support import missing

PACKAGE = "@pybricks/firmware"
VERSION = "7.28.0"
SHA256 = "9962aaa78e02d49e10d3c9db93768f98d36165ccdda6176a077e6c360ce52198"
FETCH_TIMEOUT_S = 100
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "firmware"
REMEDY = f"apt install npm, and let `npm pack {PACKAGE}@{VERSION}` reach its registry"


@dataclass(frozen=True, slots=True)
class Hub:
    """One firmware. ``flash_bytes`` and ``ram`` of the part that the hub has; ``pid``: its product id."""

    name: str
    chip: str
    pid: int
    address: int
    data: bytes
    flash_bytes: int
    ram: Range


# name, chip, product id, where the firmware starts, flash size, RAM size
_HUBS = (
    ("movehub", "F070", 0x448, 0x08005000, 128 << 10, 16 << 10),
    ("cityhub", "F030", 0x442, 0x08005000, 256 << 10, 32 << 10),
    ("technichub", "L431", 0x435, 0x08008000, 256 << 10, 64 << 10),
    ("primehub", "F413", 0x463, 0x08008000, 1024 << 10, 320 << 10),
    ("essentialhub", "F413", 0x463, 0x08008000, 1024 << 10, 320 << 10),
)


@cache
def hubs() -> tuple[Hub, ...]:
    """All firmware with an STM32 inside. Skips the running test (CI: fails it) where it cannot be had."""
    found = []
    with tarfile.open(_package()) as package:
        for name, chip, pid, address, flash_bytes, ram_bytes in _HUBS:
            member = package.extractfile(f"package/build/{name}.zip")
            assert member is not None
            with zipfile.ZipFile(member) as archive:
                data = archive.read("firmware-base.bin")
            ram = Range(0x20000000, 0x20000000 + ram_bytes)
            found.append(Hub(name, chip, pid, address, data, flash_bytes, ram))
    return tuple(found)


def firmware() -> list[tuple[str, int, bytes]]:
    """(hub name, address, bytes) of each."""
    return [(h.name, h.address, h.data) for h in hubs()]


def _package() -> Path:
    """The package as npm packs it, from the cache or fetched now."""
    path = CACHE / f"pybricks-firmware-{VERSION}.tgz"
    if not path.exists():
        _fetch(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found == SHA256, f"{path} has SHA-256 {found}, expected {SHA256}; remove it and try again"
    return path


def _fetch(path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        missing("npm", REMEDY)
        raise AssertionError("unreachable: missing() ends the test")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        try:
            subprocess.run(
                [npm, "pack", f"{PACKAGE}@{VERSION}"],
                cwd=directory,
                check=True,
                capture_output=True,
                timeout=FETCH_TIMEOUT_S,
            )
        except (OSError, subprocess.SubprocessError) as error:
            missing(f"real firmware ({PACKAGE} {VERSION}: {type(error).__name__})", REMEDY)
        next(Path(directory).glob("*.tgz")).rename(path)  # in one step: a parallel run never sees half a file
