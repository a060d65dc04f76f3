"""The body of a request into the image store: one way for a whole file (``PUT``) and for a piece of one (tus).

Nothing is held in memory, and what was synced before a body broke off is kept for who goes on with it.
"""

from __future__ import annotations

from typing import Protocol

from bridged.api import web
from bridged.api.http_call import CHUNK_BYTES, Call, go_on
from bridged.api.http_problem import Refused
from bridged.api.ports import StagedFile, Upload
from bridged.api.transfers import Transfer, in_thread
from bridged.errors import BadRequest


class Check(Protocol):
    """Something that was said about the bytes of one body. ``done`` raises where it is not so."""

    def update(self, data: bytes) -> None: ...
    def done(self) -> None: ...


async def receive(
    call: Call, upload: Upload, transfer: Transfer, left: int, *, resumed: bool = False, check: Check | None = None
) -> tuple[int, StagedFile | None]:
    """How many bytes came, and the staged image once ``left`` have; until then what came can be resumed.

    A client that goes away, or is silent for too long, raises; what was written until then is kept. Of a body with more than is
    missing, or of which ``check`` is not so, nothing is kept.
    """
    received, finished = 0, False
    go_on(call.request)
    try:
        while piece := await _piece(call, transfer):
            received += len(piece)
            if received > left:
                await in_thread(upload.take_back)
                raise BadRequest(f"more than the {left} bytes that are missing came", missing=left)
            if check is not None:
                check.update(piece)
            await in_thread(upload.write, piece)
        if check is not None:
            try:
                check.done()
            except Refused:
                await in_thread(upload.take_back)
                raise
        if received < left:
            return received, None
        staged: StagedFile = await in_thread(upload.finish)
        finished = True
        return received, staged
    finally:
        if not finished:
            await in_thread(upload.abandon)
        call.services.on_upload(received, resumed)


async def _piece(call: Call, transfer: Transfer) -> bytes:
    """The next bytes of the body, empty at its end."""
    try:
        async with transfer.waiting(call.limits.idle_timeout_s):
            return await call.request.content.read(CHUNK_BYTES)
    except TimeoutError:
        text = f"no byte of the body came for {call.limits.idle_timeout_s:g} s; what was synced is kept"
        if transfer.taken:
            text = "another request goes on with this upload; what was synced is kept"
        raise Refused(BadRequest(text), 408) from None
    except web.BROKEN_OFF as error:
        raise BadRequest("the body broke off; what was synced is kept") from error
