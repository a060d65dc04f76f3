"""``make deb``: bridged as a Debian package with everything it needs, for amd64 and arm64, without building anything in C.

Why its own environment under /opt/bridged and not Debian's packages: Debian 12 has gpiod 1.6 under the same import name
(another API; 2.2 is needed), aiohttp 3.8 (3.9 is needed), and no bincopy 20. What is in there is what
``requirements.lock`` names, hashes checked, wheels only. Only Python itself comes from Debian, and the package depends on
exactly the version whose wheels are inside.

The environment is laid out by hand (``pyvenv.cfg``, a link to Debian's Python, ``site-packages``) and runs in place, so that a
package for arm64 is put together on any machine: nothing of the target is executed. Byte code is shipped with unchecked hashes:
the service cannot write its own under ``ProtectSystem=strict``, and files stay the same from build to build.

    python debian/build.py [--arch amd64|arm64] [--python 3.11] [--out dist] [--version 1.2.3]

The scripts beside this file are those of the package: what happens at installation, upgrade, removal and purge is written
there. No debhelper: what it would generate is some thirty lines, and these say what each is for.
"""

from __future__ import annotations

import argparse
import email.message
import email.parser
import gzip
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
UNITS = ("bridged.service", "bridged.socket", "bridged-http.socket", "bridged-console@.socket")
SCRIPTS = ("postinst", "prerm", "postrm")
OPT = "opt/bridged"
PLATFORMS = {"amd64": "x86_64", "arm64": "aarch64"}
GLIBC = 36  # Debian 12 has 2.36: every older manylinux tag fits.
# What comes with it although `pip install bridged` leaves it out: who has many gateways from packages has signed images and a
# fleet, and in here is no pip to get them by. Loaded where it is configured only.
EXTRAS = ("fleet", "sign")
MACHINES = {"amd64": b"\x3e\x00", "arm64": b"\xb7\x00"}  # e_machine in an ELF header

CONTROL = """Package: bridged
Version: {version}
Architecture: {arch}
Maintainer: The bridged project <bridged@invalid>
Installed-Size: {kib}
Depends: python3 (>= {python}~), python3 (<< {next_python}~), systemd (>= 250), udev
Suggests: netcat-openbsd
Section: embedded
Priority: optional
Description: updates STM32 microcontrollers through their ROM loader
 A daemon for a Linux gateway that owns the UARTs, NRST and BOOT0 lines of the
 STM32s wired to it. Firmware comes in by nc or the command line, is staged and
 checked whole, written through the loader in the chip's ROM, and proven by
 reading it back.
"""


def build(arch: str, python: str, out: Path, version: str) -> Path:
    """The package's file."""
    interpreter = shutil.which(f"python{python}")
    if interpreter is None:
        raise SystemExit(f"python{python} is needed to compile byte code for it (apt install python{python})")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        _environment(root / OPT, arch, python, interpreter)
        _files(root, version)
        os.chmod(root, 0o755)
        control = root / "DEBIAN"
        control.mkdir()
        kib = sum(path.lstat().st_size for path in root.rglob("*") if path.is_file()) // 1024
        major, minor = python.split(".")
        (control / "control").write_text(
            CONTROL.format(version=version, arch=arch, python=python, next_python=f"{major}.{int(minor) + 1}", kib=kib)
        )
        (control / "conffiles").write_text("/etc/bridged/bridged.toml\n")
        for name in SCRIPTS:
            shutil.copy(ROOT / "debian" / name, control / name)
            (control / name).chmod(0o755)
        package = out / f"bridged_{version}_{arch}.deb"
        _run("dpkg-deb", "--root-owner-group", "-Zgzip", "--build", root, package)
    return package


