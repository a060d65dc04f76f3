"""S-record, DfuSe and gzip: golden files, broken ones, other people's tools, and damage anywhere."""

from __future__ import annotations

import gzip
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import bincopy  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridged.errors import (
    BridgedError,
    CorruptImage,
    EmptyImage,
    ImageAddressMissing,
    ImageTooLarge,
    OverlappingImage,
    UnknownFormat,
)
from bridged.images import formats, parser
from bridged.images.model import Image
from tests.images.builders import dfu_suffix, dfuse, elf, hex_text, s_record, srec_text
from tests.images.test_formats import check_content, check_refused, lines, segments
from tests.support import require_tool

BASE = 0x08000000
DATA = bytes(range(64))


def pack(data: bytes) -> bytes:
    """In gzip without the time of day: what is made while tests are collected has the same name in every process."""
    return gzip.compress(data, mtime=0)


TITLE = s_record(0, 0, b"title")
FLASH = (0, b"@Internal Flash  /0x08000000/04*016Kg,01*064Kg,07*128Kg")


def s_data(address: int = BASE, data: bytes = DATA[:16]) -> str:
    return s_record(3, address, data)


def one_target(parts: list[tuple[int, bytes]]) -> bytes:
    return dfuse([(*FLASH, parts)])


# --- S-record -----------------------------------------------------------------------------------------------------


def test_srec_golden() -> None:
    text = (
        b"S00F000068656C6C6F202020202000003C\r\n"  # a title: of no interest
        b"S11F00007C0802A6900100049421FFF07C6C1B787C8C23783C6000003863000026\r\n"
        b"\n"
        b"S5030001FB\r\n"
        b"S9030000FC\r\n"
    )
    data = bytes.fromhex("7C0802A6900100049421FFF07C6C1B787C8C23783C60000038630000")
    check_content(text, [(0, data)])


@pytest.mark.parametrize(("kind", "address", "end"), [(1, 0x4000, 9), (2, 0x84000, 8), (3, 0x08004000, 7), (3, 0x08004000, 9)])
def test_srec_of_each_width(kind: int, address: int, end: int) -> None:
    check_content(lines(s_record(kind, address, b"ab"), s_record(end, 0)), [(address, b"ab")], "srec")
    check_content(lines(s_record(kind, address, b"ab").lower().replace("s", "S"), s_record(end, 0)), [(address, b"ab")])


def test_srec_counts_of_both_widths() -> None:
    for count in (s_record(5, 2), s_record(6, 2)):
        check_content(lines(TITLE, s_data(), s_data(BASE + 16), count, s_record(7, 0)), [(BASE, DATA[:16] * 2)])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lines(TITLE, s_data()[:-1] + "0", s_record(7, 0)), "line 2: wrong checksum"),
        (lines(TITLE, s_data()), "line 2: the file ends here without an end record"),
        (lines(s_data(), "", s_record(7, 0), s_data()), "line 4: data after the end record in line 3"),
        (lines(s_data(), s_record(7, 0), s_record(7, 0)), "line 3: data after the end record"),
        (
            lines(s_data(), s_record(5, 2), s_record(7, 0)),
            "line 2: the file is said to have 2 data records, up to here it has 1",
        ),
        (lines(s_data(), s_record(6, 0), s_record(7, 0)), "line 2: the file is said to have 0 data records"),
        (lines(s_data(), s_record(5, 1), s_data(BASE + 16)), "line 3: a data record after the count of all records in line 2"),
        (
            lines(s_data(), s_record(1, 0, b"x"), s_record(7, 0)),
            "line 2: a data record of type S1, those before it are of type S3",
        ),
        (lines(s_record(1, 0, b"x"), s_record(7, 0)), "line 2: an end record of type S7 after data records of type S1"),
        (lines(s_data(), s_record(8, 0)), "line 2: an end record of type S8 after data records of type S3"),
        (lines(s_data()[:-2], s_record(7, 0)), "line 1: the record announces 21 bytes (44 digits), it has 42 digits"),
        (lines(s_data() + "00", s_record(7, 0)), "line 1: the record announces 21 bytes"),
        (lines(s_data()[:20] + " " + s_data()[20:]), "line 1: expected 'S', a digit and at least 4"),
        (lines("S40500000000FA", s_record(7, 0)), "line 1: unknown record type S4"),
        (lines("S3030000FC", s_record(7, 0)), "line 1: a record of type S3 announces at least 5 bytes, found 3"),
        (lines("S00200FD"), "line 1: a record of type S0 announces at least 3 bytes, found 2"),
        (lines(s_data(), s_record(7, 0, b"x")), "line 2: a record of type S7 announces 5 bytes, found 6"),
        (lines(s_data(), ":00000001FF"), "line 2: expected a record that starts with 'S'"),
        (lines(s_data(), "\x1b[31m"), r"line 2: expected a record that starts with 'S', found '\x1b[31m'"),
        (lines(s_data(0xFFFFFFF8), s_record(7, 0)), "line 1: 16 bytes at 0xfffffff8 end beyond"),
    ],
)
def test_broken_srec_names_the_line(data: bytes, says: str) -> None:
    check_refused(data, CorruptImage, says)


