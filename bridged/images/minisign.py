"""Minisign signatures of image files: the format of the `minisign` tool, both forms, checked and never made.

A public key is 42 bytes in base64: ``Ed``, the key's number (8), an Ed25519 key (32). A signature file has four lines: a
comment that proves nothing; 74 bytes in base64 (``Ed``: of the file itself, the legacy form; ``ED``: of its BLAKE2b-512 digest;
then the key's number and 64 bytes); a *trusted* comment; and a second signature, over the first one and that comment. In the
trusted comment we look for words ``version:1.4.2``, ``chip:F756``, ``board:motor-v2``, ``addr:0x08000000``; what they mean
``jobs.policy`` says. (Format: jedisct1.github.io/minisign, "Signature format"; interoperation with the tool is a test.)

Only the file that a person signed is looked at, byte for byte as it was sent, before anything parses it. The SHA-256 is taken
in the same pass, so that what was checked is what the store knows by this name. `cryptography` is imported when a signature is
checked and not before: who signs nothing needs neither the package nor its memory.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import mmap
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bridged.errors import BadSignature, ConfigError

COMMENT_CHARS = 512  # Of a trusted comment; what minisign writes by itself has 60, a request line takes no more.
FILE_BYTES = 2048  # Of a signature or key file; a signature has some 320.
_FACT = re.compile(r"(version|chip|board|addr):(\S{1,64})")


@dataclass(frozen=True, slots=True)
class PublicKey:
    """``number``: as minisign prints it. ``name``: where it came from, for people."""

    number: str
    raw: bytes
    name: str


@dataclass(frozen=True, slots=True)
class Signature:
    prehashed: bool
    number: str
    raw: bytes
    comment: str
    over_comment: bytes


@dataclass(frozen=True, slots=True)
class Signed:
    """A file whose signature is right. ``facts``: the words of its trusted comment."""

    key: PublicKey
    comment: str
    facts: Mapping[str, str]


def available() -> bool:
    """Whether the extra ``sign`` is installed."""
    from importlib.util import find_spec

    return find_spec("cryptography") is not None


def read_key(reference: str) -> PublicKey:
    """A key in words (``RW...``), or the file that ``minisign -G`` wrote. Raises ``ConfigError``."""
    text, name = reference, reference[:16] + "..."
    if reference.startswith("/"):
        name = reference
        try:
            with Path(reference).open(encoding="utf-8", errors="replace") as file:
                text = file.read(FILE_BYTES)
        except OSError as error:
            raise ConfigError(f"reading the key {reference}: {error.strerror or error}", path=reference) from error
    words = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("untrusted comment:")]
    try:
        raw = base64.b64decode(words[0], validate=True) if len(words) == 1 else b""
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != 42 or raw[:2] != b"Ed":
        raise ConfigError(f"{name} is no public key of minisign: expected 56 characters that begin with RW", path=name)
    return PublicKey(_number(raw[2:10]), raw[10:], name)


def parse(text: str) -> Signature:
    """The text of a ``.minisig`` file. Raises ``BadSignature``."""
    lines = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    prefix = "trusted comment: "
    try:
        if len(text) > FILE_BYTES or len(lines) != 4 or not lines[2].startswith(prefix):
            raise ValueError("four lines are expected, the third of them a trusted comment")
        raw, over = base64.b64decode(lines[1], validate=True), base64.b64decode(lines[3], validate=True)
        comment = lines[2].removeprefix(prefix)
        if len(raw) != 74 or raw[:2] not in (b"Ed", b"ED") or len(over) != 64:
            raise ValueError("the second line is no signature")
        if len(comment) > COMMENT_CHARS or not comment.replace("\t", " ").isprintable():
            raise ValueError("the trusted comment is too long or cannot be printed")
    except (binascii.Error, ValueError) as error:
        raise BadSignature(f"this is no signature of minisign: {error}", rule="signature") from error
    return Signature(raw[:2] == b"ED", _number(raw[2:10]), raw[10:], comment, over)


def verify(path: Path, sha256: str, text: str, keys: Iterable[PublicKey]) -> Signed:
    """Blocking. Raises ``BadSignature`` for whatever is not a right signature of this very file by one of ``keys``."""
    signature = parse(text)
    key = next((key for key in keys if key.number == signature.number), None)
    if key is None:
        raise BadSignature(f"signed with key {signature.number}, which is not trusted here", rule="key", key=signature.number)
    with path.open("rb") as file:
        size = path.stat().st_size
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
            if hashlib.sha256(data).hexdigest() != sha256:
                raise BadSignature(f"{sha256[:12]} reads back changed", rule="signature")
            message = hashlib.blake2b(data).digest() if signature.prehashed else bytes(data)
    if not _right(key, signature.raw, message):
        raise BadSignature(f"the signature by key {key.number} is not one of {sha256[:12]}", rule="signature", key=key.number)
    if not _right(key, signature.over_comment, signature.raw + signature.comment.encode()):
        text = f"the trusted comment of the signature by key {key.number} was changed"
        raise BadSignature(text, rule="signature", key=key.number)
    return Signed(key, signature.comment, _facts(signature.comment))


def _facts(comment: str) -> dict[str, str]:
    """A word that is said twice differently says nothing that can be relied on. Raises ``BadSignature``."""
    found: dict[str, str] = {}
    for word in comment.split():
        if (match := _FACT.fullmatch(word)) and found.setdefault(match[1], match[2]) != match[2]:
            raise BadSignature(f"the trusted comment says {match[1]}: twice, and differently", rule="signature")
    return found


def product_id(chip: str) -> int | None:
    """Of the chip that a trusted comment names; ``None`` for one that is in no table."""
    from bridged import chips  # late: it loads the tables of all chips
    from bridged.errors import UnknownChip

    try:
        return chips.find(chip).pid
    except UnknownChip:
        return None


def _right(key: PublicKey, signature: bytes, message: bytes) -> bool:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError as error:
        raise BadSignature("signatures cannot be checked here: the extra `sign` is not installed", rule="signature") from error
    try:
        Ed25519PublicKey.from_public_bytes(key.raw).verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _number(raw: bytes) -> str:
    """Little-endian, as minisign prints it."""
    return f"{int.from_bytes(raw, 'little'):X}"
