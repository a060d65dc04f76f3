"""hawkBit's Direct Device Integration: each target is a controller ``GATEWAY.TARGET`` of an update server that others run.

The gateway polls over HTTP, as often as the server says; a deployment becomes one job through the same function, with the same
policy and signatures, as everybody's. Answers are JSON of a stranger: every field is looked at, every size has a bound.

- One action of the server is one job: its id goes into the idempotency id, and what became of it is noted on disk before the
  server is told that it is closed. An action that is offered again after that is told its end again.
- A deployment has one firmware file; beside it may lie its ``.minisig``. A ``.swu`` (cpio) is unpacked, and has one file
  besides its description. Options of the job are metadata of the chunk: ``bridged.addr=0x08000000``.
- A download goes on where it broke off (Range), and is proven by the hash of the server, SHA-256 where it has one, else SHA-1
  (which proves that nothing was damaged, and not who made it: that is what signatures are for).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bridged import __version__
from bridged.api.metrics import FleetFigures
from bridged.api.requests import submission, values_of
from bridged.errors import (
    BadRequest,
    BridgedError,
    CorruptImage,
    DigestMismatch,
    FleetError,
    FleetRefused,
    FleetUnreachable,
    ImageTooLarge,
    NotCancellable,
    UnknownJob,
)
from bridged.fleet.connector import JobsPort
from bridged.fleet.ddi_http import CHUNK_BYTES, Answer, Gone, Http, Server, aside
from bridged.fleet.download import Store
from bridged.images.durable import disk, read_json, write_file
from bridged.images.staged import plain_name
from bridged.jobs.model import Job, JobState, Update

log = logging.getLogger(__name__)

PRINCIPAL = "hawkbit"
SHORTEST_S, LONGEST_S = 5.0, 86400.0  # Between two polls, whatever the server says.
RETRY_S = 60.0
WRAPPING_BYTES = 64 << 10  # What a .swu may have besides the image.
DETAIL_CHARS = 500
CANCELED = ["canceled by the server"]  # In the note of an action that ended so.


# --- what the server says ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class File:
    name: str
    size: int
    algorithm: str
    digest: str
    url: str


@dataclass(frozen=True, slots=True)
class Deployment:
    """``now``: whether it may be installed already, or only be downloaded. ``url``: where feedback goes."""

    id: str
    url: str
    image: File
    sig: File | None
    options: Mapping[str, str]
    now: bool
    skip: bool


def deployment(data: Mapping[str, Any], url: str, link: Callable[[str, str], str]) -> Deployment:
    """Raises ``BadRequest``: it cannot be carried out here, and the server is told so."""
    try:
        number, body = str(data["id"]), data["deployment"]
        files, options = [], {}
        for chunk in body["chunks"]:
            for one in chunk.get("metadata") or ():
                if str(one["key"]).startswith("bridged."):
                    options[str(one["key"]).removeprefix("bridged.")] = str(one["value"])
            for one in chunk.get("artifacts") or ():
                hashes, links = one["hashes"], one["_links"]
                algorithm = "sha256" if hashes.get("sha256") else "sha1"
                href = (links.get("download") or links["download-http"])["href"]
                size = one["size"]
                if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
                    raise BadRequest(f"artifact {str(one.get('filename'))[:80]!r} has the size {str(size)[:20]}")
                files.append(
                    File(str(one["filename"])[:128], size, algorithm, str(hashes[algorithm]).lower(), link(url, str(href)))
                )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadRequest(f"the deployment cannot be read: {type(error).__name__} {error}") from error
    sigs = {one.name.removesuffix(".minisig"): one for one in files if one.name.endswith(".minisig")}
    images = [one for one in files if not one.name.endswith((".minisig", ".sig"))]
    if len(images) != 1:
        raise BadRequest(f"the deployment has {len(images)} firmware files; one target takes one")
    now = body.get("maintenanceWindow") != "unavailable" and body.get("update") != "skip"
    skip = body.get("download") == "skip"
    return Deployment(number, url, images[0], sigs.get(images[0].name), options, now, skip)


def unpack(raw: bytes) -> tuple[str, bytes]:
    """The one file in a ``.swu`` besides its description: a cpio archive (newc). Raises ``CorruptImage``."""
    found, at = [], 0
    while True:
        head = raw[at : at + 110]
        if len(head) < 110 or head[:6] not in (b"070701", b"070702") or not re.fullmatch(rb"[0-9a-fA-F]{110}", head):
            raise CorruptImage(f"the .swu has no cpio header at byte {at}")
        size, length = int(head[54:62], 16), int(head[94:102], 16)
        name = raw[at + 110 : at + 110 + length].rstrip(b"\0").decode("utf-8", "replace")
        begin = at + -(-(110 + length) // 4) * 4
        if name == "TRAILER!!!":
            break
        if begin + size > len(raw):
            raise CorruptImage(f"the .swu ends in the middle of {name[:80]!r}")
        if name not in ("sw-description", "sw-description.sig"):
            found.append((name, raw[begin : begin + size]))
        at = begin + -(-size // 4) * 4
    if len(found) != 1:
        raise CorruptImage(f"the .swu has {len(found)} files besides its description; one target takes one")
    return found[0]


def sleep_of(data: Mapping[str, Any]) -> float:
    """``HH:MM:SS``, within bounds."""
    try:
        said = str(data["config"]["polling"]["sleep"])
    except (KeyError, TypeError):
        said = ""
    found = re.fullmatch(r"(\d{1,3}):(\d{1,2}):(\d{1,2})", said)
    seconds = int(found[1]) * 3600 + int(found[2]) * 60 + int(found[3]) if found else 300
    return min(max(float(seconds), SHORTEST_S), LONGEST_S)


# --- the connector ----------------------------------------------------------------------------------------------------


def _id(one: Controller, action: str) -> str:
    """The idempotency id of the job of an action."""
    return f"hawkbit/{one.id}/{action}"[:128]


@dataclass(slots=True)
class Controller:
    """One target. ``due``: loop time of its next poll."""

    target: str
    id: str
    due: float = 0.0
    told: str = ""
    trouble: str = ""


class Notes:
    """What became of the last action of each target: one small file each, replaced whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def get(self, target: str) -> dict[str, Any]:
        return read_json(self._path(target))

    def put(self, target: str, data: Mapping[str, Any]) -> None:
        with disk(f"noting the action of {target}"):
            write_file(self._path(target), json.dumps(dict(data)).encode())

    def part(self, target: str, name: str) -> Path:
        return self.folder / f"{target}-{plain_name(name)}.part"

    def _path(self, target: str) -> Path:
        return self.folder / f"{target}.json"


