"""One content out of several images and patches: what the words mean, what overlaps, and the bytes that come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bridged.errors import BadRequest, BridgedError, CorruptImage, ImageTooLarge, OverlappingImage, UnknownImage
from bridged.images import content
from bridged.images.content import Content, PartRef, Patch, wanted
from bridged.images.model import MAX_SEGMENTS, Image, Span

A, B = "a" * 64, "b" * 64
BASE = 0x08000000


@dataclass
class Staged:
    sha256: str
    name: str


@dataclass
class Shelf:
    """A store of raw binaries by name; each must be asked for with an address."""

    images: dict[str, bytes]

    def get(self, ref: str) -> Staged:
        if ref not in self.images:
            raise UnknownImage(f"no image {ref}")
        return Staged(ref * 64, "" if ref == "n" else ref)

    def load(self, staged: Any, base_address: int | None = None, type_hint: str = "auto") -> Image:
        if base_address is None:
            raise CorruptImage("line 3: wrong checksum")
        assert type_hint == "auto"
        return Image.of([(base_address, self.images[staged.sha256[0]])])


SHELF = Shelf({"a": bytes(range(64)), "b": b"\x55" * 32, "n": b"x", "h": bytes(33 << 20)})


def build(image: str, **params: Any) -> Content:
    return content.build(wanted(image, params), SHELF)


# --- words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "params", "canonical", "rest"),
    [
        (A, {}, A, {}),
        (A.upper(), {}, A, {}),
        (f"sha256:{A}", {"force": "vectors"}, A, {"force": "vectors"}),
        ("app@2", {}, "app@2", {}),
        ("me@here.bin@0x8000000", {}, "me@here.bin@0x08000000", {}),
        (A, {"addr": BASE, "type": "bin"}, f"{A}@0x08000000", {"type": "bin"}),
        (f"{A}@0x08000000", {"addr": "0x08000000"}, f"{A}@0x08000000", {}),
        (f"{A}@0X08000000,{B}", {}, f"{A}@0x08000000,{B}", {}),
        (A, {"patch": "0x10:AB,15:cd"}, A, {"patch": "0x0000000f:cd,0x00000010:ab"}),
        (A, {"patch": None, "addr": None}, A, {}),
    ],
)
def test_the_same_request_has_the_same_words(image: str, params: dict[str, Any], canonical: str, rest: dict[str, Any]) -> None:
    asked = wanted(image, params)
    assert (asked.image, asked.params(params)) == (canonical, rest)
    assert wanted(asked.image, asked.params(params)) == asked, "what the journal has means the same"


def test_files_of_a_canonical_text() -> None:
    assert content.files(f"{A}@0x08000000,{B},{A}@0x08010000") == {A, B}
    assert content.files("") == set()
    assert wanted("x@0x10,y", {}).resolved([A, B]).parts == (PartRef(A, 16), PartRef(B))


@pytest.mark.parametrize(
    ("image", "params", "says"),
    [
        ("", {}, "expected IMAGE[@ADDR]"),
        ("a,", {}, "expected IMAGE[@ADDR]"),
        (",".join("abcdefghi"), {}, "9 images are named, at most 8"),
        ("a,b", {"addr": BASE}, "2 are named: say each as IMAGE@ADDR"),
        ("a@0x10", {"addr": 0x20}, "named with 0x00000010, and addr= says 0x00000020"),
        ("a", {"addr": "here"}, "addr= 'here': expected an address"),
        ("a", {"addr": 1 << 32}, "expected an address"),
        ("a", {"patch": "0x10"}, "expected ADDR:HEX"),
        ("a", {"patch": "0x10:"}, "expected ADDR:HEX"),
        ("a", {"patch": "0x10:abc"}, "two digits a byte"),
        ("a", {"patch": "0x10:ab,"}, "expected ADDR:HEX"),
        ("a", {"patch": "zz:ab"}, "patch 'zz': expected an address"),
        ("a", {"patch": "0xffffffff:abcd"}, "ends beyond the 32-bit"),
        ("a", {"patch": "0x10:abcd,0x11:ab"}, "patches 0x00000010 and 0x00000011 overlap"),
        ("a", {"patch": ",".join(f"{at}:ab" for at in range(65))}, "65 patches are given, at most 64"),
        ("a", {"patch": f"0x10:{'00' * 1025}"}, "has 1025 bytes, at most 1024 are accepted: stage them"),
    ],
)
def test_what_makes_no_sense_is_a_bad_request(image: str, params: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRequest) as caught:
        wanted(image, params)
    assert says in caught.value.message


def test_the_limits_themselves_are_accepted() -> None:
    params = {"patch": ",".join(f"{at * 2048}:{'00' * 1024}" for at in range(64))}
    assert len(wanted(",".join("abcdefgh"), params).patches) == 64


@example("0\n", "", 0)  # A dot of `re` stops at a line end.
@given(
    st.text(max_size=60), st.text("0123456789abcdefx:,", max_size=60), st.one_of(st.none(), st.integers(), st.text(max_size=9))
)
def test_any_words_have_a_meaning_or_a_typed_error(image: str, patch: str, addr: object) -> None:
    try:
        asked = wanted(image, {"patch": patch, "addr": addr})
    except BridgedError:
        return
    assert wanted(asked.image, asked.params({"patch": patch, "addr": addr})) == asked


# --- bytes --------------------------------------------------------------------------------------------------------


def test_one_image_is_as_it_was_before() -> None:
    found = build("a", addr=BASE)
    assert found == Content(Image.of([(BASE, SHELF.images["a"])]), "a")


def test_several_images_are_one_content() -> None:
    found = build("b@0x08000040,a@0x08000000,n@0x08001000")
    assert found.image == Image.of([(BASE, SHELF.images["a"] + SHELF.images["b"]), (BASE + 0x1000, b"x")])
    assert found.name == "b+a+nnnnnnnnnnnn"
    names = {"a": Span("a", BASE, BASE + 64), "b": Span("b", BASE + 64, BASE + 96)}
    assert found.spans == (names["a"], names["b"], Span("n" * 12, BASE + 0x1000, BASE + 0x1001))
    assert found.image.digest == build("n@0x08001000,a@0x08000000,b@0x08000040").image.digest
    assert found.image.digest != build("a@0x08000000,b@0x08000040").image.digest


def test_an_overlap_names_both_images_and_the_place() -> None:
    with pytest.raises(OverlappingImage) as caught:
        build("b@0x08000030,a@0x08000000")
    assert caught.value.message == ("a (0x08000000..0x0800003f) and b (0x08000030..0x0800004f) both have bytes at 0x08000030")
    assert caught.value.facts == {"address": BASE + 0x30, "first": "a", "second": "b"}
    with pytest.raises(OverlappingImage, match=r"a .* and a "):
        build("a@0x08000000,a@0x08000000")


def test_an_error_of_one_of_several_names_the_file() -> None:
    with pytest.raises(CorruptImage, match=r"^b: line 3: wrong checksum$"):
        build("a@0x08000000,b")
    with pytest.raises(CorruptImage, match=r"^line 3"):
        build("b")


def test_several_images_have_a_limit_together() -> None:
    assert build("h@0x08000000").image.size_bytes == 33 << 20
    with pytest.raises(ImageTooLarge, match="together have more than"):
        build("h@0x08000000,h@0x10000000")


def test_patches_lie_over_the_image_and_beside_it() -> None:
    plain = bytes(range(64))
    found = build("a@0x08000000", patch="0x0800000a:ffff,0x0800003f:eedd,0x08001000:01,0x07ffffff:77aa")
    patched = bytearray(plain)
    patched[0], patched[10:12], patched[63] = 0xAA, b"\xff\xff", 0xEE
    assert found.image == Image.of([(BASE - 1, b"\x77" + bytes(patched) + b"\xdd"), (BASE + 0x1000, b"\x01")])
    assert (found.name, found.spans) == ("a (patched)", (Span("a", BASE, BASE + 64),))
    assert found.image.digest != build("a@0x08000000").image.digest


def test_a_patch_with_the_bytes_that_are_there_changes_nothing() -> None:
    assert build("a@0x08000000", patch="0x08000010:1011").image.digest == build("a@0x08000000").image.digest


def test_patches_cannot_exceed_the_number_of_pieces() -> None:
    image = Image.of((at * 2, b"x") for at in range(MAX_SEGMENTS))
    assert content.overlaid(image, [Patch(0, b"y")]).segments[0].data == b"y"
    with pytest.raises(ImageTooLarge, match="separate pieces"):
        content.overlaid(image, [Patch(1 << 20, b"y")])


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[tuple[int, bytes]], list[Patch]]:
    """Disjoint pieces and disjoint patches in a small space, where everything touches."""

    def row() -> list[tuple[int, bytes]]:
        found, at = [], 0
        for gap, data in draw(st.lists(st.tuples(st.integers(0, 6), st.binary(min_size=1, max_size=9)), max_size=8)):
            found.append((at + gap, data))
            at += gap + len(data)
        return found

    return row() or [(0, b"\0")], [Patch(at, data) for at, data in row()]


@given(layers())
def test_overlay_is_what_memory_would_hold(case: tuple[list[tuple[int, bytes]], list[Patch]]) -> None:
    pieces, patches = case
    memory: dict[int, int] = {}
    for at, data in [*pieces, *((p.address, p.data) for p in patches)]:
        memory.update(enumerate(data, at))
    found = content.overlaid(Image.of(pieces), patches)
    assert {at: byte for seg in found.segments for at, byte in enumerate(seg.data, seg.address)} == memory


@given(st.lists(layers().map(lambda case: case[0]), min_size=1, max_size=3))
def test_merging_is_refused_exactly_where_bytes_meet(rows: list[list[tuple[int, bytes]]]) -> None:
    loaded = [(f"i{n}", Image.of(row)) for n, row in enumerate(rows)]
    places = [at for _, image in loaded for seg in image.segments for at in range(seg.address, seg.end)]
    if len(places) == len(set(places)):
        assert content.merged(loaded) == Image.of(piece for row in rows for piece in row)
    else:
        with pytest.raises(OverlappingImage) as caught:
            content.merged(loaded)
        assert places.count(int(str(caught.value.facts["address"]))) > 1
