"""The guest of the VM tests: Debian 12 with systemd, Debian's own kernel, and the two modules that give it hardware.

Everything is taken from Debian at test time and kept under ``.cache/vm`` until its inputs change; nothing of it is committed.

- **root**: a minimal Debian 12 by ``mmdebstrap``: systemd, udev, Python, ``nc``. Also used as it is by the tier in containers.
- **gpio-sim**: Debian's kernel leaves it out, so its source is taken from Debian's kernel source and built as a module of its
  own, with two small changes (``GPIO_SIM_CHANGES``). Where a change does not apply any more the build says so and stops.
- **uartpair**: our own pair of serial ports (``uartpair/uartpair.c``).
- **initrd**: busybox and the modules that find the disk. **disk**: ext4, made by ``mke2fs -d`` without mounting anything.

Bookworm and amd64 only: what the changes to gpio-sim are tied to. ``lacking`` says what a machine does not have.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "vm"

TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mmdebstrap": "mmdebstrap",
    "depmod": "kmod",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "mke2fs": "e2fsprogs",
    "gcc": "gcc",
    "make": "make",
    "xz": "xz-utils",
}
SOURCE = Path("/usr/src/linux-source-6.1.tar.xz")
PACKAGES = (
    "systemd,systemd-sysv,udev,dbus,kmod,python3,python3-venv,procps,iproute2,netcat-openbsd,psmisc,util-linux"
    # What a gateway has anyway, and what the tests do not need is masked below.
)
MASKED = (
    "getty.target",
    "console-getty.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "systemd-update-utmp.service",
    "systemd-firstboot.service",
    "systemd-binfmt.service",
    "proc-sys-fs-binfmt_misc.automount",
    "systemd-pstore.service",
    "modprobe@drm.service",
    "modprobe@dm_mod.service",
    "modprobe@fuse.service",
    "modprobe@loop.service",
    "systemd-logind.service",
    "systemd-user-sessions.service",
    "systemd-update-utmp-runlevel.service",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "sys-fs-fuse-connections.mount",
)
ROOT_MODULES = ("configfs", "ipv6", "sch_netem", "virtio_console", "autofs4")
INITRD_MODULES = ("virtio_pci", "virtio_blk", "ext4", "crc32c_generic")
DISK_MIB = 1024

# (file, old, new, why). Each must apply exactly once.
GPIO_SIM_CHANGES = (
    (
        "irq_sim.c",
        "handle_simple_irq(irq_to_desc(irqnum))",
        "generic_handle_irq(irqnum)",
        "irq_to_desc is not exported to modules",
    ),
    (
        "gpio-sim.c",
        "static int gpio_sim_direction_input(struct gpio_chip *gc, unsigned int offset)\n"
        "{\n"
        "	struct gpio_sim_chip *chip = gpiochip_get_data(gc);\n"
        "\n"
        "	mutex_lock(&chip->lock);\n"
        "	__set_bit(offset, chip->direction_map);\n",
        "static int gpio_sim_direction_input(struct gpio_chip *gc, unsigned int offset)\n"
        "{\n"
        "	struct gpio_sim_chip *chip = gpiochip_get_data(gc);\n"
        "\n"
        "	mutex_lock(&chip->lock);\n"
        "	__set_bit(offset, chip->direction_map);\n"
        "	__assign_bit(offset, chip->value_map, test_bit(offset, chip->pull_map));\n",
        "an open-drain line that is let go shows its pull, as a real pin does",
    ),
)

INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for module in /mod/*; do /bin/busybox insmod "$module"; done
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  [ -b /dev/vda ] && break
  /bin/busybox usleep 100000
done
/bin/busybox mount -t ext4 /dev/vda /new && /bin/busybox mount --move /dev /new/dev
exec /bin/busybox switch_root /new /sbin/init
"""

