"""Builds the demo firmware from its C sources, bit for bit: ``python -m tests.build_firmware [--check]``.

The built ELFs are in the repository, so nobody needs a compiler to use or test bridged; this script and ``--check`` are the
proof that they come from the sources beside them. The compiler is the one of the ``ziglang`` wheel in the version pinned
below: clang and lld in one package, the same on every machine. Another version may place code differently, so a build with
it is refused rather than compared.

What makes the result independent of machine and directory: no debug information, no build id, no comment section, paths
mapped away, a cache of its own, and a ballast that is computed here (xorshift32 from a fixed seed).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile

FIRMWARE = Path(__file__).parent.parent / "bridged" / "sim" / "firmware"
SOURCES = ("board.h", "hello.c", "startup.c", "hello.ld")
COMPILER = "ziglang"
COMPILER_VERSION = "0.17.1"

# chip, core, seed of the ballast: any number but 0, different so that no two images share a sector.
BOARDS = (
    ("L476", "cortex_m4", 0x4C343736),
    ("F756", "cortex_m7", 0x46373536),
    ("H743", "cortex_m7", 0x48373433),
)

FLAGS = (
    *("-target", "thumb-freestanding-eabi", "-mfloat-abi=soft", "-std=c23", "-Os", "-Wall", "-Wextra", "-Werror"),
    *("-ffreestanding", "-fno-builtin", "-fno-stack-protector", "-fno-unwind-tables", "-fno-asynchronous-unwind-tables"),
    *("-fno-sanitize=all", "-fno-pic", "-ffunction-sections", "-fno-ident", "-g0", "-ffile-prefix-map=.="),
    *("-nostdlib", "-Wl,--gc-sections", "-Wl,--build-id=none", "-Wl,-e,reset_handler", "-Wl,-z,max-page-size=256", "-s"),
)
OUTPUT = ("-T", "hello.ld", "-o", "hello.elf")


class BuildError(Exception):
    """The build could not be done, or its result differs from what is committed."""


def xorshift32(seed: int) -> Iterator[int]:
    """Marsaglia's generator with shifts 13, 17, 5; yields the low byte of each state."""
    state = seed
    while True:
        state ^= (state << 13) & 0xFFFFFFFF
        state ^= state >> 17
        state ^= (state << 5) & 0xFFFFFFFF
        yield state & 0xFF


def ballast(chip: str, seed: int) -> bytes:
    """As many bytes as ``board.h`` asks for on this chip."""
    text = (FIRMWARE / "board.h").read_text().split(f"defined(BOARD_{chip})", 1)[1]
    kib = int(text.split("#define BALLAST_BYTES (", 1)[1].split("u", 1)[0])
    stream = xorshift32(seed)
    return bytes(next(stream) for _ in range(kib * 1024))


def zig(*arguments: str, work: Path) -> subprocess.CompletedProcess[str]:
    """Run the compiler's package in ``work``, with a cache of its own. Raises ``BuildError`` for another version."""
    found = importlib.metadata.version(COMPILER)
    if found != COMPILER_VERSION:
        raise BuildError(f"{COMPILER} {found} is installed, {COMPILER_VERSION} is needed: another one may build other bytes")
    environment = dict(os.environ, ZIG_GLOBAL_CACHE_DIR=str(work / "cache"), ZIG_LOCAL_CACHE_DIR=str(work / "cache"))
    command = (sys.executable, "-m", COMPILER, *arguments)
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)


def compile_board(chip: str, core: str, seed: int, work: Path) -> bytes:
    """Compile and link in ``work``; returns the ELF."""
    for name in SOURCES:
        shutil.copyfile(FIRMWARE / name, work / name)
    (work / "ballast.bin").write_bytes(ballast(chip, seed))
    done = zig("cc", *FLAGS, f"-mcpu={core}", f"-DBOARD_{chip}", "-I.", *OUTPUT, "startup.c", "hello.c", work=work)
    if done.returncode or done.stderr:
        raise BuildError(f"{chip}: compiler ended with {done.returncode}:\n{done.stderr}")
    return (work / "hello.elf").read_bytes()


def describe(chip: str, elf: bytes) -> dict[str, Any]:
    """One entry of the manifest, read from the ELF itself."""
    file = ELFFile(BytesIO(elf))
    loads = [s for s in file.iter_segments() if s["p_type"] == "PT_LOAD" and s["p_filesz"]]
    flash = b"".join(s.data() for s in loads)
    banner = flash.split(b"BRIDGED-APP1\0", 1)[1].split(b"\0", 1)[0].decode("ascii")
    return {
        "chip": chip,
        "file": f"{chip.lower()}.elf",
        "sha256": hashlib.sha256(elf).hexdigest(),
        "size_bytes": len(elf),
        "load_address": min(s["p_paddr"] for s in loads),
        "load_bytes": max(s["p_paddr"] + s["p_filesz"] for s in loads) - min(s["p_paddr"] for s in loads),
        "entry": file.header["e_entry"],
        "banner": banner,
    }


def build() -> tuple[dict[str, bytes], dict[str, Any]]:
    """All ELFs by file name, and the manifest."""
    elfs: dict[str, bytes] = {}
    images = []
    for chip, core, seed in BOARDS:
        with tempfile.TemporaryDirectory() as work:
            elf = compile_board(chip, core, seed, Path(work))
        entry = describe(chip, elf)
        elfs[entry["file"]] = elf
        images.append(entry)
    sources = {name: hashlib.sha256((FIRMWARE / name).read_bytes()).hexdigest() for name in SOURCES}
    return elfs, {"compiler": f"{COMPILER} {COMPILER_VERSION}", "sources": sources, "images": images}


def render(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"


def check() -> list[str]:
    """What differs between a fresh build and the committed files; empty when they are the same."""
    elfs, manifest = build()
    built: dict[str, bytes] = {**elfs, "manifest.json": render(manifest).encode()}
    differing = []
    for name, content in built.items():
        path = FIRMWARE / name
        if not path.exists():
            differing.append(f"{name} is missing")
        elif path.read_bytes() != content:
            differing.append(f"{name} differs from what its sources give")
    return differing


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.build_firmware", description="Build the demo firmware.")
    parser.add_argument("--check", action="store_true", help="compare with the committed files, write nothing")
    arguments = parser.parse_args()
    try:
        if arguments.check:
            differing = check()
            print("\n".join(differing) or "firmware: rebuilt bit for bit")
            return 1 if differing else 0
        elfs, manifest = build()
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    for name, elf in elfs.items():
        (FIRMWARE / name).write_bytes(elf)
    (FIRMWARE / "manifest.json").write_text(render(manifest))
    for image in manifest["images"]:
        print(f"{image['file']}: {image['load_bytes']} bytes at {image['load_address']:#010x}, {image['banner']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