@dataclass(slots=True)
class Ddi:
    """``run`` until it is cancelled; ``observe`` is for ``Jobs.on_update``. ``image_limit_bytes``: as the store takes."""

    gateway: str
    server: Server
    jobs: JobsPort
    store: Store
    notes: Notes
    image_limit_bytes: int
    targets: tuple[str, ...] = ()
    _http: Http = field(init=False)
    _controllers: dict[str, Controller] = field(init=False)
    connected: bool = False  # The last poll was answered.
    connections: int = 0
    commands: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _jobs_of: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._http = Http(self.server)
        self._controllers = {name: Controller(name, f"{self.gateway}.{name}") for name in self.targets}

    def observe(self, job: Job, update: Update) -> None:  # noqa: ARG002
        """An end is told at once."""
        target = self._jobs_of.get(job.id)
        if target is not None and job.terminal:
            self._controllers[target].due = 0.0
            self._wake.set()

    def figures(self) -> FleetFigures:
        """Every controller has but one action at a time: nothing waits here, and what was not told stands in its note."""
        return FleetFigures(
            self.connected, self.connections, 0, 0, self._http.fetched_bytes, dict(self.commands), dict(self.ended)
        )

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for target in self.targets:
            note = await asyncio.to_thread(self.notes.get, target)
            if note.get("job"):
                self._jobs_of[str(note["job"])] = target
        while True:
            self._wake.clear()
            now = loop.time()
            for one in self._controllers.values():
                if one.due <= now:
                    one.due = math.inf
                    pause_s = await self._poll(one)
                    one.due = min(one.due, now + pause_s)  # Its job may have ended meanwhile: then it is due already.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min((one.due for one in self._controllers.values()), default=None)):
                    await self._wake.wait()

    async def _poll(self, one: Controller) -> float:
        """Seconds until the next."""
        try:
            pause_s = await self._turn(one)
            one.trouble = ""
            return pause_s
        except BridgedError as error:
            if isinstance(error, FleetUnreachable | FleetRefused):
                self.connected = False
            if error.message != one.trouble:
                one.trouble = error.message
                log.warning("hawkBit, %s: %s; it is tried again", one.id, error.message)
            after = error.facts.get("retry_after_s")
            return min(max(float(after), SHORTEST_S), LONGEST_S) if isinstance(after, int | float) else RETRY_S
        except Exception:
            log.exception("hawkBit, %s: defect; it is tried again", one.id)
            return RETRY_S

    async def _turn(self, one: Controller) -> float:
        root = f"{self.server.url.rstrip('/')}/controller/v1/{quote(one.id, safe='')}"
        data = (await self._ask("GET", root)).json()
        self.connections += not self.connected
        self.connected = True
        links = data.get("_links")
        hrefs = {
            name: self._http._link(root, str(found.get("href") or ""))
            for name, found in (links.items() if isinstance(links, dict) else ())
            if isinstance(found, dict)
        }
        if "configData" in hrefs:
            await self._ask("PUT", hrefs["configData"], {"mode": "merge", "data": self._attributes(one)})
        note = await asyncio.to_thread(self.notes.get, one.target)
        if "cancelAction" in hrefs:
            await self._cancel(one, note, hrefs["cancelAction"])
        elif "deploymentBase" in hrefs:
            await self._deploy(one, note, hrefs["deploymentBase"])
        elif note.get("job") and not note.get("closed"):
            await self._go_on(one, note)  # Nobody offers it any more; its end is told all the same.
        return sleep_of(data)

    async def _ask(self, method: str, url: str, body: Any = None) -> Answer:
        return await aside(self._http.ask, method, url, body)

    def _attributes(self, one: Controller) -> dict[str, str]:
        row = next((row for row in self.jobs.targets() if row["name"] == one.target), {})
        keys = ("chip", "family", "uid", "image_name", "image", "version")
        return {"bridged": __version__, "gateway": self.gateway, **{key: str(row[key]) for key in keys if row.get(key)}}

    # --- deployments ----------------------------------------------------------------------------------------------

    async def _deploy(self, one: Controller, note: dict[str, Any], url: str) -> None:
        answer = (await self._ask("GET", url)).json()
        url = url.partition("?")[0]
        number = str(answer.get("id"))
        if note.get("id") == number and (note.get("job") or note.get("closed")):
            await self._go_on(one, note | {"url": url})
            return
        note = {"id": number, "url": url, "staged": note.get("staged")}
        try:
            found = deployment(answer, url, self._http._link)
            if found.skip:
                return
            if found.image.size > self.image_limit_bytes + WRAPPING_BYTES:
                raise ImageTooLarge(f"{found.image.name} has {found.image.size} bytes, {self.image_limit_bytes} are accepted")
            sha256 = await self._staged(note, found.image)
            if not sha256:
                await self._tell(note, "proceeding", "none", [f"downloading {found.image.name}"])
                sha256 = await self._stage(one, found)
                note["staged"] = {"digest": found.image.digest, "sha256": sha256}
                await asyncio.to_thread(self.notes.put, one.target, note)
            if not found.now:
                return  # It is here; the server says when.
            options: dict[str, str] = dict(found.options)
            if found.sig:
                options["sig"] = await self._signature(one, found.sig)
            if reserved := {"target", "image", "id", "wait"} & options.keys():
                raise BadRequest(f"bridged.{sorted(reserved)[0]} is no option of a deployment")
            values = values_of("ENSURE", {"target": one.target, "image": sha256, **options})
            sub = submission("ENSURE", {**values, "id": _id(one, number)}, PRINCIPAL)
            job = await self.jobs.submit(sub)
        except FleetError:
            raise  # Of the link or the server: this deployment may go well another time.
        except BridgedError as error:
            if error.retryable:
                raise
            await self._close(one, note, "rejected", f"{error.code}: {error.message}")
            return
        note["job"] = job.id
        self.commands["taken"] += 1
        self._jobs_of[job.id] = one.target
        await asyncio.to_thread(self.notes.put, one.target, note)
        await self._go_on(one, note)

    async def _go_on(self, one: Controller, note: dict[str, Any]) -> None:
        """Tell how the job of an action is."""
        if note.get("closed"):
            await self._tell(note, "closed", str(note["finished"]), list(note.get("details") or ()))
            return
        try:
            job = self.jobs.get(str(note["job"]))
        except UnknownJob as error:
            await self._close(one, note, "failed", error.message)
            return
        if job.terminal:
            error_ = job.error or {}
            words = (
                f"{error_.get('code')}: {error_.get('message')}" if error_ else f"evidence {(job.result or {}).get('evidence')}"
            )
            await self._close(one, note, str(job.state), words)
            self._jobs_of.pop(job.id, None)
        elif one.told != (said := f"{job.id} {job.state} {job.phase}"):
            await self._tell(note, "proceeding", "none", [f"job {job.id}: {job.state} {job.phase}".strip()], job)
            one.told = said

    async def _close(self, one: Controller, note: dict[str, Any], state: str, words: str) -> None:
        """On disk first: what the server does not hear it is told again."""
        finished = "success" if state == JobState.SUCCEEDED else "failure"
        details = [f"{self.gateway}.{one.target}: {state}", words[:DETAIL_CHARS]]
        note |= {"closed": True, "finished": finished, "details": details}
        await asyncio.to_thread(self.notes.put, one.target, note)
        self.ended[state] += 1
        self.commands["refused"] += state == "rejected"
        log.info("hawkBit, %s: action %s: %s: %s", one.id, note["id"], state, words)
        await self._tell(note, "closed", finished, details)

    async def _tell(
        self, note: Mapping[str, Any], execution: str, finished: str, details: list[str], job: Job | None = None
    ) -> None:
        result: dict[str, Any] = {"finished": finished}
        if job is not None and job.total:
            result["progress"] = {"cnt": job.done, "of": job.total}
        said = {"id": str(note["id"]), "time": time.strftime("%Y%m%dT%H%M%S", time.gmtime())}
        said |= {"status": {"execution": execution, "result": result, "details": details}}  # type: ignore[dict-item]
        with contextlib.suppress(Gone):  # Closed there by somebody else.
            await self._ask("POST", f"{note['url']}/feedback", said)

    async def _cancel(self, one: Controller, note: dict[str, Any], url: str) -> None:
        """Take an action back. Where it has ended, that is refused: the server then offers it once more, and is told its end.
        Raises what the link raises."""
        answer = (await self._ask("GET", url)).json()
        action = answer.get("cancelAction")
        stop = str(action.get("stopId")) if isinstance(action, dict) else ""
        self.commands["cancellation"] += 1
        own = {"id": str(answer.get("id")), "url": url.partition("?")[0]}
        if note.get("id") != stop:
            note = {"id": stop, "url": own["url"], "staged": note.get("staged")}
        if note.get("closed"):
            details = list(note.get("details") or ())
            if details != CANCELED:
                await self._tell(own, "rejected", "failure", details)
                return
        else:
            try:
                job = self._job_of(one, note)
                if job and not job.terminal:
                    job = await self.jobs.cancel(job.id)
            except (NotCancellable, UnknownJob) as error:
                await self._tell(own, "rejected", "failure", [error.message[:DETAIL_CHARS]])
                return
            if job and not job.terminal:
                return  # At its next checkpoint; then it is told.
            if job and job.state is not JobState.CANCELED:
                await self._tell(own, "rejected", "failure", [f"job {job.id} has ended as {job.state}"])
                return
            note |= {"closed": True, "finished": "failure", "details": CANCELED}
            await asyncio.to_thread(self.notes.put, one.target, note)
            self.ended["canceled"] += 1
        await self._tell(own, "closed", "success", ["canceled"])

    def _job_of(self, one: Controller, note: Mapping[str, Any]) -> Job | None:
        """Of an action, also where the power was cut before it was noted. Raises ``UnknownJob`` for one that is forgotten."""
        if note.get("job"):
            return self.jobs.get(str(note["job"]))
        with contextlib.suppress(UnknownJob):
            return self.jobs.find(_id(one, str(note["id"])))
        return None

    # --- bytes ----------------------------------------------------------------------------------------------------

    async def _staged(self, note: Mapping[str, Any], image: File) -> str:
        """SHA-256 of what was staged before, if it is still there."""
        known = note.get("staged")
        if isinstance(known, dict) and known.get("digest") == image.digest:
            _, _, complete = await asyncio.to_thread(self.store.have, str(known["sha256"]), PRINCIPAL)
            return str(known["sha256"]) if complete else ""
        return ""

    async def _stage(self, one: Controller, found: Deployment) -> str:
        """SHA-256 of the staged image."""
        path = self.notes.part(one.target, f"{found.image.digest}")
        for stale in self.notes.folder.glob(f"{one.target}-*.part"):
            if stale != path:
                stale.unlink(missing_ok=True)
        await aside(self._http.fetch, found.image.url, path, found.image.size)
        return await asyncio.to_thread(self._adopt, found.image, path)

    def _adopt(self, image: File, path: Path) -> str:
        raw = path.read_bytes()
        self._prove(image, raw, path)
        name, data = unpack(raw) if image.name.endswith(".swu") else (image.name, raw)
        sha256 = hashlib.sha256(data).hexdigest()
        if not self.store.have(sha256, PRINCIPAL)[2]:
            upload = self.store.open_upload(PRINCIPAL, len(data), sha256, 0, name[:128], "auto")
            try:
                for at in range(0, len(data), CHUNK_BYTES):
                    upload.write(data[at : at + CHUNK_BYTES])
                upload.finish()
            finally:
                upload.abandon()
        path.unlink()
        return sha256

    async def _signature(self, one: Controller, sig: File) -> str:
        if sig.size > WRAPPING_BYTES:
            raise ImageTooLarge(f"{sig.name} has {sig.size} bytes, which is no signature")
        path = self.notes.part(one.target, f"{sig.digest}.minisig")
        await aside(self._http.fetch, sig.url, path, sig.size)
        raw = await asyncio.to_thread(path.read_bytes)
        await asyncio.to_thread(self._prove, sig, raw, path)
        path.unlink()
        return base64.b64encode(raw).decode()

    @staticmethod
    def _prove(file: File, raw: bytes, path: Path) -> None:
        found = hashlib.new(file.algorithm, raw).hexdigest()
        if found != file.digest:
            path.unlink()
            raise DigestMismatch(f"{file.name}: {file.algorithm} is {found[:16]}…, the server says {file.digest[:16]}…")
