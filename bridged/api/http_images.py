"""Staged images over HTTP: what is there, one of them, its bytes, and a plain PUT for curl.

``PUT /v1/images/sha256:HEX`` takes a whole file in one request: its length and digest are known before its first byte. What
must survive a bad link is uploaded in pieces: ``http_tus``. Both put into the same store, and prove what they got.
"""

from __future__ import annotations

from typing import Any

from bridged.api import web
from bridged.api.http_body import receive
from bridged.api.http_call import Answer, Body, Call, Operation, Param, reply
from bridged.api.http_jobs import COUNT, CURSOR, send_file
from bridged.api.http_problem import Refused
from bridged.api.ports import StagedFile
from bridged.api.replies import utc
from bridged.api.transfers import in_thread
from bridged.errors import BadRequest, ImageTooLarge, UnknownImage
from bridged.protocol.verbs import TYPES, Scope

BYTES = "application/octet-stream"
IMAGE = Param(
    "image",
    "path",
    "a staged image: its SHA-256 (sha256:…), the start of it (8 digits or more), or its name where that has no slash",
    {"type": "string", "pattern": r"[ -.0-~]{1,200}"},
    True,
)
WHOLE = Param(
    "image", "path", "sha256: and 64 hexadecimal digits", {"type": "string", "pattern": r"(sha256:)?[0-9a-fA-F]{64}"}, True
)
NAME = Param(
    "name",
    "query",
    "1 to 128 printable characters without a comma or an @0x... at its end",
    {"type": "string", "pattern": r"(?!.*@0[xX][0-9A-Fa-f]+$)[ -+\--~]{1,128}"},
)
TYPE = Param("type", "query", "format of the file; auto looks at its content", {"type": "string", "enum": list(TYPES)})
LENGTH = Param(
    "Content-Length", "header", "of the whole file", {"type": "integer", "minimum": 1, "maximum": 1 << 40}, required=False
)


def image_resource(staged: StagedFile) -> dict[str, Any]:
    return {
        "image": f"sha256:{staged.sha256}",
        "name": staged.name or None,
        "size": staged.size_bytes,
        "type": staged.type_hint,
        "used": utc(staged.used),
        "contents": dict(staged.contents),
    }


def find(call: Call, ref: str) -> StagedFile:
    return call.services.store.get(call.jobs.image_ref(ref))


async def list_images(call: Call) -> web.StreamResponse:
    """The last used first. The cursor says where in time the page ended; what is used meanwhile moves to the front."""
    if call.principal.targets is not None:
        return reply({"images": [], "next": None})
    limit, cursor = call.query["limit"], call.query.get("cursor", "")
    try:
        at, _, last = cursor.partition("-")
        since = (float(at), last) if cursor else None
    except ValueError:
        raise Refused(BadRequest("the cursor is none of ours; begin with the first page"), 410) from None

    def page() -> list[tuple[float, StagedFile]]:
        found = sorted(((s.used, s) for s in call.services.store.images()), key=lambda f: (f[0], f[1].sha256), reverse=True)
        return [f for f in found if since is None or (f[0], f[1].sha256) < since][: limit + 1]

    found = await in_thread(page)
    shown = found[:limit]
    following = f"{shown[-1][0]!r}-{shown[-1][1].sha256}" if len(found) > limit else None
    return reply({"images": [image_resource(staged) for _, staged in shown], "next": following})


async def get_image(call: Call) -> web.StreamResponse:
    staged = await in_thread(find, call, call.path["image"])
    return reply(await in_thread(image_resource, staged))


async def get_bytes(call: Call) -> web.StreamResponse:
    if call.principal.targets is not None:
        raise UnknownImage(f"{call.principal.name} has a right to some targets only, and fetches no image back")
    staged = await in_thread(find, call, call.path["image"])
    gone = UnknownImage(f"image {staged.sha256[:12]} was removed a moment ago", image=staged.sha256)
    return await send_file(call, staged.path, f"{staged.sha256[:12]}.bin", gone, tag=f'"{staged.sha256}"')


async def put_image(call: Call) -> web.StreamResponse:
    request, services = call.request, call.services
    sha256 = call.path["image"].lower().removeprefix("sha256:")
    size = request.content_length
    if size is None:
        raise Refused(BadRequest("Content-Length is missing: the size of a file must be known before its bytes come"), 411)
    if request.headers.get("Content-Range"):
        raise BadRequest("a PUT has the whole file; to go on with a part of one upload it to /v1/uploads")
    if size > call.limits.image_bytes:
        raise ImageTooLarge(
            f"a file of {size} bytes: at most {call.limits.image_bytes} are accepted", limit=call.limits.image_bytes
        )
    name, type_hint, who = call.jobs.image_name(call.query.get("name", "")), call.query.get("type", "auto"), call.principal.name
    _, _, known = await in_thread(services.store.have, sha256, who)
    upload = await services.transfers.open(services.store, who, size, sha256, 0, name, type_hint)
    with services.transfers.running(who, sha256) as transfer:
        _, staged = await receive(call, upload, transfer, size)
    if staged is None:
        raise BadRequest(f"fewer than the {size} bytes of the file came")
    call.jobs.note("put", detail=f"sha256:{staged.sha256} {name}".rstrip())
    where = {"Location": f"/v1/images/sha256:{sha256}"}
    return reply(await in_thread(image_resource, staged), 200 if known else 201, where)


_WHERE = {"Location": "where the image is"}

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        *("GET", "/v1/images", "listImages", "Staged images, the last used first", Scope.READ, list_images),
        {200: Answer("a page of images", "Images")},
        (COUNT, CURSOR),
        tag="images",
    ),
    Operation(
        *("GET", "/v1/images/{image}", "getImage", "One staged image", Scope.READ, get_image),
        {200: Answer("the image", "Image")},
        (IMAGE,),
        tag="images",
    ),
    Operation(
        *("PUT", "/v1/images/{image}", "putImage", "Stage a whole file", Scope.FLASH, put_image),
        {
            200: Answer("it was here already; the bytes were compared", "Image", headers=_WHERE),
            201: Answer("staged: its bytes have this SHA-256", "Image", headers=_WHERE),
        },
        (WHOLE, NAME, TYPE),
        Body("the file", media=BYTES),
        tag="images",
    ),
    Operation(
        *("GET", "/v1/images/{image}/data", "getImageData", "The bytes of a staged image", Scope.READ, get_bytes),
        {200: Answer("the file", media=BYTES, headers={"ETag": "its SHA-256"})},
        (IMAGE,),
        tag="images",
    ),
)
