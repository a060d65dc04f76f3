"""Formats: golden files give the content that they say, broken ones an error that names the place."""

from __future__ import annotations

import io
import struct

import bincopy  # type: ignore[import-untyped]
import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given
from hypothesis import strategies as st

from bridged.errors import (
    BadRequest,
    BridgedError,
    CorruptImage,
    EmptyImage,
    ImageAddressMissing,
    OverlappingImage,
    UnknownFormat,
)
from bridged.images import formats, parser
from bridged.images.model import Image
from bridged.protocol.verbs import TYPES
from tests.images.builders import END, PT_NOTE, elf, hex_text, record

BASE = 0x08000000
UPPER = record(4, 0, b"\x08\x00")
DATA = bytes(range(64))


def check_content(data: bytes, expected: list[tuple[int, bytes]], hint: str = "auto", base: int | None = None) -> None:
    image = formats.parse(data, hint, base)
    assert [(s.address, s.data) for s in image.segments] == expected


def check_refused(data: bytes, error: type[BridgedError], says: str, hint: str = "auto", base: int | None = None) -> None:
    with pytest.raises(error) as caught:
        formats.parse(data, hint, base)
    assert type(caught.value) is error
    assert says in caught.value.message, caught.value.message


def lines(*records: str) -> bytes:
    return "\n".join(records).encode()


# --- all formats --------------------------------------------------------------------------------------------------


def test_the_names_that_the_daemon_accepts_are_the_formats_that_exist() -> None:
    assert {"auto", "bin", *(f.name for f in formats.FORMATS)} == set(parser.TYPE_HINTS) == set(TYPES)
    assert formats.GZIP_MAGIC == parser.GZIP_MAGIC


def test_one_content_has_one_digest_whatever_file_it_came_in() -> None:
    from_bin = formats.parse(DATA, "bin", BASE)
    assert formats.parse(elf([(BASE, DATA)]), "auto", None).digest == from_bin.digest
    assert formats.parse(elf([(BASE, DATA[:32]), (BASE + 32, DATA[32:])]), "elf", None).digest == from_bin.digest
    assert formats.parse(hex_text([(BASE, DATA)]).encode(), "auto", None).digest == from_bin.digest
    assert formats.parse(hex_text([(BASE + 8, DATA[8:]), (BASE, DATA[:8])], 5).encode(), "hex", None).digest == from_bin.digest


@pytest.mark.parametrize("hint", parser.TYPE_HINTS)
def test_no_byte_is_no_image(hint: str) -> None:
    check_refused(b"", EmptyImage, "empty", hint, BASE)


def test_unknown_type() -> None:
    check_refused(DATA, BadRequest, "'uf2'", "uf2", BASE)


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (DATA, "elf"),
        (DATA, "hex"),
        (DATA, "srec"),
        (DATA, "dfuse"),
        (elf([(BASE, DATA)]), "hex"),
        (lines(UPPER, END), "elf"),
        (lines(UPPER, END), "srec"),
    ],
)
def test_content_is_not_what_was_said(data: bytes, hint: str) -> None:
    check_refused(data, UnknownFormat, data[:4].hex(" "), hint)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"UF2\n\x57\x51\x5d\x9e" + bytes(504), "UF2"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404", "a web page"),
        (b"\xef\xbb\xbf" + lines(UPPER, END), "byte order mark"),
        (lines(UPPER, END).decode().encode("utf-16"), "UTF-16"),
    ],
)
def test_what_is_plainly_something_else_is_no_raw_binary(data: bytes, says: str) -> None:
    check_refused(data, UnknownFormat, says, base=BASE)
    assert formats.parse(data, "bin", BASE).read(BASE, len(data)) == data, "unless these very bytes are meant"


def test_an_archive_may_be_data_where_it_has_an_address() -> None:
    check_refused(b"PK\x03\x04" + DATA, UnknownFormat, "a zip archive")
    assert formats.parse(b"PK\x03\x04" + DATA, "auto", BASE).start == BASE


@pytest.mark.parametrize("data", [elf([(BASE, DATA)]), hex_text([(BASE, DATA)]).encode()])
def test_an_address_that_contradicts_the_file_is_refused_and_not_ignored(data: bytes) -> None:
    check_content(data, [(BASE, DATA)], base=BASE)
    check_refused(data, BadRequest, "0x08000000, the request says 0x08004000", base=BASE + 0x4000)


def test_said_to_be_bin_wins_over_looks() -> None:
    data = elf([(BASE, DATA)])
    check_content(data, [(0x20000000, data)], "bin", 0x20000000)