AGENT_UNIT = """[Unit]
Description=Carries out what the tests outside ask for
DefaultDependencies=no
After=systemd-udevd.service
[Service]
ExecStart=/usr/bin/python3 /usr/local/lib/bridged-vm/agent.py
Restart=always
RestartSec=200ms
OOMScoreAdjust=-900
KillMode=process
[Install]
WantedBy=basic.target
"""


@dataclass(frozen=True)
class Guest:
    """What ``build`` made."""

    kernel: Path
    initrd: Path
    disk: Path
    root: Path


def lacking() -> str:
    """Why there can be no VM here, with the remedy; empty: there can."""
    if os.geteuid() != 0:
        return "root is needed to unpack the guest (sudo make vm-test)"
    if platform.machine() != "x86_64":
        return f"an x86-64 machine is needed for the guest's kernel, this is {platform.machine()}"
    release = Path("/etc/os-release").read_text() if Path("/etc/os-release").exists() else ""
    if "VERSION_CODENAME=bookworm" not in release:
        return "Debian 12 (bookworm) is needed: gpio-sim is built from its kernel source"
    packages = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if not SOURCE.exists():
        packages.append("linux-source-6.1")
    if not _headers():
        packages.append("linux-headers-amd64")
    return f"apt install {' '.join(packages)}" if packages else ""


