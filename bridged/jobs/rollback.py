"""What a target goes back to when a new image is proven to be in its flash and does not live: which image, and how it ends.

A rollback is a second session of the same job. What it restores is the *last known good*: the content that was proven in this
very chip and, where a health probe is configured, answered it. ``Restore`` is that decision; it is on disk, as the result of
the job, before the second session begins, so that whatever happens afterwards it is the restore that is resumed and never the
bad image. Pure: no I/O, no clock; what a rollback costs and when it runs is the business of ``service``.

Invariants:

- Only what was proven in the chip that is there now (product id and unique id) is restored: bytes of one unit, such as a serial
  number, are not those of another.
- The restore keeps what it finds outside the good image, like any flash; ``outside=discard`` was said of the new image alone.
- It does not ask the interlock, for the application that would answer is the one that does not live; and it does not judge the
  vectors of an image that has run here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bridged.config import Policy
from bridged.errors import BridgedError, Unhealthy
from bridged.images import content
from bridged.images.content import Wanted
from bridged.jobs.model import Job, JobKind
from bridged.jobs.records import TargetRecord
from bridged.target.wishes import ERASE_EVERYTHING

UNASKED = "interlock,vectors"


@dataclass(frozen=True, slots=True)
class Restore:
    """``unhealthy``: the error that it began with. ``image``, ``type``, ``patch``: from which ``content``, a digest, is built
    again; ``name``: for people. ``attempts``: of the job, when it began."""

    unhealthy: dict[str, Any]
    image: str
    type: str
    patch: str
    content: str
    name: str
    attempts: int

    @classmethod
    def of(cls, job: Job) -> Restore | None:
        """The restore that ``job`` is in the middle of."""
        found = (job.result or {}).get("restore")
        return cls(unhealthy=job.result["unhealthy"], **found) if job.result and found else None

    def as_result(self, problem: BridgedError | None = None) -> dict[str, Any]:
        """The result of a job that is in the middle of this restore, or ended there with ``problem``."""
        fields = asdict(self)
        unhealthy = fields.pop("unhealthy")
        return {"unhealthy": unhealthy, "restore": fields} | ({"restore_error": problem.as_dict()} if problem else {})

    def wanted(self) -> Wanted:
        return content.wanted(self.image, {"type": self.type, "patch": self.patch})

    def params(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Options of its session; ``asked``: those of the job. What was to be protected in the end is so with it, too."""
        force = UNASKED + (f",{ERASE_EVERYTHING}" if asked.get("unprotect") else "")
        return {"force": force} | {name: asked[name] for name in ("entry", "unprotect", "protect") if name in asked}

    def said(self, what: str) -> Unhealthy:
        """The error that it began with, and ``what`` came of it."""
        return Unhealthy(f"{self.unhealthy['message']}; {what}", **self.unhealthy["facts"])


def why_not(record: TargetRecord, job: Job) -> str:
    """Why the last known good cannot take the place of what ``job`` flashed; empty where it can."""
    if job.kind is JobKind.XMODEM:
        return "the image went through the target's own bootloader"
    if not record.good_content:
        return "no other image was proven and healthy in this target before"
    if record.good_content == job.content:
        return "the last image that was proven and healthy in this target is this very one"
    if (record.good_pid, record.good_uid) != (record.pid, record.uid):
        return f"the last known good ({record.good_name}) belongs to another chip"
    return ""


def begin(record: TargetRecord, job: Job, unhealthy: Unhealthy) -> Restore:
    return Restore(
        unhealthy.as_dict(),
        record.good_image,
        record.good_type,
        record.good_patch,
        record.good_content,
        record.good_name,
        job.attempts,
    )


def may_be_good(record: TargetRecord, job: Job, rules: Policy) -> bool:
    """Whether the content that ``job`` proved can become the last known good.

    A VERIFY finds what somebody else has put there, or a part of it. So it takes the place of nothing that a job wrote into
    this chip; and where rules say what may be written, it has not been asked for a signature, and a restore would write it.
    """
    if job.kind is not JobKind.VERIFY:
        return True
    known = record.good_content and (record.good_pid, record.good_uid) == (record.pid, record.uid)
    return not known and not (rules.signature or rules.no_downgrade or rules.board)


def good_fields(record: TargetRecord, job: Job, name: str) -> dict[str, Any]:
    """Fields of ``record`` that make the content of ``job``, proven and healthy, its last known good."""
    return {
        "good_image": job.image,
        "good_type": str(job.params.get("type") or ""),
        "good_patch": str(job.params.get("patch") or ""),
        "good_content": job.content,
        "good_name": name,
        "good_pid": record.pid,
        "good_uid": record.uid,
    }
