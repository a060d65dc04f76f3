"""Resumable uploads: each rule of tus 1.0.0, and tuspy, its reference client, against the running server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from tusclient import client as tus
from tusclient.exceptions import TusCommunicationError
from tusclient.uploader.uploader import Uploader

from bridged.api.http_call import Limits
from bridged.api.http_tus import CHECKSUMS
from bridged.api.transfers import Transfers
from bridged.errors import StorageFull
from tests.api.fakes import WatchedStore
from tests.api.http_bench import Bench, run

DATA = random.Random(8).randbytes(700_000)
SHA = hashlib.sha256(DATA).hexdigest()
TUS = {"Tus-Resumable": "1.0.0"}
PIECE = {**TUS, "Content-Type": "application/offset+octet-stream"}
WHERE = f"/v1/uploads/{SHA}"


def b64(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def creation(data: bytes = DATA, **words: str) -> dict[str, str]:
    said = {"sha256": hashlib.sha256(data).hexdigest(), **words}
    return {**TUS, "Upload-Length": str(len(data)), "Upload-Metadata": ",".join(f"{k} {b64(v)}" for k, v in said.items())}


async def create(bench: Bench, data: bytes = DATA, **words: str) -> str:
    status, headers, _ = await bench.ask("POST", "/v1/uploads", headers=creation(data, **words))
    assert status == 201
    assert headers["Tus-Resumable"] == "1.0.0"
    assert headers["Upload-Offset"] == "0"
    where: str = headers["Location"]
    return where


async def offset(bench: Bench, where: str = WHERE) -> int:
    status, headers, _ = await bench.ask("HEAD", where, headers=TUS)
    assert status == 200
    assert headers["Cache-Control"] == "no-store"
    return int(headers["Upload-Offset"])


def piece(at: int, **more: str) -> dict[str, str]:
    return {**PIECE, "Upload-Offset": str(at), **more}


def test_options_say_what_there_is(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        for path in ("/v1/uploads", WHERE):
            status, headers, _ = await bench.ask("OPTIONS", path)
            assert status == 204
            assert headers["Tus-Version"] == "1.0.0"
            assert headers["Tus-Max-Size"] == str(2 << 20)
            extensions = {"creation", "creation-with-upload", "checksum", "expiration", "termination"}
            assert set(headers["Tus-Extension"].split(",")) == extensions
            assert {"sha1", "sha256"} <= set(headers["Tus-Checksum-Algorithm"].split(","))

    run(tmp_path, body)


def test_an_upload_in_pieces(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        where = await create(bench, filename="app.bin", type="bin")
        assert where == WHERE
        assert await offset(bench) == 0
        at = 0
        for size in (1, 300_000, 262_144, len(DATA)):
            status, headers, _ = await bench.ask("PATCH", where, data=DATA[at : at + size], headers=piece(at))
            at = min(at + size, len(DATA))
            assert (status, headers["Upload-Offset"], headers["Tus-Resumable"]) == (204, str(at), "1.0.0")
            assert await offset(bench) == at
        staged = bench.store.get("app.bin")
        assert (staged.sha256, staged.type_hint, staged.path.read_bytes()) == (SHA, "bin", DATA)
        assert "Upload-Expires" not in headers
        assert (await bench.ask("PATCH", where, data=b"", headers=piece(at)))[0] == 204

    run(tmp_path, body)


def test_an_upload_with_its_creation(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        asked = {**creation(name="x"), "Content-Type": PIECE["Content-Type"]}
        status, headers, _ = await bench.ask("POST", "/v1/uploads", data=DATA[:1000], headers=asked)
        assert (status, headers["Upload-Offset"]) == (201, "1000")
        assert headers["Upload-Expires"].endswith(" GMT")
        status, headers, _ = await bench.ask("POST", "/v1/uploads", data=DATA, headers=asked)
        assert (status, headers["Upload-Offset"]) == (201, str(len(DATA)))
        assert bench.store.get("x").sha256 == SHA

    run(tmp_path, body)


def test_an_image_that_is_here_is_compared(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bench.store.add(DATA, "old name")
        assert await offset(bench) == len(DATA)
        where = await create(bench, name="new name")
        assert await offset(bench) == 0
        for at in (0, 400_000):
            status, _, _ = await bench.ask("PATCH", where, data=DATA[at : at + 400_000], headers=piece(at))
            assert status == 204
        assert await offset(bench) == len(DATA)
        assert bench.store.get("new name").sha256 == SHA
        where = await create(bench)
        wrong = await bench.problem("PATCH", where, data=bytes(len(DATA)), headers=piece(0))
        assert wrong == (422, "DIGEST_MISMATCH")
        assert bench.store.get("new name").path.read_bytes() == DATA

    run(tmp_path, body)


@pytest.mark.parametrize("name", list(CHECKSUMS))
def test_a_piece_that_was_changed_on_its_way_is_not_kept(tmp_path: Path, name: str) -> None:
    async def body(bench: Bench) -> None:
        where = await create(bench)
        good = f"{name} {b64(CHECKSUMS[name](DATA[:300_000]).digest())}"
        changed = b"\0" + DATA[1:300_000]
        status, headers, told = await bench.ask("PATCH", where, data=changed, headers=piece(0, **{"Upload-Checksum": good}))
        assert (status, told["code"], headers["Tus-Resumable"]) == (460, "DIGEST_MISMATCH", "1.0.0")
        assert await offset(bench) == 0
        sent = piece(0, **{"Upload-Checksum": good})
        assert (await bench.ask("PATCH", where, data=DATA[:300_000], headers=sent))[0] == 204
        bad = piece(300_000, **{"Upload-Checksum": good})
        assert (await bench.ask("PATCH", where, data=DATA[300_000:], headers=bad))[0] == 460
        assert await offset(bench) == 300_000
        for text in ("md5 AAAA", f"{name} !!", name.upper()):
            refused = piece(300_000, **{"Upload-Checksum": text})
            assert await bench.problem("PATCH", where, data=DATA[300_000:], headers=refused) == (400, "BAD_REQUEST"), text
        assert (await bench.ask("PATCH", where, data=DATA[300_000:], headers=piece(300_000)))[0] == 204

    run(tmp_path, body)


def test_what_is_refused(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bad: list[tuple[dict[str, str], int]] = [
            ({k: v for k, v in creation().items() if k != "Tus-Resumable"}, 412),
            (creation() | {"Tus-Resumable": "0.2.2"}, 412),
            (creation() | {"Upload-Length": "x"}, 400),
            (creation() | {"Upload-Length": str(3 << 20)}, 413),
            (creation() | {"Upload-Length": "0"}, 422),
            (creation() | {"Upload-Metadata": ""}, 400),
            (creation() | {"Upload-Metadata": "sha256 !!"}, 400),
            (creation() | {"Upload-Metadata": f"sha256 {b64('abc')}"}, 400),
            (creation() | {"Upload-Metadata": f"sha256 {b64(SHA)},name {b64('a' * 9000)}"}, 400),
            ({k: v for k, v in creation().items() if k != "Upload-Length"} | {"Upload-Defer-Length": "1"}, 400),
            (creation() | {"Upload-Concat": "partial"}, 400),
        ]
        for headers, status in bad:
            found, answered, _ = await bench.ask("POST", "/v1/uploads", headers=headers)
            assert found == status, headers
            if status == 412:
                assert answered["Tus-Version"] == "1.0.0"
            if status == 413:
                assert answered["Tus-Max-Size"] == str(2 << 20)
        assert (await bench.ask("HEAD", WHERE, headers=TUS))[0] == 404
        assert (await bench.ask("PATCH", WHERE, data=b"x", headers=piece(0)))[0] == 404
        assert (await bench.ask("DELETE", WHERE, headers=TUS))[0] == 404
        where = await create(bench)
        status, headers, _ = await bench.ask("PATCH", where, data=DATA[:5], headers=piece(5))
        assert (status, headers["Upload-Offset"]) == (409, "0")
        assert (await bench.ask("PATCH", where, data=DATA[:5], headers=piece(0) | {"Content-Type": "text/plain"}))[0] == 415
        assert (await bench.ask("PATCH", where, data=DATA + b"!", headers=piece(0)))[0] == 400
        assert (await bench.ask("PATCH", where, data=DATA[:5], headers=TUS | {"Content-Type": PIECE["Content-Type"]}))[0] == 400
        assert await offset(bench) == 0
        wrong = b"!" + DATA[1:]
        assert await bench.problem("PATCH", where, data=wrong, headers=piece(0)) == (422, "DIGEST_MISMATCH")
        assert (await bench.ask("HEAD", where, headers=TUS))[0] == 404, "nothing is kept of what is not what was announced"

    run(tmp_path, body)


def test_more_than_was_announced_without_a_length_takes_nothing(tmp_path: Path) -> None:
    async def chunks(*parts: bytes) -> Any:
        for part in parts:
            yield part

    async def body(bench: Bench) -> None:
        where = await create(bench)
        status, _, _ = await bench.ask("PATCH", where, data=chunks(DATA, b"!"), headers=piece(0))
        assert status == 400
        assert await offset(bench) == 0
        status, headers, _ = await bench.ask("PATCH", where, data=chunks(DATA[:9], DATA[9:]), headers=piece(0))
        assert (status, headers["Upload-Offset"]) == (204, str(len(DATA)))

    run(tmp_path, body)


def test_termination(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        where = await create(bench)
        await bench.ask("PATCH", where, data=DATA[:1000], headers=piece(0))
        assert (await bench.ask("DELETE", where, headers=TUS))[0] == 204
        assert (await bench.ask("HEAD", where, headers=TUS))[0] == 404
        assert bench.store.usage_bytes == 0

    run(tmp_path, body)


def test_clients_that_cannot_say_patch(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        where = await create(bench)
        override = "X-HTTP-Method-Override"
        status, headers, _ = await bench.ask("POST", where, data=DATA[:1000], headers=piece(0, **{override: "PATCH"}))
        assert (status, headers["Upload-Offset"]) == (204, "1000")
        assert (await bench.ask("POST", where, headers=TUS | {override: "HEAD"}))[1]["Upload-Offset"] == "1000"
        assert (await bench.ask("POST", where, headers=TUS | {override: "PUT"}))[0] == 400
        assert (await bench.ask("POST", where, headers=TUS))[0] == 400
        assert (await bench.ask("POST", where, headers=TUS | {override: "DELETE"}))[0] == 204

    run(tmp_path, body)


def test_a_connection_that_dies_loses_at_most_what_was_not_synced(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        where = await create(bench)
        head = "".join(f"{k}: {v}\r\n" for k, v in piece(0).items())
        start = f"PATCH {where} HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: {len(DATA)}\r\n\r\n".encode()
        _, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(start + DATA[:500_000])
        async with asyncio.timeout(10):
            while not (bench.store.uploads and bench.store.uploads[-1].offset == 500_000):
                await asyncio.sleep(0.01)
        writer.transport.abort()
        await bench.settle()
        at = await offset(bench)
        assert at == 500_000, "what came is kept to the last byte where the daemon lives on"
        status, headers, _ = await bench.ask("PATCH", where, data=DATA[at:], headers=piece(at))
        assert (status, headers["Upload-Offset"]) == (204, str(len(DATA)))
        assert bench.uploads[-1][1] is True

    run(tmp_path, body)


def test_who_comes_back_before_the_old_connection_has_died_takes_over(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        where = await create(bench)
        head = "".join(f"{k}: {v}\r\n" for k, v in piece(0).items())
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(f"PATCH {where} HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: {len(DATA)}\r\n\r\n".encode())
        writer.write(DATA[:300_000])
        async with asyncio.timeout(10):
            while not (bench.store.uploads and bench.store.uploads[-1].offset == 300_000):
                await asyncio.sleep(0.01)
        at = await offset(bench)  # Silent for longer than ``takeover_s``: it is ended, and all of it counts.
        assert at == 300_000
        assert (await bench.ask("PATCH", where, data=DATA[at:], headers=piece(at)))[0] == 204
        assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 408 ")
        writer.close()

    run(tmp_path, body, takeover_s=0.0)


@pytest.mark.parametrize("cancels", [1, 2])
@pytest.mark.parametrize("known", [False, True])
def test_who_goes_away_while_his_upload_is_opened_keeps_nobody_out(tmp_path: Path, known: bool, cancels: int) -> None:
    """The thread that opens it ends after its request does, and nobody is left to end the upload."""
    began, go = threading.Event(), threading.Event()

    class Slow(WatchedStore):
        def open_upload(self, *arguments: Any) -> Any:
            upload = super().open_upload(*arguments)
            began.set()
            assert go.wait(10)
            return upload

    async def body() -> None:
        store, transfers = Slow(tmp_path), Transfers(5.0)
        if known:
            store.add(DATA)
        wanted = (store, "anna", len(DATA), SHA, 0, "", "auto")
        first = asyncio.create_task(transfers.open(*wanted))
        await asyncio.to_thread(began.wait, 10)
        for _ in range(cancels):
            first.cancel()
            await asyncio.sleep(0.01)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await first
        ended = (0, 0, len(DATA) if known else 0)
        async with asyncio.timeout(10):  # Who is cancelled twice does not wait for it.
            while cancels > 1 and (store.open, len(store._in_use), store._promised_bytes()) != ended:
                await asyncio.sleep(0.001)
        assert (store.open, len(store._in_use), store._promised_bytes()) == ended
        (await transfers.open(*wanted)).abandon()

    asyncio.run(body())


def test_an_upload_that_is_running_is_locked(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        where = await create(bench)
        head = "".join(f"{k}: {v}\r\n" for k, v in piece(0).items())
        _, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(f"PATCH {where} HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: {len(DATA)}\r\n\r\n".encode())
        writer.write(DATA[:10])
        async with asyncio.timeout(10):
            while not (bench.store.uploads and bench.store.uploads[-1].offset == 10):
                await asyncio.sleep(0.01)
        status, headers, told = await bench.ask("PATCH", where, data=DATA, headers=piece(0))
        assert (status, told["code"]) == (423, "TOO_MANY")
        assert headers["Retry-After"]
        assert (await bench.problem("POST", "/v1/uploads", headers=creation())) == (429, "TOO_MANY")
        assert (await bench.ask("DELETE", where, headers=TUS))[0] == 204, "who gives up does not wait"
        writer.close()
        await bench.settle()
        assert bench.store.usage_bytes == 0

    run(tmp_path, body)


def test_silence_ends_a_piece_and_keeps_what_came(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        where = await create(bench)
        head = "".join(f"{k}: {v}\r\n" for k, v in piece(0).items())
        start = f"PATCH {where} HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: 1000\r\n\r\n".encode()
        assert (await bench.raw(start + DATA[:400])).startswith(b"HTTP/1.1 408 ")
        await bench.settle()
        assert await offset(bench) == 400

    run(tmp_path, body, Limits(image_bytes=2 << 20, idle_timeout_s=0.3))


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        where = await create(bench)
        bench.store.refuse = StorageFull("no room")
        assert await bench.problem("PATCH", where, data=DATA, headers=piece(0)) == (507, "STORAGE_FULL")
        bench.store.refuse = None
        assert (await bench.ask("PATCH", where, data=DATA, headers=piece(0)))[0] == 204

    run(tmp_path, body)


# --- tuspy


def uploader(bench: Bench, **more: Any) -> Uploader:
    made = tus.TusClient(f"{bench.url}/v1/uploads")
    settings: dict[str, Any] = {"metadata": {"sha256": SHA, "filename": "app.bin"}, "chunk_size": 100_000, **more}
    return made.uploader(file_stream=io.BytesIO(DATA), **settings)


@pytest.mark.parametrize("checksum", [False, True])
def test_tuspy_uploads(tmp_path: Path, checksum: bool) -> None:
    async def body(bench: Bench) -> None:
        await asyncio.to_thread(lambda: uploader(bench, upload_checksum=checksum).upload())
        assert bench.store.get("app.bin").path.read_bytes() == DATA
        assert len(bench.uploads) == 7
        await asyncio.to_thread(lambda: uploader(bench, upload_checksum=checksum, chunk_size=1 << 20).upload())
        assert bench.store.get("app.bin").sha256 == SHA

    run(tmp_path, body)


def test_tuspy_resumes(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        first = uploader(bench)
        await asyncio.to_thread(lambda: first.upload(stop_at=300_000))
        again = await asyncio.to_thread(lambda: uploader(bench, url=first.url))
        assert again.offset == 300_000
        await asyncio.to_thread(again.upload)
        assert bench.store.get("app.bin").path.read_bytes() == DATA
        with pytest.raises(TusCommunicationError):
            await asyncio.to_thread(lambda: uploader(bench, metadata={}).upload())

    run(tmp_path, body)
