"""What is known of each target: which chip answered last, what was last proven in its flash, what it may go back to.

A record changes here at once and is on disk with the next commit of its target: ``unwritten`` is what that commit takes along.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from bridged.config import Target as TargetConfig
from bridged.errors import BridgedError, VerifyError
from bridged.events import Identified
from bridged.jobs import policy, rollback
from bridged.jobs.journal import Journal
from bridged.jobs.lane import Lane, Live
from bridged.jobs.model import WITH_IMAGE, Job, JobKind
from bridged.jobs.past import learned, past_of
from bridged.jobs.ports import Clock
from bridged.jobs.records import TargetRecord
from bridged.target.request import Past


class Known:
    def __init__(self, journal: Journal, clock: Clock) -> None:
        self._journal = journal
        self._clock = clock
        self._records: dict[str, TargetRecord] = {}
        self._on_disk: dict[str, TargetRecord] = {}
        self._unwritten: set[str] = set()

    def load(self, records: Iterable[TargetRecord]) -> None:
        self._records = {record.name: record for record in records}
        self._on_disk = dict(self._records)

    def get(self, name: str) -> TargetRecord | None:
        return self._records.get(name)

    def of(self, name: str) -> TargetRecord:
        return self._records.get(name) or TargetRecord(name)

    def all(self) -> Iterable[TargetRecord]:
        """What is known, and what would be after a crash: a full disk can keep a record from being written for long."""
        return (*self._records.values(), *self._on_disk.values())

    def unwritten(self, name: str) -> TargetRecord | None:
        """The record, if it changed since it was last written."""
        return self._records[name] if name in self._unwritten else None

    def written(self, record: TargetRecord) -> None:
        """``record``, which ``unwritten`` gave, is on disk."""
        self._on_disk[record.name] = record
        if record is self._records[record.name]:
            self._unwritten.discard(record.name)

    def put_back(self, record: TargetRecord) -> None:
        """What was said of a target since ``record`` did not come to pass."""
        self._records[record.name] = record

    def identified(self, live: Live, event: Identified) -> None:
        """The chip has said who it is."""
        live.uid, name = event.uid, live.job.target
        old = self.of(name)
        if event.protected and old.pid == event.pid:
            return  # It is not allowed to say more than that; what is known of it stays.
        if old.content and (old.pid, old.uid) != (event.pid, event.uid):
            self.void(name)  # Another board, or one that does not say which it is.
        self._put(
            self.of(name),
            pid=event.pid,
            family=event.family,
            names=event.names,
            uid=event.uid,
            flash_bytes=event.flash_bytes,
            layout=event.layout,
            loader=event.loader,
            identified=self._clock.utc(),
        )

    def void(self, name: str) -> None:
        """Nobody knows any more what is in its flash."""
        self._put(self.of(name), content="", image="", image_name="", evidence="", proven=0.0)

    def ended(self, lane: Lane, live: Live, result: dict[str, Any], problem: BridgedError | None) -> None:
        """What a session brought, or what it disproved."""
        record, job = self.of(lane.name), live.job
        if problem is None and result.get("baud"):
            record = self._put(learned(record, result, self._clock.utc()))
        result.pop("second_stage_key", None)  # For us to remember, and nothing to anybody else.
        if problem is None and job.kind in WITH_IMAGE and result.get("evidence") == "full":
            restore = live.restore
            # One that cannot be asked (it needs a power cycle first) is proven, and not known to live.
            healthy = not _probed(lane.settings) or result.get("health") == "passed"
            good = {}
            if healthy and restore is None and rollback.may_be_good(record, job, lane.settings.policy):
                good = rollback.good_fields(record, job, live.image_name)
            self._put(
                record,
                content=restore.content if restore else job.content,
                image=restore.image if restore else job.image,
                image_name=live.image_name,
                evidence=str(result["evidence"]),
                proven=self._clock.utc(),
                version=record.version if restore else policy.newest(record.version, live.verdict.version),
                **good,
            )
        elif isinstance(problem, VerifyError) and record.content == job.content:
            self.void(lane.name)

    def past(self, job: Job) -> Past:
        """What the session may know beforehand; nothing about sectors where the job wants all of them written. Blocking."""
        name = job.target
        differs = job.kind in WITH_IMAGE and not job.touched and job.params.get("mode") != "full"
        sectors = self._journal.sectors(name) if differs else ()
        past = past_of(self.of(name), sectors, self._clock.utc(), in_doubt=self._journal.in_doubt(name))
        if job.kind is JobKind.DOCTOR:
            past = replace(past, bad_bauds=())  # It looks anew: the cable may be another since.
        return past if differs else replace(past, settled=False)

    def _put(self, record: TargetRecord, **changes: Any) -> TargetRecord:
        self._records[record.name] = record = replace(record, **changes)
        self._unwritten.add(record.name)
        return record


def _probed(settings: TargetConfig) -> bool:
    """Whether a health probe is configured."""
    return bool(settings.application.health.send or settings.application.health.expect or settings.lines.alive)
