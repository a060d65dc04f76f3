"""Builds the second-stage loader from its C source, bit for bit: ``python -m tests.build_stub [--check]``.

The built code is in the repository and in the wheel, so nobody needs a compiler to use it; this script and ``--check`` prove
that it comes from the source beside it. The compiler is the pinned one of ``build_firmware``. One binary for the smallest core
(ARMv6-M) runs on every Cortex-M.

Gates, each an error of the build: larger than 3,072 bytes; a function with more than 64 bytes of stack; a relocation that is
not relative to the program counter (the code runs wherever the chip table puts it); any data, zeroed or not; any call to a
library of the compiler.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile
from elftools.elf.enums import ENUM_RELOC_TYPE_ARM
from elftools.elf.relocation import RelocationSection

from bridged.stub import CODE_LIMIT_BYTES, CODE_OFFSET, STACK_BYTES
from tests.build_firmware import COMPILER, COMPILER_VERSION, BuildError, render, zig

STUB = Path(__file__).parent.parent / "bridged" / "stub"
SOURCES = ("stub.c", "stub.h", "stub.ld")
FRAME_LIMIT_BYTES = 64

FLAGS = (
    *("-target", "thumb-freestanding-eabi", "-mcpu=cortex_m0plus", "-mfloat-abi=soft", "-std=c23", "-Os"),
    *("-Wall", "-Wextra", "-Werror", f"-Wframe-larger-than={FRAME_LIMIT_BYTES}"),
    *("-ffreestanding", "-fno-builtin", "-fno-stack-protector", "-fno-unwind-tables", "-fno-asynchronous-unwind-tables"),
    *("-fno-sanitize=all", "-fpie", "-fvisibility=hidden", "-fno-jump-tables", "-fomit-frame-pointer", "-fno-ident", "-g0"),
)
# What the linker can resolve without knowing where the code will lie.
RELATIVE = {
    ENUM_RELOC_TYPE_ARM[f"R_ARM_{name}"] for name in ("REL32", "THM_CALL", "THM_JUMP11", "THM_JUMP8", "THM_PC8", "PREL31")
}


def check_relocations(content: bytes) -> None:
    """Raises ``BuildError`` for an object file that would not run at any address."""
    for section in ELFFile(BytesIO(content)).iter_sections():
        if isinstance(section, RelocationSection):
            for entry in section.iter_relocations():
                if entry["r_info_type"] not in RELATIVE:
                    raise BuildError(f"{section.name}: relocation of type {entry['r_info_type']} depends on the load address")


def compile_object(work: Path, *extra: str) -> bytes:
    done = zig("cc", "-c", *FLAGS, *extra, "-o", "stub.o", "stub.c", work=work)
    if done.returncode or done.stderr:
        raise BuildError(f"compiler ended with {done.returncode}:\n{done.stderr}")
    return (work / "stub.o").read_bytes()


def build(*extra: str) -> dict[str, bytes]:
    """What is committed, by file name. ``extra``: flags for the compiler, for tests of the gates."""
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        for name in SOURCES:
            shutil.copyfile(STUB / name, work / name)
        check_relocations(compile_object(work, *extra))
        done = zig("ld.lld", "--static", "-T", "stub.ld", "-Map=stub.map", "-o", "stub.elf", "stub.o", work=work)
        if done.returncode or done.stderr:
            raise BuildError(f"linker ended with {done.returncode}:\n{done.stderr}")
        elf, listing = (work / "stub.elf").read_bytes(), (work / "stub.map").read_bytes()
    file = ELFFile(BytesIO(elf))
    section = file.get_section_by_name(".code")
    if section is None:
        raise BuildError("the linker made no section .code")
    code: bytes = section.data()
    if section["sh_addr"] != CODE_OFFSET or len(code) > CODE_LIMIT_BYTES:
        raise BuildError(f"{len(code)} bytes at {section['sh_addr']:#x}; at most {CODE_LIMIT_BYTES} at {CODE_OFFSET:#x}")
    manifest: dict[str, Any] = {
        "file": "stub.bin",
        "sha256": hashlib.sha256(code).hexdigest(),
        "size_bytes": len(code),
        "size_limit_bytes": CODE_LIMIT_BYTES,
        "offset": CODE_OFFSET,
        "entry": file.header["e_entry"],
        "stack_bytes": STACK_BYTES,
        "compiler": f"{COMPILER} {COMPILER_VERSION}",
        "flags": " ".join(FLAGS),
        "sources": {name: hashlib.sha256((STUB / name).read_bytes()).hexdigest() for name in SOURCES},
    }
    return {"stub.bin": code, "stub.map": listing, "manifest.json": render(manifest).encode()}


def check() -> list[str]:
    """What differs between a fresh build and the committed files; empty when they are the same."""
    differing = []
    for name, content in build().items():
        path = STUB / name
        if not path.exists():
            differing.append(f"{name} is missing")
        elif path.read_bytes() != content:
            differing.append(f"{name} differs from what its sources give")
    return differing


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.build_stub", description="Build the second-stage loader.")
    parser.add_argument("--check", action="store_true", help="compare with the committed files, write nothing")
    arguments = parser.parse_args()
    try:
        if arguments.check:
            differing = check()
            print("\n".join(differing) or "second-stage loader: rebuilt bit for bit")
            return 1 if differing else 0
        built = build()
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    for name, content in built.items():
        (STUB / name).write_bytes(content)
    manifest = json.loads(built["manifest.json"])
    print(f"stub.bin: {manifest['size_bytes']} of {CODE_LIMIT_BYTES} bytes, sha256 {manifest['sha256']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
