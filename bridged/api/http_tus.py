"""Resumable uploads: tus 1.0.0 with creation, creation-with-upload, checksum, expiration and termination.

An upload is named by the SHA-256 of its file, which must be said at its creation (``Upload-Metadata: sha256 …``): so a client
that has lost everything but the file finds its upload again, and bytes that are not what was announced never become an image.
Each sender has uploads of his own. What is kept, and for how long, is the image store's business.

Where an image is here already there is nothing to be kept: an upload of it is a ``_Known``, in memory only, and its bytes are
compared. Document: the tus protocol, version 1.0.0; names in quotes below are its words.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections import OrderedDict
from dataclasses import dataclass
from email.utils import formatdate

from bridged.api import web
from bridged.api.http_body import receive
from bridged.api.http_call import Answer, Body, Call, Operation, Param, check_media
from bridged.api.http_problem import Refused
from bridged.api.ports import Unfinished
from bridged.api.transfers import in_thread
from bridged.errors import BadRequest, DigestMismatch, ImageTooLarge, TooMany, UnknownImage
from bridged.protocol.verbs import TYPES, Scope

VERSION = "1.0.0"
EXTENSIONS = "creation,creation-with-upload,checksum,expiration,termination"
PIECE = "application/offset+octet-stream"
CHECKSUMS = {"sha256": hashlib.sha256, "sha1": hashlib.sha1}
WRONG_CHECKSUM = 460  # The number that tus gives it.
NAME_CHARS = 128  # Of a name; what is longer is cut, because a file has the name that it has.
METADATA_CHARS = 4096  # Of Upload-Metadata: three short words in base64 are meant.
KNOWN_LIMIT = 256  # Uploads of images that are here already; beyond that the oldest is told to be complete.

UPLOAD = Param("upload", "path", "SHA-256 of the whole file", {"type": "string", "pattern": r"[0-9a-f]{64}"}, True)
RESUMABLE = Param(
    "Tus-Resumable", "header", "version of the upload protocol", {"type": "string", "enum": [VERSION], "default": VERSION}
)
OFFSET = Param("Upload-Offset", "header", "where this piece begins", {"type": "string", "pattern": r"[0-9]{1,18}"})
LENGTH = Param("Upload-Length", "header", "size of the whole file", {"type": "string", "pattern": r"[0-9]{1,18}"})
METADATA = Param(
    "Upload-Metadata",
    "header",
    "`sha256` (needed), `filename` or `name`, `type`; values in base64",
    {"type": "string", "maxLength": METADATA_CHARS},
)
CHECKSUM = Param(
    "Upload-Checksum", "header", "of this piece: sha256 or sha1, then base64", {"type": "string", "maxLength": 200}
)
OVERRIDE = Param(
    "X-HTTP-Method-Override",
    "header",
    "for clients that cannot send PATCH or DELETE",
    {"type": "string", "enum": ["PATCH", "DELETE", "HEAD"]},
)


@dataclass(slots=True)
class _Known:
    """An upload of an image that is here already."""

    name: str
    type_hint: str
    offset: int = 0


class Uploads:
    """The operations, and the little that they remember."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], _Known] = OrderedDict()

    async def options(self, call: Call) -> web.StreamResponse:
        return web.Response(
            status=204,
            headers={
                "Tus-Resumable": VERSION,
                "Tus-Version": VERSION,
                "Tus-Extension": EXTENSIONS,
                "Tus-Max-Size": str(call.limits.image_bytes),
                "Tus-Checksum-Algorithm": ",".join(CHECKSUMS),
            },
        )

    async def create(self, call: Call) -> web.StreamResponse:
        _check_version(call)
        for header in ("Upload-Defer-Length", "Upload-Concat"):
            if call.header(header):
                raise BadRequest(f"{header}: the size of the whole file must be said when its upload is created")
        size = number(call, "Upload-Length")
        if size > call.limits.image_bytes:
            limit = call.limits.image_bytes
            error = ImageTooLarge(f"a file of {size} bytes: at most {limit} are accepted", limit=limit)
            raise Refused(error, 413, {"Tus-Resumable": VERSION, "Tus-Max-Size": str(limit)})
        said = metadata(call.header("Upload-Metadata"))
        sha256 = said.get("sha256", "").lower()
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise BadRequest("Upload-Metadata has no sha256 of 64 hexadecimal digits: what is not known cannot be proven")
        name = call.jobs.image_name((said.get("name") or said.get("filename", ""))[:NAME_CHARS])[:NAME_CHARS]
        type_hint = said.get("type", "auto") if said.get("type") in TYPES else "auto"
        services, who = call.services, call.principal.name
        with_piece = call.request.body_exists and call.request.content_length != 0
        if with_piece:
            check_media(call.request, PIECE)
        if not await services.transfers.announce(services.store, who, size, sha256, name, type_hint):
            self._known[who, sha256] = _Known(name, type_hint)
            while len(self._known) > KNOWN_LIMIT:
                self._known.popitem(last=False)
        headers = {"Location": f"/v1/uploads/{sha256}"}
        offset = await self._take(call, sha256, 0) if with_piece else 0
        return web.Response(status=201, headers={**headers, **await self._state(call, sha256, offset)})

    async def head(self, call: Call) -> web.StreamResponse:
        _check_version(call)
        sha256 = call.path["upload"]
        offset, size, pending = await self._find(call, sha256)
        headers = {**await self._state(call, sha256, offset), "Upload-Length": str(size), "Cache-Control": "no-store"}
        words = {"sha256": sha256}
        if pending is not None:
            words |= {"name": call.jobs.own_name(pending.name), "type": pending.type_hint}
        headers["Upload-Metadata"] = ",".join(f"{key} {_base64(value)}" for key, value in words.items() if value)
        return web.Response(status=200, headers=headers)

    async def patch(self, call: Call) -> web.StreamResponse:
        _check_version(call)
        check_media(call.request, PIECE)
        offset = await self._take(call, call.path["upload"], number(call, "Upload-Offset"))
        return web.Response(status=204, headers=await self._state(call, call.path["upload"], offset))

    async def delete(self, call: Call) -> web.StreamResponse:
        _check_version(call)
        sha256, who = call.path["upload"], call.principal.name
        known = self._known.pop((who, sha256), None)
        if not await call.services.transfers.discard(call.services.store, who, sha256) and known is None:
            raise UnknownImage(f"there is no unfinished upload of {sha256[:12]}", sha256=sha256)
        return web.Response(status=204, headers={"Tus-Resumable": VERSION})

    async def override(self, call: Call) -> web.StreamResponse:
        """POST for who cannot send what is meant."""
        handlers = {"PATCH": self.patch, "DELETE": self.delete, "HEAD": self.head}
        handler = handlers.get(call.header("X-HTTP-Method-Override").upper())
        if handler is None:
            raise BadRequest("POST to an upload needs X-HTTP-Method-Override: PATCH, DELETE or HEAD")
        return await handler(call)

    # --- one piece ------------------------------------------------------------------------------------------------

    async def _find(self, call: Call, sha256: str) -> tuple[int, int, Unfinished | None]:
        """Where it stands, its size, and what is kept of it. Raises ``UnknownImage``."""
        services, who = call.services, call.principal.name
        _, size, complete = await services.transfers.have(services.store, who, sha256)
        if complete and size is not None:
            known = self._known.get((who, sha256))
            return size if known is None else known.offset, size, None
        pending = await in_thread(services.store.pending, who, sha256)
        if pending is None:
            raise UnknownImage(f"there is no upload of {sha256[:12]}; create one with POST", sha256=sha256)
        return pending.offset, pending.size_bytes, pending

    async def _take(self, call: Call, sha256: str, offset: int) -> int:
        """The body of this request into the upload; the offset after it."""
        checksum = Checksum.of(call.header("Upload-Checksum"))
        services, who = call.services, call.principal.name
        at, size, pending = await self._find(call, sha256)
        known = self._known.get((who, sha256)) if pending is None else None
        if offset != at:
            text = f"the upload of {sha256[:12]} goes on at offset {at}, the request says {offset}"
            raise Refused(BadRequest(text, offset=at), 409, {"Tus-Resumable": VERSION, "Upload-Offset": str(at)})
        length = call.request.content_length
        if length is not None and length > size - offset:
            raise BadRequest(f"{length} bytes were announced, {size - offset} are missing", missing=size - offset)
        if pending is None and known is None:
            return size  # Complete, and nothing was added to it.
        name, type_hint = (known.name, known.type_hint) if known is not None else ("", "auto")
        try:
            upload = await services.transfers.open(services.store, who, size, sha256, offset, name, type_hint)
        except TooMany as error:
            raise Refused(error, 423, {"Tus-Resumable": VERSION, "Retry-After": "5"}) from error
        with services.transfers.running(who, sha256) as transfer:
            taken, staged = await receive(call, upload, transfer, size - offset, resumed=offset > 0, check=checksum)
        if staged is not None:
            call.jobs.note("put", detail=f"sha256:{staged.sha256} {staged.name}".rstrip())
        if known is not None:
            known.offset = offset + taken
            if known.offset == size:
                self._known.pop((who, sha256), None)
        return offset + taken

    async def _state(self, call: Call, sha256: str, offset: int) -> dict[str, str]:
        pending = await in_thread(call.services.store.pending, call.principal.name, sha256)
        headers = {"Tus-Resumable": VERSION, "Upload-Offset": str(offset)}
        return headers | ({"Upload-Expires": formatdate(pending.expires, usegmt=True)} if pending is not None else {})

    def operations(self) -> tuple[Operation, ...]:
        offset = {"Upload-Offset": "where it goes on"}
        expires = {"Upload-Expires": "later it may be given up"}
        taken = {204: Answer("taken; complete when the offset is the length", headers=offset | expires)}
        return (
            *(
                Operation(
                    "OPTIONS", path, name, "What of tus there is", None, self.options, {204: Answer("see headers")}, params
                )
                for path, name, params in (
                    ("/v1/uploads", "uploadOptions", ()),
                    ("/v1/uploads/{upload}", "uploadOptionsOfOne", (UPLOAD,)),
                )
            ),
            Operation(
                *("POST", "/v1/uploads", "createUpload", "Create an upload", Scope.FLASH, self.create),
                {201: Answer("created", headers={"Location": "the upload"} | offset | expires)},
                (RESUMABLE, LENGTH, METADATA, CHECKSUM),
                Body("the first piece, or nothing", media=PIECE, required=False),
            ),
            Operation(
                *("HEAD", "/v1/uploads/{upload}", "headUpload", "Where an upload stands", Scope.FLASH, self.head),
                {200: Answer("see headers", headers=offset | expires)},
                (UPLOAD, RESUMABLE),
            ),
            Operation(
                *("PATCH", "/v1/uploads/{upload}", "patchUpload", "Send a piece", Scope.FLASH, self.patch),
                taken,
                (UPLOAD, RESUMABLE, OFFSET, CHECKSUM),
                Body("the piece", media=PIECE),
            ),
            Operation(
                *("DELETE", "/v1/uploads/{upload}", "deleteUpload", "Give an upload up", Scope.FLASH, self.delete),
                {204: Answer("gone")},
                (UPLOAD, RESUMABLE),
            ),
            Operation(
                *(
                    "POST",
                    "/v1/uploads/{upload}",
                    "overrideUpload",
                    "PATCH, HEAD or DELETE by POST",
                    Scope.FLASH,
                    self.override,
                ),
                taken | {200: Answer("as HEAD", headers=offset)},
                (UPLOAD, RESUMABLE, OVERRIDE, OFFSET, CHECKSUM),
                Body("as PATCH", media=PIECE, required=False),
            ),
        )


