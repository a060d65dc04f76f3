"""Verbs that move bytes of images: what is here, upload, download.

- The bytes of a PUT are consumed exactly, also where they are refused, so that a piped script never loses step; where their
  number cannot be known or is above the limit the connection is closed instead.
- An upload is never held in memory, and the store is only called in threads: the loop is never blocked by a disk.
- What was synced of an upload stays for the next PUT, however this one ends.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from bridged.api.line_link import CHUNK_BYTES, Bye, Command, Gone, Link
from bridged.api.ports import StagedFile, Upload
from bridged.api.transfers import Transfer, in_thread
from bridged.errors import BadRequest, BridgedError, ImageTooLarge, LoginFirst, TooLarge, UnknownImage, UnknownJob
from bridged.protocol import line as codec
from bridged.protocol.line import Request
from bridged.protocol.reply import Reply, error_reply
from bridged.protocol.verbs import Scope


async def _have(link: Link, values: dict[str, Any]) -> None:
    sha256 = values["sha256"]
    offset, size, complete = await link.shared.transfers.have(link.shared.store, link.who.name, sha256)
    if not offset and not complete:
        raise UnknownImage(f"nothing of {sha256} is staged", sha256=sha256)
    await link.send(Reply(250, "", {"offset": offset, "size": size, "complete": complete}))


async def put(link: Link, request: Request) -> None:
    """354, the bytes, the answer. From 354 on the bytes are consumed, whatever the answer will be."""
    try:
        size, offset = codec.put_extent(request)
    except BadRequest as error:
        raise Bye(error_reply(error)) from error  # How many bytes would follow?
    if size > link.limits.image_bytes:
        too_large = ImageTooLarge(
            f"PUT of {size} bytes: at most {link.limits.image_bytes} are accepted", limit=link.limits.image_bytes
        )
        raise Bye(error_reply(too_large))
    upload: Upload | None = None
    failure: BridgedError | None = None
    if not link.who.known:
        # Bytes of somebody unknown are not even read.
        raise Bye(error_reply(LoginFirst("PUT needs a token with scope flash", scope=Scope.FLASH.value)))
    try:
        link.check("PUT")
        values = codec.bind(request)
        sha256, name, type_hint = values["sha256"], values.get("name", ""), values.get("type", "auto")
        arguments = (link.who.name, size, sha256, offset, link.jobs.image_name(name), type_hint)
        upload = await link.shared.transfers.open(link.shared.store, *arguments)
    except BridgedError as error:
        failure = error
    if isinstance(failure, ImageTooLarge | TooLarge):
        raise Bye(error_reply(failure))
    if upload is None:
        await _swallow(link, size - offset, failure)
        return
    with link.shared.transfers.running(link.who.name, sha256) as transfer:
        staged = await _receive(link, upload, size, offset, transfer)
    link.jobs.note("put", detail=f"sha256:{staged.sha256} {name}".rstrip())
    answer = {"image": f"sha256:{staged.sha256}", "size": staged.size_bytes, "complete": True}
    await link.send(Reply(250, "", answer | ({"name": name} if name else {})))


async def _swallow(link: Link, count: int, failure: BridgedError | None) -> None:
    """The bytes of a PUT that was refused: a piped script has sent them already and must not lose step."""
    await link.send(Reply(354, "SEND", {"bytes": count}))
    received = 0
    try:
        while received < count:
            data = await _raw(link, count - received, Transfer())
            if not data:
                assert failure is not None
                raise Bye(error_reply(failure))
            received += len(data)
    finally:
        link.shared.on_upload(received, False)
    assert failure is not None
    raise failure


async def _receive(link: Link, upload: Upload, size: int, offset: int, transfer: Transfer) -> StagedFile:
    """The announced bytes into the store; a failure of the store is told after the last of them."""
    failure: BridgedError | None = None
    finished = False
    received = 0
    try:
        await link.send(Reply(354, "SEND", {"bytes": size - offset}))
        while received < size - offset:
            data = await _raw(link, size - offset - received, transfer)
            if not data:
                cut = BadRequest(
                    f"PUT announced {size - offset} bytes and the connection ended after {received}", received=received
                )
                raise Bye(error_reply(failure or cut))
            received += len(data)
            if failure is None:
                try:
                    await in_thread(upload.write, data)
                except BridgedError as error:
                    failure = error
        if failure is not None:
            raise failure
        staged = await in_thread(upload.finish)
        finished = True
    finally:
        if not finished:
            await in_thread(upload.abandon)
        link.shared.on_upload(received, offset > 0)
    return staged


async def _raw(link: Link, limit: int, transfer: Transfer) -> bytes:
    try:
        async with transfer.waiting(link.limits.idle_timeout_s):
            return await link.incoming.raw(min(limit, CHUNK_BYTES))
    except TimeoutError:
        text = f"no byte of the announced data came for {link.limits.idle_timeout_s:g} s; what was synced is kept"
        if transfer.taken:
            text = "no byte came for a while and another connection goes on with this upload; what was synced is kept"
        raise Bye(Reply(421, "IDLE", {"message": text})) from None
    except ConnectionError as error:
        raise Gone from error


async def _get(link: Link, values: dict[str, Any]) -> None:
    ref = values["image|job"]
    try:
        path, sha256 = await _result_of(link, ref)  # First: anybody may give his image the name of a job.
    except UnknownJob as unknown:
        if link.who.targets is not None:
            raise  # An image belongs to no target; who has a right to some of them only gets what their jobs have read.
        try:
            staged = await in_thread(link.shared.store.get, ref)
        except UnknownImage:
            raise unknown from None
        path, sha256 = staged.path, staged.sha256
    try:
        file = await asyncio.to_thread(path.open, "rb")
    except FileNotFoundError:
        raise UnknownImage(f"{ref} was removed a moment ago", image=ref) from None
    await link.send_file(file, {"sha256": sha256})


async def _result_of(link: Link, ref: str) -> tuple[Path, str]:
    """File and digest of what the READ job ``ref`` has read. Raises ``UnknownJob``, ``BadRequest``."""
    job = link.jobs.get(ref)
    path = await in_thread(link.jobs.read_result, ref)
    return path, str((job.result or {}).get("sha256", ""))


COMMANDS: dict[str, Command] = {"HAVE": _have, "GET": _get}  # and PUT, which is more than one line
