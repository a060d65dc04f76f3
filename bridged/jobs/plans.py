"""What a flash would do, for who asks before flashing: nothing is touched, and one plan is made at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from bridged.config.values import parse_range
from bridged.errors import TooMany
from bridged.images import content
from bridged.images.content import Content, Wanted
from bridged.images.model import Span
from bridged.jobs.contents import Contents
from bridged.jobs.lane import Lane
from bridged.jobs.model import JobKind
from bridged.jobs.past import past_of, second_stage
from bridged.jobs.records import TargetRecord
from bridged.target.configured import likely_baud_of
from bridged.target.wishes import Wishes, wishes_of

PLANS_WAITING = 8  # Who may only look can have images parsed: one at a time, or they take the parsers and memory of jobs.


class Plans:
    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._one = asyncio.Lock()
        self._made: set[asyncio.Task[dict[str, Any]]] = set()

    async def make(
        self, lane: Lane, record: TargetRecord, image_ref: str, options: Mapping[str, Any], now: float
    ) -> dict[str, Any]:
        """See ``images.dry_run``. ``now``: UTC seconds. Raises ``TooMany``."""
        if len(self._made) >= PLANS_WAITING:
            raise TooMany(f"{len(self._made)} plans are being made already", limit=PLANS_WAITING)
        # It is made to its end: who asks and goes away must not have a second parser started beside the first.
        plan = asyncio.ensure_future(self._make(lane, record, image_ref, options, now))
        self._made.add(plan)
        plan.add_done_callback(self._made.discard)
        return await asyncio.shield(plan)

    async def _make(
        self, lane: Lane, record: TargetRecord, image_ref: str, options: Mapping[str, Any], now: float
    ) -> dict[str, Any]:
        async with self._one:
            wishes, wanted = wishes_of(JobKind.FLASH.value, options), content.wanted(image_ref, options)
            made = await self._contents.build(wanted)
            return await asyncio.to_thread(_plan, lane, record, wishes, wanted, made, options, now)


def _plan(
    lane: Lane,
    record: TargetRecord,
    wishes: Wishes,
    wanted: Wanted,
    made: Content,
    options: Mapping[str, Any],
    now: float,
) -> dict[str, Any]:
    from bridged.images.dry_run import Seen, dry_run  # late: it loads the tables of all chips

    settings = lane.settings
    tried = settings.stub == "auto" and options.get("entry") != "one-shot" and not second_stage(record, now).enough
    spans = made.spans or (Span(made.name, made.image.start, made.image.end),)
    spans += tuple(Span("patch", patch.address, patch.end) for patch in wanted.patches)
    found = dry_run(
        made.image,
        chip=settings.chip,
        flash_bytes=settings.flash_kib * 1024,
        layout=settings.layout,
        baud=likely_baud_of(settings, past_of(record, (), now), record.pid),
        seen=Seen(record.pid, record.flash_bytes, record.layout),
        spans=made.spans,
        discard_outside=options.get("outside") == "discard",
        force=frozenset(str(options.get("force") or "").split(",")),
        protect=[parse_range(text) for text in settings.protect],
        unprotect=wishes.unprotect,
        second_stage_baud=settings.stub_baud if tried else 0,
        supply_v=settings.supply_v,
    )
    parts = [{"name": span.name, "start": span.start, "end": span.end} for span in spans]
    proven = record.content == made.image.digest
    return {"target": lane.name, "part": parts, **found, "content": made.image.digest, "proven": proven}