class Checksum:
    """Of one piece, as its sender announced it."""

    def __init__(self, name: str, expected: bytes) -> None:
        self._hash, self._expected = CHECKSUMS[name](), expected

    @classmethod
    def of(cls, header: str) -> Checksum | None:
        """Raises ``BadRequest``."""
        if not header:
            return None
        name, _, text = header.partition(" ")
        if name not in CHECKSUMS:
            raise BadRequest(f"Upload-Checksum by {name[:40]!r}: expected {' or '.join(CHECKSUMS)}")
        try:
            expected = base64.b64decode(text.strip(), validate=True)
        except binascii.Error as error:
            raise BadRequest(f"Upload-Checksum: {text[:40]!r} is no base64") from error
        return cls(name, expected)

    def update(self, data: bytes) -> None:
        self._hash.update(data)

    def done(self) -> None:
        """Raises ``Refused``."""
        if self._hash.digest() != self._expected:
            error = DigestMismatch("this piece does not have the checksum that was sent with it; nothing of it was kept")
            raise Refused(error, WRONG_CHECKSUM, {"Tus-Resumable": VERSION})


def _check_version(call: Call) -> None:
    found = call.header("Tus-Resumable")
    if found != VERSION:
        error = BadRequest(f"Tus-Resumable is {found[:20]!r}, expected {VERSION}")
        raise Refused(error, 412, {"Tus-Version": VERSION})


def number(call: Call, header: str) -> int:
    text = call.header(header)
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise BadRequest(f"{header} is {text[:40]!r}, expected a number of bytes", header=header)
    return int(text)


def metadata(header: str) -> dict[str, str]:
    """``key base64,key base64``; a key may stand alone. Raises ``BadRequest``."""
    if len(header) > METADATA_CHARS:
        raise BadRequest(f"Upload-Metadata has more than {METADATA_CHARS} characters", limit=METADATA_CHARS)
    found: dict[str, str] = {}
    for pair in header.split(",") if header else ():
        key, _, text = pair.strip().partition(" ")
        try:
            found[key] = base64.b64decode(text.strip(), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise BadRequest(f"Upload-Metadata: {key[:40]!r} is no text in base64") from error
    return found


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
