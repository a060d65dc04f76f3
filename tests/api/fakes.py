"""Strict stand-ins for the job service and the image store: they do what their script says and fail on anything else."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bridged.errors import (
    BadRequest,
    BridgedError,
    IdempotencyConflict,
    NotCancellable,
    UnknownJob,
    UnknownTarget,
)
from bridged.images import content
from bridged.images.store import Store
from bridged.images.upload import Upload
from bridged.jobs.model import TERMINAL, Job, JobKind, JobState, Submission, Update
from bridged.jobs.traces import Traces

NOW = 1_700_000_000.0
Step = tuple[str, int, int]  # phase, done, total


@dataclass
class Script:
    """What one expected submission turns into. ``gate``: the job waits for it before its last change."""

    kind: JobKind
    target: str
    image: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    end: JobState = JobState.SUCCEEDED
    result: dict[str, Any] | None = None
    error: BridgedError | None = None
    gate: asyncio.Event | None = None
    at_once: bool = False
    mere_progress: bool = False  # further steps of one phase repeat the number of the update before them


class FakeJobs:
    """Every submission must be the next of ``scripts``, field by field; a job without a script fails the test."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.traces = Traces(store.root / "traces", 20)
        self.scripts: list[Script] = []
        self.jobs: dict[str, Job] = {}
        self.submissions: list[Submission] = []
        self.updates: dict[str, list[Update]] = {}
        self.watchers: set[asyncio.Queue[Update]] = set()
        self.refuse: BridgedError | None = None
        self.results: dict[str, Path] = {}
        self.surprises: list[str] = []
        self.states: dict[str, str] = {}
        self.on_update: list[Callable[[Job, Update], None]] = []
        self._ids: dict[str, tuple[Submission, str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def expect(self, *scripts: Script) -> None:
        self.scripts += scripts

    def _resolved(self, sub: Submission) -> Submission:
        """Images by SHA-256, in canonical words."""
        asked = content.wanted(sub.image, sub.params)
        digests = [self.store.get(part.ref).sha256 for part in asked.parts]
        return replace(sub, image=asked.resolved(digests).image, params=asked.params(sub.params))

    def find(self, id: str) -> Job:
        if id not in self._ids:
            raise UnknownJob(f"nothing was submitted with the id {id}")
        return self.jobs[self._ids[id][1]]

    async def submit(self, sub: Submission) -> Job:
        if sub.image:
            sub = self._resolved(sub)
        if sub.id and sub.id in self._ids:
            before, job_id = self._ids[sub.id]
            if replace(before, source="") != replace(sub, source=""):
                raise IdempotencyConflict(f"id {sub.id} was used for {before.kind} on {before.target}", id=sub.id)
            return self.jobs[job_id]
        if self.refuse is not None:
            raise self.refuse
        if sub.target not in ("motor1", "motor2"):
            raise UnknownTarget(f"there is no target {sub.target}", target=sub.target)
        self.submissions.append(sub)
        script = self.scripts.pop(0) if self.scripts else None
        wanted = script and (script.kind, script.target, script.image, script.params)
        if script is None or wanted != (sub.kind, sub.target, sub.image, sub.params):
            self.surprises.append(f"{sub} instead of {wanted}")
            raise AssertionError(self.surprises[-1])
        job_id = f"j{len(self.jobs) + 1}"
        job = Job(job_id, sub.kind, sub.target, JobState.QUEUED, 1, sub.image, "", sub.params, sub.principal, NOW)
        self.jobs[job_id], self.updates[job_id] = job, []
        if sub.id:
            self._ids[sub.id] = (sub, job_id)
        self._change(job_id)
        if script.at_once:
            await self._run(job_id, script)
        else:
            task = asyncio.create_task(self._run(job_id, script))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return self.jobs[job_id]

    async def _run(self, job_id: str, script: Script) -> None:
        for phase, done, total in script.steps:
            await asyncio.sleep(0)
            mere = script.mere_progress and self.jobs[job_id].phase == phase  # It has no number of its own.
            self._change(job_id, mere=mere, state=JobState.RUNNING, phase=phase, done=done, total=total, started=NOW + 1)
        if script.gate is not None:
            await script.gate.wait()
        error = script.error.as_dict() if script.error else None
        self._change(job_id, state=script.end, result=script.result, error=error, ended=NOW + 9)

    def _change(self, job_id: str, *, mere: bool = False, **changes: Any) -> None:
        old = self.jobs[job_id]
        if old.terminal:
            return
        job = replace(old, seq=old.seq + (not mere), **changes)
        self.jobs[job_id] = job
        update = self.update_of(job)
        for hook in self.on_update:
            hook(job, update)
        if not mere:
            self.updates[job_id].append(update)
        for queue in self.watchers:
            queue.put_nowait(update)

    def update_of(self, job: Job) -> Update:
        return Update(job.id, job.target, job.seq, NOW + job.seq, job.state, job.phase, job.done, job.total, 10500.0)

    async def close(self) -> None:
        """Ends jobs that still wait for their gate."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def get(self, job_id: str) -> Job:
        if job_id not in self.jobs:
            raise UnknownJob(f"there is no job {job_id}", job=job_id)
        return self.jobs[job_id]

    def list(self, target: str | None = None, state: JobState | None = None, limit: int = 50, before: str = "") -> list[Job]:
        known = list(self.jobs.values())
        known = known[: known.index(self.get(before))] if before else known
        found = [j for j in known if target in (None, j.target) and state in (None, j.state)]
        return found[::-1][:limit]

    def ready(self) -> tuple[bool, str]:
        return (False, self.refuse.message) if self.refuse else (True, "")

    async def cancel(self, job_id: str, force: bool = False) -> Job:
        job = self.get(job_id)
        if job.phase in ("erase", "write") and not force:
            raise NotCancellable(f"job {job_id} is in {job.phase}", job=job_id)
        self._change(job_id, state=JobState.CANCELED)
        return self.jobs[job_id]

    async def watch(self, job_id: str | None = None, target: str | None = None) -> AsyncIterator[Update]:
        queue: asyncio.Queue[Update] = asyncio.Queue()
        self.watchers.add(queue)
        for job in [self.get(job_id)] if job_id else [j for j in self.jobs.values() if not j.terminal]:
            queue.put_nowait(self.update_of(job))
        try:
            while True:
                update = await queue.get()
                if job_id in (None, update.job) and target in (None, update.target):
                    yield update
                    if job_id and update.state in TERMINAL:
                        return
        finally:
            self.watchers.discard(queue)

    def log(self, job_id: str, from_seq: int = 0, limit: int | None = None) -> _Updates:
        self.get(job_id)
        return [u for u in self.updates[job_id] if u.seq >= from_seq][:limit]

    def targets(self) -> _Rows:
        return [self.info("motor1"), self.info("motor2")]

    def info(self, name: str) -> dict[str, Any]:
        if name not in ("motor1", "motor2"):
            raise UnknownTarget(f"there is no target {name}", target=name)
        return {
            "name": name,
            "state": self.states.get(name, "idle"),
            "reason": None,
            "chip": "F756",
            "pid": 0x449,
            "family": "",
            "names": "",
            "uid": "",
            "flash_bytes": 0,
            "layout": "",
            "loader": "",
            "identified": 0.0,
            "content": "",
            "image": "",
            "image_name": "",
            "version": "",
            "evidence": "",
            "proven": NOW,
            "owner": "",
            "queued": 0,
        }

    def trace_file(self, job_id: str) -> Path | None:
        return self.traces.file(self.get(job_id).id)

    def read_result(self, job_id: str) -> Path:
        job = self.get(job_id)
        if job.kind is not JobKind.READ or job.state is not JobState.SUCCEEDED:
            raise BadRequest(f"job {job_id} ({job.kind}, {job.state}) has no bytes to show", job=job_id)
        return self.results[job_id]

    async def plan(self, target: str, image_ref: str, params: dict[str, Any]) -> dict[str, Any]:
        self.info(target)
        discard = params.get("outside") == "discard"
        return {
            **PLANNED,
            "target": target,
            "proven": discard,
            "params": params,
            "image": content.wanted(image_ref, params).image,
        }


_KEEP = {"keep_bytes": 31744, "lose_bytes": 0}
# What ``Jobs.plan`` answers; tests/jobs/test_plan.py compares the names.
PLANNED: dict[str, Any] = {
    "target": "motor1",
    "part": [{"name": "app.bin", "start": 0x08000000, "end": 0x08008400}],
    "chip": "STM32F74x/F75x",
    "pid": 0x449,
    "layout": "single",
    "flash_bytes": 1 << 20,
    "range": [
        {
            **{"action": "write", "address": 0x08000000, "end": 0x08008000, "sectors": 1, "first": 0, "last": 0},
            **{"sector_bytes": 32768, "write_bytes": 32768, "keep_bytes": 0, "lose_bytes": 0},
        },
        {
            **{"action": "keep", "address": 0x08008000, "end": 0x08010000, "sectors": 1, "first": 1, "last": 1},
            **{"sector_bytes": 32768, "write_bytes": 1024, **_KEEP},
        },
        {
            **{"action": "stay", "address": 0x08010000, "end": 0x08020000, "sectors": 2, "first": 2, "last": 3},
            **{"sector_bytes": 32768, "write_bytes": 0, "keep_bytes": 0, "lose_bytes": 0},
        },
    ],
    "erase_sectors": 2,
    "erase_bytes": 65536,
    "write_bytes": 33792,
    **_KEEP,
    "stay_bytes": 983040,
    "seconds": 9.25,
    "seconds_most": 15.0,
    "erase_seconds": 0.5,
    "baud": 115200,
    "assumed": ["flash of 1024 KiB, the largest of this chip"],
    "content": "ab" * 32,
    "proven": False,
}
_Updates = list[Update]
_Rows = list[dict[str, Any]]


class WatchedStore(Store):
    """The real store with two handles: refuse uploads, and look at (or fail) each write."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, 64 << 20, 16 << 20)
        self.refuse: BridgedError | None = None
        self.on_write: Callable[[int], object] = lambda _offset: None
        self.uploads: list[Upload] = []

    def open_upload(
        self, principal: str, size: int, sha256: str, offset: int = 0, name: str = "", type_hint: str = "auto"
    ) -> Upload:
        if self.refuse is not None:
            raise self.refuse
        upload = super().open_upload(principal, size, sha256, offset, name, type_hint)
        write = upload.write

        def watched(data: bytes | bytearray | memoryview) -> None:
            assert len(data) <= 65536, "an upload goes to the store in chunks"
            write(data)
            self.on_write(upload.offset)

        upload.write = watched  # type: ignore[method-assign]
        self.uploads.append(upload)
        return upload

    @property
    def open(self) -> int:
        """Uploads that nobody has ended."""
        return sum(upload._open for upload in self.uploads)

    def add(self, data: bytes, name: str = "") -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        upload = super().open_upload("test", len(data), sha256, 0, name)
        upload.write(data)
        return upload.finish().sha256
