"""What a target has taught: which rates it carries, what was last proven in which sector of its flash, and whether the
second-stage loader runs in it.

Kept as small texts in the record of a target. It only ever saves time: a rate that is remembered must prove itself again in
each session, a sector that is remembered is read before it is left alone, and without the second-stage loader a job is as safe
as with it. Pure functions; the journal stores, ``service`` decides when.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from bridged.events import SectorProven
from bridged.jobs.records import TargetRecord
from bridged.target.request import Past, Tried

BAD_FOR_S = 7 * 86400.0  # A rate that failed is tried again after a week: the cable may have been mended since.
RATES = 16  # Of one target; a ladder has six.
GIVEN_UP = "given up: "  # How ``second_stage`` of a result begins then.
WHY_CHARS = 200


def past_of(record: TargetRecord, sectors: Iterable[SectorProven], now: float, *, in_doubt: bool = False) -> Past:
    """What a session is told. ``now``: UTC seconds. ``in_doubt``: as ``Journal.in_doubt``; a later proof of other sectors does
    not say that those were erased to the end."""
    good, bad = [], []
    for baud, (good_at, bad_at) in _rates(record).items():
        if bad_at > good_at and now - bad_at < BAD_FOR_S:
            bad.append(baud)
        elif good_at:
            good.append(baud)
    # Without a proof of the whole nothing is known of the parts.
    known = tuple(sectors) if record.content else ()
    age_s = max(0.0, now - record.proven) if record.content else 0.0
    rates = tuple(sorted(good)), tuple(sorted(bad))
    settled = (not record.uid or bool(record.content)) and not in_doubt
    tried = second_stage(record, now)
    return Past(record.uid, record.content, age_s, *rates, known, record.flash_bytes, record.layout, settled, tried)


def second_stage(record: TargetRecord, now: float) -> Tried:
    """How the second-stage loader failed there, as long as that counts. Who asks compares the key."""
    found = json.loads(record.second_stage or "{}")
    age_s = max(0.0, now - float(found.get("at", 0)))
    if not found or age_s >= BAD_FOR_S:
        return Tried()
    return Tried(str(found["key"]), int(found["failures"]), age_s, str(found["why"]))


def learned(record: TargetRecord, result: Mapping[str, Any], now: float) -> TargetRecord:
    """The record after a session that ended well, at ``now``."""
    rates = _rates(record)
    failed = {int(baud) for baud in result.get("bad_bauds") or ()}
    for baud in failed:
        rates[baud] = (rates.get(baud, (0.0, 0.0))[0], now)
    if baud := int(result.get("baud") or 0):
        # One that failed in this very session was all that was left.
        rates[baud] = (0.0, now) if baud in failed else (now, rates.get(baud, (0.0, 0.0))[1])
    newest = sorted(rates.items(), key=lambda item: max(item[1]))[-RATES:]
    text = json.dumps({str(b): [round(g), round(f)] for b, (g, f) in sorted(newest)}, separators=(",", ":"))
    return replace(record, rates=text, second_stage=_second_stage(record, result, now))


def _second_stage(record: TargetRecord, result: Mapping[str, Any], now: float) -> str:
    """The text after a session: nothing where the loader worked, one failure more where it was given up."""
    said, key = str(result.get("second_stage") or ""), str(result.get("second_stage_key") or "")
    if said == "used":
        return ""
    if not key or not said.startswith(GIVEN_UP):
        return record.second_stage
    before = second_stage(record, now)
    failures = before.failures + 1 if before.key == key else 1
    why = said.removeprefix(GIVEN_UP)[:WHY_CHARS]
    return json.dumps({"key": key, "failures": failures, "at": round(now), "why": why}, separators=(",", ":"))


def _rates(record: TargetRecord) -> dict[int, tuple[float, float]]:
    """Rate: when it was last good and last bad, UTC seconds, 0 for never."""
    return {int(baud): (float(at[0]), float(at[1])) for baud, at in json.loads(record.rates or "{}").items()}
