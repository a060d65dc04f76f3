"""Image files to one ``Image``: raw binary, Intel HEX, ELF. Runs in the parser process only (``parser.py``).

The bytes come from strangers and the libraries that read them promise nothing, so this module is never imported by the daemon
or a session: a crash, a bomb or an endless loop in here ends one small process. It knows no chip: whether an address is flash
is a question for the plan.

Every complaint names the line (text formats) or the offset (binary ones). A new format is one row in ``FORMATS``.

- Intel HEX (Intel, Hexadecimal Object File Format Specification, rev. A, 1988): bincopy decodes each record. Its file reader is
  not used: it knows no line numbers, takes a file without an end record or with spaces inside a record, and inserts a record
  that does not follow the last one by walking a list, which is quadratic in the number of gaps.
- ELF (System V ABI, chapter 5): PT_LOAD segments at their *physical* address, which is where the linker put the bytes into
  flash; the virtual address of initialised data is in RAM. Section headers are not needed and not read.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

from bridged.errors import (
    BadRequest,
    CorruptImage,
    EmptyImage,
    ImageAddressMissing,
    ImageTooLarge,
    OverlappingImage,
    UnknownFormat,
)
from bridged.images.model import MAX_SEGMENTS, Image

ADDRESS_SPACE = 1 << 32


@dataclass(frozen=True, slots=True)
class Part:
    """Some bytes for one address, and where in the file they came from (``line 12``, ``program header 3``)."""

    address: int
    data: bytes
    origin: str

    @property
    def end(self) -> int:
        return self.address + len(self.data)


@dataclass(frozen=True, slots=True)
class Format:
    """``recognise``: whether the content looks so, cheaply. ``read``: all of it, or a typed error that names a place."""

    name: str
    recognise: Callable[[bytes], bool]
    read: Callable[[bytes], list[Part]]


def parse(data: bytes, type_hint: str, base_address: int | None) -> Image:
    """The image in ``data``. ``type_hint``: ``auto`` or the name of a format; ``base_address``: where a BIN belongs.

    Formats with addresses of their own take a ``base_address`` only when it agrees with them: to ignore another one would
    write somewhere else than the user said.
    """
    found = recognise(data, type_hint)
    if not data:
        raise EmptyImage("the file is empty")
    if found is None:
        if base_address is None:
            raise ImageAddressMissing("the image is a raw binary, which does not say where it belongs", size_bytes=len(data))
        return join([Part(base_address, data, "offset 0")])
    image = join(found.read(data))
    if base_address is not None and base_address != image.start:
        raise BadRequest(
            f"the {found.name.upper()} file carries its own addresses and starts at {image.start:#010x}, the request says "
            f"{base_address:#010x}",
            start=image.start,
            base_address=base_address,
        )
    return image


def recognise(data: bytes, type_hint: str) -> Format | None:
    """The format of ``data``; None for a raw binary, which is whatever nothing else claims."""
    if type_hint == "bin":
        return None
    if type_hint == "auto":
        return next((f for f in FORMATS if f.recognise(data)), None)
    found = next((f for f in FORMATS if f.name == type_hint), None)
    if found is None:
        raise BadRequest(f"unknown image type {type_hint!r}, expected one of auto, bin, {', '.join(f.name for f in FORMATS)}")
    if data and not found.recognise(data):
        raise UnknownFormat(f"the file was said to be {found.name.upper()}, but it starts with {data[:8].hex(' ')}")
    return found


def join(parts: list[Part]) -> Image:
    """All parts as one image. Unlike ``Image.of`` it can say which two places of the file claim the same address."""
    ordered = sorted((p for p in parts if p.data), key=lambda p: p.address)
    if not ordered:
        raise EmptyImage("the file holds no byte to be loaded")
    gaps = 0
    last = ordered[0]  # the part that ends latest; the first overlap ends the loop, so it is always the one before
    for part in ordered:
        if part.end > ADDRESS_SPACE:
            raise CorruptImage(
                f"{part.origin}: {len(part.data)} bytes at {part.address:#x} end beyond the 32-bit address space",
                address=part.address,
            )
        if part is not last and part.address < last.end:
            first, second = (part, last) if parts.index(part) < parts.index(last) else (last, part)
            raise OverlappingImage(
                f"{second.origin}: address {part.address:#010x} was already given by {first.origin} "
                f"({first.address:#010x}..{first.end:#010x})",
                address=part.address,
            )
        gaps += part is not last and part.address > last.end
        last = part
    if gaps >= MAX_SEGMENTS:
        raise ImageTooLarge(f"the image consists of {gaps + 1} separate pieces, at most {MAX_SEGMENTS} are accepted")
    return Image.of((p.address, p.data) for p in ordered)


# --- Intel HEX ----------------------------------------------------------------------------------------------------

_HEX_RECORD = re.compile(rb":[0-9A-Fa-f]{10,}")
_HEX_START = re.compile(rb"\s*:[0-9A-Fa-f]{2}")
_HEX_LENGTHS = {1: 0, 2: 2, 3: 4, 4: 2, 5: 4}  # bytes of data that each type of record has; type 0 has any number


def is_hex(data: bytes) -> bool:
    """A colon and two hexadecimal digits. A BIN starts with a stack pointer, a multiple of 4, which a colon (0x3A) is not."""
    return _HEX_START.match(data[:256]) is not None


def read_hex(data: bytes) -> list[Part]:
    parts: list[Part] = []
    base, wraps, ended_by, last = 0, False, 0, 0
    for number, raw in enumerate(data.split(b"\n"), start=1):
        record = raw.strip()
        if not record:
            continue
        last = number
        if ended_by:
            raise _bad_line(number, f"data after the end record in line {ended_by}")
        kind, offset, payload = _hex_record(number, record)
        if kind == 0:
            if wraps and offset + len(payload) > 0x10000:
                raise _bad_line(number, f"{len(payload)} bytes at offset {offset:#06x} run over the end of their segment")
            if payload:
                parts.append(Part(base + offset, payload, f"line {number}"))
        elif kind == 1:
            ended_by = number
        elif kind == 2:
            base, wraps = int.from_bytes(payload, "big") << 4, True
        elif kind == 4:
            base, wraps = int.from_bytes(payload, "big") << 16, False
        # 3 and 5 name where execution starts; a Cortex-M takes that from its vector table.
    if not ended_by:
        raise _bad_line(last, "the file ends here without an end record (:00000001FF); it was cut short")
    return parts


def _hex_record(number: int, record: bytes) -> tuple[int, int, bytes]:
    """Type, offset and data of one record, all of it checked."""
    import bincopy  # type: ignore[import-untyped]  # late: a BIN, the usual case, need not wait for it

    if not record.startswith(b":"):
        raise _bad_line(number, f"expected a record that starts with ':', found {_shown(record)}")
    if not _HEX_RECORD.fullmatch(record):
        raise _bad_line(number, f"expected ':' and at least 10 hexadecimal digits, found {_shown(record)}")
    announced, digits = int(record[1:3], 16), len(record) - 1
    if digits != 2 * (announced + 5):
        raise _bad_line(
            number, f"the record announces {announced} bytes of data ({2 * announced + 10} digits), it has {digits} digits"
        )
    try:
        kind, offset, _size, payload = bincopy.unpack_ihex(record.decode("ascii"))
    except bincopy.Error as error:  # all that is left is the checksum
        raise _bad_line(number, f"wrong checksum: {error}") from error
    if kind not in {0, *_HEX_LENGTHS}:
        raise _bad_line(number, f"unknown record type {kind:02X}, expected 00 to 05")
    if kind and len(payload) != _HEX_LENGTHS[kind]:
        raise _bad_line(number, f"a record of type {kind:02X} has {_HEX_LENGTHS[kind]} bytes of data, found {len(payload)}")
    return kind, offset, bytes(payload)


def _bad_line(number: int, text: str) -> CorruptImage:
    return CorruptImage(f"line {number}: {text}", line=number)


def _shown(data: bytes) -> str:
    """The start of a line, safe to print."""
    return repr(data[:24].decode("ascii", "backslashreplace")) + ("…" if len(data) > 24 else "")


# --- ELF ----------------------------------------------------------------------------------------------------------

_ELF_MAGIC = b"\x7fELF"
_ELF_HEADER_BYTES = 52
_ELF_PROGRAM_HEADER_BYTES = 32
_EM_ARM = 40
_ET_REL = 1


def is_elf(data: bytes) -> bool:
    return data.startswith(_ELF_MAGIC)


def read_elf(data: bytes) -> list[Part]:
    from elftools.elf.elffile import ELFFile  # late: a BIN, the usual case, need not wait for it

    _check_elf_header(data)
    parts: list[Part] = []
    total = 0
    try:
        elf = ELFFile(io.BytesIO(data))
    except Exception as error:  # ELFError, but also whatever else a broken header makes it stumble over
        raise _bad_offset(0, f"the ELF header cannot be read: {type(error).__name__}: {error}") from error
    table, count = int(elf["e_phoff"]), int(elf["e_phnum"])
    if count and table + count * _ELF_PROGRAM_HEADER_BYTES > len(data):
        raise _bad_offset(
            table,
            f"{count} program headers of {_ELF_PROGRAM_HEADER_BYTES} bytes are announced there, but the file ends at "
            f"{len(data):#x}",
        )
    for number in range(count):
        at = table + number * _ELF_PROGRAM_HEADER_BYTES
        # Not get_segment(): it interprets segments of other types as well and so fails where nothing of ours is wrong.
        header = elf.structs.Elf_Phdr.parse(data[at : at + _ELF_PROGRAM_HEADER_BYTES])
        if header["p_type"] != "PT_LOAD" or not header["p_filesz"]:
            continue
        offset, size, address = int(header["p_offset"]), int(header["p_filesz"]), int(header["p_paddr"])
        if offset + size > len(data):
            raise _bad_offset(
                at,
                f"program header {number} wants {size} bytes from offset {offset:#x}, but the file ends at {len(data):#x}; "
                "it was cut short",
            )
        if size > header["p_memsz"]:
            raise _bad_offset(at, f"program header {number} has {size} bytes in the file for {header['p_memsz']} in memory")
        total += size
        if total > len(data):  # Thousands of headers may point at the same megabyte: no linker does that.
            raise _bad_offset(at, f"up to program header {number} the segments claim {total} bytes of a file of {len(data)}")
        parts.append(Part(address, data[offset : offset + size], f"program header {number} (offset {at:#x})"))
    if not parts:
        raise EmptyImage(f"none of the {count} program headers at offset {table:#x} is a PT_LOAD with bytes in the file")
    return parts


def _check_elf_header(data: bytes) -> None:
    """What can be said better than a library would: which kind of ELF it is, and that it is no ARM program."""
    if len(data) < _ELF_HEADER_BYTES:
        raise _bad_offset(len(data), f"the file ends inside its ELF header of {_ELF_HEADER_BYTES} bytes")
    if data[4] != 1:
        raise UnknownFormat(f"offset 0x4: expected a 32-bit ELF (class 1), found class {data[4]}")
    if data[5] != 1:
        raise UnknownFormat(f"offset 0x5: expected a little-endian ELF (1), found {data[5]}")
    kind, machine = (int.from_bytes(data[at : at + 2], "little") for at in (16, 18))
    if machine != _EM_ARM:
        raise UnknownFormat(f"offset 0x12: expected an ELF for ARM (machine {_EM_ARM}), found machine {machine}")
    if kind == _ET_REL:
        raise UnknownFormat("offset 0x10: this ELF is an object file (type 1) that was never linked")
    size = int.from_bytes(data[42:44], "little")
    count = int.from_bytes(data[44:46], "little")
    if count and size != _ELF_PROGRAM_HEADER_BYTES:
        raise _bad_offset(42, f"expected program headers of {_ELF_PROGRAM_HEADER_BYTES} bytes, found {size}")


def _bad_offset(at: int, text: str) -> CorruptImage:
    return CorruptImage(f"offset {at:#x}: {text}", offset=at)


FORMATS: tuple[Format, ...] = (
    Format("elf", is_elf, read_elf),
    Format("hex", is_hex, read_hex),
)