def test_bin_needs_an_address_and_must_end_within_32_bits() -> None:
    check_refused(DATA, ImageAddressMissing, "raw binary")
    check_content(DATA, [((1 << 32) - 64, DATA)], "bin", (1 << 32) - 64)
    check_refused(DATA, CorruptImage, "offset 0: 64 bytes at 0xffffffc1", "bin", (1 << 32) - 63)


# --- Intel HEX ----------------------------------------------------------------------------------------------------


def test_hex_golden() -> None:
    text = (
        b":020000040800F2\r\n"
        b":10010000214601360121470136007EFE09D2190140\r\n"
        b":100110002146017E17C20001FF5F16002148011928\n"
        b"\n"
        b":0400000508000101ED\n"  # start address: of no interest
        b":0301300002337A1D\r\n"  # 0x1D makes the sum right
        b":00000001FF\r\n"
    )
    first = bytes.fromhex("214601360121470136007EFE09D21901") + bytes.fromhex("2146017E17C20001FF5F160021480119")
    check_content(text, [(0x08000100, first), (0x08000130, bytes.fromhex("02337A"))])


def test_hex_segment_addresses_and_lower_case() -> None:
    check_content(lines(record(2, 0, b"\x10\x00"), record(0, 4, b"ab").lower(), END), [(0x10004, b"ab")])
    # A type 04 record replaces a type 02 record and the other way round.
    both = lines(record(2, 0, b"\x10\x00"), UPPER, record(0, 0, b"x"), record(2, 0, b"\x00\x10"), record(0, 0, b"y"), END)
    check_content(both, [(0x100, b"y"), (0x08000000, b"x")])


def test_hex_record_across_64_kib_in_linear_mode() -> None:
    check_content(lines(UPPER, record(0, 0xFFFE, b"abcd"), END), [(0x0800FFFE, b"abcd")])


GOOD = record(0, 0, DATA[:16])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lines(UPPER, GOOD[:-1] + "0", END), "line 2: wrong checksum"),
        (lines(UPPER, GOOD), "line 2: the file ends here without an end record"),
        (lines(UPPER, "", GOOD, "", ""), "line 3: the file ends here without an end record"),
        (lines(UPPER, END, GOOD), "line 3: data after the end record in line 2"),
        (lines(UPPER, END, END), "line 3: data after the end record"),
        (lines(UPPER, GOOD[:-2], END), "line 2: the record announces 16 bytes of data (42 digits), it has 40"),
        (lines(UPPER, GOOD + "00", END), "line 2: the record announces 16 bytes"),
        (lines(UPPER, GOOD[:20] + " " + GOOD[20:], END), "line 2: expected ':' and at least 10 hexadecimal digits"),
        (lines(UPPER, GOOD[:20] + "G" + GOOD[21:], END), "line 2: expected ':' and at least 10"),
        (lines(UPPER, ":0000", END), "line 2: expected ':' and at least 10"),
        (lines(UPPER, "S00600004844521B", END), "line 2: expected a record that starts with ':'"),
        (lines(UPPER, "\x1b[31m", END), r"line 2: expected a record that starts with ':', found '\x1b[31m'"),
        (lines(UPPER, record(6, 0, b"\0"), END), "line 2: unknown record type 06"),
        (lines(record(4, 0, b"\x08"), END), "line 1: a record of type 04 has 2 bytes of data, found 1"),
        (lines(record(2, 0, b"\x08\0\0"), END), "line 1: a record of type 02 has 2 bytes of data, found 3"),
        (lines(record(5, 0, b"\x08\0"), END), "line 1: a record of type 05 has 4 bytes"),
        (lines(record(1, 0, b"\0")), "line 1: a record of type 01 has 0 bytes"),
        (lines(record(2, 0, b"\x10\0"), record(0, 0xFFFF, b"ab"), END), "line 2: 2 bytes at offset 0xffff run over"),
        (lines(record(4, 0, b"\xff\xff"), record(0, 0xFFFF, b"ab"), END), "line 2: 2 bytes at 0xffffffff end beyond"),
        (lines(UPPER, GOOD).replace(b"\n", b"\r"), "line 1: expected ':' and at least 10"),
        (b":10\xff\xff", "line 1: expected ':' and at least 10"),
    ],
)
def test_broken_hex_names_the_line(data: bytes, says: str) -> None:
    check_refused(data, CorruptImage, says)


def test_hex_overlap_names_both_lines() -> None:
    check_refused(
        lines(UPPER, record(0, 0, DATA[:16]), record(0, 0x20, b"x"), record(0, 8, b"y"), END),
        OverlappingImage,
        "line 4: address 0x08000008 was already given by line 2",
    )
    # The later line is the culprit also when its address is the lower one; equal bytes are an overlap all the same.
    check_refused(
        lines(UPPER, record(0, 0x10, DATA), record(0, 0, DATA), END), OverlappingImage, "line 3: address 0x08000010 was already"
    )
    check_refused(lines(UPPER, GOOD, GOOD, END), OverlappingImage, "line 3: address 0x08000000 was already given by line 2")


