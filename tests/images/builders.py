"""Small builders of image files, so that each test shows the bytes that matter. Written from the formats, not from our code."""

from __future__ import annotations

import struct


def record(kind: int, offset: int, data: bytes = b"") -> str:
    """One Intel HEX record."""
    body = bytes([len(data), offset >> 8, offset & 0xFF, kind]) + data
    return f":{body.hex().upper()}{-sum(body) & 0xFF:02X}"


END = record(1, 0)


def hex_text(parts: list[tuple[int, bytes]], width: int = 16) -> str:
    """Intel HEX with a type 04 record whenever the upper half of the address changes."""
    lines, upper = [], -1
    for address, data in parts:
        at = address
        while at < address + len(data):
            count = min(width, address + len(data) - at, 0x10000 - (at & 0xFFFF))
            if at >> 16 != upper:
                upper = at >> 16
                lines.append(record(4, 0, upper.to_bytes(2, "big")))
            lines.append(record(0, at & 0xFFFF, data[at - address :][:count]))
            at += count
    return "\n".join([*lines, END, ""])


def s_record(kind: int, address: int, data: bytes = b"") -> str:
    """One Motorola S-record; for S5 and S6 ``address`` is the count."""
    width = {0: 2, 1: 2, 2: 3, 3: 4, 5: 2, 6: 3, 7: 4, 8: 3, 9: 2}[kind]
    body = bytes([width + len(data) + 1]) + address.to_bytes(width, "big") + data
    return f"S{kind}{body.hex().upper()}{~sum(body) & 0xFF:02X}"


def srec_text(parts: list[tuple[int, bytes]], width: int = 16, count: bool = True) -> str:
    """S37 with a title, a count and an end."""
    lines = [s_record(0, 0, b"title")]
    for address, data in parts:
        lines += [s_record(3, address + at, data[at : at + width]) for at in range(0, len(data), width)]
    records = len(lines) - 1
    return "\n".join([*lines, *([s_record(5, records)] if count else []), s_record(7, 0), ""])


def dfu_crc(data: bytes) -> int:
    """CRC-32 bit by bit, as the appendix of DFU 1.1 writes it: without the last inversion."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return crc


DfuTarget = tuple[int, bytes, list[tuple[int, bytes]]]  # alternate setting, name, elements


def dfu_suffix(data: bytes, vendor: int = 0x0483, product: int = 0xDF11, dfu: int = 0x011A) -> bytes:
    data += struct.pack("<HHHH3sB", 0xFFFF, product, vendor, dfu, b"UFD", 16)
    return data + struct.pack("<I", dfu_crc(data))


def dfuse(targets: list[DfuTarget], *, vendor: int = 0x0483, version: int = 1) -> bytes:
    body = b""
    for setting, name, elements in targets:
        content = b"".join(struct.pack("<II", address, len(data)) + data for address, data in elements)
        body += struct.pack("<6sBI255sII", b"Target", setting, bool(name), name, len(content), len(elements)) + content
    return dfu_suffix(struct.pack("<5sBIB", b"DfuSe", version, 11 + len(body), len(targets)) + body, vendor)


PT_LOAD, PT_NOTE = 1, 4


def elf(
    segments: list[tuple[int, bytes]],
    *,
    kind: int = PT_LOAD,
    virtual: int | None = None,
    bss_bytes: int = 0,
    machine: int = 40,
    elf_type: int = 2,
    bits: int = 1,
    order: int = 1,
    sections: bool = False,
) -> bytes:
    """An ELF for ARM; ``segments``: (physical address, data). Without ``sections`` it has no section headers at all."""
    at = 52 + 32 * len(segments)
    headers, blob = b"", b""
    for address, data in segments:
        where = virtual if virtual is not None else address
        headers += struct.pack("<8I", kind, at + len(blob), where, address, len(data), len(data) + bss_bytes, 5, 4)
        blob += data
    table = b""
    names_index = 0
    if sections:
        names = b"\0.text\0.shstrtab\0"
        names_at = at + len(blob)
        blob += names
        table = bytes(40)
        table += struct.pack("<10I", 1, 1, 6, segments[0][0], at, len(segments[0][1]), 0, 0, 4, 0)
        table += struct.pack("<10I", 7, 3, 0, 0, names_at, len(names), 0, 0, 1, 0)
        names_index = 2
    head = b"\x7fELF" + bytes([bits, order, 1]) + bytes(9)
    head += struct.pack(
        "<HHIIIIIHHHHHH",
        elf_type,
        machine,
        1,
        segments[0][0] | 1 if segments else 0,
        52 if segments else 0,
        at + len(blob) if sections else 0,
        0x05000200,
        52,
        32,
        len(segments),
        40 if sections else 0,
        len(table) // 40,
        names_index,
    )
    return head + headers + blob + table
