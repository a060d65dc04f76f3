"""Image files to one ``Image``: raw binary, HEX, S-record, ELF, DfuSe, each also in gzip. Runs in the parser process only.

The bytes come from strangers and the libraries that read them promise nothing, so this module is never imported by the daemon
or a session: a crash, a bomb or an endless loop in here ends one small process. It knows no chip: whether an address is flash
is a question for the plan.

Every complaint names the line (text formats) or the offset (binary ones), of the file or of what its gzip holds. A new format
is one row in ``FORMATS``.

- Intel HEX (Intel, Hexadecimal Object File Format Specification, rev. A, 1988): bincopy decodes each record. Its file reader is
  not used: it knows no line numbers, takes a file without an end record or with spaces inside a record, and inserts a record
  that does not follow the last one by walking a list, which is quadratic in the number of gaps.
- S-record (Motorola M68000 Family Programmer's Reference Manual, appendix C): likewise. The count of S5 and S6 is compared, an
  end record is needed, and all data records have one type, because the type is the one digit that no checksum covers.
- ELF (System V ABI, chapter 5): PT_LOAD segments at their *physical* address, which is where the linker put the bytes into
  flash; the virtual address of initialised data is in RAM. Linkers let a segment begin with the ELF header where
  there is room on the page in front of the first section (lld; GNU ld for an image that starts at 0x08020200); objcopy and gdb
  go by sections and never write it. There, and only there, the section headers say what is firmware.
- DfuSe (ST UM0391): prefix, targets, elements and suffix, whose CRC covers the file. Only the internal flash is taken: option
  bytes and other memories in such a file are a refusal; they are neither skipped nor written.
- gzip (RFC 1952), recognised by its magic and taken off once: all members, bounded, and nothing may follow them. Not with
  ``bin``: that says that the bytes are meant as they are.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
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
UNPACKED_BYTES = 32 << 20  # What a gzip may hold unless the caller says otherwise: as much as the largest file by default.


@dataclass(frozen=True, slots=True)
class Part:
    """Some bytes for one address, and where in the file they came from (``line 12``, ``program header 3``)."""

    address: int
    data: bytes
    origin: str

    @property
    def end(self) -> int:
        return self.address + len(self.data)


# What ``auto`` must not take for the bytes of a raw binary: beside another image, where no vector table is looked for, they
# would be written and proven.
FOREIGN = (
    (b"UF2\n", "UF2, which no loader of an STM32 reads: build a HEX, an ELF or a BIN"),
    (b"version https://git-lfs", "the pointer of Git LFS and not the file: run git lfs pull"),
    (b"<!DOCTYPE", "a web page: what a server said instead of the file"),
    (b"<!doctype", "a web page: what a server said instead of the file"),
    (b"<html", "a web page: what a server said instead of the file"),
    (b"\xef\xbb\xbf:", "Intel HEX behind a byte order mark, which an editor put there: save it without"),
    (b"\xef\xbb\xbfS", "Motorola S-record behind a byte order mark, which an editor put there: save it without"),
    (b"\xff\xfe:\0", "Intel HEX in UTF-16: save it as ASCII"),
)
# These may be meant as data of the application, where they have an address.
ARCHIVES = (
    (b"PK\x03\x04", "a zip archive"),
    (b"\xfd7zXZ\0", "packed by xz"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd"),
    (b"BZh", "packed by bzip2"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
)


@dataclass(frozen=True, slots=True)
class Format:
    """``recognise``: whether the content looks so, cheaply. ``read``: all of it, or a typed error that names a place."""

    name: str
    title: str
    recognise: Callable[[bytes], bool]
    read: Callable[[bytes], list[Part]]


def parse(data: bytes, type_hint: str, base_address: int | None, unpacked_bytes: int = UNPACKED_BYTES) -> Image:
    """The image in ``data``. ``type_hint``: ``auto`` or the name of a format; ``base_address``: where a BIN belongs;
    ``unpacked_bytes``: the most that a gzip may hold.

    Formats with addresses of their own take a ``base_address`` only when it agrees with them: to ignore another one would
    write somewhere else than the user said.
    """
    if type_hint != "bin" and data.startswith(GZIP_MAGIC):
        data = gunzip(data, unpacked_bytes)
    found = recognise(data, type_hint)
    if not data:
        raise EmptyImage("the file is empty")
    if found is None:
        if base_address is None:
            if archive := next((what for magic, what in ARCHIVES if data.startswith(magic)), ""):
                raise UnknownFormat(f"the file is {archive}: unpack it and send the image that is in it")
            raise ImageAddressMissing("the image is a raw binary, which does not say where it belongs", size_bytes=len(data))
        return join([Part(base_address, data, "offset 0")])
    image = join(found.read(data))
    if base_address is not None and base_address != image.start:
        raise BadRequest(
            f"the {found.title} file carries its own addresses and starts at {image.start:#010x}, the request says "
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
        found = next((f for f in FORMATS if f.recognise(data)), None)
        foreign = next((what for magic, what in FOREIGN if data.startswith(magic)), "") if found is None else ""
        if foreign:
            raise UnknownFormat(f"the file is {foreign}; if these very bytes are meant, stage it with type=bin")
        return found
    found = next((f for f in FORMATS if f.name == type_hint), None)
    if found is None:
        raise BadRequest(f"unknown image type {type_hint!r}, expected one of auto, bin, {', '.join(f.name for f in FORMATS)}")
    if data and not found.recognise(data):
        raise UnknownFormat(f"the file was said to be {found.title}, but it starts with {data[:8].hex(' ')}")
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


# --- S-record -----------------------------------------------------------------------------------------------------

_SREC_RECORD = re.compile(rb"S[0-9][0-9A-Fa-f]{4,}")
_SREC_START = re.compile(rb"\s*S[0-9][0-9A-Fa-f]{2}")
_SREC_ADDRESS_BYTES = {"0": 2, "1": 2, "2": 3, "3": 4, "5": 2, "6": 3, "7": 4, "8": 3, "9": 2}


def is_srec(data: bytes) -> bool:
    """An S and three digits. A BIN starts with a stack pointer, a multiple of 4, which an S (0x53) is not."""
    return _SREC_START.match(data[:256]) is not None


def read_srec(data: bytes) -> list[Part]:
    parts: list[Part] = []
    data_kind, records, counted_by, ended_by, last = "", 0, 0, 0, 0
    for number, raw in enumerate(data.split(b"\n"), start=1):
        record = raw.strip()
        if not record:
            continue
        last = number
        if ended_by:
            raise _bad_line(number, f"data after the end record in line {ended_by}")
        kind, address, payload = _srec_record(number, record)
        if kind in "123":
            if counted_by:
                raise _bad_line(number, f"a data record after the count of all records in line {counted_by}")
            data_kind = data_kind or kind
            if kind != data_kind:
                raise _bad_line(number, f"a data record of type S{kind}, those before it are of type S{data_kind}")
            records += 1
            if payload:
                parts.append(Part(address, payload, f"line {number}"))
        elif kind in "56":
            if address != records:
                raise _bad_line(number, f"the file is said to have {address} data records, up to here it has {records}")
            counted_by = number
        elif kind in "789":
            # S9 ends files of any type in practice; S7 and S8 only those of their own.
            if kind != "9" and data_kind and int(kind) + int(data_kind) != 10:
                raise _bad_line(number, f"an end record of type S{kind} after data records of type S{data_kind}")
            ended_by = number
        # 0 is a title. 7 to 9 name where execution starts; a Cortex-M takes that from its vector table.
    if not ended_by:
        raise _bad_line(last, "the file ends here without an end record (S7, S8 or S9); it was cut short")
    return parts


def _srec_record(number: int, record: bytes) -> tuple[str, int, bytes]:
    """Type (a digit), address or count, and data of one record, all of it checked."""
    import bincopy  # late: a BIN, the usual case, need not wait for it

    if not record.startswith(b"S"):
        raise _bad_line(number, f"expected a record that starts with 'S', found {_shown(record)}")
    if not _SREC_RECORD.fullmatch(record):
        raise _bad_line(number, f"expected 'S', a digit and at least 4 hexadecimal digits, found {_shown(record)}")
    kind = record[1:2].decode("ascii")
    width = _SREC_ADDRESS_BYTES.get(kind)
    if width is None:
        raise _bad_line(number, f"unknown record type S{kind}, expected S0 to S3 or S5 to S9")
    announced, digits = int(record[2:4], 16), len(record) - 2
    if digits != 2 * (announced + 1):
        raise _bad_line(number, f"the record announces {announced} bytes ({2 * announced + 2} digits), it has {digits} digits")
    if announced < width + 1 or (kind not in "0123" and announced != width + 1):
        least = "" if kind not in "0123" else "at least "
        raise _bad_line(number, f"a record of type S{kind} announces {least}{width + 1} bytes, found {announced}")
    try:
        kind, address, _size, payload = bincopy.unpack_srec(record.decode("ascii"))
    except bincopy.Error as error:  # all that is left is the checksum
        raise _bad_line(number, f"wrong checksum: {error}") from error
    return kind, address, bytes(payload)


# --- ELF ----------------------------------------------------------------------------------------------------------

_ELF_MAGIC = b"\x7fELF"
_ELF_HEADER_BYTES = 52
_ELF_PROGRAM_HEADER_BYTES = 32
_EM_ARM = 40
_ELF_SECTION = struct.Struct("<10I")  # name, type, flags, address, offset, size, …
_ELF_NO_BYTES = (0, 8)  # SHT_NULL and SHT_NOBITS
_SHF_ALLOC = 2
_ET_REL = 1


def is_elf(data: bytes) -> bool:
    return data.startswith(_ELF_MAGIC)


def read_elf(data: bytes) -> list[Part]:
    from elftools.elf.elffile import ELFFile  # late: a BIN, the usual case, need not wait for it

    _check_elf_header(data)
    parts: list[Part] = []
    total, with_headers = 0, False
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
        start, end = offset, offset + size
        if offset < _ELF_HEADER_BYTES or (offset < table + count * _ELF_PROGRAM_HEADER_BYTES and table < end):
            if with_headers:  # To look through all sections for each of thousands would take an hour: no linker does that.
                raise _bad_offset(at, f"program header {number} holds the headers of the file, as one before it does")
            with_headers = True
            start, end = _covered_by_sections(data, offset, end, f"program header {number} (offset {at:#x})")
        if start < end:
            parts.append(Part(address + start - offset, data[start:end], f"program header {number} (offset {at:#x})"))
    if not parts:
        raise EmptyImage(f"none of the {count} program headers at offset {table:#x} is a PT_LOAD with bytes in the file")
    return parts


def _covered_by_sections(data: bytes, start: int, end: int, origin: str) -> tuple[int, int]:
    """From the first to the last byte of a section that is loaded, within a segment that holds the headers of the file as well.

    Nothing where no section is in it: such a segment is there for the headers alone.
    """
    table, size, count = (int.from_bytes(data[a:b], "little") for a, b in ((32, 36), (46, 48), (48, 50)))
    if not count:
        raise UnknownFormat(
            f"{origin} also holds the ELF header, which is no firmware, and without section headers nobody can tell where that "
            "ends: link with -Wl,--nmagic, or keep the section headers"
        )
    if size != _ELF_SECTION.size or table + count * size > len(data):
        raise _bad_offset(
            32,
            f"{count} section headers of {size} bytes are announced at {table:#x}; each has {_ELF_SECTION.size} bytes, "
            f"and the file ends at {len(data):#x}",
        )
    first, last = end, start
    for at in range(table, table + count * size, size):
        _, kind, flags, _, offset, length, *_ = _ELF_SECTION.unpack_from(data, at)
        if kind not in _ELF_NO_BYTES and flags & _SHF_ALLOC and length and offset < end and start < offset + length:
            first, last = min(first, max(offset, start)), max(last, min(offset + length, end))
    return first, last


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


# --- DfuSe --------------------------------------------------------------------------------------------------------

_DFUSE_MAGIC = b"DfuSe"
_DFUSE_PREFIX = struct.Struct("<5sBIB")  # signature, version, size without the suffix, number of targets
_DFUSE_TARGET = struct.Struct("<6sBI255sII")  # signature, alternate setting, named, name, size, number of elements
_DFUSE_ELEMENT = struct.Struct("<II")  # address, size
_DFUSE_SUFFIX = struct.Struct("<HHHH3sBI")  # device, product, vendor, version of DFU, signature, length, CRC
_DFUSE_DFU_VERSION = 0x011A
_ST_VENDOR, _ANY_VENDOR = 0x0483, 0xFFFF


def is_dfuse(data: bytes) -> bool:
    return data.startswith(_DFUSE_MAGIC)


def read_dfuse(data: bytes) -> list[Part]:
    end, targets = _dfuse_frame(data)
    parts: list[Part] = []
    at = _DFUSE_PREFIX.size
    for target in range(targets):
        at = _dfuse_target(data, at, end, target, parts)
    if at != end:
        raise _bad_offset(at, f"{end - at} bytes follow the last of {targets} targets and belong to none")
    return parts


def _dfuse_frame(data: bytes) -> tuple[int, int]:
    """Where the targets end, and their number. Prefix and suffix are checked first: most damage shows in the CRC."""
    if len(data) < _DFUSE_PREFIX.size + _DFUSE_SUFFIX.size:
        raise _bad_offset(len(data), "the file ends inside its DfuSe prefix and suffix; it was cut short")
    _magic, version, size, targets = _DFUSE_PREFIX.unpack_from(data)
    if version != 1:
        raise UnknownFormat(f"offset 0x5: expected a DfuSe file of version 1, found version {version}")
    end = len(data) - _DFUSE_SUFFIX.size
    if size not in (end, len(data)):  # Tools disagree on whether the suffix counts.
        raise _bad_offset(6, f"the prefix announces {size} bytes and {_DFUSE_SUFFIX.size} of suffix, the file has {len(data)}")
    _device, product, vendor, dfu, signature, length, crc = _DFUSE_SUFFIX.unpack_from(data, end)
    if (signature, length, dfu) != (b"UFD", _DFUSE_SUFFIX.size, _DFUSE_DFU_VERSION):
        raise _bad_offset(
            end,
            f"expected a suffix of {_DFUSE_SUFFIX.size} bytes with 'UFD' and DFU {_DFUSE_DFU_VERSION:04x}, found "
            f"{data[end:].hex(' ')}",
        )
    found = ~zlib.crc32(data[:-4]) & 0xFFFFFFFF  # DFU 1.1 leaves out the last inversion
    if found != crc:
        raise _bad_offset(len(data) - 4, f"the suffix has CRC {crc:08x}, the file {found:08x}")
    if vendor not in (_ST_VENDOR, _ANY_VENDOR):
        raise UnknownFormat(
            f"offset {end + 4:#x}: the file is meant for USB device {vendor:04x}:{product:04x}, whose maker is not ST "
            f"({_ST_VENDOR:04x}); give the firmware in another format if it is meant for this target all the same",
            vendor=vendor,
            product=product,
        )
    return end, targets


def _dfuse_target(data: bytes, at: int, end: int, target: int, parts: list[Part]) -> int:
    """Adds the elements of the target at ``at``; where the next one begins."""
    if at + _DFUSE_TARGET.size > end:
        raise _bad_offset(at, f"target {target} needs {_DFUSE_TARGET.size} bytes of prefix there, {end - at} are left")
    magic, setting, named, raw_name, size, elements = _DFUSE_TARGET.unpack_from(data, at)
    if magic != b"Target":
        raise _bad_offset(at, f"expected the signature 'Target', found {_shown(magic)}")
    name = raw_name.split(b"\0")[0] if named else b""
    if setting and not name.lstrip(b"@").lower().startswith(b"internal flash"):
        raise UnknownFormat(
            f"offset {at:#x}: target {target} is alternate setting {setting} ({_shown(name)}) and not the internal flash; "
            "a file with option bytes or other memories is not written",
            setting=setting,
        )
    head, at = at, at + _DFUSE_TARGET.size
    if at + size > end:
        raise _bad_offset(head, f"target {target} announces {size} bytes, {end - at} are left")
    end = at + size
    for element in range(elements):
        if at + _DFUSE_ELEMENT.size > end:
            raise _bad_offset(at, f"element {element} of {elements} of target {target} begins beyond the end of its target")
        address, count = _DFUSE_ELEMENT.unpack_from(data, at)
        start = at + _DFUSE_ELEMENT.size
        if start + count > end:
            raise _bad_offset(
                at, f"element {element} of target {target} announces {count} bytes, its target has {end - start} left"
            )
        if count:
            parts.append(Part(address, data[start : start + count], f"target {target} element {element} (offset {at:#x})"))
        at = start + count
    if at != end:
        raise _bad_offset(at, f"{end - at} bytes of target {target} follow its last element and belong to none")
    return at


# --- gzip ---------------------------------------------------------------------------------------------------------

GZIP_MAGIC = b"\x1f\x8b"
_GZIP_MEMBERS = 1000  # pigz and logs have a few; each costs a copy of the rest.
_GZIP_WINDOW = 31  # zlib: the largest window, with the head and the trailer of gzip
_GZIP_PIECE_BYTES = 1 << 20


def gunzip(data: bytes, limit_bytes: int) -> bytes:
    """What all members hold. Raises ``ImageTooLarge`` beyond ``limit_bytes``, ``CorruptImage`` unless every member is whole."""
    pieces: list[bytes] = []
    size = 0
    for piece in _inflated(data):
        size += len(piece)
        if size > limit_bytes:
            raise ImageTooLarge(
                f"the gzip of {len(data)} bytes holds more than the {limit_bytes} that are accepted", limit_bytes=limit_bytes
            )
        pieces.append(piece)
    content = b"".join(pieces)
    if content.startswith(GZIP_MAGIC):
        raise UnknownFormat("the gzip holds another gzip; pack the image once")
    return content


def _inflated(data: bytes) -> Iterator[bytes]:
    """The content in pieces of a bounded size, so that a bomb is met before it unfolds."""
    at = members = 0
    while at < len(data):
        members += 1
        if members > _GZIP_MEMBERS:
            raise ImageTooLarge(f"offset {at:#x}: the gzip has more than {_GZIP_MEMBERS} members", offset=at)
        if not data.startswith(GZIP_MAGIC, at):
            raise _bad_offset(at, f"{len(data) - at} bytes follow the end of the gzip and belong to nothing")
        member = zlib.decompressobj(_GZIP_WINDOW)
        rest = data[at:]
        while not member.eof:
            try:
                piece = member.decompress(rest, _GZIP_PIECE_BYTES)
            except zlib.error as error:
                raise _bad_offset(at, f"the gzip member that begins there is damaged: {error}") from error
            if not piece and not member.eof and not member.unconsumed_tail:
                raise _bad_offset(len(data), f"the file ends inside the gzip member that began at {at:#x}; it was cut short")
            rest = member.unconsumed_tail
            yield piece
        at = len(data) - len(member.unused_data)


FORMATS: tuple[Format, ...] = (
    Format("elf", "ELF", is_elf, read_elf),
    Format("hex", "HEX", is_hex, read_hex),
    Format("srec", "S-record", is_srec, read_srec),
    Format("dfuse", "DfuSe", is_dfuse, read_dfuse),
)