def test_srec_overlap_names_both_lines() -> None:
    text = lines(TITLE, s_data(), s_data(BASE + 8), s_record(7, 0))
    check_refused(text, OverlappingImage, "line 3: address 0x08000008 was already given by line 2")


def test_srec_without_data() -> None:
    check_refused(lines(TITLE, s_record(7, 0)), EmptyImage, "no byte")
    check_refused(lines(s_data(BASE, b""), s_record(7, 0)), EmptyImage, "no byte")


# --- DfuSe --------------------------------------------------------------------------------------------------------


def test_dfuse_golden() -> None:
    """Prefix, target prefix and suffix byte by byte as UM0391 draws them."""
    target = b"Target\x00\x01\0\0\0" + b"ST...".ljust(255, b"\0") + b"\x0c\0\0\0" + b"\x01\0\0\0"
    element = b"\x00\x00\x00\x08" + b"\x04\0\0\0" + b"\x00\x01\x02\x03"
    head = b"DfuSe\x01" + struct.pack("<I", 11 + 274 + 12) + b"\x01"
    data = dfu_suffix(head + target + element)
    assert data[-16:-4] == b"\xff\xff\x11\xdf\x83\x04\x1a\x01UFD\x10"
    check_content(data, [(BASE, b"\x00\x01\x02\x03")])


def test_dfuse_size_with_or_without_the_suffix() -> None:
    check_content(resealed(GOOD_DFU, 6, struct.pack("<I", len(GOOD_DFU))), [(BASE, DATA)])
    check_content(resealed(GOOD_DFU, 6, struct.pack("<I", len(GOOD_DFU) - 16)), [(BASE, DATA)])


def test_dfuse_targets_and_elements_are_one_image() -> None:
    data = dfuse([(*FLASH, [(BASE, DATA), (BASE + 0x1000, b"x")]), (0, b"", [(BASE + 64, b"y")])])
    check_content(data, [(BASE, DATA + b"y"), (BASE + 0x1000, b"x")])
    check_content(dfuse([(*FLASH, []), (1, FLASH[1], [(BASE, b"second bank")])]), [(BASE, b"second bank")])
    check_content(dfuse([(*FLASH, [(BASE, b"")]), (*FLASH, [(BASE, DATA)])], vendor=0xFFFF), [(BASE, DATA)])


def test_dfuse_overlap_names_both_places() -> None:
    data = dfuse([(*FLASH, [(BASE, DATA)]), (*FLASH, [(BASE + 32, DATA)])])
    check_refused(data, OverlappingImage, "target 1 element 0 (offset 0x277): address 0x08000020 was already given by target 0")


def test_dfuse_without_data() -> None:
    check_refused(dfuse([]), EmptyImage, "no byte")
    check_refused(one_target([]), EmptyImage, "no byte")


GOOD_DFU = one_target([(BASE, DATA)])