def build() -> Guest:
    """The guest, from the cache where its inputs are the same."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kernel = _headers()
        folder = CACHE / _key(kernel)
        if not (folder / "done").exists():
            for old in CACHE.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
            folder.mkdir()
            _build(folder, kernel)
            (folder / "done").touch()
    return Guest(folder / "vmlinuz", folder / "initrd.cpio", folder / "disk.img", folder / "root")


def _headers() -> str:
    """Release of the newest kernel whose headers are here, as 6.1.0-56-amd64."""
    found = [
        name.removeprefix("linux-headers-")
        for name in os.listdir("/usr/src")
        if re.fullmatch(r"linux-headers-6\.1\..*-amd64", name)
    ]
    return max(found, key=lambda name: [int(part) for part in re.findall(r"\d+", name)], default="")


def _key(kernel: str) -> str:
    parts = [kernel.encode(), PACKAGES.encode(), Path(__file__).read_bytes()]
    parts += [(HERE / "uartpair" / "uartpair.c").read_bytes(), (HERE / "guest" / "agent.py").read_bytes()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _run(*command: str | Path, cwd: Path | None = None, stdin: str = "") -> str:
    ran = subprocess.run([str(part) for part in command], cwd=cwd, input=stdin, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(
            f"{' '.join(map(str, command))} ended with {ran.returncode}:\n{ran.stdout[-2000:]}{ran.stderr[-4000:]}"
        )
    return ran.stdout


def _build(out: Path, kernel: str) -> None:
    root = out / "root"
    _root(root)
    image = out / "kernel"
    package = f"linux-image-{kernel}"
    _run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package, cwd=out)
    (archive,) = out.glob("linux-image-*.deb")
    _run("dpkg-deb", "-x", archive, image)
    archive.unlink()
    _run("depmod", "-b", image, kernel)
    modules = root / "lib" / "modules" / kernel
    modules.mkdir(parents=True)
    for name in ROOT_MODULES:
        for path in _with_dependencies(image, kernel, name):
            shutil.copy(path, modules)
    shutil.copy(_gpio_sim(out / "gpio-sim", kernel), modules)
    pair = out / "uartpair"
    shutil.copytree(HERE / "uartpair", pair)
    shutil.copy(_module(pair, kernel, "uartpair"), modules)
    for name in ("builtin", "order", "builtin.modinfo"):
        shutil.copy(image / "lib" / "modules" / kernel / f"modules.{name}", modules)
    _run("depmod", "-b", root, kernel)
    _initrd(out, image, kernel)
    shutil.copy(image / "boot" / f"vmlinuz-{kernel}", out / "vmlinuz")
    _run(
        "mke2fs", "-q", "-t", "ext4", "-J", "size=16", "-E", "lazy_itable_init=1", "-d", root, out / "disk.img", f"{DISK_MIB}M"
    )
    for name in ("kernel", "gpio-sim", "uartpair", "initrd"):
        shutil.rmtree(out / name)


def _root(root: Path) -> None:
    excluded = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
    _run(
        *("mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}"),
        *('--aptopt=APT::Install-Recommends "false"', '--aptopt=Acquire::Languages "none"'),
        *(f"--dpkgopt=path-exclude={path}" for path in excluded),
        *("bookworm", root),
    )
    units = root / "etc" / "systemd" / "system"
    for name in MASKED:
        (units / name).unlink(missing_ok=True)
        (units / name).symlink_to("/dev/null")
    (units / "vm-agent.service").write_text(AGENT_UNIT)
    (units / "basic.target.wants").mkdir(exist_ok=True)
    (units / "basic.target.wants" / "vm-agent.service").symlink_to("../vm-agent.service")
    place = root / "usr" / "local" / "lib" / "bridged-vm"
    place.mkdir(parents=True)
    shutil.copy(HERE / "guest" / "agent.py", place)
    (root / "etc" / "modules-load.d").mkdir(exist_ok=True)
    (root / "etc" / "modules-load.d" / "bridged-vm.conf").write_text("virtio_console\nconfigfs\n")
    (root / "etc" / "fstab").write_text("")
    (root / "etc" / "hostname").write_text("gateway\n")
    (root / "etc" / "hosts").write_text("127.0.0.1 localhost gateway\n")
    (root / "etc" / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    # As on a gateway: the journal is on the disk, and there after a power cut.
    (root / "var" / "log" / "journal").mkdir(exist_ok=True)


def _with_dependencies(image: Path, kernel: str, name: str) -> list[Path]:
    text = _run("modprobe", "-d", image, "-S", kernel, "--show-depends", name)
    return [Path(line.split()[1]) for line in text.splitlines() if line.startswith("insmod ")]


def _gpio_sim(folder: Path, kernel: str) -> Path:
    folder.mkdir()
    top = SOURCE.name.removesuffix(".tar.xz")
    wanted = ("drivers/gpio/gpio-sim.c", "drivers/gpio/gpiolib.h", "kernel/irq/irq_sim.c")
    _run("tar", "-xJf", SOURCE, "-C", folder, "--strip-components=3", *(f"{top}/{name}" for name in wanted))
    for name, old, new, why in GPIO_SIM_CHANGES:
        text = (folder / name).read_text()
        if text.count(old) != 1:
            raise RuntimeError(f"{SOURCE}: the change to {name} does not apply ({why}); look at it and adapt {__file__}")
        (folder / name).write_text(text.replace(old, new))
    (folder / "Makefile").write_text("obj-m := gpio-sim-oot.o\ngpio-sim-oot-y := gpio-sim.o irq_sim.o\n")
    return _module(folder, kernel, "gpio-sim-oot")


def _module(folder: Path, kernel: str, name: str) -> Path:
    _run("make", "-s", "-C", f"/usr/src/linux-headers-{kernel}", f"M={folder}", "modules")
    _run("strip", "-g", folder / f"{name}.ko")
    return folder / f"{name}.ko"


def _initrd(out: Path, image: Path, kernel: str) -> None:
    folder = out / "initrd"
    for name in ("bin", "mod", "proc", "sys", "dev", "new"):
        (folder / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, folder / "bin" / "busybox")
    paths = [path for name in INITRD_MODULES for path in _with_dependencies(image, kernel, name)]
    for number, path in enumerate(dict.fromkeys(paths)):
        shutil.copy(path, folder / "mod" / f"{number:02}-{path.name}")
    (folder / "init").write_text(INIT)
    (folder / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(folder)) for path in sorted(folder.rglob("*")))
    archive = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"], cwd=folder, input=names.encode(), capture_output=True, check=True
    )
    (out / "initrd.cpio").write_bytes(archive.stdout)


if __name__ == "__main__":
    if reason := lacking():
        raise SystemExit(reason)
    print(build().disk)