def test_hex_without_data() -> None:
    check_refused(lines(UPPER, END), EmptyImage, "no byte")
    check_refused(lines(record(0, 0), END), EmptyImage, "no byte")


# --- ELF ----------------------------------------------------------------------------------------------------------


def test_elf_with_and_without_section_headers() -> None:
    for sections in (False, True):
        data = elf([(BASE, DATA), (BASE + 0x1000, DATA[:5])], sections=sections)
        check_content(data, [(BASE, DATA), (BASE + 0x1000, DATA[:5])])


def test_elf_content_goes_to_its_load_address() -> None:
    check_content(elf([(BASE, DATA)], virtual=0x20000000, bss_bytes=4096), [(BASE, DATA)])


def test_elf_only_loadable_bytes_count() -> None:
    check_refused(elf([(BASE, DATA)], kind=PT_NOTE), EmptyImage, "none of the 1 program headers")
    check_refused(elf([(0x20000000, b"")], bss_bytes=256), EmptyImage, "none of the 1")
    check_refused(elf([]), EmptyImage, "none of the 0")
    check_content(elf([(0x20000000, b""), (BASE, DATA)]), [(BASE, DATA)])


def with_headers(data: bytes, number: int, address: int, size: int) -> bytes:
    """Program header ``number`` is for the first ``size`` bytes of the file."""
    at = 52 + 32 * number
    return data[:at] + struct.pack("<8I", 1, 0, address, address, size, size, 4, 0x10000) + data[at + 32 :]


def test_elf_headers_are_no_firmware() -> None:
    """GNU ld and lld map them where they have room in front of the first section; objcopy never writes them."""
    alone = with_headers(elf([(BASE + 0x4000, DATA), (BASE, b"")], sections=True), 1, BASE, 52 + 64)
    check_content(alone, [(BASE + 0x4000, DATA)])  # lld: a segment of its own
    before = with_headers(elf([(BASE, DATA)], sections=True), 0, BASE, 0x54 + len(DATA))
    check_content(before, [(BASE + 0x54, DATA)])  # GNU ld: the same segment, and what fills it up to the first section
    stripped = with_headers(elf([(BASE, DATA)]), 0, BASE, 0x54 + len(DATA))
    check_refused(stripped, UnknownFormat, "-Wl,--nmagic")
    for at, value, size in ((32, 0xFFFFFF00, 4), (46, 64, 2), (48, 0xFFFF, 2)):
        check_refused(patched(before, at, value, size), CorruptImage, "section headers of")
    nothing = with_headers(elf([(BASE, b"")], sections=True), 0, BASE, 52)
    check_refused(nothing, EmptyImage, "none of the 1 program headers")
    check_refused(with_headers(alone, 0, BASE, 52), CorruptImage, "offset 0x54: program header 1 holds the headers")


def patched(data: bytes, at: int, value: int, size: int = 4) -> bytes:
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


GOOD_ELF = elf([(BASE, DATA)])


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (GOOD_ELF[:30], CorruptImage, "offset 0x1e: the file ends inside its ELF header"),
        (GOOD_ELF[:80], CorruptImage, "offset 0x34: 1 program headers"),
        (GOOD_ELF[:-1], CorruptImage, "offset 0x34: program header 0 wants 64 bytes from offset 0x54"),
        (elf([(BASE, DATA)], bits=2), UnknownFormat, "offset 0x4: expected a 32-bit ELF"),
        (elf([(BASE, DATA)], order=2), UnknownFormat, "offset 0x5: expected a little-endian ELF"),
        (
            elf([(BASE, DATA)], machine=243),
            UnknownFormat,
            "offset 0x12: expected an ELF for ARM (machine 40), found machine 243",
        ),
        (elf([(BASE, DATA)], elf_type=1), UnknownFormat, "offset 0x10: this ELF is an object file"),
        (patched(GOOD_ELF, 42, 56, 2), CorruptImage, "offset 0x2a: expected program headers of 32 bytes, found 56"),
        (patched(GOOD_ELF, 44, 0xFFFF, 2), CorruptImage, "offset 0x34: 65535 program headers"),
        (patched(GOOD_ELF, 28, 0xFFFFFFF0), CorruptImage, "offset 0xfffffff0: 1 program headers"),
        (patched(GOOD_ELF, 52 + 20, 16), CorruptImage, "offset 0x34: program header 0 has 64 bytes in the file for 16"),
        (elf([((1 << 32) - 8, DATA)]), CorruptImage, "program header 0 (offset 0x34): 64 bytes at 0xfffffff8 end beyond"),
        (elf([(BASE, DATA), (BASE + 32, DATA)]), OverlappingImage, "program header 1 (offset 0x54): address 0x08000020 was"),
    ],
)
def test_broken_elf_names_the_offset(data: bytes, error: type[BridgedError], says: str) -> None:
    check_refused(data, error, says)


