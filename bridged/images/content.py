"""What a job wants in flash: one or more staged images and per-unit bytes, combined into one ``Image``. No I/O of its own.

The one place that builds it: jobs, the dry run and whatever comes later ask here, so that a bootloader with its application
and a serial number has one content, one digest, one proof. How it is said::

    app.elf                                  one image
    app.bin@0x08008000                       with the address of a raw binary (``addr=`` says the same for a single image)
    boot.bin@0x08000000,app.hex              several; no two may claim the same address
    patch=0x0801FFF0:00112233,0x0801FFE0:ff  bytes laid over the images, inside them or beside them

Invariants:

- The same request has the same canonical text, whichever of these words were used: it goes into the journal, as ``Job.image``
  and ``params["patch"]``, and idempotency compares it. One image without an address is its bare SHA-256.
- Patches win over images; two patches never touch the same byte, two images neither.
- Everything is bounded: ``MAX_PARTS``, ``MAX_PATCHES``, ``MAX_PATCH_BYTES``, ``COMBINED_BYTES``; and a request by its length.

It knows neither chips nor targets: whether an address is flash is a question for the plan.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

from bridged.errors import BadRequest, ImageError, ImageTooLarge, OverlappingImage
from bridged.images.model import MAX_SEGMENTS, Image, Segment, Span

MAX_PARTS = 8  # Bootloader, application, data, certificates, two slots each: nobody has named more.
MAX_PATCHES = 64  # Serial number, addresses, calibration: a request of one line has room for some forty.
MAX_PATCH_BYTES = 1024  # What is larger is staged like any other image and named with its address.
COMBINED_BYTES = 64 << 20  # Of several images together. The largest flash of an STM32 has 4 MiB.
NAME_CHARS = 128  # Of the name of a combined content: it is stored with each proof and shown in tables.

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
# Only hexadecimal behind an @, because a name may well end in "@2".
_AT = re.compile(r"(.+)@(0[xX][0-9a-fA-F]{1,8})", re.DOTALL)
_ADDRESS = re.compile(r"0[xX][0-9a-fA-F]{1,8}|[0-9]{1,10}")
_BYTES = re.compile(r"(?:[0-9a-fA-F]{2})+")


@dataclass(frozen=True, slots=True)
class PartRef:
    """One staged image, as it was named, and where its bytes belong if it is a raw binary."""

    ref: str
    address: int | None = None

    def __str__(self) -> str:
        return self.ref if self.address is None else f"{self.ref}@{self.address:#010x}"


@dataclass(frozen=True, slots=True)
class Patch:
    address: int
    data: bytes

    @property
    def end(self) -> int:
        return self.address + len(self.data)

    def __str__(self) -> str:
        return f"{self.address:#010x}:{self.data.hex()}"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request for content, checked and canonical: ``patches`` sorted by address."""

    parts: tuple[PartRef, ...]
    type_hint: str = "auto"
    patches: tuple[Patch, ...] = ()

    @property
    def image(self) -> str:
        """The images as canonical text."""
        return ",".join(str(part) for part in self.parts)

    def params(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """``asked`` with the canonical patches, and without the address, which ``image`` has."""
        rest = {key: value for key, value in asked.items() if key not in ("addr", "patch")}
        return rest | ({"patch": ",".join(str(patch) for patch in self.patches)} if self.patches else {})

    def resolved(self, digests: Sequence[str]) -> Wanted:
        """With the SHA-256 of each file in place of how it was named."""
        return replace(self, parts=tuple(replace(part, ref=sha) for part, sha in zip(self.parts, digests, strict=True)))


@dataclass(frozen=True, slots=True)
class Content:
    """``spans``: where each part lies, by address, empty for a single image without patches, which needs no telling apart."""

    image: Image
    name: str
    spans: tuple[Span, ...] = ()


class Source(Protocol):
    """Of the image store, what is needed here. Both may block."""

    def get(self, ref: str) -> Any: ...
    def load(self, staged: Any, base_address: int | None = None, type_hint: str = "auto") -> Image: ...


def wanted(image: str, params: Mapping[str, Any]) -> Wanted:
    """What ``image`` and the options ``addr``, ``type`` and ``patch`` of a request mean together. Raises ``BadRequest``."""
    parts = parse_parts(image)
    if (address := params.get("addr")) is not None:
        given = _address(str(address), "addr=")
        if len(parts) > 1:
            raise BadRequest(f"addr= belongs to a single image and {len(parts)} are named: say each as IMAGE@ADDR")
        if parts[0].address not in (None, given):
            raise BadRequest(f"the image is named with {parts[0].address:#010x}, and addr= says {given:#010x}")
        parts = (replace(parts[0], address=given),)
    return Wanted(parts, str(params.get("type") or "auto"), parse_patches(str(params.get("patch") or "")))


def parse_parts(text: str) -> tuple[PartRef, ...]:
    """``IMAGE[@ADDR][,IMAGE[@ADDR]…]``. Raises ``BadRequest``."""
    words = text.split(",")
    if len(words) > MAX_PARTS:
        raise BadRequest(f"{len(words)} images are named, at most {MAX_PARTS} are accepted", limit=MAX_PARTS)
    parts = []
    for word in words:
        match = _AT.fullmatch(word)
        ref, address = (match[1], int(match[2], 16)) if match else (word, None)
        if not ref.strip():
            raise BadRequest(f"expected IMAGE[@ADDR][,IMAGE[@ADDR]...], found {text[:80]!r}")
        bare = ref[7:] if ref[:7].lower() == "sha256:" else ref
        parts.append(PartRef(bare.lower() if _SHA256.fullmatch(bare) else ref, address))
    return tuple(parts)


def parse_patches(text: str) -> tuple[Patch, ...]:
    """``ADDR:HEX[,ADDR:HEX…]`` or nothing, sorted by address. Raises ``BadRequest``."""
    if not text:
        return ()
    words = text.split(",")
    if len(words) > MAX_PATCHES:
        raise BadRequest(f"{len(words)} patches are given, at most {MAX_PATCHES} are accepted", limit=MAX_PATCHES)
    patches = []
    for word in words:
        where, colon, digits = word.partition(":")
        if not colon or not _BYTES.fullmatch(digits):
            raise BadRequest(f"patch {word[:40]!r}: expected ADDR:HEX with two digits a byte, such as 0x0801FFF0:00112233")
        if len(digits) > 2 * MAX_PATCH_BYTES:
            raise BadRequest(
                f"patch {where[:16]} has {len(digits) // 2} bytes, at most {MAX_PATCH_BYTES} are accepted: stage them as an "
                "image and name it as IMAGE@ADDR",
                limit=MAX_PATCH_BYTES,
            )
        patch = Patch(_address(where, "patch"), bytes.fromhex(digits))
        if patch.end > 1 << 32:
            raise BadRequest(f"patch {patch.address:#010x} ends beyond the 32-bit address space", address=patch.address)
        patches.append(patch)
    patches.sort(key=lambda patch: patch.address)
    for first, second in pairwise(patches):
        if second.address < first.end:
            raise BadRequest(
                f"patches {first.address:#010x} and {second.address:#010x} overlap: which of them is meant?",
                address=second.address,
            )
    return tuple(patches)


def _address(text: str, what: str) -> int:
    if not _ADDRESS.fullmatch(text) or (value := int(text, 16 if text[:2].lower() == "0x" else 10)) >= 1 << 32:
        raise BadRequest(f"{what} {text[:24]!r}: expected an address such as 0x08000000")
    return value


def files(image: str) -> set[str]:
    """SHA-256 of the files that a canonical image text names."""
    return {part.ref for part in parse_parts(image)} if image else set()


def build(request: Wanted, source: Source) -> Content:
    """The content that ``request`` means. Blocks as long as ``source`` does.

    Raises ``OverlappingImage`` naming both images, ``ImageTooLarge``, ``UnknownImage``, and what parsing each of them raises.
    """
    loaded: list[tuple[str, Image]] = []
    for part in request.parts:
        staged = source.get(part.ref)
        name = str(staged.name or staged.sha256[:12])
        try:
            loaded.append((name, source.load(staged, part.address, request.type_hint)))
        except ImageError as error:
            if len(request.parts) == 1:
                raise
            # A line or an offset says little without the file.
            raise type(error)(f"{name}: {error.message}", **{**error.facts, "image": name}) from error
        size = sum(image.size_bytes for _, image in loaded)
        if len(loaded) > 1 and size > COMBINED_BYTES:
            raise ImageTooLarge(f"the images together have more than {COMBINED_BYTES} bytes", limit_bytes=COMBINED_BYTES)
    image = overlaid(merged(loaded), request.patches)
    _ = image.digest  # Hashing takes milliseconds: here, where blocking is allowed.
    name = "+".join(name for name, _ in loaded)
    if len(loaded) == 1 and not request.patches:
        return Content(image, name)
    spans = sorted((Span(name, part.start, part.end) for name, part in loaded), key=lambda span: span.start)
    suffix = " (patched)" if request.patches else ""
    return Content(image, name[: NAME_CHARS - len(suffix)] + suffix, tuple(spans))


def merged(loaded: Sequence[tuple[str, Image]]) -> Image:
    """All images in one. Raises ``OverlappingImage`` naming the two that claim an address, ``ImageTooLarge``."""
    if len(loaded) == 1:
        return loaded[0][1]
    segments: list[tuple[Segment, str]] = [(seg, name) for name, image in loaded for seg in image.segments]
    segments.sort(key=lambda found: found[0].address)
    for (before, first), (seg, second) in pairwise(segments):
        if seg.address < before.end:
            raise OverlappingImage(
                f"{first} ({before.address:#010x}..{before.end - 1:#010x}) and {second} ({seg.address:#010x}.."
                f"{seg.end - 1:#010x}) both have bytes at {seg.address:#010x}",
                address=seg.address,
                first=first,
                second=second,
            )
    return _bounded(Image.of((seg.address, seg.data) for seg, _ in segments))


def overlaid(image: Image, patches: Sequence[Patch]) -> Image:
    """``image`` with ``patches`` (sorted, disjoint) laid over it. Raises ``ImageTooLarge``."""
    if not patches:
        return image
    pieces = [(patch.address, patch.data) for patch in patches]
    first = 0
    for seg in image.segments:
        at = seg.address
        while first < len(patches) and patches[first].end <= at:
            first += 1
        for patch in patches[first:]:
            if patch.address >= seg.end:
                break
            pieces.append((at, seg.data[at - seg.address : max(0, patch.address - seg.address)]))
            at = patch.end
        pieces.append((at, seg.data[at - seg.address :]))
    return _bounded(Image.of(pieces))


def _bounded(image: Image) -> Image:
    if len(image.segments) > MAX_SEGMENTS:
        raise ImageTooLarge(
            f"the content consists of {len(image.segments)} separate pieces, at most {MAX_SEGMENTS} are accepted"
        )
    return image