def _environment(opt: Path, arch: str, python: str, interpreter: str) -> None:
    site = opt / "lib" / f"python{python}" / "site-packages"
    site.mkdir(parents=True)
    tags = [f"manylinux_2_{minor}_{PLATFORMS[arch]}" for minor in range(GLIBC, 16, -1)]
    tags += [f"manylinux2014_{PLATFORMS[arch]}"]
    with tempfile.NamedTemporaryFile("w", suffix=".lock") as extras:
        extras.write(_locked_extras())
        extras.flush()
        _run(
            *(
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-compile",
                "--target",
                site,
            ),
            *("--require-hashes", "--only-binary", ":all:", "--implementation", "cp", "--python-version", python),
            *(word for tag in tags for word in ("--platform", tag)),
            *("-r", ROOT / "requirements.lock", "-r", extras.name),
        )
    with tempfile.TemporaryDirectory() as wheels:
        _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, ROOT)
        (wheel,) = Path(wheels).glob("*.whl")
        _run(
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"),
            "--no-deps",
            "--target",
            site,
            wheel,
        )
    _keep_what_is_needed(site, python)
    _check_machine(site, arch)
    _run(interpreter, "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "-s", str(opt), "-p", f"/{OPT}", site)
    (opt / "pyvenv.cfg").write_text(f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {python}\n")
    (opt / "bin").mkdir()
    (opt / "bin" / "python3").symlink_to(f"/usr/bin/python{python}")
    (opt / "bin" / "python").symlink_to("python3")
    (opt / "bin" / "bridged").write_text(
        f"#!/{OPT}/bin/python3 -sP\nimport sys\n\nfrom bridged.cli import main\n\nsys.exit(main())\n"
    )
    (opt / "bin" / "bridged").chmod(0o755)


def _locked_extras() -> str:
    """Their lines, and those of what they need, of the lock of development: it has the versions that the tests ran with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {canonicalize_name(Requirement(text).name) for extra in EXTRAS for text in project["optional-dependencies"][extra]}
    blocks = re.findall(r"^(\S+)==(.*\n(?:    .*\n)+)", (ROOT / "requirements-dev.lock").read_text(), re.MULTILINE)
    needed_by = {
        canonicalize_name(name): {
            canonicalize_name(word) for word in re.findall(r"^    #(?: via|  ) (\S+)", rest, re.MULTILINE)
        }
        for name, rest in blocks
    }
    while more := {name for name, by in needed_by.items() if by & names} - names:
        names |= more
    if missing := names - needed_by.keys():
        raise SystemExit(f"requirements-dev.lock does not have {', '.join(sorted(missing))}")
    return "".join(f"{name}=={rest}" for name, rest in blocks if canonicalize_name(name) in names)


def _keep_what_is_needed(site: Path, python: str) -> None:
    """The lock also has what builds the project; only what bridged imports goes into the package."""
    found: dict[str, tuple[Path, email.message.Message]] = {}
    for path in site.glob("*.dist-info"):
        metadata = email.parser.Parser().parsestr((path / "METADATA").read_text())
        found[canonicalize_name(metadata["Name"])] = (path, metadata)
    needed: set[str] = set()
    todo = ["bridged"]
    while todo:
        name = todo.pop()
        if name in needed:
            continue
        needed.add(name)
        for text in found[name][1].get_all("Requires-Dist") or ():
            requirement = Requirement(text)
            environment = {"python_version": python, "sys_platform": "linux", "platform_system": "Linux"}
            extras = ("", *EXTRAS) if name == "bridged" else ("",)
            if requirement.marker is None or any(requirement.marker.evaluate({**environment, "extra": one}) for one in extras):
                todo.append(canonicalize_name(requirement.name))
    for name, (path, _) in found.items():
        if name not in needed:
            for line in (path / "RECORD").read_text().splitlines():
                (site / line.split(",")[0]).unlink(missing_ok=True)
            shutil.rmtree(path)
    for name in ("bin", "share"):  # Of the wheels: what of ours is for other places, ``_files`` puts there.
        shutil.rmtree(site / name, ignore_errors=True)
    for folder in sorted((path for path in site.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()


def _check_machine(site: Path, arch: str) -> None:
    for path in site.rglob("*.so"):
        with path.open("rb") as file:
            if file.read(20)[18:20] != MACHINES[arch]:
                raise SystemExit(f"{path.relative_to(site)} is not for {arch}")


def _files(root: Path, version: str) -> None:
    """Everything outside /opt."""

    def put(source: str, target: str, text: str | None = None) -> None:
        path = root / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((ROOT / source).read_text() if text is None else text)
        path.chmod(0o644)

    for unit in UNITS:
        put(f"systemd/{unit}", f"lib/systemd/system/{unit}")
    put("systemd/bridged.sysusers", "usr/lib/sysusers.d/bridged.conf")
    put("systemd/bridged.tmpfiles", "usr/lib/tmpfiles.d/bridged.conf")
    put("systemd/bridged.catalog", "usr/lib/systemd/catalog/bridged.catalog")
    put("systemd/bridged.modules", "usr/lib/modules-load.d/bridged.conf")
    put("systemd/60-bridged.rules", "lib/udev/rules.d/60-bridged.rules")
    put("config/bridged.toml", "etc/bridged/bridged.toml")
    doc = "usr/share/doc/bridged"
    put("debian/copyright", f"{doc}/copyright")
    for path in sorted((ROOT / "docs").glob("*.md")):
        put(f"docs/{path.name}", f"{doc}/{path.name}")
    for path in sorted((ROOT / "docs" / "pictures").glob("*.svg")):
        put(f"docs/pictures/{path.name}", f"{doc}/pictures/{path.name}")
    for folder in ("config/examples", "config/prometheus", "config/grafana", "systemd/examples"):
        for path in sorted((ROOT / folder).iterdir()):
            put(f"{folder}/{path.name}", f"{doc}/examples/{path.name}")
    put("shell/bridged.bash", "usr/share/bash-completion/completions/bridged")
    put("shell/_bridged", "usr/share/zsh/vendor-completions/_bridged")
    for page in ("bridged.1", "bridged.toml.5"):
        manual = root / "usr" / "share" / "man" / f"man{page[-1]}" / f"{page}.gz"
        manual.parent.mkdir(parents=True)
        manual.write_bytes(gzip.compress((ROOT / "shell" / page).read_bytes(), mtime=0))
        manual.chmod(0o644)
    changes = f"bridged ({version}) stable; urgency=medium\n\n  * See CHANGELOG.md.\n\n -- The bridged project\n"
    (root / doc / "changelog.gz").write_bytes(gzip.compress(changes.encode(), mtime=0))
    put("CHANGELOG.md", f"{doc}/CHANGELOG.md")
    (root / "usr" / "bin").mkdir(parents=True)
    (root / "usr" / "bin" / "bridged").symlink_to(f"/{OPT}/bin/bridged")


def _run(*command: str | Path) -> None:
    # The same time for every file, so that a package depends on its content only.
    environment = {**os.environ, "SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH", "1735689600")}
    ran = subprocess.run(
        [str(part) for part in command], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise SystemExit(
            f"{' '.join(map(str, command))[:300]}\nended with {ran.returncode}:\n{ran.stdout[-2000:]}{ran.stderr[-4000:]}"
        )


def version_of_the_project() -> str:
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "bridged" / "__init__.py").read_text())
    assert found is not None
    return found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Put the Debian package together.")
    parser.add_argument("--arch", choices=sorted(PLATFORMS), default="amd64")
    parser.add_argument("--python", default="3.11", metavar="X.Y", help="Debian 12 has 3.11 (the default), Debian 13 has 3.13")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="DIR")
    parser.add_argument("--version", default=version_of_the_project(), help="default: that of the project")
    options = parser.parse_args()
    print(build(options.arch, options.python, options.out, options.version))


if __name__ == "__main__":
    main()