def test_elf_whose_headers_share_their_bytes_is_a_bomb() -> None:
    head = elf([(BASE + i * 64, b"") for i in range(1000)])
    bomb = bytearray(head + DATA * 100)
    for i in range(1000):
        struct.pack_into("<8I", bomb, 52 + 32 * i, 1, len(head), 0, BASE + i * 6400, 6400, 6400, 5, 4)
    check_refused(bytes(bomb), CorruptImage, "the segments claim")


# --- oracles and properties ---------------------------------------------------------------------------------------

segments = st.lists(st.tuples(st.integers(0, 0xFFFF), st.binary(min_size=1, max_size=80)), min_size=1, max_size=8).map(
    lambda gaps: [(0x0800_0000 + sum(g + len(d) for g, d in gaps[:i]) + gaps[i][0], gaps[i][1]) for i in range(len(gaps))]
)


@given(segments, st.integers(1, 255), st.booleans())
def test_image_to_hex_and_back(parts: list[tuple[int, bytes]], width: int, backwards: bool) -> None:
    image = Image.of(parts)
    text = hex_text(parts[::-1] if backwards else parts, width)
    assert formats.parse(text.encode(), "auto", None) == image
    theirs = bincopy.BinFile()
    theirs.add_ihex(text)
    assert Image.of((s.address, bytes(s.data)) for s in theirs.segments) == image


@given(segments, st.sampled_from([1, 7, 16, 32, 255]))
def test_hex_as_another_tool_writes_it(parts: list[tuple[int, bytes]], width: int) -> None:
    theirs = bincopy.BinFile()
    for address, data in parts:
        theirs.add_binary(data, address)
    assert formats.parse(theirs.as_ihex(width).encode(), "hex", None) == Image.of(parts)


@given(segments, st.booleans())
def test_elf_agrees_with_another_reader(parts: list[tuple[int, bytes]], sections: bool) -> None:
    data = elf(parts, sections=sections)
    theirs = [(s["p_paddr"], s.data()) for s in ELFFile(io.BytesIO(data)).iter_segments("PT_LOAD")]
    assert formats.parse(data, "auto", None) == Image.of(theirs) == Image.of(parts)


def check_typed(data: bytes, hint: str, base: int | None) -> None:
    """Whatever comes in, out comes an image that survives its encoding, or one of our errors."""
    try:
        image = formats.parse(data, hint, base)
    except BridgedError:
        return
    assert Image.decode(image.encode()) == image


hints = st.sampled_from(parser.TYPE_HINTS)


@given(st.binary(max_size=300), hints, st.none() | st.integers(0, (1 << 32) - 1))
def test_any_bytes(data: bytes, hint: str, base: int | None) -> None:
    check_typed(data, hint, base)


@given(st.binary(max_size=300), hints)
def test_any_bytes_after_a_magic(data: bytes, hint: str) -> None:
    check_typed(b"\x7fELF\x01\x01\x01" + data, hint, None)
    check_typed(b":02" + data, hint, None)


@given(st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_flipped_bytes_of_good_files(flips: list[tuple[int, int]], sections: bool) -> None:
    for good in (elf([(BASE, DATA), (BASE + 256, DATA)], sections=sections), hex_text([(BASE, DATA)]).encode()):
        bad = bytearray(good)
        for at, value in flips:
            bad[at % len(bad)] = value
        check_typed(bytes(bad), "auto", None)


@given(st.integers(0, 400))
def test_a_file_that_was_cut_short_is_never_an_image(keep: int) -> None:
    for good in (elf([(BASE, DATA), (BASE + 256, DATA)]), hex_text([(BASE, DATA)]).rstrip().encode()):
        if keep < len(good):
            with pytest.raises(BridgedError):
                formats.parse(good[:keep], "auto", None)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_one_flipped_digit_of_a_hex_file_is_noticed(at: int, change: int) -> None:
    """The checksum of a record and the end record catch any change of one byte, except one of letter case or white space."""
    good = hex_text([(BASE, DATA)]).rstrip().encode()
    bad = bytearray(good)
    bad[at % len(bad)] ^= change
    if bytes(bad).upper().split() != good.upper().split():
        with pytest.raises(BridgedError):
            formats.parse(bytes(bad), "hex", None)
