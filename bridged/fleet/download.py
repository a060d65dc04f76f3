"""An artifact from the broker's object store into the image store: in chunks, resumed, and proven by its SHA-256.

An object of NATS is one message with its metadata and messages with its chunks, at a subject of its own, somewhere in a stream.
Chunks are read one by one with direct gets, from a sequence on: any replica answers, no consumer is made, and a gateway needs
no more than the right to these reads. Where each chunk lay is noted in the ledger before the image store may report it, so
that a download that was broken off, by the link, the broker or the power, goes on with the chunk that is missing.

The image store does the rest as for everybody: it syncs, hashes, and shows the file only when it is whole.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any, Protocol

from bridged.api.transfers import abandon, in_thread
from bridged.errors import DigestMismatch, FleetError, UnknownArtifact
from bridged.fleet.ledger import Ledger
from bridged.fleet.link import Link, Message
from bridged.fleet.wire import ARTIFACT_STREAM, ARTIFACTS, Artifact
from bridged.images.parts import SYNC_BYTES

PRINCIPAL = "fleet"
CHUNK_S = 120.0  # One chunk over a link of 10 kbit/s takes 52 s.
LAG_TRIES, LAG_S = 6, 2.0
CHUNK_LIMIT_BYTES = 1 << 20  # The largest message of a broker, as it comes.


class Upload(Protocol):
    def write(self, data: bytes) -> Any: ...
    def finish(self) -> Any: ...
    def abandon(self) -> None: ...


class Store(Protocol):
    """Of the image store, what is needed here. All of it blocks."""

    def have(self, sha256: str, principal: str | None = None) -> tuple[int, int | None, bool]: ...
    def open_upload(self, principal: str, size: int, sha256: str, offset: int, name: str, type_hint: str) -> Upload: ...


async def download(
    link: Link, store: Store, ledger: Ledger, wanted: Artifact, on_bytes: Callable[[int], None] = lambda _: None
) -> None:
    """Stage ``wanted``. Raises ``UnknownArtifact``, ``DigestMismatch``, what the link and what the store raise; whatever was
    synced stays for the next try. ``on_bytes``: told of each chunk that came over the link."""
    offset, _, complete = await asyncio.to_thread(store.have, wanted.sha256, PRINCIPAL)
    if complete:
        return
    unique, chunk_bytes = await _metadata(link, wanted)
    key, subject = f"chunks {wanted.sha256}", f"$O.{ARTIFACTS}.C.{unique}"
    noted = await asyncio.to_thread(ledger.get, key)
    places: list[int] = noted["places"] if noted and noted["object"] == unique else []
    index = offset // chunk_bytes
    if index > len(places):
        offset = index = 0  # Put anew meanwhile, or the ledger is younger than the upload.
    places = places[:index]
    skip = offset - index * chunk_bytes
    arguments = (PRINCIPAL, wanted.size, wanted.sha256, offset, wanted.name, wanted.type)
    upload = await in_thread(store.open_upload, *arguments, undo=abandon)

    def leave() -> None:
        # Where it paused is known to the store from here on, so the places must be, too.
        try:
            if offset < wanted.size:
                ledger.put(key, {"object": unique, "places": places})
        finally:
            upload.abandon()

    try:
        while offset < wanted.size:
            found = await _stored(link, subject, places[-1] + 1 if places else 1)
            if found is None or len(found.data) <= skip:
                raise UnknownArtifact(f"artifact {wanted.sha256[:12]} ends at {offset} of {wanted.size} bytes")
            on_bytes(len(found.data))
            data, skip = found.data[skip:], 0
            places.append(found.sequence)
            if (offset + len(data)) // SYNC_BYTES > offset // SYNC_BYTES:
                await asyncio.to_thread(ledger.put, key, {"object": unique, "places": places})
            await in_thread(upload.write, data)
            offset += len(data)
        await in_thread(upload.finish)
        await asyncio.to_thread(ledger.put, key, None)
    finally:
        # A call that goes to its end although we are cancelled: an upload that is left open keeps the next one out.
        await in_thread(leave)


async def _stored(link: Link, subject: str, from_sequence: int = 0) -> Message | None:
    """A replica that lags behind does not have yet what was put a moment ago."""
    for _ in range(LAG_TRIES):
        found = await link.stored(ARTIFACT_STREAM, subject, from_sequence, CHUNK_S)
        if found is not None:
            return found
        await asyncio.sleep(LAG_S)
    return None


async def _metadata(link: Link, wanted: Artifact) -> tuple[str, int]:
    """Name of the chunks, and their size."""
    name = base64.urlsafe_b64encode(wanted.sha256.encode()).decode()
    found = await _stored(link, f"$O.{ARTIFACTS}.M.{name}")
    try:
        data = json.loads(found.data) if found else {}
        if not found or data.get("deleted"):
            raise UnknownArtifact(f"the object store {ARTIFACTS} has no {wanted.sha256}", sha256=wanted.sha256)
        unique, size = str(data["nuid"]), int(data["size"])
        chunk_bytes = int((data.get("options") or {}).get("max_chunk_size") or 131072)
        digest = base64.urlsafe_b64decode(str(data["digest"]).partition("=")[2]).hex()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FleetError(f"the metadata of artifact {wanted.sha256[:12]} cannot be read: {error}") from error
    if size != wanted.size or digest != wanted.sha256:
        raise DigestMismatch(
            f"the object {wanted.sha256[:12]} has {size} bytes with SHA-256 {digest[:12]}, {wanted.size} were announced",
            size=size,
        )
    if not 0 < chunk_bytes <= CHUNK_LIMIT_BYTES or not unique.isalnum():
        raise FleetError(f"the metadata of artifact {wanted.sha256[:12]} has chunks of {chunk_bytes} bytes")
    return unique, chunk_bytes
