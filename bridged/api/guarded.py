"""The job functions as one principal may use them: every right is asked here, once, for all listeners.

``Guarded`` has the methods of ``JobsApi`` and calls the real ones after the rights were checked; a listener that gets one of
these instead of ``Jobs`` cannot forget a check. What somebody may not see does not exist for him: lists are shortened, and a
job of another's target is as unknown as one that never was. Whatever changes something is noted in the audit log, refusals too.

Images belong to no target, and their names to everybody who has a right to all of them. Who has a right to some only names
images by their whole SHA-256, or by names of his own (``image_name``, ``image_ref``): else he could put his image under a name
by which somebody else flashes a target that he has no right to, or flash and read back what he may not see. Ids of jobs are his
own in the same way: one that was taken before is answered with the request that took it.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bridged.api.auth import Authority, Principal
from bridged.api.ports import JobsApi, Rows, Updates
from bridged.errors import BridgedError, UnknownJob, WrongToken
from bridged.images import content
from bridged.jobs.model import ID_CHARS, Job, JobState, Submission, Update
from bridged.protocol.verbs import Scope

_Jobs = list[Job]
SHA256 = re.compile(r"[0-9a-f]{64}")


class Guarded:
    """``jobs`` for ``who``. Every method may raise ``LoginFirst``, ``NotAllowed`` and ``WrongToken`` (revoked meanwhile)."""

    def __init__(self, jobs: JobsApi, authority: Authority, who: Principal) -> None:
        self._jobs, self._authority, self.who = jobs, authority, who

    def require(self, scope: Scope, target: str | None = None, doing: str = "this") -> None:
        """For what is no job function: images (``target`` ``None``), the console."""
        if not self._authority.valid(self.who):
            raise WrongToken(f"{self.who.credential} was revoked or has expired")
        self.who.require(scope, target, doing)

    # --- what changes something -----------------------------------------------------------------------------------

    async def submit(self, sub: Submission) -> Job:
        """The submission gets the name and the place of its sender here, and nowhere else."""
        doing = str(sub.kind)
        try:
            for target in (sub.target, *filter(None, str(sub.params.get("resets") or "").split(","))):
                self.require(Scope.FLASH, target, doing)
            image, own_id = self.image_ref(sub.image), self.job_id(sub.id)
            whole = replace(sub, image=image, id=own_id, principal=self.who.name, source=self.who.source)
            job = await self._jobs.submit(whole)
        except BridgedError as error:
            self.note(doing, target=sub.target, result=error.code)
            raise
        self.note(doing, target=sub.target, job=job.id, result=str(job.state))
        return job

    async def cancel(self, job_id: str, force: bool = False) -> Job:
        job = self.get(job_id)
        try:
            self.require(Scope.FLASH, job.target, "cancel")
            found = await self._jobs.cancel(job_id, force)
        except BridgedError as error:
            self.note("cancel", target=job.target, job=job_id, result=error.code)
            raise
        self.note("cancel", target=job.target, job=job_id, result=str(found.state), detail="forced" if force else "")
        return found

    # --- images ---------------------------------------------------------------------------------------------------

    def image_name(self, name: str) -> str:
        """Under which name an image of this principal is staged."""
        return f"{self.who.name}/{name}" if name and self.who.targets is not None else name

    def own_name(self, name: str) -> str:
        """The name as its sender said it."""
        return name.removeprefix(f"{self.who.name}/") if self.who.targets is not None else name

    def image_ref(self, image: str) -> str:
        """Which images are meant by what this principal calls ``IMAGE[@ADDR][,...]``. Raises ``BadRequest``."""
        if not image or self.who.targets is None:
            return image
        parts = content.parse_parts(image)
        return ",".join(str(p if SHA256.fullmatch(p.ref) else replace(p, ref=self.image_name(p.ref))) for p in parts)

    def job_id(self, said: str) -> str:
        """Under which id of a client a job of this principal is found again."""
        if not said or self.who.targets is None:
            return said
        own = f"{self.who.name}/{said}"
        return own if len(own) <= ID_CHARS else f"{self.who.name}/{hashlib.sha256(said.encode()).hexdigest()}"

    # --- both -----------------------------------------------------------------------------------------------------

    def note(self, what: str, *, target: str = "", job: str = "", result: str = "ok", detail: str = "") -> None:
        """Nothing is noted of somebody unknown: whoever knocks must not be able to fill the journal."""
        if self.who.known:
            self._authority.note(self.who, what, target=target[:64], job=job, result=result, detail=detail)

    # --- what only looks ------------------------------------------------------------------------------------------

    def get(self, job_id: str) -> Job:
        self.require(Scope.READ, None, "looking at a job")
        job = self._jobs.get(job_id)
        if not self.who.may(Scope.READ, job.target):
            raise UnknownJob(f"there is no job {job_id!r}", job=job_id[:64])
        return job

    def find(self, id: str) -> Job:
        """By the id that this principal gave it."""
        return self.get(self._jobs.find(self.job_id(id)).id)

    def list(self, target: str | None = None, state: JobState | None = None, limit: int = 50, before: str = "") -> _Jobs:
        self.require(Scope.READ, target, "listing jobs")
        if before:
            self.get(before)
        if target is not None or self.who.targets is None:
            return self._jobs.list(target, state, limit, before)
        known = self._names() & self.who.targets
        found = [job for name in sorted(known) for job in self._jobs.list(name, state, limit, before)]
        return sorted(found, key=lambda job: job.created, reverse=True)[:limit]

    def log(self, job_id: str, from_seq: int = 0, limit: int | None = None) -> Updates:
        self.get(job_id)
        return self._jobs.log(job_id, from_seq, limit)

    def watch(self, job_id: str | None = None, target: str | None = None) -> AsyncIterator[Update]:
        self.require(Scope.READ, target, "watching")
        if job_id is not None:
            self.get(job_id)
        return self._watched(self._jobs.watch(job_id=job_id, target=target))

    async def _watched(self, source: AsyncIterator[Update]) -> AsyncGenerator[Update, None]:
        """Rights are asked at each update: a token that is revoked sees nothing more."""
        close = getattr(source, "aclose", None)
        try:
            async for update in source:
                self.require(Scope.READ, None, "watching")
                if self.who.may(Scope.READ, update.target):
                    yield update
        finally:
            if close is not None:
                with contextlib.suppress(BridgedError):
                    await close()

    def targets(self) -> Rows:
        self.require(Scope.READ, None, "listing targets")
        return [row for row in self._jobs.targets() if self.who.may(Scope.READ, str(row["name"]))]

    def _names(self) -> set[str]:
        return {str(row["name"]) for row in self._jobs.targets()}

    def info(self, name: str) -> dict[str, Any]:
        self.require(Scope.READ, name, "looking at a target")
        return self._jobs.info(name)

    async def plan(self, target: str, image_ref: str, params: dict[str, Any]) -> dict[str, Any]:
        self.require(Scope.READ, target, "planning")
        return await self._jobs.plan(target, self.image_ref(image_ref), params)

    def ready(self) -> tuple[bool, str]:
        return self._jobs.ready()

    def read_result(self, job_id: str) -> Path:
        self.get(job_id)
        return self._jobs.read_result(job_id)

    def trace_file(self, job_id: str) -> Path | None:
        self.get(job_id)
        return self._jobs.trace_file(job_id)
