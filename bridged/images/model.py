"""``Image``: the whole content that is wanted in a target's memory, sorted, without overlap, with one digest.

However it arrived (BIN, HEX, ELF), equal content is an equal ``Image`` with an equal ``digest``. The encoded form is what
the parser process hands to the daemon and the daemon to the session process, in a sealed memfd; the digest is the SHA-256 of
that encoding, so a receiver checks the very bytes it uses.

Encoding (all little-endian): magic ``BRIMG01\\n``, u32 number of segments, then for each u32 address and u32 length, then the
data of all segments in the same order. Canonical: sorted by address, not empty, adjacent segments merged.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from bridged.errors import CorruptImage, EmptyImage, OverlappingImage

# What Python was built with, where it was: hashlib loads OpenSSL, which is a twentieth of a session's memory and more of its
# start. Slower by five, and still a thousand times faster than any wire.
try:
    from _sha2 import sha256 as _sha256  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    try:
        from _sha256 import sha256 as _sha256  # type: ignore[import-not-found,unused-ignore,no-redef]  # Before Python 3.12
    except ImportError:
        from hashlib import sha256 as _sha256

MAGIC = b"BRIMG01\n"
_COUNT = struct.Struct("<I")
_ENTRY = struct.Struct("<II")
MAX_SEGMENTS = 65536  # A HEX file with a gap after every record of a 1 MiB image has this many; more is an attack.


def sha256_hex(data: bytes) -> str:
    digest: str = _sha256(data).hexdigest()
    return digest


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes for consecutive addresses from ``address`` on; never empty."""

    address: int
    data: bytes

    @property
    def end(self) -> int:
        return self.address + len(self.data)


@dataclass(frozen=True, slots=True)
class Span:
    """Where one of several images lies that were combined into one; ``name`` is for messages."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Image:
    """See the module docstring. Make one with ``Image.of`` or ``Image.decode``, which check and normalise."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, parts: Iterable[tuple[int, bytes]]) -> Image:
        """From (address, data) pairs in any order. Empty data is dropped; adjacent data is merged.

        Raises ``EmptyImage`` when nothing is left, ``OverlappingImage`` when two parts share an address,
        ``CorruptImage`` when an address exceeds 32 bits.
        """
        pieces: list[tuple[int, list[bytes]]] = []
        end = -1
        for address, data in sorted((a, bytes(d)) for a, d in parts if d):
            if address < 0 or address + len(data) > 1 << 32:
                raise CorruptImage(f"data at {address:#x} lies outside the 32-bit address space", address=address)
            if address < end:
                raise OverlappingImage(
                    f"data at {address:#010x} overlaps the data that ends before {end:#010x}", address=address
                )
            if address == end:
                pieces[-1][1].append(data)
            else:
                pieces.append((address, [data]))
            end = address + len(data)
        if not pieces:
            raise EmptyImage("the image holds no byte to be loaded")
        return cls(tuple(Segment(a, b"".join(chunks)) for a, chunks in pieces))

    @classmethod
    def decode(cls, encoded: bytes | memoryview) -> Image:
        """Inverse of ``encode``. Raises ``CorruptImage`` for anything that is not a canonical encoding."""
        view = memoryview(encoded)
        head = len(MAGIC) + _COUNT.size
        if len(view) < head or bytes(view[: len(MAGIC)]) != MAGIC:
            raise CorruptImage("not an encoded image: wrong magic")
        (count,) = _COUNT.unpack_from(view, len(MAGIC))
        at = head + count * _ENTRY.size
        if not 0 < count <= MAX_SEGMENTS or at > len(view):
            raise CorruptImage(f"encoded image announces {count} segments in {len(view)} bytes")
        parts = []
        for i in range(count):
            address, length = _ENTRY.unpack_from(view, head + i * _ENTRY.size)
            if not length or at + length > len(view):
                raise CorruptImage(f"encoded image: segment {i} is empty or cut short")
            parts.append((address, bytes(view[at : at + length])))
            at += length
        image = cls.of(parts)
        if at != len(view) or [(s.address, len(s.data)) for s in image.segments] != [(a, len(d)) for a, d in parts]:
            raise CorruptImage("encoded image is not canonical")
        return image

    def encode(self) -> bytes:
        """The canonical bytes; see the module docstring."""
        head = [MAGIC, _COUNT.pack(len(self.segments))]
        head += [_ENTRY.pack(s.address, len(s.data)) for s in self.segments]
        return b"".join(head + [s.data for s in self.segments])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of ``encode()``, hex: the identity of the *content*, whatever file it came from."""
        return sha256_hex(self.encode())

    @property
    def start(self) -> int:
        return self.segments[0].address

    @property
    def end(self) -> int:
        return self.segments[-1].end

    @property
    def size_bytes(self) -> int:
        """Bytes of content, holes not counted."""
        return sum(len(s.data) for s in self.segments)

    def read(self, address: int, count: int, fill: int = 0xFF) -> bytes:
        """The content of ``address`` up to ``address + count``, holes filled with ``fill``."""
        out = bytearray([fill]) * count
        # Bisected, because a plan asks for each block of an image that may have tens of thousands of segments.
        for seg in self.segments[max(0, bisect_right(self._starts, address) - 1) :]:
            lo, hi = max(address, seg.address), min(address + count, seg.end)
            if seg.address >= address + count:
                break
            if lo < hi:
                out[lo - address : hi - address] = seg.data[lo - seg.address : hi - seg.address]
        return bytes(out)

    @cached_property
    def _starts(self) -> list[int]:
        return [seg.address for seg in self.segments]

    def merged_with(self, other: Image) -> Image:
        """Both contents in one image. Raises ``OverlappingImage`` when they share an address."""
        return Image.of([(s.address, s.data) for s in (*self.segments, *other.segments)])
