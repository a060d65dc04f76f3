"""A file as clients speak of it: its SHA-256, its name, its type; announced, on its way, or staged."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from bridged.errors import BadRequest
from bridged.images.durable import TMP, modified_s

READING = 2  # Counted up when the parser reads a file otherwise than before: what it gave then is not its content any more.
NAME_CHARS = 128  # Of one name: as much as the line protocol takes.
SHA256 = re.compile(r"[0-9a-f]{64}")

_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")
_HASHED = "hash-"


@dataclass(frozen=True, slots=True)
class StagedImage:
    """One whole file in the store. ``contents``: digest of the content by ``content_key(type hint, base address)``.

    ``named``: the number of the naming that gave it its name; the index says up to which one it was written.
    """

    sha256: str
    name: str
    size_bytes: int
    type_hint: str
    path: Path
    contents: dict[str, str] = field(default_factory=dict)
    named: int = 0

    @property
    def used(self) -> float:
        """When it was last used, UTC seconds; 0 when it has gone."""
        return modified_s(self.path)

    def content(self, base_address: int | None, type_hint: str = "auto") -> str | None:
        """Digest of the content if it was parsed this way before."""
        return self.contents.get(content_key(self.type_hint if type_hint == "auto" else type_hint, base_address))


@dataclass(frozen=True, slots=True)
class Announced:
    """What a client says about the file that it is about to send."""

    sha256: str
    size_bytes: int
    offset: int
    name: str
    type_hint: str


@dataclass(frozen=True, slots=True)
class Pending:
    """What a client may know of its unfinished upload. ``expires``: UTC seconds; later it may be gone."""

    offset: int
    size_bytes: int
    name: str
    type_hint: str
    expires: float


def content_key(type_hint: str, base_address: int | None) -> str:
    """How a file was read: type, base address, and by which edition of the parser."""
    return f"{type_hint}{'' if base_address is None else f'@{base_address:#010x}'}/{READING}"


def checked_sha256(text: str) -> str:
    sha256 = text.lower().removeprefix("sha256:")
    if not SHA256.fullmatch(sha256):
        raise BadRequest(f"expected a SHA-256 of 64 hexadecimal digits, found {text[:80]!r}")
    return sha256


def checked_name(name: str) -> str:
    if len(name) > NAME_CHARS or not name.isprintable():
        raise BadRequest(f"an image name has at most {NAME_CHARS} printable characters, found {name[:NAME_CHARS]!r}")
    return name


def plain_name(text: str) -> str:
    """``text`` as a file name: itself where it is harmless, else its hash. Different texts stay different."""
    if _PLAIN.fullmatch(text) and not text.startswith(_HASHED) and not text.endswith((TMP, ".json", ".part")):
        return text
    return _HASHED + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
