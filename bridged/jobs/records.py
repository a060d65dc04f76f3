"""What the journal remembers beside jobs: open sessions, targets, kept bytes, credentials, the audit log. Data only.

``Change`` is what is written in one transaction.
"""

from __future__ import annotations

from dataclasses import dataclass

from bridged.events import SectorProven
from bridged.jobs.model import Job, Update


@dataclass(frozen=True, slots=True)
class OpenSession:
    """A target in the hands of a session: it is released at the next start if nobody closes this entry before (P4).

    ``hazard_s``: the longest that any one command of the running stage may need (P9), 0 where nothing is at risk.
    ``boot_id``: of the boot in which the entry was written; ``at``: when, in UTC seconds.
    """

    target: str
    job: str
    hazard_s: float
    boot_id: str
    at: float


@dataclass(frozen=True, slots=True)
class TargetRecord:
    """What was last seen in one target. ``content`` is empty while nobody knows what is in its flash.

    ``content``, ``image``, ``image_name``, ``evidence``, ``proven`` (UTC seconds) describe the last proof and are voided when
    an erase begins or another chip answers. What begins with ``good_`` outlives that: the last content that was proven and
    healthy, all that is needed to build it again, and the chip that it was proven in. ``good_content`` is empty for none.
    ``version``: the highest signed one that was ever proven there; nothing voids it. ``rates``, ``second_stage``: what ``past``
    keeps of how it is best spoken to.
    """

    name: str
    pid: int = 0
    family: str = ""
    names: str = ""
    uid: str = ""
    flash_bytes: int = 0
    layout: str = ""
    loader: str = ""
    identified: float = 0.0
    content: str = ""
    image: str = ""
    image_name: str = ""
    evidence: str = ""
    proven: float = 0.0
    good_image: str = ""
    good_type: str = ""
    good_patch: str = ""
    good_content: str = ""
    good_name: str = ""
    good_pid: int = 0
    good_uid: str = ""
    version: str = ""
    rates: str = ""
    second_stage: str = ""


@dataclass(frozen=True, slots=True)
class Backup:
    """What an interrupted job needs to go on: the bytes it keeps (P6), and from which chip they were read."""

    uid: str = ""
    kept: bytes = b""


@dataclass(frozen=True, slots=True)
class Change:
    """One transaction. ``updates``, ``proven`` and ``backup`` belong to ``job``; a job that ends loses its proofs and backup.

    ``anew``: what was proven and kept for the job until now goes first, for it will work on other content from here on, or
    begins from the beginning.
    ``session`` opens or rewrites the entry of its target; ``close`` names the target whose entry goes.
    """

    job: Job | None = None
    updates: tuple[Update, ...] = ()
    proven: tuple[SectorProven, ...] = ()
    backup: Backup | None = None
    session: OpenSession | None = None
    close: str = ""
    target: TargetRecord | None = None
    anew: bool = False


@dataclass(frozen=True, slots=True)
class Credential:
    """What opens this gateway. ``key``: ``sha256:HEX`` of a token, or ``cert:NAME`` of a client certificate.

    ``scopes``, ``targets``: words by comma; no targets means all. ``expires``: UTC seconds, 0 for never.
    """

    name: str
    key: str
    scopes: str
    targets: str
    created: float
    expires: float = 0.0
    made_by: str = ""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Who did what from where, and what came of it. ``who`` is empty for somebody who could not say who it is."""

    at: float
    who: str
    source: str
    what: str
    target: str = ""
    job: str = ""
    result: str = "ok"
    detail: str = ""
