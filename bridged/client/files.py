"""Files to a gateway and from it: an upload goes on where it was synced, a download appears whole or not at all."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bridged.client.link import CHUNK_BYTES, Link, LinkLost, Refused, Session
from bridged.errors import BadRequest, DigestMismatch, EmptyImage
from bridged.protocol.line import format_request
from bridged.protocol.reply import Reply

Progress = Callable[[int, int, float], None]
"""Bytes done, bytes in all, bytes a second (0 where not known yet)."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    path: Path
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> LocalFile:
        """Raises ``BadRequest`` (no such file), ``EmptyImage``."""
        digest, size = hashlib.sha256(), 0
        try:
            with path.open("rb", buffering=0) as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
                    size += len(chunk)
        except OSError as error:
            raise BadRequest(f"reading {path} failed: {error.strerror or error}", path=str(path)) from error
        if not size:
            raise EmptyImage(f"{path} has no bytes", path=str(path))
        return cls(path, size, digest.hexdigest())

    @property
    def plain_name(self) -> str:
        """A name that the protocol can say."""
        text = "".join(c if " " <= c <= "~" and c != "," else "_" for c in self.path.name)[:128]
        return re.sub(r"@(0[xX][0-9A-Fa-f]+)$", r"_\1", text)  # which would be an address


def upload(session: Session, local: LocalFile, name: str, type_hint: str | None, progress: Progress) -> Reply:
    """Stages a file, going on where the gateway has it; the last reply. Raises ``Refused``, ``DaemonUnreachable``."""
    have_request = format_request("HAVE", local.sha256)
    rounds, furthest = 0, -1

    def action(link: Link) -> Reply:
        nonlocal rounds, furthest
        link.send(have_request)
        have = link.reply()
        if have.code not in (250, 404):
            raise Refused(have)
        if have.code == 250 and have.data.get("complete"):
            return have
        offset = int(have.data.get("offset") or 0) if have.data.get("size") == local.size_bytes else 0
        # What went out may have got nowhere, as often as it is sent; what the gateway has by now is progress.
        if offset > furthest:
            session.alive()
        furthest = max(furthest, offset)
        link.send(
            format_request(
                "PUT", str(local.size_bytes), local.sha256, offset=offset or None, name=name or local.plain_name, type=type_hint
            )
        )
        if (ready := link.reply()).code != 354:
            raise Refused(ready)
        _send_file(session, link, local, offset, progress)
        staged = link.reply()
        rounds += 1
        if staged.code == 429 or (staged.code == 501 and "fact.offset" in staged.data):
            # The gateway still holds the upload of our lost connection, or its end moved: look again.
            if rounds > 20:
                raise Refused(staged)
            raise LinkLost(str(staged.data.get("message") or staged.text))
        if staged.code >= 400:
            raise Refused(staged)
        return staged

    return session.call(action)


def _send_file(session: Session, link: Link, local: LocalFile, offset: int, progress: Progress) -> None:
    began = at = time.monotonic()
    first = offset
    for piece in _pieces(local, offset):
        link.send(piece)
        offset += len(piece)
        before, at = at, time.monotonic()
        session.excuse(at - before)
        # What the socket buffers swallow in the first moment says nothing about the link.
        progress(offset, local.size_bytes, (offset - first) / (at - began) if at - began > 0.5 else 0.0)


def _pieces(local: LocalFile, offset: int) -> Iterator[bytes]:
    """The bytes from ``offset`` on: exactly as many as were announced, also if the file has changed meanwhile."""
    try:
        with local.path.open("rb", buffering=0) as file:
            file.seek(offset)
            while offset < local.size_bytes:
                size = min(CHUNK_BYTES, local.size_bytes - offset)
                # A file that became shorter is filled up; its digest cannot be right then, and the gateway will say so.
                piece = file.read(size) or bytes(size)
                yield piece
                offset += len(piece)
    except OSError as error:
        raise BadRequest(f"reading {local.path} failed: {error.strerror or error}", path=str(local.path)) from error


def is_special(path: Path) -> bool:
    """Whether it is there and no plain file: written to then, and never replaced."""
    return os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path))


def fetch(session: Session, ref: str, path: Path) -> int:
    """GET into a file that appears whole or not at all; the number of bytes.

    What is there and no plain file (a device, a pipe, a link) is written to, once everything has come, and never replaced.
    """
    special = is_special(path)
    if special:
        handle, name = tempfile.mkstemp(prefix="bridged-")
        os.close(handle)
        temporary = Path(name)
    else:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")

    def action(link: Link) -> int:
        link.send(format_request("GET", ref))
        if (head := link.reply()).code != 250:
            raise Refused(head)
        digest = hashlib.sha256()
        with temporary.open("wb") as file:
            for piece in link.raw(int(head.data["size"])):
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != head.data["sha256"]:
            raise DigestMismatch(f"{ref} arrived with SHA-256 {digest.hexdigest()}, announced was {head.data['sha256']}")
        return int(head.data["size"])

    try:
        size = session.call(action)
        if special:
            with temporary.open("rb") as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        else:
            temporary.replace(path)
    except OSError as error:
        raise BadRequest(f"writing {path} failed: {error.strerror or error}", path=str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return size


def split_address(text: str) -> tuple[str, str]:
    """``FILE@0x08000000`` as file and ``@0x08000000``. A file of that very name is taken as it is."""
    match = re.fullmatch(r"(.+)(@0[xX][0-9A-Fa-f]{1,8})", text)
    return (match[1], match[2]) if match and not os.path.exists(text) else (text, "")


def signature_text(path: Path) -> str:
    """A ``.minisig`` file as ``sig=`` takes it. The untrusted comment proves nothing, and a request line is short."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise BadRequest(f"reading the signature {path} failed: {error}", path=str(path)) from error
    return base64.b64encode("\n".join(["untrusted comment:", *lines[1:]]).encode()).decode()