def resealed(data: bytes, at: int, value: bytes) -> bytes:
    """``value`` put at ``at``, with a CRC that is right again: what a broken tool would write."""
    return dfu_suffix(data[:at] + value + data[at + len(value) : -16])


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (GOOD_DFU[:20], CorruptImage, "offset 0x14: the file ends inside its DfuSe prefix"),
        (GOOD_DFU[:-1], CorruptImage, "offset 0x6: the prefix announces 357 bytes and 16 of suffix, the file has 372"),
        (GOOD_DFU + b"\0", CorruptImage, "offset 0x6: the prefix announces 357 bytes"),
        (GOOD_DFU[:-1] + b"\0", CorruptImage, "offset 0x171: the suffix has CRC 00"),
        (GOOD_DFU[:300] + b"?" + GOOD_DFU[301:], CorruptImage, "offset 0x171: the suffix has CRC"),
        (dfuse([(*FLASH, [])], version=2), UnknownFormat, "offset 0x5: expected a DfuSe file of version 1, found version 2"),
        (dfuse([(*FLASH, [])], vendor=0x28E9), UnknownFormat, "offset 0x121: the file is meant for USB device 28e9:df11"),
        (GOOD_DFU[:-8] + b"DFU\x10" + GOOD_DFU[-4:], CorruptImage, "offset 0x165: expected a suffix of 16 bytes with 'UFD'"),
        (resealed(GOOD_DFU, 10, b"\x02"), CorruptImage, "offset 0x165: target 1 needs 274 bytes of prefix there, 0 are left"),
        (resealed(GOOD_DFU, 10, b"\x00"), CorruptImage, "offset 0xb: 346 bytes follow the last of 0 targets"),
        (resealed(GOOD_DFU, 11, b"target"), CorruptImage, "offset 0xb: expected the signature 'Target', found 'target'"),
        (resealed(GOOD_DFU, 277, b"\xff"), CorruptImage, "offset 0xb: target 0 announces 255 bytes, 72 are left"),
        (resealed(GOOD_DFU, 277, b"\x40"), CorruptImage, "offset 0x11d: element 0 of target 0 announces 64 bytes, its target"),
        (resealed(GOOD_DFU, 281, b"\x02"), CorruptImage, "offset 0x165: element 1 of 2 of target 0 begins beyond"),
        (resealed(GOOD_DFU, 281, b"\x00"), CorruptImage, "offset 0x11d: 72 bytes of target 0 follow its last element"),
        (resealed(GOOD_DFU, 289, b"\x39"), CorruptImage, "offset 0x15e: 7 bytes of target 0 follow its last element"),
        (one_target([((1 << 32) - 8, DATA)]), CorruptImage, "target 0 element 0 (offset 0x11d): 64 bytes at 0xfffffff8 end"),
    ],
)
def test_broken_dfuse_names_the_offset(data: bytes, error: type[BridgedError], says: str) -> None:
    check_refused(data, error, says)


def test_option_bytes_in_a_dfuse_file_are_refused_and_not_skipped() -> None:
    option_bytes = (1, b"@Option Bytes  /0x1FFFC000/01*016 e", [(0x1FFFC000, b"\xaa\x55")])
    check_refused(dfuse([(*FLASH, [(BASE, DATA)]), option_bytes]), UnknownFormat, "target 1 is alternate setting 1 ('@Option")
    check_refused(dfuse([(2, b"", [(BASE, DATA)])]), UnknownFormat, "target 0 is alternate setting 2")


# --- gzip ---------------------------------------------------------------------------------------------------------

PARTS = [(BASE, DATA), (BASE + 0x400, DATA[:5])]
FILES: dict[str, bytes] = {
    "elf": elf(PARTS),
    "hex": hex_text(PARTS).encode(),
    "srec": srec_text(PARTS).encode(),
    "dfuse": one_target(PARTS),
}


def test_there_is_a_file_of_each_format() -> None:
    assert set(FILES) == {f.name for f in formats.FORMATS}


@pytest.mark.parametrize("name", FILES)
def test_each_format_and_its_gzip_give_the_same_content(name: str) -> None:
    wanted = Image.of(PARTS).digest
    for data in (FILES[name], pack(FILES[name]), pack(FILES[name][:50]) + pack(FILES[name][50:])):
        for hint in ("auto", name):
            assert formats.parse(data, hint, None).digest == wanted


def test_gzip_of_a_raw_binary() -> None:
    check_content(pack(DATA), [(BASE, DATA)], base=BASE)
    check_refused(pack(DATA), ImageAddressMissing, "raw binary")
    packed = pack(DATA)
    check_content(packed, [(BASE, packed)], "bin", BASE)  # "bin" means the bytes as they are


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (pack(DATA) + b"rubbish", CorruptImage, "7 bytes follow the end of the gzip"),
        (pack(DATA) + b"\0", CorruptImage, "1 bytes follow the end"),
        (pack(DATA)[:-1], CorruptImage, "the file ends inside the gzip member that began at 0x0"),
        (pack(DATA)[:5], CorruptImage, "the file ends inside the gzip member"),
        (b"\x1f\x8b" + bytes(100), CorruptImage, "offset 0x0: the gzip member that begins there is damaged"),
        (pack(pack(DATA)), UnknownFormat, "another gzip"),
        (pack(b""), EmptyImage, "empty"),
        (pack(b"") * 1001, ImageTooLarge, "more than 1000 members"),
        (pack(FILES["hex"][:-30]), CorruptImage, "line"),
    ],
)
def test_broken_gzip(data: bytes, error: type[BridgedError], says: str) -> None:
    check_refused(data, error, says, base=BASE)


def test_a_gzip_bomb_is_met_before_it_unfolds() -> None:
    bomb = pack(bytes(64 << 20))
    assert len(bomb) < 1 << 17
    check_refused(bomb, ImageTooLarge, f"more than the {32 << 20} that are accepted", base=BASE)
    with pytest.raises(ImageTooLarge, match="more than the 100"):
        formats.gunzip(pack(bytes(60)) + pack(bytes(60)), 100)
    assert formats.gunzip(pack(bytes(50)) * 2, 100) == bytes(100)


def test_the_parser_process_takes_a_gzip_and_refuses_a_bomb(tmp_path: Path) -> None:
    def parsed(data: bytes, most: int) -> Image:
        path = tmp_path / "file"
        path.write_bytes(data)
        with path.open("rb") as file:
            return parser.parse_file(file.fileno(), len(data), "auto", BASE, limits=parser.Limits(unpacked_bytes=most))

    content = bytes(range(256)) * 4096  # packed it is a thousandth of that: more content than the file has bytes
    assert parsed(pack(content), 1 << 20) == Image.of([(BASE, content)])
    with pytest.raises(ImageTooLarge, match="more than the 1048576 that are accepted"):
        parsed(pack(content + b"x"), 1 << 20)


# --- oracles ------------------------------------------------------------------------------------------------------


@given(segments, st.sampled_from([1, 7, 16, 32, 250]), st.booleans())
def test_srec_round_trip(parts: list[tuple[int, bytes]], width: int, backwards: bool) -> None:
    image = Image.of(parts)
    text = srec_text(parts[::-1] if backwards else parts, width)
    assert formats.parse(text.encode(), "auto", None) == image
    theirs = bincopy.BinFile()
    theirs.add_srec(text)
    assert Image.of((s.address, bytes(s.data)) for s in theirs.segments) == image


@given(segments, st.sampled_from([1, 16, 32]))
def test_srec_as_another_library_writes_it(parts: list[tuple[int, bytes]], width: int) -> None:
    theirs = bincopy.BinFile()
    for address, data in parts:
        theirs.add_binary(data, address)
    theirs.execution_start_address = BASE  # without it this library writes no end record
    assert formats.parse(theirs.as_srec(width).encode(), "srec", None) == Image.of(parts)


@given(segments, st.integers(1, 4))
def test_dfuse_round_trip(parts: list[tuple[int, bytes]], targets: int) -> None:
    data = dfuse([(*FLASH, parts[n::targets]) for n in range(targets)])
    assert formats.parse(data, "auto", None) == Image.of(parts)


@given(segments)
def test_one_content_has_one_digest_in_every_format(parts: list[tuple[int, bytes]]) -> None:
    files = [elf(parts), hex_text(parts).encode(), srec_text(parts).encode(), one_target(parts)]
    digests = {formats.parse(data, "auto", None).digest for file in files for data in (file, pack(file))}
    assert digests == {Image.of(parts).digest}


@pytest.mark.parametrize("output", ["srec", "ihex"])
def test_as_objcopy_writes_it(output: str, tmp_path: Path) -> None:
    source, made = tmp_path / "in.bin", tmp_path / "out"
    content = bytes(range(256)) * 300  # across a border of 64 KiB
    source.write_bytes(content)
    move = ["--change-addresses", "0x0800fff0"]
    subprocess.run(
        [require_tool("objcopy", "binutils"), "-I", "binary", "-O", output, *move, str(source), str(made)], check=True
    )
    assert formats.parse(made.read_bytes(), "auto", None) == Image.of([(0x0800FFF0, content)])


def test_as_dfuse_pack_writes_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    (tmp_path / "b").write_bytes(DATA[:7])
    made = tmp_path / "out.dfu"
    places = ["-b", f"0x08000000:{tmp_path / 'a'}", "-b", f"0x08010000:{tmp_path / 'b'}"]
    subprocess.run([require_tool("dfuse-pack", "dfu-util"), *places, str(made)], check=True, capture_output=True)
    assert formats.parse(made.read_bytes(), "auto", None) == Image.of([(BASE, DATA), (BASE + 0x10000, DATA[:7])])


def test_dfu_suffix_agrees_about_our_test_files(tmp_path: Path) -> None:
    path = tmp_path / "ours.dfu"
    path.write_bytes(GOOD_DFU)
    found = subprocess.run(
        [require_tool("dfu-suffix", "dfu-util"), "-c", str(path)], check=True, capture_output=True, text=True
    )
    assert "0xDF11" in found.stdout.upper().replace("0X", "0x")


# --- damage -------------------------------------------------------------------------------------------------------

SAME = Image.of(PARTS)
PACKED = {f"{name}.gz": pack(data) for name, data in FILES.items()}
WHOLE = {"srec": FILES["srec"].rstrip(), "dfuse": FILES["dfuse"], **PACKED}


def outcome(data: bytes) -> Image | None:
    """The content, or None for a typed error; anything else is a defect and fails the test."""
    try:
        return formats.parse(data, "auto", None)
    except BridgedError:
        return None


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_was_cut_short_is_never_an_image(name: str) -> None:
    assert outcome(WHOLE[name]) == SAME
    assert [keep for keep in range(len(WHOLE[name])) if outcome(WHOLE[name][:keep])] == []


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=150)
@given(at=st.integers(0, 100_000), change=st.integers(1, 255))
def test_one_changed_byte_never_changes_the_content(name: str, at: int, change: int) -> None:
    """Refused in nearly every case; what no check covers (letter case, the time stamp of a gzip) leaves the content alone."""
    bad = bytearray(WHOLE[name])
    bad[at % len(bad)] ^= change
    assert outcome(bytes(bad)) in (None, SAME)


STARTS: list[Callable[[bytes], bytes]] = [
    lambda rest: b"S3" + rest,
    lambda rest: b"DfuSe\x01" + rest,
    lambda rest: dfu_suffix(struct.pack("<5sBIB", b"DfuSe", 1, 11 + len(rest), 2) + rest),
    lambda rest: dfu_suffix(struct.pack("<5sBIB", b"DfuSe", 1, 17 + len(rest), 1) + b"Target" + rest),
    lambda rest: b"\x1f\x8b\x08\0" + rest,
    lambda rest: pack(b"S3" + rest),
]


@pytest.mark.parametrize("start", STARTS)
@given(rest=st.one_of(st.binary(max_size=400), st.text("S0123456789ABCDEF\n\r", max_size=200).map(str.encode)))
def test_rubbish_is_a_typed_error(start: Callable[[bytes], bytes], rest: bytes) -> None:
    with pytest.raises(BridgedError):
        formats.parse(start(rest), "auto", None)
